package shim

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/shim/wire"
)

// checkpoint writes a container to files.
func (s *Service) checkpoint(ctx context.Context, r *wire.CheckpointTaskRequest) (wire.Message, error) {
	c, err := s.live(r.ID)
	if err != nil {
		return nil, err
	}
	var o wire.CheckpointOptions
	if r.Options != nil && r.Options.TypeURL == wire.CheckpointOptionsURL {
		if err := wire.Unmarshal(r.Options.Value, &o); err != nil {
			return nil, fmt.Errorf("decode options: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	images := r.Path
	if o.ImagePath != "" {
		images = o.ImagePath
	}
	if !filepath.IsAbs(images) || o.WorkPath != "" && !filepath.IsAbs(o.WorkPath) {
		return nil, fmt.Errorf("checkpoint container %s to %q: %w", r.ID, images, errdefs.ErrInvalidArgument)
	}
	s.reaper.calls.RLock()
	defer s.reaper.calls.RUnlock()
	err = c.rt.Checkpoint(ctx, CheckpointOptions{
		ImagePath: images, WorkPath: o.WorkPath, ParentPath: o.ParentPath, Exit: o.Exit, OpenTCP: o.OpenTCP, ExternalUnixSockets: o.ExternalUnixSockets,
		Terminal: o.Terminal, FileLocks: o.FileLocks, EmptyNamespaces: o.EmptyNamespaces, CgroupsMode: o.CgroupsMode,
	})
	if err != nil {
		return nil, fmt.Errorf("checkpoint container %s: %w", r.ID, err)
	}
	s.events.publish(topicCheckpointed, "TaskCheckpointed", &wire.TaskCheckpointed{ContainerID: r.ID, Checkpoint: images})
	return &wire.Empty{}, nil
}
