package docker

import (
	"context"
	"net/http"

	wire "github.com/moby/moby/api/types/volume"

	"github.com/hako-engine/hako/engine"
)

func volumeOf(v *engine.Volume) wire.Volume {
	return wire.Volume{
		Name: v.Name, Driver: v.Driver, Mountpoint: v.Mountpoint, Scope: "local",
		CreatedAt: timestamp(v.Created), Labels: dict(v.Labels), Options: v.Options,
	}
}

func (s *Server) volumeList(ctx context.Context, c *call) error {
	f, err := c.filters("dangling", "driver", "label", "name")
	if err != nil {
		return err
	}
	volumes, err := s.opt.Backend.Volumes(ctx, f)
	if err != nil {
		return err
	}
	out := wire.ListResponse{Volumes: make([]wire.Volume, 0, len(volumes))}
	for i := range volumes {
		out.Volumes = append(out.Volumes, volumeOf(&volumes[i]))
	}
	return c.json(http.StatusOK, out)
}

func (s *Server) volumeCreate(ctx context.Context, c *call) error {
	var req wire.CreateRequest
	if err := c.body(&req); err != nil {
		return err
	}
	if req.ClusterVolumeSpec != nil {
		return errNoSwarm
	}
	if req.Name != "" && !volumeName.MatchString(req.Name) {
		return invalidf("create %s: %q includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path", req.Name, req.Name)
	}
	v, err := s.opt.Backend.CreateVolume(ctx, engine.Volume{
		Name: req.Name, Driver: req.Driver, Options: req.DriverOpts, Labels: req.Labels, Anonymous: req.Name == "",
	})
	if err != nil {
		return err
	}
	return c.json(http.StatusCreated, volumeOf(&v))
}

func (s *Server) volumeInspect(ctx context.Context, c *call) error {
	v, err := s.opt.Backend.Volume(ctx, c.id())
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, volumeOf(&v))
}

func (s *Server) volumeRemove(ctx context.Context, c *call) error {
	if err := s.opt.Backend.RemoveVolume(ctx, c.id(), c.flag("force")); err != nil {
		return err
	}
	return c.empty(http.StatusNoContent)
}

func (s *Server) volumePrune(ctx context.Context, c *call) error {
	f, err := c.filters("all", "label", "label!")
	if err != nil {
		return err
	}
	if c.version.less(v1_42) {
		if f == nil {
			f = engine.Filters{}
		}
		f["all"] = []string{"true"} // old clients expect named volumes to go too
	}
	p, err := s.opt.Backend.PruneVolumes(ctx, f)
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, wire.PruneReport{VolumesDeleted: list(p.IDs), SpaceReclaimed: uint64(p.Reclaimed)})
}
