//go:build linux

package plan

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/defence"
)

// capabilities in the order of their numbers.
var capabilities = []string{
	"CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "LINUX_IMMUTABLE",
	"NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT",
	"SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE",
	"AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ",
	"PERFMON", "BPF", "CHECKPOINT_RESTORE",
}

// Capabilities lists the names that are known, with their prefix.
func Capabilities() []string {
	out := make([]string, len(capabilities))
	for i, c := range capabilities {
		out[i] = "CAP_" + c
	}
	return out
}

// capSet turns names into bits. Names that are unknown, or of what the runtime itself has
// not got, only give a warning, as the specification says.
func (c *compiler) capSet(names []string) (bits uint64) {
	for _, n := range names {
		i := slices.Index(capabilities, strings.TrimPrefix(strings.ToUpper(n), "CAP_"))
		if i < 0 || i > c.f.LastCap {
			c.warnOnce(fmt.Sprintf("capability %q is unknown or unavailable, ignored", n))
			continue
		}
		if name := "CAP_" + capabilities[i]; !c.userns && slices.Contains(c.f.Lacks, name) {
			c.warnOnce(fmt.Sprintf("capability %q is not the runtime's to give, ignored", name))
			continue
		}
		bits |= 1 << i
	}
	return bits
}

func (c *compiler) warnOnce(w string) {
	if !slices.Contains(c.p.Warnings, w) {
		c.p.Warnings = append(c.p.Warnings, w)
	}
}

var rlimits = table[int]{
	{"RLIMIT_CPU", 0}, {"RLIMIT_FSIZE", 1}, {"RLIMIT_DATA", 2}, {"RLIMIT_STACK", 3}, {"RLIMIT_CORE", 4}, {"RLIMIT_RSS", 5}, {"RLIMIT_NPROC", 6},
	{"RLIMIT_NOFILE", 7}, {"RLIMIT_MEMLOCK", 8}, {"RLIMIT_AS", 9}, {"RLIMIT_LOCKS", 10}, {"RLIMIT_SIGPENDING", 11}, {"RLIMIT_MSGQUEUE", 12},
	{"RLIMIT_NICE", 13}, {"RLIMIT_RTPRIO", 14}, {"RLIMIT_RTTIME", 15},
}

// process emits everything from a prepared environment to exec.
func (c *compiler) process(p *specs.Process) error {
	if p == nil {
		return c.noProcess()
	}
	if len(p.Args) == 0 {
		return errors.New("process.args: nothing to run")
	}
	if err := checkAffinity(p.ExecCPUAffinity); err != nil {
		return err
	}
	b := c.child
	c.own()
	if !c.o.NoNewKeyring {
		b.do("join a new session keyring")
		b.call(sysKeyctl, flags(unix.KEYCTL_JOIN_SESSION_KEYRING, "JOIN_SESSION_KEYRING"), str("_ses."+c.o.ID)).
			accept(unix.ENOSYS, unix.EPERM, unix.EDQUOT)
	}
	if !p.Terminal {
		c.stdio()
	}
	if err := c.schedule(p); err != nil {
		return err
	}
	c.p.OOMScoreAdj = p.OOMScoreAdj
	c.labels(p)
	if p.NoNewPrivileges {
		c.at("process.noNewPrivileges")
		b.do("set no_new_privs")
		b.call(sysPrctl, flags(unix.PR_SET_NO_NEW_PRIVS, "PR_SET_NO_NEW_PRIVS"), num(1), none, none, none)
	}
	again := c.chdir(p, true)
	caps := c.user(p)
	c.chdirAgain(p, again)
	c.at("process.args", 0)
	path := c.lookup(p)
	c.own()
	c.handOn()
	if err := c.rlimits(p); err != nil {
		return err
	}
	c.at("process.user.umask")
	b.do("set the umask")
	mask := uint32(0o022)
	if p.User.Umask != nil {
		mask = *p.User.Umask & 0o777
	}
	b.call(sysUmask, flags(uint64(mask), fmt.Sprintf("%#o", mask)))
	c.at("linux.seccomp")
	c.filter(p, caps)
	c.at("process.args")
	b.do("exec %q", p.Args[0])
	c.exec(p.Args, p.Env, path)
	return nil
}

