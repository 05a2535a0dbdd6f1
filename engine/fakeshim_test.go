package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/shim/client"
)

// fakeShims starts shims whose containers do what their first argument says:
//
//	exit N     end at once
//	sleep      end by SIGTERM (143) or SIGKILL (137)
//	stubborn   end by SIGKILL only
type fakeShims struct {
	*breaker
	mu   sync.Mutex
	live map[string]*fakeShim // by bundle
	// hang makes Connect wait for its context; mostHung is how many did at a time.
	hang              map[string]bool
	hanging, mostHung int
	// slow, if not nil, is called while a shim makes a container.
	slow func(context.Context)
	// restore is called with what a container is to be made of.
	restore func(client.CreateOptions, specs.Spec) error
	// killed, if not nil, is called before a signal that was sent is answered.
	killed func()
	// freezes: what is paused does not end until it is thawed.
	freezes bool
	// exits are exit files that dead shims left, by bundle.
	exits map[string]int
}

type fakeShim struct {
	f      *fakeShims
	bundle string
	mu     sync.Mutex
	procs  map[string]*fakeProc // by procKey
	id     string
	paused bool
	gone   chan struct{}
	stuck  atomic.Bool  // see answer
	asked  atomic.Int32 // while it was stuck
}

type fakeProc struct {
	args  []string
	pid   int
	state client.Status
	exit  client.Exit
	done  chan struct{}
	// killed is the code with which it ends when it is thawed.
	killed int
}

// fakePid is a process that exists and that nobody kills: its root is /, which
// only tests that run as root can open.
var fakePid = os.Getpid()

func (f *fakeShims) Start(_ context.Context, o client.StartOptions) (Shim, error) {
	if err := f.step("shim.start"); err != nil {
		return nil, err
	}
	s := &fakeShim{f: f, bundle: o.Bundle, procs: map[string]*fakeProc{}, id: o.ID, gone: make(chan struct{})}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.live[o.Bundle] = s
	return s, nil
}

func (f *fakeShims) Connect(ctx context.Context, bundle string) (Shim, error) {
	f.mu.Lock()
	s, hang := f.live[bundle], f.hang[bundle]
	if hang {
		f.hanging++
		f.mostHung = max(f.mostHung, f.hanging)
		f.mu.Unlock()
		<-ctx.Done()
		f.mu.Lock()
		f.hanging--
		f.mu.Unlock()
		return nil, ctx.Err()
	}
	f.mu.Unlock()
	if s == nil {
		return nil, fmt.Errorf("shim of %s: %w", bundle, errdefs.ErrNotFound)
	}
	return s, nil
}

// Kill ends a shim; its containers are dead when it is reaped.
func (f *fakeShims) Kill(_ context.Context, o client.StartOptions) error {
	_ = f.step("kill shim")
	f.mu.Lock()
	s := f.live[o.Bundle]
	delete(f.hang, o.Bundle)
	f.mu.Unlock()
	if s == nil {
		return errdefs.ErrNotFound
	}
	s.die()
	return nil
}

func (f *fakeShims) Reap(_ context.Context, o client.StartOptions) (client.Exit, error) {
	_ = f.step("reap")
	if _, err := os.Lstat(o.Bundle); err != nil {
		return client.Exit{}, fmt.Errorf("bundle %s: %w", o.Bundle, errdefs.ErrNotFound)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.live, o.Bundle)
	if code, ok := f.exits[o.Bundle]; ok {
		return client.Exit{Status: uint32(code), ExitedAt: time.Now()}, nil
	}
	return client.Exit{Status: 137, ExitedAt: time.Now()}, nil
}

func (f *fakeShims) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.live)
}

// die is a crash of the shim with its container.
func (s *fakeShim) die() {
	s.f.mu.Lock()
	delete(s.f.live, s.bundle)
	s.f.mu.Unlock()
	close(s.gone)
}

// procKey names a process: the shim of a pod holds those of several containers.
func procKey(id, execID string) string { return id + "/" + execID }

func (s *fakeShim) proc(id, execID string) (*fakeProc, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.procs[procKey(id, execID)]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("process %q of %s: %w", execID, id, errdefs.ErrNotFound)
}

