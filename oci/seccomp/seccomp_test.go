//go:build linux

package seccomp

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	mobyseccomp "github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// data is struct seccomp_data.
type data struct {
	nr, arch uint32
	_        uint64 // the instruction pointer
	args     [6]uint64
}

func (d data) word(off uint32) uint32 {
	switch {
	case off == 0:
		return d.nr
	case off == 4:
		return d.arch
	case off >= 16:
		v := d.args[(off-16)/8]
		if off%8 == 4 {
			v >>= 32
		}
		return uint32(v)
	}
	panic(fmt.Sprintf("load at %d", off))
}

// interpret runs a program as the kernel does, and counts the steps.
func interpret(t testing.TB, prog []unix.SockFilter, d data) (ret uint32, steps int) {
	t.Helper()
	var a uint32
	for pc := 0; ; pc++ {
		if pc >= len(prog) {
			t.Fatalf("the program runs over its end for %+v", d)
		}
		steps++
		i := prog[pc]
		jump := func(yes bool) {
			if yes {
				pc += int(i.Jt)
			} else {
				pc += int(i.Jf)
			}
		}
		switch i.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			a = d.word(i.K)
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			a &= i.K
		case unix.BPF_JMP | unix.BPF_JA:
			pc += int(i.K)
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			jump(a == i.K)
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			jump(a >= i.K)
		case unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K:
			jump(a > i.K)
		case unix.BPF_RET | unix.BPF_K:
			return i.K, steps
		default:
			t.Fatalf("instruction %d: code %#x", pc, i.Code)
		}
	}
}

var archNames = []struct {
	machine string
	arch    specs.Arch
	audit   uint32
	column  int
	base    uint32
}{
	{"amd64", specs.ArchX86_64, 0xC000003E, columnAMD64, 0},
	{"amd64", specs.ArchX86, 0x40000003, columnI386, 0},
	{"amd64", specs.ArchX32, 0xC000003E, columnX32, 0x40000000},
	{"arm64", specs.ArchAARCH64, 0xC00000B7, columnARM64, 0},
	{"arm64", specs.ArchARM, 0x40000028, columnARM, 0},
}

// reference says what a profile means, directly and slowly.
type reference struct {
	p      *specs.LinuxSeccomp
	named  map[string]bool
	newest [5]int32 // by column; -1: none is named
	// reach lists, for each column and number, the rules that may apply, in order, and
	// how a call gets there: by its number (mux is -1) or as part of a multiplexer.
	reach [5]map[uint32][]reached
}

type reached struct {
	rule, mux, part int
}

func outOfOrder(column int, n uint32) bool {
	return column == columnX32 && n >= 512 && n <= 547 || column == columnARM && n >= 0xf0000
}

func newReference(p *specs.LinuxSeccomp) *reference {
	r := &reference{p: p, named: map[string]bool{}}
	for _, s := range p.Syscalls {
		for _, name := range s.Names {
			r.named[name] = true
		}
	}
	for column := range r.newest {
		r.newest[column], r.reach[column] = -1, map[uint32][]reached{}
		see := func(n uint32, how reached) {
			r.reach[column][n] = append(r.reach[column][n], how)
			if !outOfOrder(column, n) {
				r.newest[column] = max(r.newest[column], int32(n))
			}
		}
		for i, s := range p.Syscalls {
			for _, name := range s.Names {
				if c, ok := lookup(name); ok && c.nr[column] >= 0 {
					see(uint32(c.nr[column]), reached{i, -1, 0})
				}
				passes := s.Action == specs.ActAllow || s.Action == specs.ActLog
				for m, mux := range muxes {
					part := slices.Index(mux.calls, name)
					if column == columnI386 && part > 0 && !r.named[mux.name] && (len(s.Args) == 0 || !passes) {
						row, _ := lookup(mux.name)
						see(uint32(row.nr[column]), reached{i, m, part})
					}
				}
			}
		}
	}
	return r
}

