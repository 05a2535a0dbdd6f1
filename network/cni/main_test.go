package cni

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hako-engine/hako/network"
	"github.com/hako-engine/hako/network/internal/nstest"
)

// TestMain is also the fake plugin, and the daemon that is killed.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv("CNI_COMMAND") != "":
		os.Exit(fakePlugin())
	case os.Getenv("HAKO_CNI_TEST_VICTIM") != "":
		runVictim(os.Getenv("HAKO_CNI_TEST_VICTIM"))
	}
	nstest.Main(m, nil)
}

// fake is the configuration of a fake plugin. Fields that name a command apply to that one.
type fake struct {
	Type         string          `json:"type"`
	Capabilities map[string]bool `json:"capabilities,omitempty"`
	IPAM         map[string]any  `json:"ipam,omitempty"`
	Dir          string          `json:"dir"` // log, and a file for each attachment
	Fail         string          `json:"fail,omitempty"`
	FailFirst    bool            `json:"failFirst,omitempty"` // DEL of what is there
	Code         uint            `json:"code,omitempty"`
	Hang         string          `json:"hang,omitempty"`
	Noise        string          `json:"noise,omitempty"`
	NoAddress    bool            `json:"noAddress,omitempty"`
	PrevResult   json.RawMessage `json:"prevResult,omitempty"`
	CNIVersion   string          `json:"cniVersion,omitempty"`
}

// call is a line in the log of the fake plugins.
type call struct {
	Plugin  string
	Command string
	Env     map[string]string
	Stdin   map[string]any
}

// fakePlugin behaves as its configuration says. Its attachments are files in Dir/taken.
func fakePlugin() int {
	raw, err := io.ReadAll(os.Stdin)
	if err != nil {
		return 1
	}
	var conf fake
	c := call{Plugin: filepath.Base(os.Args[0]), Command: os.Getenv("CNI_COMMAND"), Env: map[string]string{}}
	if json.Unmarshal(raw, &conf) != nil || json.Unmarshal(raw, &c.Stdin) != nil {
		return 1
	}
	for _, kv := range os.Environ() {
		if k, v, _ := strings.Cut(kv, "="); strings.HasPrefix(k, "CNI_") {
			c.Env[k] = v
		}
	}
	if dir := filepath.Dir(os.Args[0]); c.Command == "VERSION" {
		appendLine(filepath.Join(dir, "versions.log"), c.Plugin)
		versions := []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}
		switch c.Plugin {
		case "old":
			versions = versions[:4]
		case "mute":
			return 3
		}
		_ = json.NewEncoder(os.Stdout).Encode(map[string]any{"cniVersion": "1.1.0", "supportedVersions": versions})
		return 0
	}
	line, _ := json.Marshal(c)
	appendLine(filepath.Join(conf.Dir, "log"), string(line))
	taken := filepath.Join(conf.Dir, "taken", c.Plugin+"-"+c.Env["CNI_CONTAINERID"])
	switch c.Command {
	case "ADD":
		_ = os.WriteFile(taken, nil, 0o600)
	case "DEL":
		if _, err := os.Lstat(taken); err == nil && conf.FailFirst {
			conf.Fail = c.Command
			_ = os.Remove(taken)
		}
		if conf.Fail != c.Command {
			_ = os.Remove(taken)
		}
	case "GC":
		// Takes back what is not named.
		files, _ := os.ReadDir(filepath.Dir(taken))
		valid, _ := c.Stdin["cni.dev/valid-attachments"].([]any)
		for _, f := range files {
			id, mine := strings.CutPrefix(f.Name(), c.Plugin+"-")
			if mine && !slices.ContainsFunc(valid, func(v any) bool { return v.(map[string]any)["containerID"] == id }) {
				_ = os.Remove(filepath.Join(filepath.Dir(taken), f.Name()))
			}
		}
	}
	if conf.Noise == c.Command {
		_, _ = os.Stdout.Write(make([]byte, 2*maxStdout))
	}
	if conf.Hang == c.Command {
		child := exec.Command("/bin/sleep", "1000") // holds our output, as an IPAM plugin does
		child.Stdout = os.Stdout
		if child.Start() == nil {
			appendLine(filepath.Join(conf.Dir, "pids"), fmt.Sprint(os.Getpid(), " ", child.Process.Pid))
		}
		time.Sleep(time.Hour)
	}
	if conf.Fail == c.Command {
		fmt.Fprintln(os.Stderr, "secret of the plugin")
		_ = json.NewEncoder(os.Stdout).Encode(map[string]any{"cniVersion": conf.CNIVersion, "code": conf.Code, "msg": "told to fail"})
		return 1
	}
	if c.Command == "ADD" {
		switch {
		case conf.PrevResult != nil:
			_, _ = os.Stdout.Write(conf.PrevResult)
		case conf.NoAddress:
			_ = json.NewEncoder(os.Stdout).Encode(map[string]any{"cniVersion": conf.CNIVersion})
		default:
			_ = json.NewEncoder(os.Stdout).Encode(map[string]any{
				"cniVersion": conf.CNIVersion,
				"interfaces": []any{
					map[string]any{"name": "br0", "mac": "02:00:00:00:00:01"},
					map[string]any{"name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": c.Env["CNI_NETNS"]},
				},
				"ips": []any{
					map[string]any{"address": "192.0.2.1/24", "interface": 0},
					map[string]any{"address": "2001:db8::5/64", "interface": 1},
					map[string]any{"address": "10.1.2.3/24", "interface": 1, "gateway": "10.1.2.1"},
				},
			})
		}
	}
	return 0
}

