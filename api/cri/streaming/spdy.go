package streaming

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/moby/spdystream/spdy"
)

const (
	// maxFrame bounds a data frame that is written, in bytes.
	maxFrame = 32 << 10
	// Bounds of what a client may send in control frames.
	maxControlFrame = 16 << 10
	maxHeaderField  = 4 << 10
	maxHeaders      = 32
)

// Bits of frames (SPDY Protocol, Draft 3.1, section 2.2).
const (
	controlBit = 0x80
	version3   = 3
	flagFin    = 0x01
	// refused and cancelled are statuses of RST_STREAM.
	refused   = 3
	cancelled = 5
)

// errReset ends the reading of a stream that the client has reset.
var errReset = errors.New("the client has reset the stream")

// spdyConn is the server's end of a SPDY/3.1 connection, as Kubernetes' clients use it:
// they open the streams, and nobody uses flow control. One goroutine reads; a stream
// that is not read holds it up when its buffer is full, and with that the client.
type spdyConn struct {
	conn   io.ReadWriteCloser
	r      *bufio.Reader
	framer *spdy.Framer // reads control frames
	buffer int          // bytes that a stream holds
	max    int          // streams at a time
	// accept decides on a new stream. It is called by the reading goroutine and must not block.
	accept func(*spdyStream) error
	act    *activity

	write   sync.Mutex // one frame at a time
	out     []byte     // guarded by write
	replied bool       // the header of the compressed blocks was written; guarded by write

	mu      sync.Mutex
	streams map[uint32]*spdyStream
	last    uint32        // the highest id
	done    chan struct{} // closed when reading has ended
}

// newSPDY makes the connection; serve reads it.
func newSPDY(conn io.ReadWriteCloser, r *bufio.Reader, buffer, maxStreams int, accept func(*spdyStream) error) *spdyConn {
	c := &spdyConn{conn: conn, r: r, buffer: buffer, max: maxStreams, accept: accept,
		streams: map[uint32]*spdyStream{}, done: make(chan struct{})}
	// The framer never writes; it fails for no other reason than a bad dictionary.
	c.framer, _ = spdy.NewFramerWithOptions(io.Discard, r,
		spdy.WithMaxControlFramePayloadSize(maxControlFrame), spdy.WithMaxHeaderFieldSize(maxHeaderField), spdy.WithMaxHeaderCount(maxHeaders))
	return c
}

// serve reads until the client leaves, or the connection is closed.
func (c *spdyConn) serve() {
	defer close(c.done)
	err := c.read()
	if err == nil || errors.Is(err, io.EOF) {
		err = errGone
	}
	c.mu.Lock()
	streams := c.streams
	c.streams = map[uint32]*spdyStream{}
	c.max = 0
	c.mu.Unlock()
	for _, s := range streams {
		s.in.end(err)
	}
}

// read gives nil for a GOAWAY.
func (c *spdyConn) read() error {
	buf := make([]byte, maxFrame)
	for {
		head, err := c.r.Peek(8)
		if err != nil {
			return err
		}
		if head[0]&controlBit == 0 {
			if err := c.readData(head, buf); err != nil {
				return err
			}
			continue
		}
		frame, err := c.framer.ReadFrame()
		if err != nil {
			return fmt.Errorf("SPDY: %w", err)
		}
		switch f := frame.(type) {
		case *spdy.SynStreamFrame:
			c.open(f)
		case *spdy.RstStreamFrame:
			if s := c.stream(uint32(f.StreamId)); s != nil {
				s.forget(true)
				s.in.abort(errReset)
			}
		case *spdy.HeadersFrame:
			if s := c.stream(uint32(f.StreamId)); s != nil && f.CFHeader.Flags&spdy.ControlFlagFin != 0 {
				s.endInput()
			}
		case *spdy.PingFrame:
			if f.Id&1 == 1 {
				c.ping(f.Id)
			}
		case *spdy.GoAwayFrame:
			return nil
		}
	}
}

// readData hands a data frame on in pieces.
func (c *spdyConn) readData(head, buf []byte) error {
	id := binary.BigEndian.Uint32(head) &^ (controlBit << 24)
	flags, n := head[4], int(binary.BigEndian.Uint32(head[4:])&0xffffff)
	if _, err := c.r.Discard(8); err != nil {
		return err
	}
	s := c.stream(id)
	for n > 0 {
		p := buf[:min(n, len(buf))]
		if _, err := io.ReadFull(c.r, p); err != nil {
			return err
		}
		n -= len(p)
		if s != nil {
			c.touch()
			_, _ = s.in.Write(p) // never fails
		}
	}
	if s != nil && flags&flagFin != 0 {
		s.endInput()
	}
	return nil
}