func returns(a specs.LinuxSeccompAction, errno *uint) uint32 {
	code := uint32(1)
	if errno != nil {
		code = uint32(*errno)
	}
	switch a {
	case specs.ActKill, specs.ActKillThread:
		return unix.SECCOMP_RET_KILL_THREAD
	case specs.ActKillProcess:
		return unix.SECCOMP_RET_KILL_PROCESS
	case specs.ActTrap:
		return unix.SECCOMP_RET_TRAP
	case specs.ActErrno:
		return unix.SECCOMP_RET_ERRNO | code
	case specs.ActTrace:
		return unix.SECCOMP_RET_TRACE | code
	case specs.ActLog:
		return unix.SECCOMP_RET_LOG
	}
	return unix.SECCOMP_RET_ALLOW
}

// column finds whose numbers a call's are; -1: nobody's that the profile lists.
func (r *reference) column(machine string, d data) (column int, nr uint32) {
	for _, a := range archNames {
		native := a.arch == specs.ArchX86_64 || a.arch == specs.ArchAARCH64
		if a.machine == machine && a.audit == d.arch && (native || slices.Contains(r.p.Architectures, a.arch)) &&
			(a.column == columnX32) == (a.audit == 0xC000003E && d.nr >= 0x40000000) {
			return a.column, d.nr - a.base
		}
	}
	if machine == "amd64" && d.arch == 0xC000003E && d.nr == 0xffffffff {
		return columnAMD64, d.nr // a call that a tracer wants skipped
	}
	return -1, 0
}

func holds(c specs.LinuxSeccompArg, column int, d data) bool {
	v, w := d.args[c.Index], c.Value
	if (column == columnI386 || column == columnARM) && c.Op != specs.OpMaskedEqual && int64(w) < 0 && int64(w) >= -1<<31 {
		w = uint64(uint32(w))
	}
	switch c.Op {
	case specs.OpEqualTo:
		return v == w
	case specs.OpNotEqual:
		return v != w
	case specs.OpLessThan:
		return v < w
	case specs.OpLessEqual:
		return v <= w
	case specs.OpGreaterThan:
		return v > w
	case specs.OpGreaterEqual:
		return v >= w
	}
	return v&c.Value == c.ValueTwo
}

func (r *reference) evaluate(machine string, d data) uint32 {
	column, nr := r.column(machine, d)
	if column < 0 {
		return unix.SECCOMP_RET_KILL_PROCESS
	}
	fallback := returns(r.p.DefaultAction, r.p.DefaultErrnoRet)
	sometimes := fallback
	for _, how := range r.reach[column][nr] {
		s := r.p.Syscalls[how.rule]
		ret := returns(s.Action, s.ErrnoRet)
		if ret == fallback {
			continue
		}
		if how.mux < 0 && len(s.Args) == 0 {
			return ret
		}
		seen, repeated, every, some := map[uint]bool{}, false, true, false
		for _, c := range s.Args {
			repeated = repeated || seen[c.Index]
			seen[c.Index] = true
			every, some = every && holds(c, column, d), some || holds(c, column, d)
		}
		applies := every && !repeated || some && repeated
		if how.mux >= 0 {
			applies = d.args[0]&muxes[how.mux].mask == uint64(how.part)
		}
		if applies && sometimes == fallback {
			sometimes = ret
		}
	}
	switch r.p.DefaultAction {
	case specs.ActErrno, specs.ActKill, specs.ActKillProcess, specs.ActKillThread:
		if newest := r.newest[column]; newest >= 0 && nr > uint32(newest) && !outOfOrder(column, nr) {
			return unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
		}
	}
	return sometimes
}

// interesting gives values around those that the profile compares with.
func interesting(p *specs.LinuxSeccomp) []uint64 {
	v := []uint64{0, 1, 2, 17, 1<<31 - 1, 1 << 31, 1<<32 - 1, 1 << 32, 1<<63 - 1, 1 << 63, 1<<64 - 1}
	for _, s := range p.Syscalls {
		for _, a := range s.Args {
			for _, x := range []uint64{a.Value, a.ValueTwo, uint64(uint32(a.Value))} {
				v = append(v, x, x-1, x+1, x^1<<32, x|1<<40, ^x)
			}
		}
	}
	slices.Sort(v)
	return slices.Compact(v)
}

