package engine

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// defaultCaps are Docker's default capabilities.
var defaultCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// allCaps are the capabilities of capabilities(7), in the order of their numbers.
var allCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
	"CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
	"CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
	"CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
	"CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
	"CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}

// defaultMaskedPaths are hidden from containers: Docker's list, with what later
// findings added (CVE-2018-10892, RAPL, interrupts).
var defaultMaskedPaths = []string{
	"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
	"/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
	"/sys/devices/virtual/powercap", "/sys/firmware",
}

var defaultReadonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}

// capabilities gives the bounding set of a container, in allCaps' order.
func capabilities(privileged bool, add, drop []string) ([]string, error) {
	normal := func(field string, names []string) (set map[string]bool, all bool, err error) {
		set = map[string]bool{}
		for _, n := range names {
			n = strings.ToUpper(strings.TrimSpace(n))
			if n == "ALL" || n == "CAP_ALL" {
				all = true
				continue
			}
			if !strings.HasPrefix(n, "CAP_") {
				n = "CAP_" + n
			}
			if !slices.Contains(allCaps, n) {
				return nil, false, invalidf("invalid %s: unknown capability: %q", field, n)
			}
			set[n] = true
		}
		return set, all, nil
	}
	adds, addAll, err := normal("CapAdd", add)
	if err != nil {
		return nil, err
	}
	drops, dropAll, err := normal("CapDrop", drop)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, c := range allCaps {
		in := slices.Contains(defaultCaps, c)
		switch {
		case privileged:
			in = true
		case addAll:
			in = !drops[c]
		case dropAll:
			in = adds[c]
		default:
			// A capability both added and dropped is dropped.
			in = (in || adds[c]) && !drops[c]
		}
		if in {
			out = append(out, c)
		}
	}
	return out, nil
}

// availableCaps keeps the capabilities that the daemon itself can give.
func (h hostFacts) availableCaps(caps []string) []string {
	if h.Caps == 0 {
		return caps
	}
	return slices.DeleteFunc(slices.Clone(caps), func(c string) bool {
		i := slices.Index(allCaps, c)
		return h.Caps&(1<<i) == 0
	})
}

// capabilitySets fills the five sets. Inheritable and ambient stay empty, or a
// program with file capabilities would gain them (CVE-2022-24769).
func capabilitySets(caps []string, uid uint32) *specs.LinuxCapabilities {
	if uid != 0 {
		return &specs.LinuxCapabilities{Bounding: caps}
	}
	return &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
}

// security is what Docker's --security-opt says.
type security struct {
	noNewPrivileges       bool
	seccomp               string // "": default; "unconfined"; or a profile's JSON
	systemPathsUnconfined bool
	writableCgroups       bool
	apparmor              string // "": the default profile; "unconfined"; or a profile's name
}

func parseSecurity(opts []string) (security, error) {
	var s security
	for _, o := range opts {
		k, v, has := strings.Cut(o, "=")
		if !has {
			k, v, has = strings.Cut(o, ":")
		}
		var err error
		switch k {
		case "no-new-privileges":
			s.noNewPrivileges, err = securityBool(o, v, has)
		case "writable-cgroups":
			s.writableCgroups, err = securityBool(o, v, has)
		case "seccomp":
			switch v {
			case "":
				err = invalidf("invalid --security-opt: %q: expected unconfined, builtin or a profile", o)
			case "builtin", "default":
				s.seccomp = ""
			default:
				s.seccomp = v
			}
		case "systempaths":
			if v != "unconfined" {
				err = invalidf("invalid --security-opt: %q: expected systempaths=unconfined", o)
			}
			s.systemPathsUnconfined = true
		case "apparmor":
			if v == "" || strings.ContainsAny(v, "\x00\n") {
				err = invalidf("invalid --security-opt: %q: expected unconfined or the name of a profile", o)
			}
			s.apparmor = v
		case "label":
			// Where SELinux is off, which is everywhere we run, labels change nothing.
			if v == "" {
				err = invalidf("invalid --security-opt: %q: expected label=disable or label=user:, role:, type:, level:, filetype:", o)
			}
		default:
			err = invalidf("invalid --security-opt: %q: known are apparmor, label, no-new-privileges, seccomp, systempaths, writable-cgroups", o)
		}
		if err != nil {
			return s, err
		}
	}
	return s, nil
}

// securityBool reads option o, which stands for true without a value.
func securityBool(o, value string, has bool) (bool, error) {
	if !has {
		return true, nil
	}
	b, err := strconv.ParseBool(value)
	if err != nil {
		return false, invalidf("invalid --security-opt: %q: expected true or false", o)
	}
	return b, nil
}

// seccompProfile gives the filter: Docker's default profile compiled for this host
// and the container's capabilities, unless the client says otherwise.
func seccompProfile(sec security, privileged bool, s *specs.Spec, h hostFacts) (*specs.LinuxSeccomp, error) {
	switch {
	case sec.seccomp == "unconfined", privileged && sec.seccomp == "":
		return nil, nil
	case sec.seccomp == "":
		if !h.Seccomp {
			return nil, nil
		}
		p, err := seccomp.GetDefaultProfile(s)
		if err != nil {
			return nil, fmt.Errorf("default seccomp profile: %w", err)
		}
		return p, nil
	}
	p, err := seccomp.LoadProfile(sec.seccomp, s)
	if err != nil {
		return nil, invalidf("invalid seccomp profile: %v", err)
	}
	return p, nil
}

// reservedAnnotations are prefixes that a runtime gives a meaning to that reaches
// the host: systemd properties, helper binaries, hooks. Nobody sets these through an API.
var reservedAnnotations = []string{"org.systemd.property.", "run.oci.", "io.katacontainers.", "io.containerd.", "org.criu.", "krun."}

func validateAnnotations(a map[string]string) error {
	for k, v := range a {
		if k == "" || strings.ContainsRune(k+v, 0) {
			return invalidf("invalid annotation %q", k)
		}
		for _, p := range reservedAnnotations {
			if strings.HasPrefix(k, p) {
				return invalidf("annotation %q is reserved and cannot be set", k)
			}
		}
	}
	return nil
}
