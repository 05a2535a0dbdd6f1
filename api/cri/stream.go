package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hako-engine/hako/api/cri/streaming"
	"github.com/hako-engine/hako/engine"
)

// Exec, Attach and PortForward check what is asked for and give a URL; the streams
// themselves are the streaming server's.

func (s *runtimeService) Exec(ctx context.Context, r *api.ExecRequest) (*api.ExecResponse, error) {
	if s.opt.Streams == nil {
		return s.UnimplementedRuntimeServiceServer.Exec(ctx, r)
	}
	v, err := s.runningMember(ctx, r.GetContainerId(), "execute a command")
	if err != nil {
		return nil, err
	}
	url, err := s.opt.Streams.Exec(streaming.RemoteOptions{ContainerID: v.ID, Cmd: r.GetCmd(),
		Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(), TTY: r.GetTty()})
	if err != nil {
		return nil, err
	}
	return &api.ExecResponse{Url: url}, nil
}

func (s *runtimeService) Attach(ctx context.Context, r *api.AttachRequest) (*api.AttachResponse, error) {
	if s.opt.Streams == nil {
		return s.UnimplementedRuntimeServiceServer.Attach(ctx, r)
	}
	v, err := s.runningMember(ctx, r.GetContainerId(), "attach")
	if err != nil {
		return nil, err
	}
	url, err := s.opt.Streams.Attach(streaming.RemoteOptions{ContainerID: v.ID,
		Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(), TTY: r.GetTty()})
	if err != nil {
		return nil, err
	}
	return &api.AttachResponse{Url: url}, nil
}

func (s *runtimeService) PortForward(ctx context.Context, r *api.PortForwardRequest) (*api.PortForwardResponse, error) {
	if s.opt.Streams == nil {
		return s.UnimplementedRuntimeServiceServer.PortForward(ctx, r)
	}
	sb, err := s.opt.Backend.Sandbox(ctx, r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if sb.State != engine.SandboxReady {
		return nil, failedf("pod sandbox %s is not ready: cannot forward ports", sb.ID)
	}
	url, err := s.opt.Streams.PortForward(sb.ID, r.GetPort())
	if err != nil {
		return nil, err
	}
	return &api.PortForwardResponse{Url: url}, nil
}

// runningMember finds a container that runs.
func (s *Server) runningMember(ctx context.Context, ref, to string) (engine.Container, error) {
	v, err := s.member(ctx, ref)
	if err != nil {
		return v, err
	}
	if v.State.Status != engine.StatusRunning {
		return v, failedf("container %s is %s: cannot %s", v.ID, v.State.Status, to)
	}
	return v, nil
}

// PodNetwork gives the network namespace of a pod to a streaming server.
func PodNetwork(b Sandboxes) func(ctx context.Context, sandboxID string) (path string, err error) {
	return func(ctx context.Context, sandboxID string) (string, error) {
		sb, err := b.Sandbox(ctx, sandboxID)
		if err != nil {
			return "", err
		}
		if sb.State != engine.SandboxReady {
			return "", fmt.Errorf("pod sandbox %s is not ready: %w", sb.ID, errdefs.ErrFailedPrecondition)
		}
		return sb.NetNS, nil
	}
}
