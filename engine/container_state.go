package engine

import (
	"fmt"
	"slices"
	"time"
)

// The state machine of a container.
//
//	             create
//	               │
//	               ▼
//	            created ──────────────────────────────────────┐
//	               │ start                                    │
//	               ▼           pause                          │
//	   ┌──────► running ─────────────► paused                 │
//	   │         │   ▲ ◄───────────────  │                    │
//	   │    exit │   │     unpause       │ exit               │
//	   │         ├───┼───────────────────┤                    │
//	   │  policy │   │ start             │                    │
//	   │         ▼   │                   ▼                    ▼
//	restarting ──┴──────► exited ◄───────┴──────────────► removing ──► (gone)
//	      stop or policy done                 remove          │
//	                                                          ▼ remove failed
//	                                                         dead ──► removing
//
// A start that fails leaves the state as it was, with State.Error set. What the
// kernel knows (pid, freezer) is asked from the shim; the state kept here is what
// the engine has handled.
var transitions = map[Status][]Status{
	StatusCreated:    {StatusRunning, StatusExited, StatusRemoving},
	StatusRunning:    {StatusPaused, StatusExited, StatusRestarting},
	StatusPaused:     {StatusRunning, StatusExited, StatusRestarting},
	StatusRestarting: {StatusRunning, StatusExited},
	StatusExited:     {StatusRunning, StatusRemoving},
	StatusRemoving:   {StatusDead},
	StatusDead:       {StatusRemoving},
}

// change moves the container to another state and runs the effect, or refuses.
// It is the only function that sets State.Status.
func (c *container) change(to Status, effect func(*State)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changeLocked(to, effect)
}

func (c *container) changeLocked(to Status, effect func(*State)) error {
	from := c.rec.State.Status
	if !slices.Contains(transitions[from], to) {
		return conflictf("container %s cannot go from %s to %s", c.id, from, to)
	}
	c.rec.State.Status = to
	if effect != nil {
		effect(&c.rec.State)
	}
	return nil
}

// require asks whether an operation is possible in the present state. It is the
// only function that refuses one because of the state. Its texts are Docker's.
func (c *container) require(op string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.requireLocked(op)
}

func (c *container) requireLocked(op string) error {
	s := c.rec.State.Status
	live := s == StatusRunning || s == StatusPaused || s == StatusRestarting
	switch op {
	case "start":
		switch s {
		case StatusPaused:
			return conflictf("cannot start a paused container, try unpause instead")
		case StatusRunning:
			return notModifiedf("container %s is already running", c.id)
		case StatusRemoving, StatusDead:
			return conflictf("container is marked for removal and cannot be started")
		}
		if c.removing {
			return conflictf("container is marked for removal and cannot be started")
		}
		if p := c.rec.Config.Pod; p != nil && s == StatusExited {
			return conflictf("container %s belongs to a pod (sandbox %s): it runs once, and Kubernetes makes another one", c.rec.Name, shortID(p.Sandbox))
		}
	case "restart":
		if p := c.rec.Config.Pod; p != nil {
			return conflictf("container %s belongs to a pod (sandbox %s): Kubernetes restarts it, by making another one", c.rec.Name, shortID(p.Sandbox))
		}
	case "stop":
		if !live {
			return notModifiedf("container %s is already stopped", c.id)
		}
	case "kill":
		if s != StatusRunning && s != StatusPaused {
			return conflictf("cannot kill container: %s: container %s is not running", c.rec.Name, c.id)
		}
	case "pause":
		switch {
		case s == StatusPaused:
			return conflictf("Container %s is already paused", c.id)
		case s == StatusRestarting:
			return conflictf("Container %s is restarting, wait until the container is running", c.id)
		case s != StatusRunning:
			return conflictf("Container %s is not running", c.id)
		}
	case "unpause":
		if s != StatusPaused {
			return conflictf("Container %s is not paused", c.id)
		}
	case "exec":
		switch {
		case s == StatusPaused:
			return conflictf("Container %s is paused, unpause the container before exec", c.id)
		case s == StatusRestarting:
			return conflictf("Container %s is restarting, wait until the container is running", c.id)
		case s != StatusRunning:
			return conflictf("container %s is not running", c.id)
		}
	case "use": // top, resize, network connect to a live namespace
		if s == StatusRestarting {
			return conflictf("Container %s is restarting, wait until the container is running", c.id)
		}
		if s != StatusRunning && s != StatusPaused {
			return conflictf("container %s is not running", c.id)
		}
	case "remove":
		switch s {
		case StatusPaused:
			return conflictf("cannot remove container %q: container is paused and must be unpaused first", c.rec.Name)
		case StatusRunning:
			return conflictf("cannot remove container %q: container is running: stop the container before removing or force remove", c.rec.Name)
		case StatusRestarting:
			return conflictf("cannot remove container %q: container is restarting: stop the container before removing or force remove", c.rec.Name)
		}
	case "change": // rename, update
		if c.removing || s == StatusRemoving || s == StatusDead {
			return conflictf("Container is marked for removal and cannot be \"update\".")
		}
	default:
		panic(fmt.Sprintf("engine: state asked for unknown operation %q", op))
	}
	return nil
}

// live tells whether a process of the container exists.
func (s State) live() bool {
	return s.Status == StatusRunning || s.Status == StatusPaused
}

// runDuration is how long the last run took.
func (s State) runDuration() time.Duration {
	if s.StartedAt.IsZero() || s.FinishedAt.Before(s.StartedAt) {
		return 0
	}
	return s.FinishedAt.Sub(s.StartedAt)
}
