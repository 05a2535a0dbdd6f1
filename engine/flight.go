package engine

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// flightLimit bounds an operation that its client does not wait for any more.
	flightLimit = 4 * time.Minute
	// claimLimit is how long a result waits for the client that timed out and asks again.
	claimLimit = time.Minute
	// deadlineSlack tells a client's deadline from a cancellation: of both the server may
	// see the end of the call first.
	deadlineSlack = 100 * time.Millisecond
)

// flights joins requests that ask for the same thing. A client that timed out and asks
// again joins the operation under way, or gets its result; an operation whose client
// cancelled it is undone. What nobody came for is taken back.
type flights[T any] struct {
	mu    sync.Mutex
	byKey map[string]*flight[T]
}

// operation is what a flight does.
type operation[T any] struct {
	key     string // what it holds while it runs: a name
	request []byte // what was asked for: who asks for something else may not join
	run     func(context.Context) (T, error)
	// keep makes the result exist, in the moment in which somebody gets it. It does not block.
	keep func(T)
	drop func(T) // takes a result back that nobody got
	// alive tells whether a result that has been kept still is what a new request would make.
	alive func(T) bool
}

// flight is one operation. It stays where others find it until its result has surely reached
// somebody, or has been taken back.
type flight[T any] struct {
	request []byte
	cancel  context.CancelFunc
	done    chan struct{} // closed when val and err are there
	undone  chan struct{} // closed when an abandoned one has been taken back

	// Guarded by the mutex of flights:
	waiters   int
	abandoned bool // it is being undone: nobody may join
	over      bool
	kept      bool
	given     bool // somebody has been told the result
	val       T
	err       error
}

// errOtherRequest tells that a name is held by a request for something else.
var errOtherRequest = errors.New("another request holds the name")

// do runs an operation, or joins the one that holds the key. work runs it beside the request.
func (f *flights[T]) do(ctx context.Context, work func(func()), o operation[T]) (val T, err error) {
	fl, err := f.join(ctx, work, o)
	if err != nil {
		return val, err
	}
	select {
	case <-fl.done:
	case <-ctx.Done():
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	fl.waiters--
	switch {
	case fl.over && fl.err != nil:
		return val, fl.err
	case ctx.Err() == nil:
		fl.given = true
		if !mayBeLate(ctx) {
			f.forgetLocked(o.key, fl)
		} else if fl.waiters == 0 {
			f.expireLocked(work, o, fl) // the answer may not reach the client, who then asks again
		}
		return fl.val, nil
	case fl.waiters > 0:
	case timedOut(ctx) || fl.given: // what somebody has got is his
		if fl.over {
			f.expireLocked(work, o, fl)
		}
	case !fl.over:
		fl.abandoned = true
		fl.cancel()
	case f.byKey[o.key] == fl: // it was over in the moment in which it was cancelled
		fl.abandoned = true
		work(func() { f.takeBack(o, fl) })
	}
	return val, context.Cause(ctx)
}

// join finds the flight that holds the key, or starts one, and counts the caller in.
func (f *flights[T]) join(ctx context.Context, work func(func()), o operation[T]) (*flight[T], error) {
	for {
		f.mu.Lock()
		fl := f.byKey[o.key]
		switch {
		case fl == nil:
			fl = f.startLocked(ctx, work, o)
		case fl.abandoned:
			f.mu.Unlock()
			select {
			case <-fl.undone:
				continue
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		case !bytes.Equal(fl.request, o.request):
			f.mu.Unlock()
			return nil, errOtherRequest
		case fl.over && !fl.kept:
			fl.kept = true
			o.keep(fl.val)
		case fl.over && !o.alive(fl.val):
			f.forgetLocked(o.key, fl)
			f.mu.Unlock()
			continue
		}
		fl.waiters++
		f.mu.Unlock()
		return fl, nil
	}
}

func (f *flights[T]) startLocked(ctx context.Context, work func(func()), o operation[T]) *flight[T] {
	if f.byKey == nil {
		f.byKey = map[string]*flight[T]{}
	}
	run, cancel := context.WithTimeout(context.WithoutCancel(ctx), flightLimit)
	fl := &flight[T]{request: o.request, cancel: cancel, done: make(chan struct{}), undone: make(chan struct{})}
	f.byKey[o.key] = fl
	work(func() {
		defer cancel()
		val, err := o.run(run)
		f.mu.Lock()
		fl.val, fl.err, fl.over = val, err, true
		drop := false
		switch {
		case err != nil:
			f.forgetLocked(o.key, fl)
			if fl.abandoned { // from now on nobody else closes it
				close(fl.undone)
			}
		case fl.waiters > 0:
			fl.kept = true
			o.keep(val)
		case fl.abandoned:
			drop = true
		default:
			f.expireLocked(work, o, fl)
		}
		f.mu.Unlock()
		if drop {
			f.takeBack(o, fl)
		}
		close(fl.done)
	})
	return fl
}

// hold lets who asks for a key wait until it is released, as for a flight that is being taken back.
func (f *flights[T]) hold(key string) (release func()) {
	fl := &flight[T]{cancel: func() {}, done: make(chan struct{}), undone: make(chan struct{}), abandoned: true}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.byKey == nil {
		f.byKey = map[string]*flight[T]{}
	}
	if f.byKey[key] != nil {
		return func() {}
	}
	f.byKey[key] = fl
	return func() {
		f.mu.Lock()
		f.forgetLocked(key, fl)
		f.mu.Unlock()
		close(fl.undone)
	}
}

// takeBack undoes an abandoned flight whose operation has ended well. Until that is done it holds
// the key: what it made holds the name.
func (f *flights[T]) takeBack(o operation[T], fl *flight[T]) {
	o.drop(fl.val)
	f.mu.Lock()
	f.forgetLocked(o.key, fl)
	f.mu.Unlock()
	close(fl.undone)
}

func (f *flights[T]) forgetLocked(key string, fl *flight[T]) {
	if f.byKey[key] == fl {
		delete(f.byKey, key)
	}
}

// expireLocked ends the waiting for a client that may come back: what nobody has got is
// taken back then.
func (f *flights[T]) expireLocked(work func(func()), o operation[T], fl *flight[T]) {
	time.AfterFunc(claimLimit, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		switch {
		case f.byKey[o.key] != fl || fl.abandoned:
		case fl.kept:
			delete(f.byKey, o.key)
		default:
			fl.abandoned = true
			work(func() { f.takeBack(o, fl) })
		}
	})
}

// timedOut tells that a context ended by its deadline and not by a cancellation.
func timedOut(ctx context.Context) bool {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) || errdefs.IsDeadlineExceeded(context.Cause(ctx)) {
		return true
	}
	return ctx.Err() != nil && mayBeLate(ctx)
}

// mayBeLate tells that an answer now may reach the client after its deadline.
func mayBeLate(ctx context.Context) bool {
	d, ok := ctx.Deadline()
	return ok && time.Until(d) < deadlineSlack
}
