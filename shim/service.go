package shim

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/shim/wire"
)

// idleLimit is how long a shim without containers and connections stays: its engine
// died before it could make use of it, or before it could end it.
const idleLimit = time.Minute

// callLimit bounds a call to the runtime, hooks included, when its caller does not
// wait any more.
const callLimit = 10 * time.Minute

// reservation is how long a container may take to come after `start` has promised
// this shim to it.
const reservation = 30 * time.Second

// Options make a Service.
type Options struct {
	Namespace string
	// Socket is the path under which clients reach the shim. It is written to the
	// bundles of its containers, and removed at the end.
	Socket string
	// EventsAddress is the ttrpc socket that takes events (Events/Forward); may be empty.
	EventsAddress string
	// Runtime gives the runtime for a configuration.
	Runtime func(RuntimeConfig) (Runtime, error)
	// JoinCgroup moves this process into a cgroup that a container's options name; nil: that is
	// refused.
	JoinCgroup func(path string) error
	// Defaults are used where a request names no runtime.
	Defaults RuntimeConfig
	Log      *slog.Logger
}

// Service is a running shim.
type Service struct {
	namespace string
	socket    string
	runtime   func(RuntimeConfig) (Runtime, error)
	defaults  RuntimeConfig
	join      func(string) error
	log       *slog.Logger
	events    *publisher
	reaper    *reaper

	trim  *idleness    // makes an idle shim small
	calls atomic.Int32 // that are under way, but for those that wait for the end of something

	attachments sync.WaitGroup

	shutdown     chan struct{} // closed by Shutdown
	shutdownOnce sync.Once

	mu struct {
		sync.Mutex
		containers map[string]*container    // nil: being created
		creations  map[string]chan struct{} // closed when that is over
		conns      int
		reserved   time.Time // until then a container is expected
		asked      bool      // Shutdown came while containers were only being created
		idle       *time.Timer
		sandbox    *sandbox // that this shim is; nil: none
		over       bool     // it was one, and was told to go
	}
}

// New makes a Service. The process becomes a child subreaper.
func New(o Options) (*Service, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, os.NewSyscallError("prctl(PR_SET_CHILD_SUBREAPER)", err)
	}
	s := &Service{
		namespace: o.Namespace, socket: o.Socket, runtime: o.Runtime, defaults: o.Defaults, join: o.JoinCgroup, log: o.Log,
		events:   newPublisher(o.EventsAddress, o.Namespace, o.Log),
		reaper:   newReaper(),
		shutdown: make(chan struct{}),
	}
	s.mu.containers, s.mu.creations = map[string]*container{}, map[string]chan struct{}{}
	s.trim = newIdleness(quiet, s.shrink)
	go s.reaper.run()
	return s, nil
}

// Serve takes connections until Shutdown is called. Each speaks ttrpc or, if it
// begins with '{', the attach protocol.
func (s *Service) Serve(l net.Listener) error {
	task, sandbox := s.taskService(), s.sandboxService()
	detach := func(service map[string]wire.Handler, name string, h wire.Handler) {
		service[name] = func(ctx context.Context, payload []byte) (wire.Message, error) {
			defer s.busy()
			if name != "Wait" && name != "WaitSandbox" {
				// A daemon that dies in the middle of a call leaves nothing half done.
				s.calls.Add(1)
				defer s.calls.Add(-1)
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), callLimit)
				defer cancel()
			}
			return h(ctx, payload)
		}
	}
	for name, h := range task {
		detach(task, name, h)
	}
	for name, h := range sandbox {
		detach(sandbox, name, h)
	}
	services := wire.Services{
		wire.ServiceSandbox: sandbox,
		wire.ServiceTaskV3:  task,
		wire.ServiceTaskV2:  task,
		wire.ServiceHako:    {"ReopenLog": wire.Handle(s.reopenLog), "Reserve": wire.Handle(s.reserve)},
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		<-s.shutdown
		// The answer to Shutdown is on its way.
		time.Sleep(20 * time.Millisecond)
		l.Close()
	}()
	s.connections(0)
	for {
		conn, err := l.Accept()
		if err != nil {
			select {
			case <-s.shutdown:
				s.close()
				return nil
			default:
			}
			if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
				time.Sleep(50 * time.Millisecond)
				continue
			}
			return fmt.Errorf("accept: %w", err)
		}
		s.connections(1)
		go func() {
			defer s.connections(-1)
			s.serveConn(ctx, conn, services)
		}()
	}
}

