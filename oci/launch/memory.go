//go:build linux && (amd64 || arm64)

package launch

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// memory holds programs and all that they touch, outside of the Go heap, which a clone
// does not get: see adviseHeap. It does not move, and what only numbers point to stays until
// it is released.
type memory struct {
	chunks [][]byte
	free   []byte
	err    error // the first failure: what was given since must not be used
}

// chunkSize is room for the plan of an ordinary container. Pages that nothing is written
// to cost nothing.
const chunkSize = 256 << 10

// alloc gives n zeroed bytes, at a multiple of 8.
func (m *memory) alloc(n int) []byte {
	n = (n + 7) &^ 7
	if n > len(m.free) {
		size := max((n+4095)&^4095, chunkSize)
		b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			if m.err == nil {
				m.err = fmt.Errorf("memory for the container's first process: mmap: %w", err)
			}
			return make([]byte, n)
		}
		m.chunks = append(m.chunks, b)
		m.free = b
	}
	out := m.free[:n:n]
	m.free = m.free[n:]
	return out
}

// words copies w.
func (m *memory) words(w []int64) []int64 {
	out := unsafe.Slice((*int64)(unsafe.Pointer(unsafe.SliceData(m.alloc(8*(len(w)+1))))), len(w))
	copy(out, w)
	return out
}

// release gives everything back. No program may run any more.
func (m *memory) release() {
	for _, b := range m.chunks {
		_ = unix.Munmap(b)
	}
	m.chunks, m.free = nil, nil
}

// arenaSize is that of an arena of the Go heap, whose address is a multiple of it.
const arenaSize = 64 << 20

// adviseHeap tells whether a clone gets the arenas in which the objects lie. Copying the memory
// map takes longer the more there is, and the parent would copy each page of the heap that it
// then writes to.
//
// Where there are more arenas the child has those, as it has the runtime's tables, and does
// not look.
func adviseHeap(advice uintptr, objects ...unsafe.Pointer) {
	var last uintptr
	for _, o := range objects {
		arena := uintptr(o) &^ (arenaSize - 1)
		if arena != last {
			_, _, _ = unix.RawSyscall(unix.SYS_MADVISE, arena, arenaSize, advice)
		}
		last = arena
	}
}
