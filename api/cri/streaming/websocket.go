package streaming

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// Channels of the remote command protocol over WebSocket: the first byte of a message.
const (
	channelStdin  = 0
	channelStdout = 1
	channelStderr = 2
	channelError  = 3
	channelResize = 4
	channelClose  = 255 // v5: the client ends the channel that the second byte names
)

const (
	// maxMessage bounds a message that is written; it goes as one frame. One that is
	// read is handed on in pieces of this size, and has no bound.
	maxMessage     = 32 << 10
	handshakeLimit = 10 * time.Second
	controlLimit   = 5 * time.Second
)

// base64Prefix marks the protocols whose messages are text.
const base64Prefix = "base64."

func isWebSocket(r *http.Request) bool {
	return headerHas(r.Header, "Connection", "upgrade") && strings.EqualFold(r.Header.Get("Upgrade"), "websocket")
}

// upgradeWebSocket chooses the protocol and takes the connection over. A client that
// offers none gets "", where known has it. nil: the client was told why not.
func upgradeWebSocket(w http.ResponseWriter, r *http.Request, known ...string) (*websocket.Conn, string) {
	offered := websocket.Subprotocols(r)
	protocol := firstCommon(offered, known)
	if protocol == "" && (len(offered) > 0 || known[len(known)-1] != "") {
		http.Error(w, fmt.Sprintf("the client offers none of the protocols %q", known), http.StatusForbidden)
		return nil, ""
	}
	up := websocket.Upgrader{
		HandshakeTimeout: handshakeLimit,
		ReadBufferSize:   maxMessage + 1<<10, WriteBufferSize: maxMessage + 1<<10,
		// The API server and the kubelet hand browsers' headers on. What a web page
		// cannot have is the token.
		CheckOrigin: func(*http.Request) bool { return true },
		Error: func(w http.ResponseWriter, _ *http.Request, status int, reason error) {
			http.Error(w, reason.Error(), status)
		},
	}
	if protocol != "" {
		up.Subprotocols = []string{protocol}
	}
	conn, err := up.Upgrade(w, r, nil)
	if err != nil {
		return nil, ""
	}
	return conn, protocol
}

// channels multiplexes numbered channels over a WebSocket. One goroutine reads.
type channels struct {
	ws   *websocket.Conn
	text bool // messages are base64
	act  *activity
	done chan struct{} // closed when reading has ended

	write sync.Mutex
	buf   []byte // guarded by write
}

func newChannels(ws *websocket.Conn, protocol string, idle time.Duration) *channels {
	c := &channels{ws: ws, text: strings.Contains(protocol, base64Prefix), done: make(chan struct{})}
	c.act = watchActivity(idle, func() { ws.Close() })
	return c
}

// serve reads messages into the channels' pipes until the client leaves. With
// closes, the client may end a channel.
func (c *channels) serve(in map[byte]*pipe, closes bool) {
	defer close(c.done)
	for _, p := range in {
		p.blocked = c.pong
		defer p.end(errGone)
	}
	buf := make([]byte, maxMessage)
	for {
		_, r, err := c.ws.NextReader()
		if err != nil {
			return
		}
		if _, err := io.ReadFull(r, buf[:1]); err != nil {
			if errors.Is(err, io.EOF) {
				continue // an empty message
			}
			return
		}
		channel := buf[0]
		if c.text {
			channel -= '0'
			r = base64.NewDecoder(base64.StdEncoding, r)
		}
		if closes && channel == channelClose {
			if _, err := io.ReadFull(r, buf[:1]); err == nil && in[buf[0]] != nil {
				in[buf[0]].end(io.EOF)
			}
			continue
		}
		c.act.touch()
		p := in[channel]
		if p == nil {
			continue
		}
		if _, err := io.CopyBuffer(onlyWriter{p}, onlyReader{r}, buf); err != nil {
			return
		}
	}
}

// onlyWriter and onlyReader keep io.CopyBuffer at its buffer.
type onlyWriter struct{ io.Writer }

type onlyReader struct{ io.Reader }

// pong tells the client that we live while we cannot read its pings, because a process
// does not read its input. Clients take it for an answer (RFC 6455, 5.5.3).
func (c *channels) pong() {
	_ = c.ws.WriteControl(websocket.PongMessage, nil, time.Now().Add(controlLimit))
}

