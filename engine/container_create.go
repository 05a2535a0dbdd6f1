package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/hako-engine/hako/image"
	"github.com/hako-engine/hako/internal/undo"
	"github.com/hako-engine/hako/network"
	"github.com/hako-engine/hako/store"
)

// CreateContainer makes a container from an image. When it returns without error the
// container survives a power cut; after an error nothing is left of it.
func (e *Engine) CreateContainer(ctx context.Context, name string, c Config) (_ string, warnings []string, err error) {
	if c.Pod != nil {
		return "", nil, invalidf("a container of a pod is made in its sandbox")
	}
	m, err := e.makeContainer(e.ns(ctx), name, c, nil)
	if err != nil {
		return "", nil, err
	}
	e.publish(m)
	return m.c.id, m.warnings, nil
}

// newMember is a container that has been made and is not yet known to anybody.
type newMember struct {
	c        *container
	warnings []string
	made     func()    // ends the protection of its files, image and volumes: those who look see the container now
	told     sync.Once // the hooks were, of what was made
}

// publish makes a container that has been made known.
func (e *Engine) publish(m *newMember) {
	e.containers.add(m.c)
	if p := m.c.rec.Config.Pod; p != nil {
		e.pods.join(p.Sandbox, m.c)
	}
	m.made()
	e.emit(m.c, "create")
}

