//go:build linux

package seccomp

import (
	"fmt"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// call is a row of the table of system calls.
type call struct {
	name string
	nr   [5]int32 // by column
}

// The columns of the table.
const (
	columnAMD64 = iota
	columnI386
	columnARM64
	columnARM
	columnX32
)

// lookup finds a system call by name.
func lookup(name string) (*call, bool) {
	i, j := 0, len(calls)
	for i < j {
		if m := (i + j) / 2; calls[m].name < name {
			i = m + 1
		} else {
			j = m
		}
	}
	if i == len(calls) || calls[i].name != name {
		return nil, false
	}
	return &calls[i], true
}

// abi is one set of system call numbers.
type abi struct {
	column int
	base   uint32 // added to the table's numbers
	is32   bool   // arguments are 32 bits wide
}

// arch is what the kernel tells a filter apart by, with the ABIs that share it.
type arch struct {
	audit uint32
	abis  []abi
	// x32Missing: numbers with x32's bit are not to be let through.
	x32Missing bool
}

const x32Bit = 1 << 30

// architectures gives the machine's own architecture, then those others of the list
// that the machine can run.
func architectures(machine string, list []specs.Arch) ([]arch, error) {
	for _, a := range list {
		if !slices.Contains(known, a) {
			return nil, invalid("unknown architecture %q", short(string(a)))
		}
	}
	switch machine {
	case "amd64":
		native := arch{audit: unix.AUDIT_ARCH_X86_64, abis: []abi{{column: columnAMD64}}, x32Missing: true}
		if slices.Contains(list, specs.ArchX32) {
			native.abis, native.x32Missing = append(native.abis, abi{column: columnX32, base: x32Bit}), false
		}
		if slices.Contains(list, specs.ArchX86) {
			return []arch{native, {audit: unix.AUDIT_ARCH_I386, abis: []abi{{column: columnI386, is32: true}}}}, nil
		}
		return []arch{native}, nil
	case "arm64":
		native := arch{audit: unix.AUDIT_ARCH_AARCH64, abis: []abi{{column: columnARM64}}}
		if slices.Contains(list, specs.ArchARM) {
			return []arch{native, {audit: unix.AUDIT_ARCH_ARM, abis: []abi{{column: columnARM, is32: true}}}}, nil
		}
		return []arch{native}, nil
	}
	return nil, invalid("seccomp on machine %q is not supported", short(machine))
}

// known are the architectures of the specification. Those of other machines do no
// harm: no process here can make their calls.
var known = []specs.Arch{
	specs.ArchX86, specs.ArchX86_64, specs.ArchX32, specs.ArchARM, specs.ArchAARCH64,
	specs.ArchMIPS, specs.ArchMIPS64, specs.ArchMIPS64N32, specs.ArchMIPSEL, specs.ArchMIPSEL64, specs.ArchMIPSEL64N32,
	specs.ArchPPC, specs.ArchPPC64, specs.ArchPPC64LE, specs.ArchS390, specs.ArchS390X,
	specs.ArchPARISC, specs.ArchPARISC64, specs.ArchRISCV64, specs.ArchLOONGARCH64, specs.ArchM68K, specs.ArchSH, specs.ArchSHEB,
}

// What a filter answers.
const (
	retENOSYS  = uint32(unix.SECCOMP_RET_ERRNO) | uint32(unix.ENOSYS)
	retBadArch = uint32(unix.SECCOMP_RET_KILL_PROCESS)
)

// profile is a checked profile.
type profile struct {
	rules    []rule
	fallback uint32 // the default action
	// enosys: calls that the profile cannot know of answer ENOSYS instead of fallback.
	enosys bool
	// muxed: the profile does not name socketcall(2) or ipc(2), so that rules for what
	// these do apply to them. By mux.
	muxed [2]bool
}

// rule applies to all its calls.
type rule struct {
	calls []*call
	conds [][]cond // alternatives, each a list of what must hold; none: always
	ret   uint32
}

type cond struct {
	index         uint
	op            specs.LinuxSeccompOperator
	value, value2 uint64
}

// permissive tells whether an answer lets the call happen.
func permissive(ret uint32) bool {
	return ret == unix.SECCOMP_RET_ALLOW || ret == unix.SECCOMP_RET_LOG
}

// maxBranches bounds the work for a hostile profile. Docker's has some 500.
const maxBranches = 1 << 18

func parse(p *specs.LinuxSeccomp) (*profile, error) {
	fallback, err := answer(p.DefaultAction, p.DefaultErrnoRet)
	if err != nil {
		return nil, fmt.Errorf("default action: %w", err)
	}
	if p.DefaultAction == specs.ActNotify {
		return nil, invalid("SCMP_ACT_NOTIFY cannot be the default action: nobody would be there to decide")
	}
	out := &profile{fallback: fallback, muxed: [2]bool{true, true}, rules: make([]rule, 0, len(p.Syscalls))}
	switch p.DefaultAction {
	case specs.ActErrno, specs.ActKill, specs.ActKillThread, specs.ActKillProcess:
		out.enosys = true
	}
	total := 0
	for i, s := range p.Syscalls {
		if len(s.Names) == 0 {
			return nil, invalid("rule %d names no system call", i)
		}
		r := rule{calls: make([]*call, 0, len(s.Names))}
		if r.ret, err = answer(s.Action, s.ErrnoRet); err != nil {
			return nil, fmt.Errorf("rule %d (%s): %w", i, short(s.Names[0]), err)
		}
		if r.conds, err = conditions(s.Args); err != nil {
			return nil, fmt.Errorf("rule %d (%s): %w", i, short(s.Names[0]), err)
		}
		for _, name := range s.Names {
			c, ok := lookup(name)
			if !ok {
				continue
			}
			r.calls = append(r.calls, c)
			for m, mux := range muxes {
				out.muxed[m] = out.muxed[m] && name != mux.name
			}
		}
		// Many names times many alternatives is a small profile of a large size.
		if total += max(1, len(r.conds)) * len(r.calls); total > maxBranches {
			return nil, ErrTooLong
		}
		out.rules = append(out.rules, r)
	}
	return out, nil
}

// answer translates an action.
func answer(a specs.LinuxSeccompAction, errno *uint) (uint32, error) {
	const maxErrno, maxData = 4095, unix.SECCOMP_RET_DATA
	code := uint(unix.EPERM)
	if errno != nil {
		code = *errno
	}
	switch a {
	case specs.ActErrno:
		if code > maxErrno {
			return 0, invalid("errno %d is above %d", code, maxErrno)
		}
		return unix.SECCOMP_RET_ERRNO | uint32(code), nil
	case specs.ActTrace:
		if code > maxData {
			return 0, invalid("errnoRet %d is above %d", code, maxData)
		}
		return unix.SECCOMP_RET_TRACE | uint32(code), nil
	}
	var ret uint32
	switch a {
	case specs.ActKill, specs.ActKillThread:
		ret = unix.SECCOMP_RET_KILL_THREAD
	case specs.ActKillProcess:
		ret = unix.SECCOMP_RET_KILL_PROCESS
	case specs.ActTrap:
		ret = unix.SECCOMP_RET_TRAP
	case specs.ActAllow:
		ret = unix.SECCOMP_RET_ALLOW
	case specs.ActLog:
		ret = unix.SECCOMP_RET_LOG
	case specs.ActNotify:
		ret = unix.SECCOMP_RET_USER_NOTIF
	case "":
		return 0, invalid("no action")
	default:
		return 0, invalid("unknown action %q", short(string(a)))
	}
	if errno != nil {
		return 0, invalid("%s takes no errno", a) // the specification: MUST fail
	}
	return ret, nil
}

// conditions gives the alternatives that a list of conditions stands for.
func conditions(args []specs.LinuxSeccompArg) ([][]cond, error) {
	if len(args) == 0 {
		return nil, nil
	}
	var all []cond
	var seen [6]bool
	repeated := false
	for _, a := range args {
		if a.Index >= uint(len(seen)) {
			return nil, invalid("there is no argument %d", a.Index)
		}
		switch a.Op {
		case specs.OpEqualTo, specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpGreaterThan, specs.OpGreaterEqual, specs.OpMaskedEqual:
		default:
			return nil, invalid("unknown operator %q", short(string(a.Op)))
		}
		repeated = repeated || seen[a.Index]
		seen[a.Index] = true
		all = append(all, cond{a.Index, a.Op, a.Value, a.ValueTwo})
	}
	if !repeated {
		return [][]cond{all}, nil
	}
	alternatives := make([][]cond, len(all))
	for i := range all {
		alternatives[i] = all[i : i+1]
	}
	return alternatives, nil
}

// mux is a system call of i386 that does the work of several, chosen by its first
// argument. The calls that it stands for have numbers of their own too, since Linux
// 4.3; a rule for one of them must hold whichever way it is made.
type mux struct {
	name  string
	mask  uint64 // the part of the argument that chooses
	calls []string
}

var muxes = [2]mux{
	{"socketcall", 1<<32 - 1, []string{ // by number from 1, see include/uapi/linux/net.h
		1: "socket", 2: "bind", 3: "connect", 4: "listen", 5: "accept", 6: "getsockname", 7: "getpeername",
		8: "socketpair", 9: "send", 10: "recv", 11: "sendto", 12: "recvfrom", 13: "shutdown", 14: "setsockopt",
		15: "getsockopt", 16: "sendmsg", 17: "recvmsg", 18: "accept4", 19: "recvmmsg", 20: "sendmmsg",
	}},
	{"ipc", 0xffff, []string{ // the upper half is a version, see include/uapi/linux/ipc.h
		1: "semop", 2: "semget", 3: "semctl", 4: "semtimedop", 11: "msgsnd", 12: "msgrcv", 13: "msgget", 14: "msgctl",
		21: "shmat", 22: "shmdt", 23: "shmget", 24: "shmctl",
	}},
}

// branch is a rule as it applies to one number.
type branch struct {
	conds []cond // all must hold
	ret   uint32
}

// The tables' numbers lie close together but for ARM's private ones. A slot is a
// number without that gap.
const (
	armPrivate = 0xf0000
	gapAt      = 640 // above all others
	slots      = gapAt + 16
)

func slot(nr uint32) int {
	if nr >= armPrivate {
		return int(nr) - armPrivate + gapAt
	}
	return int(nr)
}

func (a abi) number(slot int) uint32 {
	if slot >= gapAt {
		return a.base + uint32(slot) - gapAt + armPrivate
	}
	return a.base + uint32(slot)
}

// decision is what the profile says about one number.
type decision struct {
	named  bool
	always bool     // ret, whatever the arguments are
	ret    uint32   // if always
	some   []branch // else these in order, and then the default
}

// decide gives the decision for each slot.
func (p *profile) decide(a abi) []decision {
	out := make([]decision, slots)
	for i := range p.rules {
		r := &p.rules[i]
		same := r.ret == p.fallback // says nothing new
		for _, c := range r.calls {
			if nr := c.nr[a.column]; nr >= 0 {
				d := &out[slot(uint32(nr))]
				d.named = true
				switch {
				case same || d.always:
				case r.conds == nil:
					d.always, d.ret = true, r.ret
				default:
					for _, conds := range r.conds {
						d.some = append(d.some, branch{a.narrow(conds), r.ret})
					}
				}
			}
			if a.column == columnI386 {
				p.throughMux(r, c.name, out)
			}
		}
	}
	return out
}

// throughMux applies a rule to the multiplexed form of the call. Conditions cannot be
// checked there, because the arguments lie in memory: a rule that lets through is not
// applied then, one that forbids is applied in all cases.
func (p *profile) throughMux(r *rule, name string, out []decision) {
	for m := range muxes {
		mux := &muxes[m]
		if !p.muxed[m] || r.conds != nil && permissive(r.ret) {
			continue
		}
		part := slices.Index(mux.calls, name)
		if part < 0 {
			continue
		}
		row, _ := lookup(mux.name)
		d := &out[slot(uint32(row.nr[columnI386]))]
		if d.named = true; r.ret != p.fallback {
			d.some = append(d.some, branch{[]cond{{0, specs.OpMaskedEqual, mux.mask, uint64(part)}}, r.ret})
		}
	}
}

// narrow makes values fit for 32-bit arguments, which the kernel widens with zeroes:
// a negative number that was written with 64 bits means the one of 32 bits there.
func (a abi) narrow(conds []cond) []cond {
	if !a.is32 {
		return conds
	}
	out := slices.Clone(conds)
	for i, c := range out {
		if c.op != specs.OpMaskedEqual && c.value>>31 == 1<<33-1 {
			out[i].value = c.value & (1<<32 - 1)
		}
	}
	return out
}

// newerThan gives the newest call that the profile names on this ABI; ok is false where
// calls above it are nothing special.
//
// A profile is written for the kernels of its day. What comes later it cannot allow,
// but to answer EPERM is wrong: libraries try the new call first and fall back to the
// old one only on ENOSYS (glibc with clone3 and faccessat2; runc issue 2151). That a
// profile names a call, with whatever action, shows that its author knew of it and of
// all with smaller numbers; so those keep the default action, and all above answer
// ENOSYS, as on a kernel without them.
func (p *profile) newerThan(a abi, decided []decision) (newest uint32, ok bool) {
	if !p.enosys {
		return 0, false
	}
	for slot := len(decided) - 1; slot >= 0; slot-- {
		if decided[slot].named && !a.outOfOrder(slot) {
			return a.number(slot), true
		}
	}
	return 0, false
}

// x32's own numbers.
const x32First, x32Last = 512, 547

// outOfOrder tells of numbers that say nothing about a call's age: x32's and ARM's own.
func (a abi) outOfOrder(slot int) bool {
	return a.column == columnX32 && slot >= x32First && slot <= x32Last || a.column == columnARM && slot >= gapAt
}

// outcome is what happens to a number: one answer, or, with branches, what the first
// one whose conditions hold says, and else the answer.
type outcome struct {
	ret      uint32
	branches []branch
}

func (o outcome) equal(q outcome) bool {
	return o.ret == q.ret && slices.EqualFunc(o.branches, q.branches, func(a, b branch) bool {
		return a.ret == b.ret && slices.Equal(a.conds, b.conds)
	})
}

// span is a range of numbers with the same outcome. It ends where the next one begins.
type span struct {
	start uint32
	outcome
}

// spans gives what happens to each of the 2^32 numbers of an architecture. What holds
// for the last slot, which no call has, holds for all above.
func (p *profile) spans(a arch) []span {
	const last = 1<<32 - 1 // -1: what a tracer makes of a call to skip it
	var out []span
	add := func(start uint32, o outcome) {
		n := len(out)
		if n > 0 && out[n-1].start == start {
			out, n = out[:n-1], n-1
		}
		if n == 0 || !out[n-1].equal(o) {
			out = append(out, span{start, o})
		}
	}
	for _, abi := range a.abis {
		decided := p.decide(abi)
		newest, enosys := p.newerThan(abi, decided)
		for slot, d := range decided {
			nr := abi.number(slot)
			switch {
			case d.always:
				add(nr, outcome{ret: d.ret})
			case !d.named && enosys && nr > newest && !abi.outOfOrder(slot):
				add(nr, outcome{ret: retENOSYS})
			default:
				add(nr, outcome{p.fallback, d.some})
			}
		}
	}
	if a.x32Missing {
		tail := out[len(out)-1].outcome
		add(x32Bit, outcome{ret: retBadArch})
		add(last, tail)
	}
	return out
}
