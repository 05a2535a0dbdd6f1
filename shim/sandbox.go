package shim

import (
	"context"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/shim/wire"
)

// A shim can be asked to be a sandbox (containerd's sandbox service): then it stays until it is told
// to go, also without containers. It has no process of its own: namespaces are its client's, which
// names them in the containers' configurations.
//
//	CreateSandbox ──► created ── StartSandbox ──► ready ── StopSandbox ──► stopped ── ShutdownSandbox ──► (gone)
//
// It takes no containers any more from the moment that it is asked to stop. Those that it has are there, ended, until
// their client deletes them: the shim stays that long after ShutdownSandbox.
type sandbox struct {
	id      string
	state   sandboxState
	created time.Time
	exited  time.Time
	closed  bool          // it takes no containers
	stopped chan struct{} // closed when it is stopped
}

type sandboxState int

const (
	sandboxCreated sandboxState = iota
	sandboxReady
	sandboxStopped
)

// String is the state in the words of the CRI, which are what clients look for.
func (s sandboxState) String() string {
	return [...]string{"SANDBOX_CREATED", "SANDBOX_READY", "SANDBOX_NOTREADY"}[s]
}

// stopLimit is how long a sandbox's containers may take to end when they are killed.
const stopLimit = 10 * time.Second

func (s *Service) sandboxService() map[string]wire.Handler {
	return map[string]wire.Handler{
		"CreateSandbox":   wire.Handle(s.createSandbox),
		"StartSandbox":    wire.Handle(s.startSandbox),
		"Platform":        wire.Handle(s.platform),
		"StopSandbox":     wire.Handle(s.stopSandbox),
		"WaitSandbox":     wire.Handle(s.waitSandbox),
		"SandboxStatus":   wire.Handle(s.sandboxStatus),
		"PingSandbox":     wire.Handle(s.pingSandbox),
		"ShutdownSandbox": wire.Handle(s.shutdownSandbox),
	}
}

// theSandboxLocked gives the sandbox that this shim is.
func (s *Service) theSandboxLocked(id string) (*sandbox, error) {
	if b := s.mu.sandbox; b != nil && b.id == id {
		return b, nil
	}
	return nil, fmt.Errorf("sandbox %s: %w", id, errdefs.ErrNotFound)
}

func (s *Service) createSandbox(_ context.Context, r *wire.CreateSandboxRequest) (wire.Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.shutdown:
		return nil, errEnding
	default:
	}
	if s.mu.over {
		return nil, errEnding
	}
	if r.ID == "" || len(r.Rootfs) > 0 {
		return nil, fmt.Errorf("create sandbox %q: an id is needed, and there can be no root file system, as there is no process: %w", r.ID, errdefs.ErrInvalidArgument)
	}
	if s.mu.sandbox != nil {
		return nil, fmt.Errorf("sandbox %s: %w", r.ID, errdefs.ErrAlreadyExists)
	}
	s.mu.sandbox = &sandbox{id: r.ID, created: time.Now().UTC(), stopped: make(chan struct{})}
	return &wire.Empty{}, nil
}

func (s *Service) startSandbox(_ context.Context, r *wire.SandboxRequest) (wire.Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, err := s.theSandboxLocked(r.ID)
	if err != nil {
		return nil, err
	}
	if b.state != sandboxCreated {
		return nil, fmt.Errorf("start sandbox %s: it is %s: %w", r.ID, b.state, errdefs.ErrFailedPrecondition)
	}
	b.state = sandboxReady
	return &wire.StartSandboxResponse{Pid: uint32(os.Getpid()), CreatedAt: b.created}, nil
}

func (s *Service) platform(context.Context, *wire.SandboxRequest) (wire.Message, error) {
	return &wire.PlatformResponse{Platform: &wire.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}}, nil
}

// stopSandbox asks the containers to end, if there is time for that, and kills them.
func (s *Service) stopSandbox(ctx context.Context, r *wire.StopSandboxRequest) (wire.Message, error) {
	s.mu.Lock()
	b, err := s.theSandboxLocked(r.ID)
	if err != nil {
		s.mu.Unlock()
		return nil, err
	}
	b.closed = true
	creations := slices.Collect(maps.Values(s.mu.creations))
	s.mu.Unlock()
	for _, c := range creations { // those that came first end, too
		select {
		case <-c:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	s.mu.Lock()
	var list []*container
	for _, c := range s.mu.containers {
		list = append(list, c)
	}
	s.mu.Unlock()
	end := func(sig unix.Signal, limit time.Duration) bool {
		for _, c := range list {
			if err := s.killInit(ctx, c, sig, sig == unix.SIGKILL); err != nil && !errdefs.IsNotFound(err) {
				s.log.Warn("stop a sandbox", "container", c.id, "error", err)
			}
		}
		over := time.After(limit)
		for _, c := range list {
			select {
			case <-c.init.stopped:
			case <-over:
				return false
			case <-ctx.Done():
				return false
			}
		}
		return true
	}
	if r.Timeout == 0 || !end(unix.SIGTERM, time.Duration(r.Timeout)*time.Second) {
		if !end(unix.SIGKILL, stopLimit) {
			return nil, fmt.Errorf("stop sandbox %s: a container does not end: %w", r.ID, errdefs.ErrUnavailable)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.state != sandboxStopped {
		b.state, b.exited = sandboxStopped, time.Now().UTC()
		close(b.stopped)
	}
	return &wire.Empty{}, nil
}

func (s *Service) waitSandbox(ctx context.Context, r *wire.SandboxRequest) (wire.Message, error) {
	s.mu.Lock()
	b, err := s.theSandboxLocked(r.ID)
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	select {
	case <-b.stopped:
		s.mu.Lock()
		defer s.mu.Unlock()
		return &wire.WaitSandboxResponse{ExitedAt: b.exited}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (s *Service) sandboxStatus(_ context.Context, r *wire.SandboxRequest) (wire.Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, err := s.theSandboxLocked(r.ID)
	if err != nil {
		return nil, err
	}
	return &wire.SandboxStatusResponse{ID: b.id, Pid: uint32(os.Getpid()), State: b.state.String(), CreatedAt: b.created, ExitedAt: b.exited}, nil
}

func (s *Service) pingSandbox(_ context.Context, r *wire.SandboxRequest) (wire.Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.theSandboxLocked(r.ID); err != nil {
		return nil, err
	}
	return &wire.Empty{}, nil
}

// shutdownSandbox stops the sandbox and ends the shim, at the latest when the last container was deleted.
func (s *Service) shutdownSandbox(ctx context.Context, r *wire.SandboxRequest) (wire.Message, error) {
	if _, err := s.stopSandbox(ctx, &wire.StopSandboxRequest{ID: r.ID}); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.sandbox, s.mu.over = nil, true
	if len(s.mu.containers) == 0 {
		s.end()
	} // else with the last connection, when they were deleted
	return &wire.Empty{}, nil
}
