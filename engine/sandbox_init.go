package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/shim/client"
)

// A PID namespace lives as long as its first process. A sandbox whose containers share one
// has such a process, the only case in which it has any: an init that reaps what is left to
// it, under the sandbox's id in the sandbox's shim.

const (
	initInSandbox = "/docker-init"
	// nobodyID runs the init: it needs no right.
	nobodyID = 65534
)

// startInit starts the init of a sandbox and keeps its PID namespace.
func (e *Engine) startInit(ctx context.Context, s *sandbox, dir string) error {
	if e.opt.InitBinary == "" {
		return failedf("a shared PID namespace takes an init binary, and this daemon has none")
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := writeInitBundle(e.initSpec(s, dir), dir); err != nil {
		return err
	}
	// A call to the shim that is cancelled goes on there: nobody could tell when it may be undone.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), startLimit)
	defer cancel()
	shim, err := e.podShim(ctx, s)
	if err != nil {
		return err
	}
	pid, err := shim.Create(ctx, client.CreateOptions{ID: s.id, Bundle: dir})
	if err != nil {
		return fmt.Errorf("create the init of the sandbox: %w", err)
	}
	if err := pin(fmt.Sprintf("/proc/%d/ns/pid", pid), nsPath(dir, "pid")); err != nil {
		return err
	}
	if pid, err = shim.Start(ctx, s.id, ""); err != nil {
		return fmt.Errorf("start the init of the sandbox: %w", err)
	}
	s.mu.Lock()
	s.live.Init = pid
	s.mu.Unlock()
	return nil
}

// initSpec is the OCI configuration of a sandbox's init.
func (e *Engine) initSpec(s *sandbox, dir string) *specs.Spec {
	c := s.rec.Config
	adj := e.host.OOMScoreAdj
	spec := &specs.Spec{
		Version: "1.0.2",
		Root:    &specs.Root{Path: "rootfs", Readonly: true},
		Process: &specs.Process{
			Args: []string{initInSandbox, "--pause"}, Cwd: "/", Env: []string{"PATH=/"},
			User:            specs.User{UID: nobodyID, GID: nobodyID},
			Capabilities:    &specs.LinuxCapabilities{},
			NoNewPrivileges: true,
			OOMScoreAdj:     &adj,
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=64k"}},
			{Destination: initInSandbox, Type: "bind", Source: e.opt.InitBinary, Options: []string{"bind", "ro"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: cgroupsPath(e.opt.CgroupDriver, e.podCgroup(s.id, c), s.id),
			MaskedPaths: defaultMaskedPaths, ReadonlyPaths: defaultReadonlyPaths,
			Resources: &specs.LinuxResources{Devices: defaultDeviceRules()},
		},
		Annotations: sandboxAnnotations(s.id, c, "sandbox"),
	}
	if process, file, err := e.sandboxLabels(s); err == nil { // they were valid when the level was chosen
		spec.Process.SelinuxLabel, spec.Linux.MountLabel = process, file
	}
	e.shareNamespaces(spec, s, dir)
	spec.Linux.Namespaces = append(spec.Linux.Namespaces,
		specs.LinuxNamespace{Type: specs.MountNamespace}, specs.LinuxNamespace{Type: specs.PIDNamespace})
	if p, err := seccompProfile(security{}, false, spec, e.host); err == nil {
		spec.Linux.Seccomp = p
	}
	return spec
}

// SandboxSpec is what the containers of a ready sandbox share, in the form of an OCI configuration: namespaces with
// their paths, cgroup, annotations. Nothing is started from it.
func (e *Engine) SandboxSpec(_ context.Context, id string) (*specs.Spec, error) {
	s, err := e.pods.get(id)
	if err != nil {
		return nil, err
	}
	if err := s.requireReady("describe it"); err != nil {
		return nil, err
	}
	c, dir := s.rec.Config, e.sandboxDir(id)
	spec := &specs.Spec{
		Version: "1.0.2", Hostname: e.podHostname(c), Annotations: sandboxAnnotations(id, c, "sandbox"),
		Linux: &specs.Linux{CgroupsPath: cgroupParent(e.opt.CgroupDriver, e.podCgroup(id, c)), Sysctl: c.Sysctls},
	}
	e.shareNamespaces(spec, s, dir)
	if c.PID == NamespacePod {
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.PIDNamespace, Path: nsPath(dir, "pid")})
	}
	return spec, nil
}

// shareNamespaces lets a process join the namespaces that all of a sandbox share.
func (e *Engine) shareNamespaces(spec *specs.Spec, s *sandbox, dir string) {
	c := s.rec.Config
	add := func(t specs.LinuxNamespaceType, path string) {
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: t, Path: path})
	}
	if c.Userns != nil {
		add(specs.UserNamespace, nsPath(dir, "user"))
		spec.Linux.UIDMappings, spec.Linux.GIDMappings = specMaps(c.Userns.UIDs), specMaps(c.Userns.GIDs)
	}
	if c.Network == NamespacePod {
		s.mu.Lock()
		add(specs.NetworkNamespace, s.live.NetNS)
		s.mu.Unlock()
		add(specs.UTSNamespace, nsPath(dir, "uts"))
	}
	if c.IPC != NamespaceNode {
		add(specs.IPCNamespace, nsPath(dir, "ipc"))
	}
}

