package shim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/durable"
	"github.com/hako-engine/hako/internal/undo"
	"github.com/hako-engine/hako/shim/wire"
)

// container is one container and its processes.
type container struct {
	id, bundle string
	rt         Container
	cfg        RuntimeConfig
	ownPIDs    bool // a PID namespace of its own: its end is the end of all of it
	init       *process
	oomEnd     context.CancelFunc

	paused atomic.Bool

	oom struct {
		sync.Mutex
		told  bool // that the kernel killed one of its processes
		ahead bool // before the kernel's notice was read
	}

	mu struct {
		sync.Mutex
		execs   map[string]*process
		deleted bool // no process can be added any more
	}
}

// bundleSpec is the part of config.json that concerns the shim.
type bundleSpec struct {
	Annotations map[string]string `json:"annotations"`
	Process     *struct {
		Terminal bool `json:"terminal"`
	} `json:"process"`
	Linux *struct {
		Namespaces []struct {
			Type string `json:"type"`
			Path string `json:"path"`
		} `json:"namespaces"`
	} `json:"linux"`
}

func readSpec(bundle string) (*bundleSpec, error) {
	var spec bundleSpec
	path := filepath.Join(bundle, "config.json")
	if err := readJSON(path, &spec); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%s: %w", path, errdefs.ErrNotFound)
		}
		return nil, fmt.Errorf("read bundle: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return &spec, nil
}

// ownPIDs says whether the container gets a new PID namespace.
func (b *bundleSpec) ownPIDs() bool {
	if b.Linux != nil {
		for _, ns := range b.Linux.Namespaces {
			if ns.Type == "pid" {
				return ns.Path == ""
			}
		}
	}
	return false
}

// group is the id that a shim is shared under: that of the pod, or else the container's.
func (b *bundleSpec) group(id string) string {
	for _, key := range []string{"io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"} {
		if g := b.Annotations[key]; g != "" {
			return g
		}
	}
	return id
}

// create makes a container of a request. What it did is taken back if it fails.
func (s *Service) create(ctx context.Context, r *wire.CreateTaskRequest) (c *container, err error) {
	cfg, opts, err := s.runtimeConfig(r)
	if err != nil {
		return nil, err
	}
	restore, err := restoreOf(r, opts)
	if err != nil {
		return nil, err
	}
	spec, err := readSpec(r.Bundle)
	if err != nil {
		return nil, err
	}
	rt, err := s.runtime(cfg)
	if err != nil {
		return nil, err
	}
	if opts.ShimCgroup != "" {
		if s.join == nil {
			return nil, fmt.Errorf("option shim_cgroup: %w", errdefs.ErrNotImplemented)
		}
		if err := s.join(opts.ShimCgroup); err != nil {
			return nil, fmt.Errorf("option shim_cgroup: %w", err)
		}
	}
	s.reaper.calls.RLock() // until everything is taken back, too
	defer s.reaper.calls.RUnlock()
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run(ctx))
		}
	}()
	// A status of an earlier container in this bundle must not be taken for this one's.
	os.Remove(filepath.Join(r.Bundle, wire.ExitFile))
	task := Task{Version: fileVersion, ID: r.ID, ShimPid: os.Getpid(), Runtime: cfg}
	if err := writeJSON(filepath.Join(r.Bundle, wire.TaskFile), task); err != nil {
		return nil, err
	}
	u.Add("write "+wire.TaskFile, func(context.Context) error {
		return os.Remove(filepath.Join(r.Bundle, wire.TaskFile))
	})
	if err := s.writeAddress(r.Bundle); err != nil {
		return nil, err
	}
	c = &container{id: r.ID, bundle: r.Bundle, cfg: cfg, ownPIDs: spec.ownPIDs()}
	c.mu.execs = map[string]*process{}
	p := &process{c: c, stopped: make(chan struct{}), io: ioRequest{
		id: r.ID, namespace: s.namespace, terminal: r.Terminal, uid: int(opts.IoUID), gid: int(opts.IoGID),
		stdin: r.Stdin, stdout: r.Stdout, stderr: r.Stderr,
	}}
	c.init = p
	if p.streams, err = openStreams(p.io, s.startChild, s.busy); err != nil {
		return nil, err
	}
	u.Add("open streams", func(context.Context) error { p.streams.closeEnds(); p.streams.close(); return nil })

	c.rt, err = rt.Create(ctx, r.ID, CreateOptions{
		Bundle: r.Bundle, Rootfs: r.Rootfs, Terminal: r.Terminal,
		Stdin: p.streams.stdinEnd, Stdout: p.streams.stdoutEnd, Stderr: p.streams.stderrEnd,
		NoPivot: opts.NoPivotRoot, NoNewKeyring: opts.NoNewKeyring, Restore: restore,
	})
	if err != nil {
		return nil, err
	}
	init := c.rt.Init()
	ch, err := s.reaper.watch(init.Pid)
	if err != nil {
		u.Add("create container", func(ctx context.Context) error { return rt.Remove(ctx, r.ID, r.Bundle) })
		return nil, err
	}
	p.mu.pid, p.mu.child = init.Pid, ch
	p.streams.started(init.Console)
	task.Pid = init.Pid
	if err := writeJSON(filepath.Join(r.Bundle, wire.TaskFile), task); err != nil {
		s.log.Error("write task file", "container", r.ID, "error", err)
	}
	s.watchOOM(c)
	u.Release()
	return c, nil
}

