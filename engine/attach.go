package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/shim/client"
	"github.com/hako-engine/hako/shim/log"
)

// pendingAttach is an attachment to a container that does not run yet. The next start
// connects it before the process begins, so that it misses nothing.
type pendingAttach struct {
	opts   client.AttachOptions
	ready  chan struct{} // closed when stream is decided
	stream client.Stream // nil: there will be none
}

func (p *pendingAttach) resolve(s client.Stream) {
	p.stream = s
	close(p.ready)
}

// connectPending joins the waiting attachments to a created task.
func (c *container) connectPending(ctx context.Context, shim Shim) {
	c.mu.Lock()
	pending := c.pending
	c.pending = nil
	c.mu.Unlock()
	for _, p := range pending {
		s, err := shim.Attach(ctx, p.opts)
		if err != nil {
			s = nil
		}
		p.resolve(s)
	}
}

// attachment is an Attachment whose stream may come later. Logs, if asked for, come first.
type attachment struct {
	c      *container
	p      *pendingAttach
	nextFn func() (LogEntry, error, bool)
	stopFn func()
	closed chan struct{}
	once   sync.Once // closes closed
	// end, if not nil, holds the end of the output back until it is closed: the exit
	// code must be known when a client sees the end.
	end <-chan struct{}
}

func (a *attachment) stream() (client.Stream, error) {
	select {
	case <-a.p.ready:
	default:
		select {
		case <-a.p.ready:
		case <-a.closed:
			return nil, io.ErrClosedPipe
		}
	}
	if a.p.stream == nil {
		return nil, io.EOF
	}
	return a.p.stream, nil
}

func (a *attachment) ReadFrame() (int, []byte, error) {
	if a.nextFn != nil {
		if entry, err, ok := a.nextFn(); ok && err == nil {
			return entry.Stream, entry.Line, nil
		}
		a.stopFn()
		a.nextFn = nil
	}
	s, err := a.stream()
	if err != nil {
		return 0, nil, err
	}
	n, p, err := s.ReadFrame()
	if errors.Is(err, io.EOF) && a.end != nil {
		select {
		case <-a.end:
		case <-a.closed:
		}
	}
	return n, p, err
}

func (a *attachment) Write(p []byte) (int, error) {
	s, err := a.stream()
	if err != nil {
		return 0, io.ErrClosedPipe
	}
	return s.Write(p)
}

func (a *attachment) CloseWrite() error {
	s, err := a.stream()
	if err != nil {
		return nil
	}
	return s.CloseWrite()
}

// Close detaches. The process is not touched.
func (a *attachment) Close() error {
	first := false
	a.once.Do(func() { first = true; close(a.closed) })
	if !first {
		return nil
	}
	if a.c != nil {
		a.c.mu.Lock()
		before := len(a.c.pending)
		a.c.pending = slices.DeleteFunc(a.c.pending, func(p *pendingAttach) bool { return p == a.p })
		dropped := len(a.c.pending) < before
		a.c.mu.Unlock()
		if dropped {
			a.p.resolve(nil)
		}
	}
	go func() { // a start may be connecting it right now
		<-a.p.ready
		if a.p.stream != nil {
			a.p.stream.Close()
		}
	}()
	return nil
}

