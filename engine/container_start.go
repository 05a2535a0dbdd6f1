package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/durable"
	"github.com/hako-engine/hako/internal/errtext"
	"github.com/hako-engine/hako/internal/safepath"
	"github.com/hako-engine/hako/internal/undo"
	"github.com/hako-engine/hako/network"
	"github.com/hako-engine/hako/shim/client"
)

// startLimit bounds a whole start: a client that went away does not end it, but a
// stuck room must not hold the container's ticket for ever.
const startLimit = 2 * time.Minute

// Exit codes that Docker gives to a container that could not be started.
const (
	exitNotFound     = 127
	exitNotRunnable  = 126
	exitStartFailure = 128
)

// StartContainer starts a container that does not run.
func (e *Engine) StartContainer(ctx context.Context, ref string) error {
	c, g, err := e.lookup(ctx, ref)
	if err != nil {
		return err
	}
	if g != nil {
		if g.live() {
			return notModifiedf("container %s is already running", g.rec.ID)
		}
		return g.foreignTo("start")
	}
	if err := c.acquire(ctx); err != nil {
		return fmt.Errorf("start container %s: %w", ref, err)
	}
	defer c.release()
	if err := c.require("start"); err != nil {
		return err
	}
	c.mu.Lock()
	c.rec.StoppedByUser = false
	c.rec.RestartCount = 0
	c.failures = 0
	if c.restartCancel != nil {
		c.restartCancel()
		c.restartCancel = nil
	}
	c.mu.Unlock()
	return e.startHeld(ctx, c)
}

// startHeld starts a container whose ticket the caller holds, and leaves it as
// Docker does when that fails.
func (e *Engine) startHeld(ctx context.Context, c *container) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.ns(ctx)), startLimit)
	defer cancel()
	err := e.start(ctx, c)
	if err == nil {
		v := c.view()
		if !v.Config.AutoRemove {
			e.saveLater(c)
		}
		return nil
	}
	code, err := startError(err)
	c.mu.Lock()
	if c.rec.Config.Pod != nil {
		// A pod's container has one start: it has ended.
		code = exitStartFailure
		if c.changeLocked(StatusExited, func(s *State) { s.FinishedAt = time.Now().UTC() }) == nil {
			defer e.emit(c, "die", "exitCode", strconv.Itoa(code))
			defer e.tellEnd(ctx, c)
		}
	}
	c.rec.State.Error = errtext.Plain(err)
	c.rec.State.ExitCode = code
	pending := c.pending
	c.pending = nil
	auto := c.rec.Config.AutoRemove
	c.mu.Unlock()
	for _, p := range pending {
		p.resolve(nil)
	}
	if auto {
		e.background(func(ctx context.Context) {
			if err := e.RemoveContainer(ctx, c.id, RemoveOptions{Force: true, Volumes: true}); err != nil {
				e.log.Warn("remove container that could not be started", "container", c.id, "error", err)
			}
		})
	} else {
		e.saveLater(c)
	}
	return err
}

// startError gives Docker's exit code and text for a failed start.
func startError(err error) (code int, _ error) {
	text := err.Error()
	var fromTask *taskError
	if !errors.As(err, &fromTask) {
		return exitStartFailure, err
	}
	lower := strings.ToLower(text)
	has := func(s string) bool { return strings.Contains(lower, s) }
	switch {
	case has("executable file not found"), has("no such file or directory"):
		code = exitNotFound
	case has("permission denied"), has("is a directory"):
		code = exitNotRunnable
	case has("not a directory"):
		return exitNotFound, invalidf("%s: Are you trying to mount a directory onto a file (or vice-versa)? Check if the specified host path exists and is the expected type", text)
	default:
		return exitStartFailure, err
	}
	return code, invalidf("%s", text)
}

// taskError marks an error of the shim or runtime on the way to the process.
type taskError struct{ err error }

func (t *taskError) Error() string {
	return "failed to create task for container: " + errtext.Plain(t.err)
}
func (t *taskError) Unwrap() error { return t.err }

