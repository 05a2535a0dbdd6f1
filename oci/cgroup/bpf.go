//go:build linux

package cgroup

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// insn is one eBPF instruction, see the kernel's bpf/standardization/instruction-set.rst.
type insn struct {
	op  uint8
	reg uint8 // destination in the low four bits, source in the high ones
	off int16
	imm int32
}

// The opcodes that the device program uses.
const (
	opLoad32   = unix.BPF_LDX | unix.BPF_MEM | unix.BPF_W
	opMovImm   = unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_K
	opMovReg   = unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_X
	opAnd32Imm = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
	opShr32Imm = unix.BPF_ALU | unix.BPF_RSH | unix.BPF_K
	opJne32Imm = unix.BPF_JMP32 | unix.BPF_JNE | unix.BPF_K
	opJeq32Imm = unix.BPF_JMP32 | unix.BPF_JEQ | unix.BPF_K
	opExit     = unix.BPF_JMP | unix.BPF_EXIT
)

// The registers of the device program. The kernel calls it with r1 pointing to a
// struct bpf_cgroup_dev_ctx.
const (
	regResult = iota
	regContext
	regKind
	regAccess // what of the request no rule has allowed yet
	regMajor
	regMinor
	regScratch
)

// deviceProgram compiles the rules to a program that answers 1 for "allowed". It looks
// at them from the last to the first, and follows each kind of access by itself, so
// that it can say exactly what the specification says.
func (d *deviceRules) deviceProgram() []insn {
	const (
		kindChar    = 2 // BPF_DEVCG_DEV_CHAR; the other one is 1, for block devices
		accessShift = 16
		kindMask    = 1<<accessShift - 1
	)
	prog := []insn{
		{op: opLoad32, reg: regContext<<4 | regKind, off: 0},
		{op: opMovReg, reg: regKind<<4 | regAccess},
		{op: opAnd32Imm, reg: regKind, imm: kindMask},
		{op: opShr32Imm, reg: regAccess, imm: accessShift},
		{op: opLoad32, reg: regContext<<4 | regMajor, off: 4},
		{op: opLoad32, reg: regContext<<4 | regMinor, off: 8},
	}
	char := append(d.rulesFor('c'), result(d.allow)...)
	block := append(d.rulesFor('b'), result(d.allow)...)
	prog = append(prog, insn{op: opJne32Imm, reg: regKind, imm: kindChar, off: int16(len(char))})
	return append(append(prog, char...), block...)
}

// rulesFor compiles the rules for one type of device. One that does not apply leads to
// the next.
func (d *deviceRules) rulesFor(kind byte) []insn {
	var prog []insn
	seen := map[deviceRule]bool{}
	for _, r := range slices.Backward(d.rules) {
		if r.kind != kind || seen[r] {
			continue // or a later one says the same
		}
		seen[r] = true
		var rule []insn
		if r.major != anyNumber {
			rule = append(rule, insn{op: opJne32Imm, reg: regMajor, imm: int32(uint32(r.major))})
		}
		if r.minor != anyNumber {
			rule = append(rule, insn{op: opJne32Imm, reg: regMinor, imm: int32(uint32(r.minor))})
		}
		switch {
		case r.access == accAll:
		case r.allow:
			rule = append(rule,
				insn{op: opAnd32Imm, reg: regAccess, imm: int32(accAll &^ r.access)},
				insn{op: opJne32Imm, reg: regAccess, imm: 0})
		default:
			rule = append(rule,
				insn{op: opMovReg, reg: regAccess<<4 | regScratch},
				insn{op: opAnd32Imm, reg: regScratch, imm: int32(r.access)},
				insn{op: opJeq32Imm, reg: regScratch, imm: 0})
		}
		rule = append(rule, result(r.allow)...)
		for i := range rule {
			if rule[i].op == opJne32Imm || rule[i].op == opJeq32Imm {
				rule[i].off = int16(len(rule) - i - 1)
			}
		}
		prog = append(prog, rule...)
	}
	return prog
}

// result is the program's answer.
func result(allow bool) []insn {
	r := insn{op: opMovImm, reg: regResult}
	if allow {
		r.imm = 1
	}
	return []insn{r, {op: opExit}}
}

func encode(prog []insn) []byte {
	out := make([]byte, 0, 8*len(prog))
	for _, i := range prog {
		out = append(out, i.op, i.reg)
		out = binary.NativeEndian.AppendUint16(out, uint16(i.off))
		out = binary.NativeEndian.AppendUint32(out, uint32(i.imm))
	}
	return out
}

// programName marks the programs that are ours.
const programName = "hako_devices"

// bpf makes the system call. Addresses in attr are numbers to the garbage collector: the
// caller pins what they point to.
func bpf(cmd int, attr unsafe.Pointer, size uintptr) (int, error) {
	for {
		r, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(attr), size)
		if errno == 0 {
			return int(r), nil
		}
		if errno != unix.EINTR && errno != unix.EAGAIN { // EAGAIN: a signal came while it was verified
			return -1, os.NewSyscallError("bpf", errno)
		}
	}
}

