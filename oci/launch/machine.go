//go:build linux && (amd64 || arm64)

package launch

import (
	"fmt"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/plan"
)

// instr is a step in the form that the loop executes.
type instr struct {
	nr       uintptr
	args     [6]uintptr
	fill     int32
	onOK     int32
	onFail   int32
	op       uint8
	slotArgs uint8 // bit i: args[i] is the number of a slot
	any      bool
	wide     bool
	accept   [6]uint16
	expect   int64
	off      uintptr
	mask     uint64
	want     uint64
	errno    uintptr
}

// loaded is a program that is laid out. It lies in a memory, as does everything that it points to.
type loaded struct {
	code  *instr
	slots *int64
	n     int32    // of instructions
	pair  [2]int32 // of what the child reports
	// Below lazy, a descriptor whose slot is filled anew stays open: the child closes
	// them all together at the end.
	lazy int64
}

// machine loads programs. What it points to does not move, also where it is on the Go heap.
type machine struct {
	mem   *memory
	slots []int64 // a child's lie in mem
	lazy  int64   // see loaded
	// slack is the timer slack that the child inherits, 0: that of the thread.
	slack uintptr
	prog  *loaded
	skip  []plan.Span // steps that are done already
}

func (m *machine) alloc(n int) []byte { return m.mem.alloc(n) }

func (m *machine) bytes(b []byte) uintptr {
	if len(b) == 0 {
		return 0
	}
	p := m.alloc(len(b))
	copy(p, b)
	return addr(p)
}

func (m *machine) cstring(s string) uintptr {
	p := m.alloc(len(s) + 1)
	copy(p, s)
	return addr(p)
}

