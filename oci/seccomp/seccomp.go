//go:build linux

// Package seccomp compiles the seccomp profile of an OCI specification to a classic
// BPF program.
//
// In flow a profile, the machine's architecture and nothing else; out flow the
// program and the flags for seccomp(2). [Compile] is a pure function: it makes no
// system call, and the same profile gives the same program.
//
// What a profile means, where the specification leaves it open, is what it means to runc
// with libseccomp, for which profiles are written (tried out with runc 1.1.5):
//
//   - A rule that says the same as the default action does nothing.
//   - A rule without conditions decides for its system call, wherever it stands, and
//     whatever rules with conditions say. Of several, the first one does.
//   - Otherwise the first rule in the profile's order decides whose conditions all hold.
//     (libseccomp has an order of its own here.) Where none does, the default action.
//   - A rule with several conditions on the same argument stands for as many rules with
//     one of these conditions each: "arg0 is 1, arg0 is 2" means either.
//   - Names that an architecture does not have, or that are not known at all, are
//     skipped: one profile serves several architectures and kernels.
//   - Where the default action is an error or a kill, a system call that is newer than
//     every one which the profile names answers ENOSYS: see [newerThan].
//   - The machine's own architecture is always there, whether listed or not. A call
//     through one that is not listed kills the process.
//   - Without a "flags" field SECCOMP_FILTER_FLAG_SPEC_ALLOW is set, as runc does; an
//     empty list sets none.
package seccomp

