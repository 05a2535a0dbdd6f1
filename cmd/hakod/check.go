package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/spf13/pflag"

	"github.com/hako-engine/hako/engine"
	"github.com/hako-engine/hako/image"
	"github.com/hako-engine/hako/internal/version"
	"github.com/hako-engine/hako/snapshot"
	"github.com/hako-engine/hako/store"
)

// errFound marks that a check found problems which are still there.
var errFound = errors.New("the check found problems")

// errNotChecked marks that a check could not be made.
var errNotChecked = errors.New("not checked")

// exitNotChecked is for a check that could not be made.
const exitNotChecked = 3

// checked lists the rooms that a check looks at, the lowest first.
func checked(st *store.Store, images *image.Service, sns map[string]snapshots.Snapshotter, nets checkedNetworks) []engine.Checked {
	rooms := []engine.Checked{st, image.Checker{Service: images, Namespaces: st.Namespaces()}}
	for _, name := range slices.Sorted(maps.Keys(sns)) {
		if c, ok := sns[name].(engine.Checked); ok {
			rooms = append(rooms, c)
		}
	}
	return append(rooms, nets)
}

// checkFlags are those of hakod check besides the daemon's own.
type checkFlags struct {
	repair, deep bool
	format       string
}

func (f *checkFlags) flags(fs *pflag.FlagSet) {
	fs.BoolVar(&f.repair, "repair", false, "")
	fs.BoolVar(&f.deep, "deep", false, "")
	fs.StringVar(&f.format, "format", "text", "")
	for _, name := range []string{"repair", "deep", "format"} {
		_ = fs.MarkHidden(name) // of one command: the usage has them
	}
}

// check checks a root that no daemon has open, and leaves it as it is without --repair.
func check(ctx context.Context, cfg config, f checkFlags, out io.Writer, log *slog.Logger) error {
	if f.format != "text" && f.format != "json" {
		return fmt.Errorf("--format is %q, must be text or json: %w", f.format, errUsage)
	}
	if _, err := os.Stat(filepath.Join(cfg.Root, "meta.db")); err != nil {
		return fmt.Errorf("no root of hako's: %w", err)
	}
	root, err := lockFile(filepath.Join(cfg.Root, "lock"), "the root "+cfg.Root+": ask it with hako system check")
	if err != nil {
		return err
	}
	defer root.Close()
	report, err := checkRoot(ctx, cfg, f, log)
	if err != nil {
		return err
	}
	if f.format == "json" {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		err = enc.Encode(report)
	} else {
		err = printReport(out, report)
	}
	if err == nil && !report.Clean() {
		return errFound
	}
	return err
}

func checkRoot(ctx context.Context, cfg config, f checkFlags, log *slog.Logger) (engine.CheckReport, error) {
	pages, err := store.CheckPages(cfg.Root)
	if err != nil {
		return engine.CheckReport{}, err
	}
	if len(pages) > 0 {
		if !f.repair {
			return engine.CheckReport{Findings: pages}, nil
		}
		done, err := store.Salvage(cfg.Root)
		if err != nil {
			return engine.CheckReport{}, err
		}
		for i := range pages {
			pages[i].Repaired = done
		}
	}
	st, err := store.Open(cfg.Root, store.Options{Log: log, NoBackgroundGC: true})
	if err != nil {
		return engine.CheckReport{}, err
	}
	defer st.Close()
	sns := map[string]snapshots.Snapshotter{}
	for _, name := range []string{"erofs", "overlayfs", "native"} {
		if _, err := os.Stat(filepath.Join(cfg.Root, name)); name == "erofs" && errors.Is(err, fs.ErrNotExist) {
			continue // of a root from before there was one
		}
		sn, err := snapshot.Inspect(name, filepath.Join(cfg.Root, name), st)
		if err != nil {
			return engine.CheckReport{}, err
		}
		defer func() {
			sn.Close()
			// What a repair had to look into.
			if mounts := snapshot.InspectMounts(filepath.Join(cfg.Root, name)); snapshot.UnmountAll(mounts) == nil {
				_ = os.Remove(mounts)
			}
		}()
		sns[name] = sn
	}
	if cfg.Snapshotter == autoSnapshotter {
		if cfg.Snapshotter, err = chooseSnapshotter(cfg.Snapshotter, sns, nil); err != nil {
			return engine.CheckReport{}, err
		}
	}
	images := image.New(image.Options{
		Content: st.Content(), Images: st.Images(), Leases: st.Leases(), Snapshotters: sns, Default: cfg.Snapshotter,
		RegistryDir: cfg.RegistryDir, UserAgent: "hako/" + version.Version, Log: log,
	})
	records := &engine.RecordCheck{
		Root: cfg.Root, State: cfg.State, Containers: st.Records("containers"), Sandboxes: st.Records("sandboxes"), Volumes: st.Records("volumes"),
		Images: images, Snapshotters: sns,
	}
	report, err := engine.CheckRooms(ctx, append(checked(st, images, sns, newCheckedNetworks(cfg, st, true)), records), nil, records.InUse, engine.CheckOptions{Deep: f.deep, Repair: f.repair})
	report.Findings = append(pages, report.Findings...)
	return report, err
}

// printReport writes a report for people.
func printReport(w io.Writer, r engine.CheckReport) error {
	left := 0
	for _, f := range r.Findings {
		where := f.Room
		if f.Namespace != "" {
			where += ", " + f.Namespace
		}
		if _, err := fmt.Fprintf(w, "%-8s  %s  %s (%s)\n          %s\n", f.Severity, f.Problem, f.Object, where, f.Detail); err != nil {
			return err
		}
		switch {
		case f.Repaired != "":
			fmt.Fprintf(w, "          repaired: %s\n", f.Repaired)
		case f.Failed != "":
			fmt.Fprintf(w, "          not repaired: %s\n", f.Failed)
		}
		if f.Repaired == "" && f.Severity != store.Note {
			left++
		}
	}
	if left == 0 {
		_, err := fmt.Fprintln(w, "clean")
		return err
	}
	word := "problems"
	if left == 1 {
		word = "problem"
	}
	_, err := fmt.Fprintf(w, "%d %s\n", left, word)
	return err
}