// start does it: what does not depend on each other runs side by side.
//
//	netns ─┬─ connect networks ─ write hosts, resolv.conf ─┐
//	       └─ spec, bundle ─ shim ─ create task ─ attach ──┴─ start task
func (e *Engine) start(ctx context.Context, c *container) (err error) {
	c.mu.Lock()
	want := c.rec.Networks
	c.mu.Unlock()
	v := c.view()
	for _, l := range v.Config.Links {
		ref, alias, ok := strings.Cut(l, ":")
		if !ok {
			alias = strings.TrimPrefix(ref, "/")
		}
		other, err := e.containers.get(ref)
		if err != nil {
			return badRequest(fmt.Errorf("could not get container for %s: %w", ref, err))
		}
		if o := other.view(); o.State.Pid == 0 {
			return conflictf("Cannot link to a non running container: /%s AS /%s/%s", o.Name, v.Name, alias)
		}
	}
	var u undo.Stack
	defer func() { err = errors.Join(err, u.Run(ctx)) }()

	sn := e.opt.Snapshotters[v.Snapshotter]
	if sn == nil {
		return notFoundf("snapshotter %q of container %s is not there any more", v.Snapshotter, v.ID)
	}
	mounts, err := sn.Mounts(ctx, v.SnapshotKey)
	if err != nil {
		return fmt.Errorf("mounts of container %s: %w", v.ID, err)
	}
	bundle := e.bundle(v.ID)
	if err := RemoveBundle(bundle); err != nil {
		return fmt.Errorf("clean bundle of container %s: %w", v.ID, err)
	}
	if err := os.Mkdir(bundle, 0o710); err != nil {
		return fmt.Errorf("make bundle of container %s: %w", v.ID, err)
	}
	u.Add("bundle", func(context.Context) error { return RemoveBundle(bundle) })

	drop, err := e.holdVolumes(ctx, v.Mounts, v.ID)
	if err != nil {
		return err
	}
	u.Add("mounts of volumes", drop)

	in := specInput{C: v, Host: e.host, Hostname: v.Hostname}
	if v.Config.Pod != nil {
		if err := e.joinPod(ctx, &in); err != nil {
			return err
		}
	} else if err := e.joinNamespaces(&in); err != nil {
		return err
	}
	sandbox := "" // the namespace that this container owns
	if !in.NetHost && in.NetNS == "" {
		if in.NetNS, err = e.opt.Networks.NewNetns(ctx, v.ID); err != nil {
			return fmt.Errorf("network namespace of container %s: %w", v.ID, err)
		}
		sandbox = in.NetNS
		u.Add("network namespace", func(ctx context.Context) error { return e.opt.Networks.DeleteNetns(ctx, sandbox) })
	}
	if !in.NetShared {
		if err := touchNetFiles(v); err != nil {
			return fmt.Errorf("files of container %s: %w", v.ID, err)
		}
	}

	var (
		endpoints []network.Endpoint
		shim      Shim
		pid       int
		memory    string
		done      func()
	)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		if v.Config.Pod != nil {
			return nil
		}
		if !in.NetShared {
			if endpoints, err = e.connectAll(gctx, v, want, in.NetNS); err != nil {
				return err
			}
		}
		return e.writeNetFiles(gctx, v, endpoints)
	})
	g.Go(func() (err error) {
		done, err = e.prepareBundle(&in, mounts, bundle)
		if err != nil {
			return err
		}
		if shim, err = e.shimFor(gctx, v); err != nil {
			return &taskError{fmt.Errorf("start shim: %w", err)}
		}
		log, err := v.logConfig()
		if err != nil {
			return err
		}
		// It is not given up where the network fails: what undoes it could overtake it.
		pid, err = shim.Create(ctx, client.CreateOptions{
			ID: v.ID, Bundle: bundle, Checkpoint: e.checkpointImages(v), Rootfs: rootfsMounts(mounts, in.Pod != nil && in.Pod.UserNS != ""),
			Stdio: client.Stdio{Terminal: v.Config.TTY, OpenStdin: v.Config.OpenStdin, StdinOnce: v.Config.StdinOnce, Log: log},
		})
		if err != nil {
			return &taskError{err}
		}
		memory = memoryCgroup(v, pid)
		return nil
	})
	err = g.Wait()
	if done != nil {
		defer done()
	}
	if shim != nil {
		u.Add("shim", func(ctx context.Context) error { return e.dropShim(ctx, v, shim) })
	}
	for _, ep := range endpoints {
		u.Add("network "+ep.NetworkName, func(ctx context.Context) error {
			return e.opt.Networks.Disconnect(ctx, ep.NetworkID, ep.ID)
		})
	}
	if err != nil {
		return err
	}

	shown := endpoints
	if len(shown) == 0 {
		shown = v.Endpoints
	}
	// Before the start: a daemon that is killed right after it must be known to have started
	// the container, and when. It is undone while the task is only created.
	started := time.Now().UTC()
	if err := writeRunFile(bundle, runFile{Pid: pid, StartedAt: started, Endpoints: shown, SandboxKey: sandbox}); err != nil {
		return fmt.Errorf("write state of container: %w", err)
	}
	if err := e.tellStart(ctx, c); err != nil {
		return err
	}
	c.connectPending(ctx, shim)
	if pid, err = shim.Start(ctx, v.ID, ""); err != nil {
		return &taskError{err}
	}
	r := newRun(shim, bundle, pid, started)
	r.memory = memory
	u.Release()
	c.mu.Lock()
	late := len(c.pending) > 0
	err = c.changeLocked(StatusRunning, func(s *State) {
		*s = State{Status: StatusRunning, Pid: pid, StartedAt: r.started, FinishedAt: s.FinishedAt}
		c.run = r
		c.rec.Started = true
		c.rec.SandboxKey = sandbox
		c.rec.Endpoints = shown
	})
	c.mu.Unlock()
	if err != nil { // impossible while the ticket is held
		return err
	}
	if late { // they came between the others and the start, and saw no run to attach to
		c.connectPending(ctx, shim)
	}
	for _, ep := range endpoints {
		e.emitFor("network", "connect", ep.NetworkID, "container", v.ID, "name", ep.NetworkName, "type", "bridge")
	}
	e.emit(c, "start")
	e.startHealth(c, r)
	e.work.Go(func() { e.watch(c, r) })
	if e.checkpointImages(v) != "" {
		e.background(func(context.Context) {
			if err := os.RemoveAll(e.restoreDir(v.ID)); err != nil {
				e.log.Error("remove the files that a container was restored from", "container", v.ID, "error", err)
			}
		})
	}
	e.tellPost(ctx, c, "the start of a container", Hooks.PostStartContainer)
	return nil
}

