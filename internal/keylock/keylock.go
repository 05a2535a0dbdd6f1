// Package keylock lets one at a time have what a key stands for.
//
// In flow keys and contexts; out flows the turn of whoever asked, in the end.
package keylock

import (
	"context"
	"sync"
)

// Locks is a mutex for each key. Nothing is kept of a key that nobody has or waits for. The zero value is ready to use.
type Locks struct {
	mu sync.Mutex
	m  map[string]*lock
}

type lock struct {
	taken chan struct{} // holds one token while somebody has it
	users int           // who have it or wait for it
}

// Lock waits for the key's turn. unlock is to be called once if err is nil; else err is the context's cause.
func (l *Locks) Lock(ctx context.Context, key string) (unlock func(), err error) {
	l.mu.Lock()
	if l.m == nil {
		l.m = map[string]*lock{}
	}
	k := l.m[key]
	if k == nil {
		k = &lock{taken: make(chan struct{}, 1)}
		l.m[key] = k
	}
	k.users++
	l.mu.Unlock()
	leave := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if k.users--; k.users == 0 {
			delete(l.m, key)
		}
	}
	select {
	case k.taken <- struct{}{}:
		return func() { <-k.taken; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, context.Cause(ctx)
	}
}
