package streaming

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/engine"
)

// sizeWait is how long an exec with a terminal waits for the size of its client's, so
// that a program sees it when it starts. Clients send it right away.
const sizeWait = 25 * time.Millisecond

// Engine is what EngineRuntime needs of an engine: engine.Engine documents each call.
type Engine interface {
	CreateExec(ctx context.Context, cfg engine.ExecConfig) (string, error)
	AttachExec(ctx context.Context, id string) (engine.Attachment, error)
	ResizeExec(ctx context.Context, id string, width, height uint32) error
	Exec(ctx context.Context, id string) (engine.Exec, error)
	// ReleaseExec says that nobody will ask for an exec any more.
	ReleaseExec(ctx context.Context, id string)
	Container(ctx context.Context, ref string) (engine.Container, error)
	Attach(ctx context.Context, ref string, o engine.AttachOptions) (engine.Attachment, error)
	ResizeContainer(ctx context.Context, ref string, width, height uint32) error
}

// EngineRuntime is the Runtime of an engine.
type EngineRuntime struct {
	Engine Engine
	// Netns gives the path of a pod sandbox's network namespace, "" for the host's, or
	// errdefs.ErrNotFound.
	Netns func(ctx context.Context, sandboxID string) (path string, err error)
	Log   *slog.Logger // nil: discard
}

var _ Runtime = (*EngineRuntime)(nil)

func (r *EngineRuntime) log() *slog.Logger {
	if r.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return r.Log
}

// Exec runs a command with the client's streams. When the client leaves, the command's
// input ends, and a terminal is hung up: a shell on it ends. A command without a
// terminal goes on until it ends by itself, as with other runtimes.
func (r *EngineRuntime) Exec(ctx context.Context, containerID string, cmd []string, s Streams) (int, error) {
	cfg := engine.ExecConfig{Container: containerID, Cmd: cmd, TTY: s.TTY,
		AttachStdin: s.Stdin != nil, AttachStdout: s.Stdout != nil, AttachStderr: s.Stderr != nil}
	if s.Resize != nil {
		select {
		case size := <-s.Resize:
			cfg.ConsoleSize = [2]uint{uint(size.Height), uint(size.Width)}
		case <-time.After(sizeWait):
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	id, err := r.Engine.CreateExec(ctx, cfg)
	if err != nil {
		return 0, err
	}
	defer r.Engine.ReleaseExec(context.WithoutCancel(ctx), id)
	a, err := r.Engine.AttachExec(ctx, id)
	if err != nil {
		return 0, err
	}
	err = r.pump(ctx, a, s, func(ctx context.Context, size Size) error {
		return r.Engine.ResizeExec(ctx, id, uint32(size.Width), uint32(size.Height))
	})
	if err != nil {
		return 0, err
	}
	x, err := r.Engine.Exec(context.WithoutCancel(ctx), id)
	switch {
	case err != nil:
		return 0, err
	case x.ExitCode == nil:
		return 0, fmt.Errorf("the end of exec %s was not seen: %w", id, errdefs.ErrUnavailable)
	}
	return *x.ExitCode, nil
}

// Attach connects to a running container. Whether the end of the client's input is the
// end of the container's is for the container's configuration to say (stdinOnce).
func (r *EngineRuntime) Attach(ctx context.Context, containerID string, s Streams) error {
	c, err := r.Engine.Container(ctx, containerID)
	if err != nil {
		return err
	}
	if c.State.Status != engine.StatusRunning {
		return fmt.Errorf("container %s is %s: %w", c.ID, c.State.Status, errdefs.ErrFailedPrecondition)
	}
	a, err := r.Engine.Attach(ctx, c.ID, engine.AttachOptions{Stream: true,
		Stdin: s.Stdin != nil, Stdout: s.Stdout != nil, Stderr: s.Stderr != nil})
	if err != nil {
		return err
	}
	return r.pump(ctx, a, s, func(ctx context.Context, size Size) error {
		return r.Engine.ResizeContainer(ctx, c.ID, uint32(size.Width), uint32(size.Height))
	})
}

// PortForward connects to the pod's loopback.
func (r *EngineRuntime) PortForward(ctx context.Context, sandboxID string, port uint16, client Conn) error {
	netns, err := r.Netns(ctx, sandboxID)
	if err != nil {
		return err
	}
	backend, err := dialLoopback(ctx, netns, port)
	if err != nil {
		return err
	}
	proxy(ctx, client, backend)
	return nil
}

// pump copies between the client and a process until the process's output has ended, or
// ctx; then it closes the attachment.
func (r *EngineRuntime) pump(ctx context.Context, a engine.Attachment, s Streams, resize func(context.Context, Size) error) error {
	closeOnce := sync.OnceFunc(func() { a.Close() })
	stop := context.AfterFunc(ctx, closeOnce)
	defer stop()
	done := make(chan struct{})
	var resizing sync.WaitGroup
	defer resizing.Wait()
	defer close(done)
	defer closeOnce()
	if s.Stdin != nil {
		go input(a, s.Stdin)
	}
	if s.Resize != nil {
		resizing.Go(func() {
			for {
				select {
				case size := <-s.Resize:
					if err := resize(ctx, size); err != nil {
						r.log().Debug("resize", "error", err)
					}
				case <-done:
					return
				}
			}
		})
	}
	for {
		stream, p, err := a.ReadFrame()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		w := s.Stdout
		if stream == 2 {
			w = s.Stderr
		}
		if w == nil {
			continue
		}
		if _, err := w.Write(p); err != nil {
			return fmt.Errorf("the client does not take output: %w", err)
		}
	}
}

// input feeds a process until the client has no more. It ends at the latest when the call
// returns, because reading fails then.
func input(a engine.Attachment, stdin io.Reader) {
	buf := make([]byte, maxFrame)
	for {
		n, err := stdin.Read(buf)
		if n > 0 {
			if _, werr := a.Write(buf[:n]); werr != nil {
				_, _ = io.Copy(io.Discard, stdin) // the process ended; its output may still be on the way
				return
			}
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				_ = a.CloseWrite()
			}
			return
		}
	}
}
