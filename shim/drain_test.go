package shim

import (
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/shim/wire"
)

// endedOutput is the output of a process that has written n bytes and ended.
func endedOutput(t *testing.T, n int, to sink) *output {
	t.Helper()
	theirs, ours, err := pipe(true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close() })
	o := newOutput(&streams{busy: func() {}}, wire.FrameStdout, to)
	o.src = ours
	if _, err := theirs.Write(make([]byte, n)); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	o.processEnded()
	return o
}

// awaiting waits for an output until done is closed; a tick that it takes has been looked at when it takes the next, or is done.
func awaiting(t *testing.T, o *output) (tick chan<- time.Time, done <-chan struct{}) {
	t.Helper()
	ticks, over, last := make(chan time.Time), make(chan struct{}), o.held()
	go func() {
		defer close(over)
		o.awaitDrained(t.Context(), ticks, last)
	}()
	return ticks, over
}

// still feeds ticks to one who has to wait through all of them.
func still(t *testing.T, tick chan<- time.Time, done <-chan struct{}, n int) {
	t.Helper()
	for range n {
		select {
		case tick <- time.Time{}:
		case <-done:
			t.Fatal("the end does not wait")
		}
	}
}

func (o *output) handedOn() int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.mu.given
}

// TestDrainWaitsForCopier: on a machine that has no time for whoever copies the output, the end of a process waits for it. It was
// told after drainLimit before, and clients lost what was in the pipe.
func TestDrainWaitsForCopier(t *testing.T) {
	t.Parallel()
	o := endedOutput(t, 4, nil)
	tick, done := awaiting(t, o)
	still(t, tick, done, 5)
	go o.run()
	<-done
	if n := o.handedOn(); n != 4 {
		t.Errorf("%d bytes were handed on before the end", n)
	}
}

// fullPipe is a sink that has no room, and its reader.
func fullPipe(t *testing.T) (*piped, *os.File) {
	t.Helper()
	r, w, err := pipe(false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	raw, err := w.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	cerr := raw.Control(func(fd uintptr) {
		for err == nil {
			_, err = unix.Write(int(fd), make([]byte, 4096))
		}
	})
	if cerr != nil || !errors.Is(err, unix.EAGAIN) {
		t.Fatal(cerr, err)
	}
	return &piped{File: w}, r
}

// TestDrainFollowsReader: a reader that is slow gets everything before the end is told, one that takes nothing holds it up no
// longer than a tick. It was told after drainLimit before, whatever the reader did, and what was then left was lost with the delete.
func TestDrainFollowsReader(t *testing.T) {
	t.Parallel()
	const size, page = 64 << 10, 4 << 10
	to, r := fullPipe(t)
	o := endedOutput(t, size, to)
	go o.run()
	if !eventually(o.refused.Load) {
		t.Fatal("nothing is written")
	}
	tick, done := awaiting(t, o)
	buf := make([]byte, page)
	for i := range 4 {
		if _, err := r.Read(buf); err != nil {
			t.Fatal(err)
		}
		if !eventually(func() bool { return to.taken.Load() == int64(i+1)*page }) {
			t.Fatalf("%d bytes went in after %d pages were read", to.taken.Load(), i+1)
		}
		still(t, tick, done, 1)
	}
	tick <- time.Time{} // nothing was read since the last
	<-done
	select {
	case <-o.drained:
		t.Error("the reader has not got everything")
	default:
	}
	// Until the process is deleted the rest is still to be had.
	for left := size; left > 0; {
		n, err := r.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		left -= n
	}
	<-o.drained
	if n := o.handedOn(); n != size {
		t.Errorf("%d bytes were handed on", n)
	}
}

// TestDrainOfEach: a reader of stdout that takes nothing is no reason not to wait for stderr.
func TestDrainOfEach(t *testing.T) {
	t.Parallel()
	to, r := fullPipe(t)
	s := &streams{busy: func() {}}
	stuck, other := endedOutput(t, 4, to), endedOutput(t, 4, nil)
	s.outputs = []*output{stuck, other}
	go stuck.run()
	if !eventually(stuck.refused.Load) {
		t.Fatal("nothing is written")
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.drain()
	}()
	go other.run()
	<-ended
	select {
	case <-other.drained:
	default:
		t.Error("it did not wait for the other output")
	}
	r.Close()
}

// TestDrainOfConsole: a console that somebody else holds open has ended when it has nothing more. Before, it had ended when it was still for a
// moment, which a copier without a share of the CPU was, too.
func TestDrainOfConsole(t *testing.T) {
	t.Parallel()
	for _, n := range []int{0, 3000, 20000} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
			if err != nil {
				t.Fatal(err)
			}
			master := os.NewFile(uintptr(fd), "console")
			defer master.Close()
			if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
				t.Fatal(err)
			}
			number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
			if err != nil {
				t.Fatal(err)
			}
			slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer slave.Close() // what the process has left behind
			o := newOutput(&streams{terminal: true, busy: func() {}}, wire.FrameStdout, nil)
			o.src = master
			if n > 4096 { // more than it holds: the copier is at work
				go o.run()
			}
			if _, err := slave.Write(make([]byte, n)); err != nil {
				t.Fatal(err)
			}
			o.processEnded()
			tick, done := awaiting(t, o)
			if n == 3000 {
				still(t, tick, done, 3)
				go o.run()
			}
			<-done
			if got := o.handedOn(); got != int64(n) {
				t.Errorf("%d bytes of %d were handed on before the end", got, n)
			}
		})
	}
}