// writeAddress lets a daemon that comes back find the shim from each of its bundles.
func (s *Service) writeAddress(bundle string) error {
	if s.socket == "" {
		return nil
	}
	path, address := filepath.Join(bundle, wire.AddressFile), "unix://"+s.socket
	if b, err := os.ReadFile(path); err == nil && string(b) == address {
		return nil
	}
	return durable.WriteVolatile(path, []byte(address), 0o600)
}

// runtimeConfig takes the runtime from the request's options, or else that of the shim.
func (s *Service) runtimeConfig(r *wire.CreateTaskRequest) (cfg RuntimeConfig, opts wire.RuntimeOptions, err error) {
	cfg = s.defaults
	if r.Options != nil && r.Options.TypeURL == wire.RuntimeOptionsURL {
		if err := wire.Unmarshal(r.Options.Value, &opts); err != nil {
			return cfg, opts, fmt.Errorf("decode options: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if opts.BinaryName != "" {
			cfg.Binary = opts.BinaryName
		}
		cfg.SystemdCgroup = cfg.SystemdCgroup || opts.SystemdCgroup
	}
	if r.ID == "" || !filepath.IsAbs(r.Bundle) {
		return cfg, opts, fmt.Errorf("create container %q with bundle %q: %w", r.ID, r.Bundle, errdefs.ErrInvalidArgument)
	}
	cfg.Root = filepath.Join(r.Bundle, stateDir)
	if opts.Root != "" {
		cfg.Root = filepath.Join(opts.Root, s.namespace)
	}
	return cfg, opts, nil
}

// restoreOf says what a container is to be restored from; nil: it is a new one.
func restoreOf(r *wire.CreateTaskRequest, o wire.RuntimeOptions) (*Restore, error) {
	images := r.Checkpoint
	if images == "" {
		return nil, nil
	}
	if o.CriuImagePath != "" {
		images = o.CriuImagePath
	}
	if !filepath.IsAbs(images) {
		return nil, fmt.Errorf("restore container %q from %q: %w", r.ID, images, errdefs.ErrInvalidArgument)
	}
	return &Restore{ImagePath: images, WorkPath: o.CriuWorkPath}, nil
}

// watchOOM publishes an event each time that the kernel kills for want of memory.
func (s *Service) watchOOM(c *container) {
	ctx, cancel := context.WithCancel(context.Background())
	c.oomEnd = cancel
	ch, err := c.rt.OOM(ctx)
	if err != nil {
		s.log.Warn("watch for out of memory", "container", c.id, "error", err)
		return
	}
	go func() {
		for range ch {
			s.tellOOM(c)
		}
	}()
}

// tellOOM is for a notice of the kernel's.
func (s *Service) tellOOM(c *container) {
	c.oom.Lock()
	defer c.oom.Unlock()
	if c.oom.ahead {
		c.oom.ahead = false
		return
	}
	c.oom.told = true
	s.events.publish(topicOOM, "TaskOOM", &wire.TaskOOM{ContainerID: c.id})
}

// oomKilled tells at the end of the first process whether the kernel killed one for want of memory. The kernel's notice may be read
// later than that, or never if the cgroup goes before: whoever hears of the end has heard of the reason all the same.
func (s *Service) oomKilled(c *container) bool {
	c.oom.Lock()
	defer c.oom.Unlock()
	if !c.oom.told && c.rt.OOMKilled() {
		c.oom.told, c.oom.ahead = true, true
		s.events.publish(topicOOM, "TaskOOM", &wire.TaskOOM{ContainerID: c.id})
	}
	return c.oom.told
}

// writeExit keeps the exit for whoever comes after a crash of this shim.
func (c *container) writeExit(e Exit) error {
	return writeJSON(filepath.Join(c.bundle, wire.ExitFile), e)
}

// killRest ends what the first process of a container without PID namespace left.
func (s *Service) killRest(c *container) {
	s.reaper.calls.RLock()
	defer s.reaper.calls.RUnlock()
	ctx, cancel := context.WithTimeout(context.Background(), drainLimit)
	defer cancel()
	if err := c.rt.Kill(ctx, unix.SIGKILL, true); err != nil && !errdefs.IsNotFound(err) {
		s.log.Warn("kill the rest", "container", c.id, "error", err)
	}
}

// awaitExecs waits until the added processes that run have ended, but not for ever.
func (c *container) awaitExecs() {
	limit := time.After(drainLimit)
	for _, p := range c.all() {
		if p == nil || p == c.init {
			continue
		}
		p.mu.Lock()
		alive := p.mu.phase == running || p.mu.phase == starting
		p.mu.Unlock()
		if !alive {
			continue
		}
		select {
		case <-p.stopped:
		case <-limit:
			return
		}
	}
}

// process finds one of the container's processes.
func (c *container) process(execID string) (*process, error) {
	if execID == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.mu.execs[execID]
	if p == nil {
		return nil, fmt.Errorf("process %s of container %s: %w", execID, c.id, errdefs.ErrNotFound)
	}
	return p, nil
}

func (c *container) all() []*process {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := []*process{c.init}
	for _, p := range c.mu.execs {
		out = append(out, p)
	}
	return out
}