func (s *Service) serveConn(ctx context.Context, conn net.Conn, services wire.Services) {
	r := bufio.NewReaderSize(conn, 4<<10)
	first, err := r.Peek(1)
	switch {
	case err != nil:
		conn.Close()
	case first[0] == '{':
		s.attachments.Add(1)
		defer s.attachments.Done()
		s.serveAttach(conn, r)
	default:
		if err := services.Serve(ctx, conn, r); err != nil {
			s.log.Debug("connection", "error", err)
		}
	}
}

// connections counts, and ends an idle shim.
func (s *Service) connections(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.conns += n
	if s.mu.idle != nil {
		s.mu.idle.Stop()
		s.mu.idle = nil
	}
	if s.mu.conns == 0 && s.emptyLocked() {
		if s.mu.over {
			s.end()
			return
		}
		s.mu.idle = time.AfterFunc(idleLimit, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.mu.conns == 0 && s.emptyLocked() {
				s.end()
			}
		})
	}
}

// emptyLocked tells whether there is nothing that the shim has to stay for.
func (s *Service) emptyLocked() bool { return len(s.mu.containers) == 0 && s.mu.sandbox == nil }

// end makes the shim go. Its socket goes at once, so that nobody finds it any more,
// and a new shim may have the name.
func (s *Service) end() {
	s.shutdownOnce.Do(func() {
		if s.socket != "" {
			os.Remove(s.socket)
		}
		close(s.shutdown)
	})
}

// close ends what runs in the background.
func (s *Service) close() {
	// Clients may still be fetching the last output.
	done := make(chan struct{})
	go func() { s.attachments.Wait(); close(done) }()
	s.mu.Lock()
	limit := time.After(lingerLimit)
	if len(s.mu.containers) > 0 {
		limit = time.After(0)
	}
	s.mu.Unlock()
	select {
	case <-done:
	case <-limit:
	}
	s.trim.stop()
	s.events.close()
	close(s.reaper.quit)
}

func (s *Service) taskService() map[string]wire.Handler {
	return map[string]wire.Handler{
		"Create":     wire.Handle(s.createTask),
		"Start":      wire.Handle(s.start),
		"Exec":       wire.Handle(s.exec),
		"State":      wire.Handle(s.state),
		"Delete":     wire.Handle(s.delete),
		"Wait":       wire.Handle(s.wait),
		"Kill":       wire.Handle(s.kill),
		"Pids":       wire.Handle(s.pids),
		"Pause":      wire.Handle(s.pause),
		"Resume":     wire.Handle(s.resume),
		"Checkpoint": wire.Handle(s.checkpoint),
		"Update":     wire.Handle(s.update),
		"Stats":      wire.Handle(s.stats),
		"ResizePty":  wire.Handle(s.resizePty),
		"CloseIO":    wire.Handle(s.closeIO),
		"Connect":    wire.Handle(s.connect),
		"Shutdown":   wire.Handle(s.shutdownTask),
	}
}

// container finds a container. One that is being created is waited for: a daemon that
// takes over from one that died in the middle must not take it for absent.
func (s *Service) container(id string) (*container, error) {
	for {
		s.mu.Lock()
		c, creation := s.mu.containers[id], s.mu.creations[id]
		s.mu.Unlock()
		switch {
		case c != nil:
			return c, nil
		case creation == nil:
			return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
		}
		<-creation
	}
}

func (s *Service) process(id, execID string) (*process, error) {
	c, err := s.container(id)
	if err != nil {
		return nil, err
	}
	return c.process(execID)
}

