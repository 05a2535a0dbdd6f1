package cni

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
)

const (
	// gcLimit is how long one collection may keep pods from being attached.
	gcLimit = 20 * time.Second
	// sweepers is how many attachments are undone side by side.
	sweepers = 4
	// sweepTries is how often it is tried at once.
	sweepTries = 3
)

// owe remembers an attachment that has to be undone later; settle forgets it.
func (m *Manager) owe(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.owed[id] = true
}

func (m *Manager) settle(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.owed, id)
	delete(m.inherited, id)
}

// GC undoes what is there for sandboxes of an earlier daemon that are not in valid, and lets plugins of the
// specification 1.1 collect the rest. It is to be called when those sandboxes are known; what is set up by this
// daemon is safe. What cannot be undone now is tried again in the background; the error tells of it.
func (m *Manager) GC(ctx context.Context, valid []string) error {
	m.mu.Lock()
	for _, id := range valid {
		delete(m.inherited, id)
	}
	maps.Copy(m.owed, m.inherited)
	clear(m.inherited)
	m.mu.Unlock()
	err := m.sweep(ctx)
	return errors.Join(err, m.collect(ctx))
}

// sweep detaches what is owed.
func (m *Manager) sweep(ctx context.Context) error {
	m.mu.Lock()
	ids := make(chan string, len(m.owed))
	for id := range m.owed {
		ids <- id
	}
	close(ids)
	m.mu.Unlock()
	var errs []error
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range min(sweepers, len(ids)) {
		wg.Go(func() {
			for id := range ids {
				err := m.Teardown(ctx, id)
				// The DEL of a plugin whose ADD was cut short fails where that had not come to, as Debian's bridge
				// does without its chain of iptables; it has removed the rest by then, and the next one ends well.
				for range sweepTries - 1 {
					if err == nil || ctx.Err() != nil {
						break
					}
					err = m.Teardown(ctx, id)
				}
				if err != nil {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// collect runs GC of the plugins, with the attachments that are in use, while nothing is attached or detached.
func (m *Manager) collect(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, gcLimit, errStuck)
	defer cancel()
	conf, err := m.current(ctx)
	if err != nil {
		conf = nil // the networks of the attachments are there none the less
	}
	open, err := m.gate.exclude(ctx)
	if err != nil {
		return fmt.Errorf("collect garbage of the pods' network: %w", err)
	}
	defer open()
	ids, err := m.records.ids()
	if err != nil {
		return fmt.Errorf("collect garbage of the pods' network: %w", err)
	}
	lists := map[string]*libcni.NetworkConfigList{}
	used := map[string][]types.GCAttachment{}
	if conf != nil {
		lists[conf.list.Name], used[conf.list.Name] = conf.list, []types.GCAttachment{}
	}
	var errs []error
	for _, id := range ids {
		rec, err := m.records.get(id)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if m.owes(id) {
			continue
		}
		used[rec.Network] = append(used[rec.Network], types.GCAttachment{ContainerID: rec.ID, IfName: rec.IfName})
		if lists[rec.Network] == nil {
			list, err := rec.list()
			if err != nil {
				errs = append(errs, fmt.Errorf("network of sandbox %s: %w", id, err))
				continue
			}
			lists[rec.Network] = list
		}
	}
	if len(errs) > 0 {
		// One that cannot be read may be in use: collecting without it would take its address.
		return fmt.Errorf("collect garbage of the pods' network: %w", errors.Join(errs...))
	}
	for name, list := range lists {
		if err := m.cni.GCNetworkList(ctx, list, &libcni.GCArgs{ValidAttachments: used[name]}); err != nil {
			errs = append(errs, fmt.Errorf("collect garbage of network %s: %w", name, classify(err)))
		}
	}
	return errors.Join(errs...)
}

func (m *Manager) owes(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.owed[id]
}

// retry tries in the background to undo what could not be undone before.
func (m *Manager) retry(ctx context.Context) {
	m.mu.Lock()
	n := len(m.owed)
	m.mu.Unlock()
	if n == 0 || !m.sweeping.CompareAndSwap(false, true) {
		return
	}
	m.background.Go(func() {
		defer m.sweeping.Store(false)
		err := m.sweep(ctx)
		if err == nil || ctx.Err() != nil {
			m.complaint = ""
			return
		}
		if err.Error() != m.complaint { // once, not every few seconds
			m.log.Warn("what CNI plugins did for sandboxes that are gone is not undone yet", "error", err)
		}
		m.complaint = err.Error()
	})
}
