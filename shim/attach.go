package shim

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/hako-engine/hako/shim/wire"
)

const (
	// queueSize is how much waits for a client that is slower than the process, in
	// bytes, before the process has to wait, too.
	queueSize = 128 << 10
	// endTimeout bounds how long a client may take to say what it wants, and to close
	// after it has been told the end.
	endTimeout = 10 * time.Second
	// lingerLimit bounds how long a client may take to fetch the last output of a
	// process that has ended.
	lingerLimit = 10 * time.Minute
)

// attached is one client of the attach protocol. Output waits for it in a queue with
// a bound: when that is full the process that writes has to wait, unless the client
// is gone. When the process has ended the bound is lifted: what is left is no more
// than its pipe holds, and neither the log nor the exit waits for a slow client.
type attached struct {
	conn   net.Conn
	frames [3]bool  // by frame type: which output it wants
	runs   *process // what was started for it, and whose exit status it is told; nil: nothing

	mu struct {
		sync.Mutex
		changed *sync.Cond
		queue   []byte // frames
		bound   bool   // the queue is bounded
		ended   bool   // there is no more output
		gone    bool   // the client is
	}
}

func newAttached(conn net.Conn) *attached {
	a := &attached{conn: conn}
	a.mu.changed = sync.NewCond(&a.mu)
	a.mu.bound = true
	return a
}

// put queues output, and waits while the queue is full.
func (a *attached) put(frame byte, p []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for len(a.mu.queue) > 0 && len(a.mu.queue)+len(p) > queueSize && a.mu.bound && !a.mu.gone {
		a.mu.changed.Wait()
	}
	if a.mu.gone || a.mu.ended {
		return
	}
	a.mu.queue = wire.AppendFrame(a.mu.queue, frame, p)
	a.mu.changed.Broadcast()
}

func (a *attached) set(flag *bool, to bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	*flag = to
	a.mu.changed.Broadcast()
}

// send writes the queue to the client until the output has ended or the client is gone.
func (a *attached) send() {
	var spare []byte
	for {
		a.mu.Lock()
		for len(a.mu.queue) == 0 && !a.mu.ended && !a.mu.gone {
			a.mu.changed.Wait()
		}
		batch, ended, gone := a.mu.queue, a.mu.ended, a.mu.gone
		a.mu.queue = spare[:0]
		a.mu.changed.Broadcast()
		a.mu.Unlock()
		if gone {
			return
		}
		if ended {
			batch = wire.AppendFrame(batch, wire.FrameEnd, a.status())
			a.conn.SetWriteDeadline(time.Now().Add(lingerLimit))
		}
		if _, err := a.conn.Write(batch); err != nil {
			a.set(&a.mu.gone, true)
			a.conn.Close()
			return
		}
		if ended {
			// The client closes. Were we to close with input of it unread, the kernel
			// could throw away output that the client has not read yet.
			a.conn.SetReadDeadline(time.Now().Add(endTimeout))
			if u, ok := a.conn.(*net.UnixConn); ok {
				u.CloseWrite()
			}
			return
		}
		if spare = batch; cap(spare) > queueSize || len(batch) < chunk {
			spare = nil // an idle client holds no buffer
		}
	}
}

// status is how the process ended that was started for this client.
func (a *attached) status() []byte {
	if a.runs == nil {
		return nil
	}
	return binary.BigEndian.AppendUint32(nil, a.runs.state().ExitStatus)
}

// clients are the attached clients of one process.
type clients struct {
	mu    sync.Mutex
	list  []*attached
	ended bool
	free  bool // the process has ended: queues are not bounded
}

// add registers a client; false if the output has ended already.
func (c *clients) add(a *attached) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return false
	}
	if c.free {
		a.set(&a.mu.bound, false)
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

// write hands output to everybody who wants it.
func (c *clients) write(frame byte, p []byte) {
	c.mu.Lock()
	list := c.list
	c.mu.Unlock()
	for _, a := range list {
		if a.frames[frame] {
			a.put(frame, p)
		}
	}
}

// unbound lets the last output go into the queues without waiting.
func (c *clients) unbound() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.free = true
	for _, a := range c.list {
		a.set(&a.mu.bound, false)
	}
}

// end says to everybody that the output has ended, behind what is queued for them.
func (c *clients) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, a := range c.list {
		a.set(&a.mu.ended, true)
	}
	c.list, c.ended = nil, true
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
	var p *process
	var err error
	if req.Version == wire.VersionRun {
		p, err = s.addProcess(r, req)
	} else if p, err = s.process(req.ID, req.ExecID); err == nil && req.Version != 1 {
		err = fmt.Errorf("attach protocol version %d: %w", req.Version, errdefs.ErrNotImplemented)
	}
	if err != nil {
		wire.WriteLine(conn, wire.Reply(err))
		return
	}
	conn.SetReadDeadline(time.Time{})
	a := newAttached(conn)
	a.frames[wire.FrameStdout], a.frames[wire.FrameStderr] = req.Stdout, req.Stderr
	// Whoever has read the reply misses nothing that comes after it.
	if !p.streams.clients.add(a) {
		a.mu.ended = true
	}
	defer p.streams.clients.remove(a)
	reply := wire.Reply(nil)
	if req.Version == wire.VersionRun {
		a.runs = p
		ctx, cancel := context.WithTimeout(context.Background(), callLimit)
		defer cancel()
		_, err := s.start(ctx, &wire.ProcessRequest{ID: req.ID, ExecID: req.ExecID})
		reply = wire.Reply(err)
		reply.Pid = p.pid()
		go s.forget(p)
		if err != nil {
			reply.Start = true
			wire.WriteLine(conn, reply)
			return
		}
	}
	if err := wire.WriteLine(conn, reply); err != nil {
		return
	}
	var sending sync.WaitGroup
	sending.Go(a.send)
	defer sending.Wait()
	defer a.set(&a.mu.gone, true)

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

// addProcess adds the process that a request brings along.
func (s *Service) addProcess(r *bufio.Reader, req wire.AttachRequest) (*process, error) {
	spec, err := wire.ReadProcess(r, req)
	if err != nil {
		return nil, fmt.Errorf("process of container %s: %w: %w", req.ID, err, errdefs.ErrInvalidArgument)
	}
	if _, err := s.exec(context.Background(), &wire.ExecProcessRequest{
		ID: req.ID, ExecID: req.ExecID, Stdout: wire.Stdio{OpenStdin: req.Stdin, StdinOnce: req.Stdin}.String(), Spec: &wire.Any{Value: spec},
	}); err != nil {
		return nil, err
	}
	return s.process(req.ID, req.ExecID)
}

// forget deletes a process that was run for a client, when it has ended.
func (s *Service) forget(p *process) {
	<-p.stopped
	_, err := s.delete(context.Background(), &wire.ProcessRequest{ID: p.c.id, ExecID: p.execID})
	if err != nil && !errdefs.IsNotFound(err) { // the client may have done so
		s.log.Debug("delete process", "process", p.String(), "error", err)
	}
	s.busy()
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
