package cli

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-connections/nat"
	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/blkiodev"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"github.com/spf13/pflag"
)

// containerFlags are the flags of run and create, with docker's names and meanings.
type containerFlags struct {
	name, platform, pull, cidFile string
	quiet, rm                     bool
	attach                        []string
	tty, interactive              bool

	env, envFile, label, labelFile, annotation []string
	entrypoint, workdir, user, hostname        string
	domainname, stopSignal                     string
	entrypointSet                              func() bool
	stopTimeout                                int
	groupAdd                                   []string

	healthCmd                                                    string
	healthInterval, healthTimeout, healthStart, healthStartEvery time.Duration
	healthRetries                                                int
	noHealth                                                     bool

	networks, aliases, publish, expose, dns, dnsSearch, dnsOption, addHost, link []string
	publishAll                                                                   bool
	ip, ip6, mac                                                                 string

	volumes, mounts, tmpfs, volumesFrom, storageOpt []string
	volumeDriver                                    string
	readOnly                                        bool
	shmSize                                         string

	memory, memoryReservation, memorySwap, kernelMemory string
	memorySwappiness                                    int64
	cpus                                                string
	cpuShares, cpuPeriod, cpuQuota                      int64
	cpuRTPeriod, cpuRTRuntime                           int64
	cpusetCPUs, cpusetMems, cgroupParent                string
	pidsLimit                                           int64
	oomKillDisable                                      bool
	oomScoreAdj                                         int
	ulimit                                              []string
	blkioWeight                                         uint16
	blkioWeightDevice                                   []string
	readBps, writeBps, readIOps, writeIOps              []string
	devices, deviceCgroupRules                          []string
	privileged                                          bool
	capAdd, capDrop, securityOpt, sysctl                []string
	pid, ipc, uts, userns, cgroupns                     string
	restart, runtime, logDriver                         string
	logOpt                                              []string
	init                                                bool
	changed                                             func(string) bool
}

