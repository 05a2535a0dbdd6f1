package engine

import (
	"encoding/json"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hako-engine/hako/shim/client"
)

// minMemory is Docker's smallest memory limit, in bytes.
const minMemory = 6 << 20

// validate refuses a configuration that cannot work, with Docker's texts. It is
// pure: facts about the host are passed in.
func (c *Config) validate(h hostFacts, runtimes map[string]string) error {
	if err := c.Restart.validate(); err != nil {
		return err
	}
	if c.AutoRemove && c.Restart.Name != "" && c.Restart.Name != "no" {
		return invalidf("can't create 'AutoRemove' container with restart policy")
	}
	if c.WorkingDir != "" && !path.IsAbs(c.WorkingDir) {
		return invalidf("the working directory '%s' is invalid, it needs to be an absolute path", c.WorkingDir)
	}
	for _, kv := range c.Env {
		if kv == "" || kv[0] == '=' {
			return invalidf("invalid environment variable: %s", kv)
		}
		if strings.ContainsRune(kv, 0) {
			return invalidf("invalid environment variable: it holds a NUL byte")
		}
	}
	for _, list := range [][]string{c.Entrypoint, c.Cmd} {
		for _, a := range list {
			if strings.ContainsRune(a, 0) {
				return invalidf("invalid argument %q: it holds a NUL byte", a)
			}
		}
	}
	if len(c.Hostname) > 63 || strings.ContainsAny(c.Hostname, "/\n\r\x00 ") {
		return invalidf("invalid hostname format: %s", c.Hostname)
	}
	if c.StopSignal != "" {
		if _, err := parseSignal(c.StopSignal); err != nil {
			return err
		}
	}
	if err := c.Healthcheck.validate(); err != nil {
		return err
	}
	if c.Runtime != "" && c.Runtime != "hako" && runtimes[c.Runtime] == "" {
		return invalidf("unknown or invalid runtime name: %s", c.Runtime)
	}
	if c.OOMScoreAdj < -1000 || c.OOMScoreAdj > 1000 {
		return invalidf("Invalid value %d, range for oom score adj is [-1000, 1000]", c.OOMScoreAdj)
	}
	if c.ShmSize < 0 {
		return invalidf("SHM size can not be less than 0")
	}
	if err := c.validateModes(); err != nil {
		return err
	}
	if err := c.validatePorts(); err != nil {
		return err
	}
	if _, err := c.logConfig("/", nil); err != nil {
		return err
	}
	for _, d := range c.Resources.Devices {
		if !validDevicePermissions(d.Permissions) {
			return invalidf("invalid device permissions: %s", d.Permissions)
		}
	}
	if _, err := capabilities(c.Privileged, c.CapAdd, c.CapDrop); err != nil {
		return err
	}
	sec, err := parseSecurity(c.SecurityOpt)
	if err != nil {
		return err
	}
	if _, err := sec.apparmorProfile(h, c.Privileged); err != nil {
		return err
	}
	if sec.seccomp != "" && sec.seccomp != "unconfined" && !json.Valid([]byte(sec.seccomp)) {
		return invalidf("invalid seccomp profile: not JSON")
	}
	if err := c.validateSysctls(); err != nil {
		return err
	}
	for _, h := range c.ExtraHosts {
		if name, addr, ok := cutHost(h); !ok || name == "" || strings.ContainsAny(h, "\n\r\x00 \t") {
			return invalidf("bad format for add-host: %q", h)
		} else if addr != "host-gateway" && !validIP(addr) {
			return invalidf("invalid IP address in add-host: %q", addr)
		}
	}
	for _, list := range [][]string{c.DNSSearch, c.DNSOptions} {
		for _, s := range list {
			if strings.ContainsAny(s, "\n\r\x00") {
				return invalidf("bad DNS option %q", s)
			}
		}
	}
	if c.Pod != nil {
		return c.Resources.validatePod()
	}
	return c.Resources.validate(h)
}

