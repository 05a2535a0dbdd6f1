package client

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/hako-engine/hako/shim/wire"
)

// Attach connects to the streams of a process. Output that the process writes after
// Attach has returned is delivered; for all of it attach before Start. A client that
// does not read makes the process wait.
func (s *Shim) Attach(ctx context.Context, o AttachOptions) (Stream, error) {
	st, err := s.attach(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("attach to container %s: %w", o.ID, err)
	}
	return st, nil
}

func (s *Shim) attach(ctx context.Context, o AttachOptions) (*stream, error) {
	st, _, err := s.open(ctx, func(conn net.Conn) error {
		return wire.WriteLine(conn, wire.AttachRequest{Version: 1, ID: o.ID, ExecID: o.ExecID, Stdin: o.Stdin, Stdout: o.Stdout, Stderr: o.Stderr})
	})
	return st, err
}

// Run adds a process without a terminal to a container, attaches to its output, and starts it: what Exec, Attach and Start do
// with three exchanges. When it has ended the shim forgets it by itself. pid is its process number.
//
// An error of the start itself is a *StartError, and then nothing is left of the process. A shim that is older than this call
// answers errdefs.ErrNotFound. After any other error the process may be there, or come yet.
func (s *Shim) Run(ctx context.Context, o ExecOptions) (_ RunStream, pid int, err error) {
	spec, err := json.Marshal(o.Spec)
	if err != nil {
		return nil, 0, err
	}
	st, reply, err := s.open(ctx, func(conn net.Conn) error {
		return wire.WriteRun(conn, wire.AttachRequest{ID: o.ID, ExecID: o.ExecID, Stdin: o.Stdio.OpenStdin, Stdout: true, Stderr: true}, spec)
	})
	switch {
	case err != nil && reply.Start:
		return nil, 0, &StartError{err}
	case err != nil:
		return nil, 0, err
	}
	return st, reply.Pid, nil
}

// StartError says that a process was added, and could not be started.
type StartError struct{ err error }

func (e *StartError) Error() string { return e.err.Error() }
func (e *StartError) Unwrap() error { return e.err }

// open makes a connection for streams, sends a request and reads the reply.
func (s *Shim) open(ctx context.Context, send func(net.Conn) error) (_ *stream, reply wire.AttachReply, err error) {
	conn, err := wire.Dial(s.path)
	if err != nil {
		return nil, reply, err
	}
	// The end of ctx interrupts the exchange below, and nothing after it.
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() && err == nil {
			err = ctx.Err()
		}
		if err != nil {
			conn.Close()
			if ctx.Err() != nil {
				err = ctx.Err()
			}
		}
	}()
	if err := send(conn); err != nil {
		return nil, reply, err
	}
	st := &stream{conn: conn, r: bufio.NewReaderSize(conn, 4<<10)}
	if err := wire.ReadLine(st.r, &reply); err != nil {
		return nil, reply, err
	}
	return st, reply, reply.Err()
}

// stream implements RunStream.
type stream struct {
	conn   net.Conn
	r      *bufio.Reader
	buf    []byte
	ended  bool
	status int

	write sync.Mutex // one frame at a time
}

var _ RunStream = (*stream)(nil)

func (s *stream) ExitStatus() int { return s.status }

func (s *stream) ReadFrame() (int, []byte, error) {
	if s.ended {
		return 0, nil, io.EOF
	}
	if s.buf == nil {
		s.buf = make([]byte, wire.MaxFrame)
	}
	for {
		typ, p, err := wire.ReadFrame(s.r, s.buf)
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF // the shim says when the output ends
		}
		switch {
		case err != nil:
			return 0, nil, err
		case typ == wire.FrameEnd:
			s.ended = true
			if len(p) >= 4 {
				s.status = int(binary.BigEndian.Uint32(p))
			}
			return 0, nil, io.EOF
		case typ == wire.FrameStdout || typ == wire.FrameStderr:
			return int(typ), p, nil
		}
	}
}

func (s *stream) Write(p []byte) (n int, err error) {
	s.write.Lock()
	defer s.write.Unlock()
	for len(p) > 0 {
		piece := p[:min(len(p), wire.MaxFrame)]
		if err := wire.WriteFrame(s.conn, wire.FrameStdin, piece); err != nil {
			return n, err
		}
		n += len(piece)
		p = p[len(piece):]
	}
	return n, nil
}

func (s *stream) CloseWrite() error {
	s.write.Lock()
	defer s.write.Unlock()
	return wire.WriteFrame(s.conn, wire.FrameCloseStdin, nil)
}

func (s *stream) Close() error {
	if err := s.conn.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}
