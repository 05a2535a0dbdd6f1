package shim

import (
	"bufio"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hako-engine/hako/shim/wire"
)

// attached is one client of the attach protocol. What it is sent waits in the
// buffer of its socket: when that is full the process that writes has to wait,
// unless the client is gone.
type attached struct {
	conn   net.Conn
	frames [3]bool // by frame type: which output it wants

	write sync.Mutex
}

// clients are the attached clients of one process.
type clients struct {
	mu    sync.Mutex
	list  []*attached
	ended bool
}

// add registers a client; false if the output has ended already.
func (c *clients) add(a *attached) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return false
	}
	// A new slice: write goes through the old one without the lock.
	c.list = append(append([]*attached(nil), c.list...), a)
	return true
}

func (c *clients) remove(a *attached) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var rest []*attached
	for _, x := range c.list {
		if x != a {
			rest = append(rest, x)
		}
	}
	c.list = rest
}

// write sends output to everybody who wants it.
func (c *clients) write(frame byte, p []byte) {
	c.mu.Lock()
	list := c.list
	c.mu.Unlock()
	for _, a := range list {
		if !a.frames[frame] {
			continue
		}
		a.write.Lock()
		err := wire.WriteFrame(a.conn, frame, p)
		a.write.Unlock()
		if err != nil {
			a.conn.Close()
			c.remove(a)
		}
	}
}

// end says to everybody that the output has ended. A client that does not read does
// not hold up anybody but itself, and that not for ever.
func (c *clients) end() {
	c.mu.Lock()
	list := c.list
	c.list, c.ended = nil, true
	c.mu.Unlock()
	for _, a := range list {
		go a.end()
	}
}

// endTimeout bounds how long the last frame waits for a client.
const endTimeout = 10 * time.Second

func (a *attached) end() {
	a.write.Lock()
	defer a.write.Unlock()
	a.conn.SetWriteDeadline(time.Now().Add(endTimeout))
	if wire.WriteFrame(a.conn, wire.FrameEnd, nil) != nil {
		a.conn.Close()
		return
	}
	// The client closes. Were we to close with input of it unread, the kernel could
	// throw away output that the client has not read yet.
	a.conn.SetReadDeadline(time.Now().Add(endTimeout))
	if u, ok := a.conn.(*net.UnixConn); ok {
		u.CloseWrite()
	}
}

func (c *clients) closeAll() {
	c.mu.Lock()
	list := c.list
	c.list, c.ended = nil, true
	c.mu.Unlock()
	for _, a := range list {
		a.conn.Close()
	}
}

// serveAttach speaks the attach protocol on a connection, until the client goes or
// the output ends.
func (s *Service) serveAttach(conn net.Conn, r *bufio.Reader) {
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(endTimeout))
	var req wire.AttachRequest
	if err := wire.ReadLine(r, &req); err != nil {
		s.log.Warn("attach", "error", err)
		return
	}
	conn.SetReadDeadline(time.Time{})
	p, err := s.process(req.ID, req.ExecID)
	if err != nil {
		wire.WriteLine(conn, wire.Reply(err))
		return
	}
	a := &attached{conn: conn}
	a.frames[wire.FrameStdout], a.frames[wire.FrameStderr] = req.Stdout, req.Stderr
	// The reply goes first, but output that comes after it must not be missed.
	a.write.Lock()
	live := p.streams.clients.add(a)
	err = wire.WriteLine(conn, wire.Reply(nil))
	if err == nil && !live {
		err = wire.WriteFrame(conn, wire.FrameEnd, nil)
	}
	a.write.Unlock()
	defer p.streams.clients.remove(a)
	if err != nil || !live {
		return
	}
	in := p.streams.input
	if !req.Stdin {
		in = nil
	}
	closed, err := a.readInput(r, in)
	if in != nil && p.streams.once {
		in.closeWrite()
	}
	if closed && err == nil {
		// No more input, but the output goes on until the client closes.
		io.Copy(io.Discard, r)
	}
}

// readInput feeds the client's frames to in (nil: throws them away) until it ends
// its input (closed) or goes.
func (a *attached) readInput(r *bufio.Reader, in *input) (closed bool, err error) {
	for {
		typ, n, err := wire.ReadFrameHeader(r)
		if err != nil {
			return false, err
		}
		switch typ {
		case wire.FrameCloseStdin:
			return true, nil
		case wire.FrameStdin:
		default:
			return false, errors.New("unexpected frame")
		}
		for n > 0 {
			if _, err := r.Peek(1); err != nil {
				return false, err
			}
			p, err := r.Peek(min(n, r.Buffered()))
			if err != nil {
				return false, err
			}
			if in != nil {
				if _, err := in.Write(p); err != nil {
					in = nil // the process does not read any more: its output still counts
				}
			}
			r.Discard(len(p))
			n -= len(p)
		}
	}
}