func (c *spdyConn) touch() {
	if c.act != nil {
		c.act.touch()
	}
}

// open takes or refuses a stream.
func (c *spdyConn) open(f *spdy.SynStreamFrame) {
	id := uint32(f.StreamId)
	s := &spdyStream{c: c, id: id, headers: http.Header{}, in: newPipe(c.buffer)}
	for k, v := range f.Headers {
		for _, v := range v {
			s.headers.Add(k, v)
		}
	}
	c.mu.Lock()
	ok := id&1 == 1 && id > c.last && len(c.streams) < c.max
	if ok {
		c.last = id
		c.streams[id] = s
	}
	c.mu.Unlock()
	if !ok {
		c.reset(id, refused)
		return
	}
	if f.CFHeader.Flags&spdy.ControlFlagFin != 0 {
		s.endInput()
	}
	if f.CFHeader.Flags&spdy.ControlFlagUnidirectional != 0 {
		s.sent = true
	}
	// The reply goes out before anybody can write to the stream.
	if err := c.reply(id); err != nil {
		return
	}
	if err := c.accept(s); err != nil {
		_ = s.Reset()
	}
}

func (c *spdyConn) stream(id uint32) *spdyStream {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.streams[id]
}

// send writes one frame, as one message where the connection has messages.
func (c *spdyConn) send(head, payload []byte) error {
	c.write.Lock()
	defer c.write.Unlock()
	c.out = append(append(c.out[:0], head...), payload...)
	_, err := c.conn.Write(c.out)
	return err
}

// control makes the head of a control frame.
func control(typ uint16, n int) []byte {
	b := []byte{controlBit, version3, 0, 0, 0, 0, 0, 0}
	binary.BigEndian.PutUint16(b[2:], typ)
	binary.BigEndian.PutUint32(b[4:], uint32(n))
	return b
}

func (c *spdyConn) reset(id uint32, status uint32) {
	_ = c.send(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(control(uint16(spdy.TypeRstStream), 8), id), status), nil)
}

func (c *spdyConn) ping(id uint32) {
	_ = c.send(binary.BigEndian.AppendUint32(control(uint16(spdy.TypePing), 4), id), nil)
}

func (c *spdyConn) goAway() {
	c.mu.Lock()
	last := c.last
	c.mu.Unlock()
	_ = c.send(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(control(uint16(spdy.TypeGoAway), 8), last), 0), nil)
}

// reply accepts a stream, with no headers. Header blocks are one zlib stream per
// connection (section 2.6.10); the empty list needs no compressor: it goes as a stored
// block, and an empty one that flushes, in a stream that names no dictionary.
func (c *spdyConn) reply(id uint32) error {
	block := []byte{0, 4, 0, 0xfb, 0xff, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff} // RFC 1951, 3.2.4: four bytes, a zero count; nothing
	c.write.Lock()
	defer c.write.Unlock()
	if !c.replied {
		block = append([]byte{0x78, 0x01}, block...) // RFC 1950, 2.2
		c.replied = true
	}
	frame := binary.BigEndian.AppendUint32(control(uint16(spdy.TypeSynReply), 4+len(block)), id)
	_, err := c.conn.Write(append(frame, block...))
	return err
}

// finish says that nothing more comes, and waits for the client to leave.
func (c *spdyConn) finish(stop <-chan struct{}) {
	c.goAway()
	if half, ok := c.conn.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
	limit := time.NewTimer(drainLimit)
	defer limit.Stop()
	select {
	case <-c.done:
	case <-stop:
	case <-limit.C:
	}
}

// close releases everything, and waits until nothing reads any more.
func (c *spdyConn) close() {
	c.conn.Close()
	c.mu.Lock()
	for _, s := range c.streams {
		s.in.abort(errGone)
	}
	c.mu.Unlock()
	<-c.done
}

// spdyStream is one stream of a connection, opened by the client.
type spdyStream struct {
	c       *spdyConn
	id      uint32
	headers http.Header
	in      *pipe

	mu       sync.Mutex
	sent     bool // our direction has ended
	received bool // the client's direction has ended
}

