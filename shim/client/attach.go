package client

import (
	"bufio"
	"context"
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

func (s *Shim) attach(ctx context.Context, o AttachOptions) (_ *stream, err error) {
	conn, err := wire.Dial(s.path)
	if err != nil {
		return nil, err
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
	req := wire.AttachRequest{Version: 1, ID: o.ID, ExecID: o.ExecID, Stdin: o.Stdin, Stdout: o.Stdout, Stderr: o.Stderr}
	if err := wire.WriteLine(conn, req); err != nil {
		return nil, err
	}
	st := &stream{conn: conn, r: bufio.NewReaderSize(conn, 4<<10)}
	var reply wire.AttachReply
	if err := wire.ReadLine(st.r, &reply); err != nil {
		return nil, err
	}
	return st, reply.Err()
}

// stream implements Stream.
type stream struct {
	conn  net.Conn
	r     *bufio.Reader
	buf   []byte
	ended bool

	write sync.Mutex // one frame at a time
}

var _ Stream = (*stream)(nil)

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
