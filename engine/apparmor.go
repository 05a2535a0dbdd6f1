package engine

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// apparmorProfile is the profile that confines containers where AppArmor is on, unless the
// client names another.
const apparmorProfile = "hako-default"

// apparmorText is the profile's source (apparmor.d(5)). Files, networks and capabilities
// are decided by the container's mounts, namespaces and capabilities; the profile holds
// what remains of the host within their reach, also for a container that was given
// CAP_SYS_ADMIN or CAP_SYS_PTRACE, or whose system paths are not masked.
//
// %s stands for further lines.
const apparmorText = `profile hako-default flags=(attach_disconnected,mediate_deleted) {
  file,
  network,
  capability,
  umount,

  # Containers see and signal each other as far as their namespaces let them; the host
  # signals them.
  ptrace (read, readby, trace, tracedby) peer=hako-default,
  signal (send, receive) peer=hako-default,
  signal (receive) peer=unconfined,
%s
  # There is no rule for pivot_root either.
  deny mount,

  # Of /proc, what belongs to processes and to the container's namespaces can be written:
  # sys/net, sys/fs/mqueue, sys/kernel/{shm*,sem,msg*,hostname,domainname}.
  deny /proc/[^0-9st]** wlk,
  deny /proc/s[^ey]** wlk,
  deny /proc/t[^h]** wlk,
  deny /proc/sysrq-trigger rwlkx,
  deny /proc/kcore rwlkx,
  deny /proc/kpage* rwlkx,
  deny /proc/sys/[^fkn]** wlk,
  deny /proc/sys/fs/[^m]** wlk,
  deny /proc/sys/fs/m[^q]** wlk,
  deny /proc/sys/kernel/[^dhms]** wlk,
  deny /proc/sys/kernel/d[^o]** wlk,
  deny /proc/sys/kernel/h[^o]** wlk,
  deny /proc/sys/kernel/ho[^s]** wlk,
  deny /proc/sys/kernel/m[^s]** wlk,
  deny /proc/sys/kernel/s[^eh]** wlk,
  deny /proc/sys/kernel/se[^m]** wlk,

  # Of /sys, only cgroups.
  deny /sys/[^f]** wlk,
  deny /sys/f[^s]** wlk,
  deny /sys/fs/[^c]** wlk,
  deny /sys/fs/c[^g]** wlk,
  deny /sys/firmware/** rwlkx,
  deny /sys/devices/virtual/powercap/** rwlkx,
  deny /sys/kernel/{debug,security,tracing}/** rwlkx,
}
`

// apparmorLoad bounds the compilation of the profile, which takes a fraction of a second.
const apparmorLoad = 30 * time.Second

// apparmor brings the default profile into the kernel.
type apparmor struct {
	parser   string // apparmor_parser(8)
	profiles string // the kernel's list of profiles

	mu     sync.Mutex
	loaded bool // by this daemon: an older one may have loaded another text
}

// probeAppArmor tells whether AppArmor is on, and gives the name of the default profile: ""
// if containers cannot have it, and then why.
func probeAppArmor(sys string, parser string) (on bool, profile, why string) {
	if readLine(filepath.Join(sys, "module/apparmor/parameters/enabled")) != "Y" {
		return false, "", ""
	}
	if _, err := os.Stat(filepath.Join(sys, "kernel/security/apparmor/profiles")); err != nil {
		return true, "", "securityfs is not mounted on /sys/kernel/security"
	}
	if parser == "" {
		return true, "", "apparmor_parser is not installed"
	}
	return true, apparmorProfile, ""
}

// apparmorParser finds the compiler of profiles, whose folder is often not in a daemon's path.
func apparmorParser() string {
	for _, name := range []string{"apparmor_parser", "/usr/sbin/apparmor_parser", "/sbin/apparmor_parser"} {
		if p, err := exec.LookPath(name); err == nil {
			return p
		}
	}
	return ""
}

// ensure has the profile in the kernel when it returns without error. Somebody may have
// unloaded it since the last time (aa-remove-unknown does), so the kernel is asked.
func (a *apparmor) ensure(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.loaded && hasProfile(a.profiles) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, apparmorLoad)
	defer cancel()
	// -K: nothing is read from or written to its cache; -r: an older text is replaced.
	cmd := exec.CommandContext(ctx, a.parser, "-K", "-r")
	cmd.Stdin = strings.NewReader(apparmorSource(ownLabel()))
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("AppArmor is enabled on this host, but the profile %s could not be loaded: %w: %w: %.500s",
			apparmorProfile, errdefs.ErrInternal, err, bytes.TrimSpace(out))
	}
	a.loaded = true
	return nil
}

// hasProfile looks into the kernel's list: "NAME (MODE)" a line.
func hasProfile(list string) bool {
	b, err := os.ReadFile(list)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, apparmorProfile+" (") {
			return true
		}
	}
	return false
}

// apparmorSource is the profile for a daemon, and its shims, that run under a label
// themselves: they signal containers.
func apparmorSource(label string) string {
	extra := ""
	if label != "" && label != "unconfined" && !strings.ContainsAny(label, "\"\n\\") {
		extra = fmt.Sprintf("  signal (receive) peer=\"%s\",\n", label)
	}
	return fmt.Sprintf(apparmorText, extra)
}

// ownLabel is the profile that this process runs under.
func ownLabel() string {
	for _, p := range []string{"/proc/self/attr/apparmor/current", "/proc/self/attr/current"} {
		if l := readLine(p); l != "" {
			label, _, _ := strings.Cut(l, " (")
			return label
		}
	}
	return ""
}

// apparmorProfile gives process.apparmorProfile. Where AppArmor is off everything is
// unconfined, and a profile is refused rather than left out.
func (s security) apparmorProfile(h hostFacts, privileged bool) (string, error) {
	switch {
	case !h.AppArmor && (s.apparmor == "" || s.apparmor == "unconfined"):
		return "", nil
	case !h.AppArmor:
		return "", invalidf("--security-opt apparmor=%s: AppArmor is not enabled on the host", s.apparmor)
	case s.apparmor != "":
		return s.apparmor, nil
	case privileged && h.AppArmorProfile != "":
		return "unconfined", nil
	}
	return h.AppArmorProfile, nil
}

// appArmorProfile is the profile that a container's processes get.
func (e *Engine) appArmorProfile(c Config) string {
	sec, err := parseSecurity(c.SecurityOpt)
	if err != nil {
		return ""
	}
	p, err := sec.apparmorProfile(e.host, c.Privileged)
	if err != nil {
		return ""
	}
	return p
}