// noProcess is for a configuration that cannot be started, which the specification lets
// be created: what is there has no rights, and waits.
func (c *compiler) noProcess() error {
	if !c.o.Hold {
		return errors.New("process: nothing to run")
	}
	b := c.child
	c.own()
	c.stdio()
	c.user(&specs.Process{})
	c.own()
	c.handOn()
	path := b.slot("path")
	b.do("wait")
	b.set(path, str("/"))
	c.exec([]string{"/"}, nil, path)
	return nil
}

func (c *compiler) stdio() {
	c.child.do("set up standard input and output")
	for i, s := range []Slot{SlotStdin, SlotStdout, SlotStderr} {
		c.child.call(sysDup3, in(s), num(i), none)
	}
}

// exec ends the program: the loader executes the path in slot.
func (c *compiler) exec(args, env []string, path Slot) {
	b := c.child
	b.class = ClassNoExec
	c.p.Hold = c.o.Hold
	argv := Strings(append([]string{""}, args...))
	b.poke(argv, 0, in(path))
	for _, s := range []Slot{SlotSync, SlotReport, SlotStart} {
		if s == SlotSync || c.o.Hold || c.p.Waits {
			b.call(sysFcntl, in(s), flags(unix.F_SETFD, "F_SETFD"), num(0))
		}
	}
	if c.noMountns {
		b.call(sysFcntl, in(c.root), flags(unix.F_SETFD, "F_SETFD"), num(0))
	}
	b.call(sysExecveat, in(SlotLoader), str(""), argv, Strings(env), flags(unix.AT_EMPTY_PATH, "EMPTY_PATH"))
	b.fail(unix.ENOEXEC) // not reached
}

// label gives what is mounted the SELinux label of the container's files.
func (c *compiler) label(m *mount) {
	label := c.spec.Linux.MountLabel
	if label == "" || m.bind {
		return
	}
	if !c.f.SELinux {
		if w := fmt.Sprintf("linux.mountLabel %q has no effect: SELinux is not enabled on the host", label); !slices.Contains(c.p.Warnings, w) {
			c.p.Warnings = append(c.p.Warnings, w)
		}
		return
	}
	switch m.typ {
	case "proc", "sysfs", "cgroup", "cgroup2": // labelled by the policy
	case "mqueue":
		m.relabel = true
	default:
		m.data = append(m.data, "context="+label)
	}
}

// relabel sets the label of a file system that takes no option for it.
func (c *compiler) relabel(m *mount) {
	b := c.child
	dir, label := b.slot("target"), c.spec.Linux.MountLabel
	b.do("label %s", m.dest)
	b.call(sysOpenat, in(m.slot), str("."), openFlag(unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC), none).into(dir)
	b.call(sysFsetxattr, in(dir), str("security.selinux"), str(label), num(len(label)+1), none)
}

// labels asks the security modules for the label of the next exec, through the host's
// procfs.
func (c *compiler) labels(p *specs.Process) {
	b := c.child
	apparmor := p.ApparmorProfile != "" && c.lsm(c.f.AppArmor, "process.apparmorProfile", p.ApparmorProfile)
	selinux := p.SelinuxLabel != "" && c.lsm(c.f.SELinux, "process.selinuxLabel", p.SelinuxLabel)
	c.p.NeedsProc = c.p.NeedsProc || apparmor || selinux
	write := func(value string, files ...string) {
		file := b.slot("file")
		done := b.label()
		for i, f := range files {
			s := b.call(sysOpenat, in(SlotSelf), str(f), openFlag(unix.O_WRONLY|unix.O_CLOEXEC), none).into(file).onOK(done)
			if i < len(files)-1 {
				s.accept(unix.ENOENT)
			}
		}
		b.here(done)
		b.call(sysWrite, in(file), str(value), num(len(value))).expect(int64(len(value)))
	}
	if apparmor {
		c.at("process.apparmorProfile")
		b.do("set AppArmor profile %q", p.ApparmorProfile)
		write("exec "+p.ApparmorProfile, "thread-self/attr/apparmor/exec", "thread-self/attr/exec")
	}
	if selinux {
		c.at("process.selinuxLabel")
		b.do("set SELinux label %q", p.SelinuxLabel)
		write(p.SelinuxLabel, "thread-self/attr/exec")
	}
}

// lsm tells whether a label can be used. Where the host does not have the security
// module the label means nothing; engines set it all the same.
func (c *compiler) lsm(enabled bool, what, label string) bool {
	if !enabled {
		c.p.Warnings = append(c.p.Warnings, fmt.Sprintf("%s %q is ignored: this host does not have the security module", what, label))
	}
	return enabled
}

