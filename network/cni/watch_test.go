package cni

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// TestReadyFollowsTheFolder: it is watched, not polled (Poll is an hour), through all that can happen to it.
func TestReadyFollowsTheFolder(t *testing.T) {
	w := newWorld(t, "main", "other")
	if err := os.RemoveAll(w.conf); err != nil {
		t.Fatal(err)
	}
	m := w.open(nil)
	// m.health instead of Ready, which has the folder looked at.
	ready := func(text string) {
		t.Helper()
		eventually(t, "ready with "+text, func() bool {
			h := m.health.Load()
			return h.err == nil && h.conf.list.Name == text
		})
	}
	not := func(text string) {
		t.Helper()
		var err error
		eventually(t, "not ready because of "+text, func() bool {
			err = m.health.Load().err
			return err != nil && strings.Contains(err.Error(), text)
		})
		if !errdefs.IsUnavailable(err) {
			t.Errorf("class of %v", err)
		}
	}
	mkdir := func() {
		t.Helper()
		if err := os.MkdirAll(w.conf, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	rename := func(from, to string) {
		t.Helper()
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	not("no CNI configuration in " + w.conf)
	mkdir()
	w.write("50-b.conflist", "1.0.0", "b", fake{Type: "main", Dir: w.fakes})
	ready("b")
	w.write("10-a.conflist", "1.0.0", "a", fake{Type: "main", Dir: w.fakes})
	ready("a") // the first by name
	w.writeRaw("10-a.conflist", `{"cniVersion": "1.0.0", "na`)
	not("10-a.conflist") // and no other in its place
	if err := os.Remove(filepath.Join(w.conf, "10-a.conflist")); err != nil {
		t.Fatal(err)
	}
	ready("b")
	w.writeRaw("05-c.conf", `{"cniVersion": "0.4.0", "name": "c", "type": "other"}`)
	ready("c")
	w.writeRaw("04-d.json", `{"cniVersion": "0.3.1", "name": "d", "type": "other"}`)
	ready("d")
	w.writeRaw("03-e.txt", `{"cniVersion": "0.3.1", "name": "e", "type": "other"}`)

	// The folder is replaced, as packages and operators do.
	rename(w.conf, w.conf+".old")
	not("no CNI configuration")
	mkdir()
	w.write("x.conflist", "1.0.0", "x", fake{Type: "main", Dir: w.fakes})
	ready("x")
	w.write("x.conflist", "1.0.0", "y", fake{Type: "main", Dir: w.fakes})
	ready("y")
	if err := os.RemoveAll(w.conf); err != nil {
		t.Fatal(err)
	}
	not("no CNI configuration")
	rename(w.conf+".old", w.conf)
	ready("d")

	// As a ConfigMap is mounted: a link to a folder is exchanged.
	for _, n := range []string{"v1", "v2"} {
		if err := os.Mkdir(filepath.Join(w.conf, n), 0o700); err != nil {
			t.Fatal(err)
		}
		w.write(n+"/data", "1.0.0", n, fake{Type: "main", Dir: w.fakes})
		if err := os.Symlink(n, filepath.Join(w.conf, "next")); err != nil {
			t.Fatal(err)
		}
		rename(filepath.Join(w.conf, "next"), filepath.Join(w.conf, "current"))
		if n == "v1" {
			if err := os.Symlink("current/data", filepath.Join(w.conf, "00.conflist")); err != nil {
				t.Fatal(err)
			}
		}
		ready(n)
	}
}

func TestReadyAsksPlugins(t *testing.T) {
	w := newWorld(t, "main", "old")
	m := w.open(nil)
	conf := func(version string, plugin fake) {
		t.Helper()
		plugin.Dir = w.fakes
		w.write("10-x.conflist", version, "testnet", plugin)
	}
	wait := func(text string) {
		t.Helper()
		eventually(t, text, func() bool {
			err := m.health.Load().err
			return text == "ready" && err == nil || text != "ready" && err != nil && strings.Contains(err.Error(), text) && errdefs.IsUnavailable(err)
		})
	}
	conf("1.1.0", fake{Type: "main", Fail: "STATUS", Code: 50})
	wait("told to fail")
	conf("1.1.0", fake{Type: "main"})
	wait("ready")
	conf("1.0.0", fake{Type: "main", Fail: "STATUS"}) // is not asked
	wait("ready")
	conf("1.0.0", fake{Type: "absent"})
	wait(`CNI plugin "absent" is not in`)
	if _, err := m.Setup(context.Background(), Pod{ID: "x"}); !errdefs.IsUnavailable(err) && !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
	conf("1.0.0", fake{Type: "main", IPAM: map[string]any{"type": "ipam"}})
	wait(`CNI plugin "ipam" is not in`)
	conf("1.1.0", fake{Type: "old"})
	wait(`CNI plugin "old" does not speak version "1.1.0"`)
	// The plugin is installed after its configuration: whoever asks has it looked up again.
	conf("1.0.0", fake{Type: "late"})
	wait(`"late"`)
	exe, _ := os.Executable()
	if err := os.Symlink(exe, filepath.Join(w.bin, "late")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the late plugin", func() bool { return m.Ready() == nil })
}

// TestVersions: they are asked once for each binary, and the best that all speak is chosen.
func TestVersions(t *testing.T) {
	w := newWorld(t, "main", "old", "mute")
	w.writeRaw("10-x.conflist", `{"cniVersions": ["0.4.0", "1.0.0", "1.1.0", "9.0.0"], "name": "n", "plugins": [{"type": "main"}, {"type": "old"}, {"type": "mute"}]}`)
	m := w.open(nil)
	for range 3 {
		c, err := m.current(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if c.list.CNIVersion != "1.0.0" {
			t.Errorf("version %s", c.list.CNIVersion)
		}
		// Written again, with other content.
		raw, _ := os.ReadFile(filepath.Join(w.conf, "10-x.conflist"))
		w.writeRaw("10-x.conflist", string(raw)+" ")
	}
	raw, err := os.ReadFile(filepath.Join(w.bin, "versions.log"))
	if err != nil || string(raw) != "main\nold\nmute\n" {
		t.Errorf("asked: %q, %v", raw, err)
	}
}

func TestBadConfigurations(t *testing.T) {
	w := newWorld(t, "main")
	m := w.open(nil)
	for text, x := range map[string][2]string{
		"no plugins":                     {"x.conflist", `{"cniVersion": "1.0.0", "name": "n"}`},
		"no name":                        {"x.conflist", `{"cniVersion": "1.0.0", "plugins": [{"type": "main"}]}`},
		"name: invalid characters":       {"x.conflist", `{"cniVersion": "1.0.0", "name": "../n", "plugins": [{"type": "main"}]}`},
		"cniVersion: ":                   {"x.conflist", `{"cniVersion": "one", "name": "n", "plugins": [{"type": "main"}]}`},
		"missing 'type'":                 {"x.conf", `{"cniVersion": "1.0.0", "name": "n"}`},
		"its name has to end in":         {"x.conf", `{"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "main"}]}`},
		"is no name of a CNI plugin":     {"x.conf", `{"cniVersion": "1.0.0", "name": "n", "type": "../main"}`},
		"name: missing network name":     {"x.conf", `{"cniVersion": "1.0.0", "type": "main"}`},
		"not a regular file of at most ": {"x.conf", strings.Repeat(" ", maxConf+1)},
	} {
		w.writeRaw(x[0], x[1])
		if _, err := m.current(context.Background()); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), text) || !strings.Contains(err.Error(), w.conf) {
			t.Errorf("%s: %v", text, err)
		}
		if err := os.Remove(filepath.Join(w.conf, x[0])); err != nil {
			t.Fatal(err)
		}
	}
}
