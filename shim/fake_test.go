package shim

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/shim/wire"
)

// fakeRuntime starts plain processes: a container's process is a shell that waits for
// a line on a pipe, and then becomes what the bundle says.
type fakeRuntime struct {
	createErr error
	creating  chan struct{} // a creation says so, and waits until it is read
	removed   atomic.Int32
	oom       chan struct{}
	oomKilled atomic.Bool
}

type fakeContainer struct {
	r    *fakeRuntime
	proc Process
	gate *os.File
}

func startProcess(argv []string, files ...*os.File) (Process, error) {
	p, err := os.StartProcess(argv[0], argv, &os.ProcAttr{Files: files, Sys: &syscall.SysProcAttr{Setsid: true}})
	if err != nil {
		return Process{}, err
	}
	pid := p.Pid
	return Process{Pid: pid}, p.Release()
}

func (r *fakeRuntime) Create(_ context.Context, _ string, o CreateOptions) (Container, error) {
	if r.createErr != nil {
		return nil, r.createErr
	}
	if o.Restore != nil {
		return nil, fmt.Errorf("restore %+v", *o.Restore)
	}
	if r.creating != nil {
		r.creating <- struct{}{}
		r.creating <- struct{}{}
	}
	command, err := os.ReadFile(filepath.Join(o.Bundle, "command"))
	if err != nil {
		return nil, err
	}
	pr, pw, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer pr.Close()
	p, err := startProcess([]string{"/bin/sh", "-c", "read x <&3; exec 3<&-; " + string(command)}, o.Stdin, o.Stdout, o.Stderr, pr)
	if err != nil {
		return nil, err
	}
	return &fakeContainer{r: r, proc: p, gate: pw}, nil
}

func (r *fakeRuntime) Remove(context.Context, string, string) error { r.removed.Add(1); return nil }

func (c *fakeContainer) Init() Process { return c.proc }

func (c *fakeContainer) Start(context.Context) error {
	_, err := c.gate.WriteString("go\n")
	return errors.Join(err, c.gate.Close())
}

func (c *fakeContainer) Exec(_ context.Context, o ExecOptions) (Process, error) {
	p, err := startProcess(o.Process.Args, o.Stdin, o.Stdout, o.Stderr)
	if errors.Is(err, os.ErrNotExist) {
		err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return p, err
}

func (c *fakeContainer) Kill(_ context.Context, sig unix.Signal, all bool) error {
	pid := c.proc.Pid
	if all {
		pid = -pid
	}
	if err := unix.Kill(pid, sig); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return nil
}
func (c *fakeContainer) Pause(context.Context) error  { return unix.Kill(c.proc.Pid, unix.SIGSTOP) }
func (c *fakeContainer) Resume(context.Context) error { return unix.Kill(c.proc.Pid, unix.SIGCONT) }
func (c *fakeContainer) Checkpoint(_ context.Context, o CheckpointOptions) error {
	return os.WriteFile(o.ImagePath, fmt.Appendf(nil, "%+v", o), 0o600)
}
func (c *fakeContainer) Update(context.Context, *specs.LinuxResources) error { return nil }
func (c *fakeContainer) Pids(context.Context) ([]int, error)                 { return []int{c.proc.Pid}, nil }
func (c *fakeContainer) OOM(ctx context.Context) (<-chan struct{}, error) {
	out := make(chan struct{})
	go func() {
		defer close(out)
		for {
			select {
			case <-c.r.oom:
				out <- struct{}{}
			case <-ctx.Done():
				return
			}
		}
	}()
	return out, nil
}
func (c *fakeContainer) OOMKilled() bool              { return c.r.oomKilled.Load() }
func (c *fakeContainer) Delete(context.Context) error { return nil }

// Stats has a child of its own, as a call to an executed runtime has.
func (c *fakeContainer) Stats(context.Context) (wire.Any, error) {
	err := exec.Command("/bin/sh", "-c", "exit 3").Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 {
		return wire.Any{}, fmt.Errorf("child of a call: %w", err)
	}
	return wire.Any{TypeURL: "x"}, nil
}

// eventSink takes events over ttrpc.
type eventSink struct {
	address string
	l       net.Listener
	mu      sync.Mutex
	topics  []string
	fail    atomic.Bool
}

func newEventSink(t *testing.T) *eventSink {
	t.Helper()
	s := &eventSink{address: filepath.Join(t.TempDir(), "events")}
	s.listen(t)
	return s
}

func (s *eventSink) listen(t *testing.T) {
	t.Helper()
	f, err := wire.Listen(s.address)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if s.l, err = net.FileListener(f); err != nil {
		t.Fatal(err)
	}
	services := wire.Services{wire.ServiceEvents: {"Forward": wire.Handle(func(_ context.Context, r *wire.ForwardRequest) (wire.Message, error) {
		if s.fail.Load() {
			return nil, errors.New("not now")
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		topic := strings.TrimPrefix(r.Envelope.Topic, "/tasks/")
		var exit wire.TaskExit
		if topic == "exit" && wire.Unmarshal(r.Envelope.Event.Value, &exit) == nil && exit.ID != exit.ContainerID {
			topic += ":" + exit.ID
		}
		var started wire.TaskExecStarted
		if strings.HasPrefix(topic, "exec-") && wire.Unmarshal(r.Envelope.Event.Value, &started) == nil {
			topic += ":" + started.ExecID
		}
		s.topics = append(s.topics, topic)
		return &wire.Empty{}, nil
	})}}
	go func(l net.Listener) {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go services.Serve(context.Background(), conn, bufio.NewReader(conn))
		}
	}(s.l)
	t.Cleanup(func() { s.l.Close() })
}

func (s *eventSink) list() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.topics...)
}

