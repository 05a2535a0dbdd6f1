package docker

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"

	"github.com/hako-engine/hako/engine"
)

// containerFilters are what docker ps --filter accepts.
var containerFilters = []string{
	"ancestor", "before", "exited", "expose", "health", "id", "isolation", "is-task",
	"label", "name", "network", "publish", "since", "status", "volume",
}

func (s *Server) containerList(ctx context.Context, c *call) error {
	f, err := c.filters(containerFilters...)
	if err != nil {
		return err
	}
	for _, st := range f["status"] {
		if err := container.ValidateContainerState(container.ContainerState(st)); err != nil {
			return invalidf("%v", err)
		}
	}
	for _, h := range f["health"] {
		if err := container.ValidateHealthStatus(container.HealthStatus(h)); err != nil {
			return invalidf("%v", err)
		}
	}
	o := engine.ListOptions{All: c.flag("all"), Size: c.flag("size"), Filters: f}
	limit, err := c.number("limit")
	if err != nil {
		return err
	}
	if limit != nil && *limit > 0 {
		o.Limit = *limit
		o.All = true
	}
	// Asking for a state that only ended containers have is asking for ended containers.
	if len(f["status"]) > 0 || len(f["exited"]) > 0 {
		o.All = true
	}
	list, err := s.opt.Backend.Containers(ctx, o)
	if err != nil {
		return err
	}
	out := make([]container.Summary, 0, len(list))
	now := time.Now()
	for i := range list {
		out = append(out, summaryOf(&list[i], now))
	}
	return c.json(http.StatusOK, out)
}

func (s *Server) containerInspect(ctx context.Context, c *call) error {
	ctr, err := s.opt.Backend.Container(ctx, c.id())
	if err != nil {
		return err
	}
	if c.flag("size") {
		rw, rootfs, err := s.opt.Backend.ContainerSize(ctx, ctr.ID)
		if err != nil {
			return err
		}
		ctr.SizeRw, ctr.SizeRootFs = &rw, &rootfs
	}
	return c.json(http.StatusOK, c.version.inspect(inspectOf(&ctr)))
}

func (s *Server) containerCreate(ctx context.Context, c *call) error {
	var req createRequest
	if err := c.body(&req); err != nil {
		return err
	}
	config, warnings, err := configFrom(&req)
	if err != nil {
		return err
	}
	config.Platform = c.query("platform")
	id, more, err := s.opt.Backend.CreateContainer(ctx, c.query("name"), config)
	if err != nil {
		return err
	}
	warnings = append(warnings, more...)
	if warnings == nil {
		warnings = []string{}
	}
	return c.json(http.StatusCreated, container.CreateResponse{ID: id, Warnings: warnings})
}

func (s *Server) containerStart(ctx context.Context, c *call) error {
	if c.query("checkpoint") != "" {
		return notImplementedf("checkpoints are not in this version of hako")
	}
	if err := s.opt.Backend.StartContainer(ctx, c.id()); err != nil {
		return err
	}
	return c.empty(http.StatusNoContent)
}

func (c *call) stopOptions() (engine.StopOptions, error) {
	t, err := c.number("t")
	return engine.StopOptions{Signal: c.query("signal"), Timeout: t}, err
}

func (s *Server) containerStop(ctx context.Context, c *call) error {
	o, err := c.stopOptions()
	if err != nil {
		return err
	}
	if err := s.opt.Backend.StopContainer(ctx, c.id(), o); err != nil {
		return err
	}
	return c.empty(http.StatusNoContent)
}

func (s *Server) containerRestart(ctx context.Context, c *call) error {
	o, err := c.stopOptions()
	if err != nil {
		return err
	}
	if err := s.opt.Backend.RestartContainer(ctx, c.id(), o); err != nil {
		return err
	}
	return c.empty(http.StatusNoContent)
}

func (s *Server) containerKill(ctx context.Context, c *call) error {
	if err := s.opt.Backend.KillContainer(ctx, c.id(), c.query("signal")); errdefs.IsNotFound(err) {
		return fmt.Errorf("cannot kill container: %s: %w", c.id(), err)
	} else if err != nil {
		return err
	}
	return c.empty(http.StatusNoContent)
}

func (s *Server) containerPause(ctx context.Context, c *call) error {
	if err := s.opt.Backend.PauseContainer(ctx, c.id()); err != nil {
		return err
	}
	return c.empty(http.StatusNoContent)
}

func (s *Server) containerUnpause(ctx context.Context, c *call) error {
	if err := s.opt.Backend.UnpauseContainer(ctx, c.id()); err != nil {
		return err
	}
	return c.empty(http.StatusNoContent)
}