// numbers are the system calls that are worth trying.
func numbers() []uint32 {
	var n []uint32
	for i := range uint32(601) {
		n = append(n, i, i|0x40000000)
	}
	for i := uint32(0xf0000); i < 0xf0010; i++ {
		n = append(n, i)
	}
	return append(n, 0xffffffff, 0xfffffffe, 0x3fffffff, 0x7fffffff, 0x80000000, 0x80000003)
}

// compare checks a program against the reference.
func compare(t testing.TB, p *specs.LinuxSeccomp, machine string, tries int) Filter {
	t.Helper()
	f, err := Compile(p, Options{Arch: machine})
	if err != nil {
		t.Fatal(err)
	}
	checkForm(t, f.Program)
	values, ref := interesting(p), newReference(p)
	rng := rand.New(rand.NewPCG(1, 2))
	for _, arch := range []uint32{0xC000003E, 0x40000003, 0xC00000B7, 0x40000028, 0xC0000015, 0} {
		for _, nr := range numbers() {
			for try := range tries {
				d := data{nr: nr, arch: arch}
				for i := range d.args {
					d.args[i] = values[rng.IntN(len(values))]
					if try < len(values) && i == try%2 {
						d.args[i] = values[try]
					}
					if arch == 0x40000003 || arch == 0x40000028 {
						d.args[i] &= 1<<32 - 1
					}
				}
				got, _ := interpret(t, f.Program, d)
				if want := ref.evaluate(machine, d); got != want {
					t.Fatalf("%s %+v: the program says %#x, the profile %#x\n%s", machine, d, got, want, dump(f.Program))
				}
			}
		}
	}
	return f
}

// checkForm holds what the kernel asks of a program (bpf_check_classic).
func checkForm(t testing.TB, prog []unix.SockFilter) {
	t.Helper()
	if len(prog) == 0 || len(prog) > MaxInstructions {
		t.Fatalf("%d instructions", len(prog))
	}
	for i, in := range prog {
		far := 0
		switch in.Code & 7 {
		case unix.BPF_JMP:
			if far = max(int(in.Jt), int(in.Jf)); in.Code == unix.BPF_JMP|unix.BPF_JA {
				far = int(in.K)
			}
		case unix.BPF_RET:
			continue
		}
		if i+1+far >= len(prog) {
			t.Fatalf("instruction %d leads out of the program", i)
		}
	}
}

func dump(prog []unix.SockFilter) string {
	var b strings.Builder
	for i, in := range prog {
		fmt.Fprintf(&b, "%4d: 0x%02x jt=%d jf=%d k=%#x\n", i, in.Code, in.Jt, in.Jf, in.K)
	}
	return b.String()
}

// dockerProfile is Docker's default one, for a container with these capabilities.
func dockerProfile(t testing.TB, machine string, caps ...string) *specs.LinuxSeccomp {
	t.Helper()
	spec := &specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: caps}}}
	p, err := mobyseccomp.GetDefaultProfile(spec)
	if err != nil {
		t.Fatal(err)
	}
	// The library makes the list for the machine that it runs on.
	p.Architectures = []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32}
	if machine == "arm64" {
		p.Architectures = []specs.Arch{specs.ArchAARCH64, specs.ArchARM}
	}
	return p
}

func TestDockerProfile(t *testing.T) {
	t.Parallel()
	for _, machine := range []string{"amd64", "arm64"} {
		for _, caps := range [][]string{nil, {"CAP_SYS_ADMIN", "CAP_BPF", "CAP_SYSLOG"}} {
			p := dockerProfile(t, machine, caps...)
			f := compare(t, p, machine, 6)
			deepest := 0
			for _, nr := range numbers() {
				_, steps := interpret(t, f.Program, data{nr: nr, arch: archNames[map[string]int{"amd64": 0, "arm64": 3}[machine]].audit})
				deepest = max(deepest, steps)
			}
			t.Logf("%s with %d capabilities: %d instructions, at most %d steps", machine, len(caps), len(f.Program), deepest)
			if len(f.Program) > 900 || deepest > 120 {
				t.Errorf("%s: %d instructions, %d steps: longer than it was", machine, len(f.Program), deepest)
			}
		}
	}
}

