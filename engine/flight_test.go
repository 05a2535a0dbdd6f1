package engine

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// flightLog is what happened to the results of flights.
type flightLog struct {
	mu            sync.Mutex
	runs          int
	kept, dropped []int
}

func (l *flightLog) op(key, request string, run func(context.Context, int) error) operation[int] {
	return operation[int]{
		key: key, request: []byte(request),
		run: func(ctx context.Context) (int, error) {
			l.mu.Lock()
			l.runs++
			n := l.runs
			l.mu.Unlock()
			return n, run(ctx, n)
		},
		keep:  func(n int) { l.mu.Lock(); defer l.mu.Unlock(); l.kept = append(l.kept, n) },
		alive: func(int) bool { return true },
		drop:  func(n int) { l.mu.Lock(); defer l.mu.Unlock(); l.dropped = append(l.dropped, n) },
	}
}

func (l *flightLog) check(t *testing.T, runs int, kept, dropped []int) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.runs != runs || !slices.Equal(l.kept, kept) || !slices.Equal(l.dropped, dropped) {
		t.Errorf("ran %d times, kept %v, dropped %v; want %d, %v, %v", l.runs, l.kept, l.dropped, runs, kept, dropped)
	}
}

func inBackground(f func()) { go f() }

func takes(d time.Duration) func(context.Context, int) error {
	return func(ctx context.Context, _ int) error {
		select {
		case <-time.After(d):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func TestFlightIsJoined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f flights[int]
		var l flightLog
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if n, err := f.do(bg, inBackground, l.op("a", "x", takes(time.Second))); n != 1 || err != nil {
					t.Errorf("joined: %d, %v", n, err)
				}
			})
		}
		synctest.Wait()
		if _, err := f.do(bg, inBackground, l.op("a", "y", takes(0))); !errors.Is(err, errOtherRequest) {
			t.Errorf("another request: %v", err)
		}
		wg.Wait()
		l.check(t, 1, []int{1}, nil)
		if n, err := f.do(bg, inBackground, l.op("a", "y", takes(0))); n != 2 || err != nil {
			t.Errorf("afterwards: %d, %v", n, err)
		}
	})
}

func TestFlightThatTimesOutIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f flights[int]
		var l flightLog
		slow := l.op("a", "x", takes(10*time.Second))
		ctx, cancel := context.WithTimeout(bg, 2*time.Second)
		defer cancel()
		if _, err := f.do(ctx, inBackground, slow); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("timed out: %v", err)
		}
		// The client asks again while it runs, and once more when it is over.
		ctx2, cancel2 := context.WithTimeout(bg, 2*time.Second)
		defer cancel2()
		if _, err := f.do(ctx2, inBackground, slow); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("timed out again: %v", err)
		}
		time.Sleep(10 * time.Second)
		l.check(t, 1, nil, nil)
		if n, err := f.do(bg, inBackground, slow); n != 1 || err != nil {
			t.Errorf("third time: %d, %v", n, err)
		}
		l.check(t, 1, []int{1}, nil)
	})
}

func TestFlightThatNobodyClaimsIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f flights[int]
		var l flightLog
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		_, _ = f.do(ctx, inBackground, l.op("a", "x", takes(5*time.Second)))
		time.Sleep(claimLimit + 5*time.Second)
		synctest.Wait()
		l.check(t, 1, nil, []int{1})
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.byKey) != 0 {
			t.Error("the name is still held")
		}
	})
}

func TestFlightThatIsCancelledIsUndone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f flights[int]
		var l flightLog
		// One that ends with its context, and one that ends well in spite of it.
		for _, run := range []func(context.Context, int) error{
			takes(time.Hour),
			func(ctx context.Context, _ int) error { <-ctx.Done(); time.Sleep(time.Second); return nil },
		} {
			ctx, cancel := context.WithCancel(bg)
			time.AfterFunc(time.Second, cancel)
			if _, err := f.do(ctx, inBackground, l.op("a", "x", run)); !errors.Is(err, context.Canceled) {
				t.Errorf("cancelled: %v", err)
			}
			// Who comes next waits for the undoing, and does it anew.
			if _, err := f.do(bg, inBackground, l.op("a", "x", takes(0))); err != nil {
				t.Errorf("after it: %v", err)
			}
		}
		l.check(t, 4, []int{2, 4}, []int{3})
	})
}