// containerWait answers its headers as soon as the wait is registered: docker run
// starts the container only then.
func (s *Server) containerWait(ctx context.Context, c *call) error {
	cond := engine.WaitCondition(c.query("condition"))
	switch cond {
	case "":
		cond = engine.WaitNotRunning
	case engine.WaitNotRunning, engine.WaitNextExit, engine.WaitRemoved:
	default:
		return invalidf("invalid condition: %q", cond)
	}
	results, err := s.opt.Backend.WaitContainer(ctx, c.id(), cond)
	if err != nil {
		return err
	}
	c.begin(typeJSON)
	select {
	case <-ctx.Done():
		return ctx.Err()
	case r, ok := <-results:
		if !ok {
			return errWaitEnded
		}
		out := container.WaitResponse{StatusCode: int64(r.ExitCode)}
		if r.Err != nil {
			out.Error = &container.WaitExitError{Message: r.Err.Error()}
		}
		b, err := json.Marshal(out)
		if err != nil {
			return err
		}
		_, _ = c.w.Write(append(b, '\n'))
		return nil
	}
}

func (s *Server) containerRename(ctx context.Context, c *call) error {
	if err := s.opt.Backend.RenameContainer(ctx, c.id(), c.query("name")); err != nil {
		return err
	}
	return c.empty(http.StatusNoContent)
}

func (s *Server) containerUpdate(ctx context.Context, c *call) error {
	var req container.UpdateConfig
	if err := c.body(&req); err != nil {
		return err
	}
	r, err := resourcesFrom(&req.Resources)
	if err != nil {
		return err
	}
	var policy *engine.RestartPolicy
	if req.RestartPolicy.Name != "" {
		p := restartFrom(req.RestartPolicy)
		policy = &p
	}
	warnings, err := s.opt.Backend.UpdateContainer(ctx, c.id(), r, policy)
	if err != nil {
		return err
	}
	if warnings == nil {
		warnings = []string{}
	}
	return c.json(http.StatusOK, container.UpdateResponse{Warnings: warnings})
}

func (s *Server) containerRemove(ctx context.Context, c *call) error {
	if c.flag("link") {
		return notImplementedf("legacy container links cannot be removed apart from their container")
	}
	o := engine.RemoveOptions{Force: c.flag("force"), Volumes: c.flag("v")}
	if err := s.opt.Backend.RemoveContainer(ctx, c.id(), o); err != nil {
		return err
	}
	return c.empty(http.StatusNoContent)
}

func (s *Server) containerPrune(ctx context.Context, c *call) error {
	f, err := c.filters("until", "label", "label!")
	if err != nil {
		return err
	}
	p, err := s.opt.Backend.PruneContainers(ctx, f)
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, container.PruneReport{ContainersDeleted: list(p.IDs), SpaceReclaimed: uint64(p.Reclaimed)})
}

func (s *Server) containerTop(ctx context.Context, c *call) error {
	args, err := psArgs(c.query("ps_args"))
	if err != nil {
		return err
	}
	top, err := s.opt.Backend.TopContainer(ctx, c.id(), args)
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, container.TopResponse{Titles: top.Titles, Processes: top.Processes})
}

func (s *Server) containerChanges(ctx context.Context, c *call) error {
	changes, err := s.opt.Backend.Changes(ctx, c.id())
	if err != nil {
		return err
	}
	out := make([]container.FilesystemChange, 0, len(changes))
	for _, ch := range changes {
		out = append(out, container.FilesystemChange{Kind: container.ChangeType(ch.Kind), Path: ch.Path})
	}
	return c.json(http.StatusOK, out)
}

func (s *Server) containerResize(ctx context.Context, c *call) error {
	width, height, err := c.size()
	if err != nil {
		return err
	}
	if err := s.opt.Backend.ResizeContainer(ctx, c.id(), width, height); err != nil {
		return err
	}
	return c.empty(http.StatusOK)
}

// size reads a terminal's size in characters.
func (c *call) size() (width, height uint32, err error) {
	w, err := c.number("w")
	if err != nil {
		return 0, 0, err
	}
	h, err := c.number("h")
	if err != nil {
		return 0, 0, err
	}
	const limit = 1<<16 - 1 // struct winsize, ioctl_tty(2)
	if w == nil || *w < 0 || *w > limit {
		return 0, 0, invalidf("invalid resize width %q", c.query("w"))
	}
	if h == nil || *h < 0 || *h > limit {
		return 0, 0, invalidf("invalid resize height %q", c.query("h"))
	}
	return uint32(*w), uint32(*h), nil
}