// shimFor gives the shim that shall hold a container: one of its own, or the pod's.
func (e *Engine) shimFor(ctx context.Context, v Container) (Shim, error) {
	p := v.Config.Pod
	if p == nil {
		if err := e.requireRuntime(v.Config.Runtime); err != nil {
			return nil, err
		}
		return e.opt.Shims.Start(ctx, e.shimOptions(v))
	}
	s, err := e.pods.get(p.Sandbox)
	if err != nil {
		return nil, err
	}
	return e.podShim(ctx, s)
}

// dropShim takes back a shim, with the task if there is one. The shim is asked: a creation that was given up, because
// something beside it failed, may be under way in it, and is waited for there.
func (e *Engine) dropShim(ctx context.Context, v Container, shim Shim) error {
	defer shim.Close()
	if err := removeRunFile(e.bundle(v.ID)); err != nil {
		e.log.Error("undo the start of a container", "container", v.ID, "error", err)
	}
	_ = shim.Kill(ctx, v.ID, "", int(unix.SIGKILL), true) // a created task may have no process any more
	if _, err := shim.Delete(ctx, v.ID, ""); err != nil && !errdefs.IsNotFound(err) {
		e.log.Debug("delete task of failed start", "container", v.ID, "error", err)
	}
	if err := shim.Shutdown(ctx); err == nil {
		return nil
	}
	// It does not listen: clean up from outside.
	_, err := e.opt.Shims.Reap(ctx, e.shimOptions(v))
	return err
}

