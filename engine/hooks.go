package engine

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/internal/errtext"
)

// Hooks is told of the life of pods and of their containers, and may have a say in it (NRI).
// Without one nothing is asked, and nothing costs.
//
// What it is told, in this order: a sandbox runs, stops once, is removed once; a container is
// created, starts, stops once, is removed once. One that failed on the way is stopped and
// removed, too, once its creation was told.
//
// An error of a call that comes before something refuses that; of others it is logged, and
// they are made whatever became of the request: each listener has its own time limit.
type Hooks interface {
	// Hold keeps a new listener from being brought up to date until release is called.
	// Nothing that may wait for another call of a hook is done in between.
	Hold() (release func())
	// Idle tells, between Hold and release, that nobody listens: what a call of a container takes need not be made.
	Idle() bool

	RunSandbox(ctx context.Context, s Sandbox) error // before anybody knows of it
	// UpdateSandbox is before a change of the pod's limits, PostUpdateSandbox after it.
	UpdateSandbox(ctx context.Context, s Sandbox, overhead, resources *Resources) error
	PostUpdateSandbox(ctx context.Context, s Sandbox) error
	StopSandbox(ctx context.Context, s Sandbox) error   // its containers have stopped, its network is there
	RemoveSandbox(ctx context.Context, s Sandbox) error // it is gone

	// CreateContainer is before it is made, and may ask for another configuration, and for other limits of other containers.
	CreateContainer(ctx context.Context, s Sandbox, c HookContainer) (Adjustment, []ContainerUpdate, error)
	// PostCreateContainer and PostStartContainer are told of what has been done.
	PostCreateContainer(ctx context.Context, s Sandbox, c HookContainer) error
	StartContainer(ctx context.Context, s Sandbox, c HookContainer) error // its process waits for the start
	PostStartContainer(ctx context.Context, s Sandbox, c HookContainer) error
	// UpdateContainer may answer with an update of the container itself, which replaces r.
	UpdateContainer(ctx context.Context, s Sandbox, c HookContainer, r Resources) ([]ContainerUpdate, error)
	PostUpdateContainer(ctx context.Context, s Sandbox, c HookContainer) error
	StopContainer(ctx context.Context, s Sandbox, c HookContainer) ([]ContainerUpdate, error) // it has ended
	RemoveContainer(ctx context.Context, s Sandbox, c HookContainer) error                    // it is gone
}

// HookContainer is a container as a hook is shown it.
type HookContainer struct {
	Container
	// Spec is its OCI configuration, as it is or is going to be. Later than the creation
	// it has no seccomp filter, and is nil when it cannot be made any more.
	Spec *specs.Spec
}

// ContainerUpdate asks for other limits of a container.
type ContainerUpdate struct {
	ID            string
	Resources     Resources // zero: as it is
	IgnoreFailure bool
}

// told are the objects that the hooks know of: no more and no less than what a new listener
// has to be told.
type told struct {
	mu         sync.Mutex
	sandboxes  map[string]*sandbox
	containers map[string]*container
}

func (t *told) addSandbox(s *sandbox) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.sandboxes == nil {
		t.sandboxes = map[string]*sandbox{}
	}
	t.sandboxes[s.id] = s
}

func (t *told) addContainer(c *container) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.containers == nil {
		t.containers = map[string]*container{}
	}
	t.containers[c.id] = c
}

// dropSandbox and dropContainer tell whether it was known.
func (t *told) dropSandbox(s *sandbox) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, known := t.sandboxes[s.id]
	delete(t.sandboxes, s.id)
	return known
}

func (t *told) dropContainer(c *container) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, known := t.containers[c.id]
	delete(t.containers, c.id)
	return known
}

// tellRun asks whether a sandbox may be, which nobody knows of yet.
func (e *Engine) tellRun(ctx context.Context, s *sandbox) error {
	if e.opt.Hooks == nil {
		return nil
	}
	release := e.opt.Hooks.Hold()
	defer release()
	e.told.addSandbox(s) // also when it is refused: some have heard of it
	if err := e.opt.Hooks.RunSandbox(ctx, s.view()); err != nil {
		return refused("run sandbox "+s.id, err)
	}
	return nil
}

