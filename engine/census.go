package engine

import (
	"sync"
	"time"

	"github.com/hako-engine/hako/image"
)

// Census counts the objects of Docker's API and of the CRI; containers and tasks of containerd's
// clients are not among them.
type Census struct {
	Containers map[Status]int
	Sandboxes  map[SandboxState]int
	Execs      int // that run, of those that clients can inspect
	Shims      int // processes: one for each pod, and for each lone container that runs
}

// Census counts the objects. It waits for nobody: what it tells is in memory.
func (e *Engine) Census() Census {
	n := Census{Containers: map[Status]int{}, Sandboxes: map[SandboxState]int{}}
	for _, c := range e.containers.all() {
		c.mu.Lock()
		n.Containers[c.rec.State.Status]++
		if c.run != nil && c.rec.Config.Pod == nil {
			n.Shims++
		}
		for _, x := range c.execs {
			if x.state == execRunning {
				n.Execs++
			}
		}
		c.mu.Unlock()
	}
	for _, s := range e.pods.all() {
		s.mu.Lock()
		n.Sandboxes[s.state]++
		if s.shim != nil {
			n.Shims++
		}
		s.mu.Unlock()
	}
	return n
}

// Pull tells how a pull went.
type Pull struct {
	Took  time.Duration
	Bytes int64 // that came from the registry; layers that were here already are none
	Err   error
}

// pullMeter counts what a pull fetches.
type pullMeter struct {
	began time.Time
	mu    sync.Mutex
	got   map[string]int64 // by layer
}

// watch makes the meter see the progress, before to does.
func (m *pullMeter) watch(to func(image.Progress)) func(image.Progress) {
	return func(p image.Progress) {
		if p.Action == "Downloading" {
			m.mu.Lock()
			m.got[p.ID] = max(m.got[p.ID], p.Current)
			m.mu.Unlock()
		}
		if to != nil {
			to(p)
		}
	}
}

func (m *pullMeter) result(err error) Pull {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := Pull{Took: time.Since(m.began), Err: err}
	for _, n := range m.got {
		p.Bytes += n
	}
	return p
}