// joinNamespaces fills in the namespaces of other containers and the host's.
func (e *Engine) joinNamespaces(in *specInput) error {
	c := in.C.Config
	other := func(mode, what string) (*container, *run, error) {
		id, ok := strings.CutPrefix(mode, "container:")
		if !ok {
			return nil, nil, nil
		}
		o, err := e.containers.get(id)
		if err != nil {
			return nil, nil, err
		}
		r, err := o.live("use")
		if err != nil {
			return nil, nil, conflictf("cannot join %s of a non running container: %s", what, o.id)
		}
		return o, r, nil
	}
	in.NetHost = c.NetworkMode == "host"
	in.ResolvConf, in.HostsFile, in.HostnameFile = in.C.ResolvPath, in.C.HostsPath, in.C.HostnamePath
	switch o, r, err := other(c.NetworkMode, "network"); {
	case err != nil:
		return err
	case o != nil:
		ov := o.view()
		in.NetShared = true
		in.NetHost = ov.Config.NetworkMode == "host"
		if !in.NetHost {
			in.NetNS = fmt.Sprintf("/proc/%d/ns/net", r.pid.Load())
		}
		in.ResolvConf, in.HostsFile, in.HostnameFile = ov.ResolvPath, ov.HostsPath, ov.HostnamePath
	}
	switch o, r, err := other(c.PidMode, "pid namespace"); {
	case err != nil:
		return err
	case o != nil:
		in.PidNS = fmt.Sprintf("/proc/%d/ns/pid", r.pid.Load())
	}
	switch o, r, err := other(c.IpcMode, "ipc namespace"); {
	case err != nil:
		return err
	case o != nil:
		switch ov := o.view(); ov.Config.IpcMode {
		case "shareable", "host":
			in.IpcNS = fmt.Sprintf("/proc/%d/ns/ipc", r.pid.Load())
			in.ShmPath = filepath.Join(r.bundle, "shm")
			if ov.Config.IpcMode == "host" {
				in.ShmPath = "/dev/shm"
			}
		default:
			return conflictf("can't join IPC of container %s: non-shareable IPC (hint: use IpcMode:shareable for the donor container)", o.id)
		}
	}
	return nil
}

// prepareBundle completes the specification and writes it. done gives back what the
// runtime needs only until the task is created.
func (e *Engine) prepareBundle(in *specInput, mounts []mount.Mount, bundle string) (done func(), err error) {
	v := in.C
	var open []*os.File
	if in.Pod != nil {
		open = in.Pod.held
	}
	done = func() {
		for _, f := range open {
			f.Close()
		}
	}
	if p := v.Config.Pod; p != nil && p.User != nil {
		in.Account = account{UID: p.User.UID, GID: p.User.GID, Groups: p.User.Groups, Home: p.User.Home}
	} else if in.Account, err = e.resolveUser(mounts, v); err != nil {
		return done, err
	}
	if in.Devices, in.DevRules, err = lookupDevices(v.Config); err != nil {
		return done, err
	}
	if in.Throttle, err = lookupBlocks(v.Config.Resources); err != nil {
		return done, err
	}
	in.CgroupPath = cgroupsPath(e.opt.CgroupDriver, v.Config.Resources.CgroupParent, v.ID)
	images, err := e.mountImages(v, bundle)
	if err != nil {
		return done, err
	}
	if v.Config.Init != nil && *v.Config.Init {
		in.InitBinary = e.opt.InitBinary
	}
	if v.Config.IpcMode == "shareable" {
		if in.ShmPath, err = e.mountShm(v, bundle); err != nil {
			return done, err
		}
	}
	for i, m := range v.Mounts {
		src := m.Resolved
		if m.Kind == MountImage {
			f, err := openImageMount(images[i], m)
			if err != nil {
				return done, err
			}
			open = append(open, f)
			in.Mounts = append(in.Mounts, specMount(m, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()), e.host))
			continue
		}
		if m.Kind == MountBind && m.CreateSource {
			if err := bindSource(&m); err != nil {
				return done, err
			}
		}
		if m.Subpath != "" {
			f, err := openSubpath(m)
			if err != nil {
				return done, err
			}
			open = append(open, f)
			// The runtime is another process: it reaches the directory through ours,
			// so that nobody can put a link in its place in between.
			src = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
		}
		if m.Kind == MountVolume && in.Pod != nil && in.Pod.UserNS != "" {
			m.UIDs, m.GIDs = in.Pod.Config.Userns.UIDs, in.Pod.Config.Userns.GIDs
		}
		in.Mounts = append(in.Mounts, specMount(m, src, e.host))
	}
	spec, err := buildSpec(*in)
	if err != nil {
		return done, err
	}
	if err := e.injectCDI(spec, v.cdiNames()); err != nil {
		return done, err
	}
	if p := v.Config.Pod; p != nil && p.Restore != nil {
		if err := p.Restore.fit(spec, e.restoreDir(v.ID)); err != nil {
			return done, err
		}
	}
	if spec.Process.ApparmorProfile == apparmorProfile {
		if err := e.apparmor.ensure(e.ctx); err != nil {
			return done, err
		}
	}
	raw, err := json.Marshal(spec)
	if err != nil {
		return done, fmt.Errorf("encode config.json: %w", err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), raw, 0o600); err != nil {
		return done, err
	}
	if err := os.Mkdir(filepath.Join(bundle, "rootfs"), 0o711); err != nil {
		return done, err
	}
	return done, nil
}