// makeContainer makes a container, in a pod if there is one, that nobody knows of yet.
func (e *Engine) makeContainer(ctx context.Context, name string, c Config, pod *sandbox) (_ *newMember, err error) {
	name = strings.TrimPrefix(name, "/")
	if name != "" && !validName.MatchString(name) {
		return nil, invalidf("Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", name)
	}
	if err := errors.Join(c.validate(e.host, e.runtimes())); err != nil {
		return nil, unjoin(err)
	}
	var warnings []string
	if pod == nil {
		if err := validateAnnotations(c.Annotations); err != nil {
			return nil, err
		}
		if err := e.resolveModes(&c); err != nil {
			return nil, err
		}
		warnings = adjustResources(&c.Resources, e.host)
	}
	if c.Init != nil && *c.Init && e.opt.InitBinary == "" {
		return nil, notImplementedf("an init process was asked for (--init), but this daemon has no init binary: set init-binary in its configuration")
	}

	img, from, unuse, err := e.imageFor(ctx, &c, pod)
	if err != nil {
		return nil, err
	}
	if from != nil {
		defer from.files.close()
	}
	defer func() {
		if err != nil {
			unuse()
		}
	}()
	cfg, err := e.opt.Images.Config(ctx, img)
	if err != nil {
		return nil, fmt.Errorf("configuration of image %s: %w", c.Image, err)
	}

	id := newID() // not a named result: the steps of undo must see it after a failure
	rec := record{Version: recordVersion, Container: Container{
		ID: id, Created: time.Now().UTC(), Config: c,
		ImageID: img.ID.String(), ImageName: c.Image,
		Snapshotter: e.opt.Snapshotter, SnapshotKey: id,
		State:        State{Status: StatusCreated},
		HostnamePath: filepath.Join(e.dir(id), "hostname"),
		HostsPath:    filepath.Join(e.dir(id), "hosts"),
		ResolvPath:   filepath.Join(e.dir(id), "resolv.conf"),
	}}
	v := &rec.Container
	if err := merge(v, c, cfg.Config); err != nil {
		return nil, err
	}
	if err := validateMerged(v); err != nil {
		return nil, err
	}
	if pod != nil {
		e.placeInPod(v, pod)
	} else {
		v.Hostname = e.hostnameFor(v)
		if log, _ := c.logConfig("x", nil); log.Format != "" {
			v.LogPath = filepath.Join(e.dir(id), id+"-json.log")
		}
		if rec.Networks, err = e.desiredNetworks(ctx, c); err != nil {
			return nil, err
		}
		v.Endpoints = e.idleEndpoints(ctx, rec.Networks)
	}

	var u undo.Stack
	defer func() { err = errors.Join(err, u.Run(ctx)) }()
	if v.Name, err = e.reserveName(name, id); err != nil {
		return nil, err
	}
	u.Add("name "+v.Name, func(context.Context) error { e.containers.unreserve(v.Name, id); return nil })
	making := append(imageKeys(id, c), id)
	e.containers.making(making, v.Snapshotter, true)
	u.Add("protection from the collector", func(context.Context) error {
		e.containers.making(making, v.Snapshotter, false)
		return nil
	})

	if err := os.Mkdir(e.dir(id), 0o710); err != nil {
		return nil, fmt.Errorf("create container %s: %w", v.Name, err)
	}
	u.Add("folder", func(context.Context) error { return os.RemoveAll(e.dir(id)) })
	if from != nil {
		if err := from.unpack(ctx, e.restoreDir(id)); err != nil {
			return nil, fmt.Errorf("restore from %s: %w", from.from, err)
		}
	}
	if c.AutoRemove {
		// A volatile mark: where it is missing later, the machine was rebooted, and the
		// container is to be removed even if no start of it was ever recorded.
		if err := os.Mkdir(e.bundle(id), 0o710); err != nil {
			return nil, fmt.Errorf("create container %s: %w", v.Name, err)
		}
		u.Add("bundle", func(context.Context) error { return RemoveBundle(e.bundle(id)) })
	}

	done, err := e.resolveMounts(ctx, v, cfg.Config.Volumes, &u)
	defer func() {
		if err != nil { // before volumes that were made are taken back
			done()
		}
	}()
	if err != nil {
		return nil, err
	}

	if err := relabelMounts(v); err != nil {
		return nil, err
	}

	// The snapshot and the record are written side by side, so that they share one
	// fsync, unless something must be seen of the files in between: the user of a pod's
	// container, if its image is not known yet, or an image's content that gets into a volume.
	put := func(ctx context.Context) error { return e.opt.Containers.Put(ctx, id, &rec) }
	u.Add("record", func(ctx context.Context) error { return e.opt.Containers.Delete(ctx, id) })
	u.Add("snapshot", func(ctx context.Context) error { return e.removeSnapshot(ctx, *v) })
	filled := slices.DeleteFunc(slices.Clone(v.Mounts), func(m Mount) bool { return m.NoCopy })
	drop, err := e.holdVolumes(ctx, filled, "create "+id)
	if err != nil {
		return nil, invalidf("failed to populate volume: %v", err)
	}
	defer func() {
		if derr := drop(context.WithoutCancel(ctx)); derr != nil {
			e.log.Error("unmount volumes", "container", id, "error", derr)
		}
	}()
	if err := e.viewImages(ctx, v); err != nil {
		return nil, err
	}
	copies := e.copyUps(*v)
	var member *container
	// describe completes what a pod's container is, and tells the plugins of it.
	describe := func(acs accounts) error {
		if err := e.checkMember(v, acs); err != nil || e.opt.Hooks == nil {
			return err
		}
		member = newContainer(rec)
		u.Add("plugins", func(ctx context.Context) error { e.tellGone(ctx, member); return nil })
		updates, err := e.tellCreate(ctx, member, pod)
		if err != nil {
			return err
		}
		rec = member.rec
		return e.applyUpdates(updates)
	}
	known := pod == nil
	if pod != nil {
		var acs accounts
		if acs, known = e.accounts.get(v.ImageID); known {
			err = describe(acs)
		}
	}
	switch {
	case err != nil:
	case known && len(copies) == 0 && from == nil:
		g, gctx := errgroup.WithContext(ctx)
		both := store.Together(gctx, 2)
		g.Go(func() error { return put(both) })
		g.Go(func() error {
			mounts, err := e.prepareSnapshot(gctx, both, *v, img)
			if err == nil && pod != nil {
				err = mapRoot(v, pod, mounts)
			}
			return err
		})
		err = g.Wait()
	default:
		var mounts []mount.Mount
		if mounts, err = e.prepareSnapshot(ctx, ctx, *v, img); err != nil {
			break
		}
		if pod != nil {
			if err = mapRoot(v, pod, mounts); err != nil {
				break
			}
		}
		if !known {
			var acs accounts
			if acs, err = e.imageAccounts(v, mounts); err == nil {
				err = describe(acs)
			}
		}
		if err == nil && len(copies) > 0 {
			err = e.copyUp(ctx, *v, copies)
		}
		if err == nil && from != nil {
			err = restoreFiles(ctx, mounts, e.restoreDir(id))
		}
		if err == nil {
			err = put(ctx)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", v.Name, err)
	}
	u.Release()
	if member == nil {
		member = newContainer(rec)
	}
	return &newMember{c: member, warnings: warnings, made: func() {
		e.containers.making(making, v.Snapshotter, false)
		unuse()
		done()
	}}, nil
}

// unjoin gives the only error of a join, so that its text stays as it is.
func unjoin(err error) error {
	if j, ok := err.(interface{ Unwrap() []error }); ok {
		if errs := j.Unwrap(); len(errs) == 1 {
			return errs[0]
		}
	}
	return err
}

// making marks the snapshots of a container that is being created as roots for garbage collection.
func (r *registry) making(keys []string, snapshotter string, on bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, key := range keys {
		if on {
			r.beingMade[key] = snapshotter
		} else {
			delete(r.beingMade, key)
		}
	}
}

// reserveName takes the name asked for, or a random one.
func (e *Engine) reserveName(name, id string) (string, error) {
	if name != "" {
		// In this order: a client of containerd's that comes in between finds it taken.
		err := e.containers.reserve(name, id)
		if err == nil {
			if err = e.nameFree(name); err != nil {
				e.containers.unreserve(name, id)
			}
		}
		return name, err
	}
	for attempt := 0; ; attempt++ {
		n := randomName(attempt)
		if err := e.containers.reserve(n, id); err == nil {
			return n, nil
		} else if attempt > 20 {
			return "", err
		}
	}
}

func (e *Engine) lookupImage(ctx context.Context, c Config) (image.Image, error) {
	var p *ocispec.Platform
	if c.Platform != "" {
		parsed, err := platforms.Parse(c.Platform)
		if err != nil {
			return image.Image{}, invalidf("invalid platform %q: %v", c.Platform, err)
		}
		p = &parsed
	}
	if c.Image == "" {
		return image.Image{}, invalidf("no image was given")
	}
	img, err := e.opt.Images.Get(ctx, c.Image, p)
	if errdefs.IsNotFound(err) {
		return img, &classed{text: "No such image: " + familiarTag(c.Image), class: errdefs.ErrNotFound, cause: err}
	}
	if err != nil {
		return img, err
	}
	return img, nil
}

// familiarTag is a reference in Docker's short form, with the tag that was meant.
func familiarTag(ref string) string {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return ref
	}
	return reference.FamiliarString(reference.TagNameOnly(named))
}

