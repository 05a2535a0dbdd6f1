package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/shim/client"
)

// CreatePodContainer makes a container in a sandbox. A request for the same one that is
// under way is joined; one that has been cancelled leaves nothing.
func (e *Engine) CreatePodContainer(ctx context.Context, sandboxRef string, c Config) (string, error) {
	s, err := e.pods.get(sandboxRef)
	if err != nil {
		return "", err
	}
	if c.Pod == nil || c.Pod.Name == "" {
		return "", invalidf("a container of a pod takes a name")
	}
	if err := s.requireReady("create a container"); err != nil {
		return "", err
	}
	p := *c.Pod
	p.Sandbox = s.id
	c.Pod = &p
	if err := e.adaptToPod(&c, s); err != nil {
		return "", err
	}
	request, err := json.Marshal(c)
	if err != nil {
		return "", fmt.Errorf("create container: %w", err)
	}
	name := memberName(s.rec.Config, p)
	m, err := e.pods.creates.do(ctx, e.work.Go, operation[*newMember]{
		key: name, request: request,
		run: func(ctx context.Context) (*newMember, error) {
			if !s.hasShim() {
				e.work.Go(func() { e.warmShim(e.ctx, s) })
			}
			return e.makeContainer(e.ns(ctx), name, c, s)
		},
		keep:  e.publish,
		alive: func(m *newMember) bool { _, err := e.containers.get(m.c.id); return err == nil },
		drop: func(m *newMember) {
			e.publish(m)
			if err := e.RemovePodContainer(context.Background(), m.c.id); err != nil {
				e.log.Error("remove a container that nobody came for", "container", m.c.id, "error", err)
			}
		},
	})
	var conflict *classed
	switch {
	case errors.Is(err, errOtherRequest):
		return "", failedf("failed to reserve container name %q: another request holds it", name)
	case errors.As(err, &conflict) && errdefs.IsConflict(err):
		return "", failedf("failed to reserve container name %q: %s", name, conflict.text)
	case err != nil:
		return "", err
	}
	// A sandbox that is removed takes its containers along. The removal lists them when its state says so: either it
	// has seen this one, or the state is seen here.
	if s.removed() {
		_ = e.RemovePodContainer(context.WithoutCancel(ctx), m.c.id)
		return "", notFoundf("sandbox %q not found", sandboxRef)
	}
	m.told.Do(func() { e.tellPost(e.ns(ctx), m.c, "a new container", Hooks.PostCreateContainer) })
	return m.c.id, nil
}

// warmShim starts the shim of a sandbox ahead: while its first container is being made, or before that while its network is, if that
// takes long.
func (e *Engine) warmShim(ctx context.Context, s *sandbox) {
	ctx, cancel := context.WithTimeout(ctx, connectLimit)
	defer cancel()
	if _, err := e.podShim(ctx, s); err != nil {
		e.log.Debug("start a shim ahead", "sandbox", s.id, "error", err) // the start of the container says it
	}
}

// StartPodContainer starts a container of a pod, which is done once. A request that is
// under way is joined.
func (e *Engine) StartPodContainer(ctx context.Context, ref string) error {
	c, err := e.containers.get(ref)
	if err != nil {
		return err
	}
	_, err = e.pods.starts.do(context.WithoutCancel(ctx), e.work.Go, operation[struct{}]{
		key: c.id,
		run: func(ctx context.Context) (struct{}, error) {
			if s := c.status(); s != StatusCreated {
				return struct{}{}, failedf("container %s is %s, not created", c.id, s)
			}
			return struct{}{}, e.StartContainer(ctx, c.id)
		},
		keep:  func(struct{}) {},
		drop:  func(struct{}) {},
		alive: func(struct{}) bool { return false },
	})
	return err
}

// notInName is what a container's name may not hold.
var notInName = regexp.MustCompile(`[^a-zA-Z0-9_.-]+`)

// memberName is the name of a pod's container among all containers: the one that Docker's
// users know from the kubelet of old. What no name may hold is replaced, and a checksum keeps it unique.
func memberName(c SandboxConfig, p PodMember) string {
	raw := fmt.Sprintf("k8s_%s_%s_%s_%s_%d", p.Name, c.Name, c.Namespace, c.UID, p.Attempt)
	name := notInName.ReplaceAllString(raw, "-")
	if name != raw || c.Attempt != 0 || len(name) > 200 {
		h := fnv.New64a()
		fmt.Fprintf(h, "%q %d", raw, c.Attempt)
		name = fmt.Sprintf("%s_%x", name[:min(len(name), 200)], h.Sum64())
	}
	return name
}

