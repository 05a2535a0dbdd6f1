package shim

import (
	"bufio"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// quiet is how long nothing is asked of a shim before it makes itself small.
const quiet = time.Second

// idleness has a function called when nothing was done for a while. To note that something was done is
// cheap: it happens for each piece of output, and to set a timer wakes the thread that waits for descriptors.
type idleness struct {
	quiet time.Duration
	do    func()
	last  atomic.Int64 // when something was done, by the clock that began
	began time.Time

	mu    sync.Mutex
	timer *time.Timer
	armed atomic.Bool // the timer runs; set under mu
	ended bool
}

func newIdleness(quiet time.Duration, do func()) *idleness {
	i := &idleness{quiet: quiet, do: do, began: time.Now()}
	i.armed.Store(true)
	i.mu.Lock()
	defer i.mu.Unlock()
	i.timer = time.AfterFunc(quiet, i.fire)
	return i
}

// busy notes that something was done.
func (i *idleness) busy() {
	i.last.Store(int64(time.Since(i.began)))
	if i.armed.Load() { // it looks at last when it fires
		return
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if !i.ended && i.armed.CompareAndSwap(false, true) {
		i.timer.Reset(i.quiet)
	}
}

func (i *idleness) fire() {
	i.mu.Lock()
	defer i.mu.Unlock()
	// Before last is looked at: who comes from here on arms it again.
	i.armed.Store(false)
	if i.ended {
		return
	}
	if left := i.quiet - (time.Since(i.began) - time.Duration(i.last.Load())); left > 0 {
		i.armed.Store(true)
		i.timer.Reset(left)
		return
	}
	i.do()
}

// stop ends it.
func (i *idleness) stop() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.ended = true
	i.timer.Stop()
}

// busy notes that something was done.
func (s *Service) busy() { s.trim.busy() }

// trim gives memory back. An idle shim, and most of them are idle for days, needs a
// few dozen pages of its program; those that its start and the creation of a
// container went through stay mapped for as long as the machine has memory to spare,
// and they are more than everything else that it holds. MADV_DONTNEED unmaps them;
// they stay in the page cache, which all shims share, and a page that is needed again
// costs a minor fault. It is only done to mappings that cannot have been written to.
//
// From then on the heap, a few hundred kilobytes, is collected often, which costs nothing.
// Before, during the creation of a container, it would be a tenth of all work.
func trim() {
	debug.SetGCPercent(20)
	debug.FreeOSMemory()
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// start-end perms offset dev inode path
		fields := strings.Fields(lines.Text())
		if len(fields) < 6 || fields[5] != self || fields[1] != "r-xp" && fields[1] != "r--p" {
			continue
		}
		from, to, _ := strings.Cut(fields[0], "-")
		start, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		if err1 != nil || err2 != nil || end <= start {
			continue
		}
		dontNeed(uintptr(start), uintptr(end-start))
	}
}

// dontNeed is madvise(MADV_DONTNEED) for memory that is not Go's to have a slice of.
func dontNeed(start, size uintptr) {
	_, _, _ = unix.Syscall(unix.SYS_MADVISE, start, size, unix.MADV_DONTNEED)
}