// live finds a container whose first process has not ended.
func (s *Service) live(id string) (*container, error) {
	c, err := s.container(id)
	if err != nil {
		return nil, err
	}
	select {
	case <-c.init.stopped:
		return nil, fmt.Errorf("container %s is stopped: %w", id, errdefs.ErrFailedPrecondition)
	default:
		return c, nil
	}
}

func (s *Service) createTask(ctx context.Context, r *wire.CreateTaskRequest) (wire.Message, error) {
	s.mu.Lock()
	select {
	case <-s.shutdown:
		s.mu.Unlock()
		return nil, errEnding
	default:
	}
	if b := s.mu.sandbox; s.mu.over || b != nil && b.closed {
		s.mu.Unlock()
		return nil, fmt.Errorf("create container %s: its sandbox is stopped: %w", r.ID, errdefs.ErrFailedPrecondition)
	}
	if _, taken := s.mu.containers[r.ID]; taken {
		s.mu.Unlock()
		return nil, fmt.Errorf("container %s: %w", r.ID, errdefs.ErrAlreadyExists)
	}
	creation := make(chan struct{})
	s.mu.containers[r.ID], s.mu.creations[r.ID] = nil, creation
	s.mu.reserved = time.Time{}
	s.mu.Unlock()

	c, err := s.create(ctx, r)

	s.mu.Lock()
	delete(s.mu.creations, r.ID)
	close(creation)
	if err != nil {
		delete(s.mu.containers, r.ID)
		if s.mu.asked && s.emptyLocked() && time.Now().After(s.mu.reserved) {
			s.end()
		}
		s.mu.Unlock()
		s.connections(0) // whoever asked for it may have gone meanwhile
		return nil, fmt.Errorf("create container %s: %w", r.ID, err)
	}
	s.mu.asked = false
	s.mu.containers[r.ID] = c
	s.mu.Unlock()
	p := c.init
	s.events.publish(topicCreate, "TaskCreate", &wire.TaskCreate{
		ContainerID: c.id, Bundle: c.bundle, Rootfs: r.Rootfs, Checkpoint: r.Checkpoint, Pid: uint32(p.pid()),
		IO: &wire.TaskIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
	})
	go s.supervise(p, p.mu.child)
	return &wire.PidResponse{Pid: uint32(p.pid())}, nil
}

func (s *Service) start(ctx context.Context, r *wire.ProcessRequest) (wire.Message, error) {
	p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if err := p.move(created, starting); err != nil {
		return nil, err
	}
	if r.ExecID != "" {
		return s.startExec(ctx, p)
	}
	s.reaper.calls.RLock()
	defer s.reaper.calls.RUnlock()
	if err := p.c.rt.Start(ctx); err != nil {
		p.startOver(created)
		return nil, fmt.Errorf("start %s: %w", p, err)
	}
	s.events.publish(topicStart, "TaskStart", &wire.TaskStart{ContainerID: p.c.id, Pid: uint32(p.pid())})
	p.startOver(running)
	return &wire.PidResponse{Pid: uint32(p.pid())}, nil
}

func (s *Service) startExec(ctx context.Context, p *process) (wire.Message, error) {
	s.reaper.calls.RLock()
	defer s.reaper.calls.RUnlock()
	proc, err := p.c.rt.Exec(ctx, ExecOptions{
		Process: p.spec, Stdin: p.streams.stdinEnd, Stdout: p.streams.stdoutEnd, Stderr: p.streams.stderrEnd,
	})
	p.streams.closeEnds()
	var ch *child
	if err == nil {
		ch, err = s.reaper.watch(proc.Pid)
	}
	if err != nil {
		p.never(statusUnknown)
		p.startOver(stopped)
		p.streams.close() // callers read the output to its end before they delete the process
		return nil, fmt.Errorf("start %s: %w", p, err)
	}
	p.mu.Lock()
	p.mu.pid, p.mu.child = proc.Pid, ch
	p.mu.Unlock()
	p.streams.started(proc.Console)
	s.events.publish(topicExecStarted, "TaskExecStarted", &wire.TaskExecStarted{
		ContainerID: p.c.id, ExecID: p.execID, Pid: uint32(proc.Pid),
	})
	p.startOver(running)
	go s.supervise(p, ch)
	return &wire.PidResponse{Pid: uint32(proc.Pid)}, nil
}

