package shim

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/shim/wire"
)

// box calls the sandbox service.
func (h *harness) box(method string, req, resp wire.Message) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	return h.rpc.Call(ctx, wire.ServiceSandbox, method, req, resp)
}

// sandbox makes the shim the sandbox "b".
func (h *harness) sandbox() {
	h.t.Helper()
	if err := errors.Join(h.box("CreateSandbox", &wire.CreateSandboxRequest{ID: "b"}, nil), h.box("StartSandbox", &wire.SandboxRequest{ID: "b"}, nil)); err != nil {
		h.t.Fatal(err)
	}
}

// TestSandboxShutdown: a sandbox that is told to go ends what is in it, and the shim stays until that was deleted.
func TestSandboxShutdown(t *testing.T) {
	h := newHarness(t)
	h.sandbox()
	if err := h.create("sleep 1000", wire.CreateTaskRequest{}); err != nil {
		t.Fatal(err)
	}
	h.start()
	waited := make(chan error, 1)
	go func() { waited <- h.box("WaitSandbox", &wire.SandboxRequest{ID: "b"}, &wire.WaitSandboxResponse{}) }()
	if err := h.box("ShutdownSandbox", &wire.SandboxRequest{ID: "b"}, nil); err != nil {
		t.Fatal(err)
	}
	// It may have come before or after.
	if err := <-waited; err != nil && !errdefs.IsNotFound(err) {
		t.Errorf("wait: %v", err)
	}
	if w := h.wait(""); w.ExitStatus != 137 {
		t.Errorf("exit %+v", w)
	}
	if err := h.create("true", wire.CreateTaskRequest{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another container: %v", err)
	}
	if err := h.box("CreateSandbox", &wire.CreateSandboxRequest{ID: "b"}, nil); !errdefs.IsUnavailable(err) {
		t.Errorf("another sandbox: %v", err)
	}
	if err := h.box("SandboxStatus", &wire.SandboxRequest{ID: "b"}, &wire.SandboxStatusResponse{}); !errdefs.IsNotFound(err) {
		t.Errorf("status: %v", err)
	}
	h.must("Delete", &wire.ProcessRequest{ID: "c"}, nil)
	h.rpc.Close() // with the last connection it goes, which the harness waits for
}

// TestStopMeetsCreation: a container that is being made when its sandbox is stopped ends with it.
func TestStopMeetsCreation(t *testing.T) {
	h := newHarness(t)
	h.rt.creating = make(chan struct{})
	h.sandbox()
	made := make(chan error, 1)
	go func() { made <- h.create("sleep 1000", wire.CreateTaskRequest{}) }()
	<-h.rt.creating
	down := make(chan error, 1)
	go func() { down <- h.box("StopSandbox", &wire.StopSandboxRequest{ID: "b"}, nil) }()
	if !eventually(func() bool {
		h.s.mu.Lock()
		defer h.s.mu.Unlock()
		return h.s.mu.sandbox.closed
	}) {
		t.Error("it is not closed while it stops")
	}
	select {
	case err := <-down:
		t.Errorf("it was stopped while a container was being made: %v", err)
	default:
	}
	<-h.rt.creating
	if err := errors.Join(<-made, <-down); err != nil {
		t.Fatal(err)
	}
	if w := h.wait(""); w.ExitStatus != 137 {
		t.Errorf("exit %+v", w)
	}
	if err := h.call("Create", &wire.CreateTaskRequest{ID: "d", Bundle: h.bundle}, nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another container: %v", err)
	}
	var st wire.SandboxStatusResponse
	if err := h.box("SandboxStatus", &wire.SandboxRequest{ID: "b"}, &st); err != nil || st.State != "SANDBOX_NOTREADY" {
		t.Errorf("%+v, %v", st, err)
	}
	h.must("Delete", &wire.ProcessRequest{ID: "c"}, nil)
	if err := h.box("ShutdownSandbox", &wire.SandboxRequest{ID: "b"}, nil); err != nil && !errdefs.IsUnavailable(err) {
		t.Error(err)
	}
}
