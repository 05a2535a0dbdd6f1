package engine

import (
	"context"
	"slices"
)

// waiter is one client that waits for a container.
type waiter struct {
	cond WaitCondition
	ch   chan WaitResult
}

// WaitContainer waits for a condition. The wait is registered when it returns; the
// channel gives one result, or none if ctx ends first.
func (e *Engine) WaitContainer(ctx context.Context, ref string, cond WaitCondition) (<-chan WaitResult, error) {
	switch cond {
	case "":
		cond = WaitNotRunning
	case WaitNotRunning, WaitNextExit, WaitRemoved:
	default:
		return nil, invalidf("invalid condition: %q", string(cond))
	}
	c, g, err := e.lookup(ctx, ref)
	if err != nil {
		return nil, err
	}
	if g != nil {
		return e.waitGuest(ctx, g, cond), nil
	}
	ch := make(chan WaitResult, 1)
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.rec.State
	if c.gone || cond == WaitNotRunning && !s.live() && s.Status != StatusRestarting {
		ch <- WaitResult{ExitCode: s.ExitCode}
		return ch, nil
	}
	c.waiters = append(c.waiters, waiter{cond, ch})
	context.AfterFunc(ctx, func() { // of one that is not there any more, without harm
		c.mu.Lock()
		defer c.mu.Unlock()
		c.waiters = slices.DeleteFunc(c.waiters, func(w waiter) bool { return w.ch == ch })
	})
	return ch, nil
}

// notify wakes those who wait for one of the conditions.
func (c *container) notify(conds ...WaitCondition) {
	c.mu.Lock()
	defer c.mu.Unlock()
	res := WaitResult{ExitCode: c.rec.State.ExitCode}
	c.waiters = slices.DeleteFunc(c.waiters, func(w waiter) bool {
		if !slices.Contains(conds, w.cond) {
			return false
		}
		w.ch <- res
		return true
	})
}