// familiarName is a full reference in Docker's short form.
func familiarName(ref string) string {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return ref
	}
	return reference.FamiliarString(named)
}

// resolveModes turns container:NAME into container:ID, so that a rename changes nothing.
func (e *Engine) resolveModes(c *Config) error {
	for _, m := range []*string{&c.NetworkMode, &c.PidMode, &c.IpcMode} {
		ref, ok := strings.CutPrefix(*m, "container:")
		if !ok {
			continue
		}
		other, err := e.containers.get(ref)
		if err != nil {
			return badRequest(err)
		}
		*m = "container:" + other.id
	}
	if c.IpcMode == "" {
		c.IpcMode = "private"
	}
	if c.CgroupnsMode == "" {
		c.CgroupnsMode = "host"
		if e.host.CgroupV2 && !c.Privileged {
			c.CgroupnsMode = "private"
		}
	}
	for _, l := range c.Links {
		ref, _, _ := strings.Cut(l, ":")
		if _, err := e.containers.get(ref); err != nil {
			return badRequest(fmt.Errorf("could not get container for %s: %w", ref, err))
		}
	}
	return nil
}

// adjustResources sets Docker's implied limits, and tells what the kernel cannot do.
func adjustResources(r *Resources, h hostFacts) (warnings []string) {
	if r.PidsLimit != nil && *r.PidsLimit <= 0 {
		r.PidsLimit = nil
	}
	if r.Memory > 0 && !h.SwapLimit && r.MemorySwap >= 0 {
		if r.MemorySwap > 0 {
			warnings = append(warnings, "Your kernel does not support swap limit capabilities or the cgroup is not mounted. Memory limited without swap.")
		}
		r.MemorySwap = 0
		return warnings
	}
	if r.Memory > 0 && r.MemorySwap == 0 {
		r.MemorySwap = 2 * r.Memory
	}
	if r.Memory > 0 && r.OOMKillDisable != nil && *r.OOMKillDisable && h.CgroupV2 {
		warnings = append(warnings, "Your kernel does not support OomKillDisable. OomKillDisable discarded.")
		r.OOMKillDisable = nil
	}
	if r.Memory == 0 && r.OOMKillDisable != nil && *r.OOMKillDisable {
		warnings = append(warnings, "OOM killer is disabled for the container, but no memory limit is set, this can result in the system running out of resources.")
	}
	return warnings
}

// validateMerged checks what only the image's configuration decides.
func validateMerged(v *Container) error {
	if v.WorkingDir != "" && !path.IsAbs(v.WorkingDir) {
		return invalidf("the working directory '%s' is invalid, it needs to be an absolute path", v.WorkingDir)
	}
	if v.StopSignal != "" {
		if _, err := parseSignal(v.StopSignal); err != nil {
			return err
		}
	}
	for _, s := range slices.Concat([]string{v.Path, v.WorkingDir, v.User}, v.Args, v.Env) {
		if strings.ContainsRune(s, 0) {
			return invalidf("the image's configuration holds a NUL byte")
		}
	}
	return v.Healthcheck.validate()
}

