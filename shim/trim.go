package shim

import (
	"runtime/debug"
	"time"

	"github.com/hako-engine/hako/internal/trim"
)

// quiet is how long nothing is asked of a shim before it makes itself small. That takes 4 ms of CPU time.
const quiet = 300 * time.Millisecond

// busy notes that something was done.
func (s *Service) busy() { s.trim.Reset(quiet) }

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