// openSubpath opens a directory inside a volume.
func openSubpath(m Mount) (*os.File, error) {
	root, err := safepath.OpenRoot(m.Resolved)
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", m.Source, err)
	}
	defer root.Close()
	f, err := root.Open(m.Subpath, unix.O_PATH, 0)
	if err != nil {
		return nil, invalidf("cannot access path %s in volume %s: %v", m.Subpath, m.Source, errtext.Plain(err))
	}
	return f, nil
}

// resolveUser finds the container's user in its own account files.
func (e *Engine) resolveUser(mounts []mount.Mount, v Container) (account, error) {
	root, err := openMounts(mounts, false)
	if err != nil {
		return account{}, fmt.Errorf("open file system of container %s: %w", v.ID, err)
	}
	defer root.Close()
	acs, err := readAccounts(root)
	if err != nil {
		return account{}, err
	}
	return acs.resolve(v.User, v.Config.GroupAdd)
}

// mountShm mounts the /dev/shm of a container that shares its IPC namespace: another
// container has to reach it.
func (e *Engine) mountShm(v Container, bundle string) (string, error) {
	dir := filepath.Join(bundle, "shm")
	size := v.Config.ShmSize
	if size == 0 {
		size = defaultShmSize
	}
	if err := mountShm(dir, size, ""); err != nil {
		return "", fmt.Errorf("container %s: %w", v.ID, err)
	}
	return dir, nil
}

// RemoveBundle deletes a bundle with the mounts that are in it.
func RemoveBundle(bundle string) error {
	images, _ := filepath.Glob(filepath.Join(bundle, imageMounts, "*"))
	for _, m := range append(images, filepath.Join(bundle, "shm")) {
		if _, err := os.Lstat(m); err != nil {
			continue
		}
		if err := unix.Unmount(m, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmount %s: %w", m, err)
		}
	}
	return os.RemoveAll(bundle)
}

// rootfsMounts tells the shim how to mount the root file system; mapped: with the ids of the user namespace.
func rootfsMounts(mounts []mount.Mount, mapped bool) []client.Mount {
	out := make([]client.Mount, len(mounts))
	for i, m := range mounts {
		out[i] = client.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options}
		if mapped {
			out[i].Options = append(slices.Clip(m.Options), "idmap")
		}
	}
	return out
}