// Read gives what the client sends.
func (s *spdyStream) Read(p []byte) (int, error) { return s.in.Read(p) }

// Write sends p.
func (s *spdyStream) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		s.mu.Lock()
		sent := s.sent
		s.mu.Unlock()
		if sent {
			return n, io.ErrClosedPipe
		}
		piece := p[:min(len(p), maxFrame)]
		if err := s.data(piece, 0); err != nil {
			return n, err
		}
		s.c.touch()
		n += len(piece)
		p = p[len(piece):]
	}
	return n, nil
}

func (s *spdyStream) data(p []byte, flags byte) error {
	head := binary.BigEndian.AppendUint32(nil, s.id)
	head = binary.BigEndian.AppendUint32(head, uint32(flags)<<24|uint32(len(p)))
	return s.c.send(head, p)
}

// CloseWrite ends our direction.
func (s *spdyStream) CloseWrite() error {
	s.mu.Lock()
	if s.sent {
		s.mu.Unlock()
		return nil
	}
	s.sent = true
	over := s.received
	s.mu.Unlock()
	err := s.data(nil, flagFin)
	if over {
		s.forget(false)
	}
	return err
}

// Close is the reader's: nothing is read any more. The other direction stays.
func (s *spdyStream) Close() error { return s.in.Close() }

// Reset ends both directions.
func (s *spdyStream) Reset() error {
	if s.forget(true) {
		s.c.reset(s.id, cancelled)
	}
	s.in.abort(errReset)
	return nil
}

// endInput is the end of the client's direction.
func (s *spdyStream) endInput() {
	s.mu.Lock()
	s.received = true
	over := s.sent
	s.mu.Unlock()
	s.in.end(io.EOF)
	if over {
		s.forget(false)
	}
}

// forget takes the stream off the connection; false if it was already.
func (s *spdyStream) forget(broken bool) bool {
	if broken {
		s.mu.Lock()
		s.sent = true
		s.mu.Unlock()
	}
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	_, there := s.c.streams[s.id]
	delete(s.c.streams, s.id)
	return there
}

// negotiateSPDY chooses the protocol, and takes the connection over. nil: the
// client was told why not.
func negotiateSPDY(w http.ResponseWriter, r *http.Request, known ...string) (net.Conn, *bufio.Reader, string) {
	if !headerHas(r.Header, "Connection", "upgrade") || !strings.EqualFold(r.Header.Get("Upgrade"), "SPDY/3.1") {
		http.Error(w, "this needs an upgrade to SPDY/3.1 or WebSocket", http.StatusBadRequest)
		return nil, nil, ""
	}
	const header = "X-Stream-Protocol-Version"
	var offered []string
	for _, v := range r.Header.Values(header) {
		for name := range strings.SplitSeq(v, ",") {
			if name = strings.TrimSpace(name); name != "" {
				offered = append(offered, name)
			}
		}
	}
	if len(offered) == 0 {
		http.Error(w, "unable to upgrade: there is no "+header+" in the request", http.StatusBadRequest)
		return nil, nil, ""
	}
	protocol := firstCommon(offered, known)
	if protocol == "" {
		for _, name := range known {
			w.Header().Add("X-Accepted-Stream-Protocol-Versions", name)
		}
		http.Error(w, fmt.Sprintf("unable to upgrade: the client offers none of %v", known), http.StatusForbidden)
		return nil, nil, ""
	}
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, "unable to upgrade: "+err.Error(), http.StatusInternalServerError)
		return nil, nil, ""
	}
	_ = conn.SetDeadline(time.Time{}) // the server's deadlines are for requests
	_, err = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"+header+": "+protocol+"\r\n\r\n")
	if err != nil {
		conn.Close()
		return nil, nil, ""
	}
	return conn, buf.Reader, protocol
}

// firstCommon is the first of offered that is known, or "".
func firstCommon(offered, known []string) string {
	for _, o := range offered {
		for _, k := range known {
			if o == k {
				return k
			}
		}
	}
	return ""
}

// headerHas finds a word in a list of words.
func headerHas(h http.Header, name, word string) bool {
	for _, v := range h.Values(name) {
		for w := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(w), word) {
				return true
			}
		}
	}
	return false
}