// send writes p to a channel; also an empty one makes a message.
func (c *channels) send(channel byte, p []byte) (n int, err error) {
	c.write.Lock()
	defer c.write.Unlock()
	limit, typ := maxMessage-1, websocket.BinaryMessage
	if c.text {
		limit, typ = base64.StdEncoding.DecodedLen(maxMessage-4), websocket.TextMessage
		channel += '0'
	}
	for first := true; first || len(p) > 0; first = false {
		piece := p[:min(len(p), limit)]
		c.buf = append(c.buf[:0], channel)
		if c.text {
			c.buf = base64.StdEncoding.AppendEncode(c.buf, piece)
		} else {
			c.buf = append(c.buf, piece...)
		}
		if err := c.ws.WriteMessage(typ, c.buf); err != nil {
			return n, err
		}
		c.act.touch()
		n += len(piece)
		p = p[len(piece):]
	}
	return n, nil
}

// finish says that nothing more comes, and waits for the client to leave.
func (c *channels) finish(stop <-chan struct{}) {
	c.write.Lock()
	_ = c.ws.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""), time.Now().Add(controlLimit))
	c.write.Unlock()
	limit := time.NewTimer(drainLimit)
	defer limit.Stop()
	select {
	case <-c.done:
	case <-stop:
	case <-limit.C:
	}
}

// close releases the connection, and waits until nothing reads it any more. in must
// have been closed by their readers.
func (c *channels) close(in map[byte]*pipe) {
	c.act.stop()
	c.ws.Close()
	for _, p := range in {
		p.Close()
	}
	<-c.done
}

// channelWriter writes to one channel.
type channelWriter struct {
	c       *channels
	channel byte
}

func (w channelWriter) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	return w.c.send(w.channel, p)
}

// openWebSocket makes the channels of an exec or attach.
func (s *Server) openWebSocket(w http.ResponseWriter, r *http.Request, o RemoteOptions) *remote {
	ws, protocol := upgradeWebSocket(w, r, protocolV5, protocolV4, "v4."+base64Prefix+protocolV1, protocolV1, base64Prefix+protocolV1, "")
	if ws == nil {
		return nil
	}
	c := newChannels(ws, protocol, s.opt.Idle)
	in := map[byte]*pipe{channelResize: newPipe(resizeBuffer)}
	rem := &remote{
		resize: in[channelResize], status: channelWriter{c, channelError}, statusJSON: strings.HasPrefix(protocol, "v"),
		gone: c.done, close: func() { c.close(in) },
		finish: func(ctx context.Context) { c.finish(ctx.Done()) },
	}
	hello := byte(channelError)
	if o.Stderr {
		rem.stderr = channelWriter{c, channelStderr}
		hello = channelStderr
	}
	if o.Stdout {
		rem.stdout = channelWriter{c, channelStdout}
		hello = channelStdout
	}
	if o.Stdin {
		in[channelStdin] = newPipe(stdinBuffer)
		rem.stdin = in[channelStdin]
	}
	go c.serve(in, protocol == protocolV5)
	// Clients wait for an empty message that tells that the connection stands.
	if _, err := c.send(hello, nil); err != nil {
		rem.close()
		return nil
	}
	return rem
}

// wsConn carries a byte stream in the binary messages of a WebSocket.
type wsConn struct {
	ws    *websocket.Conn
	r     io.Reader // the message being read
	write sync.Mutex
}

func (c *wsConn) Read(p []byte) (int, error) {
	for {
		if c.r == nil {
			typ, r, err := c.ws.NextReader()
			switch {
			case websocket.IsCloseError(err, websocket.CloseNormalClosure, websocket.CloseGoingAway):
				return 0, io.EOF
			case err != nil:
				return 0, err
			case typ != websocket.BinaryMessage:
				return 0, errors.New("a message of the tunnel is not binary")
			}
			c.r = r
		}
		n, err := c.r.Read(p)
		if errors.Is(err, io.EOF) {
			c.r, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

func (c *wsConn) Write(p []byte) (int, error) {
	c.write.Lock()
	defer c.write.Unlock()
	if err := c.ws.WriteMessage(websocket.BinaryMessage, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c *wsConn) CloseWrite() error {
	err := c.ws.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""), time.Now().Add(controlLimit))
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (c *wsConn) Close() error { return c.ws.Close() }
