package stream

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"
)

// Process is the live side of an attachment: frames of output, and input.
type Process interface {
	// ReadFrame gives the next piece of output, valid until the next call, and io.EOF at the end.
	ReadFrame() (stream int, p []byte, err error)
	io.Writer
	// CloseWrite ends the process's input.
	CloseWrite() error
	// Close detaches; it ends a ReadFrame under way. It is called once.
	io.Closer
}

// Client is the far side of an attachment.
type Client interface {
	io.ReadWriter
	// CloseWrite tells the client that there is no more output; it may still write.
	CloseWrite() error
	// WaitGone blocks until the client has left, or was closed here.
	WaitGone()
	io.Closer
}

// Sink takes the frames for a client: a Framer, or Raw for a terminal.
type Sink interface {
	// WriteFrame sends output of stdout (1) or stderr (2).
	WriteFrame(stream int, p []byte) error
}

// PumpOptions of a Pump.
type PumpOptions struct {
	Stdin bool
	// KeepStdin leaves the process's stdin open when the client ends its direction; the attachment
	// ends then, as nobody could tell the client's end from a client that went on listening.
	KeepStdin bool
	// Output tells that the client wants output at all. Without it the pump ends with the input.
	Output bool
	// DetachKeys end the attachment when the client types them; empty: never.
	DetachKeys []byte
}

// drainTime is how long a client may take to close its side after the end of
// output. Closing over bytes that it still sends would reset the connection, and the
// client would report an error in place of the end.
const drainTime = 10 * time.Second

// Pump connects a client to a process until the output is drained, the client
// leaves, or ctx ends; then it closes both. The error is ErrDetached when the
// client typed the detach keys, and nil at the end of output and for a client that left.
func Pump(ctx context.Context, c Client, p Process, sink Sink, o PumpOptions) error {
	ctx, cancel := context.WithCancelCause(ctx)
	detach := sync.OnceFunc(func() { p.Close() })
	stop := context.AfterFunc(ctx, func() {
		detach()
		c.Close()
	})
	defer func() {
		cancel(nil)
		stop()
		detach()
		c.Close()
	}()

	input := make(chan struct{})
	go func() {
		defer close(input)
		err := pumpInput(c, p, o)
		switch {
		case errors.Is(err, ErrDetached), !o.Output:
			cancel(err)
		case err != nil, o.Stdin && o.KeepStdin:
			cancel(nil) // the client broke off
		default:
			c.WaitGone()
			cancel(nil)
		}
	}()
	if !o.Output {
		<-input
		return detached(ctx)
	}
	for {
		stream, b, err := p.ReadFrame()
		if err == nil {
			if err = sink.WriteFrame(stream, b); err != nil {
				return detached(ctx) // the client is gone
			}
			continue
		}
		if d := detached(ctx); d != nil {
			return d
		}
		if ctx.Err() != nil {
			return nil
		}
		detach()
		_ = c.CloseWrite()
		select {
		case <-input:
		case <-time.After(drainTime):
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		return err
	}
}

// pumpInput copies the client's bytes to stdin, or drops them, until the client
// ends its direction (nil), breaks off, or types the detach keys.
func pumpInput(c io.Reader, p Process, o PumpOptions) error {
	if !o.Stdin {
		_, err := io.Copy(io.Discard, c)
		return err
	}
	src := NewDetachReader(c, o.DetachKeys)
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			if _, werr := p.Write(buf[:n]); werr != nil {
				// The process closed its stdin or ended: the rest is for nobody, but the
				// client may still type the detach keys.
				_, err := io.Copy(io.Discard, src)
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			if !o.KeepStdin {
				_ = p.CloseWrite() // fails when the process ended: then its output ends too
			}
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func detached(ctx context.Context) error {
	if errors.Is(context.Cause(ctx), ErrDetached) {
		return ErrDetached
	}
	return nil
}
