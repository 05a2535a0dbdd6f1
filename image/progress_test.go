package image

import (
	"context"
	"testing"
	"time"
)

// TestProgressOfSlowClient does not hold up who makes progress, and loses no last step.
func TestProgressOfSlowClient(t *testing.T) {
	t.Parallel()
	hold := make(chan struct{})
	var got []Progress
	p := newProgress(func(v Progress) {
		<-hold
		got = append(got, v)
	})
	for i := range int64(100_000) {
		p.line(Progress{ID: "a", Action: "Downloading", Current: i + 1, Total: 100_000})
	}
	p.line(Progress{ID: "a", Action: "Pull complete"})
	p.line(Progress{Message: "Status: done"})
	close(hold) // whoever waited for it before, would hang
	p.close(context.Background())
	if n := len(got); n < 3 || n > 50 || got[n-3].Current != 100_000 || got[n-2].Action != "Pull complete" || got[n-1].Message == "" {
		t.Errorf("got %d steps, the last are %+v", len(got), got[max(0, len(got)-3):])
	}
	p.line(Progress{Message: "too late"})

	// A client that is gone is not waited for.
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	gone := newProgress(func(Progress) { time.Sleep(time.Millisecond) })
	for range 10_000 {
		gone.line(Progress{Message: "x"})
	}
	gone.close(ctx)
}