func appendLine(path, line string) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	defer f.Close()
	_, _ = f.WriteString(line + "\n")
}

// world is the folders of a test.
type world struct {
	t                testing.TB
	conf, bin, state string
	fakes            string // Dir of the fake plugins
	nets             *network.Manager
	n                int
}

func newWorld(t testing.TB, plugins ...string) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{t: t, conf: filepath.Join(dir, "net.d"), bin: filepath.Join(dir, "bin"), state: filepath.Join(dir, "cni"), fakes: filepath.Join(dir, "fakes")}
	for _, d := range []string{w.conf, w.bin, w.fakes, filepath.Join(w.fakes, "taken")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range plugins {
		if err := os.Symlink(exe, filepath.Join(w.bin, p)); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

func (w *world) options() Options {
	return Options{ConfDir: w.conf, BinDirs: []string{filepath.Join(w.bin, "missing"), w.bin}, Dir: w.state, Limit: 20 * time.Second,
		Poll: time.Hour, Log: slog.New(slog.NewTextHandler(testWriter{w.t}, nil))}
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// open opens a Manager that is closed at the end of the test.
func (w *world) open(set func(*Options)) *Manager {
	w.t.Helper()
	o := w.options()
	if set != nil {
		set(&o)
	}
	m, err := Open(context.Background(), o)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { m.Close() })
	return m
}

// write writes a configuration.
func (w *world) write(name, version, network string, plugins ...any) {
	w.t.Helper()
	raw, err := json.Marshal(map[string]any{"cniVersion": version, "name": network, "plugins": plugins})
	if err != nil {
		w.t.Fatal(err)
	}
	w.writeRaw(name, string(raw))
}

func (w *world) writeRaw(name, text string) {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.conf, name), []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// pod makes a sandbox with a namespace as the engine makes them.
func (w *world) pod(name string) Pod {
	w.t.Helper()
	if w.nets == nil {
		dir := w.t.TempDir()
		m, err := network.Open(context.Background(), network.Options{Root: filepath.Join(dir, "root"), State: filepath.Join(dir, "state"),
			BridgeName: fmt.Sprintf("hkcni%d", os.Getpid()%1000), Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			w.t.Fatal(err)
		}
		w.nets = m
		w.t.Cleanup(func() { m.Close() })
	}
	w.n++
	id := fmt.Sprintf("%s-%d", name, w.n)
	path, err := w.nets.NewNetns(context.Background(), id)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { w.nets.DeleteNetns(context.Background(), path) })
	return Pod{ID: id, Name: name, Namespace: "default", UID: "uid-" + name, NetNS: path}
}

// calls gives what the fake plugins were told.
func (w *world) calls() (out []call) {
	f, err := os.Open(filepath.Join(w.fakes, "log"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		var c call
		if err := json.Unmarshal(s.Bytes(), &c); err != nil {
			w.t.Fatal(err)
		}
		out = append(out, c)
	}
	return out
}

// said gives the calls as PLUGIN COMMAND.
func (w *world) said() string {
	var out []string
	for _, c := range w.calls() {
		out = append(out, c.Plugin+" "+c.Command)
	}
	return strings.Join(out, ", ")
}

// nothingLeft fails if anything is left of any attachment.
func (w *world) nothingLeft() {
	w.t.Helper()
	for _, dir := range []string{filepath.Join(w.fakes, "taken"), filepath.Join(w.state, "attachments"), filepath.Join(w.state, "results")} {
		files, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			w.t.Error(err)
		}
		for _, f := range files {
			w.t.Errorf("left: %s/%s", dir, f.Name())
		}
	}
	raw, _ := os.ReadFile(filepath.Join(w.fakes, "pids"))
	for _, pid := range strings.Fields(string(raw)) {
		eventually(w.t, "the end of process "+pid, func() bool {
			st, err := os.ReadFile("/proc/" + pid + "/stat")
			return err != nil || strings.Contains(string(st), ") Z ")
		})
	}
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// victim is a daemon that is killed while each of its pods is set up and torn down again and again.
type victim struct {
	Options Options
	Pods    []Pod
}

// start starts it in a process of its own.
func (v victim) start(t testing.TB) *exec.Cmd {
	t.Helper()
	v.Options.Log = nil
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	daemon := exec.Command("/proc/self/exe")
	daemon.Env = append(os.Environ(), "HAKO_CNI_TEST_VICTIM="+string(raw))
	daemon.Stderr = os.Stderr
	daemon.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	return daemon
}

func runVictim(what string) {
	var v victim
	if err := json.Unmarshal([]byte(what), &v); err != nil {
		panic(err)
	}
	v.Options.Log = slog.New(slog.DiscardHandler)
	ctx := context.Background()
	m, err := Open(ctx, v.Options)
	if err != nil {
		panic(err)
	}
	var wg sync.WaitGroup
	for _, p := range v.Pods {
		wg.Go(func() {
			for {
				if _, err := m.Setup(ctx, p); err != nil {
					panic(err)
				}
				if err := m.Teardown(ctx, p.ID); err != nil {
					panic(err)
				}
			}
		})
	}
	wg.Wait()
}