// refused makes the error of an operation that a hook does not want.
func refused(what string, err error) error {
	return failedf("%s: refused by a plugin: %s", what, errtext.Plain(err))
}

// tellStop tells once that a sandbox stops.
func (e *Engine) tellStop(ctx context.Context, s *sandbox) {
	if e.opt.Hooks == nil {
		return
	}
	ctx = context.WithoutCancel(ctx)
	s.mu.Lock()
	first := !s.toldStop
	s.toldStop = true
	s.mu.Unlock()
	if !first {
		return
	}
	release := e.opt.Hooks.Hold()
	defer release()
	if err := e.opt.Hooks.StopSandbox(ctx, s.view()); err != nil {
		e.log.Warn("a plugin failed over the stop of a sandbox", "sandbox", s.id, "error", err)
	}
}

// tellRemove tells once that a sandbox is gone.
func (e *Engine) tellRemove(ctx context.Context, s *sandbox) {
	if e.opt.Hooks == nil {
		return
	}
	ctx = context.WithoutCancel(ctx)
	e.tellStop(ctx, s)
	release := e.opt.Hooks.Hold()
	defer release()
	if !e.told.dropSandbox(s) {
		return
	}
	if err := e.opt.Hooks.RemoveSandbox(ctx, s.view()); err != nil {
		e.log.Warn("a plugin failed over the removal of a sandbox", "sandbox", s.id, "error", err)
	}
}

// tellCreate asks how a container shall be, which nobody knows of yet, and changes it. The
// updates of others that were asked for come back.
func (e *Engine) tellCreate(ctx context.Context, c *container, s *sandbox) ([]ContainerUpdate, error) {
	if e.addUnheard(c) {
		return nil, nil
	}
	v := c.rec.Container // nobody else changes it
	spec, err := e.hookSpec(v)
	if err != nil {
		return nil, err
	}
	c.spec = trimmed(spec)
	adj, updates, err := e.askCreate(ctx, c, s, spec)
	if err != nil {
		return nil, refused("create container "+v.Name, err)
	}
	wrong := func(err error) error {
		return fmt.Errorf("create container %s: adjustment by a plugin: %w", v.Name, err)
	}
	if err := e.adjust(&v, s.rec.Config, adj); err != nil {
		return nil, wrong(err)
	}
	if spec, err = e.hookSpec(v); err != nil {
		return nil, wrong(err)
	}
	c.mu.Lock()
	c.rec.Container, c.spec = v, trimmed(spec)
	c.mu.Unlock()
	return updates, nil
}

// addUnheard makes a container known, if nobody listens who could have a say.
func (e *Engine) addUnheard(c *container) bool {
	release := e.opt.Hooks.Hold()
	defer release()
	if !e.opt.Hooks.Idle() {
		return false
	}
	e.told.addContainer(c)
	return true
}

func (e *Engine) askCreate(ctx context.Context, c *container, s *sandbox, spec *specs.Spec) (Adjustment, []ContainerUpdate, error) {
	release := e.opt.Hooks.Hold()
	defer release()
	e.told.addContainer(c)
	return e.opt.Hooks.CreateContainer(ctx, s.view(), HookContainer{c.view(), spec})
}

// tellResize asks whether the limits of a pod may change, tellResized tells that they did.
func (e *Engine) tellResize(ctx context.Context, s *sandbox, overhead, resources *Resources) error {
	if e.opt.Hooks == nil {
		return nil
	}
	release := e.opt.Hooks.Hold()
	defer release()
	if err := e.opt.Hooks.UpdateSandbox(ctx, s.view(), overhead, resources); err != nil {
		return refused("update sandbox "+s.id, err)
	}
	return nil
}