func addr(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

// load lays out steps. buffers is shared by the programs of one plan.
func (m *machine) load(steps []plan.Step, buffers []byte) error {
	code := unsafe.Slice((*instr)(unsafe.Pointer(unsafe.SliceData(m.alloc((len(steps)+1)*int(unsafe.Sizeof(instr{})))))), len(steps))
	m.prog = (*loaded)(unsafe.Pointer(unsafe.SliceData(m.alloc(int(unsafe.Sizeof(loaded{}))))))
	m.prog.code, m.prog.slots, m.prog.n, m.prog.lazy = unsafe.SliceData(code), unsafe.SliceData(m.slots), int32(len(steps)), m.lazy
	lists := map[*string]uintptr{} // a list that two steps share is laid out once
	empty := m.cstring("")
	str := func(s string) uintptr {
		if s == "" {
			return empty
		}
		return m.cstring(s)
	}
	for i := range steps {
		s, in := &steps[i], &code[i]
		if len(s.Args) > 6 && s.Op != plan.CloseAll || len(s.Accept) > len(in.accept) {
			return fmt.Errorf("step %d (%s): too many arguments", i, s.Do)
		}
		in.nr, in.op = s.Nr, uint8(s.Op)
		in.fill, in.onOK, in.onFail = int32(s.Fill), int32(s.OnOK), int32(s.OnFail)
		in.any, in.wide, in.expect = s.Any, s.Wide, s.Expect
		in.off, in.mask, in.want, in.errno = uintptr(s.Off), s.Mask, s.Want, uintptr(s.Errno)
		if slices.ContainsFunc(m.skip, func(k plan.Span) bool { return i >= k.From && i < k.To }) {
			in.op = uint8(plan.Branch) // to the next one
			continue
		}
		for j, e := range s.Accept {
			in.accept[j] = uint16(e)
		}
		if s.Op == plan.CloseAll {
			in.args[0], in.args[1] = m.gaps(s)
			continue
		}
		for j, a := range s.Args {
			switch a.Kind {
			case plan.ArgInt:
				in.args[j] = uintptr(a.Int)
			case plan.ArgString:
				in.args[j] = str(a.Str)
			case plan.ArgSlot:
				in.args[j] = uintptr(a.Slot)
				in.slotArgs |= 1 << j
			case plan.ArgBytes:
				in.args[j] = m.bytes(a.Bytes())
			case plan.ArgBuffer:
				in.args[j] = addr(buffers[a.Int*plan.BufferSize:])
			case plan.ArgStrings:
				var key *string
				if len(a.Strs()) > 0 {
					key = &a.Strs()[0]
				}
				p, ok := lists[key]
				if !ok {
					v := m.alloc(8 * (len(a.Strs()) + 1))
					for k, s := range a.Strs() {
						*(*uintptr)(unsafe.Pointer(&v[8*k])) = m.cstring(s)
					}
					p = addr(v)
					lists[key] = p
				}
				in.args[j] = p
			case plan.ArgFilter:
				n := int(unsafe.Sizeof(unix.SockFilter{}))
				prog := m.alloc(n * len(a.Filter()))
				copy(unsafe.Slice((*unix.SockFilter)(unsafe.Pointer(&prog[0])), len(a.Filter())), a.Filter())
				fprog := m.alloc(16)
				*(*uint16)(unsafe.Pointer(&fprog[0])) = uint16(len(a.Filter()))
				*(*uintptr)(unsafe.Pointer(&fprog[8])) = addr(prog)
				in.args[j] = addr(fprog)
			case plan.ArgMessage:
				in.args[j] = m.message(int(m.slots[a.Slot]))
			case plan.ArgReceive:
				in.args[j] = m.header(m.alloc(1), buffers[a.Int*plan.BufferSize:][:plan.BufferSize])
			default:
				return fmt.Errorf("step %d (%s): unknown kind of argument", i, s.Do)
			}
		}
	}
	return m.mem.err
}

// message lays out a struct msghdr that passes one descriptor.
func (m *machine) message(fd int) uintptr {
	payload := m.alloc(8)
	*(*int32)(unsafe.Pointer(&payload[0])) = plan.MsgConsole
	rights := unix.UnixRights(fd)
	control := m.alloc(len(rights))
	copy(control, rights)
	return m.header(payload, control)
}

// header lays out a struct msghdr of one piece and control messages.
func (m *machine) header(payload, control []byte) uintptr {
	iov := m.alloc(16)
	*(*uintptr)(unsafe.Pointer(&iov[0])) = addr(payload)
	*(*uintptr)(unsafe.Pointer(&iov[8])) = uintptr(len(payload))
	var h unix.Msghdr
	hdr := m.alloc(int(unsafe.Sizeof(h)))
	p := (*[7]uintptr)(unsafe.Pointer(&hdr[0]))
	p[2], p[3], p[4], p[5] = addr(iov), 1, addr(control), uintptr(len(control))
	return addr(hdr)
}

// gaps lays out the ranges of descriptors between those that stay open.
func (m *machine) gaps(s *plan.Step) (ranges, n uintptr) {
	var keep []int64
	if len(s.Args) == 0 {
		for _, fd := range m.slots {
			if fd > 2 {
				keep = append(keep, fd)
			}
		}
	}
	for _, a := range s.Args {
		if fd := m.slots[a.Slot]; fd > 2 {
			keep = append(keep, fd)
		}
	}
	slices.Sort(keep)
	buf := m.alloc(8 * (len(keep) + 1))
	out := unsafe.Slice((*[2]uint32)(unsafe.Pointer(&buf[0])), len(keep)+1)[:0]
	first := 3 + int64(s.Off)
	for _, fd := range keep {
		if fd > first {
			out = append(out, [2]uint32{uint32(first), uint32(fd - 1)})
		}
		first = max(first, fd+1)
	}
	out = append(out, [2]uint32{uint32(first), ^uint32(0)})
	return addr(buf), uintptr(len(out))
}

// mismatch is the failure of a check that only chooses a way.
const mismatch = uintptr(syscall.EPROTO)

// pointer makes a pointer of an address that load laid out.
//
//go:nosplit
func pointer(a uintptr) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(&a)) }

