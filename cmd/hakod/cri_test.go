package main

import (
	"context"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/engine"
)

// TestPodNetns: a pod without a namespace is the host only if it was asked to be.
func TestPodNetns(t *testing.T) {
	t.Parallel()
	pods := map[string]engine.Sandbox{
		"pod":     {State: engine.SandboxReady, NetNS: "/ns", Config: engine.SandboxConfig{Network: engine.NamespacePod}},
		"host":    {State: engine.SandboxReady, Config: engine.SandboxConfig{Network: engine.NamespaceNode}},
		"none":    {State: engine.SandboxReady, Config: engine.SandboxConfig{Network: engine.NamespacePod}},
		"stopped": {State: engine.SandboxNotReady, Config: engine.SandboxConfig{Network: engine.NamespacePod}},
		"ending":  {State: engine.SandboxStopping, NetNS: "/ns", Config: engine.SandboxConfig{Network: engine.NamespacePod}},
	}
	find := podNetns(func(_ context.Context, id string) (engine.Sandbox, error) {
		s, ok := pods[id]
		if !ok {
			return s, errdefs.ErrNotFound
		}
		return s, nil
	})
	for id, want := range map[string]string{"pod": "/ns", "host": ""} {
		if got, err := find(t.Context(), id); got != want || err != nil {
			t.Errorf("%s: %q, %v", id, got, err)
		}
	}
	for _, id := range []string{"none", "stopped", "ending"} {
		if got, err := find(t.Context(), id); got != "" || !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %q, %v", id, got, err)
		}
	}
	if _, err := find(t.Context(), "unknown"); !errdefs.IsNotFound(err) {
		t.Errorf("unknown: %v", err)
	}
}