func (f *containerFlags) register(fs *pflag.FlagSet) {
	f.changed = fs.Changed
	f.entrypointSet = func() bool { return fs.Changed("entrypoint") }
	// -h is the host name here, as with docker.
	fs.Bool("help", false, "show this help")
	str := func(p *string, name, short, def, help string) { fs.StringVarP(p, name, short, def, help) }
	arr := func(p *[]string, name, short, help string) { fs.StringArrayVarP(p, name, short, nil, help) }

	str(&f.name, "name", "", "", "name of the container")
	str(&f.platform, "platform", "", "", "platform of the image: OS/ARCH[/VARIANT]")
	str(&f.pull, "pull", "", "missing", `when to pull the image: "always", "missing" or "never"`)
	str(&f.cidFile, "cidfile", "", "", "write the container's id to this file")
	fs.BoolVarP(&f.quiet, "quiet", "q", false, "no output while pulling")
	fs.BoolVar(&f.rm, "rm", false, "remove the container and its anonymous volumes when it ends")
	arr(&f.attach, "attach", "a", "connect only these of stdin, stdout and stderr")
	fs.BoolVarP(&f.tty, "tty", "t", false, "give the command a terminal")
	fs.BoolVarP(&f.interactive, "interactive", "i", false, "keep the command's stdin open")

	arr(&f.env, "env", "e", "set KEY=VALUE, or KEY to pass the variable on")
	arr(&f.envFile, "env-file", "", "read variables from this file")
	arr(&f.label, "label", "l", "set label KEY=VALUE")
	arr(&f.labelFile, "label-file", "", "read labels from this file")
	arr(&f.annotation, "annotation", "", "pass annotation KEY=VALUE to the runtime")
	str(&f.entrypoint, "entrypoint", "", "", "replace the image's entrypoint")
	str(&f.workdir, "workdir", "w", "", "working directory in the container")
	str(&f.user, "user", "u", "", "user name or uid, with :group or :gid if wanted")
	arr(&f.groupAdd, "group-add", "", "join a further group")
	str(&f.hostname, "hostname", "h", "", "host name in the container")
	str(&f.domainname, "domainname", "", "", "NIS domain name in the container")
	str(&f.stopSignal, "stop-signal", "", "", "signal that asks the command to end (default: the image's, or TERM)")
	fs.IntVar(&f.stopTimeout, "stop-timeout", 0, "seconds to wait after the stop signal before killing (default 10)")

	str(&f.healthCmd, "health-cmd", "", "", "command that checks health")
	fs.DurationVar(&f.healthInterval, "health-interval", 0, "time between checks (default 30s)")
	fs.DurationVar(&f.healthTimeout, "health-timeout", 0, "time that a check may take (default 30s)")
	fs.DurationVar(&f.healthStart, "health-start-period", 0, "time to start up, in which failures do not count")
	fs.DurationVar(&f.healthStartEvery, "health-start-interval", 0, "time between checks while starting up (default 5s)")
	fs.IntVar(&f.healthRetries, "health-retries", 0, "failures in a row that mean unhealthy (default 3)")
	fs.BoolVar(&f.noHealth, "no-healthcheck", false, "do not run the image's health check")

	arr(&f.networks, "network", "", `join a network: a name, "none", "host", "container:NAME", or name=NET,alias=A,ip=IP`)
	arr(&f.networks, "net", "", "")
	fs.MarkHidden("net")
	arr(&f.aliases, "network-alias", "", "further name of the container on its network")
	str(&f.ip, "ip", "", "", "IPv4 address")
	str(&f.ip6, "ip6", "", "", "IPv6 address")
	str(&f.mac, "mac-address", "", "", "MAC address")
	arr(&f.publish, "publish", "p", "publish a port: [[IP:]HOSTPORT:]PORT[/PROTO], ranges as in 8000-8010")
	fs.BoolVarP(&f.publishAll, "publish-all", "P", false, "publish all exposed ports on free host ports")
	arr(&f.expose, "expose", "", "expose a port or range")
	arr(&f.dns, "dns", "", "DNS server")
	arr(&f.dnsSearch, "dns-search", "", "DNS search domain")
	arr(&f.dnsOption, "dns-option", "", "DNS option")
	arr(&f.addHost, "add-host", "", "add HOST:IP to the hosts file (IP may be host-gateway)")
	arr(&f.link, "link", "", "make another container known under an alias: NAME[:ALIAS]")

	arr(&f.volumes, "volume", "v", "mount a volume or host folder: [SOURCE:]TARGET[:OPTIONS]")
	arr(&f.mounts, "mount", "", "mount in long form, of type bind, volume or tmpfs: type=bind,src=/srv,dst=/srv,ro")
	arr(&f.tmpfs, "tmpfs", "", "mount a tmpfs: TARGET[:OPTIONS]")
	arr(&f.volumesFrom, "volumes-from", "", "mount what another container mounts: NAME[:ro]")
	str(&f.volumeDriver, "volume-driver", "", "", "driver of the volumes that this makes")
	arr(&f.storageOpt, "storage-opt", "", "option KEY=VALUE of the storage driver")
	fs.BoolVar(&f.readOnly, "read-only", false, "make the root file system read-only")
	str(&f.shmSize, "shm-size", "", "", "size of /dev/shm (default 64m)")

	str(&f.memory, "memory", "m", "", "memory limit, e.g. 512m")
	str(&f.memoryReservation, "memory-reservation", "", "", "soft memory limit")
	str(&f.memorySwap, "memory-swap", "", "", "limit of memory and swap together; -1: unlimited swap")
	fs.Int64Var(&f.memorySwappiness, "memory-swappiness", -1, "swappiness, 0 to 100")
	str(&f.kernelMemory, "kernel-memory", "", "", "")
	fs.MarkHidden("kernel-memory")
	str(&f.cpus, "cpus", "", "", "number of CPUs, e.g. 1.5")
	fs.Int64VarP(&f.cpuShares, "cpu-shares", "c", 0, "relative weight of CPU time")
	fs.Int64Var(&f.cpuPeriod, "cpu-period", 0, "CFS period in microseconds")
	fs.Int64Var(&f.cpuQuota, "cpu-quota", 0, "CFS quota in microseconds")
	fs.Int64Var(&f.cpuRTPeriod, "cpu-rt-period", 0, "real-time period in microseconds")
	fs.Int64Var(&f.cpuRTRuntime, "cpu-rt-runtime", 0, "real-time runtime in microseconds")
	str(&f.cpusetCPUs, "cpuset-cpus", "", "", "CPUs to run on, e.g. 0-2,4")
	str(&f.cpusetMems, "cpuset-mems", "", "", "memory nodes to use")
	str(&f.cgroupParent, "cgroup-parent", "", "", "parent cgroup")
	fs.Int64Var(&f.pidsLimit, "pids-limit", 0, "limit of processes; -1: unlimited")
	fs.BoolVar(&f.oomKillDisable, "oom-kill-disable", false, "do not kill on lack of memory")
	fs.IntVar(&f.oomScoreAdj, "oom-score-adj", 0, "preference for the OOM killer, -1000 to 1000")
	arr(&f.ulimit, "ulimit", "", "limit NAME=SOFT[:HARD]")
	fs.Uint16Var(&f.blkioWeight, "blkio-weight", 0, "relative weight of block I/O, 10 to 1000")
	arr(&f.blkioWeightDevice, "blkio-weight-device", "", "weight of a device: DEVICE:WEIGHT")
	arr(&f.readBps, "device-read-bps", "", "limit of reads in bytes a second: DEVICE:RATE")
	arr(&f.writeBps, "device-write-bps", "", "limit of writes in bytes a second: DEVICE:RATE")
	arr(&f.readIOps, "device-read-iops", "", "limit of reads a second: DEVICE:RATE")
	arr(&f.writeIOps, "device-write-iops", "", "limit of writes a second: DEVICE:RATE")

	arr(&f.devices, "device", "", "give a host device: HOST[:CONTAINER][:rwm]")
	arr(&f.deviceCgroupRules, "device-cgroup-rule", "", `device rule, e.g. "c 42:* rmw"`)
	fs.BoolVar(&f.privileged, "privileged", false, "give all capabilities and devices, and no confinement")
	arr(&f.capAdd, "cap-add", "", "add a capability")
	arr(&f.capDrop, "cap-drop", "", "drop a capability")
	arr(&f.securityOpt, "security-opt", "", "security option, e.g. seccomp=FILE, no-new-privileges")
	arr(&f.sysctl, "sysctl", "", "set a namespaced sysctl NAME=VALUE")
	str(&f.pid, "pid", "", "", `PID namespace: "host" or "container:NAME"`)
	str(&f.ipc, "ipc", "", "", `IPC namespace: "host", "private", "shareable", "none" or "container:NAME"`)
	str(&f.uts, "uts", "", "", `UTS namespace: "host"`)
	str(&f.userns, "userns", "", "", `user namespace: "host"`)
	str(&f.cgroupns, "cgroupns", "", "", `cgroup namespace: "host" or "private"`)
	str(&f.restart, "restart", "", "no", `when to restart: "no", "on-failure[:N]", "always", "unless-stopped"`)
	str(&f.runtime, "runtime", "", "", "OCI runtime to use")
	str(&f.logDriver, "log-driver", "", "", "log driver")
	arr(&f.logOpt, "log-opt", "", "log option KEY=VALUE, e.g. max-size=10m")
	fs.BoolVar(&f.init, "init", false, "run an init that forwards signals and reaps processes")
}

