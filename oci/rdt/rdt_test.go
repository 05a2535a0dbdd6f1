//go:build linux

package rdt

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// resctrl makes a directory that looks like a resctrl file system: what the kernel makes
// with a group is made by hand.
func resctrl(t *testing.T, groups ...string) string {
	t.Helper()
	root := t.TempDir()
	for _, g := range append([]string{""}, groups...) {
		if err := os.MkdirAll(filepath.Join(root, g, "mon_groups"), 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{"schemata": "    L3:0=0ff;1=0ff\n    MB:0=100;1=100\n", "tasks": ""} {
			if err := os.WriteFile(filepath.Join(root, g, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	return root
}

func TestMount(t *testing.T) {
	dir, err := Mount([]byte("30 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n31 23 0:27 / /sys/fs/resctrl rw,relatime - resctrl resctrl rw\n"))
	if err != nil || dir != "/sys/fs/resctrl" {
		t.Errorf("%q %v", dir, err)
	}
	if _, err := Mount([]byte("30 23 0:26 / /x rw - tmpfs resctrl rw\n")); !errors.Is(err, ErrNotMounted) || !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
}

func TestGroups(t *testing.T) {
	for name, k := range map[string]struct {
		r       specs.LinuxIntelRdt
		control string
		own     bool
		fails   string
	}{
		"existing":            {specs.LinuxIntelRdt{ClosID: "gold"}, "gold", false, ""},
		"missing":             {specs.LinuxIntelRdt{ClosID: "none"}, "", false, "no such group"},
		"default":             {specs.LinuxIntelRdt{ClosID: "/"}, "", false, ""},
		"same schema":         {specs.LinuxIntelRdt{ClosID: "gold", L3CacheSchema: "L3:0=ff;1=0FF", MemBwSchema: "MB:0=100"}, "gold", false, ""},
		"other schema":        {specs.LinuxIntelRdt{ClosID: "gold", L3CacheSchema: "L3:0=f"}, "", false, "another schema"},
		"other resource":      {specs.LinuxIntelRdt{ClosID: "/", Schemata: []string{"L2:0=f"}}, "", false, "another schema"},
		"of its own":          {specs.LinuxIntelRdt{}, "box", true, ""},
		"monitored":           {specs.LinuxIntelRdt{ClosID: "gold", EnableMonitoring: true}, "gold", false, ""},
		"new without schemas": {specs.LinuxIntelRdt{ClosID: "silver", Schemata: []string{"L3:0=1"}}, "", false, "schemata"}, // no kernel makes the file
	} {
		t.Run(name, func(t *testing.T) {
			root := resctrl(t, "gold")
			g, err := New(root, "box", &k.r)
			if k.fails != "" {
				if err == nil || !strings.Contains(err.Error(), k.fails) || !strings.Contains(err.Error(), "linux.intelRdt") {
					t.Errorf("%v, want %q", err, k.fails)
				}
				if _, err := os.Stat(filepath.Join(root, "silver")); err == nil {
					t.Error("what was made is left behind")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if g.Control != filepath.Join(root, k.control) || g.Own != k.own || (g.Monitor != "") != k.r.EnableMonitoring {
				t.Errorf("%+v", g)
			}
			for _, dir := range []string{g.Control, g.Monitor} {
				if dir != "" {
					os.WriteFile(filepath.Join(dir, "tasks"), nil, 0o644)
				}
			}
			if err := g.Add(77); err != nil {
				t.Fatal(err)
			}
			for _, dir := range []string{g.Control, g.Monitor} {
				if dir == "" {
					continue
				}
				if raw, err := os.ReadFile(filepath.Join(dir, "tasks")); err != nil || string(raw) != "77" {
					t.Errorf("%s: %q %v", dir, raw, err)
				}
				os.Remove(filepath.Join(dir, "tasks"))
			}
			if err := g.Delete(); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(g.Control); (err != nil) != k.own {
				t.Errorf("after Delete: %v", err)
			}
			if err := g.Delete(); err != nil {
				t.Errorf("twice: %v", err)
			}
		})
	}
}

func TestSchemataAreWrittenInOrder(t *testing.T) {
	lines := schemata(&specs.LinuxIntelRdt{L3CacheSchema: "L3:a", MemBwSchema: "MB:b", Schemata: []string{"L2:c", "L3:d"}})
	if got := strings.Join(lines, " "); got != "L3:a MB:b L2:c L3:d" {
		t.Error(got)
	}
}

// What a killed creation leaves goes, unless somebody is in it.
func TestPurge(t *testing.T) {
	t.Parallel()
	for name, k := range map[string]struct {
		r           specs.LinuxIntelRdt
		busy        string // a group with a task
		gone, stays []string
	}{
		"own group":       {specs.LinuxIntelRdt{L3CacheSchema: "L3:0=f", EnableMonitoring: true}, "", []string{"id"}, []string{"shared"}},
		"not got so far":  {specs.LinuxIntelRdt{L3CacheSchema: "L3:0=f"}, "", []string{"id"}, nil},
		"group of others": {specs.LinuxIntelRdt{ClosID: "shared", EnableMonitoring: true}, "", []string{"shared/mon_groups/id"}, []string{"shared"}},
		"with a task":     {specs.LinuxIntelRdt{L3CacheSchema: "L3:0=f"}, "id", nil, []string{"id"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			root := t.TempDir()
			for _, dir := range append(k.gone, k.stays...) {
				if name == "not got so far" {
					continue
				}
				if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if k.busy != "" {
				if err := os.WriteFile(filepath.Join(root, k.busy, "tasks"), []byte("77\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if err := Purge(root, "id", &k.r); err != nil {
				t.Fatal(err)
			}
			for _, dir := range k.gone {
				if _, err := os.Stat(filepath.Join(root, dir)); err == nil {
					t.Errorf("%s is left", dir)
				}
			}
			for _, dir := range k.stays {
				if _, err := os.Stat(filepath.Join(root, dir)); err != nil {
					t.Error(err)
				}
			}
		})
	}
}
