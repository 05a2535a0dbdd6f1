package cni

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/hako-engine/hako/internal/execfile"
)

func TestParseRate(t *testing.T) {
	for s, want := range map[string]uint64{
		"10M": 10e6, "1k": 1000, "1Ki": 1024, "1.5Gi": 3 << 29, "1e6": 1e6, "2E3": 2000, "1P": 1e15, "1000": 1000, "+5M": 5e6,
		"1234567.1": 1234568, "2000000m": 2000, "1E-3M": 0, "0.001P": 1e12, "12e+3": 12000, "5000000u": 0,
		"999": 0, "1.1P": 0, "-10M": 0, "": 0, "M": 0, "10 M": 0, "10MB": 0, "1e999999999": 0, "1/2k": 0, "0x10M": 0, "1_000": 0, "nan": 0, "Inf": 0, "..k": 0,
	} {
		got, err := parseRate(s)
		if got != want || (err != nil) != (want == 0) || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %d, %v; want %d", s, got, err, want)
		}
	}
}

func FuzzParseRate(f *testing.F) {
	for _, s := range []string{"10M", "1.5Gi", "1e6", "-1", "1e-3", "99999999999999999999E"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if v, err := parseRate(s); err == nil && (v < 1000 || v > 1e15) {
			t.Errorf("%q: %d", s, v)
		}
	})
}

func TestGate(t *testing.T) {
	var g gate
	bg := context.Background()
	soon := func() context.Context {
		ctx, cancel := context.WithTimeout(bg, 30*time.Millisecond)
		t.Cleanup(cancel)
		return ctx
	}
	leave, err := g.enter(bg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.exclude(soon()); err == nil {
		t.Fatal("excluded one who is inside")
	}
	waiting := make(chan func())
	go func() {
		open, _ := g.exclude(bg)
		waiting <- open
	}()
	leave2, err := g.enter(soon()) // whoever waits to exclude holds nobody up
	if err != nil {
		t.Fatal(err)
	}
	leave()
	leave2()
	open := <-waiting
	if _, err := g.enter(soon()); err == nil {
		t.Fatal("entered a closed gate")
	}
	if _, err := g.exclude(soon()); err == nil {
		t.Fatal("two excluded")
	}
	entered := make(chan struct{})
	go func() {
		if leave, err := g.enter(bg); err == nil {
			leave()
		}
		close(entered)
	}()
	open()
	<-entered
	if open, err = g.exclude(bg); err != nil {
		t.Fatal(err)
	}
	open()
}

func TestEnvironment(t *testing.T) {
	got := strings.Join(environment([]string{"X=1", "NOTIFY_SOCKET=/run/x", "LISTEN_FDS=3", "WATCHDOG_USEC=1", "CNI_PATH=/x"}), " ")
	if want := "CNI_PATH=/x PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin X=1"; got != want {
		t.Errorf("%s", got)
	}
	if got := environment([]string{"PATH=/mine"}); len(got) != 1 {
		t.Errorf("%v", got)
	}
}

// TestRunner: plugins that are no Go programs, and behave badly.
func TestRunner(t *testing.T) {
	dir := t.TempDir()
	r := &runner{limit: time.Minute, log: slog.New(slog.DiscardHandler), versions: map[string]binaryVersions{}}
	for name, x := range map[string]struct{ script, out, err string }{
		"leaves a child with its output": {`sleep 1000 & echo $! >` + dir + `/pid; echo '{"cniVersion":"1.0.0"}'`, "{\"cniVersion\":\"1.0.0\"}\n", ""},
		"says nothing":                   {"exit 3", "", "exit status 3"},
		"says it elsewhere":              {"echo no such thing >&2; exit 3", "", `exit status 3 (stderr: "no such thing")`},
		"talks nonsense":                 {"echo what; exit 3", "", `exit status 3, and its output is no CNI error: "what\n"`},
		"floods standard error":          {"head -c 100000 /dev/zero | tr '\\0' x >&2; exit 3", "", "xxx…\""},
		"reads nothing":                  {"exec <&-; echo ok", "ok\n", ""},
		"is killed":                      {"kill -9 $$", "", "signal: killed"},
	} {
		path := filepath.Join(dir, "plugin")
		if err := execfile.Write(path, []byte("#!/bin/sh\n"+x.script+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		out, err := r.ExecPlugin(context.Background(), path, make([]byte, 1<<20), os.Environ())
		if string(out) != x.out || (err == nil) != (x.err == "") || err != nil && !strings.Contains(err.Error(), x.err) {
			t.Errorf("%s: %q, %v", name, out, err)
		}
	}
	raw, err := os.ReadFile(filepath.Join(dir, "pid"))
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(string(raw), &pid); err != nil || syscall.Kill(pid, syscall.SIGKILL) != nil {
		t.Errorf("the child of a plugin that succeeded is gone: %v", err)
	}
	for _, plugin := range []string{"", "..", "a/b", "absent"} {
		if path, err := r.FindInPath(plugin, []string{dir}); err == nil {
			t.Errorf("%q: %s", plugin, path)
		}
	}
}

func TestClassify(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want error
	}{
		{&types.Error{Code: types.ErrInternal, Msg: `failed to allocate for range 0: no IP addresses available in range set: 10.1.0.1-10.1.0.254`}, errdefs.ErrResourceExhausted},
		{fmt.Errorf("plugin bridge: %w", &types.Error{Code: 999, Msg: "Could not allocate IP in range: ip: 10.1.0.1"}), errdefs.ErrResourceExhausted},
		{&types.Error{Code: types.ErrTryAgainLater, Msg: "no IP addresses available"}, errdefs.ErrUnavailable},
		{&types.Error{Code: types.ErrInvalidNetworkConfig}, errdefs.ErrFailedPrecondition},
		{&types.Error{Code: types.ErrInternal, Msg: "boom"}, errdefs.ErrUnknown},
		{fmt.Errorf("gone: %w", errdefs.ErrNotFound), errdefs.ErrNotFound},
	} {
		if got := errdefs.Resolve(classify(tt.err)); got != tt.want {
			t.Errorf("%v: %v, want %v", tt.err, got, tt.want)
		}
	}
}