func usage(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Sprintf(format, args...)}
}

// parse turns flags and arguments into a request.
func (f *containerFlags) parse(args []string) (client.ContainerCreateOptions, error) {
	var o client.ContainerCreateOptions
	if !slices.Contains([]string{"always", "missing", "never"}, f.pull) {
		return o, usage("bad --pull %q: expected always, missing or never", f.pull)
	}
	c := &container.Config{
		Image: args[0], Cmd: args[1:], Hostname: f.hostname, Domainname: f.domainname, User: f.user,
		Tty: f.tty, OpenStdin: f.interactive, WorkingDir: f.workdir, StopSignal: f.stopSignal,
	}
	if len(args) == 1 {
		c.Cmd = nil
	}
	h := &container.HostConfig{
		ContainerIDFile: f.cidFile, AutoRemove: f.rm, PublishAllPorts: f.publishAll, VolumesFrom: f.volumesFrom, VolumeDriver: f.volumeDriver,
		CapAdd: f.capAdd, CapDrop: f.capDrop, DNSOptions: f.dnsOption, DNSSearch: f.dnsSearch, ExtraHosts: f.addHost, GroupAdd: f.groupAdd,
		IpcMode: container.IpcMode(f.ipc), PidMode: container.PidMode(f.pid), UTSMode: container.UTSMode(f.uts), UsernsMode: container.UsernsMode(f.userns),
		CgroupnsMode: container.CgroupnsMode(f.cgroupns), Links: f.link, OomScoreAdj: f.oomScoreAdj, Privileged: f.privileged,
		ReadonlyRootfs: f.readOnly, Runtime: f.runtime, StorageOpt: mapFlag(f.storageOpt), Sysctls: mapFlag(f.sysctl), Annotations: mapFlag(f.annotation),
		LogConfig: container.LogConfig{Type: f.logDriver, Config: mapFlag(f.logOpt)},
	}
	if f.changed("init") {
		h.Init = &f.init
	}
	if f.changed("stop-timeout") {
		c.StopTimeout = &f.stopTimeout
	}
	if f.entrypointSet() {
		c.Entrypoint = []string{f.entrypoint}
	}
	for _, s := range f.attach {
		switch strings.ToLower(s) {
		case "stdin":
			c.AttachStdin = true
		case "stdout":
			c.AttachStdout = true
		case "stderr":
			c.AttachStderr = true
		default:
			return o, usage("bad --attach %q: expected stdin, stdout or stderr", s)
		}
	}
	var err error
	if c.Env, err = readVars(f.envFile, f.env, true); err != nil {
		return o, err
	}
	labels, err := readVars(f.labelFile, f.label, false)
	if err != nil {
		return o, err
	}
	c.Labels = mapFlag(labels)
	if c.Healthcheck, err = f.health(); err != nil {
		return o, err
	}
	if h.RestartPolicy, err = parseRestart(f.restart); err != nil {
		return o, err
	}
	if h.SecurityOpt, err = securityOpts(f.securityOpt); err != nil {
		return o, err
	}
	for _, s := range f.dns {
		ip, err := netip.ParseAddr(s)
		if err != nil {
			return o, usage("bad --dns %q: not an IP address", s)
		}
		h.DNS = append(h.DNS, ip)
	}
	if err := f.resources(h); err != nil {
		return o, err
	}
	if err := f.storage(c, h); err != nil {
		return o, err
	}
	if err := f.ports(c, h); err != nil {
		return o, err
	}
	nc, err := f.network(c, h)
	if err != nil {
		return o, err
	}
	o = client.ContainerCreateOptions{Name: f.name, Config: c, HostConfig: h, NetworkingConfig: nc}
	if o.Platform, err = parsePlatform(f.platform); err != nil {
		return o, err
	}
	return o, nil
}