// validatePod checks limits as Kubernetes gives them: what the kernel takes is right.
func (r *Resources) validatePod() error {
	switch {
	case r.Memory < 0, r.CPUPeriod < 0, r.CPUShares < 0, r.MemorySwap < -1, r.CPUQuota < -1:
		return invalidf("a limit of the container is negative")
	}
	for _, s := range []string{r.CpusetCPUs, r.CpusetMems} {
		if s == "" {
			continue
		}
		if _, err := parseCPUSet(s); err != nil {
			return invalidf("invalid cpuset %q", s)
		}
	}
	return r.validUnified()
}

func (p RestartPolicy) validate() error {
	if p.MaxRetries < 0 {
		return invalidf("invalid restart policy: maximum retry count cannot be negative")
	}
	switch p.Name {
	case "on-failure":
	case "", "no", "always", "unless-stopped":
		if p.MaxRetries != 0 {
			if p.Name == "" {
				return invalidf("invalid restart policy: maximum retry count can only be used with 'on-failure'")
			}
			return invalidf("invalid restart policy: maximum retry count can only be used with 'on-failure'")
		}
	default:
		return invalidf("invalid restart policy: unknown policy '%s'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'", p.Name)
	}
	return nil
}

func (h *Healthcheck) validate() error {
	if h == nil {
		return nil
	}
	for _, d := range []struct {
		name  string
		value time.Duration
	}{
		{"Interval", h.Interval}, {"Timeout", h.Timeout}, {"StartPeriod", h.StartPeriod}, {"StartInterval", h.StartInterval},
	} {
		if d.value != 0 && d.value < time.Millisecond {
			return invalidf("%s in Healthcheck cannot be less than 1ms", d.name)
		}
	}
	if h.Retries < 0 {
		return invalidf("Retries in Healthcheck cannot be negative")
	}
	if len(h.Test) > 0 {
		switch h.Test[0] {
		case "NONE":
		case "CMD", "CMD-SHELL":
			if len(h.Test) == 1 {
				return invalidf("health check %s needs a command", h.Test[0])
			}
		default:
			return invalidf("unknown health check type %q", h.Test[0])
		}
	}
	return nil
}

// validateModes checks the namespaces asked for.
func (c *Config) validateModes() error {
	simple := func(what, mode string, allowed ...string) error {
		ref, joins := strings.CutPrefix(mode, "container:")
		switch {
		case mode == "", joins && ref != "" && slices.Contains(allowed, "container:"), !joins && slices.Contains(allowed, mode):
			return nil
		}
		return invalidf("invalid %s: %s", what, mode)
	}
	for _, err := range []error{
		simple("IPC mode", c.IpcMode, "private", "shareable", "host", "none", "container:"),
		simple("PID mode", c.PidMode, "host", "container:"),
		simple("UTS mode", c.UTSMode, "host"),
		simple("userns mode", c.UsernsMode, "host"),
		simple("cgroup namespace mode", c.CgroupnsMode, "host", "private"),
	} {
		if err != nil {
			return err
		}
	}
	ref, joins := strings.CutPrefix(c.NetworkMode, "container:")
	switch {
	case joins && ref == "":
		return invalidf("invalid container format container:<name|id>")
	case joins && c.Hostname != "":
		return invalidf("conflicting options: hostname and the network mode")
	case joins && len(c.Links) > 0:
		return invalidf("conflicting options: container type network can't be used with links. This would result in undefined behavior")
	case joins && len(c.DNS) > 0:
		return invalidf("conflicting options: dns and the network mode")
	case joins && len(c.ExtraHosts) > 0:
		return invalidf("conflicting options: custom host-to-IP mapping and the network mode")
	case joins && (len(c.Ports) > 0 || c.PublishAll):
		return invalidf("conflicting options: port publishing and the container type network mode")
	case joins && c.MacAddress != "":
		return invalidf("conflicting options: mac-address and the network mode")
	case c.NetworkMode == "host" && len(c.Links) > 0:
		return invalidf("conflicting options: host type networking can't be used with links. This would result in undefined behavior")
	case c.UTSMode == "host" && (c.Hostname != "" || c.Domainname != ""):
		return invalidf("conflicting options: hostname and the UTS mode")
	}
	for _, ep := range c.Endpoints {
		user := isUserDefined(ep.Network)
		switch {
		case !user && (ep.IPv4.IsValid() || ep.IPv6.IsValid()):
			return invalidf("invalid endpoint settings:\nuser specified IP address is supported on user defined networks only")
		case !user && len(ep.Aliases) > 0:
			return invalidf("network-scoped alias is supported only for containers in user defined networks")
		}
	}
	return nil
}