func (e *Engine) tellResized(ctx context.Context, s *sandbox) {
	if e.opt.Hooks == nil {
		return
	}
	ctx = context.WithoutCancel(ctx)
	release := e.opt.Hooks.Hold()
	defer release()
	if err := e.opt.Hooks.PostUpdateSandbox(ctx, s.view()); err != nil {
		e.log.Warn("a plugin failed over the update of a sandbox", "sandbox", s.id, "error", err)
	}
}

// tellPost tells of what has been done. Nothing follows from an error.
func (e *Engine) tellPost(ctx context.Context, c *container, what string, tell func(Hooks, context.Context, Sandbox, HookContainer) error) {
	s, ok := e.hooked(c)
	if !ok {
		return
	}
	ctx = context.WithoutCancel(ctx)
	release := e.opt.Hooks.Hold()
	defer release()
	if e.opt.Hooks.Idle() {
		return
	}
	if err := tell(e.opt.Hooks, ctx, s.view(), e.hookView(c)); err != nil {
		e.log.Warn("a plugin failed over "+what, "container", c.id, "error", err)
	}
}

// hooked gives the sandbox of a container whose life is told.
func (e *Engine) hooked(c *container) (*sandbox, bool) {
	p := c.rec.Config.Pod // never changes its sandbox
	if e.opt.Hooks == nil || p == nil {
		return nil, false
	}
	e.told.mu.Lock()
	defer e.told.mu.Unlock()
	if _, known := e.told.containers[c.id]; !known {
		return nil, false
	}
	if s := e.told.sandboxes[p.Sandbox]; s != nil {
		return s, true
	}
	// The pod is gone, the container not yet.
	return newSandbox(sandboxRecord{ID: p.Sandbox}), true
}

func (e *Engine) tellStart(ctx context.Context, c *container) error {
	s, ok := e.hooked(c)
	if !ok {
		return nil
	}
	release := e.opt.Hooks.Hold()
	defer release()
	if e.opt.Hooks.Idle() {
		return nil
	}
	if err := e.opt.Hooks.StartContainer(ctx, s.view(), e.hookView(c)); err != nil {
		return refused("start container "+c.id, err)
	}
	return nil
}

// tellEnd tells once that a container has stopped.
func (e *Engine) tellEnd(ctx context.Context, c *container) {
	s, ok := e.hooked(c)
	if !ok {
		return
	}
	ctx = context.WithoutCancel(ctx)
	c.mu.Lock()
	first := !c.toldStop
	c.toldStop = true
	c.mu.Unlock()
	if !first {
		return
	}
	release := e.opt.Hooks.Hold()
	var updates []ContainerUpdate
	var err error
	if !e.opt.Hooks.Idle() {
		updates, err = e.opt.Hooks.StopContainer(ctx, s.view(), e.hookView(c))
	}
	release()
	if err != nil {
		e.log.Warn("a plugin failed over the end of a container", "container", c.id, "error", err)
	}
	if len(updates) > 0 {
		e.work.Go(func() { // beside the ticket of this container
			if err := e.applyUpdates(updates); err != nil {
				e.log.Warn("update containers after the end of one", "container", c.id, "error", err)
			}
		})
	}
}

// tellGone tells once that a container is no more.
func (e *Engine) tellGone(ctx context.Context, c *container) {
	s, ok := e.hooked(c)
	if !ok {
		return
	}
	ctx = context.WithoutCancel(ctx)
	e.tellEnd(ctx, c)
	release := e.opt.Hooks.Hold()
	defer release()
	if !e.told.dropContainer(c) || e.opt.Hooks.Idle() {
		return
	}
	if err := e.opt.Hooks.RemoveContainer(ctx, s.view(), e.hookView(c)); err != nil {
		e.log.Warn("a plugin failed over the removal of a container", "container", c.id, "error", err)
	}
}

