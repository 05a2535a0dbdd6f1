package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Container gives one container by id, name or unique prefix.
func (e *Engine) Container(ctx context.Context, ref string) (Container, error) {
	c, err := e.find(ctx, ref)
	if err != nil {
		return Container{}, err
	}
	v := c.view()
	v.AppArmorProfile = e.appArmorProfile(v.Config)
	return v, nil
}

// Containers lists containers, the newest first.
func (e *Engine) Containers(ctx context.Context, o ListOptions) ([]Container, error) {
	f := o.Filters
	if err := f.check("ancestor", "before", "expose", "exited", "health", "id", "isolation", "is-task", "label", "label!",
		"name", "network", "publish", "since", "status", "volume", "until"); err != nil {
		return nil, err
	}
	for _, s := range f["status"] {
		if !slices.Contains([]Status{StatusCreated, StatusRunning, StatusPaused, StatusRestarting, StatusRemoving, StatusExited, StatusDead}, Status(s)) {
			return nil, invalidf("invalid filter 'status=%s'", s)
		}
	}
	for _, s := range f["exited"] {
		if _, err := strconv.Atoi(s); err != nil {
			return nil, invalidf("invalid filter 'exited=%s'", s)
		}
	}
	m := containerMatcher{f: f, all: o.All || o.Limit > 0 || len(f["status"]) > 0 || len(f["exited"]) > 0}
	var err error
	if m.before, err = e.createdOf(f["before"]); err != nil {
		return nil, err
	}
	if m.since, err = e.createdOf(f["since"]); err != nil {
		return nil, err
	}
	if m.networks, err = e.networkIDs(ctx, f["network"]); err != nil {
		return nil, err
	}
	if len(f["ancestor"]) > 0 {
		if m.images, err = e.ancestors(ctx, f["ancestor"]); err != nil {
			return nil, err
		}
	}
	out := []Container{}
	for _, c := range e.containers.all() {
		if v := c.view(); m.fits(v) {
			out = append(out, v)
		}
	}
	guests, err := e.guests(ctx)
	if err != nil {
		return nil, err
	}
	for _, g := range guests {
		if v := e.guestView(ctx, g); m.fits(v) {
			out = append(out, v)
		}
	}
	slices.SortFunc(out, func(a, b Container) int {
		if d := b.Created.Compare(a.Created); d != 0 {
			return d
		}
		return strings.Compare(a.ID, b.ID)
	})
	if o.Limit > 0 && len(out) > o.Limit {
		out = out[:o.Limit]
	}
	if o.Size {
		for i := range out {
			rw, root, err := e.ContainerSize(ctx, out[i].ID)
			if errdefs.IsNotFound(err) {
				continue // removed since it was listed
			} else if err != nil {
				return nil, err
			}
			out[i].SizeRw, out[i].SizeRootFs = &rw, &root
		}
	}
	return out, nil
}

// createdOf gives when the containers that before= or since= name were created.
func (e *Engine) createdOf(refs []string) (*time.Time, error) {
	if len(refs) == 0 {
		return nil, nil
	}
	c, err := e.containers.get(refs[len(refs)-1])
	if err != nil {
		return nil, err
	}
	t := c.view().Created
	return &t, nil
}

func (e *Engine) networkIDs(ctx context.Context, refs []string) (map[string]bool, error) {
	if len(refs) == 0 {
		return nil, nil
	}
	ids := map[string]bool{}
	for _, r := range refs {
		n, err := e.opt.Networks.Get(ctx, r)
		if errdefs.IsNotFound(err) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("find network %s: %w", r, err)
		}
		ids[n.ID] = true
	}
	return ids, nil
}

// ancestors gives the ids of the images that the filter names.
func (e *Engine) ancestors(ctx context.Context, refs []string) (map[string]bool, error) {
	ids := map[string]bool{}
	for _, r := range refs {
		img, err := e.opt.Images.Get(e.ns(ctx), r, nil)
		switch {
		case errors.Is(err, errdefs.ErrNotFound):
			ids[r] = true // of an image that is gone: containers keep its id
		case err != nil:
			return nil, fmt.Errorf("find image %s: %w", r, err)
		default:
			ids[img.ID.String()] = true
		}
	}
	return ids, nil
}

// containerMatcher applies a list's filters.
type containerMatcher struct {
	f             Filters
	all           bool
	before, since *time.Time
	networks      map[string]bool
	images        map[string]bool
}