func uintp(n uint) *uint { return &n }

func callRule(action specs.LinuxSeccompAction, errno *uint, names string, args ...specs.LinuxSeccompArg) specs.LinuxSyscall {
	return specs.LinuxSyscall{Names: strings.Fields(names), Action: action, ErrnoRet: errno, Args: args}
}

func arg(i uint, op specs.LinuxSeccompOperator, v uint64, two ...uint64) specs.LinuxSeccompArg {
	a := specs.LinuxSeccompArg{Index: i, Op: op, Value: v}
	if len(two) > 0 {
		a.ValueTwo = two[0]
	}
	return a
}

func TestAgainstReference(t *testing.T) {
	t.Parallel()
	const big = 0x1_8000_0001
	all86 := []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32, specs.ArchAARCH64, specs.ArchARM, specs.ArchMIPS}
	profiles := map[string]*specs.LinuxSeccomp{
		"allow all": {DefaultAction: specs.ActAllow},
		"kill all":  {DefaultAction: specs.ActKill},
		"one":       {DefaultAction: specs.ActAllow, Architectures: all86, Syscalls: []specs.LinuxSyscall{callRule(specs.ActErrno, nil, "getcwd")}},
		"operators": {DefaultAction: specs.ActErrno, DefaultErrnoRet: uintp(38), Architectures: all86, Syscalls: []specs.LinuxSyscall{
			callRule(specs.ActAllow, nil, "read", arg(0, specs.OpEqualTo, big)),
			callRule(specs.ActAllow, nil, "write", arg(0, specs.OpNotEqual, big)),
			callRule(specs.ActAllow, nil, "openat", arg(1, specs.OpLessThan, big)),
			callRule(specs.ActAllow, nil, "close", arg(1, specs.OpLessEqual, big)),
			callRule(specs.ActAllow, nil, "fstat", arg(2, specs.OpGreaterThan, big)),
			callRule(specs.ActAllow, nil, "lseek", arg(2, specs.OpGreaterEqual, big)),
			callRule(specs.ActAllow, nil, "mmap", arg(3, specs.OpMaskedEqual, 0xff_0000_00f0, 0x10_0000_0050)),
			callRule(specs.ActAllow, nil, "munmap", arg(4, specs.OpMaskedEqual, 0xf0, 0x50)),
			callRule(specs.ActAllow, nil, "brk", arg(5, specs.OpMaskedEqual, 0xf0_0000_0000, 0)),
			callRule(specs.ActAllow, nil, "ioctl", arg(5, specs.OpMaskedEqual, 0xf0, 0x150)), // can never hold
			callRule(specs.ActAllow, nil, "dup", arg(0, specs.OpEqualTo, 1<<64-1)),
			callRule(specs.ActAllow, nil, "dup3", arg(0, specs.OpNotEqual, 1<<64-17)),
		}},
		"several conditions and rules": {DefaultAction: specs.ActKillProcess, Architectures: all86, Syscalls: []specs.LinuxSyscall{
			callRule(specs.ActAllow, nil, "socket bind", arg(0, specs.OpEqualTo, 2), arg(1, specs.OpGreaterThan, 0), arg(2, specs.OpNotEqual, 17)),
			callRule(specs.ActErrno, uintp(97), "socket", arg(0, specs.OpEqualTo, 17)),
			callRule(specs.ActTrace, uintp(7), "socket", arg(0, specs.OpLessThan, 2), arg(0, specs.OpEqualTo, 1<<32)), // or
			callRule(specs.ActLog, nil, "socket"),
			callRule(specs.ActTrap, nil, "socket"), // never reached
			callRule(specs.ActKillThread, nil, "nosuchcall futex_wake"),
		}},
		"deny list": {DefaultAction: specs.ActAllow, Architectures: all86, Syscalls: []specs.LinuxSyscall{
			callRule(specs.ActErrno, nil, "socket shmat", arg(0, specs.OpEqualTo, 1)),
			callRule(specs.ActErrno, nil, "connect msgget"),
			callRule(specs.ActErrno, nil, "breakpoint set_tls rt_sigaction"),
		}},
		"named mux": {DefaultAction: specs.ActErrno, Architectures: all86, Syscalls: []specs.LinuxSyscall{
			callRule(specs.ActAllow, nil, "connect shmget"), callRule(specs.ActLog, nil, "socketcall"),
		}},
		"unlisted sub-architectures": {DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{callRule(specs.ActAllow, nil, "read write statx")}},
		"every second call":          {DefaultAction: specs.ActErrno, Architectures: all86},
	}
	for i, c := range calls {
		if i%2 == 0 {
			p := profiles["every second call"]
			p.Syscalls = append(p.Syscalls, callRule(specs.ActAllow, nil, c.name, arg(uint(i%6), specs.OpNotEqual, uint64(i)), arg(uint(i+1)%6, specs.OpGreaterThan, 5)))
		}
	}
	for name, p := range profiles {
		for _, machine := range []string{"amd64", "arm64"} {
			t.Run(name+"/"+machine, func(t *testing.T) {
				t.Parallel()
				if name == "every second call" { // some thousand instructions, with far jumps
					p := *p
					p.Syscalls = p.Syscalls[:120]
					f := compare(t, &p, machine, 20)
					if len(f.Program) < 600 {
						t.Errorf("%d instructions: too few to show anything", len(f.Program))
					}
					return
				}
				compare(t, p, machine, 40)
			})
		}
	}
}

