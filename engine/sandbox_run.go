package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/durable"
	"github.com/hako-engine/hako/internal/undo"
	"github.com/hako-engine/hako/network"
)

// runVersion is the version of run.json of a sandbox.
const runVersion = 1

const sandboxRunFile = "run.json"

// RunSandbox makes a sandbox and its network. A request for the same sandbox that is under
// way is joined; one that has been cancelled leaves nothing.
func (e *Engine) RunSandbox(ctx context.Context, c SandboxConfig) (string, error) {
	if err := e.validateSandbox(c); err != nil {
		return "", err
	}
	request, err := json.Marshal(c)
	if err != nil {
		return "", fmt.Errorf("run sandbox: %w", err)
	}
	s, err := e.pods.flights.do(ctx, e.work.Go, operation[*sandbox]{
		key: c.key(), request: request,
		run: func(ctx context.Context) (*sandbox, error) { return e.runSandbox(e.ns(ctx), c) },
		keep: func(s *sandbox) {
			e.pods.add(s)
			e.emitSandbox(s, "create")
			e.emitSandbox(s, "start")
		},
		alive: func(s *sandbox) bool {
			_, err := e.pods.get(s.id)
			return err == nil && s.requireReady("join") == nil
		},
		drop: func(s *sandbox) {
			e.log.Info("nobody came for a sandbox", "sandbox", s.id, "name", c.key())
			if err := e.dropSandbox(context.Background(), s); err != nil {
				e.log.Error("remove a sandbox that nobody came for", "sandbox", s.id, "error", err)
			}
		},
	})
	if errors.Is(err, errOtherRequest) {
		return "", failedf("failed to reserve sandbox name %q: another request holds it", c.key())
	}
	if err != nil {
		return "", err
	}
	return s.id, nil
}

// validateSandbox checks what a client asks of a sandbox.
func (e *Engine) validateSandbox(c SandboxConfig) error {
	if c.Name == "" || c.UID == "" && c.Namespace == "" {
		return invalidf("a sandbox takes a name, a namespace and a uid")
	}
	if c.Runtime != "" && c.Runtime != "hako" && e.runtimes()[c.Runtime] == "" {
		return invalidf("no runtime handler %q is configured", c.Runtime)
	}
	for what, m := range map[string]struct {
		mode    NamespaceMode
		allowed []NamespaceMode
	}{
		"network": {c.Network, []NamespaceMode{NamespacePod, NamespaceNode}},
		"PID":     {c.PID, []NamespaceMode{NamespacePod, NamespaceContainer, NamespaceNode}},
		"IPC":     {c.IPC, []NamespaceMode{NamespacePod, NamespaceNode}},
	} {
		if !slices.Contains(m.allowed, m.mode) {
			return invalidf("%s namespace of a sandbox cannot be %q", what, m.mode)
		}
	}
	if err := c.Userns.validate(); err != nil {
		return err
	}
	if c.Userns != nil && c.PID == NamespaceNode || c.Userns != nil && c.IPC == NamespaceNode {
		return invalidf("a user namespace cannot go with the host's PID or IPC namespace")
	}
	if len(c.Hostname) > 64 || strings.ContainsAny(c.Hostname, "/\n\r\x00 ") {
		return invalidf("invalid host name %q", c.Hostname)
	}
	if strings.Contains(c.CgroupParent, "..") || strings.ContainsAny(c.CgroupParent, "\n\x00") {
		return invalidf("invalid cgroup parent %q", c.CgroupParent)
	}
	modes := Config{Sysctls: c.Sysctls}
	if c.Network == NamespaceNode {
		modes.NetworkMode, modes.UTSMode = "host", "host"
	}
	if c.IPC == NamespaceNode {
		modes.IpcMode = "host"
	}
	if err := modes.validateSysctls(); err != nil {
		return err
	}
	for _, p := range c.Ports {
		if p.ContainerPort == 0 && p.HostPort != 0 || !validProto(p.Proto) {
			return invalidf("invalid port mapping %d:%s", p.HostPort, portKey(p.ContainerPort, p.Proto))
		}
	}
	if d := c.DNS; d != nil {
		for _, s := range d.Servers {
			if !validIP(s) {
				return invalidf("invalid DNS server %q", s)
			}
		}
		for _, s := range slices.Concat(d.Searches, d.Options) {
			if strings.ContainsAny(s, "\n\r\x00") {
				return invalidf("invalid DNS option %q", s)
			}
		}
	}
	return nil
}