// tellUpdate asks how a container's limits shall change. The updates of other containers
// come back, too.
func (e *Engine) tellUpdate(ctx context.Context, c *container, r Resources) (Resources, []ContainerUpdate, error) {
	s, ok := e.hooked(c)
	if !ok {
		return r, nil, nil
	}
	release := e.opt.Hooks.Hold()
	defer release()
	if e.opt.Hooks.Idle() {
		return r, nil, nil
	}
	updates, err := e.opt.Hooks.UpdateContainer(ctx, s.view(), e.hookView(c), r)
	if err != nil {
		return r, nil, refused("update container "+c.id, err)
	}
	var others []ContainerUpdate
	for _, u := range updates {
		if u.ID == c.id {
			r = u.Resources
		} else {
			others = append(others, u)
		}
	}
	return r, others, nil
}

// hookView is a container as hooks are shown it. Its configuration is made when it is first asked for.
func (e *Engine) hookView(c *container) HookContainer {
	for {
		v := HookContainer{Container: c.view()}
		c.mu.Lock()
		known, limits := c.spec, c.limits
		c.mu.Unlock()
		if known == nil {
			spec, err := e.hookSpec(v.Container)
			if err != nil {
				e.log.Debug("a container is shown to plugins without its configuration", "container", c.id, "error", err)
				return v
			}
			known = trimmed(spec)
			c.mu.Lock()
			stale := c.limits != limits
			if !stale {
				c.spec = known
			}
			c.mu.Unlock()
			if stale {
				continue
			}
		}
		v.Spec = known
		return v
	}
}

// hookSpec makes the configuration of a container for the eyes of hooks.
func (e *Engine) hookSpec(v Container) (*specs.Spec, error) {
	in := specInput{C: v, Host: e.host, Hostname: v.Hostname, Shown: true}
	if err := e.joinPod(e.ctx, &in); err != nil {
		return nil, err
	}
	if p := v.Config.Pod; p.User != nil {
		in.Account = account{UID: p.User.UID, GID: p.User.GID, Groups: p.User.Groups, Home: p.User.Home}
	}
	var err error
	if in.Devices, in.DevRules, err = lookupDevices(v.Config); err != nil {
		return nil, err
	}
	if in.Throttle, err = lookupBlocks(v.Config.Resources); err != nil {
		return nil, err
	}
	in.CgroupPath = cgroupsPath(e.opt.CgroupDriver, v.Config.Resources.CgroupParent, v.ID)
	for _, m := range v.Mounts {
		src := m.Resolved
		if m.Kind == MountImage {
			src = m.Source // there is no path of the host
		}
		in.Mounts = append(in.Mounts, specMount(m, src, e.host))
	}
	return buildSpec(in)
}

// trimmed is a configuration without what is big and of no interest after the creation.
func trimmed(s *specs.Spec) *specs.Spec {
	t := *s
	if s.Linux != nil {
		l := *s.Linux
		l.Seccomp = nil
		t.Linux = &l
	}
	return &t
}

// withLimits is a configuration with other limits.
func withLimits(s *specs.Spec, r Resources, oomScoreAdj int) *specs.Spec {
	if s == nil || s.Linux == nil || s.Process == nil {
		return s
	}
	t, l, p := *s, *s.Linux, *s.Process
	p.OOMScoreAdj = &oomScoreAdj
	old := l.Resources
	l.Resources = linuxResources(r, nil)
	if old != nil {
		l.Resources.Devices, l.Resources.BlockIO = old.Devices, old.BlockIO
	}
	t.Linux, t.Process = &l, &p
	return &t
}

// over lays entries over a map, in a new one. nil stays nil.
func over[V any](have, add map[string]V) map[string]V {
	if add == nil {
		return nil
	}
	out := maps.Clone(have)
	if out == nil {
		out = map[string]V{}
	}
	maps.Copy(out, add)
	return out
}