// run executes the program. It gives the failed step and errno, or the number of steps and 0
// when the end was reached (which the child's program never does).
//
// It runs in a forked child of a multi-threaded process: no allocation, no growth of
// the stack, no write barrier, no lock.
//
//go:nosplit
//go:norace
//go:nocheckptr
func (m *loaded) run() (failed int32, errno uintptr) {
	n := m.n
	base := unsafe.Pointer(m.code)
	slots := unsafe.Pointer(m.slots)
	for pc := int32(0); pc < n; {
		in := (*instr)(unsafe.Add(base, uintptr(pc)*unsafe.Sizeof(instr{})))
		a0, a1, a2, a3, a4, a5 := in.args[0], in.args[1], in.args[2], in.args[3], in.args[4], in.args[5]
		if in.slotArgs != 0 {
			if in.slotArgs&1 != 0 {
				a0 = *(*uintptr)(unsafe.Add(slots, a0*8))
			}
			if in.slotArgs&2 != 0 {
				a1 = *(*uintptr)(unsafe.Add(slots, a1*8))
			}
			if in.slotArgs&4 != 0 {
				a2 = *(*uintptr)(unsafe.Add(slots, a2*8))
			}
			if in.slotArgs&8 != 0 {
				a3 = *(*uintptr)(unsafe.Add(slots, a3*8))
			}
			if in.slotArgs&16 != 0 {
				a4 = *(*uintptr)(unsafe.Add(slots, a4*8))
			}
			if in.slotArgs&32 != 0 {
				a5 = *(*uintptr)(unsafe.Add(slots, a5*8))
			}
		}
		var e uintptr
		switch plan.Op(in.op) {
		case plan.Call:
			r, _, en := syscall.RawSyscall6(in.nr, a0, a1, a2, a3, a4, a5)
			e = uintptr(en)
			if e == uintptr(syscall.EINTR) {
				continue
			}
			if e == 0 && in.expect >= 0 && int64(r) != in.expect {
				e = uintptr(syscall.EPROTO)
			}
			if e == 0 && in.fill >= 0 {
				s := (*int64)(unsafe.Add(slots, uintptr(in.fill)*8))
				if *s >= m.lazy {
					syscall.RawSyscall(syscall.SYS_CLOSE, uintptr(*s), 0, 0)
				}
				*s = int64(r)
			}
		case plan.Check:
			p := unsafe.Add(pointer(a0), in.off)
			if in.wide {
				if *(*uint64)(p)&in.mask != in.want {
					e = mismatch
				}
			} else if uint64(*(*uint32)(p))&in.mask != in.want {
				e = mismatch
			}
			if e != 0 && in.errno != 0 {
				e = in.errno
			}
		case plan.Poke:
			*(*uintptr)(unsafe.Add(pointer(a0), in.off)) = a1
		case plan.Load:
			p := unsafe.Add(pointer(a0), in.off)
			*(*int64)(unsafe.Add(slots, uintptr(in.fill)*8)) = int64(*(*int32)(p))
		case plan.Set:
			*(*uintptr)(unsafe.Add(slots, uintptr(in.fill)*8)) = a0
		case plan.Branch:
			if a0 != 0 {
				pc = in.onFail
			} else {
				pc = in.onOK
			}
			continue
		case plan.Fail:
			e = in.errno
		case plan.CloseAll:
			for k := uintptr(0); k < a1; k++ {
				p := (*[2]uint32)(unsafe.Add(pointer(a0), k*8))
				_, _, en := syscall.RawSyscall(unix.SYS_CLOSE_RANGE, uintptr(p[0]), uintptr(p[1]), 0)
				if en != 0 {
					e = uintptr(en)
				}
			}
		}
		if e == 0 {
			pc = in.onOK
			continue
		}
		if in.any || e == uintptr(in.accept[0]) || e == uintptr(in.accept[1]) || e == uintptr(in.accept[2]) ||
			e == uintptr(in.accept[3]) || e == uintptr(in.accept[4]) || e == uintptr(in.accept[5]) {
			pc = in.onFail
			continue
		}
		return pc, e
	}
	return n, 0
}