func (s *Service) exec(_ context.Context, r *wire.ExecProcessRequest) (wire.Message, error) {
	c, err := s.live(r.ID)
	if err != nil {
		return nil, err
	}
	p := &process{c: c, execID: r.ExecID, spec: new(specs.Process), stopped: make(chan struct{}), io: ioRequest{
		id: r.ID, namespace: s.namespace, terminal: r.Terminal, uid: c.init.io.uid, gid: c.init.io.gid,
		stdin: r.Stdin, stdout: r.Stdout, stderr: r.Stderr,
	}}
	if r.ExecID == "" || r.Spec == nil {
		return nil, fmt.Errorf("exec in container %s without id or process: %w", r.ID, errdefs.ErrInvalidArgument)
	}
	if err := json.Unmarshal(r.Spec.Value, p.spec); err != nil {
		return nil, fmt.Errorf("decode process: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	p.spec.Terminal = r.Terminal
	c.mu.Lock()
	_, taken := c.mu.execs[r.ExecID]
	if !taken {
		c.mu.execs[r.ExecID] = nil
	}
	c.mu.Unlock()
	if taken {
		return nil, fmt.Errorf("process %s of container %s: %w", r.ExecID, r.ID, errdefs.ErrAlreadyExists)
	}
	p.streams, err = openStreams(p.io, s.startChild, s.busy)
	c.mu.Lock()
	if err == nil && c.mu.deleted { // while its streams were being opened
		err = fmt.Errorf("container %s: %w", r.ID, errdefs.ErrNotFound)
		defer p.streams.close()
		defer p.streams.closeEnds()
	}
	if err != nil {
		delete(c.mu.execs, r.ExecID)
	} else {
		c.mu.execs[r.ExecID] = p
	}
	c.mu.Unlock()
	if err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", r.ID, err)
	}
	s.events.publish(topicExecAdded, "TaskExecAdded", &wire.TaskExecAdded{ContainerID: r.ID, ExecID: r.ExecID})
	return &wire.Empty{}, nil
}

func (s *Service) state(_ context.Context, r *wire.ProcessRequest) (wire.Message, error) {
	p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	return p.state(), nil
}

func (s *Service) wait(ctx context.Context, r *wire.ProcessRequest) (wire.Message, error) {
	p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.stopped:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	st := p.state()
	return &wire.WaitResponse{ExitStatus: st.ExitStatus, ExitedAt: st.ExitedAt, OOMKilled: st.OOMKilled}, nil
}

// delete releases a process that has ended, or a container that was never started.
func (s *Service) delete(ctx context.Context, r *wire.ProcessRequest) (wire.Message, error) {
	p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if err := s.endCreated(ctx, p); err != nil {
		return nil, err
	}
	if err := p.move(stopped, deleting); err != nil {
		return nil, err
	}
	if r.ExecID == "" {
		if err := s.deleteContainer(ctx, p.c); err != nil {
			p.move(deleting, stopped)
			return nil, fmt.Errorf("delete %s: %w", p, err)
		}
	} else {
		p.c.mu.Lock()
		delete(p.c.mu.execs, r.ExecID)
		p.c.mu.Unlock()
	}
	p.streams.close()
	st := p.state()
	if r.ExecID == "" { // that of an exec is not told by containerd's shim either
		s.events.publish(topicDelete, "TaskDelete", &wire.TaskDelete{ContainerID: r.ID, Pid: st.Pid, ExitStatus: st.ExitStatus, ExitedAt: st.ExitedAt})
	}
	return &wire.DeleteResponse{Pid: st.Pid, ExitStatus: st.ExitStatus, ExitedAt: st.ExitedAt, OOMKilled: st.OOMKilled}, nil
}

// endCreated ends a process that was created and not started.
func (s *Service) endCreated(ctx context.Context, p *process) error {
	p.mu.Lock()
	phase := p.mu.phase
	p.mu.Unlock()
	if phase != created {
		return nil
	}
	if p.execID != "" {
		if p.move(created, stopped) == nil {
			p.never(0)
		}
		return nil
	}
	if err := s.killInit(ctx, p.c, unix.SIGKILL, false); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	select {
	case <-p.stopped:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Service) deleteContainer(ctx context.Context, c *container) error {
	s.reaper.calls.RLock()
	defer s.reaper.calls.RUnlock()
	if err := c.rt.Delete(ctx); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	c.oomEnd()
	c.mu.Lock()
	c.mu.deleted = true
	c.mu.Unlock()
	for _, p := range c.all() {
		if p != nil && p.execID != "" {
			if p.move(created, stopped) == nil {
				p.never(statusUnknown) // whoever waits for it, does so in vain
			}
			p.streams.close()
		}
	}
	s.mu.Lock()
	delete(s.mu.containers, c.id)
	s.mu.Unlock()
	s.connections(0) // whoever asked for it may have gone meanwhile
	return nil
}

func (s *Service) killInit(ctx context.Context, c *container, sig unix.Signal, all bool) error {
	s.reaper.calls.RLock()
	defer s.reaper.calls.RUnlock()
	return c.rt.Kill(ctx, sig, all)
}

func (s *Service) kill(ctx context.Context, r *wire.KillRequest) (wire.Message, error) {
	p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.stopped:
		return nil, fmt.Errorf("%s: process already finished: %w", p, errdefs.ErrNotFound)
	default:
	}
	if r.ExecID == "" {
		if err := s.killInit(ctx, p.c, unix.Signal(r.Signal), r.All); err != nil {
			return nil, fmt.Errorf("kill %s: %w", p, err)
		}
		return &wire.Empty{}, nil
	}
	p.mu.Lock()
	ch := p.mu.child
	p.mu.Unlock()
	if ch == nil {
		return nil, fmt.Errorf("%s has not been started: %w", p, errdefs.ErrFailedPrecondition)
	}
	if err := ch.fd.Kill(unix.Signal(r.Signal)); err != nil {
		return nil, fmt.Errorf("kill %s: %w", p, err)
	}
	return &wire.Empty{}, nil
}

func (s *Service) pids(ctx context.Context, r *wire.ProcessRequest) (wire.Message, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, err
	}
	s.reaper.calls.RLock()
	defer s.reaper.calls.RUnlock()
	pids, err := c.rt.Pids(ctx)
	if err != nil {
		return nil, fmt.Errorf("processes of container %s: %w", r.ID, err)
	}
	execs := map[int]string{}
	for _, p := range c.all() {
		if p != nil && p.execID != "" {
			execs[p.pid()] = p.execID
		}
	}
	out := &wire.PidsResponse{Processes: make([]wire.ProcessInfo, len(pids))}
	for i, pid := range pids {
		out.Processes[i].Pid = uint32(pid)
		if id := execs[pid]; id != "" {
			out.Processes[i].Info = &wire.Any{TypeURL: wire.ProcessDetailsURL, Value: wire.Marshal(&wire.ProcessDetails{ExecID: id})}
		}
	}
	return out, nil
}