// chdir opens the working directory without magic links (CVE-2024-21626) and enters
// it. The first try, with the runtime's rights, may be refused on a network file
// system; the slot that it gives is then set, and the user tries again.
func (c *compiler) chdir(p *specs.Process, first bool) Slot {
	b := c.child
	c.at("process.cwd")
	b.do("chdir to cwd (%q)", p.Cwd)
	text := fmt.Sprintf("chdir to cwd (%q) set in config.json failed: %%e", p.Cwd)
	dir, failed := b.slot("cwd"), b.slot("cwd-failed")
	resolve := uint64(unix.RESOLVE_NO_MAGICLINKS)
	if !defence.CheckedCwd {
		resolve = 0
	}
	how := openHow(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, resolve)
	open := b.call(sysOpenat2, atCwd, str(p.Cwd), how, num(24)).into(dir).says(ClassInvalid, text)
	enter := b.call(sysFchdir, in(dir)).says(ClassInvalid, text)
	if first {
		fail, done := b.label(), b.label()
		open.accept(unix.EACCES, unix.EPERM).onFail(fail)
		enter.accept(unix.EACCES, unix.EPERM).onFail(fail)
		b.set(failed, num(0)).onOK(done)
		b.here(fail)
		b.set(failed, num(1))
		b.here(done)
	}
	return failed
}

func (c *compiler) chdirAgain(p *specs.Process, failed Slot) {
	b := c.child
	again, done := b.label(), b.label()
	c.at("process.cwd")
	b.do("chdir to cwd (%q)", p.Cwd)
	b.next(Branch, []Arg{in(failed)}).onOK(done).onFail(again)
	b.here(again)
	c.chdir(p, false)
	b.here(done)
	if !defence.CheckedCwd {
		return
	}
	// A directory outside the root has no path: getcwd(2) gives "(unreachable)".
	c.own()
	b.do("check that cwd is inside the container")
	buf, inside := b.buffer(), b.label()
	text := "current working directory is outside of container mount namespace root -- possible container breakout detected: %e"
	b.call(sysGetcwd, buf, num(BufferSize)).accept(unix.ERANGE).onFail(inside).says(ClassInvalid, text)
	b.check(buf, 0, 0xff, '/', unix.EXDEV).says(ClassInvalid, text)
	b.here(inside)
}

// capSets are the sets that capset(2) takes.
type capSets struct{ effective, permitted, inheritable uint64 }

func (c *compiler) capset(s capSets) {
	header := data(halves(unix.LINUX_CAPABILITY_VERSION_3, 0), "{VERSION_3, 0}")
	body := halves(uint32(s.effective), uint32(s.permitted), uint32(s.inheritable), uint32(s.effective>>32), uint32(s.permitted>>32), uint32(s.inheritable>>32))
	c.child.call(sysCapset, header, data(body, fmt.Sprintf("{effective %#x, permitted %#x, inheritable %#x}", s.effective, s.permitted, s.inheritable)))
}

