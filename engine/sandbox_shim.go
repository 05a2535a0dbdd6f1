package engine

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
)

// All containers of a pod share one shim, and the engine's one connection to it.

// memberShim is a pod's shim in the hands of one of its containers, which must neither end
// it nor close its connection.
type memberShim struct{ Shim }

// Shutdown tells whether the shim is there to do what it was asked.
func (m memberShim) Shutdown(context.Context) error {
	select {
	case <-m.Gone():
		return fmt.Errorf("the shim of the pod is gone: %w", errdefs.ErrUnavailable)
	default:
		return nil
	}
}

// Close leaves the connection to the pod.
func (memberShim) Close() error { return nil }

// hasShim tells whether a shim was there when it was last asked for.
func (s *sandbox) hasShim() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.shim != nil
}

// podShim gives the shim of a sandbox, started if there is none.
func (e *Engine) podShim(ctx context.Context, s *sandbox) (Shim, error) {
	return e.reachShim(ctx, s, true)
}

// reachShim gives the shim of a sandbox. One that is not there is started, or is ErrNotFound.
func (e *Engine) reachShim(ctx context.Context, s *sandbox, start bool) (Shim, error) {
	select {
	case s.starting <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-s.starting }()
	s.mu.Lock()
	shim := s.shim
	s.mu.Unlock()
	if shim != nil {
		select {
		case <-shim.Gone():
			shim.Close()
			s.mu.Lock()
			s.shim = nil
			s.mu.Unlock()
		default:
			return memberShim{shim}, nil
		}
	}
	shim, err := e.opt.Shims.Connect(ctx, e.sandboxDir(s.id))
	if errdefs.IsNotFound(err) && start {
		if err := s.requireReady("start a shim"); err != nil {
			return nil, err
		}
		if err := e.requireRuntime(s.rec.Config.Runtime); err != nil {
			return nil, err
		}
		shim, err = e.opt.Shims.Start(ctx, e.sandboxShim(s))
	}
	if err != nil {
		return nil, fmt.Errorf("shim of sandbox %s: %w", s.id, err)
	}
	s.mu.Lock()
	s.shim = shim
	s.mu.Unlock()
	return memberShim{shim}, nil
}

// connect finds the shim of a container again.
func (e *Engine) connect(ctx context.Context, v Container) (Shim, error) {
	if p := v.Config.Pod; p != nil {
		s, err := e.pods.get(p.Sandbox)
		if err != nil {
			// The pod is gone: whoever serves the bundle does it for this container alone.
			return e.opt.Shims.Connect(ctx, e.bundle(v.ID))
		}
		return e.reachShim(ctx, s, false)
	}
	return e.opt.Shims.Connect(ctx, e.bundle(v.ID))
}
