package engine

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"
)

// Info describes the node.
func (e *Engine) Info(ctx context.Context) (Info, error) {
	images, err := e.opt.Images.List(e.ns(ctx))
	if err != nil {
		return Info{}, fmt.Errorf("list images: %w", err)
	}
	h := e.host
	i := Info{
		ID: e.id, Name: h.Hostname, Root: e.opt.Root, Snapshotter: e.opt.Snapshotter, CgroupDriver: e.opt.CgroupDriver,
		CgroupVersion: 1, KernelVersion: h.Kernel, Architecture: machine(), NCPU: h.CPUs, MemTotal: h.MemTotal,
		Images: len(images), Runtimes: map[string]string{"hako": ""}, LiveRestore: true, MemoryLimit: true,
		SwapLimit: h.SwapLimit, CPUCfs: true, PidsLimit: true, CPUSet: true,
		IPv4Forwarding: readLine("/proc/sys/net/ipv4/ip_forward") == "1",
		Version:        e.opt.Version, Labels: e.opt.Labels, InsecureRegistries: []string{"127.0.0.0/8", "::1/128"},
	}
	if h.CgroupV2 {
		i.CgroupVersion = 2
		i.SecurityOptions = append(i.SecurityOptions, "name=cgroupns")
	}
	if h.Seccomp {
		i.SecurityOptions = append([]string{"name=seccomp,profile=builtin"}, i.SecurityOptions...)
	}
	if h.AppArmorProfile != "" {
		i.SecurityOptions = append([]string{"name=apparmor"}, i.SecurityOptions...)
	} else if h.AppArmor {
		i.Warnings = append(i.Warnings, "WARNING: AppArmor is enabled, but does not confine containers: "+h.AppArmorWhy)
	}
	if h.SELinuxWhy != "" {
		i.Warnings = append(i.Warnings, "WARNING: SELinux is enabled, but does not confine pods: "+h.SELinuxWhy)
	}
	for name, bin := range e.runtimes() {
		i.Runtimes[name] = bin
	}
	if !h.SwapLimit {
		i.Warnings = append(i.Warnings, "WARNING: No swap limit support")
	}
	i.OperatingSystem, i.OSVersion = osRelease()
	var states []Status
	for _, c := range e.containers.all() {
		states = append(states, c.status())
	}
	guests, err := e.guests(ctx)
	if err != nil {
		return Info{}, fmt.Errorf("list containers: %w", err)
	}
	for _, g := range guests {
		states = append(states, g.state().Status)
	}
	for _, s := range states {
		i.Containers++
		switch s {
		case StatusRunning, StatusRestarting:
			i.Running++
		case StatusPaused:
			i.Paused++
		default:
			i.Stopped++
		}
	}
	return i, nil
}

// machine is the kernel's name of the architecture.
func machine() string {
	switch runtime.GOARCH {
	case "amd64":
		return "x86_64"
	case "arm64":
		return "aarch64"
	}
	return runtime.GOARCH
}

// osRelease reads os-release(5).
func osRelease() (name, version string) {
	b, err := os.ReadFile("/etc/os-release")
	if err != nil {
		b, _ = os.ReadFile("/usr/lib/os-release")
	}
	name = "Linux"
	for line := range strings.Lines(string(b)) {
		k, v, ok := strings.Cut(strings.TrimSpace(line), "=")
		v = strings.Trim(v, `"'`)
		switch {
		case ok && k == "PRETTY_NAME":
			name = v
		case ok && k == "VERSION_ID":
			version = v
		}
	}
	return name, version
}

// DiskUsage measures what the objects take.
func (e *Engine) DiskUsage(ctx context.Context) (DiskUsage, error) {
	var d DiskUsage
	var err error
	if d.Images, err = e.Images(ctx, nil); err != nil {
		return d, err
	}
	// Layers are counted once, however many images have them.
	sn := e.opt.Snapshotters[e.opt.Snapshotter]
	nsctx := e.ns(ctx)
	users := map[string]int{}
	chains := make([][]string, len(d.Images))
	sizes := map[string]int64{}
	for i, img := range d.Images {
		for key := img.ChainID.String(); key != "" && sn != nil; {
			chains[i] = append(chains[i], key)
			users[key]++
			if _, seen := sizes[key]; !seen {
				if u, err := sn.Usage(nsctx, key); err == nil {
					sizes[key] = u.Size
				}
			}
			info, err := sn.Stat(nsctx, key)
			if err != nil {
				break
			}
			key = info.Parent
		}
	}
	for _, s := range sizes {
		d.LayersSize += s
	}
	for i := range d.Images {
		d.Images[i].SharedSize = 0
		for _, key := range chains[i] {
			if users[key] > 1 {
				d.Images[i].SharedSize += sizes[key]
			}
		}
	}
	if d.Containers, err = e.Containers(ctx, ListOptions{All: true, Size: true}); err != nil {
		return d, err
	}
	if d.Volumes, err = e.Volumes(ctx, nil); err != nil {
		return d, err
	}
	for i := range d.Volumes {
		if err := ctx.Err(); err != nil {
			return d, context.Cause(ctx)
		}
		if len(d.Volumes[i].Options) > 0 {
			continue // what is mounted there is not the volume's
		}
		if n, err := treeSize(d.Volumes[i].Mountpoint); err == nil {
			d.Volumes[i].Size = n
		}
	}
	return d, nil
}

// PruneContainers removes the containers that do not run.
func (e *Engine) PruneContainers(ctx context.Context, f Filters) (Pruned, error) {
	if err := f.check("label", "label!", "until"); err != nil {
		return Pruned{}, err
	}
	until, err := f.until()
	if err != nil {
		return Pruned{}, err
	}
	list, err := e.Containers(ctx, ListOptions{All: true, Filters: Filters{"label": f["label"], "label!": f["label!"]}})
	if err != nil {
		return Pruned{}, err
	}
	p := Pruned{IDs: []string{}}
	for _, v := range list {
		// Those of pods are the kubelet's, which still reads how they ended and what they logged; guests
		// are their clients'.
		if v.Config.Pod != nil || v.Guest || v.State.live() || v.State.Status == StatusRestarting || !until.IsZero() && !v.Created.Before(until) {
			continue
		}
		rw, _, _ := e.ContainerSize(ctx, v.ID)
		if err := e.RemoveContainer(ctx, v.ID, RemoveOptions{}); err != nil {
			if ctx.Err() != nil {
				return p, err
			}
			continue // started or removed meanwhile
		}
		p.IDs = append(p.IDs, v.ID)
		p.Reclaimed += rw
	}
	e.emitFor("container", "prune", "", "reclaimed", fmt.Sprint(p.Reclaimed))
	return p, nil
}