// user drops privileges, but for the one to load a seccomp filter. It gives the sets
// that the program is to have.
func (c *compiler) user(p *specs.Process) capSets {
	b := c.child
	set := func(v []string) uint64 { return c.capSet(v) }
	var caps capSets
	var bounding, ambient uint64
	if k := p.Capabilities; k != nil {
		bounding, ambient = set(k.Bounding), set(k.Ambient)
		caps = capSets{set(k.Effective), set(k.Permitted), set(k.Inheritable)}
	}
	c.at("process.capabilities.bounding")
	b.do("limit the bounding set")
	for i := range c.f.LastCap + 1 {
		if bounding&(1<<i) == 0 {
			name := fmt.Sprintf("CAP_%d", i)
			if i < len(capabilities) {
				name = "CAP_" + capabilities[i]
			}
			b.call(sysPrctl, flags(unix.PR_CAPBSET_DROP, "PR_CAPBSET_DROP"), flags(uint64(i), name), none, none, none)
		}
	}
	c.at("process.user")
	b.do("become user %d, group %d", p.User.UID, p.User.GID)
	b.call(sysPrctl, flags(unix.PR_SET_KEEPCAPS, "PR_SET_KEEPCAPS"), num(1), none, none, none)
	groups := p.User.AdditionalGids
	s := b.call(sysSetgroups, num(len(groups)), data(halves(groups...), fmt.Sprint(groups)))
	if len(groups) == 0 && c.userns {
		// Denied in a user namespace whose setgroups file says so; there are none to drop then.
		s.accept(unix.EPERM)
	}
	gid, uid := num(p.User.GID), num(p.User.UID)
	b.call(sysSetresgid, gid, gid, gid)
	b.call(sysSetresuid, uid, uid, uid)
	b.call(sysPrctl, flags(unix.PR_SET_KEEPCAPS, "PR_SET_KEEPCAPS"), num(0), none, none, none)
	c.at("process.capabilities")
	b.do("set capabilities")
	now := caps
	if c.filterNeedsAdmin(p) {
		now.permitted |= 1 << unix.CAP_SYS_ADMIN
	}
	c.capset(now)
	b.call(sysPrctl, flags(unix.PR_CAP_AMBIENT, "PR_CAP_AMBIENT"), flags(unix.PR_CAP_AMBIENT_CLEAR_ALL, "CLEAR_ALL"), none, none, none)
	for i, name := range capabilities {
		if ambient&(1<<i) == 0 {
			continue
		}
		s := b.call(sysPrctl, flags(unix.PR_CAP_AMBIENT, "PR_CAP_AMBIENT"), flags(unix.PR_CAP_AMBIENT_RAISE, "RAISE"), flags(uint64(i), "CAP_"+name), none, none)
		// What is not both permitted and inheritable cannot be ambient. Callers ask for it
		// all the same (runc's own default does), and runc lets it pass.
		s.accept(unix.EPERM)
	}
	return caps
}

// filterNeedsAdmin: without no_new_privs only a privileged process may load a filter.
func (c *compiler) filterNeedsAdmin(p *specs.Process) bool {
	return len(c.o.Filter.Program) > 0 && !p.NoNewPrivileges
}

// filter loads the seccomp filter as late as possible, so that the profile need not
// allow what only the runtime does.
func (c *compiler) filter(p *specs.Process, caps capSets) {
	b := c.child
	if !c.filterNeedsAdmin(p) && !c.o.Filter.Notify {
		c.p.Filter = c.o.Filter // the loader does it, after start
		return
	}
	b.do("load the seccomp filter")
	if p.NoNewPrivileges {
		c.notify(c.loadFilter())
		return
	}
	const admin = 1 << unix.CAP_SYS_ADMIN
	if caps.effective&admin == 0 {
		c.capset(capSets{caps.effective | admin, caps.permitted | admin, caps.inheritable})
	}
	load := c.loadFilter()
	if c.o.Filter.Notify {
		c.notify(load)
	}
	if caps.permitted&admin == 0 || caps.effective&admin == 0 {
		b.do("give up the capability to load filters")
		c.capset(caps)
	}
}

func (c *compiler) loadFilter() *Step {
	f := c.o.Filter
	return c.child.call(sysSeccomp, flags(unix.SECCOMP_SET_MODE_FILTER, "SET_MODE_FILTER"), num(f.Flags), Arg{Kind: ArgFilter, more: &argMore{filter: f.Program}, Slot: NoSlot})
}

// notify makes the step that loads the filter ask for a listener, and lets the parent
// take it. Of the calls that the filter can stop, this takes write and read.
func (c *compiler) notify(load *Step) {
	b := c.child
	listener, word := b.slot("listener"), b.buffer()
	load.Args[1] = flags(uint64(c.o.Filter.Flags)|unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, fmt.Sprintf("%d|NEW_LISTENER", c.o.Filter.Flags))
	load.into(listener)
	b.do("hand the seccomp listener to the parent")
	b.poke(word, 0, flags(uint64(1<<64-1+MsgListener+1), "LISTENER"))
	b.poke(word, 4, in(listener))
	b.call(sysWrite, in(SlotSync), word, num(8)).expect(8)
	b.call(sysRead, in(SlotSync), b.buffer(), num(1)).expect(1)
}

