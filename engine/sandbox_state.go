package engine

import (
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
)

// SandboxState is where a sandbox is in its life:
//
//	 run                stop                     remove
//	  │                   ▲ failed                 ▲ failed
//	  ▼        stop       │                        │
//	ready ───────────► stopping ──► notready ──► removing ──► (gone)
//	                                  ▲   ▲        │
//	              the machine booted ─┘   └────────┘
//
// Ready means that its namespaces exist and its network is up: the kernel's namespaces and
// the volatile folder say so, and a restarted daemon asks them.
type SandboxState string

// States of a sandbox.
const (
	SandboxReady    SandboxState = "ready"
	SandboxStopping SandboxState = "stopping"
	SandboxNotReady SandboxState = "notready"
	SandboxRemoving SandboxState = "removing"
)

var sandboxTransitions = map[SandboxState][]SandboxState{
	SandboxReady:    {SandboxStopping},
	SandboxStopping: {SandboxNotReady, SandboxReady},
	SandboxNotReady: {SandboxStopping, SandboxRemoving},
	SandboxRemoving: {SandboxNotReady},
}

// changeLocked is the only function that sets the state. The caller holds s.mu.
func (s *sandbox) changeLocked(to SandboxState) error {
	if !slices.Contains(sandboxTransitions[s.state], to) {
		return failedf("sandbox %s cannot go from %s to %s", s.id, s.state, to)
	}
	s.state = to
	return nil
}

func (s *sandbox) change(to SandboxState) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changeLocked(to)
}

// removed tells, to whoever holds the ticket, that somebody else has removed the sandbox.
func (s *sandbox) removed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state == SandboxRemoving
}

// requireReady is the only function that refuses an operation because of the state.
func (s *sandbox) requireReady(op string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requireReadyLocked(op)
}

func (s *sandbox) requireReadyLocked(op string) error {
	if s.state != SandboxReady {
		return failedf("cannot %s: sandbox %s is %s, not ready", op, s.id, s.state)
	}
	return nil
}

func failedf(format string, args ...any) error {
	return &classed{text: fmt.Sprintf(format, args...), class: errdefs.ErrFailedPrecondition}
}
