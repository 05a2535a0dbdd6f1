package image

import (
	"sync"
	"time"
)

// progressEvery is how often one part tells how far it is.
const progressEvery = 100 * time.Millisecond

// progress brings the steps of many goroutines to one callback, one at a time, and not
// more often than people can see.
type progress struct {
	mu   sync.Mutex
	to   func(Progress)
	last map[string]progressState
}

type progressState struct {
	action string
	at     time.Time
}

func newProgress(to func(Progress)) *progress {
	return &progress{to: to, last: map[string]progressState{}}
}

// line passes on a step; one of the same kind as the last of its part only after a while.
func (p *progress) line(v Progress) {
	if p == nil || p.to == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if v.ID != "" {
		now := time.Now()
		l := p.last[v.ID]
		if l.action == v.Action && (v.Current != v.Total || v.Total == 0) && now.Sub(l.at) < progressEvery {
			return
		}
		p.last[v.ID] = progressState{v.Action, now}
	}
	p.to(v)
}