// lookup finds the program as the container's user, so that a wrong name is an error
// of create, in the words that callers know. It gives the slot with the path.
func (c *compiler) lookup(p *specs.Process) Slot {
	b := c.child
	name := p.Args[0]
	slot := b.slot("path")
	b.do("look up %q", name)
	b.class = ClassNoExec
	prefix := fmt.Sprintf("exec: %q: ", name)
	if strings.Contains(name, "/") {
		c.executable(name, slot, func(s *Step, what int) {
			switch what {
			case isMissing:
				s.says(ClassNoExec, prefix+"stat "+name+": %e")
			default:
				s.says(ClassNoExec, prefix+"%e")
			}
		})
		return slot
	}
	found := b.label()
	for _, dir := range strings.Split(env(p.Env, "PATH"), ":") {
		if dir == "" {
			dir = "."
		}
		next := b.label()
		c.executable(path.Join(dir, name), slot, func(s *Step, what int) {
			s.Any = true
			s.onFail(next)
		}).onOK(found)
		b.here(next)
	}
	b.fail(unix.ENOENT).says(ClassNoExec, prefix+"executable file not found in $PATH")
	b.here(found)
	return slot
}

const (
	isMissing = iota
	isOther
)

// executable checks one candidate; handle says what its failures mean. The path is
// only looked at here: the loader executes it later.
func (c *compiler) executable(file string, into Slot, handle func(*Step, int)) *Step {
	b := c.child
	fd, buf := b.slot("exe"), b.buffer()
	var st unix.Stat_t
	handle(b.call(sysOpenat, atCwd, str(file), openFlag(unix.O_PATH|unix.O_CLOEXEC), none).into(fd), isMissing)
	handle(b.call(sysFstat, in(fd), buf), isMissing)
	isFile := b.label()
	dir := b.check(buf, unsafe.Offsetof(st.Mode), unix.S_IFMT, unix.S_IFDIR, 0)
	dir.onFail(isFile).Any = true
	handle(b.fail(unix.EISDIR), isOther)
	b.here(isFile)
	handle(b.call(sysFaccessat2, in(fd), str(""), flags(unix.X_OK, "X_OK"), flags(unix.AT_EMPTY_PATH|unix.AT_EACCESS, "EMPTY_PATH|EACCESS")), isOther)
	return b.set(into, str(file))
}

func env(list []string, key string) string {
	for _, e := range slices.Backward(list) {
		if v, ok := strings.CutPrefix(e, key+"="); ok {
			return v
		}
	}
	return ""
}

// handOn moves descriptors that the program gets into place, and marks all others
// close-on-exec.
func (c *compiler) handOn() {
	b := c.child
	for i := range c.p.Preserve {
		b.do("hand on descriptor %d", 3+i)
		b.call(sysDup3, in(b.slot(fmt.Sprintf("preserve%d", i))), num(3+i), none)
	}
	b.do("close all other descriptors")
	keep := []Arg{in(SlotSync), in(SlotReport), in(SlotLoader)}
	if c.noMountns {
		keep = append(keep, in(c.root)) // the mounts go with the last descriptor of their root
	}
	if c.o.Hold || c.p.Waits {
		keep = append(keep, in(SlotStart))
	}
	b.next(CloseAll, keep).Off = uint32(c.p.Preserve)
	b.call(sysCloseRange, num(3+c.p.Preserve), flags(uint64(^uint32(0)), "~0"), flags(unix.CLOSE_RANGE_CLOEXEC, "CLOEXEC"))
}

func (c *compiler) rlimits(p *specs.Process) error {
	b := c.child
	limits, err := ParseRlimits(p.Rlimits)
	for i, l := range limits {
		c.at("process.rlimits", i)
		c.p.Rlimits = append(c.p.Rlimits, l)
		name := p.Rlimits[i].Type
		b.do("set %s to %d:%d", name, l.Soft, l.Hard)
		b.call(sysPrlimit, num(0), flags(uint64(l.Resource), name), data(words(l.Soft, l.Hard), fmt.Sprintf("{%d, %d}", l.Soft, l.Hard)), none)
	}
	return err
}

// ParseRlimits gives the numbers of resource limits, up to the first that is wrong.
func ParseRlimits(list []specs.POSIXRlimit) (out []Rlimit, err error) {
	for _, r := range list {
		n, ok := rlimits.find(r.Type)
		if !ok {
			return out, fmt.Errorf("process.rlimits: unknown type %q", r.Type)
		}
		if r.Soft > r.Hard {
			return out, fmt.Errorf("process.rlimits: %s: soft limit %d is above the hard limit %d", r.Type, r.Soft, r.Hard)
		}
		if slices.ContainsFunc(out, func(o Rlimit) bool { return o.Resource == n }) {
			return out, fmt.Errorf("process.rlimits: %s is given twice", r.Type)
		}
		out = append(out, Rlimit{n, r.Soft, r.Hard})
	}
	return out, nil
}