import (
	"fmt"
	"runtime"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

//go:generate go run ./internal/gen

// MaxInstructions is the kernel's limit for one program (BPF_MAXINSNS).
const MaxInstructions = 4096

// ErrTooLong says that the program would exceed MaxInstructions.
var ErrTooLong error = tooLong{}

type tooLong struct{}

func (tooLong) Error() string {
	return fmt.Sprintf("the seccomp profile compiles to more than %d instructions: %v", MaxInstructions, errdefs.ErrOutOfRange)
}

func (tooLong) Unwrap() error { return errdefs.ErrOutOfRange }

// Options say for which machine a profile is compiled.
type Options struct {
	// Arch is the machine, in Go's words: "amd64" or "arm64". Empty is the one that
	// this program was built for.
	Arch string
}

// Filter is a compiled profile.
type Filter struct {
	Program []unix.SockFilter
	Flags   uint // SECCOMP_FILTER_FLAG_* for seccomp(2)
	// Notify: some calls are decided by a listener (SCMP_ACT_NOTIFY), which is to be
	// asked for with SECCOMP_FILTER_FLAG_NEW_LISTENER.
	Notify bool
}

// Compile compiles a profile. An error for a profile that is wrong is
// errdefs.ErrInvalidArgument.
func Compile(p *specs.LinuxSeccomp, o Options) (Filter, error) {
	if p == nil {
		return Filter{}, fmt.Errorf("compile seccomp profile: there is none: %w", errdefs.ErrInvalidArgument)
	}
	if o.Arch == "" {
		o.Arch = runtime.GOARCH
	}
	f, err := compile(p, o.Arch)
	if err != nil {
		return Filter{}, fmt.Errorf("compile seccomp profile: %w", err)
	}
	return f, nil
}

func compile(p *specs.LinuxSeccomp, machine string) (Filter, error) {
	archs, err := architectures(machine, p.Architectures)
	if err != nil {
		return Filter{}, err
	}
	profile, err := parse(p)
	if err != nil {
		return Filter{}, err
	}
	notify, err := profile.notify()
	if err != nil {
		return Filter{}, err
	}
	flags, err := filterFlags(p.Flags, notify)
	if err != nil {
		return Filter{}, err
	}
	b := &builder{}
	// The program is written backwards, so that every jump's target is known: what is
	// wanted first comes last.
	entry := make([]int, len(archs))
	for i := len(archs) - 1; i >= 0; i-- {
		entry[i] = b.arch(archs[i], profile)
	}
	next := b.ret(retBadArch)
	for i := len(archs) - 1; i >= 0; i-- {
		next = b.jump(unix.BPF_JEQ, archs[i].audit, entry[i], next)
	}
	b.load(offArch, next)
	if b.full {
		return Filter{}, ErrTooLong
	}
	return Filter{Program: b.program(), Flags: flags, Notify: notify}, nil
}

// notify tells whether a listener is needed.
func (p *profile) notify() (bool, error) {
	found := false
	for _, r := range p.rules {
		if r.ret != unix.SECCOMP_RET_USER_NOTIF {
			continue
		}
		for _, c := range r.calls {
			if found = true; c.name == "write" {
				return false, invalid("SCMP_ACT_NOTIFY cannot decide over write: it takes a write to hand the listener over")
			}
		}
	}
	return found, nil
}

func filterFlags(list []specs.LinuxSeccompFlag, notify bool) (uint, error) {
	if list == nil {
		return unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, nil
	}
	var flags uint
	for _, f := range list {
		switch f {
		case "SECCOMP_FILTER_FLAG_TSYNC":
			// There is one thread when the filter is loaded. The kernel refuses this flag
			// together with a listener.
			if !notify {
				flags |= unix.SECCOMP_FILTER_FLAG_TSYNC
			}
		case specs.LinuxSeccompFlagLog:
			flags |= unix.SECCOMP_FILTER_FLAG_LOG
		case specs.LinuxSeccompFlagSpecAllow:
			flags |= unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
		case specs.LinuxSeccompFlagWaitKillableRecv:
			// It says how to wait for a listener. The kernel refuses it without one.
			if notify {
				flags |= unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
			}
		default:
			return 0, invalid("unknown flag %q", short(string(f)))
		}
	}
	return flags, nil
}

// Features lists what Compile knows, for the "features" command.
type Features struct {
	Actions   []specs.LinuxSeccompAction
	Operators []specs.LinuxSeccompOperator
	Archs     []specs.Arch
	Flags     []specs.LinuxSeccompFlag
}

// Supported gives the features.
func Supported() Features {
	return Features{
		Actions: []specs.LinuxSeccompAction{
			specs.ActAllow, specs.ActErrno, specs.ActKill, specs.ActKillProcess, specs.ActKillThread, specs.ActLog, specs.ActNotify, specs.ActTrace, specs.ActTrap,
		},
		Operators: []specs.LinuxSeccompOperator{
			specs.OpEqualTo, specs.OpGreaterEqual, specs.OpGreaterThan, specs.OpLessEqual, specs.OpLessThan, specs.OpMaskedEqual, specs.OpNotEqual,
		},
		Archs: []specs.Arch{specs.ArchAARCH64, specs.ArchARM, specs.ArchX32, specs.ArchX86, specs.ArchX86_64},
		Flags: []specs.LinuxSeccompFlag{
			specs.LinuxSeccompFlagLog, specs.LinuxSeccompFlagSpecAllow, "SECCOMP_FILTER_FLAG_TSYNC", specs.LinuxSeccompFlagWaitKillableRecv,
		},
	}
}

// FlagsOfKernel gives those of the flags that the running kernel takes.
func FlagsOfKernel() (out []specs.LinuxSeccompFlag) {
	bits := map[specs.LinuxSeccompFlag]uintptr{
		specs.LinuxSeccompFlagLog: unix.SECCOMP_FILTER_FLAG_LOG, specs.LinuxSeccompFlagSpecAllow: unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW,
		"SECCOMP_FILTER_FLAG_TSYNC": unix.SECCOMP_FILTER_FLAG_TSYNC,
		// Only together with a listener.
		specs.LinuxSeccompFlagWaitKillableRecv: unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV | unix.SECCOMP_FILTER_FLAG_NEW_LISTENER,
	}
	for _, f := range Supported().Flags {
		// There is no filter at address 0: EFAULT says that the kernel got as far as that.
		_, _, e := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, bits[f], 0)
		if e == unix.EFAULT {
			out = append(out, f)
		}
	}
	return out
}

func invalid(format string, a ...any) error {
	return fmt.Errorf(format+": %w", append(a, errdefs.ErrInvalidArgument)...)
}

func short(s string) string {
	if len(s) > 64 {
		return s[:64] + "..."
	}
	return s
}