func (s *Service) pause(ctx context.Context, r *wire.ProcessRequest) (wire.Message, error) {
	c, err := s.live(r.ID)
	if err != nil {
		return nil, err
	}
	s.reaper.calls.RLock()
	defer s.reaper.calls.RUnlock()
	if err := c.rt.Pause(ctx); err != nil {
		return nil, fmt.Errorf("pause container %s: %w", r.ID, err)
	}
	c.paused.Store(true)
	s.events.publish(topicPaused, "TaskPaused", &wire.TaskPaused{ContainerID: r.ID})
	return &wire.Empty{}, nil
}

func (s *Service) resume(ctx context.Context, r *wire.ProcessRequest) (wire.Message, error) {
	c, err := s.live(r.ID)
	if err != nil {
		return nil, err
	}
	s.reaper.calls.RLock()
	defer s.reaper.calls.RUnlock()
	if err := c.rt.Resume(ctx); err != nil {
		return nil, fmt.Errorf("resume container %s: %w", r.ID, err)
	}
	c.paused.Store(false)
	s.events.publish(topicResumed, "TaskResumed", &wire.TaskResumed{ContainerID: r.ID})
	return &wire.Empty{}, nil
}

func (s *Service) update(ctx context.Context, r *wire.UpdateTaskRequest) (wire.Message, error) {
	c, err := s.live(r.ID)
	if err != nil {
		return nil, err
	}
	if r.Resources == nil {
		return nil, fmt.Errorf("update container %s without resources: %w", r.ID, errdefs.ErrInvalidArgument)
	}
	var res specs.LinuxResources
	if err := json.Unmarshal(r.Resources.Value, &res); err != nil {
		return nil, fmt.Errorf("decode resources: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	s.reaper.calls.RLock()
	defer s.reaper.calls.RUnlock()
	if err := c.rt.Update(ctx, &res); err != nil {
		return nil, fmt.Errorf("update container %s: %w", r.ID, err)
	}
	return &wire.Empty{}, nil
}

func (s *Service) stats(ctx context.Context, r *wire.ProcessRequest) (wire.Message, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, err
	}
	s.reaper.calls.RLock()
	defer s.reaper.calls.RUnlock()
	any, err := c.rt.Stats(ctx)
	if err != nil {
		return nil, fmt.Errorf("stats of container %s: %w", r.ID, err)
	}
	return &wire.StatsResponse{Stats: &any}, nil
}

func (s *Service) resizePty(_ context.Context, r *wire.ResizePtyRequest) (wire.Message, error) {
	p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if err := p.streams.resize(r.Width, r.Height); err != nil {
		return nil, fmt.Errorf("resize terminal of %s: %w", p, err)
	}
	return &wire.Empty{}, nil
}

func (s *Service) closeIO(_ context.Context, r *wire.CloseIORequest) (wire.Message, error) {
	p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if r.Stdin && p.streams.input != nil {
		p.streams.input.closeFIFO()
	}
	return &wire.Empty{}, nil
}

func (s *Service) reopenLog(_ context.Context, r *wire.ProcessRequest) (wire.Message, error) {
	p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if p.streams.log == nil {
		return nil, fmt.Errorf("%s has no log file: %w", p, errdefs.ErrFailedPrecondition)
	}
	if err := p.streams.log.Reopen(); err != nil {
		return nil, err
	}
	return &wire.Empty{}, nil
}

func (s *Service) connect(_ context.Context, r *wire.ProcessRequest) (wire.Message, error) {
	out := &wire.ConnectResponse{ShimPid: uint32(os.Getpid()), Version: "v3"}
	if r.ID == "" {
		return out, nil
	}
	c, err := s.container(r.ID)
	if err != nil {
		return nil, err
	}
	out.TaskPid = uint32(c.init.pid())
	return out, nil
}

// shutdownTask ends the shim if it holds no container. containerd calls it after
// each container of a pod, and that it does not end then is no error. Where containers are
// only being created it ends if that fails: the caller may have given the creation up.
func (s *Service) shutdownTask(_ context.Context, r *wire.ShutdownRequest) (wire.Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.emptyLocked() && time.Now().After(s.mu.reserved) || r.Now:
		s.end()
	case len(s.mu.containers) == len(s.mu.creations):
		s.mu.asked = true
	}
	return &wire.Empty{}, nil
}

var errEnding = fmt.Errorf("shim is ending: %w", errdefs.ErrUnavailable)

// reserve keeps the shim for a container that is going to be created.
func (s *Service) reserve(context.Context, *wire.Empty) (wire.Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.shutdown:
		return nil, errEnding
	default:
		s.mu.reserved = time.Now().Add(reservation)
		return &wire.Empty{}, nil
	}
}