// isUserDefined tells whether a network is none of the predefined ones.
func isUserDefined(name string) bool {
	switch name {
	case "", "default", "bridge", "host", "none":
		return false
	}
	return true
}

func (c *Config) validatePorts() error {
	for _, p := range c.ExposedPorts {
		port, proto, _ := strings.Cut(p, "/")
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 || proto != "" && !validProto(proto) {
			return invalidf("invalid exposed port: %q", p)
		}
	}
	for _, p := range c.Ports {
		if p.ContainerPort == 0 || !validProto(p.Proto) {
			return invalidf("invalid port specification: %q", portKey(p.ContainerPort, p.Proto))
		}
		if p.HostPortEnd != 0 && p.HostPortEnd < p.HostPort {
			return invalidf("invalid port range: %d-%d", p.HostPort, p.HostPortEnd)
		}
	}
	return nil
}

func validProto(p string) bool { return p == "" || p == "tcp" || p == "udp" || p == "sctp" }

// portKey is Docker's name of a container port.
func portKey(port uint16, proto string) string {
	if proto == "" {
		proto = "tcp"
	}
	return strconv.Itoa(int(port)) + "/" + proto
}

func (c *Config) validateSysctls() error {
	for k, v := range c.Sysctls {
		k = strings.ReplaceAll(k, "/", ".")
		if strings.ContainsAny(k, "\n\r\x00 +=") || strings.ContainsAny(v, "\n\r\x00") || strings.Contains(k, "..") {
			return invalidf("sysctl %q is not allowed", k)
		}
		ipc := slices.Contains([]string{"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem",
			"kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced"}, k) || strings.HasPrefix(k, "fs.mqueue.")
		uts := k == "kernel.domainname" || k == "kernel.hostname"
		switch {
		case ipc && c.IpcMode == "host":
			return invalidf("sysctl %q not allowed in host ipc namespace", k)
		case uts && c.UTSMode == "host":
			return invalidf("sysctl %q not allowed in host uts namespace", k)
		case strings.HasPrefix(k, "net.") && (c.NetworkMode == "host" || strings.HasPrefix(c.NetworkMode, "container:")):
			return invalidf("sysctl %q not allowed in host network namespace", k)
		case !ipc && !uts && !strings.HasPrefix(k, "net."):
			return invalidf("sysctl %q is not in a separate kernel namespace", k)
		}
	}
	return nil
}

