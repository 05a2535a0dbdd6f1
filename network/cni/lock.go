package cni

import (
	"context"
	"sync"
)

// gate keeps ADD and DEL apart from GC, as the specification wants. GC waits until none is under way, and holds nobody
// up while it waits: one stuck plugin must not stop the others.
type gate struct {
	mu        sync.Mutex
	inside    int
	collector chan struct{} // closed when the GC under way ends; nil: none
	empty     chan struct{} // closed when inside becomes 0; nil: nobody waits
}

// enter waits for the end of a GC.
func (g *gate) enter(ctx context.Context) (leave func(), err error) {
	for {
		g.mu.Lock()
		c := g.collector
		if c == nil {
			g.inside++
			g.mu.Unlock()
			return g.leave, nil
		}
		g.mu.Unlock()
		select {
		case <-c:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.inside--; g.inside == 0 && g.empty != nil {
		close(g.empty)
		g.empty = nil
	}
}

// exclude waits until nothing is under way, and then lets nothing begin.
func (g *gate) exclude(ctx context.Context) (open func(), err error) {
	for {
		g.mu.Lock()
		if g.inside == 0 && g.collector == nil {
			c := make(chan struct{})
			g.collector = c
			g.mu.Unlock()
			return func() {
				g.mu.Lock()
				defer g.mu.Unlock()
				close(c)
				g.collector = nil
			}, nil
		}
		wait := g.collector
		if wait == nil {
			if g.empty == nil {
				g.empty = make(chan struct{})
			}
			wait = g.empty
		}
		g.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
