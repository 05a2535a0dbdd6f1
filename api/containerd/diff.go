package containerd

import (
	"context"
	"fmt"

	api "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
)

type diffService struct {
	api.UnimplementedDiffServer
	*Server
}

func (s *diffService) Apply(ctx context.Context, req *api.ApplyRequest) (*api.ApplyResponse, error) {
	if s.opt.Differ == nil {
		return nil, errNoDiffer
	}
	if _, err := toDigest(req.GetDiff().GetDigest()); err != nil {
		return nil, err
	}
	payloads := map[string]typeurl.Any{}
	for k, v := range req.GetPayloads() {
		payloads[k] = v
	}
	mounts, drop, err := s.made(ctx, toMounts(req.GetMounts()))
	if err != nil {
		return nil, err
	}
	defer drop()
	d, err := s.opt.Differ.Apply(ctx, toDescriptor(req.GetDiff()), mounts, diff.WithPayloads(payloads), diff.WithSyncFs(req.GetSyncFs()))
	if err != nil {
		return nil, err
	}
	return &api.ApplyResponse{Applied: descriptorOf(d)}, nil
}

func (s *diffService) Diff(ctx context.Context, req *api.DiffRequest) (*api.DiffResponse, error) {
	if s.opt.Differ == nil {
		return nil, errNoDiffer
	}
	opts := []diff.Opt{diff.WithMediaType(req.GetMediaType()), diff.WithReference(req.GetRef()), diff.WithLabels(req.GetLabels())}
	if t := req.GetSourceDateEpoch(); t != nil {
		at := t.AsTime()
		opts = append(opts, diff.WithSourceDateEpoch(&at))
	}
	left, drop, err := s.made(ctx, toMounts(req.GetLeft()))
	if err != nil {
		return nil, err
	}
	defer drop()
	right, dropRight, err := s.made(ctx, toMounts(req.GetRight()))
	if err != nil {
		return nil, err
	}
	defer dropRight()
	d, err := s.opt.Differ.Compare(ctx, left, right, opts...)
	if err != nil {
		return nil, err
	}
	return &api.DiffResponse{Diff: descriptorOf(d)}, nil
}

var errNoDiffer = fmt.Errorf("no differ: %w", errdefs.ErrNotImplemented)
