package containerd

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strings"

	api "github.com/containerd/containerd/api/services/mounts/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/hako-engine/hako/engine"
)

type mountService struct {
	api.UnimplementedMountsServer
	*Server
}

func (s *mountService) Activate(ctx context.Context, req *api.ActivateRequest) (*api.ActivateResponse, error) {
	opts := []mount.ActivateOpt{mount.WithLabels(req.GetLabels())}
	if req.GetTemporary() {
		opts = append(opts, mount.WithTemporary)
	}
	info, err := s.opt.Mounts.Activate(ctx, req.GetName(), toMounts(req.GetMounts()), opts...)
	if err != nil {
		return nil, err
	}
	return &api.ActivateResponse{Info: activationOf(info)}, nil
}

func (s *mountService) Deactivate(ctx context.Context, req *api.DeactivateRequest) (*emptypb.Empty, error) {
	if err := s.opt.Mounts.Deactivate(ctx, req.GetName()); err != nil {
		return nil, err
	}
	return empty(), nil
}

func (s *mountService) Info(ctx context.Context, req *api.InfoRequest) (*api.InfoResponse, error) {
	info, err := s.opt.Mounts.Info(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	return &api.InfoResponse{Info: activationOf(info)}, nil
}

func (s *mountService) Update(ctx context.Context, req *api.UpdateRequest) (*api.UpdateResponse, error) {
	in := mount.ActivationInfo{Name: req.GetInfo().GetName(), Labels: req.GetInfo().GetLabels()}
	info, err := s.opt.Mounts.Update(ctx, in, req.GetUpdateMask().GetPaths()...)
	if err != nil {
		return nil, err
	}
	return &api.UpdateResponse{Info: activationOf(info)}, nil
}

func (s *mountService) List(req *api.ListRequest, out api.Mounts_ListServer) error {
	list, err := s.opt.Mounts.List(out.Context(), req.GetFilters()...)
	if err != nil {
		return err
	}
	for _, info := range list {
		if err := out.Send(&api.ListMessage{Info: activationOf(info)}); err != nil {
			return err
		}
	}
	return nil
}

func activationOf(i mount.ActivationInfo) *types.ActivationInfo {
	out := &types.ActivationInfo{Name: i.Name, System: mountsOf(i.System), Labels: i.Labels}
	for _, a := range i.Active {
		am := &types.ActiveMount{Mount: mountsOf([]mount.Mount{a.Mount})[0], MountPoint: a.MountPoint, Data: a.MountData}
		if a.MountedAt != nil {
			am.MountedAt = stampOf(*a.MountedAt)
		}
		out.Active = append(out.Active, am)
	}
	return out
}

// needActivation tells whether not every system can make these mounts.
func needActivation(ms []mount.Mount) bool {
	return slices.ContainsFunc(ms, func(m mount.Mount) bool { return m.Type == "loop" || strings.Contains(m.Type, "/") })
}

// made gives mounts as the kernel knows them, for one call: what has to be made before is there until drop.
func (s *Server) made(ctx context.Context, ms []mount.Mount) (_ []mount.Mount, drop func(), err error) {
	if s.opt.Mounts == nil || !needActivation(ms) {
		return ms, func() {}, nil
	}
	name := "diff-" + rand.Text()
	info, err := s.opt.Mounts.Activate(ctx, name, ms)
	if err != nil {
		return nil, nil, err
	}
	return info.System, func() { s.deactivateFor(context.WithoutCancel(ctx), name) }, nil
}

// activateFor makes those of a task's mounts that its shim could not (own tells what it can), and gives what is left. undo
// takes them back.
func (s *Server) activateFor(ctx context.Context, id string, ms []mount.Mount, own func() engine.MountAbilities) (_ []mount.Mount, undo func(), err error) {
	undo = func() {}
	if !needActivation(ms) {
		return ms, undo, nil
	}
	able := own()
	opts := []mount.ActivateOpt{
		// They stay as long as the container does, whatever lease the client has.
		mount.WithLabels(map[string]string{"containerd.io/gc.bref.container": id}),
		func(o *mount.ActivateOptions) { o.AllowMountTypes, o.AllowTransforms = able.Types, able.Transforms },
	}
	info, err := s.opt.Mounts.Activate(ctx, id, ms, opts...)
	if errdefs.IsAlreadyExists(err) {
		if _, terr := s.opt.Backend.Task(ctx, id, ""); errdefs.IsNotFound(terr) { // what an earlier task left, whose shim died
			s.deactivateFor(ctx, id)
			info, err = s.opt.Mounts.Activate(ctx, id, ms, opts...)
		}
	}
	switch {
	case errdefs.IsNotImplemented(err):
		return ms, undo, nil
	case err != nil:
		return nil, undo, fmt.Errorf("root file system of task %s: %w", id, err)
	}
	return info.System, func() { s.deactivateFor(context.WithoutCancel(ctx), id) }, nil
}

// deactivateFor is for when a task is gone, or a call is over.
func (s *Server) deactivateFor(ctx context.Context, id string) {
	if s.opt.Mounts == nil {
		return
	}
	if err := s.opt.Mounts.Deactivate(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		s.log.Warn("mounts stay", "for", id, "error", err)
	}
}
