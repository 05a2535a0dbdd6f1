package shim

import (
	"os"
	"testing"
	"time"

	"github.com/hako-engine/hako/shim/wire"
)

// heldSink takes nothing until it is closed.
type heldSink chan struct{}

func (h heldSink) Write(p []byte) (int, error) { <-h; return len(p), nil }
func (h heldSink) Close() error                { return nil }

// endedOutput is the output of a process that has written a word and ended.
func endedOutput(t *testing.T, to sink) (*streams, *output) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	s := &streams{busy: func() {}}
	o := newOutput(s, wire.FrameStdout, to)
	o.src = r
	s.outputs = []*output{o}
	if _, err := w.WriteString("word"); err != nil {
		t.Fatal(err)
	}
	w.Close()
	return s, o
}

// TestDrainWaitsForCopier: on a machine that has no time for whoever copies the output, the end of a process waits for it. It was
// told after drainLimit before, and clients lost what was in the pipe.
func TestDrainWaitsForCopier(t *testing.T) {
	t.Parallel()
	s, o := endedOutput(t, nil)
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		s.drain()
	}()
	select {
	case <-drained:
		t.Fatal("the end does not wait for what nobody has copied")
	case <-time.After(drainLimit + drainLimit/4):
	}
	go o.run()
	<-drained
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.mu.given != int64(len("word")) {
		t.Errorf("%d bytes were handed on before the end", o.mu.given)
	}
}

// TestDrainLeavesStuckSink: a FIFO that nobody reads holds nothing up for long.
func TestDrainLeavesStuckSink(t *testing.T) {
	t.Parallel()
	held := make(heldSink)
	s, o := endedOutput(t, held)
	go o.run()
	s.drain()
	select {
	case <-o.drained:
		t.Error("the sink took something")
	default:
	}
	close(held)
	<-o.drained
}
