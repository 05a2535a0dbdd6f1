package streaming

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"
)

const (
	protocolPortForward = "portforward.k8s.io"
	// Protocols of the tunnel: SPDY within a WebSocket. The second name is that of the
	// first clients.
	protocolTunnel      = "SPDY/3.1+" + protocolPortForward
	protocolTunnelAlpha = "v2.portforward.k8s.io"

	// maxForwards bounds the connections that are forwarded at a time over one of the client's.
	maxForwards = 256
	// maxForwardPorts bounds the ports of an old WebSocket client: two channels each.
	maxForwardPorts = 127
	// forwardBuffer is how much waits for a pod that does not read, in bytes for each connection.
	forwardBuffer = 512 << 10
)

// forward serves a port-forward, over the transport that the client asks for.
func (s *Server) forward(w http.ResponseWriter, r *http.Request, req portForwardRequest) {
	if !isWebSocket(r) {
		if conn, buf, _ := negotiateSPDY(w, r, protocolPortForward); conn != nil {
			s.forwardSPDY(conn, buf, req.sandboxID)
		}
		return
	}
	known := []string{protocolTunnel, protocolTunnelAlpha}
	if n := len(req.ports); n > 0 && n <= maxForwardPorts {
		known = append(known, protocolV4, "v4."+base64Prefix+protocolV1, "")
	}
	ws, protocol := upgradeWebSocket(w, r, known...)
	switch {
	case ws == nil:
	case protocol == protocolTunnel || protocol == protocolTunnelAlpha:
		conn := &wsConn{ws: ws}
		s.forwardSPDY(conn, bufio.NewReader(conn), req.sandboxID)
	default:
		s.forwardChannels(newChannels(ws, protocol, s.opt.Idle), req)
	}
}

// forwarder collects the pairs of streams of which a forwarded connection consists.
type forwarder struct {
	s       *Server
	c       *spdyConn
	sandbox string
	ctx     context.Context
	work    sync.WaitGroup

	mu    sync.Mutex
	pairs map[string]*pair // by request id; those that lack a stream
}

// pair is the two streams of one connection.
type pair struct {
	port        uint16
	data, error *spdyStream
	limit       *time.Timer
}

// forwardSPDY serves the streams of one client until it leaves.
func (s *Server) forwardSPDY(conn io.ReadWriteCloser, buf *bufio.Reader, sandboxID string) {
	ctx, cancel := context.WithCancelCause(s.ctx)
	f := &forwarder{s: s, sandbox: sandboxID, ctx: ctx, pairs: map[string]*pair{}}
	f.c = newSPDY(conn, buf, forwardBuffer, 2*maxForwards, f.accept)
	f.c.act = watchActivity(s.opt.Idle, func() { conn.Close() })
	go f.c.serve()
	select {
	case <-f.c.done:
	case <-s.ctx.Done():
	}
	cancel(errGone)
	f.c.act.stop()
	f.c.close()
	f.mu.Lock()
	for _, p := range f.pairs {
		p.limit.Stop()
	}
	f.mu.Unlock()
	f.work.Wait()
}