func (m *containerMatcher) fits(v Container) bool {
	s := v.State
	if !m.all && !s.live() && s.Status != StatusRestarting {
		return false
	}
	if m.before != nil && !v.Created.Before(*m.before) || m.since != nil && !v.Created.After(*m.since) {
		return false
	}
	f := m.f
	return f.labels(v.Labels) &&
		f.any("id", func(w string) bool { return strings.HasPrefix(v.ID, w) }) &&
		f.any("name", func(w string) bool {
			w = strings.TrimPrefix(w, "/")
			return matchName(v.Name, w)
		}) &&
		f.any("status", func(w string) bool { return w == string(s.Status) }) &&
		f.any("exited", func(w string) bool { return s.Status == StatusExited && strconv.Itoa(s.ExitCode) == w }) &&
		f.any("health", func(w string) bool {
			if s.Health == nil {
				return w == "none"
			}
			return w == s.Health.Status
		}) &&
		f.any("is-task", func(w string) bool { return w == "false" || w == "0" }) &&
		(m.images == nil || m.images[v.ImageID]) &&
		(m.networks == nil || m.onNetwork(v)) &&
		f.any("volume", func(w string) bool {
			return slices.ContainsFunc(v.Mounts, func(mt Mount) bool { return mt.Source == w || mt.Target == w || mt.Resolved == w })
		}) &&
		f.any("expose", func(w string) bool {
			return slices.ContainsFunc(v.ExposedPorts, func(p string) bool { return matchPort(w, p) })
		}) &&
		f.any("publish", func(w string) bool {
			for _, p := range v.Config.Ports {
				if matchPort(w, portKey(p.ContainerPort, p.Proto)) {
					return true
				}
			}
			return false
		})
}

func (m *containerMatcher) onNetwork(v Container) bool {
	for _, ep := range v.Endpoints {
		if m.networks[ep.NetworkID] {
			return true
		}
	}
	return false
}

// matchPort compares "80", "80/tcp" or "8000-8080/tcp" with a port key.
func matchPort(want, key string) bool {
	wp, proto, has := strings.Cut(want, "/")
	port, kproto, _ := strings.Cut(key, "/")
	if has && proto != kproto || !has && kproto != "tcp" {
		return false
	}
	lo, hi, isRange := strings.Cut(wp, "-")
	if !isRange {
		return wp == port
	}
	n, err0 := strconv.Atoi(port)
	a, err1 := strconv.Atoi(lo)
	b, err2 := strconv.Atoi(hi)
	return err0 == nil && err1 == nil && err2 == nil && a <= n && n <= b
}

// ContainerSize measures a container's own layer, and the whole file system, in bytes.
func (e *Engine) ContainerSize(ctx context.Context, ref string) (rw, rootfs int64, err error) {
	c, err := e.find(ctx, ref)
	if err != nil {
		return 0, 0, err
	}
	v := c.view()
	sn := e.opt.Snapshotters[v.Snapshotter]
	if sn == nil {
		return 0, 0, notFoundf("snapshotter %q of container %s is not there any more", v.Snapshotter, v.ID)
	}
	ctx = e.ns(ctx)
	u, err := sn.Usage(ctx, v.SnapshotKey)
	if err != nil {
		return 0, 0, fmt.Errorf("size of container %s: %w", ref, err)
	}
	rw, rootfs = u.Size, u.Size
	for key := v.SnapshotKey; ; {
		info, err := sn.Stat(ctx, key)
		if err != nil || info.Parent == "" {
			return rw, rootfs, nil
		}
		key = info.Parent
		u, err := sn.Usage(ctx, key)
		if err != nil {
			return rw, rootfs, fmt.Errorf("size of container %s: %w", ref, err)
		}
		rootfs += u.Size
	}
}

// RenameContainer changes a container's name, also in DNS.
func (e *Engine) RenameContainer(ctx context.Context, ref, newName string) error {
	c, g, err := e.lookup(ctx, ref)
	if err != nil {
		return err
	}
	if g != nil {
		return g.foreignTo("rename")
	}
	newName = strings.TrimPrefix(newName, "/")
	if newName == "" {
		return invalidf("Neither old nor new names may be empty")
	}
	if !validName.MatchString(newName) {
		return invalidf("Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", newName)
	}
	if err := c.acquire(ctx); err != nil {
		return err
	}
	defer c.release()
	if err := c.require("change"); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx) // the record and what is known here stay the same
	v := c.view()
	if v.Name == newName {
		return invalidf("Renaming a container with the same name as its current name")
	}
	if err := e.containers.reserve(newName, c.id); err != nil {
		return fmt.Errorf("Error when allocating new name: %w", err)
	}
	if err := e.nameFree(newName); err != nil {
		e.containers.unreserve(newName, c.id)
		return err
	}
	c.mu.Lock()
	c.rec.Name = newName
	c.mu.Unlock()
	if err := e.save(ctx, c); err != nil {
		c.mu.Lock()
		c.rec.Name = v.Name
		c.mu.Unlock()
		e.containers.unreserve(newName, c.id)
		return fmt.Errorf("rename container %s: %w", ref, err)
	}
	e.containers.unreserve(v.Name, c.id)
	for _, ep := range v.Endpoints {
		if ep.ID == "" {
			continue
		}
		if err := e.opt.Networks.Rename(ctx, ep.NetworkID, ep.ID, newName); err != nil {
			e.log.Warn("rename endpoint", "container", c.id, "network", ep.NetworkName, "error", err)
		}
	}
	e.emit(c, "rename", "oldName", "/"+v.Name)
	return nil
}