// adaptToPod sets what is the same for all containers of a sandbox, and checks the rest.
func (e *Engine) adaptToPod(c *Config, s *sandbox) error {
	sc, p := s.rec.Config, c.Pod
	c.Runtime = sc.Runtime
	c.Healthcheck = &Healthcheck{Test: []string{"NONE"}} // the kubelet probes
	c.NetworkMode, c.IpcMode, c.CgroupnsMode = "container:"+s.id, "container:"+s.id, "host"
	if sc.Network == NamespaceNode {
		c.NetworkMode, c.UTSMode = "host", "host"
	}
	if sc.IPC == NamespaceNode {
		c.IpcMode = "host"
	}
	if e.host.CgroupV2 && !c.Privileged {
		c.CgroupnsMode = "private"
	}
	c.Resources.CgroupParent = cgroupParent(e.opt.CgroupDriver, e.podCgroup(s.id, sc))
	c.Log = LogConfig{Driver: "none"}
	switch p.PID {
	case NamespaceContainer:
	case NamespacePod:
		// A pod that shares no PID namespace has none to share.
		if sc.PID != NamespacePod {
			return invalidf("container %q asks for the PID namespace of the pod, which has none", p.Name)
		}
		c.PidMode = "container:" + s.id
	case NamespaceNode:
		if sc.PID != NamespaceNode {
			return invalidf("container %q asks for the host's PID namespace, its pod does not", p.Name)
		}
		c.PidMode = "host"
	case NamespaceTarget:
		t, err := e.containers.get(p.PIDTarget)
		if err != nil {
			return fmt.Errorf("target of container %q: %w", p.Name, err)
		}
		tp := t.view().Config.Pod
		if tp == nil || tp.Sandbox != s.id {
			return invalidf("target %s of container %q is not in its pod", p.PIDTarget, p.Name)
		}
		p.PIDTarget = t.id
		c.PidMode = "container:" + t.id
	default:
		return invalidf("invalid PID namespace %q", p.PID)
	}
	if c.Privileged && !sc.Privileged {
		return invalidf("container %q cannot be privileged in a pod that is not", p.Name)
	}
	if p.RunAsGroup != nil && p.RunAsUser == nil && p.RunAsUserName == "" {
		return invalidf("container %q asks for group %d without a user", p.Name, *p.RunAsGroup)
	}
	for _, id := range append([]int64{deref(p.RunAsUser), deref(p.RunAsGroup)}, p.Groups...) {
		if id < 0 || id > math.MaxInt32 {
			return invalidf("id %d of container %q is out of range", id, p.Name)
		}
	}
	if err := annotatedCDI(c); err != nil {
		return err
	}
	if err := e.checkCDI(p.CDIDevices); err != nil {
		return err
	}
	if err := e.labelMember(p, s, c.Privileged); err != nil {
		return err
	}
	if _, err := capabilities(false, p.AmbientCaps, nil); err != nil {
		return err
	}
	for i := range c.Mounts {
		if err := checkPropagation(c.Mounts[i]); err != nil {
			return err
		}
		if m := c.Mounts[i]; m.Kind == MountBind && m.ReadOnly && !m.ReadOnlyNonRecur && !e.recursiveReadOnly(c.Runtime) {
			return invalidf("RROUnsupported: mount %s cannot be made read-only with all that is mounted below it", m.Target)
		}
	}
	return nil
}

// recursiveReadOnly tells whether containers on a runtime can have mounts that are read-only with all below. Of
// foreign runtimes it is not known.
func (e *Engine) recursiveReadOnly(runtime string) bool {
	return (runtime == "" || runtime == "hako") && e.host.kernelAtLeast(5, 12) // mount_setattr(2)
}

func deref(p *int64) int64 {
	if p == nil {
		return 0
	}
	return *p
}

// placeInPod fills in what a container has from its sandbox.
func (e *Engine) placeInPod(v *Container, s *sandbox) {
	dir := e.sandboxDir(s.id)
	v.Hostname = e.podHostname(s.rec.Config)
	v.LogPath = v.Config.Pod.LogPath
	v.HostnamePath = filepath.Join(dir, "hostname")
	v.HostsPath = filepath.Join(dir, "hosts")
	v.ResolvPath = filepath.Join(dir, "resolv.conf")
}