// accept sorts a new stream into its pair.
func (f *forwarder) accept(st *spdyStream) error {
	port, err := strconv.ParseUint(st.headers.Get("Port"), 10, 16)
	if err != nil || port == 0 {
		return fmt.Errorf("%q is no port", st.headers.Get("Port"))
	}
	kind := st.headers.Get("Streamtype")
	if kind != "data" && kind != "error" {
		return fmt.Errorf("unexpected stream %q", kind)
	}
	id := st.headers.Get("Requestid")
	if id == "" {
		// Clients without request ids open the error stream, then the data stream,
		// whose id is the next odd number.
		first := st.id
		if kind == "data" {
			first -= 2
		}
		id = "stream " + strconv.FormatUint(uint64(first), 10)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.pairs[id]
	if p == nil {
		p = &pair{port: uint16(port)}
		p.limit = time.AfterFunc(f.s.opt.Creation, func() { f.expire(id, p) })
		f.pairs[id] = p
	}
	end := &p.data
	if kind == "error" {
		end = &p.error
	}
	if *end != nil || p.port != uint16(port) {
		return fmt.Errorf("request %q has that stream, or another port", id)
	}
	*end = st
	if p.data != nil && p.error != nil && p.limit.Stop() {
		delete(f.pairs, id)
		f.work.Go(func() { f.serve(p) })
	}
	return nil
}

// expire gives up a pair whose second stream did not come.
func (f *forwarder) expire(id string, p *pair) {
	f.mu.Lock()
	delete(f.pairs, id)
	f.mu.Unlock()
	if p.error != nil {
		_, _ = io.WriteString(p.error, "timed out waiting for the data stream")
		_ = p.error.CloseWrite()
	}
	for _, st := range []*spdyStream{p.data, p.error} {
		if st != nil {
			_ = st.Reset()
		}
	}
}

// serve forwards one connection.
func (f *forwarder) serve(p *pair) {
	p.error.Close() // the client writes nothing on it
	err := f.s.opt.Runtime.PortForward(f.ctx, f.sandbox, p.port, p.data)
	if err != nil && f.ctx.Err() == nil {
		f.s.log.Debug("forward port", "sandbox", f.sandbox, "port", p.port, "error", err)
		_, _ = io.WriteString(p.error, forwardError(p.port, f.sandbox, err))
		_ = p.error.CloseWrite()
		_ = p.data.Reset()
	}
	_ = p.data.CloseWrite()
	_ = p.data.Close()
	_ = p.error.CloseWrite()
	// Whatever the client still sends is for nobody, and some never close their ends.
	p.data.forget(false)
	p.error.forget(false)
}

func forwardError(port uint16, sandbox string, err error) string {
	return fmt.Sprintf("error forwarding port %d to pod %s: %v", port, sandbox, err)
}

// forwardChannels serves a client that has two channels for each port: data, and errors.
func (s *Server) forwardChannels(c *channels, req portForwardRequest) {
	ctx, cancel := context.WithCancelCause(s.ctx)
	defer cancel(nil)
	in := map[byte]*pipe{}
	for i := range req.ports {
		in[byte(2*i)] = newPipe(forwardBuffer)
	}
	go c.serve(in, false)
	defer c.close(in)
	// Each channel begins with its port.
	for i, port := range req.ports {
		for _, channel := range []int{2 * i, 2*i + 1} {
			if _, err := c.send(byte(channel), binary.LittleEndian.AppendUint16(nil, port)); err != nil {
				return
			}
		}
	}
	var work sync.WaitGroup
	for i, port := range req.ports {
		work.Go(func() {
			conn := &channelConn{Reader: in[byte(2*i)], Writer: channelWriter{c, byte(2 * i)}}
			err := s.opt.Runtime.PortForward(ctx, req.sandboxID, port, conn)
			in[byte(2*i)].Close()
			if err != nil && ctx.Err() == nil {
				s.log.Debug("forward port", "sandbox", req.sandboxID, "port", port, "error", err)
				_, _ = channelWriter{c, byte(2*i + 1)}.Write([]byte(forwardError(port, req.sandboxID, err)))
			}
		})
	}
	all := make(chan struct{})
	go func() { work.Wait(); close(all) }()
	select {
	case <-all:
		c.finish(ctx.Done())
	case <-c.done:
	case <-s.ctx.Done():
	}
	cancel(errGone)
	for _, p := range in {
		p.abort(errGone)
	}
	<-all
}

// channelConn is a forwarded connection over channels, which cannot be half closed.
type channelConn struct {
	io.Reader
	io.Writer
}

func (channelConn) CloseWrite() error { return errors.ErrUnsupported }

func (channelConn) Reset() error { return nil }

// halfCloser is a TCP connection.
type halfCloser interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// proxy copies between a client and the connection that was made for it, until both
// directions have ended, or ctx. The end of one is passed on and leaves the other
// open; what breaks one breaks both. backend is closed.
func proxy(ctx context.Context, client Conn, backend halfCloser) {
	stop := context.AfterFunc(ctx, func() { backend.Close() })
	defer stop()
	defer backend.Close()
	up := make(chan struct{})
	go func() {
		defer close(up)
		if err := copyInput(backend, client); err != nil {
			backend.Close() // the pod must not take a broken input for a complete one
			return
		}
		_ = backend.CloseWrite() // fails when the pod has closed: then its output ends too
	}()
	if _, err := io.Copy(onlyWriter{client}, backend); err != nil {
		_ = client.Reset()
		return
	}
	if err := client.CloseWrite(); err != nil {
		return
	}
	select {
	case <-up:
	case <-ctx.Done():
	}
}

// copyInput gives an error if the client broke off. What a pod does not want is
// thrown away, for its output may go on.
func copyInput(backend io.Writer, client io.Reader) error {
	buf := make([]byte, maxFrame)
	for {
		n, err := client.Read(buf)
		if backend != nil && n > 0 {
			if _, werr := backend.Write(buf[:n]); werr != nil {
				backend = nil
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}