// validate checks limits against Docker's rules and the host.
func (r *Resources) validate(h hostFacts) error {
	switch {
	case r.Memory != 0 && r.Memory < minMemory:
		return invalidf("Minimum memory limit allowed is 6MB")
	case r.Memory > 0 && r.MemorySwap > 0 && r.MemorySwap < r.Memory:
		return invalidf("Minimum memoryswap limit should be larger than memory limit, see usage")
	case r.Memory == 0 && r.MemorySwap > 0:
		return invalidf("You should always set the Memory limit when using Memoryswap limit, see usage")
	case r.MemorySwap < -1:
		return invalidf("invalid memoryswap limit: %d", r.MemorySwap)
	case r.MemorySwappiness != nil && (*r.MemorySwappiness < -1 || *r.MemorySwappiness > 100):
		return invalidf("Invalid value: %v, valid memory swappiness range is 0-100", *r.MemorySwappiness)
	case r.MemoryReservation != 0 && r.MemoryReservation < minMemory:
		return invalidf("Minimum memory reservation allowed is 6MB")
	case r.Memory > 0 && r.MemoryReservation > 0 && r.Memory < r.MemoryReservation:
		return invalidf("Minimum memory limit can not be less than memory reservation limit, see usage")
	case r.NanoCPUs > 0 && r.CPUPeriod > 0:
		return invalidf("Conflicting options: Nano CPUs and CPU Period cannot both be set")
	case r.NanoCPUs > 0 && r.CPUQuota > 0:
		return invalidf("Conflicting options: Nano CPUs and CPU Quota cannot both be set")
	case r.NanoCPUs < 0 || r.NanoCPUs > int64(h.CPUs)*1e9:
		return invalidf("range of CPUs is from 0.01 to %d.00, as there are only %d CPUs available", h.CPUs, h.CPUs)
	case r.CPUPeriod != 0 && (r.CPUPeriod < 1000 || r.CPUPeriod > 1000000):
		return invalidf("CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)")
	case r.CPUQuota > 0 && r.CPUQuota < 1000:
		return invalidf("CPU cfs quota can not be less than 1ms (i.e. 1000)")
	case r.CPUShares < 0 || r.CPUShares > 262144:
		return invalidf("invalid CPU shares %d: the range is from 2 to 262144", r.CPUShares)
	case r.BlkioWeight != 0 && (r.BlkioWeight < 10 || r.BlkioWeight > 1000):
		return invalidf("Range of blkio weight is from 10 to 1000")
	case r.CgroupParent != "" && (strings.Contains(r.CgroupParent, "..") || strings.ContainsAny(r.CgroupParent, "\n\x00")):
		return invalidf("invalid cgroup parent %q", r.CgroupParent)
	case r.CgroupParent != "" && h.CgroupDriver == "systemd" && (strings.ContainsAny(r.CgroupParent, "/:") || !strings.HasSuffix(r.CgroupParent, ".slice")):
		return invalidf(`cgroup-parent for systemd cgroup should be a valid slice named as "xxx.slice"`)
	}
	for _, s := range []struct{ what, value, all string }{{"cpus", r.CpusetCPUs, h.OnlineCPUs}, {"mems", r.CpusetMems, h.OnlineMems}} {
		if s.value == "" {
			continue
		}
		want, err := parseCPUSet(s.value)
		if err != nil {
			return invalidf("Invalid value %s for cpuset %s", s.value, s.what)
		}
		have, err := parseCPUSet(s.all)
		if err != nil || s.all == "" {
			continue
		}
		for n := range want {
			if !have[n] {
				return invalidf("Requested %s are not available - requested %s, available: %s",
					map[string]string{"cpus": "CPUs", "mems": "memory nodes"}[s.what], s.value, s.all)
			}
		}
	}
	for _, rule := range r.DeviceCgroupRules {
		if _, err := parseDeviceRule(rule); err != nil {
			return err
		}
	}
	for _, u := range r.Ulimits {
		if _, ok := rlimitNames[strings.ToLower(u.Name)]; !ok {
			return invalidf("invalid ulimit type: %s", u.Name)
		}
		if u.Hard != -1 && (u.Soft == -1 || u.Soft > u.Hard) {
			return invalidf("ulimit soft limit must be less than or equal to hard limit: %d > %d", u.Soft, u.Hard)
		}
	}
	return nil
}

// cpusetMax bounds what a list may name, so that a huge number costs nothing.
const cpusetMax = 8192

