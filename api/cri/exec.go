package cri

import (
	"context"
	"time"

	api "k8s.io/cri-api/pkg/apis/runtime/v1"
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
	timeout := time.Duration(min(r.GetTimeout(), int64(time.Duration(1<<63-1)/time.Second))) * time.Second
	out, err := s.opt.Backend.ExecSync(ctx, v.ID, r.GetCmd(), timeout, maxOutput)
	if err != nil {
		return nil, err
	}
	return &api.ExecSyncResponse{Stdout: out.Stdout, Stderr: out.Stderr, ExitCode: int32(out.ExitCode)}, nil
}
