package image

import (
	"context"
	"sync"
	"time"
)

// progressEvery is how often one part tells how far it is.
const progressEvery = 100 * time.Millisecond

// progress brings the steps of many goroutines to one callback, one at a time, in
// order, and not more often than people can see. A callback that is slow, because its
// client is, holds up nobody: steps of one part that wait are merged.
type progress struct {
	to func(Progress) // nil: nobody listens

	mu    sync.Mutex
	last  map[string]progressState
	queue []Progress
	wake  chan struct{} // holds a token when there is something to do
	over  bool
	done  chan struct{} // closed when to will not be called any more
}

type progressState struct {
	action string
	at     time.Time
}

// newProgress begins to pass on steps; close must be called.
func newProgress(to func(Progress)) *progress {
	p := &progress{to: to}
	if to != nil {
		p.last, p.wake, p.done = map[string]progressState{}, make(chan struct{}, 1), make(chan struct{})
		go p.deliver()
	}
	return p
}

// line passes on a step; one of the same kind as the last of its part only after a while.
func (p *progress) line(v Progress) {
	if p == nil || p.to == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.over {
		return
	}
	if v.ID != "" {
		now := time.Now()
		l := p.last[v.ID]
		if l.action == v.Action && (v.Current != v.Total || v.Total == 0) && now.Sub(l.at) < progressEvery {
			return
		}
		p.last[v.ID] = progressState{v.Action, now}
	}
	for i := len(p.queue) - 1; i >= 0 && v.ID != ""; i-- {
		if q := &p.queue[i]; q.ID == v.ID {
			if q.Action == v.Action {
				*q = v
				return
			}
			break
		}
	}
	p.queue = append(p.queue, v)
	p.poke()
}

func (p *progress) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *progress) deliver() {
	defer close(p.done)
	for range p.wake {
		for {
			p.mu.Lock()
			if len(p.queue) == 0 {
				over := p.over
				p.mu.Unlock()
				if over {
					return
				}
				break
			}
			v := p.queue[0]
			p.queue = p.queue[1:]
			p.mu.Unlock()
			p.to(v)
		}
	}
}

// close waits until everything has been passed on; if ctx is over, only for the call
// under way.
func (p *progress) close(ctx context.Context) {
	if p.to == nil {
		return
	}
	p.mu.Lock()
	p.over = true
	if ctx.Err() != nil {
		p.queue = nil
	}
	p.mu.Unlock()
	p.poke()
	select {
	case <-p.done:
	case <-ctx.Done():
		p.mu.Lock()
		p.queue = nil
		p.mu.Unlock()
		<-p.done
	}
}
