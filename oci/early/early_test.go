//go:build linux && (amd64 || arm64)

package early

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const usual = `{"version":1,"id":"a","ociVersion":"1.3.0","bundle":"/b","rootfs":"/r","annotations":{"k":"v","l":""},"created":"2026-01-02T03:04:05Z",` +
	`"owner":0,"pid":12,"startTime":345,"cgroups":{"":"/v2","freezer":"/f"},"usual":true}`

func TestParseState(t *testing.T) {
	t.Parallel()
	var s state
	if !s.parse([]byte(usual)) || s.pid != 12 || s.startTime != 345 || !s.usual || s.cgroups[0].dir != "/v2" || s.cgroups[1].controller != "freezer" || s.cgroups[2].dir != "" {
		t.Errorf("%+v", s)
	}
	for _, old := range []string{`,"usual":true`, `,"cgroups":{"":"/v2","freezer":"/f"}`, `"k":"v","l":""`} {
		var s state
		if !s.parse([]byte(strings.Replace(usual, old, "", 1))) {
			t.Errorf("without %s it is not understood", old)
		}
	}
	many := `"cgroups":{`
	for i := range 33 {
		many += fmt.Sprintf(`"%d":"/%d",`, i, i)
	}
	for old, now := range map[string]string{
		`"version":1`: `"version":2`, `"pid":12`: `"pid":-1`, `345`: `1234567890123456789`, `"usual":true`: `"usual":false`, `"/f"`: `"\/f"`, `"/v2"`: `""`,
		`"usual"`: `"unit":{},"usual"`, `"cgroups":{`: many, `true}`: `true} `, `"id":"a"`: `"id":7`, `{"k":`: `["k":`, `,"pid"`: `"pid"`,
	} {
		var s state
		if s.parse([]byte(strings.Replace(usual, old, now, 1))) {
			t.Errorf("understood with %s", now)
		}
	}
}

// FuzzState: what is understood is what encoding/json reads, and nothing is read past the end.
func FuzzState(f *testing.F) {
	f.Add([]byte(usual))
	f.Add([]byte(`{"version":1}`))
	f.Add([]byte(`{"version":1,"cgroups":{`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var s state
		if !s.parse(raw) {
			return
		}
		var want struct {
			Version, Pid, StartTime uint64
			Usual                   bool
			Cgroups                 map[string]string
		}
		// A string need not be UTF-8 here, and of a field that is there twice the last one counts.
		if err := json.Unmarshal(raw, &want); err != nil || want.Version != 1 || want.Pid != s.pid || want.StartTime != s.startTime {
			t.Errorf("%q: %+v, want %+v, %v", raw, s, want, err)
		}
	})
}

func TestParseArgs(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]command{
		"start a": {verb: "start", root: "/run/hako-oci", id: "a", signal: 15},
		"--root /r --log=l --log-format json kill a": {verb: "kill", root: "/r", log: "l", id: "a", signal: 15},
		"-root=/r kill a KILL":                       {verb: "kill", root: "/r", id: "a", signal: 9},
		"kill a SIGTERM":                             {verb: "kill", root: "/run/hako-oci", id: "a", signal: 15},
		"delete --force a":                           {verb: "delete", root: "/run/hako-oci", id: "a", signal: 15, force: true},
		"delete -f a.b_+-":                           {verb: "delete", root: "/run/hako-oci", id: "a.b_+-", signal: 15, force: true},
	} {
		var c command
		if !c.parseArgs(strings.Fields(line)) || c != want {
			t.Errorf("%s: %+v", line, c)
		}
	}
	for _, line := range []string{
		"start", "start a b", "start --help", "start a/b", "start ..", "--root= start a", "--root", "--debug start a", "--systemd-cgroup start a", "--log-format xml start a",
		"--version", "state a", "kill --all a", "kill a HUP", "kill a 9 9", "delete a --force", "delete --force", "delete --force=true a", "start " + strings.Repeat("x", 300),
	} {
		var c command
		if c.parseArgs(strings.Fields(line)) {
			t.Errorf("%s: %+v", line, c)
		}
	}
}

// TestNoHeap does what the commands do, short of a container, and counts.
func TestNoHeap(t *testing.T) {
	dir := t.TempDir()
	raw := fmt.Sprintf(`{"version":1,"pid":%d,"startTime":1,"cgroups":{"freezer":"%s"},"usual":true}`, os.Getpid(), dir)
	if err := os.MkdirAll(filepath.Join(dir, "a"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"a/" + StateFile: raw, "freezer.state": "THAWED\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	args := []string{"--root", dir, "--log", filepath.Join(dir, "log"), "kill", "a", "0"}
	failed := ""
	if n := testing.AllocsPerRun(10, func() {
		var c command
		switch {
		case !c.parseArgs(args) || !c.open() || !c.lock() || !c.read() || !c.touchLog():
			failed = "reading"
		case c.alive() || c.process() >= 0:
			failed = "another process is taken for the container's"
		case !c.thawed():
			failed = "frozen"
		case c.start() || removable(c.dir):
			failed = "started without a FIFO"
		}
		closeFD(c.dir)
	}); n > 0 || failed != "" {
		t.Errorf("%v allocations; %s", n, failed)
	}
	if err := os.WriteFile(filepath.Join(dir, "freezer.state"), []byte("FREEZING\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	var c command
	if c.parseArgs(args) && c.open() && c.read() && c.thawed() {
		t.Error("a frozen container is taken for one that is not")
	}
	closeFD(c.dir)
}

// TestAlive: a process is known by its pid and its start, and a zombie does not live.
func TestAlive(t *testing.T) {
	t.Parallel()
	var c command
	c.state.pid = uint64(os.Getpid())
	raw, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(raw[strings.LastIndexByte(string(raw), ')')+1:]))
	if _, err := fmt.Sscan(f[19], &c.state.startTime); err != nil {
		t.Fatal(err)
	}
	if fd := c.process(); fd < 0 {
		t.Error("this process does not live")
	} else {
		unix.Close(fd)
	}
	c.state.startTime++
	if c.alive() {
		t.Error("one that has begun at another time lives")
	}
	c.state.pid = 1 << 40
	if c.alive() {
		t.Error("one that does not exist lives")
	}
}
