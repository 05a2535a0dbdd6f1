package shim

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/execfile"
	"github.com/hako-engine/hako/shim/log"
	"github.com/hako-engine/hako/shim/wire"
)

// uri configures streams as the engine does; log may be "".
func uri(path string, stdin, once bool) string {
	s := wire.Stdio{OpenStdin: stdin, StdinOnce: once}
	if path != "" {
		s.Log = log.Config{Format: log.FormatJSON, Path: path}
	}
	return s.String()
}

func readLog(t *testing.T, path string) (out string) {
	t.Helper()
	for e, err := range log.Read(t.Context(), path, log.ReadOptions{Format: log.FormatJSON, Tail: -1}) {
		if err != nil {
			t.Fatal(err)
		}
		out += string(e.Line)
	}
	return out
}

func TestLife(t *testing.T) {
	h := newHarness(t)
	path := filepath.Join(h.bundle, "log")
	if err := h.create("echo hello; exit 5", wire.CreateTaskRequest{Stdout: uri(path, false, false)}); err != nil {
		t.Fatal(err)
	}
	if err := h.create("true", wire.CreateTaskRequest{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("create twice: %v", err)
	}
	var st wire.StateResponse
	h.must("State", &wire.ProcessRequest{ID: "c"}, &st)
	if st.Status != wire.StatusCreated || st.Pid == 0 {
		t.Errorf("state %+v", st)
	}
	if err := h.call("Delete", &wire.ProcessRequest{ID: "d"}, nil); !errdefs.IsNotFound(err) {
		t.Errorf("delete of nothing: %v", err)
	}
	_, r := h.attach(wire.AttachRequest{Stdout: true})
	h.start()
	if err := h.call("Start", &wire.ProcessRequest{ID: "c"}, nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("start twice: %v", err)
	}
	if out, err := frames(r); out != "hello\n" || err != nil {
		t.Errorf("attached: %q, %v", out, err)
	}
	w := h.wait("")
	if w.ExitStatus != 5 {
		t.Errorf("exit %+v", w)
	}
	if got := readLog(t, path); got != "hello\n" {
		t.Errorf("log %q", got)
	}
	if e, err := ReadExit(h.bundle); err != nil || e.Status != 5 || !e.ExitedAt.Equal(w.ExitedAt) || e.Pid != int(st.Pid) {
		t.Errorf("exit file %+v, %v", e, err)
	}
	// An attachment after the end is told so at once.
	_, r = h.attach(wire.AttachRequest{Stdout: true})
	if out, err := frames(r); out != "" || err != nil {
		t.Errorf("attached late: %q, %v", out, err)
	}
	if err := h.call("Kill", &wire.KillRequest{ID: "c", Signal: 15}, nil); !errdefs.IsNotFound(err) {
		t.Errorf("kill after the end: %v", err)
	}
	h.must("Delete", &wire.ProcessRequest{ID: "c"}, nil)
	want := []string{"create", "start", "exit", "delete"}
	if !eventually(func() bool { return slices.Equal(h.events.list(), want) }) {
		t.Errorf("events %v", h.events.list())
	}
}

func TestCreateFails(t *testing.T) {
	h := newHarness(t)
	h.rt.createErr = fmt.Errorf("no: %w", errdefs.ErrPermissionDenied)
	if err := h.create("true", wire.CreateTaskRequest{Stdout: uri("", true, false)}); !errdefs.IsPermissionDenied(err) {
		t.Errorf("create: %v", err)
	}
	if _, err := os.Stat(filepath.Join(h.bundle, wire.TaskFile)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("task file: %v", err)
	}
	h.rt.createErr = nil
	if err := h.create("true", wire.CreateTaskRequest{Stdout: "nosuch://x"}); !errdefs.IsNotImplemented(err) {
		t.Errorf("unknown scheme: %v", err)
	}
	if err := h.create("true", wire.CreateTaskRequest{Checkpoint: "x"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a checkpoint by a relative path: %v", err)
	}
	if err := h.create("true", wire.CreateTaskRequest{Checkpoint: "/x"}); err == nil || !strings.Contains(err.Error(), "restore {ImagePath:/x WorkPath:}") {
		t.Errorf("checkpoint: %v", err)
	}
	if err := h.create("true", wire.CreateTaskRequest{}); err != nil {
		t.Errorf("create after failures: %v", err)
	}
}

// A container that was created and not started can be deleted.
func TestDeleteCreated(t *testing.T) {
	h := newHarness(t)
	if err := h.create("true", wire.CreateTaskRequest{Stdout: uri("", false, false)}); err != nil {
		t.Fatal(err)
	}
	var d wire.DeleteResponse
	h.must("Delete", &wire.ProcessRequest{ID: "c"}, &d)
	if d.ExitStatus != 137 {
		t.Errorf("%+v", d)
	}
}

// The exit of each process is told after its start, however short it is.
func TestEventOrder(t *testing.T) {
	h := newHarness(t)
	if err := h.create("sleep 600", wire.CreateTaskRequest{}); err != nil {
		t.Fatal(err)
	}
	h.start()
	const n = 100
	for i := range n {
		id := fmt.Sprint("x", i)
		if err := h.exec(id, wire.ExecProcessRequest{}, "/bin/true"); err != nil {
			t.Fatal(err)
		}
		h.must("Start", &wire.ProcessRequest{ID: "c", ExecID: id}, nil)
	}
	if !eventually(func() bool { return len(h.events.list()) == 2+3*n }) {
		t.Fatalf("%d events", len(h.events.list()))
	}
	at := map[string]int{}
	for i, topic := range h.events.list() {
		at[topic] = i
	}
	for i := range n {
		id := fmt.Sprint(":x", i)
		if !(at["exec-added"+id] < at["exec-started"+id] && at["exec-started"+id] < at["exit"+id]) {
			t.Errorf("order of %s: %d %d %d", id, at["exec-added"+id], at["exec-started"+id], at["exit"+id])
		}
	}
	// Only the deletion of the task is an event.
	for i := range n {
		h.must("Delete", &wire.ProcessRequest{ID: "c", ExecID: fmt.Sprint("x", i)}, nil)
	}
	h.must("Kill", &wire.KillRequest{ID: "c", Signal: 9}, nil)
	h.wait("")
	h.must("Delete", &wire.ProcessRequest{ID: "c"}, nil)
	want := []string{"exit", "delete"}
	if !eventually(func() bool { l := h.events.list(); return slices.Equal(l[2+3*n:], want) }) {
		t.Errorf("events after it: %v", h.events.list()[2+3*n:])
	}
}

// Events wait for a daemon that is away, and come in order.
func TestEventsRetry(t *testing.T) {
	h := newHarness(t)
	h.events.l.Close()
	h.events.fail.Store(true)
	if err := h.create("true", wire.CreateTaskRequest{}); err != nil {
		t.Fatal(err)
	}
	h.start()
	h.wait("")
	h.events.listen(t)
	time.Sleep(30 * time.Millisecond)
	h.events.fail.Store(false)
	want := []string{"create", "start", "exit"}
	if !eventually(func() bool { return slices.Equal(h.events.list(), want) }) {
		t.Errorf("events %v", h.events.list())
	}
}

func TestExecFails(t *testing.T) {
	h := newHarness(t)
	if err := h.create("sleep 600", wire.CreateTaskRequest{}); err != nil {
		t.Fatal(err)
	}
	h.start()
	if err := h.exec("x", wire.ExecProcessRequest{}, "/nosuch"); err != nil {
		t.Fatal(err)
	}
	if err := h.call("Start", &wire.ProcessRequest{ID: "c", ExecID: "x"}, nil); !errdefs.IsNotFound(err) {
		t.Errorf("start: %v", err)
	}
	if w := h.wait("x"); w.ExitStatus != statusUnknown {
		t.Errorf("exit %+v", w)
	}
	if err := h.exec("x", wire.ExecProcessRequest{}, "/bin/true"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("id in use: %v", err)
	}
	h.must("Delete", &wire.ProcessRequest{ID: "c", ExecID: "x"}, nil)
	if err := h.exec("x", wire.ExecProcessRequest{}, "/bin/true"); err != nil {
		t.Errorf("id free again: %v", err)
	}
	// One that was never started has not failed.
	var resp wire.DeleteResponse
	if h.must("Delete", &wire.ProcessRequest{ID: "c", ExecID: "x"}, &resp); resp.ExitStatus != 0 {
		t.Errorf("never started: %+v", resp)
	}
}

// Who reads the output of a process that cannot be started gets to its end without
// deleting the process.
func TestExecFailsWithOutput(t *testing.T) {
	h := newHarness(t)
	if err := h.create("sleep 600", wire.CreateTaskRequest{}); err != nil {
		t.Fatal(err)
	}
	h.start()
	fifo := filepath.Join(h.bundle, "out")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for id, to := range map[string]string{"x": fifo, "y": uri(filepath.Join(h.bundle, "log"), false, false)} {
		if err := h.exec(id, wire.ExecProcessRequest{Stdout: to}, "/nosuch"); err != nil {
			t.Fatal(err)
		}
	}
	read := make(chan error, 1)
	f, err := os.OpenFile(fifo, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	go func() {
		_, err := io.Copy(io.Discard, f)
		read <- err
	}()
	for _, id := range []string{"x", "y"} {
		if err := h.call("Start", &wire.ProcessRequest{ID: "c", ExecID: id}, nil); !errdefs.IsNotFound(err) {
			t.Errorf("start: %v", err)
		}
	}
	select {
	case err := <-read:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Minute):
		t.Error("the output of a process that did not start has no end")
	}
	for _, id := range []string{"x", "y"} {
		h.must("Delete", &wire.ProcessRequest{ID: "c", ExecID: id}, nil)
	}
}

// The end of a process is not held up by one that inherited its output, and all that
// it wrote itself is in the log by then.
func TestInheritedOutput(t *testing.T) {
	h := newHarness(t)
	path, release := filepath.Join(h.bundle, "log"), filepath.Join(h.bundle, "release")
	if err := h.create("sleep 1000", wire.CreateTaskRequest{}); err != nil {
		t.Fatal(err)
	}
	h.start()
	err := h.exec("x", wire.ExecProcessRequest{Stdout: uri(path, false, false)},
		"/bin/sh", "-c", "(while [ ! -e "+release+" ]; do sleep 0.05; done; echo late) & head -c 500000 /dev/zero | tr '\\0' x; printf end")
	if err != nil {
		t.Fatal(err)
	}
	_, r := h.attach(wire.AttachRequest{ExecID: "x", Stdout: true})
	h.must("Start", &wire.ProcessRequest{ID: "c", ExecID: "x"}, nil)
	out, err := frames(r)
	if len(out) != 500003 || err != nil {
		t.Errorf("attached: %d bytes, %v", len(out), err)
	}
	h.wait("x")
	if got := readLog(t, path); len(got) != 500003 {
		t.Errorf("log has %d bytes", len(got))
	}
	if err := os.WriteFile(release, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if !eventually(func() bool { return strings.HasSuffix(readLog(t, path), "late\n") }) {
		t.Error("what came late is not in the log")
	}
}

// A client that does not read makes the process wait and loses nothing; one that is
// gone does not.
func TestBackPressure(t *testing.T) {
	h := newHarness(t)
	path := filepath.Join(h.bundle, "log")
	const size = 8 << 20
	if err := h.create(fmt.Sprintf("head -c %d /dev/zero | tr '\\0' x", size), wire.CreateTaskRequest{Stdout: uri(path, false, false)}); err != nil {
		t.Fatal(err)
	}
	dead, _ := h.attach(wire.AttachRequest{Stdout: true, Stdin: true})
	_, other := h.attach(wire.AttachRequest{Stderr: true}) // wants none of it
	_, slow := h.attach(wire.AttachRequest{Stdout: true})
	h.start()
	time.Sleep(100 * time.Millisecond)
	var st wire.StateResponse
	if h.must("State", &wire.ProcessRequest{ID: "c"}, &st); st.Status != wire.StatusRunning {
		t.Errorf("the process did not wait: %+v", st)
	}
	dead.Close()
	out, err := frames(slow)
	if len(out) != size || err != nil {
		t.Errorf("slow client got %d bytes, %v", len(out), err)
	}
	if out, err := frames(other); out != "" || err != nil {
		t.Errorf("other client got %d bytes, %v", len(out), err)
	}
	h.wait("")
	if got := readLog(t, path); len(got) != size {
		t.Errorf("log has %d bytes", len(got))
	}
}

// A client that is slow to the end holds up neither the exit nor the log, and gets
// everything: after the process is deleted and the shim is told to end.
func TestSlowClient(t *testing.T) {
	h := newHarness(t)
	path := filepath.Join(h.bundle, "log")
	const size = 700000
	if err := h.create(fmt.Sprintf("head -c %d /dev/zero | tr '\\0' x", size), wire.CreateTaskRequest{Stdout: uri(path, false, false)}); err != nil {
		t.Fatal(err)
	}
	conn, r := h.attach(wire.AttachRequest{Stdout: true})
	h.start()
	// Read as much as it takes for the process to write all it has, and no more.
	buf, got := make([]byte, wire.MaxFrame), 0
	for {
		var st wire.StateResponse
		if h.must("State", &wire.ProcessRequest{ID: "c"}, &st); st.Status == wire.StatusStopped {
			break
		}
		if got >= size-200000 {
			time.Sleep(time.Millisecond)
			continue
		}
		_, p, err := wire.ReadFrame(r, buf)
		if err != nil {
			t.Fatal(err)
		}
		got += len(p)
	}
	if n := len(readLog(t, path)); n != size {
		t.Errorf("log has %d bytes at the exit", n)
	}
	h.must("Delete", &wire.ProcessRequest{ID: "c"}, nil)
	h.must("Shutdown", &wire.ShutdownRequest{}, nil)
	time.Sleep(100 * time.Millisecond)
	out, err := frames(r)
	if got+len(out) != size || err != nil {
		t.Errorf("got %d bytes, %v", got+len(out), err)
	}
	conn.Close()
}

func TestStdin(t *testing.T) {
	for _, once := range []bool{false, true} {
		t.Run(fmt.Sprint("once=", once), func(t *testing.T) {
			h := newHarness(t)
			if err := h.create("cat; echo end", wire.CreateTaskRequest{Stdout: uri("", true, once)}); err != nil {
				t.Fatal(err)
			}
			_, out := h.attach(wire.AttachRequest{Stdout: true})
			h.start()
			big := strings.Repeat("0123456789abcdef", 20000)
			a, _ := h.attach(wire.AttachRequest{Stdin: true})
			for p := big; len(p) > 0; {
				n := min(len(p), wire.MaxFrame)
				if err := wire.WriteFrame(a, wire.FrameStdin, []byte(p[:n])); err != nil {
					t.Fatal(err)
				}
				p = p[n:]
			}
			if once {
				wire.WriteFrame(a, wire.FrameCloseStdin, nil)
			} else {
				a.Close() // what it has sent is delivered all the same
				buf := make([]byte, wire.MaxFrame)
				var got strings.Builder
				for got.Len() < len(big) {
					_, p, err := wire.ReadFrame(out, buf)
					if err != nil {
						t.Fatal(err)
					}
					got.Write(p)
				}
				if got.String() != big {
					t.Error("input came out differently")
				}
				big = ""
				b, _ := h.attach(wire.AttachRequest{Stdin: true})
				wire.WriteFrame(b, wire.FrameStdin, []byte("second"))
				wire.WriteFrame(b, wire.FrameCloseStdin, nil)
				if _, p, err := wire.ReadFrame(out, buf); string(p) != "second" || err != nil {
					t.Errorf("read %q, %v", p, err)
				}
				h.must("CloseIO", &wire.CloseIORequest{ID: "c", Stdin: true}, nil)
			}
			if got, err := frames(out); got != big+"end\n" || err != nil {
				t.Errorf("got %d bytes, %v", len(got), err)
			}
		})
	}
}

// FIFOs, as containerd's clients make them.
func TestFIFOs(t *testing.T) {
	h := newHarness(t)
	fifo := func(name string) string {
		path := filepath.Join(h.bundle, name)
		if err := unix.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	req := wire.CreateTaskRequest{Stdin: fifo("in"), Stdout: fifo("out"), Stderr: fifo("err")}
	got := make(chan string, 2)
	for _, path := range []string{req.Stdout, req.Stderr} {
		go func() {
			b, err := os.ReadFile(path) // to EOF
			got <- fmt.Sprint(string(b), err)
		}()
	}
	if err := h.create("echo err >&2; cat", req); err != nil {
		t.Fatal(err)
	}
	h.start()
	w, err := os.OpenFile(req.Stdin, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, "through")
	w.Close()
	h.must("CloseIO", &wire.CloseIORequest{ID: "c", Stdin: true}, nil)
	h.wait("")
	a, b := <-got, <-got
	if a > b {
		a, b = b, a
	}
	if a != "err\n<nil>" || b != "through<nil>" {
		t.Errorf("read %q and %q", a, b)
	}
}

func TestFileAndBinaryURIs(t *testing.T) {
	h := newHarness(t)
	file := filepath.Join(h.bundle, "out.txt")
	if err := h.create("echo one; sleep 600", wire.CreateTaskRequest{Stdout: "file://" + file}); err != nil {
		t.Fatal(err)
	}
	h.start()
	if !eventually(func() bool { b, _ := os.ReadFile(file); return string(b) == "one\n" }) {
		t.Error("nothing in the file")
	}
	script := filepath.Join(h.bundle, "logger")
	execfile.Write(script, []byte("#!/bin/sh\nexec 5>&-\n(echo $CONTAINER_ID $CONTAINER_NAMESPACE \"$@\"; cat <&3; cat <&4) > "+h.bundle+"/logged\n"), 0o700)
	if err := h.exec("x", wire.ExecProcessRequest{Stdout: "binary://" + script + "?key=value"}, "/bin/sh", "-c", "echo out; echo err >&2"); err != nil {
		t.Fatal(err)
	}
	h.must("Start", &wire.ProcessRequest{ID: "c", ExecID: "x"}, nil)
	h.wait("x")
	if want := "c test key value\nout\nerr\n"; !eventually(func() bool { b, _ := os.ReadFile(h.bundle + "/logged"); return string(b) == want }) {
		b, _ := os.ReadFile(h.bundle + "/logged")
		t.Errorf("logger wrote %q", b)
	}
	// In version 2 of the protocol one that dies is not taken for ready.
	quitter := filepath.Join(h.bundle, "quitter")
	execfile.Write(quitter, []byte("#!/bin/sh\nexit 1\n"), 0o700)
	if err := h.exec("y", wire.ExecProcessRequest{Stdout: "binary-v2://" + quitter}, "/bin/true"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a logger that died: %v", err)
	}
	ready := filepath.Join(h.bundle, "ready")
	execfile.Write(ready, []byte("#!/bin/sh\necho >&5; exec 5>&-\ncat <&3 > "+h.bundle+"/logged2\n"), 0o700)
	if err := h.exec("z", wire.ExecProcessRequest{Stdout: "binary-v2://" + ready}, "/bin/sh", "-c", "echo out"); err != nil {
		t.Fatal(err)
	}
	h.must("Start", &wire.ProcessRequest{ID: "c", ExecID: "z"}, nil)
	h.wait("z")
	if !eventually(func() bool { b, _ := os.ReadFile(h.bundle + "/logged2"); return string(b) == "out\n" }) {
		t.Error("nothing logged by version 2")
	}
}

func TestOOM(t *testing.T) {
	h := newHarness(t)
	if err := h.create("sleep 600", wire.CreateTaskRequest{}); err != nil {
		t.Fatal(err)
	}
	h.start()
	h.rt.oom <- struct{}{}
	if !eventually(func() bool { return slices.Contains(h.events.list(), "oom") }) {
		t.Error("no event")
	}
	h.must("Kill", &wire.KillRequest{ID: "c", Signal: 9, All: true}, nil)
	if w := h.wait(""); !w.OOMKilled || w.ExitStatus != 137 {
		t.Errorf("exit %+v", w)
	}
	if e, err := ReadExit(h.bundle); err != nil || !e.OOMKilled {
		t.Errorf("exit file %+v, %v", e, err)
	}
}

// TestOOMBeforeExit: whoever hears that a container was killed for want of memory has heard of that before its end, however
// late the kernel's notice is read.
func TestOOMBeforeExit(t *testing.T) {
	h := newHarness(t)
	if err := h.create("sleep 600", wire.CreateTaskRequest{}); err != nil {
		t.Fatal(err)
	}
	h.start()
	h.rt.oomKilled.Store(true)
	h.must("Kill", &wire.KillRequest{ID: "c", Signal: 9, All: true}, nil)
	if w := h.wait(""); !w.OOMKilled {
		t.Errorf("exit %+v", w)
	}
	var got []string
	if !eventually(func() bool { got = h.events.list(); return slices.Contains(got, "exit") }) {
		t.Fatal("no end")
	}
	if i := slices.Index(got, "oom"); i < 0 || i > slices.Index(got, "exit") {
		t.Errorf("events %v", got)
	}
	h.s.mu.Lock()
	c := h.s.mu.containers["c"]
	h.s.mu.Unlock()
	h.s.tellOOM(c) // the notice of what was told
	h.s.tellOOM(c) // another one
	h.must("Delete", &wire.ProcessRequest{ID: "c"}, nil)
	if !eventually(func() bool { got = h.events.list(); return slices.Contains(got, "delete") }) {
		t.Fatalf("events %v", got)
	}
	if n := strings.Count(strings.Join(got, " "), "oom"); n != 2 {
		t.Errorf("%d notices: %v", n, got)
	}
}

func TestPauseAndOthers(t *testing.T) {
	h := newHarness(t)
	if err := h.create("sleep 600", wire.CreateTaskRequest{}); err != nil {
		t.Fatal(err)
	}
	h.start()
	var st wire.StateResponse
	h.must("Pause", &wire.ProcessRequest{ID: "c"}, nil)
	if h.must("State", &wire.ProcessRequest{ID: "c"}, &st); st.Status != wire.StatusPaused {
		t.Errorf("state %+v", st)
	}
	h.must("Resume", &wire.ProcessRequest{ID: "c"}, nil)
	if h.must("State", &wire.ProcessRequest{ID: "c"}, &st); st.Status != wire.StatusRunning {
		t.Errorf("state %+v", st)
	}
	var pids wire.PidsResponse
	if h.must("Pids", &wire.ProcessRequest{ID: "c"}, &pids); len(pids.Processes) != 1 || pids.Processes[0].Pid != st.Pid {
		t.Errorf("pids %+v", pids)
	}
	h.must("Update", &wire.UpdateTaskRequest{ID: "c", Resources: &wire.Any{Value: []byte("{}")}}, nil)
	if err := h.call("Update", &wire.UpdateTaskRequest{ID: "c", Resources: &wire.Any{Value: []byte("x")}}, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("update with nonsense: %v", err)
	}
	if err := h.call("ResizePty", &wire.ResizePtyRequest{ID: "c", Width: 1, Height: 1}, nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("resize without terminal: %v", err)
	}
	if err := h.call("Checkpoint", &wire.CheckpointTaskRequest{ID: "c", Path: "x"}, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("checkpoint to a relative path: %v", err)
	}
	images := filepath.Join(t.TempDir(), "images")
	h.must("Checkpoint", &wire.CheckpointTaskRequest{ID: "c", Path: images, Options: &wire.Any{
		TypeURL: wire.CheckpointOptionsURL, Value: wire.Marshal(&wire.CheckpointOptions{Exit: true, EmptyNamespaces: []string{"network"}, CgroupsMode: "ignore"}),
	}}, nil)
	if b, err := os.ReadFile(images); err != nil || !strings.Contains(string(b), "Exit:true OpenTCP:false") || !strings.Contains(string(b), "EmptyNamespaces:[network] CgroupsMode:ignore") {
		t.Errorf("checkpoint: %s %v", b, err)
	}
	var conn wire.ConnectResponse
	if h.must("Connect", &wire.ProcessRequest{ID: "c"}, &conn); conn.TaskPid != st.Pid || int(conn.ShimPid) != os.Getpid() {
		t.Errorf("connect %+v", conn)
	}
	var stats wire.StatsResponse
	if h.must("Stats", &wire.ProcessRequest{ID: "c"}, &stats); stats.Stats.TypeURL != "x" {
		t.Errorf("stats %+v", stats)
	}
	h.must("Shutdown", &wire.ShutdownRequest{}, nil) // holds a container: stays
	h.must("State", &wire.ProcessRequest{ID: "c"}, &st)
}

// Orphans are reaped, and the children of a runtime call are left to it.
func TestOrphans(t *testing.T) {
	h := newHarness(t)
	pidFile := filepath.Join(h.bundle, "orphan")
	if err := h.create("(sleep 0.05 & echo $! > "+pidFile+"); sleep 600", wire.CreateTaskRequest{}); err != nil {
		t.Fatal(err)
	}
	h.start()
	ok := eventually(func() bool {
		b, err := os.ReadFile(pidFile)
		var pid int
		if _, serr := fmt.Sscan(string(b), &pid); err != nil || serr != nil {
			return false
		}
		return unix.Kill(pid, 0) == unix.ESRCH
	})
	if !ok {
		t.Error("the orphan is a zombie")
	}
}

// While orphans end all the time, a call still gets the status of its own child.
func TestCallsKeepTheirChildren(t *testing.T) {
	h := newHarness(t)
	if err := h.create("while true; do (sleep 0.01 &) ; sleep 0.005; done", wire.CreateTaskRequest{}); err != nil {
		t.Fatal(err)
	}
	h.start()
	for range 200 {
		h.must("Stats", &wire.ProcessRequest{ID: "c"}, nil)
	}
}

// Two thousand processes leave neither goroutines nor descriptors nor memory behind.
func TestExecLeaks(t *testing.T) {
	h := newHarness(t)
	path := filepath.Join(h.bundle, "log")
	if err := h.create("sleep 600", wire.CreateTaskRequest{Stdout: uri(path, false, false)}); err != nil {
		t.Fatal(err)
	}
	h.start()
	count := func() (fds, goroutines int) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries), runtime.NumGoroutine()
	}
	run := func(n int) {
		for i := range n {
			id := fmt.Sprint("x", i)
			if err := h.exec(id, wire.ExecProcessRequest{Stdout: uri("", true, true)}, "/bin/true"); err != nil {
				t.Fatal(err)
			}
			h.must("Start", &wire.ProcessRequest{ID: "c", ExecID: id}, nil)
			if w := h.wait(id); w.ExitStatus != 0 {
				t.Fatalf("exit %+v", w)
			}
			h.must("Delete", &wire.ProcessRequest{ID: "c", ExecID: id}, nil)
		}
	}
	run(50)
	fds, goroutines := count()
	run(2000)
	var f, g int
	if !eventually(func() bool { f, g = count(); return f <= fds && g <= goroutines }) {
		t.Errorf("descriptors %d → %d, goroutines %d → %d", fds, f, goroutines, g)
	}
	h.s.reaper.mu.Lock()
	defer h.s.reaper.mu.Unlock()
	if n := len(h.s.reaper.children); n != 1 {
		t.Errorf("%d children are known", n)
	}
}

// TestKilledBeforeStart: a process that ended before its start was asked for stays ended, however the start goes.
func TestKilledBeforeStart(t *testing.T) {
	for _, to := range []phase{created, running, stopped} {
		p := &process{c: &container{id: "c"}, stopped: make(chan struct{}), streams: &streams{}}
		if err := p.move(created, starting); err != nil {
			t.Fatal(err)
		}
		p.ended(Exit{Status: 137}, func() {})
		p.startOver(to)
		if st := p.state(); st.Status != wire.StatusStopped || st.ExitStatus != 137 {
			t.Errorf("after a start that went to %v: %+v", to, st)
		}
		if err := p.move(stopped, deleting); err != nil {
			t.Error(err)
		}
	}
}

// TestExecMeetsDelete: a process that is added to a container while that is being deleted leaves nothing, and whoever
// waits for one that was added and not started is told that it will not come.
func TestExecMeetsDelete(t *testing.T) {
	h := newHarness(t)
	if err := h.create("sleep 600", wire.CreateTaskRequest{}); err != nil {
		t.Fatal(err)
	}
	h.start()
	if err := h.exec("waited", wire.ExecProcessRequest{}, "/bin/true"); err != nil {
		t.Fatal(err)
	}
	waited := make(chan error, 1)
	p, err := h.s.process("c", "waited")
	if err != nil {
		t.Fatal(err)
	}
	go func() { waited <- h.call("Wait", &wire.ProcessRequest{ID: "c", ExecID: "waited"}, nil) }()
	c := p.c
	h.must("Kill", &wire.KillRequest{ID: "c", Signal: 9, All: true}, nil)
	h.wait("")
	h.must("Delete", &wire.ProcessRequest{ID: "c"}, nil)
	<-p.stopped
	if err := <-waited; err != nil && !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	// One that found the container just before.
	h.s.mu.Lock()
	h.s.mu.containers["c"] = c
	h.s.mu.Unlock()
	c.init.stopped = make(chan struct{}) // it had not ended
	if err := h.exec("late", wire.ExecProcessRequest{Stdout: uri("", true, false)}, "/bin/true"); !errdefs.IsNotFound(err) {
		t.Errorf("a process of a container that is deleted: %v", err)
	}
	close(c.init.stopped)
	if all := c.all(); len(all) != 2 {
		t.Errorf("%d processes", len(all))
	}
	h.s.mu.Lock()
	delete(h.s.mu.containers, "c")
	h.s.mu.Unlock()
}

// TestShutdownMeetsCreation: a caller gives a creation up, and asks the shim to go before that is over. It goes when the
// creation fails.
func TestShutdownMeetsCreation(t *testing.T) {
	t.Parallel()
	h := newHarness(t)
	h.rt.creating = make(chan struct{})
	created := make(chan error, 1)
	go func() { created <- h.create("true", wire.CreateTaskRequest{}) }()
	<-h.rt.creating
	h.must("Shutdown", &wire.ShutdownRequest{}, nil)
	if err := os.Remove(filepath.Join(h.bundle, "command")); err != nil {
		t.Fatal(err)
	}
	<-h.rt.creating
	if err := <-created; err == nil {
		t.Error("created without a command")
	}
	select {
	case <-h.s.shutdown:
	case <-time.After(5 * time.Minute):
		t.Error("the shim stays, and holds nothing")
	}
}

// TestLeftInCreation: nobody is connected any more when a creation fails. The shim does not stay for ever.
func TestLeftInCreation(t *testing.T) {
	t.Parallel()
	h := newHarness(t)
	defer h.s.end()
	h.rt.creating = make(chan struct{})
	h.write("true")
	go h.call("Create", &wire.CreateTaskRequest{ID: "c", Bundle: h.bundle}, nil) // fails: its connection is closed
	<-h.rt.creating
	h.rpc.Close()
	state := func() (conns int, leaving bool) {
		h.s.mu.Lock()
		defer h.s.mu.Unlock()
		return h.s.mu.conns, h.s.mu.idle != nil
	}
	deadline := time.Now().Add(5 * time.Minute)
	for conns, _ := state(); conns != 0; conns, _ = state() {
		if time.Now().After(deadline) {
			t.Fatal("the connection is not seen to be closed")
		}
		time.Sleep(time.Millisecond)
	}
	if err := os.Remove(filepath.Join(h.bundle, "command")); err != nil {
		t.Fatal(err)
	}
	<-h.rt.creating
	for _, leaving := state(); !leaving; _, leaving = state() {
		if time.Now().After(deadline) {
			t.Fatal("the shim stays for nobody")
		}
		time.Sleep(time.Millisecond)
	}
}