func writeInitBundle(spec *specs.Spec, dir string) error {
	raw, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("encode config.json: %w", err)
	}
	root := filepath.Join(dir, "rootfs")
	if err := mkdir(root, 0o755); err != nil {
		return err
	}
	for _, d := range []string{"proc", "dev"} {
		if err := mkdir(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(root, initInSandbox), nil, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "config.json"), raw, 0o600)
}

// watchInit marks a sandbox whose init has ended: its containers have been killed with it,
// and no new one can join its PID namespace.
func (e *Engine) watchInit(s *sandbox) {
	for {
		shim, err := e.reachShim(e.ctx, s, false)
		if err == nil {
			if _, err = shim.Wait(e.ctx, s.id, ""); err == nil {
				break
			}
		}
		if e.ctx.Err() != nil {
			return
		}
		if errdefs.IsNotFound(err) {
			break
		}
		select {
		case <-time.After(time.Second):
		case <-e.ctx.Done():
			return
		}
	}
	if err := s.acquire(e.ctx); err != nil {
		return
	}
	defer s.release()
	s.mu.Lock()
	lost := s.state == SandboxReady
	if lost {
		_ = s.changeLocked(SandboxStopping)
		_ = s.changeLocked(SandboxNotReady)
	}
	s.mu.Unlock()
	if lost {
		e.log.Warn("the init of a sandbox has ended", "sandbox", s.id)
		e.emitSandbox(s, "stop")
	}
}

// endPodShim ends the init of a sandbox, if it has one, and its shim. A shim that does not do
// as it is told is killed.
func (e *Engine) endPodShim(ctx context.Context, s *sandbox) error {
	err := e.askShimToEnd(ctx, s)
	hasInit := s.rec.Config.PID == NamespacePod
	switch {
	case err == nil, errdefs.IsNotFound(err) && !hasInit:
		return nil
	case errdefs.IsFailedPrecondition(err): // it holds something yet
		return fmt.Errorf("end the shim of sandbox %s: %w", s.id, err)
	case !errdefs.IsNotFound(err):
		if err := e.killShim(ctx, s, err); err != nil {
			return fmt.Errorf("end the shim of sandbox %s: %w", s.id, err)
		}
	}
	if hasInit {
		if _, err := e.opt.Shims.Reap(ctx, e.sandboxShim(s)); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("end the shim of sandbox %s: %w", s.id, err)
		}
	}
	return nil
}

// askShimToEnd ends init and shim as they like it.
func (e *Engine) askShimToEnd(ctx context.Context, s *sandbox) error {
	ctx, cancel := context.WithTimeout(ctx, killLimit)
	defer cancel()
	shim, err := e.reachShim(ctx, s, false)
	if err != nil {
		return err
	}
	if s.rec.Config.PID == NamespacePod {
		_ = shim.Kill(ctx, s.id, "", int(unix.SIGKILL), true) // it may have ended
		if _, err = shim.Delete(ctx, s.id, ""); errdefs.IsFailedPrecondition(err) {
			if _, werr := shim.Wait(ctx, s.id, ""); werr == nil {
				_, err = shim.Delete(ctx, s.id, "")
			}
		}
		if errdefs.IsNotFound(err) {
			err = nil
		}
	}
	s.mu.Lock()
	conn := s.shim
	s.shim = nil
	s.mu.Unlock()
	if conn != nil {
		err = errors.Join(err, conn.Shutdown(ctx))
		conn.Close()
	}
	return err
}
