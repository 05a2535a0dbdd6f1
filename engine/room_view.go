package engine

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/containerd/api/types"
	boxes "github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/store"
)

// SandboxStore are the records of sandboxes: clients' own, and in the namespace that all share those of pods.
func (e *Engine) SandboxStore() boxes.Store { return &sandboxView{e.opt.SandboxRecords, e} }

type sandboxView struct {
	boxes.Store
	e *Engine
}

// pod is the sandbox of a pod that a request means; nil: none.
func (r *sandboxView) pod(ctx context.Context, id string) *Sandbox {
	if isShared(ctx) {
		if s := r.e.pods.exact(id); s != nil {
			v := s.view()
			return &v
		}
	}
	return nil
}

// podRecord is a pod's sandbox in containerd's terms.
func podRecord(s Sandbox) boxes.Sandbox {
	c := sandboxContainer(s)
	return boxes.Sandbox{
		ID: c.ID, Labels: c.Labels, Runtime: boxes.RuntimeOpts{Name: c.Runtime.Name}, Spec: c.Spec, Sandboxer: SandboxerPods, CreatedAt: c.CreatedAt, UpdatedAt: c.UpdatedAt,
	}
}

func (r *sandboxView) Get(ctx context.Context, id string) (boxes.Sandbox, error) {
	if p := r.pod(ctx, id); p != nil {
		return podRecord(*p), nil
	}
	return r.Store.Get(ctx, id)
}

func (r *sandboxView) List(ctx context.Context, fs ...string) ([]boxes.Sandbox, error) {
	return listBeside(ctx, fs, r.Store.List, store.AdaptSandbox, func(add func(boxes.Sandbox)) {
		for _, s := range r.e.pods.all() {
			add(podRecord(s.view()))
		}
	})
}

func (r *sandboxView) Create(ctx context.Context, b boxes.Sandbox) (boxes.Sandbox, error) {
	if r.pod(ctx, b.ID) != nil {
		return boxes.Sandbox{}, fmt.Errorf("sandbox %q: %w", b.ID, errdefs.ErrAlreadyExists)
	}
	return r.Store.Create(ctx, b)
}

func (r *sandboxView) Update(ctx context.Context, b boxes.Sandbox, fieldpaths ...string) (boxes.Sandbox, error) {
	if r.pod(ctx, b.ID) != nil {
		return boxes.Sandbox{}, failedf("sandbox %q is a pod's, and is changed through the CRI", b.ID)
	}
	return r.Store.Update(ctx, b, fieldpaths...)
}

func (r *sandboxView) Delete(ctx context.Context, id string) error {
	if p := r.pod(ctx, id); p != nil {
		if p.State == SandboxReady {
			return failedf("sandbox %q is ready: its pod has to be stopped first", id)
		}
		return r.e.RemoveSandbox(ctx, id)
	}
	return r.Store.Delete(ctx, id)
}

// podController lets containerd's clients ask for what the CRI looks after.
type podController Engine

func (r *podController) pod(ctx context.Context, id string) (Sandbox, error) {
	if isShared(ctx) {
		if s := (*Engine)(r).pods.exact(id); s != nil {
			return s.view(), nil
		}
	}
	return Sandbox{}, fmt.Errorf("sandbox %s: %w", id, errdefs.ErrNotFound)
}

func (r *podController) Create(context.Context, boxes.Sandbox, ...boxes.CreateOpt) error {
	return notImplementedf("pods' sandboxes are made through the CRI")
}

func (r *podController) Start(context.Context, string) (boxes.ControllerInstance, error) {
	return boxes.ControllerInstance{}, notImplementedf("pods' sandboxes are started through the CRI")
}

func (r *podController) Platform(context.Context, string) (ocispec.Platform, error) {
	return platforms.DefaultSpec(), nil
}

func (r *podController) Stop(ctx context.Context, id string, _ ...boxes.StopOpt) error {
	if _, err := r.pod(ctx, id); err != nil {
		return err
	}
	return (*Engine)(r).StopSandbox(ctx, id)
}

func (r *podController) Wait(ctx context.Context, id string) (boxes.ExitStatus, error) {
	for {
		s, err := r.pod(ctx, id)
		if err != nil || s.State != SandboxReady {
			return boxes.ExitStatus{ExitedAt: time.Now().UTC()}, nil
		}
		select {
		case <-time.After(restartFirst):
		case <-ctx.Done():
			return boxes.ExitStatus{}, context.Cause(ctx)
		case <-r.stopping:
			return boxes.ExitStatus{}, errClosed
		}
	}
}

func (r *podController) Status(ctx context.Context, id string, _ bool) (boxes.ControllerStatus, error) {
	s, err := r.pod(ctx, id)
	if err != nil {
		return boxes.ControllerStatus{}, err
	}
	out := boxes.ControllerStatus{SandboxID: id, Pid: uint32(s.Pid), State: "SANDBOX_NOTREADY", CreatedAt: s.Created}
	if s.State == SandboxReady {
		out.State = "SANDBOX_READY"
	}
	return out, nil
}

func (r *podController) Shutdown(ctx context.Context, id string) error {
	if _, err := r.pod(ctx, id); err != nil {
		return nil
	}
	err := (*Engine)(r).StopSandbox(ctx, id)
	if err == nil {
		err = (*Engine)(r).RemoveSandbox(ctx, id)
	}
	if errdefs.IsNotFound(err) { // somebody else has removed it
		return nil
	}
	return err
}

func (r *podController) Metrics(context.Context, string) (*types.Metric, error) {
	return nil, notImplementedf("pods are measured through the CRI")
}

func (r *podController) Update(context.Context, string, boxes.Sandbox, ...string) error {
	return notImplementedf("pods' sandboxes are changed through the CRI")
}
