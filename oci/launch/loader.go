//go:build linux && (amd64 || arm64)

package launch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/defence"
	"github.com/hako-engine/hako/oci/plan"
)

// The loader is an ELF file of one segment at loaderBase: headers, configuration,
// code, seccomp filter. The code is written in loader_GOARCH.s.
const (
	loaderBase   = 0x400000
	loaderConfig = 64 + 2*56
	loaderCode   = loaderConfig + 40
)

// loaderText gives the first byte of the code and the first one behind it.
func loaderText() (start, end uintptr)

// loaderOptions is the configuration of a loader. The descriptors are those of the
// process that executes it.
type loaderOptions struct {
	sync   int  // words for the parent until the process is ready
	report int  // words about exec; the same as sync unless hold
	start  int  // with hold: a byte is read from it before exec
	refork bool // clone once more before the rest, report the pid, and exit; the clone starts a session
	// terminal: with refork, standard input becomes the controlling terminal.
	terminal bool
	hold     bool
	filter   plan.Filter
}

// loaderFile makes the sealed memory file.
func loaderFile(o loaderOptions) (int, error) {
	filter := o.filter.Program
	start, end := loaderText()
	if end <= start || end-start > 1024 {
		return -1, errors.New("make the loader: its code is not where it was expected")
	}
	code := unsafe.Slice((*byte)(pointer(start)), end-start)
	filterAt := (loaderCode + len(code) + 7) &^ 7
	size := filterAt + 8*len(filter)

	b := make([]byte, 0, size)
	le := binary.LittleEndian
	b = append(b, 0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	b = le.AppendUint16(b, 2) // ET_EXEC
	b = le.AppendUint16(b, elfMachine)
	b = le.AppendUint32(b, 1)
	b = le.AppendUint64(b, loaderBase+loaderCode)
	b = le.AppendUint64(b, 64) // program headers
	b = le.AppendUint64(b, 0)
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{64, 56, 2, 64, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	segment := func(typ, flags uint32, vals ...uint64) {
		b = le.AppendUint32(b, typ)
		b = le.AppendUint32(b, flags)
		for _, v := range vals {
			b = le.AppendUint64(b, v)
		}
	}
	segment(1, 5, 0, loaderBase, loaderBase, uint64(size), uint64(size), 0x10000) // PT_LOAD, r-x
	segment(0x6474e551, 6, 0, 0, 0, 0, 0, 16)                                     // PT_GNU_STACK, rw-
	var flag uint32
	if o.refork {
		flag |= 1
	}
	if o.hold {
		flag |= 2
	}
	if o.terminal {
		flag |= 4
	}
	for _, v := range []uint32{uint32(o.report), flag, o.filter.Flags, uint32(o.sync), uint32(o.start), 0} {
		b = le.AppendUint32(b, v)
	}
	b = le.AppendUint64(b, uint64(len(filter))) // struct sock_fprog
	b = le.AppendUint64(b, uint64(loaderBase+filterAt))
	b = append(b, code...)
	for len(b) < filterAt {
		b = append(b, 0)
	}
	for _, f := range filter {
		b = le.AppendUint16(b, f.Code)
		b = append(b, f.Jt, f.Jf)
		b = le.AppendUint32(b, f.K)
	}

	fd, err := unix.MemfdCreate("hako-loader", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if err == unix.EINVAL { // before Linux 6.3
		fd, err = unix.MemfdCreate("hako-loader", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return -1, fmt.Errorf("make the loader: memfd_create: %w", err)
	}
	if _, err := unix.Write(fd, b); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("make the loader: %w", err)
	}
	if !defence.SealedLoader {
		return fd, nil
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("seal the loader: %w", err)
	}
	return fd, nil
}