func (f *containerFlags) health() (*container.HealthConfig, error) {
	set := f.healthCmd != "" || f.healthInterval != 0 || f.healthTimeout != 0 || f.healthStart != 0 || f.healthRetries != 0 || f.healthStartEvery != 0
	if f.noHealth {
		if set {
			return nil, usage("--no-healthcheck excludes the --health flags")
		}
		return &container.HealthConfig{Test: []string{"NONE"}}, nil
	}
	if !set {
		return nil, nil
	}
	h := &container.HealthConfig{Interval: f.healthInterval, Timeout: f.healthTimeout, StartPeriod: f.healthStart, StartInterval: f.healthStartEvery, Retries: f.healthRetries}
	if f.healthCmd != "" {
		h.Test = []string{"CMD-SHELL", f.healthCmd}
	}
	for name, d := range map[string]time.Duration{"interval": h.Interval, "timeout": h.Timeout, "start-period": h.StartPeriod, "start-interval": h.StartInterval} {
		if d < 0 {
			return nil, usage("bad --health-%s: it cannot be negative", name)
		}
	}
	return h, nil
}

func parseRestart(s string) (container.RestartPolicy, error) {
	name, count, has := strings.Cut(s, ":")
	p := container.RestartPolicy{Name: container.RestartPolicyMode(name)}
	if !slices.Contains([]string{"no", "on-failure", "always", "unless-stopped"}, name) {
		return p, usage("bad --restart %q: expected no, on-failure[:N], always or unless-stopped", s)
	}
	if has {
		n, err := strconv.Atoi(count)
		if err != nil || n < 0 || name != "on-failure" {
			return p, usage("bad --restart %q: only on-failure takes a number of retries", s)
		}
		p.MaximumRetryCount = n
	}
	return p, nil
}

