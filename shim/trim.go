package shim

import (
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hako-engine/hako/internal/trim"
)

// quiet is how long nothing is asked of a shim before it makes itself small. That takes 4 ms of CPU time.
const quiet = 300 * time.Millisecond

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

// shrink gives memory back. An idle shim, and most of them are idle for days, needs a
// few dozen pages of its program; those that its start and the creation of a
// container went through are more than everything else that it holds.
//
// From then on the heap, a few hundred kilobytes, is collected often, which costs nothing.
// Before, during the creation of a container, it would be a tenth of all work.
func (s *Service) shrink() {
	if s.calls.Load() > 0 {
		return // whose end notes it
	}
	debug.SetGCPercent(20)
	trim.Heap()
	trim.Program()
}