// loadProgram gives the program's descriptor.
func loadProgram(prog []insn) (int, error) {
	code := encode(prog)
	// The program calls no helper that only GPL programs may call.
	license := []byte("Apache-2.0\x00")
	attr := struct {
		progType, insnCount         uint32
		insns, license              uint64
		logLevel, logSize           uint32
		logBuf                      uint64
		kernelVersion, flags        uint32
		name                        [16]byte
		ifindex, expectedAttachType uint32
	}{
		progType:           unix.BPF_PROG_TYPE_CGROUP_DEVICE,
		insnCount:          uint32(len(prog)),
		insns:              uint64(uintptr(unsafe.Pointer(&code[0]))),
		license:            uint64(uintptr(unsafe.Pointer(&license[0]))),
		expectedAttachType: unix.BPF_CGROUP_DEVICE,
	}
	copy(attr.name[:len(attr.name)-1], programName)
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&code[0])
	pin.Pin(&license[0])
	return bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
}

type attachAttr struct {
	target, program, attachType, flags, replace uint32
}

// ourPrograms gives descriptors of our device programs on the cgroup, oldest first.
func ourPrograms(cgroup int) (_ []int, err error) {
	var ids [64]uint32
	query := struct {
		target, attachType, queryFlags, attachFlags uint32
		ids                                         uint64
		count                                       uint32
		_                                           uint32
	}{target: uint32(cgroup), attachType: unix.BPF_CGROUP_DEVICE, ids: uint64(uintptr(unsafe.Pointer(&ids[0]))), count: uint32(len(ids))}
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&ids[0])
	if _, err := bpf(unix.BPF_PROG_QUERY, unsafe.Pointer(&query), unsafe.Sizeof(query)); err != nil {
		return nil, err
	}
	var ours []int
	for _, id := range ids[:min(query.count, uint32(len(ids)))] {
		byID := struct{ id, next, flags uint32 }{id: id}
		fd, err := bpf(unix.BPF_PROG_GET_FD_BY_ID, unsafe.Pointer(&byID), unsafe.Sizeof(byID))
		if errors.Is(err, unix.ENOENT) {
			continue // detached meanwhile
		}
		if err != nil {
			closeAll(ours)
			return nil, err
		}
		name, err := programNameOf(fd)
		if err != nil {
			closeAll(append(ours, fd))
			return nil, err
		}
		if name != programName {
			unix.Close(fd)
			continue
		}
		ours = append(ours, fd)
	}
	return ours, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

func programNameOf(fd int) (string, error) {
	// The head of struct bpf_prog_info, up to the name; the kernel fills what there is
	// room for.
	var info struct {
		progType, id            uint32
		tag                     [8]byte
		jitedLen, xlatedLen     uint32
		jited, xlated, loadTime uint64
		uid, mapCount           uint32
		maps                    uint64
		name                    [16]byte
	}
	attr := struct {
		fd, size uint32
		info     uint64
	}{uint32(fd), uint32(unsafe.Sizeof(info)), uint64(uintptr(unsafe.Pointer(&info)))}
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&info)
	if _, err := bpf(unix.BPF_OBJ_GET_INFO_BY_FD, unsafe.Pointer(&attr), unsafe.Sizeof(attr)); err != nil {
		return "", err
	}
	name, _, _ := bytes.Cut(info.name[:], []byte{0})
	return string(name), nil
}

// applyDevicesV2 attaches a program for the rules, in the place of the one that an
// earlier call attached. There is no moment without one.
func applyDevicesV2(dir string, d *deviceRules) error {
	cgroup, err := open(dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return fmt.Errorf("devices: %w", err)
	}
	defer unix.Close(cgroup)
	if err := attachDevices(cgroup, d.deviceProgram()); err != nil {
		if errors.Is(err, unix.EPERM) {
			err = classed(err, errdefs.ErrPermissionDenied)
		}
		return fmt.Errorf("devices: attach the filter to %s: %w", dir, err)
	}
	return nil
}

func attachDevices(cgroup int, prog []insn) error {
	fd, err := loadProgram(prog)
	if err != nil {
		return fmt.Errorf("load: %w", err)
	}
	defer unix.Close(fd)
	earlier, err := ourPrograms(cgroup)
	if err != nil {
		return fmt.Errorf("query: %w", err)
	}
	defer closeAll(earlier)
	attr := attachAttr{target: uint32(cgroup), program: uint32(fd), attachType: unix.BPF_CGROUP_DEVICE, flags: unix.BPF_F_ALLOW_MULTI}
	if len(earlier) > 0 {
		attr.flags |= unix.BPF_F_REPLACE
		attr.replace = uint32(earlier[0])
	}
	if _, err := bpf(unix.BPF_PROG_ATTACH, unsafe.Pointer(&attr), unsafe.Sizeof(attr)); err != nil {
		return err
	}
	// With several programs all must agree: what is left of an update that was
	// interrupted would forbid what is allowed now.
	for _, old := range earlier[min(1, len(earlier)):] {
		detach := attachAttr{target: uint32(cgroup), program: uint32(old), attachType: unix.BPF_CGROUP_DEVICE}
		if _, err := bpf(unix.BPF_PROG_DETACH, unsafe.Pointer(&detach), unsafe.Sizeof(detach)); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("detach an earlier filter: %w", err)
		}
	}
	return nil
}