// hostnameFor is the host name inside the container.
func (e *Engine) hostnameFor(v *Container) string {
	c := v.Config
	switch {
	case c.Hostname != "":
		return c.Hostname
	case c.UTSMode == "host" || c.NetworkMode == "host":
		return e.host.Hostname
	}
	if id, ok := strings.CutPrefix(c.NetworkMode, "container:"); ok {
		if other, err := e.containers.get(id); err == nil {
			return other.view().Hostname
		}
	}
	return shortID(v.ID)
}

// desiredNetworks lists the networks that a container shall be on, the primary one
// first. Every one has to exist.
func (e *Engine) desiredNetworks(ctx context.Context, c Config) ([]EndpointSettings, error) {
	if c.NetworkDisabled || strings.HasPrefix(c.NetworkMode, "container:") {
		return nil, nil
	}
	primary := c.NetworkMode
	if primary == "" || primary == "default" {
		primary = network.DefaultName
	}
	var out []EndpointSettings
	have := map[string]int{} // network id → index
	add := func(s EndpointSettings) error {
		n, err := e.opt.Networks.Get(ctx, s.Network)
		if errdefs.IsNotFound(err) {
			return invalidf("network %s not found", s.Network)
		} else if err != nil {
			return fmt.Errorf("find network %s: %w", s.Network, err)
		}
		s.Network = n.Name
		if i, ok := have[n.ID]; ok {
			out[i] = s
			return nil
		}
		have[n.ID] = len(out)
		out = append(out, s)
		return nil
	}
	if err := add(EndpointSettings{Network: primary, MAC: c.MacAddress}); err != nil {
		return nil, err
	}
	for _, s := range c.Endpoints {
		if s.Network == "" || s.Network == "default" {
			s.Network = network.DefaultName
		}
		if s.MAC == "" && s.Network == primary {
			s.MAC = c.MacAddress
		}
		if err := add(s); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// idleEndpoints shows the networks of a container that does not run.
func (e *Engine) idleEndpoints(ctx context.Context, want []EndpointSettings) []network.Endpoint {
	var out []network.Endpoint
	for _, s := range want {
		ep := network.Endpoint{NetworkName: s.Network, Aliases: s.Aliases}
		if n, err := e.opt.Networks.Get(ctx, s.Network); err == nil {
			ep.NetworkID, ep.NetworkName = n.ID, n.Name
		}
		out = append(out, ep)
	}
	return out
}

// prepareSnapshot makes the container's writable layer, whose record is written under
// the context write.
func (e *Engine) prepareSnapshot(ctx, write context.Context, v Container, img image.Image) ([]mount.Mount, error) {
	sn := e.opt.Snapshotters[v.Snapshotter]
	if sn == nil {
		return nil, fmt.Errorf("snapshotter %q: %w", v.Snapshotter, errdefs.ErrNotFound)
	}
	chain, err := e.opt.Images.Unpack(ctx, img, v.Snapshotter)
	if err != nil {
		return nil, fmt.Errorf("unpack image %s: %w", v.ImageName, err)
	}
	if size := v.Config.StorageOpt["size"]; size != "" {
		return nil, notImplementedf("--storage-opt size is not supported by the snapshotter %s", v.Snapshotter)
	}
	mounts, err := sn.Prepare(write, v.SnapshotKey, chain, ownedBy(v.ID))
	if err != nil {
		return nil, fmt.Errorf("prepare file system: %w", err)
	}
	if v.Config.Pod != nil {
		return mounts, nil
	}
	return mounts, markRoot(mounts)
}

// rootMark is the file by which programs and scripts tell that they run in a container.
const rootMark = ".dockerenv"

// markRoot puts it into a new container's layer.
func markRoot(mounts []mount.Mount) error {
	if len(mounts) != 1 {
		return nil
	}
	dir := mounts[0].Source
	if mounts[0].Type == "overlay" {
		d, err := parseOverlay(mounts[0].Options)
		if err != nil {
			return err
		}
		dir = d.upper
	}
	if dir == "" {
		return nil
	}
	// With O_EXCL a name that the image gave to something else is left alone, and not followed.
	f, err := os.OpenFile(filepath.Join(dir, rootMark), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("make /%s: %w", rootMark, err)
	}
	return f.Close()
}

// ownerLabel names the container that a snapshot was made for.
const ownerLabel = "io.hako.container"

func ownedBy(id string) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{ownerLabel: id})
}

func (e *Engine) removeSnapshot(ctx context.Context, v Container) error {
	sn := e.opt.Snapshotters[v.Snapshotter]
	if sn == nil {
		return nil
	}
	for _, key := range append(imageKeys(v.ID, v.Config), v.SnapshotKey) {
		if err := sn.Remove(e.ns(ctx), key); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("remove file system: %w", err)
		}
	}
	return nil
}