func (s *fakeShim) Create(ctx context.Context, o client.CreateOptions) (int, error) {
	if err := s.answer(ctx); err != nil {
		return 0, err
	}
	if err := s.f.step("task.create"); err != nil {
		return 0, err
	}
	raw, err := os.ReadFile(filepath.Join(o.Bundle, "config.json"))
	if err != nil {
		return 0, err
	}
	var spec specs.Spec
	if err := json.Unmarshal(raw, &spec); err != nil {
		return 0, err
	}
	if s.f.slow != nil {
		s.f.slow(ctx)
	}
	if o.Checkpoint != "" {
		if err := s.f.restore(o, spec); err != nil {
			return 0, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.procs[procKey(o.ID, "")] = &fakeProc{args: spec.Process.Args, pid: fakePid, state: client.StatusCreated, done: make(chan struct{})}
	return fakePid, nil
}

func (s *fakeShim) Exec(ctx context.Context, o client.ExecOptions) error {
	if err := s.answer(ctx); err != nil {
		return err
	}
	if err := s.f.step("exec"); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.procs[procKey(o.ID, o.ExecID)] = &fakeProc{args: o.Spec.Args, pid: fakePid, state: client.StatusCreated, done: make(chan struct{})}
	return nil
}

func (s *fakeShim) Start(_ context.Context, id, execID string) (int, error) {
	if err := s.f.step("task.start"); err != nil {
		return 0, err
	}
	p, err := s.proc(id, execID)
	if err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p.state = client.StatusRunning
	if p.args[0] == "exit" {
		code, _ := strconv.Atoi(p.args[1])
		p.end(code)
	}
	return p.pid, nil
}

// end is called with the shim's lock held.
func (p *fakeProc) end(code int) {
	if p.state == client.StatusStopped {
		return
	}
	p.state = client.StatusStopped
	p.exit = client.Exit{Status: uint32(code), ExitedAt: time.Now()}
	close(p.done)
}

// answer does not return while the shim is stuck.
func (s *fakeShim) answer(ctx context.Context) error {
	if !s.stuck.Load() {
		return nil
	}
	s.asked.Add(1)
	select {
	case <-s.gone:
		return errdefs.ErrUnavailable
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *fakeShim) Kill(ctx context.Context, id, execID string, signal int, _ bool) error {
	if err := s.answer(ctx); err != nil {
		return err
	}
	p, err := s.proc(id, execID)
	if err != nil {
		return err
	}
	if s.f.killed != nil {
		defer s.f.killed()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.state == client.StatusStopped {
		return errdefs.ErrNotFound
	}
	if s.f.freezes && s.paused {
		p.killed = 128 + signal
		return nil
	}
	if signal == 9 || p.args[0] == "sleep" && (signal == 15 || signal == 2) {
		p.end(128 + signal)
	}
	return nil
}

func (s *fakeShim) Wait(ctx context.Context, id, execID string) (client.Exit, error) {
	p, err := s.proc(id, execID)
	if err != nil {
		return client.Exit{}, err
	}
	select {
	case <-p.done:
		s.mu.Lock()
		defer s.mu.Unlock()
		return p.exit, nil
	case <-s.gone:
		return client.Exit{}, errdefs.ErrUnavailable
	case <-ctx.Done():
		return client.Exit{}, ctx.Err()
	}
}

func (s *fakeShim) State(ctx context.Context, id, execID string) (client.State, error) {
	if err := s.answer(ctx); err != nil {
		return client.State{}, err
	}
	p, err := s.proc(id, execID)
	if err != nil {
		return client.State{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st := client.State{ID: id, ExecID: execID, Pid: p.pid, Status: p.state, Exit: p.exit}
	if s.paused && p.state == client.StatusRunning {
		st.Status = client.StatusPaused
	}
	return st, nil
}

func (s *fakeShim) Delete(_ context.Context, id, execID string) (client.Exit, error) {
	p, err := s.proc(id, execID)
	if err != nil {
		return client.Exit{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.procs, procKey(id, execID))
	p.end(137) // of one that was never started
	return p.exit, nil
}

func (s *fakeShim) Pause(ctx context.Context, _ string) error {
	if err := s.answer(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	s.paused = true
	s.mu.Unlock()
	return s.f.step("pause")
}

func (s *fakeShim) Resume(context.Context, string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused = false
	for _, p := range s.procs {
		if p.killed != 0 {
			p.end(p.killed)
		}
	}
	return nil
}

func (s *fakeShim) Update(context.Context, string, *specs.LinuxResources) error {
	return s.f.step("update")
}
func (s *fakeShim) Checkpoint(_ context.Context, _ string, o client.CheckpointOptions) error {
	if err := s.f.step("checkpoint"); err != nil {
		return err
	}
	// As the runtime has it: CRIU's folder for its own files holds nothing else.
	if files, err := os.ReadDir(o.Work); err != nil || len(files) > 0 {
		return fmt.Errorf("folder for work: %v, %w", files, errdefs.ErrInvalidArgument)
	}
	if err := os.Mkdir(o.Images, 0o700); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return errors.Join(os.WriteFile(filepath.Join(o.Images, "frozen"), fmt.Append(nil, s.paused), 0o600),
		os.WriteFile(filepath.Join(o.Work, "dump.log"), []byte("log"), 0o600))
}
func (s *fakeShim) Pids(context.Context, string) ([]int, error) { return []int{fakePid}, nil }
func (s *fakeShim) Resize(context.Context, string, string, uint32, uint32) error {
	return nil
}
func (s *fakeShim) CloseStdin(context.Context, string, string) error { return nil }
func (s *fakeShim) ReopenLog(context.Context, string, string) error  { return nil }

func (s *fakeShim) Attach(_ context.Context, o client.AttachOptions) (client.Stream, error) {
	p, err := s.proc(o.ID, o.ExecID)
	if err != nil {
		return nil, err
	}
	return &fakeStream{p: p}, nil
}

func (s *fakeShim) Shutdown(ctx context.Context) error {
	if err := s.answer(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	n := len(s.procs)
	s.mu.Unlock()
	if n > 0 {
		return nil // as the real one: it stays
	}
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	if s.f.live[s.bundle] == s {
		delete(s.f.live, s.bundle)
		close(s.gone)
	}
	return nil
}

func (s *fakeShim) Gone() <-chan struct{} { return s.gone }
func (s *fakeShim) Close() error          { return nil }

// fakeStream says "hello" once and ends with the process.
type fakeStream struct {
	p    *fakeProc
	said atomic.Bool
}

func (s *fakeStream) ReadFrame() (int, []byte, error) {
	if !s.said.Swap(true) {
		return 1, []byte("hello\n"), nil
	}
	<-s.p.done
	return 0, nil, io.EOF
}
func (s *fakeStream) Write(p []byte) (int, error) { return len(p), nil }
func (s *fakeStream) CloseWrite() error           { return nil }
func (s *fakeStream) Close() error                { return nil }
