//go:build linux && (amd64 || arm64)

package early

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/spec"
)

func TestWish(t *testing.T) {
	t.Parallel()
	usual, err := json.MarshalIndent(spec.Default(false), "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	const all = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWNET
	w := wish{cgroup: "id"}
	if !w.parse(usual) || w.flags != all || w.cgroup != "id" {
		t.Errorf("the default configuration: %+v", w)
	}
	for text, want := range map[string]wish{
		`{"linux":{"namespaces":[]}}`: {},
		`{ "a" : [1, "]}", {"b": "\"}"}], "linux": {"cgroupsPath": "/x/y", "namespaces": [{"type":"mount"},{"path":"/n","type":"network"},{"type":"cgroup"}], "c": -1.5e3 }, "d": null}`: {unix.CLONE_NEWNS, "/x/y"},
		`{"linux":{"namespaces":[{"type":"user"},{"type":"pid","path":""}],"cgroupsPath":""}}`:                                                                                           {unix.CLONE_NEWUSER | unix.CLONE_NEWPID, ""},
	} {
		var w wish
		if !w.parse([]byte(text)) || w != want {
			t.Errorf("%s: %+v", text, w)
		}
	}
	for _, text := range []string{
		``, `[]`, `{`, `{"linux":{"namespaces":[{"type":"time"}]}}`, `{"linux":{"namespaces":[{"type":"user","path":"/n"}]}}`, `{"linux":{"namespaces":[{"type":"pid","path":"/n"}]}}`,
		`{"linux":{"namespaces":[{"type":"mount","path":"/n"}]}}`, `{"linux":{"netDevices":{}}}`, `{"linux":{"cgroupsPath":"\u0061"}}`, `{"linux":{"cgroupsPath":7}}`, `{"linux":{"namespaces":[{}`,
		`{"linux":{"namespaces":{}}}`, `{"linux":[]}`, `{"a":"`, `{"a":{`,
	} {
		var w wish
		if w.parse([]byte(text)) {
			t.Errorf("%s: %+v", text, w)
		}
	}
}

// FuzzWish: nothing is read past the end, and it comes to one.
func FuzzWish(f *testing.F) {
	f.Add([]byte(`{"a":["\\\"",{}],"linux":{"namespaces":[{"type":"mount","path":""}],"cgroupsPath":"/a"}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var w wish
		if w.parse(raw) && len(w.cgroup) > len(raw) {
			t.Errorf("%q: %+v", raw, w)
		}
	})
}

func TestNamesOfCgroups(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]bool{
		"a": true, "a/b.c_d:e@f+g-h": true, "docker/0123": true, "": false, "/a": false, "a/": false, "a//b": false, "..": false, "a/../b": false, ".a": false, "a b": false, "a\n": false, "ä": false,
	} {
		if plainPath(name) != want {
			t.Errorf("%q: %v", name, !want)
		}
	}
	for text, want := range map[string]string{
		"0::/\n": "/", "1:name=systemd:/s\n0::/a/b\n": "/a/b", "10::/x\n0::/y\n": "/y", "0::/a": "", "1:cpu:/\n": "", "": "",
	} {
		if got := ownCgroup(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func TestParseCreate(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]command{
		"create a": {verb: "create", root: "/run/hako-oci", id: "a", signal: 15, bundle: "."},
		"--root /r --log /l --log-format json create --bundle /b --pid-file /p a":                   {verb: "create", root: "/r", log: "/l", id: "a", signal: 15, bundle: "/b"},
		"run -b=/b --detach --keep --no-pivot --no-new-keyring --console-socket=/c --pid-file /p a": {verb: "run", root: "/run/hako-oci", id: "a", signal: 15, bundle: "/b"},
	} {
		var c command
		if !c.parseArgs(strings.Fields(line)) || c != want {
			t.Errorf("%s: %+v", line, c)
		}
	}
	for _, line := range []string{
		"create", "create a b", "run --help a", "run --bundle", "run --preserve-fds 1 a", "run --pidfd-socket /s a", "--systemd-cgroup run a", "run a/b", "run a --bundle /b", "exec a b",
	} {
		var c command
		if c.parseArgs(strings.Fields(line)) {
			t.Errorf("%s: %+v", line, c)
		}
	}
}

// TestBeginNoHeap does what begin does, short of making something.
func TestBeginNoHeap(t *testing.T) {
	dir := t.TempDir()
	raw, err := json.Marshal(spec.Default(false))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, ConfigFile), raw, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"--root", filepath.Join(dir, "nosuch"), "run", "--bundle", dir, "a"}
	var b Begin
	if n := testing.AllocsPerRun(10, func() {
		var c command
		if c.parseArgs(args) {
			c.begin(&b) // there is no root for the state
		}
	}); n > 0 || b.There() || os.Geteuid() == 0 && string(b.Config) != string(raw) {
		t.Errorf("%v allocations; %+v", n, b)
	}
}