// readVars joins KEY=VALUE lines of files with those of flags. A KEY alone takes
// the value of the caller's environment, if env is set.
func readVars(files, flags []string, env bool) ([]string, error) {
	var out []string
	add := func(v, where string) error {
		k, _, has := strings.Cut(v, "=")
		if k == "" || strings.ContainsAny(k, " \t") && where != "" {
			return usage("bad variable %q%s: expected KEY=VALUE", v, where)
		}
		if !has && env {
			val, ok := os.LookupEnv(k)
			if !ok {
				return nil
			}
			v = k + "=" + val
		}
		out = append(out, v)
		return nil
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, usage("%s", err)
		}
		for i, line := range strings.Split(strings.TrimPrefix(string(b), "\ufeff"), "\n") {
			line = strings.TrimLeft(strings.TrimSuffix(line, "\r"), " \t")
			if line == "" || line[0] == '#' {
				continue
			}
			if err := add(line, fmt.Sprintf(" in line %d of %s", i+1, name)); err != nil {
				return nil, err
			}
		}
	}
	for _, v := range flags {
		if err := add(v, ""); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// securityOpts replaces the name of a seccomp profile's file by its text, as the daemon expects.
func securityOpts(opts []string) ([]string, error) {
	var out []string
	for _, o := range opts {
		k, v, ok := strings.Cut(o, "=")
		if !ok {
			k, v, ok = strings.Cut(o, ":")
		}
		if k == "seccomp" && ok && v != "unconfined" && v != "builtin" {
			b, err := os.ReadFile(v)
			if err != nil {
				return nil, usage("read the seccomp profile: %s", err)
			}
			if !json.Valid(b) {
				return nil, usage("the seccomp profile %s is not JSON", v)
			}
			o = "seccomp=" + string(b)
		}
		out = append(out, o)
	}
	return out, nil
}

func bytesFlag(name, s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	n, err := units.RAMInBytes(s)
	if err != nil {
		return 0, usage("bad --%s %q: expected a size such as 512m or 2g", name, s)
	}
	return n, nil
}

func (f *containerFlags) resources(h *container.HostConfig) (err error) {
	r := &h.Resources
	if r.Memory, err = bytesFlag("memory", f.memory); err != nil {
		return err
	}
	if r.MemoryReservation, err = bytesFlag("memory-reservation", f.memoryReservation); err != nil {
		return err
	}
	if f.memorySwap == "-1" {
		r.MemorySwap = -1
	} else if r.MemorySwap, err = bytesFlag("memory-swap", f.memorySwap); err != nil {
		return err
	}
	if h.ShmSize, err = bytesFlag("shm-size", f.shmSize); err != nil {
		return err
	}
	if f.cpus != "" {
		if r.NanoCPUs, err = parseCPUs(f.cpus); err != nil {
			return err
		}
	}
	r.CPUShares, r.CPUPeriod, r.CPUQuota, r.CPURealtimePeriod, r.CPURealtimeRuntime = f.cpuShares, f.cpuPeriod, f.cpuQuota, f.cpuRTPeriod, f.cpuRTRuntime
	r.CpusetCpus, r.CpusetMems, r.CgroupParent = f.cpusetCPUs, f.cpusetMems, f.cgroupParent
	r.BlkioWeight, r.DeviceCgroupRules = f.blkioWeight, f.deviceCgroupRules
	if f.changed("pids-limit") {
		r.PidsLimit = &f.pidsLimit
	}
	if f.oomKillDisable {
		r.OomKillDisable = &f.oomKillDisable
	}
	if f.memorySwappiness != -1 {
		r.MemorySwappiness = &f.memorySwappiness
	}
	for _, s := range f.ulimit {
		u, err := units.ParseUlimit(s)
		if err != nil {
			return usage("bad --ulimit %q: %s", s, err)
		}
		r.Ulimits = append(r.Ulimits, u)
	}
	for _, s := range f.devices {
		d, err := parseDevice(s)
		if err != nil {
			return err
		}
		r.Devices = append(r.Devices, d)
	}
	for _, s := range f.blkioWeightDevice {
		dev, w, ok := cutLast(s, ":")
		n, err := strconv.ParseUint(w, 10, 16)
		if !ok || err != nil {
			return usage("bad --blkio-weight-device %q: expected DEVICE:WEIGHT", s)
		}
		r.BlkioWeightDevice = append(r.BlkioWeightDevice, &blkiodev.WeightDevice{Path: dev, Weight: uint16(n)})
	}
	for _, t := range []struct {
		name   string
		values []string
		bytes  bool
		to     *[]*blkiodev.ThrottleDevice
	}{
		{"device-read-bps", f.readBps, true, &r.BlkioDeviceReadBps}, {"device-write-bps", f.writeBps, true, &r.BlkioDeviceWriteBps},
		{"device-read-iops", f.readIOps, false, &r.BlkioDeviceReadIOps}, {"device-write-iops", f.writeIOps, false, &r.BlkioDeviceWriteIOps},
	} {
		for _, s := range t.values {
			dev, v, ok := cutLast(s, ":")
			var rate int64
			if t.bytes {
				rate, err = units.RAMInBytes(v)
			} else {
				rate, err = strconv.ParseInt(v, 10, 64)
			}
			if !ok || err != nil || rate < 0 {
				return usage("bad --%s %q: expected DEVICE:RATE", t.name, s)
			}
			*t.to = append(*t.to, &blkiodev.ThrottleDevice{Path: dev, Rate: uint64(rate)})
		}
	}
	return nil
}

func parseCPUs(s string) (int64, error) {
	v, err := strconv.ParseFloat(s, 64)
	if err != nil || v < 0 || v > 1e6 || v != v {
		return 0, usage("bad --cpus %q: expected a number such as 1.5", s)
	}
	return int64(v*1e9 + 0.5), nil
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

func parseDevice(s string) (container.DeviceMapping, error) {
	d := container.DeviceMapping{CgroupPermissions: "rwm"}
	parts := strings.Split(s, ":")
	valid := func(p string) bool { return p != "" && strings.Trim(p, "rwm") == "" }
	switch len(parts) {
	case 1:
	case 2:
		if valid(parts[1]) {
			d.CgroupPermissions = parts[1]
		} else {
			d.PathInContainer = parts[1]
		}
	case 3:
		if !valid(parts[2]) {
			return d, usage("bad --device %q: permissions are of r, w and m", s)
		}
		d.PathInContainer, d.CgroupPermissions = parts[1], parts[2]
	default:
		return d, usage("bad --device %q: expected HOST[:CONTAINER][:rwm]", s)
	}
	d.PathOnHost = parts[0]
	if d.PathInContainer == "" {
		d.PathInContainer = parts[0]
	}
	if d.PathOnHost == "" || !filepath.IsAbs(d.PathInContainer) {
		return d, usage("bad --device %q: the paths must be absolute", s)
	}
	return d, nil
}

func (f *containerFlags) ports(c *container.Config, h *container.HostConfig) error {
	c.ExposedPorts, h.PortBindings = network.PortSet{}, network.PortMap{}
	for _, s := range f.publish {
		mappings, err := nat.ParsePortSpec(s)
		if err != nil {
			return usage("bad --publish %q: %s", s, err)
		}
		for _, m := range mappings {
			p, err := network.ParsePort(string(m.Port))
			if err != nil {
				return usage("bad --publish %q: %s", s, err)
			}
			b := network.PortBinding{HostPort: m.Binding.HostPort}
			if m.Binding.HostIP != "" {
				if b.HostIP, err = netip.ParseAddr(m.Binding.HostIP); err != nil {
					return usage("bad --publish %q: %q is not an IP address", s, m.Binding.HostIP)
				}
			}
			c.ExposedPorts[p] = struct{}{}
			h.PortBindings[p] = append(h.PortBindings[p], b)
		}
	}
	for _, s := range f.expose {
		r, err := network.ParsePortRange(s)
		if err != nil {
			return usage("bad --expose %q: expected PORT[-PORT][/PROTO]", s)
		}
		for p := range r.All() {
			c.ExposedPorts[p] = struct{}{}
		}
	}
	return nil
}

// network turns --network and the flags that refine it into endpoints.
func (f *containerFlags) network(c *container.Config, h *container.HostConfig) (*network.NetworkingConfig, error) {
	nc := &network.NetworkingConfig{EndpointsConfig: map[string]*network.EndpointSettings{}}
	nets := f.networks
	if len(nets) == 0 {
		nets = []string{"default"}
	}
	for i, s := range nets {
		name, ep, err := parseNetwork(s)
		if err != nil {
			return nil, err
		}
		if i == 0 {
			h.NetworkMode = container.NetworkMode(name)
			ep.Aliases = append(ep.Aliases, f.aliases...)
			if err := setAddresses(ep, f.ip, f.ip6, f.mac); err != nil {
				return nil, err
			}
		}
		if _, dup := nc.EndpointsConfig[name]; dup {
			return nil, usage("network %q is given twice", name)
		}
		if strings.HasPrefix(name, "container:") {
			continue
		}
		nc.EndpointsConfig[name] = ep
	}
	return nc, nil
}

func setAddresses(ep *network.EndpointSettings, ip4, ip6, mac string) error {
	for _, a := range []struct {
		flag, value string
		v4          bool
	}{{"ip", ip4, true}, {"ip6", ip6, false}} {
		if a.value == "" {
			continue
		}
		ip, err := netip.ParseAddr(a.value)
		if err != nil || ip.Is4() != a.v4 {
			return usage("bad --%s %q: not an address of that family", a.flag, a.value)
		}
		if ep.IPAMConfig == nil {
			ep.IPAMConfig = &network.EndpointIPAMConfig{}
		}
		if a.v4 {
			ep.IPAMConfig.IPv4Address = ip
		} else {
			ep.IPAMConfig.IPv6Address = ip
		}
	}
	if mac != "" {
		if err := ep.MacAddress.UnmarshalText([]byte(mac)); err != nil {
			return usage("bad --mac-address %q", mac)
		}
	}
	return nil
}

// parseNetwork reads NAME or the long form name=NAME,alias=A,ip=IP,...
func parseNetwork(s string) (string, *network.EndpointSettings, error) {
	ep := &network.EndpointSettings{}
	if !strings.Contains(s, "=") {
		return s, ep, nil
	}
	var name, ip4, ip6, mac string
	for part := range strings.SplitSeq(s, ",") {
		k, v, _ := strings.Cut(part, "=")
		switch k {
		case "name":
			name = v
		case "alias":
			ep.Aliases = append(ep.Aliases, v)
		case "ip":
			ip4 = v
		case "ip6":
			ip6 = v
		case "mac-address":
			mac = v
		case "gw-priority":
			n, err := strconv.Atoi(v)
			if err != nil {
				return "", nil, usage("bad gw-priority %q in --network %q", v, s)
			}
			ep.GwPriority = n
		case "driver-opt":
			dk, dv, _ := strings.Cut(v, "=")
			if ep.DriverOpts == nil {
				ep.DriverOpts = map[string]string{}
			}
			ep.DriverOpts[dk] = dv
		default:
			return "", nil, usage("unknown key %q in --network %q", k, s)
		}
	}
	if name == "" {
		return "", nil, usage("--network %q names no network: add name=NAME", s)
	}
	return name, ep, setAddresses(ep, ip4, ip6, mac)
}
