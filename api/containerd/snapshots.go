package containerd

import (
	"context"
	"maps"
	"slices"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"
)

// batch is how many records one message of a list holds.
const batch = 100

type snapshotService struct {
	api.UnimplementedSnapshotsServer
	*Server
}

// snapshotter finds one by its name.
func (s *Server) snapshotter(name string) (snapshots.Snapshotter, error) {
	if name == "" {
		return nil, invalidf("snapshotter argument missing")
	}
	sn, ok := s.opt.Snapshotters[name]
	if !ok {
		return nil, invalidf("snapshotter not loaded: %s (there are %v)", name, slices.Sorted(maps.Keys(s.opt.Snapshotters)))
	}
	return sn, nil
}

func (s *snapshotService) Prepare(ctx context.Context, req *api.PrepareSnapshotRequest) (*api.PrepareSnapshotResponse, error) {
	sn, err := s.snapshotter(req.GetSnapshotter())
	if err != nil {
		return nil, err
	}
	mounts, err := sn.Prepare(ctx, req.GetKey(), req.GetParent(), snapshots.WithLabels(req.GetLabels()))
	if err != nil {
		return nil, err
	}
	return &api.PrepareSnapshotResponse{Mounts: mountsOf(mounts)}, nil
}

func (s *snapshotService) View(ctx context.Context, req *api.ViewSnapshotRequest) (*api.ViewSnapshotResponse, error) {
	sn, err := s.snapshotter(req.GetSnapshotter())
	if err != nil {
		return nil, err
	}
	mounts, err := sn.View(ctx, req.GetKey(), req.GetParent(), snapshots.WithLabels(req.GetLabels()))
	if err != nil {
		return nil, err
	}
	return &api.ViewSnapshotResponse{Mounts: mountsOf(mounts)}, nil
}

func (s *snapshotService) Mounts(ctx context.Context, req *api.MountsRequest) (*api.MountsResponse, error) {
	sn, err := s.snapshotter(req.GetSnapshotter())
	if err != nil {
		return nil, err
	}
	mounts, err := sn.Mounts(ctx, req.GetKey())
	if err != nil {
		return nil, err
	}
	return &api.MountsResponse{Mounts: mountsOf(mounts)}, nil
}

func (s *snapshotService) Commit(ctx context.Context, req *api.CommitSnapshotRequest) (*emptypb.Empty, error) {
	sn, err := s.snapshotter(req.GetSnapshotter())
	if err != nil {
		return nil, err
	}
	opts := []snapshots.Opt{snapshots.WithLabels(req.GetLabels())}
	if req.GetParent() != "" {
		opts = append(opts, snapshots.WithParent(req.GetParent()))
	}
	if err := sn.Commit(ctx, req.GetName(), req.GetKey(), opts...); err != nil {
		return nil, err
	}
	return empty(), nil
}

func (s *snapshotService) Remove(ctx context.Context, req *api.RemoveSnapshotRequest) (*emptypb.Empty, error) {
	sn, err := s.snapshotter(req.GetSnapshotter())
	if err != nil {
		return nil, err
	}
	if err := sn.Remove(ctx, req.GetKey()); err != nil {
		return nil, err
	}
	return empty(), nil
}

func (s *snapshotService) Stat(ctx context.Context, req *api.StatSnapshotRequest) (*api.StatSnapshotResponse, error) {
	sn, err := s.snapshotter(req.GetSnapshotter())
	if err != nil {
		return nil, err
	}
	info, err := sn.Stat(ctx, req.GetKey())
	if err != nil {
		return nil, err
	}
	return &api.StatSnapshotResponse{Info: snapshotOf(info)}, nil
}

func (s *snapshotService) Update(ctx context.Context, req *api.UpdateSnapshotRequest) (*api.UpdateSnapshotResponse, error) {
	sn, err := s.snapshotter(req.GetSnapshotter())
	if err != nil {
		return nil, err
	}
	in := req.GetInfo()
	info, err := sn.Update(ctx, snapshots.Info{
		Name: in.GetName(), Parent: in.GetParent(), Labels: in.GetLabels(), Created: timeOf(in.GetCreatedAt()), Updated: timeOf(in.GetUpdatedAt()),
	}, req.GetUpdateMask().GetPaths()...)
	if err != nil {
		return nil, err
	}
	return &api.UpdateSnapshotResponse{Info: snapshotOf(info)}, nil
}

func (s *snapshotService) List(req *api.ListSnapshotsRequest, out api.Snapshots_ListServer) error {
	sn, err := s.snapshotter(req.GetSnapshotter())
	if err != nil {
		return err
	}
	var infos []*api.Info
	flush := func() error {
		if len(infos) == 0 {
			return nil
		}
		err := out.Send(&api.ListSnapshotsResponse{Info: infos})
		infos = nil
		return err
	}
	err = sn.Walk(out.Context(), func(_ context.Context, info snapshots.Info) error {
		if infos = append(infos, snapshotOf(info)); len(infos) < batch {
			return nil
		}
		return flush()
	}, req.GetFilters()...)
	if err != nil {
		return err
	}
	return flush()
}

func (s *snapshotService) Usage(ctx context.Context, req *api.UsageRequest) (*api.UsageResponse, error) {
	sn, err := s.snapshotter(req.GetSnapshotter())
	if err != nil {
		return nil, err
	}
	u, err := sn.Usage(ctx, req.GetKey())
	if err != nil {
		return nil, err
	}
	return &api.UsageResponse{Size: u.Size, Inodes: u.Inodes}, nil
}

func (s *snapshotService) Cleanup(ctx context.Context, req *api.CleanupRequest) (*emptypb.Empty, error) {
	sn, err := s.snapshotter(req.GetSnapshotter())
	if err != nil {
		return nil, err
	}
	c, ok := sn.(snapshots.Cleaner)
	if !ok {
		return nil, errdefs.ErrNotImplemented
	}
	if err := c.Cleanup(ctx); err != nil {
		return nil, err
	}
	return empty(), nil
}

func snapshotOf(i snapshots.Info) *api.Info {
	kind := map[snapshots.Kind]api.Kind{
		snapshots.KindView: api.Kind_VIEW, snapshots.KindActive: api.Kind_ACTIVE, snapshots.KindCommitted: api.Kind_COMMITTED,
	}[i.Kind]
	return &api.Info{
		Name: i.Name, Parent: i.Parent, Kind: kind, CreatedAt: stampOf(i.Created), UpdatedAt: stampOf(i.Updated), Labels: i.Labels,
	}
}