// runSandbox makes a sandbox that nobody knows of yet. What does not depend on each other
// is done side by side.
//
//	record, cgroup ────────────────────────────────────┐
//	folder ─ namespaces ─┬─ network ─ hosts file ──────┼─ run.json
//	                     ├─ shm, other files ──────────┤
//	                     └─ shim, init ────────────────┘ with CNI, or if there is an init
func (e *Engine) runSandbox(ctx context.Context, c SandboxConfig) (_ *sandbox, err error) {
	level, err := e.sandboxLevel(c)
	if err != nil {
		return nil, fmt.Errorf("run sandbox %q: %w", c.key(), err)
	}
	id := newID()
	s := newSandbox(sandboxRecord{Version: sandboxVersion, ID: id, Created: time.Now().UTC(), Config: c, SELinuxLevel: level})
	s.state = SandboxReady
	s.live = sandboxRun{Version: runVersion, Record: s.rec}
	var u undo.Stack
	defer func() { err = errors.Join(err, u.Run(ctx)) }()
	fail := func(err error) (*sandbox, error) { return nil, fmt.Errorf("run sandbox %q: %w", c.key(), err) }

	if err := e.pods.reserve(c.key(), id); err != nil {
		return nil, err
	}
	u.Add("name", func(context.Context) error { e.pods.unreserve(c.key(), id); return nil })
	e.log.Debug("a sandbox is being made", "sandbox", id, "name", c.key())
	dir := e.sandboxDir(id)
	for _, d := range []string{dir, filepath.Join(dir, "ns")} {
		if err := mkdir(d, 0o711); err != nil {
			return fail(err)
		}
	}
	u.Add("folder", func(context.Context) error { return RemoveSandboxDir(dir) })
	var cgroupMade bool
	u.Add("cgroup", func(context.Context) error { e.removePodCgroup(id, c, cgroupMade); return nil })
	// If the daemon dies in the middle, the next one finds what there is to take back.
	if err := writeSandboxRun(dir, s.live); err != nil {
		return fail(err)
	}
	u.Add("record", func(ctx context.Context) error { return e.opt.Sandboxes.Delete(ctx, id) })
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return e.opt.Sandboxes.Put(gctx, id, &s.rec) })
	g.Go(func() error { return e.raise(gctx, s, dir, &u) })
	g.Go(func() error { cgroupMade = e.makePodCgroup(id, c); return nil })
	if err := g.Wait(); err != nil {
		return fail(err)
	}
	s.live.CgroupMade = cgroupMade
	if e.opt.Hooks != nil {
		u.Add("plugins", func(ctx context.Context) error { e.tellRemove(ctx, s); return nil })
	}
	if err := e.tellRun(ctx, s); err != nil {
		return nil, err
	}
	s.live.Ready = true
	if err := writeSandboxRun(dir, s.live); err != nil {
		return fail(err)
	}
	u.Release()
	if s.live.Init != 0 {
		e.work.Go(func() { e.watchInit(s) })
	}
	return s, nil
}

// raise makes the namespaces, the network and the files of a sandbox.
func (e *Engine) raise(ctx context.Context, s *sandbox, dir string, u *undo.Stack) error {
	c := s.rec.Config
	if err := e.raiseNamespaces(ctx, s, dir, u); err != nil {
		return err
	}
	var joined bool
	u.Add("network", func(ctx context.Context) error {
		if !joined {
			return nil
		}
		return e.opt.PodNetwork.Teardown(ctx, podEndpoint(s.id, c, s.live.NetNS))
	})
	_, quick := e.opt.PodNetwork.(bridgePods)
	ahead := c.Network == NamespacePod && !quick
	if c.PID == NamespacePod || ahead {
		u.Add("shim, init", func(ctx context.Context) error { return e.endPodShim(ctx, s) })
	}
	hostname := e.podHostname(c)
	_, label, err := e.sandboxLabels(s)
	if err != nil {
		return err
	}
	write := func(name string, data []byte) error {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o644); err != nil || label == "" {
			return err
		}
		return relabel(path, label)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if c.IPC != NamespaceNode {
			return mountShm(filepath.Join(dir, "shm"), defaultShmSize, label)
		}
		return nil
	})
	g.Go(func() error {
		host, _ := os.ReadFile(hostResolvConf)
		for name, data := range map[string][]byte{
			"hostname":    network.Hostname(hostname),
			"resolv.conf": podResolvConf(host, c.DNS),
		} {
			if err := write(name, data); err != nil {
				return err
			}
		}
		return nil
	})
	g.Go(func() error {
		if c.Network == NamespacePod {
			addr, err := e.opt.PodNetwork.Setup(gctx, podEndpoint(s.id, c, s.live.NetNS))
			if err != nil {
				return err
			}
			joined = true
			s.live.Addresses = addr
		}
		return write("hosts", podHosts(c, hostname, s.live.Addresses.IPs))
	})
	switch {
	case c.PID == NamespacePod:
		g.Go(func() error { return e.startInit(gctx, s, dir) })
	case ahead: // while plugins mostly wait for the kernel
		g.Go(func() error { e.warmShim(gctx, s); return nil })
	}
	return g.Wait()
}