// imageAccounts reads the account files of a container that has just been made: those of its image.
func (e *Engine) imageAccounts(v *Container, mounts []mount.Mount) (accounts, error) {
	root, err := openMounts(mounts, false)
	if err != nil {
		return accounts{}, fmt.Errorf("open file system of container %s: %w", v.ID, err)
	}
	defer root.Close()
	acs, err := readAccounts(root)
	if err == nil {
		e.accounts.add(v.ImageID, acs)
	}
	return acs, err
}

// checkMember finds whom a container that is being made runs as, and makes sure that the start can be
// asked for what it was given.
func (e *Engine) checkMember(v *Container, acs accounts) error {
	acc, err := acs.resolveMember(v.User, *v.Config.Pod)
	if err != nil {
		return err
	}
	p := *v.Config.Pod
	p.User = &PodUser{UID: acc.UID, GID: acc.GID, Groups: acc.Groups, Home: acc.Home}
	v.Config.Pod = &p
	_, _, err = lookupDevices(v.Config)
	return err
}

// mapRoot gives the file system of a new container to its user namespace, if it has one.
func mapRoot(v *Container, s *sandbox, mounts []mount.Mount) error {
	u := s.rec.Config.Userns
	if u == nil {
		return nil
	}
	if err := chownRoot(mounts, u); err != nil {
		return fmt.Errorf("give the file system of container %s to its user namespace: %w", v.ID, err)
	}
	return nil
}

// chownRoot gives the writable layer of a new container to the root of its user namespace:
// the layers below are mapped when they are mounted, the writable one is not.
func chownRoot(mounts []mount.Mount, u *Userns) error {
	for _, m := range mounts {
		if m.Type != "overlay" {
			continue // plain copies are mapped as a whole
		}
		d, err := parseOverlay(m.Options)
		if err != nil {
			return err
		}
		if err := os.Lchown(d.upper, int(u.UIDs[0].Host), int(u.GIDs[0].Host)); err != nil {
			return err
		}
	}
	return nil
}

// resolveMember finds the user of a pod's container: the one asked for, or the image's.
func (a accounts) resolveMember(image string, p PodMember) (account, error) {
	user, group, _ := strings.Cut(image, ":")
	switch {
	case p.RunAsUserName != "":
		user, group = p.RunAsUserName, ""
	case p.RunAsUser != nil:
		user, group = strconv.FormatInt(*p.RunAsUser, 10), ""
	}
	if p.RunAsGroup != nil {
		group = strconv.FormatInt(*p.RunAsGroup, 10)
	}
	acc, err := a.resolve(user, nil) // with the groups that the image gives to the user
	if err != nil {
		return acc, err
	}
	more := acc.Groups[1:]
	if p.StrictGroups {
		more = nil
	}
	if group != "" {
		if acc.GID, err = a.groupID(group); err != nil {
			return acc, err
		}
	}
	acc.Groups = []uint32{acc.GID}
	for _, g := range p.Groups {
		more = append(slices.Clip(more), uint32(g))
	}
	for _, g := range more {
		if !slices.Contains(acc.Groups, g) {
			acc.Groups = append(acc.Groups, g)
		}
	}
	return acc, nil
}

// joinPod fills in what a container shares with its sandbox.
func (e *Engine) joinPod(ctx context.Context, in *specInput) error {
	p := in.C.Config.Pod
	s, err := e.pods.get(p.Sandbox)
	if err != nil {
		return err
	}
	if err := s.requireReady("start a container"); err != nil {
		return err
	}
	dir, sc := e.sandboxDir(s.id), s.rec.Config
	in.Pod = &podInput{ID: s.id, Config: sc}
	in.NetShared = true
	in.ResolvConf, in.HostsFile, in.HostnameFile = in.C.ResolvPath, in.C.HostsPath, in.C.HostnamePath
	if sc.Network == NamespaceNode {
		in.NetHost = true
	} else {
		s.mu.Lock()
		in.NetNS = s.live.NetNS
		s.mu.Unlock()
		in.UTSNS = nsPath(dir, "uts")
	}
	if sc.IPC != NamespaceNode {
		in.IpcNS, in.ShmPath = nsPath(dir, "ipc"), filepath.Join(dir, "shm")
	}
	if sc.Userns != nil {
		in.Pod.UserNS = nsPath(dir, "user")
	}
	switch p.PID {
	case NamespacePod:
		in.PidNS = nsPath(dir, "pid")
	case NamespaceTarget:
		t, err := e.containers.get(p.PIDTarget)
		if err != nil {
			return err
		}
		if in.Shown {
			r, err := t.live("use")
			if err != nil {
				return err
			}
			in.PidNS = fmt.Sprintf("/proc/%d/ns/pid", r.pid.Load())
			break
		}
		f, err := openPIDNamespace(ctx, t)
		if err != nil {
			return failedf("cannot join the PID namespace of container %s, which does not run", t.id)
		}
		in.Pod.held = append(in.Pod.held, f)
		in.PidNS = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
	}
	return nil
}