// TestOrder holds what runc 1.1.5 was seen to make of these profiles.
func TestOrder(t *testing.T) {
	t.Parallel()
	const odd = 4294967295
	a := callRule(specs.ActErrno, uintp(77), "personality", arg(0, specs.OpEqualTo, odd))
	b := callRule(specs.ActErrno, uintp(78), "personality")
	c := callRule(specs.ActAllow, nil, "personality")
	d := callRule(specs.ActErrno, uintp(79), "personality", arg(0, specs.OpEqualTo, odd), arg(0, specs.OpEqualTo, 0x1234))
	e := callRule(specs.ActErrno, uintp(80), "personality", arg(0, specs.OpGreaterEqual, 0))
	for i, test := range []struct {
		rules      []specs.LinuxSyscall
		odd, other uint32
	}{
		{[]specs.LinuxSyscall{a, b}, 78, 78},
		{[]specs.LinuxSyscall{b, a}, 78, 78},
		{[]specs.LinuxSyscall{a, c}, 77, 0},
		{[]specs.LinuxSyscall{c, a}, 77, 0},
		{[]specs.LinuxSyscall{b, c}, 78, 78},
		{[]specs.LinuxSyscall{c, b}, 78, 78},
		{[]specs.LinuxSyscall{d}, 79, 79},
		{[]specs.LinuxSyscall{a, e}, 77, 80},
	} {
		f := compare(t, &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: test.rules}, "amd64", 1)
		for value, want := range map[uint64]uint32{odd: test.odd, 0x1234: test.other} {
			got, _ := interpret(t, f.Program, data{nr: 135, arch: unix.AUDIT_ARCH_X86_64, args: [6]uint64{value}})
			if got == unix.SECCOMP_RET_ALLOW {
				got = unix.SECCOMP_RET_ERRNO
			}
			if got != unix.SECCOMP_RET_ERRNO|want {
				t.Errorf("%d: %#x is %#x, want errno %d", i, value, got, want)
			}
		}
	}
}