// raiseNamespaces makes the namespaces that the containers of a sandbox share.
func (e *Engine) raiseNamespaces(ctx context.Context, s *sandbox, dir string, u *undo.Stack) (err error) {
	c := s.rec.Config
	ipc, own := c.IPC != NamespaceNode, c.Network == NamespacePod
	if own {
		u.Add("network namespace", func(ctx context.Context) error {
			if s.live.NetNS == "" {
				return nil
			}
			return e.opt.Networks.DeleteNetns(ctx, s.live.NetNS)
		})
	}
	if c.Userns != nil {
		h, err := startHolder(e.opt.InitBinary, *c.Userns, ipc, own, own)
		if err != nil {
			return err
		}
		defer h.end()
		for kind, wanted := range map[string]bool{"user": true, "ipc": ipc, "uts": own} {
			if !wanted {
				continue
			}
			if err := pin(h.path(kind), nsPath(dir, kind)); err != nil {
				return err
			}
		}
		if own {
			if s.live.NetNS, err = e.opt.Networks.KeepNetns(ctx, s.id, h.path("net")); err != nil {
				return err
			}
		}
	} else {
		if err := makeNamespaces(dir, ipc, own); err != nil {
			return err
		}
		if own {
			if s.live.NetNS, err = e.opt.Networks.NewNetns(ctx, s.id); err != nil {
				return fmt.Errorf("network namespace: %w", err)
			}
		}
	}
	sysctls := maps.Clone(c.Sysctls)
	if own {
		if sysctls == nil {
			sysctls = map[string]string{}
		}
		for k, v := range unprivilegedNet(c.Userns) {
			if _, set := sysctls[k]; !set {
				sysctls[k] = v
			}
		}
	}
	var root uint32
	if c.Userns != nil {
		root = c.Userns.UIDs[0].Host
	}
	return configureNamespaces(dir, s.live.NetNS, e.podHostname(c), sysctls, root)
}

// unprivilegedNet lets every user of a pod bind low ports and ping, as in Docker's containers.
func unprivilegedNet(u *Userns) map[string]string {
	out := map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}
	if u == nil {
		out["net.ipv4.ping_group_range"] = "0 2147483647"
	}
	return out
}

func (e *Engine) podHostname(c SandboxConfig) string {
	if c.Network == NamespaceNode || c.Hostname == "" {
		return e.host.Hostname
	}
	return c.Hostname
}

// podResolvConf is the resolv.conf of a pod: the one asked for, or the host's.
func podResolvConf(host []byte, d *DNS) []byte {
	if d == nil || len(d.Servers)+len(d.Searches)+len(d.Options) == 0 {
		return host
	}
	var b strings.Builder
	if len(d.Searches) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(d.Searches, " "))
	}
	for _, s := range d.Servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if len(d.Options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(d.Options, " "))
	}
	return []byte(b.String())
}

// podHosts is the hosts file for containers that bring none of their own.
func podHosts(c SandboxConfig, hostname string, ips []netip.Addr) []byte {
	if c.Network == NamespaceNode {
		if b, err := os.ReadFile("/etc/hosts"); err == nil {
			return b
		}
	}
	var entries []network.HostEntry
	for _, ip := range ips {
		entries = append(entries, network.HostEntry{Addr: ip, Names: []string{hostname}})
	}
	return network.Hosts(true, entries)
}

// mountShm mounts a /dev/shm that containers share; label is SELinux's, "" for none.
func mountShm(dir string, size int64, label string) error {
	if err := os.Mkdir(dir, 0o711); err != nil {
		return err
	}
	data := fmt.Sprintf("mode=1777,size=%d", size)
	if label != "" {
		data += fmt.Sprintf(`,context="%s"`, label) // a level has commas
	}
	err := unix.Mount("shm", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC|unix.MS_NODEV, data)
	if err != nil {
		return fmt.Errorf("mount shm: %w", err)
	}
	return nil
}

// RemoveSandboxDir deletes the volatile folder of a sandbox with the mounts in it.
func RemoveSandboxDir(dir string) error {
	if err := unmountSandboxDir(dir); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// unmountSandboxDir undoes the mounts in the folder of a sandbox. It is idempotent.
func unmountSandboxDir(dir string) error {
	if err := unpin(dir); err != nil {
		return err
	}
	shm := filepath.Join(dir, "shm")
	err := unix.Unmount(shm, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount %s: %w", shm, err)
	}
	return nil
}

func writeSandboxRun(dir string, r sandboxRun) error {
	raw, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return durable.WriteVolatile(filepath.Join(dir, sandboxRunFile), raw, 0o600)
}

func readSandboxRun(dir string) (r sandboxRun, err error) {
	raw, err := os.ReadFile(filepath.Join(dir, sandboxRunFile))
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(raw, &r); err != nil {
		return r, fmt.Errorf("%s of sandbox %s: %w", sandboxRunFile, filepath.Base(dir), err)
	}
	if r.Version > runVersion {
		return r, fmt.Errorf("%s of sandbox %s has version %d, this daemon knows %d", sandboxRunFile, filepath.Base(dir), r.Version, runVersion)
	}
	return r, nil
}