// TestFlightWhoseAnswerIsLate: the client's deadline may pass while the answer is on its way.
func TestFlightWhoseAnswerIsLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f flights[int]
		var l flightLog
		alive := true
		op := l.op("a", "x", takes(time.Second))
		op.alive = func(int) bool { return alive }
		late := func() (int, error) {
			ctx, cancel := context.WithTimeout(bg, time.Second+deadlineSlack/2)
			defer cancel()
			return f.do(ctx, inBackground, op)
		}
		for range 2 {
			if n, err := late(); n != 1 || err != nil {
				t.Errorf("%d, %v", n, err)
			}
		}
		alive = false // it has been removed since
		if n, err := late(); n != 2 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		time.Sleep(2 * claimLimit)
		l.check(t, 2, []int{1, 2}, nil)
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.byKey) != 0 {
			t.Error("the name is still held")
		}
	})
}

func TestFlightWithAnotherWaiterIsNotCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f flights[int]
		var l flightLog
		op := l.op("a", "x", takes(5*time.Second))
		ctx, cancel := context.WithCancel(bg)
		time.AfterFunc(time.Second, cancel)
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = f.do(ctx, inBackground, op) })
		wg.Go(func() {
			if n, err := f.do(bg, inBackground, op); n != 1 || err != nil {
				t.Errorf("the other one: %d, %v", n, err)
			}
		})
		wg.Wait()
		l.check(t, 1, []int{1}, nil)
	})
}

// TestFlightHoldsItsNameWhileItIsTakenBack: what nobody came for has the name until it is gone, and whoever asks
// meanwhile waits for that, instead of being told that the name is taken.
func TestFlightHoldsItsNameWhileItIsTakenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f flights[int]
		var l flightLog
		holder := 0
		slow := l.op("a", "x", func(ctx context.Context, n int) error {
			if holder != 0 {
				t.Errorf("the name is still held by %d", holder)
			}
			holder = n
			return takes(5*time.Second)(ctx, n)
		})
		dropped := slow.drop
		slow.drop = func(n int) { time.Sleep(10 * time.Second); holder = 0; dropped(n) }
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		_, _ = f.do(ctx, inBackground, slow)
		time.Sleep(claimLimit + 5*time.Second) // it is being taken back
		synctest.Wait()
		l.check(t, 1, nil, nil)
		short, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		if _, err := f.do(short, inBackground, slow); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("meanwhile: %v", err)
		}
		if n, err := f.do(bg, inBackground, slow); n != 2 || err != nil {
			t.Errorf("afterwards: %d, %v", n, err)
		}
		l.check(t, 2, []int{2}, []int{1})
	})
}

// TestFlightThatIsCancelledAtItsEnd: the client goes away in the moment in which the result is there.
func TestFlightThatIsCancelledAtItsEnd(t *testing.T) {
	for range 2000 {
		var f flights[int]
		var l flightLog
		ctx, cancel := context.WithCancel(bg)
		op := l.op("a", "x", takes(0))
		kept := op.keep
		op.keep = func(n int) { kept(n); cancel() }
		var work sync.WaitGroup
		n, err := f.do(ctx, work.Go, op)
		if err == nil || n != 0 {
			t.Fatalf("cancelled: %d, %v", n, err)
		}
		op.keep = kept
		if n, err := f.do(bg, work.Go, op); n != 2 || err != nil {
			t.Fatalf("after it: %d, %v", n, err)
		}
		work.Wait()
		l.check(t, 2, []int{1, 2}, []int{1})
	}
}

// TestFlightThatSomebodyHasIsNotTakenBack: of two that wait, one gets the result just before its deadline, and the other one is cancelled.
func TestFlightThatSomebodyHasIsNotTakenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f flights[int]
		var l flightLog
		op := l.op("a", "x", takes(time.Second))
		cancelled, cancel := context.WithCancel(bg)
		kept := op.keep
		op.keep = func(n int) { kept(n); cancel() }
		late, stop := context.WithTimeout(bg, time.Second+deadlineSlack/2)
		defer stop()
		var wg sync.WaitGroup
		wg.Go(func() {
			if n, err := f.do(late, inBackground, op); n != 1 || err != nil {
				t.Errorf("the one: %d, %v", n, err)
			}
		})
		wg.Go(func() { _, _ = f.do(cancelled, inBackground, op) })
		wg.Wait()
		time.Sleep(2 * claimLimit)
		synctest.Wait()
		l.check(t, 1, []int{1}, nil)
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.byKey) != 0 {
			t.Error("the name is still held")
		}
	})
}