func TestErrors(t *testing.T) {
	t.Parallel()
	allow := func(s ...specs.LinuxSyscall) *specs.LinuxSeccomp {
		return &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: s}
	}
	long := allow()
	for i := range 5000 {
		long.Syscalls = append(long.Syscalls, callRule(specs.ActErrno, nil, "read", arg(0, specs.OpEqualTo, uint64(i)<<33|uint64(i))))
	}
	wide := callRule(specs.ActErrno, nil, "")
	for _, c := range calls {
		wide.Names = append(wide.Names, c.name)
	}
	for i := range 100000 {
		wide.Args = append(wide.Args, arg(0, specs.OpEqualTo, uint64(i)))
	}
	for name, c := range map[string]struct {
		p       *specs.LinuxSeccomp
		machine string
		class   error
		text    string
	}{
		"none":                {nil, "", errdefs.ErrInvalidArgument, "there is none"},
		"no action":           {&specs.LinuxSeccomp{}, "", errdefs.ErrInvalidArgument, "default action: no action"},
		"unknown action":      {&specs.LinuxSeccomp{DefaultAction: "SCMP_ACT_SHOUT"}, "", errdefs.ErrInvalidArgument, "SCMP_ACT_SHOUT"},
		"notify of write":     {allow(callRule(specs.ActNotify, nil, "write")), "", errdefs.ErrInvalidArgument, "SCMP_ACT_NOTIFY cannot decide over write"},
		"default notify":      {&specs.LinuxSeccomp{DefaultAction: specs.ActNotify}, "", errdefs.ErrInvalidArgument, "cannot be the default"},
		"errno for allow":     {allow(callRule(specs.ActAllow, uintp(1), "mount")), "", errdefs.ErrInvalidArgument, "takes no errno"},
		"errno too large":     {allow(callRule(specs.ActErrno, uintp(4096), "mount")), "", errdefs.ErrInvalidArgument, "4096"},
		"trace too large":     {allow(callRule(specs.ActTrace, uintp(65536), "mount")), "", errdefs.ErrInvalidArgument, "65536"},
		"no names":            {allow(callRule(specs.ActErrno, nil, "")), "", errdefs.ErrInvalidArgument, "rule 0 names no system call"},
		"argument 6":          {allow(callRule(specs.ActErrno, nil, "read", arg(6, specs.OpEqualTo, 1))), "", errdefs.ErrInvalidArgument, "no argument 6"},
		"operator":            {allow(callRule(specs.ActErrno, nil, "read", arg(0, "SCMP_CMP_MAYBE", 1))), "", errdefs.ErrInvalidArgument, "SCMP_CMP_MAYBE"},
		"architecture":        {&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{"SCMP_ARCH_PDP11"}}, "", errdefs.ErrInvalidArgument, "PDP11"},
		"flag":                {&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{"X"}}, "", errdefs.ErrInvalidArgument, `unknown flag "X"`},
		"machine":             {allow(), "riscv64", errdefs.ErrInvalidArgument, "riscv64"},
		"too long":            {long, "", ErrTooLong, "4096 instructions"},
		"names times options": {allow(wide), "", ErrTooLong, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if c.machine == "" {
				c.machine = "amd64"
			}
			_, err := Compile(c.p, Options{Arch: c.machine})
			if !errors.Is(err, c.class) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("error is %v", err)
			}
		})
	}
}

func TestFlags(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		list []specs.LinuxSeccompFlag
		want uint
	}{
		{nil, unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW},
		{[]specs.LinuxSeccompFlag{}, 0},
		{[]specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog, "SECCOMP_FILTER_FLAG_TSYNC"}, unix.SECCOMP_FILTER_FLAG_LOG | unix.SECCOMP_FILTER_FLAG_TSYNC},
		{[]specs.LinuxSeccompFlag{specs.LinuxSeccompFlagWaitKillableRecv}, 0},
	} {
		f, err := Compile(&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Flags: c.list}, Options{})
		if err != nil || f.Flags != c.want {
			t.Errorf("%v: flags %#x, %v", c.list, f.Flags, err)
		}
	}
}

