package cri

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hako-engine/hako/api/cri/streaming"
	"github.com/hako-engine/hako/engine"
)

// maxOutput is what an answer of ExecSync holds of both streams together, in bytes: less
// than a message may, so that it can always be sent.
const maxOutput = maxMessage - 4<<10

func (s *runtimeService) ExecSync(ctx context.Context, r *api.ExecSyncRequest) (*api.ExecSyncResponse, error) {
	v, err := s.member(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	if len(r.GetCmd()) == 0 {
		return nil, invalidf("no command to run in container %s", v.ID)
	}
	if r.GetTimeout() < 0 {
		return nil, invalidf("timeout %d is negative", r.GetTimeout())
	}
	out, err := s.opt.Backend.ExecSync(ctx, v.ID, r.GetCmd(), duration(r.GetTimeout()), maxOutput)
	if err != nil {
		return nil, err
	}
	return &api.ExecSyncResponse{Stdout: out.Stdout, Stderr: out.Stderr, ExitCode: int32(out.ExitCode)}, nil
}

// duration turns seconds into the nearest duration that there is.
func duration(seconds int64) time.Duration {
	return time.Duration(min(seconds, int64(time.Duration(1<<63-1)/time.Second))) * time.Second
}

func (s *runtimeService) Exec(ctx context.Context, r *api.ExecRequest) (*api.ExecResponse, error) {
	v, err := s.running(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	url, err := s.opt.Streams.Exec(streaming.RemoteOptions{
		ContainerID: v.ID, Cmd: r.GetCmd(), Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(), TTY: r.GetTty(),
	})
	if err != nil {
		return nil, err
	}
	return &api.ExecResponse{Url: url}, nil
}

func (s *runtimeService) Attach(ctx context.Context, r *api.AttachRequest) (*api.AttachResponse, error) {
	v, err := s.running(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	url, err := s.opt.Streams.Attach(streaming.RemoteOptions{
		ContainerID: v.ID, Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(), TTY: r.GetTty(),
	})
	if err != nil {
		return nil, err
	}
	return &api.AttachResponse{Url: url}, nil
}

func (s *runtimeService) PortForward(ctx context.Context, r *api.PortForwardRequest) (*api.PortForwardResponse, error) {
	v, err := s.opt.Backend.Sandbox(ctx, r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if v.State != engine.SandboxReady {
		return nil, fmt.Errorf("forward ports of pod sandbox %s, which is not ready: %w", v.ID, errdefs.ErrFailedPrecondition)
	}
	url, err := s.opt.Streams.PortForward(v.ID, r.GetPort())
	if err != nil {
		return nil, err
	}
	return &api.PortForwardResponse{Url: url}, nil
}

// running gives a container of a pod that runs.
func (s *runtimeService) running(ctx context.Context, id string) (engine.Container, error) {
	v, err := s.member(ctx, id)
	if err == nil && v.State.Status != engine.StatusRunning {
		err = fmt.Errorf("container %s is not running: %w", v.ID, errdefs.ErrFailedPrecondition)
	}
	return v, err
}