// Hooked lists the sandboxes and containers that the hooks know of, except those that have
// stopped. It is called between a Hold of the listener and its first event.
func (e *Engine) Hooked(context.Context) (pods []Sandbox, members []HookContainer) {
	e.told.mu.Lock()
	sandboxes, containers := make([]*sandbox, 0, len(e.told.sandboxes)), make([]*container, 0, len(e.told.containers))
	for _, s := range e.told.sandboxes {
		sandboxes = append(sandboxes, s)
	}
	for _, c := range e.told.containers {
		containers = append(containers, c)
	}
	e.told.mu.Unlock()
	known := map[string]bool{}
	for _, s := range sandboxes {
		s.mu.Lock()
		stopped := s.toldStop
		s.mu.Unlock()
		if !stopped {
			known[s.id] = true
			pods = append(pods, s.view())
		}
	}
	for _, c := range containers {
		v := e.hookView(c)
		c.mu.Lock()
		stopped := c.toldStop
		c.mu.Unlock()
		if !stopped && known[v.Config.Pod.Sandbox] && (v.State.Status == StatusCreated || v.State.live()) {
			members = append(members, v)
		}
	}
	return pods, members
}

// takeHooked makes what a daemon before this one has left known to the hooks.
func (e *Engine) takeHooked() {
	if e.opt.Hooks == nil {
		return
	}
	for _, s := range e.pods.all() {
		s.mu.Lock()
		s.toldStop = s.state == SandboxNotReady && s.live.Version == 0
		s.mu.Unlock()
		e.told.addSandbox(s)
	}
	for _, c := range e.containers.all() {
		v := c.view()
		if v.Config.Pod == nil {
			continue
		}
		c.mu.Lock()
		c.toldStop = v.State.Status != StatusCreated && !v.State.live()
		c.mu.Unlock()
		e.told.addContainer(c)
	}
}

// updateLimit bounds an update that a plugin asks for.
const updateLimit = 10 * time.Second

// applyUpdates changes the limits of containers as plugins ask. It goes on after a failure.
func (e *Engine) applyUpdates(updates []ContainerUpdate) error {
	for i, u := range updates {
		if err := e.applyUpdate(u); err != nil && !u.IgnoreFailure {
			if rest := e.applyUpdates(updates[i+1:]); rest != nil {
				e.log.Warn("update containers as plugins ask", "error", rest)
			}
			return err
		}
	}
	return nil
}

func (e *Engine) applyUpdate(u ContainerUpdate) error {
	ctx, cancel := context.WithTimeout(e.ctx, updateLimit)
	defer cancel()
	c, err := e.containers.get(u.ID)
	if err != nil {
		return fmt.Errorf("update container as a plugin asks: %w", err)
	}
	if c.rec.Config.Pod == nil {
		return notFoundf("container %q is in no pod", u.ID)
	}
	if err := c.acquire(ctx); err != nil {
		return fmt.Errorf("update container %s: %w", u.ID, err)
	}
	defer c.release()
	have, r := c.view().Config.Resources, u.Resources
	r.Hugepages, r.Unified = over(have.Hugepages, r.Hugepages), over(have.Unified, r.Unified)
	return e.updateMember(e.ns(ctx), c, r, nil)
}

// UpdateHooked changes the limits of containers as a plugin asks out of its own. The updates
// that failed come back, joined to an error if there is one that may not fail.
func (e *Engine) UpdateHooked(_ context.Context, updates []ContainerUpdate) (failed []ContainerUpdate, err error) {
	for _, u := range updates {
		if uerr := e.applyUpdate(u); uerr != nil {
			e.log.Warn("update a container as a plugin asks", "container", u.ID, "error", uerr)
			failed = append(failed, u)
			if !u.IgnoreFailure && err == nil {
				err = uerr
			}
		}
	}
	return failed, err
}

// Evict stops a container of a pod as a plugin asks, with the signal and grace of a stop.
func (e *Engine) Evict(ctx context.Context, id, reason string) error {
	v, err := e.Container(ctx, id)
	if err != nil {
		return fmt.Errorf("evict container: %w", err)
	}
	if v.Config.Pod == nil {
		return notFoundf("container %q is in no pod", id)
	}
	e.log.Info("a plugin evicts a container", "container", v.ID, "reason", reason)
	if err := e.StopContainer(ctx, v.ID, StopOptions{}); err != nil && !errdefs.IsNotModified(err) {
		return fmt.Errorf("evict container %s: %w", v.ID, err)
	}
	return nil
}