// TestShort holds the shape of small programs: what a reader of "hako-oci plan" sees.
func TestShort(t *testing.T) {
	t.Parallel()
	f, err := Compile(&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{callRule(specs.ActErrno, nil, "mkdir mkdirat")}}, Options{Arch: "arm64"})
	if err != nil {
		t.Fatal(err)
	}
	want := "   0: 0x20 jt=0 jf=0 k=0x4\n" + // the architecture
		"   1: 0x15 jt=1 jf=0 k=0xc00000b7\n" +
		"   2: 0x06 jt=0 jf=0 k=0x80000000\n" +
		"   3: 0x20 jt=0 jf=0 k=0x0\n" + // the number
		"   4: 0x15 jt=0 jf=1 k=0x22\n" + // mkdirat; arm64 has no mkdir
		"   5: 0x06 jt=0 jf=0 k=0x50001\n" +
		"   6: 0x06 jt=0 jf=0 k=0x7fff0000\n"
	if got := dump(f.Program); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func TestTable(t *testing.T) {
	t.Parallel()
	if !slices.IsSortedFunc(calls[:], func(a, b call) int { return strings.Compare(a.name, b.name) }) {
		t.Error("the table is not sorted")
	}
	for name, want := range map[string][5]int32{
		"read": {0, 3, 63, 3, 0}, "execve": {59, 11, 221, 11, 520}, "clone3": {435, 435, 435, 435, 435}, "cachestat": {451, 451, 451, 451, 451},
		"newfstatat": {262, -1, 79, -1, 262}, "mmap2": {-1, 192, -1, 192, -1}, "set_tls": {-1, -1, -1, 0xf0005, -1},
	} {
		if c, ok := lookup(name); !ok || c.nr != want {
			t.Errorf("%s is %v", name, c.nr)
		}
	}
	if _, ok := lookup("arch_specific_syscall"); ok {
		t.Error("arch_specific_syscall is no system call")
	}
}

func BenchmarkDockerProfile(b *testing.B) {
	p := dockerProfile(b, "amd64")
	b.ReportAllocs()
	for b.Loop() {
		f, err := Compile(p, Options{Arch: "amd64"})
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(len(f.Program)), "insns")
	}
}

func FuzzCompile(f *testing.F) {
	for _, p := range []*specs.LinuxSeccomp{
		{DefaultAction: specs.ActErrno, Architectures: []specs.Arch{specs.ArchX86, specs.ArchX32}, Syscalls: []specs.LinuxSyscall{
			callRule(specs.ActAllow, nil, "read socket clone3", arg(0, specs.OpMaskedEqual, 0xff, 1), arg(1, specs.OpLessEqual, 1<<33)),
			callRule(specs.ActTrap, nil, "socket", arg(0, specs.OpNotEqual, 3)),
		}},
		{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchARM}, Syscalls: []specs.LinuxSyscall{callRule(specs.ActErrno, uintp(2), "set_tls semop", arg(5, specs.OpGreaterThan, 1<<64-1))}},
	} {
		b, err := json.Marshal(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var p specs.LinuxSeccomp
		if json.Unmarshal(b, &p) != nil {
			return
		}
		for _, machine := range []string{"amd64", "arm64"} {
			if _, err := Compile(&p, Options{Arch: machine}); err == nil {
				compare(t, &p, machine, 2)
			}
		}
	})
}

func TestNotify(t *testing.T) {
	all := []specs.LinuxSeccompFlag{"SECCOMP_FILTER_FLAG_TSYNC", specs.LinuxSeccompFlagLog, specs.LinuxSeccompFlagWaitKillableRecv}
	for name, k := range map[string]struct {
		action specs.LinuxSeccompAction
		call   string
		notify bool
		flags  uint
	}{
		"notify":          {specs.ActNotify, "mkdirat", true, unix.SECCOMP_FILTER_FLAG_LOG | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV},
		"of nothing here": {specs.ActNotify, "no_such_call", false, unix.SECCOMP_FILTER_FLAG_LOG | unix.SECCOMP_FILTER_FLAG_TSYNC},
		"no notify":       {specs.ActErrno, "mkdirat", false, unix.SECCOMP_FILTER_FLAG_LOG | unix.SECCOMP_FILTER_FLAG_TSYNC},
	} {
		f, err := Compile(&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Flags: all, Syscalls: []specs.LinuxSyscall{{Names: []string{k.call}, Action: k.action}}}, Options{})
		if err != nil || f.Notify != k.notify || f.Flags != k.flags {
			t.Errorf("%s: notify %t, flags %#x, %v", name, f.Notify, f.Flags, err)
		}
	}
}