// connectAll joins a container's namespace to its networks. What it could not finish
// it takes back.
func (e *Engine) connectAll(ctx context.Context, v Container, want []EndpointSettings, netns string) (eps []network.Endpoint, err error) {
	var u undo.Stack
	defer func() {
		if err = errors.Join(err, u.Run(ctx)); err != nil {
			eps = nil
		}
	}()
	for i, s := range want {
		ep, err := e.connectOne(ctx, v, s, netns, i == 0)
		if err != nil {
			return nil, err
		}
		if ep.ID != "" {
			u.Add("network "+ep.NetworkName, func(ctx context.Context) error {
				return e.opt.Networks.Disconnect(ctx, ep.NetworkID, ep.ID)
			})
		}
		eps = append(eps, ep)
	}
	u.Release()
	return eps, nil
}

func (e *Engine) connectOne(ctx context.Context, v Container, s EndpointSettings, netns string, primary bool) (network.Endpoint, error) {
	n, err := e.opt.Networks.Get(ctx, s.Network)
	if err != nil {
		return network.Endpoint{}, fmt.Errorf("network %s not found: %w", s.Network, err)
	}
	cfg := network.EndpointConfig{
		ID: v.ID, Network: n.ID, Netns: netns, Name: v.Name, Hostname: v.Hostname,
		Aliases: s.Aliases, IPv4: s.IPv4, IPv6: s.IPv6, MAC: s.MAC, GatewayPriority: s.GatewayPriority, DNS: v.Config.DNS,
	}
	if isUserDefined(n.Name) {
		cfg.Aliases = append([]string{shortID(v.ID)}, s.Aliases...)
		if v.Config.Hostname != "" {
			cfg.Aliases = append(cfg.Aliases, v.Config.Hostname)
		}
	}
	if primary {
		cfg.Ports = v.Config.publishedPorts(v.ExposedPorts)
	}
	ep, err := e.opt.Networks.Connect(ctx, cfg)
	if err != nil {
		text := strings.TrimPrefix(errtext.Plain(err), fmt.Sprintf("connect %s to network %s: ", v.ID, n.ID))
		cause := err
		if errdefs.IsAlreadyExists(err) {
			cause = nil // a port that is taken is no conflict of the request: Docker answers 500
		}
		return ep, &classed{class: errdefs.ErrUnknown, cause: cause, text: fmt.Sprintf(
			"failed to set up container networking: driver failed programming external connectivity on endpoint %s (%s): %s", v.Name, v.ID, text)}
	}
	return ep, nil
}

// publishedPorts are those asked for, and with -P all exposed ones.
func (c *Config) publishedPorts(exposed []string) []network.PortMapping {
	ports := c.Ports
	if !c.PublishAll {
		return ports
	}
	have := map[string]bool{}
	for _, p := range ports {
		have[portKey(p.ContainerPort, p.Proto)] = true
	}
	for _, key := range exposed {
		if have[key] {
			continue
		}
		var n uint16
		port, proto, _ := strings.Cut(key, "/")
		if _, err := fmt.Sscanf(port, "%d", &n); err == nil && n != 0 {
			ports = append(ports[:len(ports):len(ports)], network.PortMapping{Proto: proto, ContainerPort: n})
		}
	}
	return ports
}

// runFile is what a restarted daemon has to know of a run that the shim does not. It
// lies in the bundle: after a reboot it is gone, as the process is. It is there from
// just before the start until the start is undone or the exit recorded: a container
// that its shim does not know has ended if there is one, and was never created if not.
type runFile struct {
	Pid        int                `json:"pid"`
	StartedAt  time.Time          `json:"startedAt"`
	SandboxKey string             `json:"sandboxKey,omitempty"`
	Endpoints  []network.Endpoint `json:"endpoints,omitempty"`
}

func writeRunFile(bundle string, r runFile) error {
	raw, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return durable.WriteVolatile(filepath.Join(bundle, "run.json"), raw, 0o600)
}

func removeRunFile(bundle string) error {
	if err := os.Remove(filepath.Join(bundle, "run.json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func readRunFile(bundle string) (r runFile, err error) {
	raw, err := os.ReadFile(filepath.Join(bundle, "run.json"))
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal(raw, &r)
}
