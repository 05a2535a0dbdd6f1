package shim

import (
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/shim/wire"
)

// phase is where a process is in its life:
//
//	created ──► starting ──► running ──► stopped ──► deleting
//	   │            └─────── (failed) ──────▲
//	   └── (killed before the start) ───────┘
//
// A container's first process is created when Create returns, an added one when it
// is added. Only move and ended change it; a paused container's process is running.
type phase int

const (
	created phase = iota
	starting
	running
	stopped
	deleting
)

func (p phase) String() string {
	return [...]string{"created", "starting", "running", "stopped", "deleting"}[p]
}

// process is a container's first process (execID "") or one that was added.
type process struct {
	c       *container
	execID  string
	io      ioRequest
	streams *streams
	spec    *specs.Process // of an added one

	stopped chan struct{} // closed when the exit is known, written down, and may be told

	mu struct {
		sync.Mutex
		phase phase
		pid   int
		child *child // nil: it never ran
		// gate is closed when the start under way is over; an exit waits for it, so that
		// it is told after the start.
		gate chan struct{}
		exit Exit
	}
}

func (p *process) String() string {
	if p.execID == "" {
		return "container " + p.c.id
	}
	return "process " + p.execID + " of container " + p.c.id
}

// move goes from one phase to another, or says that it may not.
func (p *process) move(from, to phase) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.phase != from {
		return fmt.Errorf("%s is %s, not %s: %w", p, p.mu.phase, from, errdefs.ErrFailedPrecondition)
	}
	p.mu.phase = to
	if to == starting {
		p.mu.gate = make(chan struct{})
	}
	return nil
}

// startOver opens the gate after a start: ok, or back to where it was. One that was killed before
// the start has ended meanwhile, and stays so.
func (p *process) startOver(to phase) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.phase == starting {
		p.mu.phase = to
	}
	close(p.mu.gate)
	p.mu.gate = nil
}

// ended makes the exit known to everybody who asks. The event is queued before anybody can ask
// for the process to be deleted, so that the events have their order.
func (p *process) ended(e Exit, publish func()) {
	p.mu.Lock()
	p.mu.phase, p.mu.exit = stopped, e
	publish()
	p.mu.Unlock()
	close(p.stopped)
}

func (p *process) pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mu.pid
}

func (p *process) state() *wire.StateResponse {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := &wire.StateResponse{
		ID: p.c.id, ExecID: p.execID, Bundle: p.c.bundle, Pid: uint32(p.mu.pid),
		Stdin: p.io.stdin, Stdout: p.io.stdout, Stderr: p.io.stderr, Terminal: p.io.terminal,
	}
	switch p.mu.phase {
	case created, starting:
		r.Status = wire.StatusCreated
	case running:
		r.Status = wire.StatusRunning
		if p.execID == "" && p.c.paused.Load() {
			r.Status = wire.StatusPaused
		}
	default:
		r.Status = wire.StatusStopped
		if p.execID != "" && p.mu.child == nil { // it never ran, and is as it was made
			r.Status = wire.StatusCreated
		}
		r.ExitStatus, r.ExitedAt, r.OOMKilled = p.mu.exit.Status, p.mu.exit.ExitedAt, p.mu.exit.OOMKilled
	}
	return r
}

// supervise waits for the end of a process and makes it known: the output first,
// then the exit file, then the event and whoever asks, then the attached clients.
func (s *Service) supervise(p *process, ch *child) {
	s.reaper.await(ch)
	p.mu.Lock()
	gate := p.mu.gate
	p.mu.Unlock()
	if gate != nil {
		<-gate
	}
	e := Exit{Version: fileVersion, Pid: ch.pid, Status: ch.status, ExitedAt: ch.at}
	if p.execID == "" {
		if p.c.ownPIDs {
			// They have all been killed with it; their ends are told first.
			p.c.awaitExecs()
		} else {
			// Nobody else ends those that it left behind.
			s.killRest(p.c)
		}
		if ch.signal {
			e.OOMKilled = s.oomKilled(p.c)
		}
	}
	p.streams.drain()
	if p.streams.log != nil {
		if n := p.streams.log.Dropped(); n > 0 {
			s.log.Warn("log records dropped", "process", p.String(), "count", n)
		}
	}
	if p.execID == "" {
		if err := p.c.writeExit(e); err != nil {
			s.log.Error("write exit file", "container", p.c.id, "error", err)
		}
	}
	s.ended(p, e)
	s.busy()
}

// ended tells everybody of the end of a process.
func (s *Service) ended(p *process, e Exit) {
	id := p.execID
	if id == "" {
		id = p.c.id
	}
	p.ended(e, func() {
		s.events.publish(topicExit, "TaskExit", &wire.TaskExit{
			ContainerID: p.c.id, ID: id, Pid: uint32(e.Pid), ExitStatus: e.Status, ExitedAt: e.ExitedAt,
		})
	})
	p.streams.end()
}

// never ends a process that was not started (status 0), or could not be. Nobody is told of what never was.
func (p *process) never(status uint32) {
	p.ended(Exit{Version: fileVersion, Status: status, ExitedAt: time.Now().UTC()}, func() {})
	p.streams.end()
}

// startChild starts a helper of our own.
func (s *Service) startChild(path string, argv []string, attr *os.ProcAttr) (*child, error) {
	s.reaper.calls.RLock()
	defer s.reaper.calls.RUnlock()
	proc, err := os.StartProcess(path, argv, attr)
	if err != nil {
		return nil, err
	}
	ch, err := s.reaper.watch(proc.Pid)
	proc.Release()
	if err != nil {
		return nil, err
	}
	go s.reaper.await(ch)
	return ch, nil
}