// Attach connects to the streams of a container. One that does not run yet is waited
// for: the attachment is complete from the first byte of the next run.
func (e *Engine) Attach(ctx context.Context, ref string, o AttachOptions) (Attachment, error) {
	c, g, err := e.lookup(ctx, ref)
	if err != nil {
		return nil, err
	}
	if g != nil {
		return nil, g.foreignTo("show the streams of")
	}
	v := c.view()
	switch {
	case v.State.Status == StatusPaused:
		return nil, conflictf("container %s is paused, unpause the container before attach", ref)
	case v.State.Status == StatusRestarting:
		return nil, conflictf("container %s is restarting, wait until the container is running", ref)
	}
	a := &attachment{c: c, closed: make(chan struct{}), p: &pendingAttach{
		opts:  client.AttachOptions{ID: c.id, Stdin: o.Stdin && v.Config.OpenStdin, Stdout: o.Stdout, Stderr: o.Stderr},
		ready: make(chan struct{}),
	}}
	now := time.Now()
	if !o.Stream {
		a.p.resolve(nil)
	} else {
		c.mu.Lock()
		if c.gone {
			c.mu.Unlock()
			return nil, notFoundf("No such container: %s", ref)
		}
		r := c.run
		if r == nil {
			c.pending = append(c.pending, a.p)
		}
		c.mu.Unlock()
		if r != nil {
			s, err := r.shim.get().Attach(ctx, a.p.opts)
			if err != nil {
				if errdefs.IsNotFound(err) { // ended in between: there is nothing to see
					s = nil
				} else {
					return nil, fmt.Errorf("attach to container %s: %w", ref, err)
				}
			}
			a.p.resolve(s)
		}
	}
	if o.Logs && v.LogPath != "" {
		lo := LogOptions{Stdout: o.Stdout, Stderr: o.Stderr, Tail: -1, Until: now}
		a.nextFn, a.stopFn = iter.Pull2(e.readLog(context.WithoutCancel(ctx), c, v, lo))
	}
	e.emit(c, "attach")
	return a, nil
}

// ResizeContainer sets the size of a container's terminal, in characters.
func (e *Engine) ResizeContainer(ctx context.Context, ref string, width, height uint32) error {
	c, err := e.find(ctx, ref)
	if err != nil {
		return err
	}
	r, err := c.live("use")
	if err != nil {
		return err
	}
	if err := r.shim.get().Resize(ctx, c.id, "", width, height); err != nil {
		return fmt.Errorf("resize terminal of container %s: %w", ref, err)
	}
	e.emit(c, "resize", "height", fmt.Sprint(height), "width", fmt.Sprint(width))
	return nil
}

// Logs reads a container's log file, which its shim writes. With Follow the sequence
// ends when the container has ended and all was read.
func (e *Engine) Logs(ctx context.Context, ref string, o LogOptions) (iter.Seq2[LogEntry, error], error) {
	c, g, err := e.lookup(ctx, ref)
	if err != nil {
		return nil, err
	}
	if g != nil {
		return nil, g.foreignTo("show the streams of")
	}
	v := c.view()
	if v.LogPath == "" {
		return nil, notImplementedf("configured logging driver does not support reading")
	}
	if !o.Stdout && !o.Stderr {
		return nil, invalidf("Bad parameters: you must choose at least one stream")
	}
	return e.readLog(ctx, c, v, o), nil
}

func (e *Engine) readLog(ctx context.Context, c *container, v Container, o LogOptions) iter.Seq2[LogEntry, error] {
	ro := log.ReadOptions{Format: log.FormatJSON, Since: o.Since, Until: o.Until, Tail: o.Tail}
	stop := func() {}
	if o.Follow {
		c.mu.Lock()
		r := c.run
		c.mu.Unlock()
		if r != nil {
			ro.Follow = true
			ctx, stop = e.untilClosed(ctx)
			ro.Done = r.done
		}
	}
	return func(yield func(LogEntry, error) bool) {
		defer stop()
		for entry, err := range log.Read(ctx, v.LogPath, ro) {
			if errdefs.IsNotFound(err) || err != nil && ctx.Err() != nil {
				return // nothing was written yet, or the reader went away
			}
			le := LogEntry{Stream: 1, Time: entry.Time, Line: entry.Line, Partial: err == nil && entry.Partial(), Attrs: entry.Attrs}
			if entry.Stream == log.Stderr {
				le.Stream = 2
			}
			if err == nil && (le.Stream == 1 && !o.Stdout || le.Stream == 2 && !o.Stderr) {
				continue
			}
			if !yield(le, err) || err != nil {
				return
			}
		}
	}
}

// untilClosed ends a request's context also when the engine closes.
func (e *Engine) untilClosed(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(e.ctx, func() { cancel(errClosed) })
	return ctx, func() { stop(); cancel(nil) }
}
