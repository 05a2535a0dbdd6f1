package main

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/engine"
	"github.com/hako-engine/hako/network"
	"github.com/hako-engine/hako/store"
)

// checkedNetworks has a check look at the networks' records and endpoints.
type checkedNetworks struct {
	st      *store.Store
	state   string // folder of the network room
	offline bool   // no daemon has them loaded
}

func newCheckedNetworks(cfg config, st *store.Store, offline bool) checkedNetworks {
	return checkedNetworks{st, filepath.Join(cfg.State, "network"), offline}
}

func (c checkedNetworks) once() ([]store.Finding, error) {
	owner := func(id string) bool {
		for _, kind := range []string{"containers", "sandboxes"} {
			var v json.RawMessage
			if err := c.st.Records(kind).Get(context.Background(), id, &v); !errdefs.IsNotFound(err) {
				return true
			}
		}
		return false
	}
	problems, err := network.Check(network.CheckOptions{Records: c.st.Records("networks"), State: c.state, Owner: owner})
	var found []store.Finding
	for _, p := range problems {
		f := store.Finding{Room: "network", Problem: p.Kind, Severity: store.Damage, Object: p.Object, Detail: p.Detail}
		if p.Note {
			f.Severity = store.Note
		}
		found = append(found, f)
	}
	return found, err
}

// Check finds what looks wrong twice: beside a daemon it may have been under way.
func (c checkedNetworks) Check(ctx context.Context, o store.CheckOptions) ([]store.Finding, error) {
	o.Report("reading networks", 0, 1)
	first, err := c.once()
	if err != nil || len(first) == 0 || c.offline {
		return first, err
	}
	select {
	case <-time.After(500 * time.Millisecond):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	again, err := c.once()
	keys := map[string]bool{}
	for _, f := range first {
		keys[f.Key()] = true
	}
	var found []store.Finding
	for _, f := range again {
		if keys[f.Key()] {
			found = append(found, f)
		}
	}
	return found, err
}

// Repair drops a record that nothing can be made of. Which of two networks is right it
// cannot tell, and endpoints are the daemon's to remove.
func (c checkedNetworks) Repair(ctx context.Context, f store.Finding, _ engine.InUse) (string, error) {
	if f.Problem != network.ProblemRecord {
		return "", fmt.Errorf("remove one of the networks, or stop and start the containers: %w", errdefs.ErrUnavailable)
	}
	if !c.offline {
		return "", fmt.Errorf("stop the daemon, then hakod check --repair: %w", errdefs.ErrUnavailable)
	}
	if err := c.st.Records("networks").Delete(ctx, f.Object); err != nil {
		return "", err
	}
	return "the record was dropped", nil
}