// parseCPUSet reads the kernel's list format ("0-2,5").
func parseCPUSet(s string) (map[int]bool, error) {
	set := map[int]bool{}
	for part := range strings.SplitSeq(s, ",") {
		lo, hi, isRange := strings.Cut(part, "-")
		a, err := strconv.Atoi(lo)
		if err != nil {
			return nil, err
		}
		b := a
		if isRange {
			if b, err = strconv.Atoi(hi); err != nil {
				return nil, err
			}
		}
		if a < 0 || b < a || b >= cpusetMax {
			return nil, strconv.ErrRange
		}
		for n := a; n <= b; n++ {
			set[n] = true
		}
	}
	return set, nil
}

// logConfig makes the shim's log configuration of Docker's options.
func (c *Config) logConfig(path string, v *Container) (client.LogConfig, error) {
	switch c.Log.Driver {
	case "none":
		return client.LogConfig{}, nil
	case "", "json-file":
	default:
		return client.LogConfig{}, invalidf("logger: no log driver named '%s' is registered", c.Log.Driver)
	}
	l := client.LogConfig{Format: "json-file", Path: path, MaxFiles: 1}
	for k, val := range c.Log.Options {
		var err error
		switch k {
		case "max-size":
			l.MaxSize, err = parseSize(val)
			if err != nil || l.MaxSize <= 0 {
				return l, invalidf("invalid value for max-size: %s", val)
			}
		case "max-file":
			if l.MaxFiles, err = strconv.Atoi(val); err != nil || l.MaxFiles < 1 {
				return l, invalidf("max-file cannot be less than 1")
			}
		case "compress":
			if l.Compress, err = strconv.ParseBool(val); err != nil {
				return l, invalidf("invalid value for compress: %s", val)
			}
		case "labels", "labels-regex", "env", "env-regex", "tag", "mode", "max-buffer-size":
		default:
			return l, invalidf("unknown log opt '%s' for json-file log driver", k)
		}
	}
	if l.MaxFiles > 1 && l.MaxSize == 0 {
		return l, invalidf("cannot use max-file without max-size")
	}
	if v != nil {
		l.Attrs = logAttrs(c.Log.Options, v)
	}
	return l, nil
}

// logAttrs are the labels and variables that the options labels and env pick.
func logAttrs(opts map[string]string, v *Container) map[string]string {
	attrs := map[string]string{}
	for k := range strings.SplitSeq(opts["labels"], ",") {
		if val, ok := v.Labels[k]; ok && k != "" {
			attrs[k] = val
		}
	}
	for k := range strings.SplitSeq(opts["env"], ",") {
		if val, ok := lookupEnv(v.Env, k); ok && k != "" {
			attrs[k] = val
		}
	}
	if len(attrs) == 0 {
		return nil
	}
	return attrs
}

// parseSize reads a size with Docker's binary units (k, m, g).
func parseSize(s string) (int64, error) {
	s = strings.ToLower(strings.TrimSpace(s))
	s = strings.TrimSuffix(strings.TrimSuffix(s, "b"), "i")
	shift := 0
	if n := len(s); n > 0 {
		switch s[n-1] {
		case 'k':
			shift = 10
		case 'm':
			shift = 20
		case 'g':
			shift = 30
		case 't':
			shift = 40
		}
		if shift != 0 {
			s = s[:n-1]
		}
	}
	f, err := strconv.ParseFloat(strings.TrimSpace(s), 64)
	if err != nil {
		return 0, err
	}
	f *= float64(int64(1) << shift)
	if !(f >= 0 && f < 1<<62) {
		return 0, strconv.ErrRange
	}
	return int64(f), nil
}

// cutHost splits name:address, where the address may be IPv6, with or without brackets.
func cutHost(s string) (name, addr string, ok bool) {
	name, addr, ok = strings.Cut(s, ":")
	if !ok {
		name, addr, ok = strings.Cut(s, "=")
	}
	addr = strings.TrimSuffix(strings.TrimPrefix(addr, "["), "]")
	return name, addr, ok && addr != ""
}
