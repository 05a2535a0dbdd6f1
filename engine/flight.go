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
}

type flight[T any] struct {
	request []byte
	cancel  context.CancelFunc
	done    chan struct{} // closed when val and err are there

	// Guarded by the mutex of flights:
	waiters   int
	abandoned bool // cancelled: nobody may join
	over      bool
	val       T
	err       error
}

// errOtherRequest tells that a name is held by a request for something else.
var errOtherRequest = errors.New("another request holds the name")

// do runs an operation, or joins the one that holds the key. work runs it beside the request.
func (f *flights[T]) do(ctx context.Context, work func(func()), o operation[T]) (val T, err error) {
	for {
		f.mu.Lock()
		fl := f.byKey[o.key]
		switch {
		case fl == nil:
			fl = f.startLocked(ctx, work, o)
		case fl.abandoned:
			f.mu.Unlock()
			select {
			case <-fl.done:
				continue
			case <-ctx.Done():
				return val, context.Cause(ctx)
			}
		case !bytes.Equal(fl.request, o.request):
			f.mu.Unlock()
			return val, errOtherRequest
		case fl.over: // it waits to be claimed
			delete(f.byKey, o.key)
			o.keep(fl.val)
			f.mu.Unlock()
			return fl.val, nil
		}
		fl.waiters++
		f.mu.Unlock()
		select {
		case <-fl.done:
			return fl.val, fl.err
		case <-ctx.Done():
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		fl.waiters--
		if fl.over && fl.err == nil {
			return fl.val, nil // it was kept for us
		}
		if fl.waiters == 0 && !fl.over && !timedOut(ctx) {
			fl.abandoned = true
			fl.cancel()
		}
		return val, context.Cause(ctx)
	}
}

func (f *flights[T]) startLocked(ctx context.Context, work func(func()), o operation[T]) *flight[T] {
	if f.byKey == nil {
		f.byKey = map[string]*flight[T]{}
	}
	fl := &flight[T]{request: o.request, done: make(chan struct{})}
	run, cancel := context.WithTimeout(context.WithoutCancel(ctx), flightLimit)
	fl.cancel = cancel
	f.byKey[o.key] = fl
	work(func() {
		defer cancel()
		val, err := o.run(run)
		f.mu.Lock()
		fl.val, fl.err, fl.over = val, err, true
		claimed := fl.waiters > 0
		switch {
		case err != nil, claimed, fl.abandoned:
			delete(f.byKey, o.key)
		default:
			time.AfterFunc(claimLimit, func() {
				f.mu.Lock()
				mine := f.byKey[o.key] == fl
				if mine {
					delete(f.byKey, o.key)
				}
				f.mu.Unlock()
				if mine {
					o.drop(val)
				}
			})
		}
		if err == nil && claimed {
			o.keep(val)
		}
		f.mu.Unlock()
		if err == nil && !claimed && fl.abandoned {
			o.drop(val)
		}
		close(fl.done)
	})
	return fl
}

// timedOut tells that a context ended by its deadline and not by a cancellation.
func timedOut(ctx context.Context) bool {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) || errdefs.IsDeadlineExceeded(context.Cause(ctx)) {
		return true
	}
	d, ok := ctx.Deadline()
	return ok && time.Until(d) < deadlineSlack
}