// UpdateContainer changes the limits and, if p is not nil, the restart policy. Zero
// limits stay as they are.
func (e *Engine) UpdateContainer(ctx context.Context, ref string, r Resources, p *RestartPolicy) (warnings []string, err error) {
	c, g, err := e.lookup(ctx, ref)
	if err != nil {
		return nil, err
	}
	if g != nil {
		return nil, g.foreignTo("update")
	}
	if err := c.acquire(ctx); err != nil {
		return nil, err
	}
	defer c.release()
	if err := c.require("change"); err != nil {
		return nil, err
	}
	v := c.view()
	if p != nil {
		if err := p.validate(); err != nil {
			return nil, err
		}
		if v.Config.AutoRemove && p.Name != "" && p.Name != "no" {
			return nil, conflictf("Restart policy cannot be updated because AutoRemove is enabled for the container")
		}
	}
	merged := mergeResources(v.Config.Resources, r)
	if err := merged.validate(e.host); err != nil {
		return nil, err
	}
	if r.Memory > 0 && r.MemorySwap == 0 && v.Config.Resources.MemorySwap > 0 && r.Memory > v.Config.Resources.MemorySwap {
		return nil, invalidf("Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time")
	}
	warnings = adjustResources(&merged, e.host)
	blocks, err := lookupBlocks(merged)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), changeLimit)
	defer cancel()
	if r, err := c.live("use"); err == nil {
		if err := r.shim.get().Update(ctx, c.id, linuxResources(e.host.applicable(merged), blocks)); err != nil {
			return nil, fmt.Errorf("Cannot update container %s: %w", c.id, err)
		}
	}
	c.mu.Lock()
	c.rec.Config.Resources = merged
	if p != nil {
		c.rec.Config.Restart = *p
	}
	c.mu.Unlock()
	if err := e.save(ctx, c); err != nil {
		return nil, fmt.Errorf("update container %s: %w", ref, err)
	}
	e.emit(c, "update")
	return warnings, nil
}

// mergeResources lays the values that are set over the old ones.
func mergeResources(old, r Resources) Resources {
	out := old
	for _, f := range []struct {
		to   *int64
		from int64
	}{
		{&out.Memory, r.Memory}, {&out.MemoryReservation, r.MemoryReservation}, {&out.MemorySwap, r.MemorySwap},
		{&out.CPUShares, r.CPUShares}, {&out.CPURTPeriod, r.CPURTPeriod}, {&out.CPURTRuntime, r.CPURTRuntime},
	} {
		if f.from != 0 {
			*f.to = f.from
		}
	}
	// The two ways to limit CPU time replace each other.
	if r.NanoCPUs != 0 {
		out.NanoCPUs, out.CPUPeriod, out.CPUQuota = r.NanoCPUs, 0, 0
	}
	if r.CPUPeriod != 0 || r.CPUQuota != 0 {
		out.NanoCPUs = 0
		if r.CPUPeriod != 0 {
			out.CPUPeriod = r.CPUPeriod
		}
		if r.CPUQuota != 0 {
			out.CPUQuota = r.CPUQuota
		}
	}
	if r.CpusetCPUs != "" {
		out.CpusetCPUs = r.CpusetCPUs
	}
	if r.CpusetMems != "" {
		out.CpusetMems = r.CpusetMems
	}
	if r.PidsLimit != nil {
		out.PidsLimit = r.PidsLimit
	}
	if r.BlkioWeight != 0 {
		out.BlkioWeight = r.BlkioWeight
	}
	if r.MemorySwappiness != nil {
		out.MemorySwappiness = r.MemorySwappiness
	}
	if r.OOMKillDisable != nil {
		out.OOMKillDisable = r.OOMKillDisable
	}
	return out
}