// harness is a Service in this process.
type harness struct {
	t      *testing.T
	rt     *fakeRuntime
	s      *Service
	events *eventSink
	rpc    *wire.Client
	path   string
	bundle string
	served chan error
}

func newHarness(t *testing.T) *harness {
	t.Helper()
	h := &harness{t: t, rt: &fakeRuntime{oom: make(chan struct{})}, events: newEventSink(t), bundle: t.TempDir(), served: make(chan error, 1)}
	s, err := New(Options{
		Namespace: "test", EventsAddress: h.events.address, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Runtime: func(RuntimeConfig) (Runtime, error) { return h.rt, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	h.s, h.path = s, filepath.Join(t.TempDir(), "s")
	f, err := wire.Listen(h.path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	go func() { h.served <- s.Serve(l) }()
	conn, err := wire.Dial(h.path)
	if err != nil {
		t.Fatal(err)
	}
	h.rpc = wire.NewClient(conn, "")
	t.Cleanup(func() {
		h.call("Kill", &wire.KillRequest{ID: "c", Signal: 9, All: true}, nil)
		h.call("Wait", &wire.ProcessRequest{ID: "c"}, nil)
		h.call("Delete", &wire.ProcessRequest{ID: "c"}, nil)
		h.call("Shutdown", &wire.ShutdownRequest{}, nil)
		h.rpc.Close()
		select {
		case err := <-h.served:
			if err != nil {
				t.Errorf("serve: %v", err)
			}
		case <-time.After(5 * time.Minute):
			t.Error("the shim does not end")
		}
	})
	return h
}

func (h *harness) call(method string, req, resp wire.Message) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	return h.rpc.Call(ctx, wire.ServiceTaskV3, method, req, resp)
}

func (h *harness) must(method string, req, resp wire.Message) {
	h.t.Helper()
	if err := h.call(method, req, resp); err != nil {
		h.t.Fatalf("%s: %v", method, err)
	}
}

// create makes container "c" that runs a shell command.
func (h *harness) create(command string, io wire.CreateTaskRequest) error {
	h.t.Helper()
	h.write(command)
	io.ID, io.Bundle = "c", h.bundle
	return h.call("Create", &io, nil)
}

// write makes the bundle of "c".
func (h *harness) write(command string) {
	h.t.Helper()
	for name, content := range map[string]string{"command": command, "config.json": `{"linux":{"namespaces":[{"type":"pid"}]}}`} {
		if err := os.WriteFile(filepath.Join(h.bundle, name), []byte(content), 0o600); err != nil {
			h.t.Fatal(err)
		}
	}
}

func (h *harness) start() { h.t.Helper(); h.must("Start", &wire.ProcessRequest{ID: "c"}, nil) }

func (h *harness) wait(execID string) *wire.WaitResponse {
	h.t.Helper()
	var r wire.WaitResponse
	h.must("Wait", &wire.ProcessRequest{ID: "c", ExecID: execID}, &r)
	return &r
}

func (h *harness) exec(id string, r wire.ExecProcessRequest, argv ...string) error {
	h.t.Helper()
	spec, err := json.Marshal(specs.Process{Args: argv, Cwd: "/"})
	if err != nil {
		h.t.Fatal(err)
	}
	r.ID, r.ExecID, r.Spec = "c", id, &wire.Any{TypeURL: "x", Value: spec}
	return h.call("Exec", &r, nil)
}

// attach gives the connection after the handshake.
func (h *harness) attach(req wire.AttachRequest) (net.Conn, *bufio.Reader) {
	h.t.Helper()
	conn, err := wire.Dial(h.path)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	req.Version, req.ID = 1, "c"
	wire.WriteLine(conn, req)
	r := bufio.NewReader(conn)
	var reply wire.AttachReply
	if err := wire.ReadLine(r, &reply); err != nil || reply.Err() != nil {
		h.t.Fatal(err, reply.Err())
	}
	return conn, r
}

// frames reads output to its end.
func frames(r io.Reader) (string, error) {
	var b strings.Builder
	buf := make([]byte, wire.MaxFrame)
	for {
		typ, p, err := wire.ReadFrame(r, buf)
		if err != nil {
			return b.String(), err
		}
		if typ == wire.FrameEnd {
			return b.String(), nil
		}
		b.Write(p)
	}
}

func eventually(f func() bool) bool {
	for end := time.Now().Add(5 * time.Minute); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if f() {
			return true
		}
	}
	return false
}
