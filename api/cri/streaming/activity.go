package streaming

import (
	"sync/atomic"
	"time"
)

// activity closes what has been idle for too long. Only the payload of streams counts:
// pings keep a connection through proxies, not a forgotten session.
type activity struct {
	limit time.Duration
	last  atomic.Int64 // unix nanoseconds
	timer atomic.Pointer[time.Timer]
}

// watchActivity calls expire once after limit without touch. stop ends it.
func watchActivity(limit time.Duration, expire func()) *activity {
	a := &activity{limit: limit}
	a.touch()
	a.timer.Store(time.AfterFunc(limit, func() {
		idle := time.Since(time.Unix(0, a.last.Load()))
		if idle >= a.limit {
			expire()
			return
		}
		if t := a.timer.Load(); t != nil {
			t.Reset(a.limit - idle)
		}
	}))
	return a
}

func (a *activity) touch() { a.last.Store(time.Now().UnixNano()) }

func (a *activity) stop() {
	if t := a.timer.Swap(nil); t != nil {
		t.Stop()
	}
}