// openPIDNamespace opens the PID namespace of a running container: as a file, so that another
// process that gets the number of one that ends meanwhile cannot take its place.
func openPIDNamespace(ctx context.Context, c *container) (*os.File, error) {
	r, err := c.live("use")
	if err != nil {
		return nil, err
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/pid", r.pid.Load()))
	if err != nil {
		return nil, err
	}
	// The shim reaps it only after its exit: as long as the run goes on the number was its own.
	if st, serr := r.shim.get().State(ctx, c.id, ""); serr != nil || st.Status != client.StatusRunning && st.Status != client.StatusPaused {
		f.Close()
		return nil, fmt.Errorf("container %s: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	return f, nil
}

// logConfig tells the shim how to log.
func (v *Container) logConfig() (client.LogConfig, error) {
	if p := v.Config.Pod; p != nil {
		if p.LogPath == "" {
			return client.LogConfig{}, nil
		}
		return client.LogConfig{Format: "cri", Path: p.LogPath}, nil
	}
	return v.Config.logConfig(v.LogPath, v)
}

// ReopenLog opens the log file of a running container anew, after the caller has renamed it.
func (e *Engine) ReopenLog(ctx context.Context, ref string) error {
	c, err := e.containers.get(ref)
	if err != nil {
		return err
	}
	r, err := c.live("use")
	if err != nil {
		return failedf("container %s is not running", c.id)
	}
	if err := r.shim.get().ReopenLog(ctx, c.id, ""); err != nil {
		return fmt.Errorf("reopen the log of container %s: %w", c.id, err)
	}
	return nil
}

// checkPropagation refuses a propagation that the mount of the source does not have.
func checkPropagation(m Mount) error {
	if m.Kind != MountBind {
		return nil
	}
	want := strings.TrimPrefix(m.Propagation, "r")
	if want != "shared" && want != "slave" {
		return nil
	}
	path, err := filepath.EvalSymlinks(m.Source)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it is going to be made
	} else if err != nil {
		return invalidf("mount of %s: %v", m.Source, err)
	}
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("propagation of %s: %w", path, err)
	}
	point, options := mountOf(string(raw), path)
	shared := slices.ContainsFunc(options, func(o string) bool { return strings.HasPrefix(o, "shared:") })
	slave := slices.ContainsFunc(options, func(o string) bool { return strings.HasPrefix(o, "master:") })
	if shared || want == "slave" && slave {
		return nil
	}
	return invalidf("path %s is mounted on %s but it is not a %s mount", m.Source, point, map[string]string{"shared": "shared", "slave": "shared or slave"}[want])
}

// mountOf finds the mount that a path lies on, with its optional fields (proc_pid_mountinfo(5)).
func mountOf(mountinfo, path string) (point string, options []string) {
	for line := range strings.Lines(mountinfo) {
		pre, _, ok := strings.Cut(line, " - ")
		f := strings.Fields(pre)
		if !ok || len(f) < 6 {
			continue
		}
		p := unescapeMount(f[4])
		// The last one of equal length is on top.
		if (p == "/" || path == p || strings.HasPrefix(path, p+"/")) && len(p) >= len(point) {
			point, options = p, f[6:]
		}
	}
	return point, options
}

// mergePodResources lays new limits over those of a pod's container.
func mergePodResources(old, r Resources) Resources {
	merged := mergeResources(old, r)
	if r.Hugepages != nil {
		merged.Hugepages = r.Hugepages
	}
	if r.Unified != nil { // each file by itself
		merged.Unified = map[string]string{}
		maps.Copy(merged.Unified, old.Unified)
		maps.Copy(merged.Unified, r.Unified)
	}
	return merged
}

// UpdatePodContainer changes the limits of a pod's container: all or none. Zero limits, and a
// nil score, stay as they are. Of one that has ended nothing is changed, and that is no error.
func (e *Engine) UpdatePodContainer(ctx context.Context, ref string, r Resources, oomScoreAdj *int) error {
	c, err := e.containers.get(ref)
	if err != nil {
		return err
	}
	others, err := e.updateAsked(ctx, c, r, oomScoreAdj)
	if err != nil {
		return err
	}
	return e.applyUpdates(others)
}

// updateAsked changes the limits of a container as the hooks would have it, and gives the
// updates of other containers that they ask for.
func (e *Engine) updateAsked(ctx context.Context, c *container, r Resources, oomScoreAdj *int) (others []ContainerUpdate, err error) {
	if err := c.acquire(ctx); err != nil {
		return nil, fmt.Errorf("update container %s: %w", c.id, err)
	}
	defer c.release()
	if v := c.view(); v.State.Status != StatusCreated && !v.State.live() {
		return nil, nil
	}
	if r, others, err = e.tellUpdate(ctx, c, r); err != nil {
		return nil, err
	}
	if err := e.updateMember(ctx, c, r, oomScoreAdj); err != nil {
		return nil, err
	}
	e.tellPost(ctx, c, "the update of a container", Hooks.PostUpdateContainer)
	return others, nil
}

// updateMember changes the limits of a container whose ticket the caller holds.
func (e *Engine) updateMember(ctx context.Context, c *container, r Resources, oomScoreAdj *int) error {
	v := c.view()
	if s := v.State.Status; s != StatusCreated && !v.State.live() {
		return nil
	}
	if err := r.validatePod(); err != nil {
		return err
	}
	if n := oomScoreAdj; n != nil && (*n < -1000 || *n > 1000) {
		return invalidf("update container %s: oom_score_adj %d is not between -1000 and 1000", c.id, *n)
	}
	merged := mergePodResources(v.Config.Resources, r)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), changeLimit)
	defer cancel()
	if run, err := c.live("use"); err == nil {
		if err := run.shim.get().Update(ctx, c.id, linuxResources(e.host.applicable(merged), nil)); err != nil {
			return fmt.Errorf("update container %s: %w", c.id, err)
		}
		if oomScoreAdj != nil {
			adj := e.host.possibleOOMScore(*oomScoreAdj)
			path := fmt.Sprintf("/proc/%d/oom_score_adj", run.pid.Load())
			if err := os.WriteFile(path, []byte(strconv.Itoa(adj)), 0); err != nil {
				// The limits go back to what they were.
				old := run.shim.get().Update(context.WithoutCancel(ctx), c.id, linuxResources(e.host.applicable(v.Config.Resources), nil))
				return errors.Join(fmt.Errorf("update container %s: %w", c.id, err), old)
			}
		}
	}
	c.mu.Lock()
	c.rec.Config.Resources = merged
	if oomScoreAdj != nil {
		c.rec.Config.OOMScoreAdj = *oomScoreAdj
	}
	c.spec = withLimits(c.spec, merged, c.rec.Config.OOMScoreAdj)
	c.limits++
	c.mu.Unlock()
	if err := e.save(ctx, c); err != nil {
		return fmt.Errorf("update container %s: %w", c.id, err)
	}
	e.emit(c, "update")
	return nil
}

// removalPoll is how often a removal that somebody else is at is looked after.
const removalPoll = 20 * time.Millisecond

// RemovePodContainer kills and removes a container. It is idempotent: a removal that is under
// way is waited for, and of a container that is gone it is no error.
func (e *Engine) RemovePodContainer(ctx context.Context, ref string) error {
	for {
		err := e.RemoveContainer(ctx, ref, RemoveOptions{Force: true, Volumes: true})
		switch {
		case err == nil, errdefs.IsNotFound(err):
			return nil
		case !errdefs.IsConflict(err):
			return err
		}
		select {
		case <-time.After(removalPoll):
		case <-ctx.Done():
			return fmt.Errorf("remove container %s: %w", ref, context.Cause(ctx))
		}
	}
}
