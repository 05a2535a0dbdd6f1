package stream

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Media types of a taken-over connection.
const (
	MediaTypeRaw         = "application/vnd.docker.raw-stream"
	MediaTypeMultiplexed = "application/vnd.docker.multiplexed-stream"
)

// gonePoll is how often a half-closed connection is asked whether its client has
// left for good. A client that leaves while its process is silent would hold the
// attachment until the process writes.
const gonePoll = 2 * time.Second

// Conn is a connection that was taken over from the HTTP server: bytes both ways.
// The client may end its direction and go on reading.
type Conn struct {
	net.Conn
	buffered *bufio.Reader // what the server had read ahead
	once     sync.Once
	closed   chan struct{}
}

// Hijack takes the connection over and answers the request: 101 when the client
// asked for an upgrade, else 200 (old clients). After that every byte belongs to the caller, who
// closes the connection. An error before anything was answered leaves the
// request to the caller.
func Hijack(w http.ResponseWriter, r *http.Request, mediaType string) (*Conn, error) {
	c, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		if errors.Is(err, http.ErrNotSupported) {
			return nil, fmt.Errorf("take over the connection of %s %s: needs HTTP/1.1: %w", r.Method, r.URL.Path, errdefs.ErrInvalidArgument)
		}
		return nil, fmt.Errorf("take over the connection of %s %s: %w", r.Method, r.URL.Path, err)
	}
	// The server's deadlines are for requests; a stream lives as long as its process.
	_ = c.SetDeadline(time.Time{})
	conn := &Conn{Conn: c, buffered: buf.Reader, closed: make(chan struct{})}
	head := "HTTP/1.1 200 OK\r\nContent-Type: " + mediaType + "\r\n\r\n"
	if proto := r.Header.Get("Upgrade"); proto != "" {
		head = "HTTP/1.1 101 UPGRADED\r\nContent-Type: " + mediaType + "\r\nConnection: Upgrade\r\nUpgrade: " + token(proto) + "\r\n\r\n"
	}
	if _, err := io.WriteString(c, head); err != nil {
		conn.Close()
		return nil, fmt.Errorf("answer %s %s: %w", r.Method, r.URL.Path, err)
	}
	return conn, nil
}

// token keeps a client's header value from adding lines to the answer.
func token(s string) string {
	return strings.Map(func(c rune) rune {
		if c <= ' ' || c >= 0x7f {
			return -1
		}
		return c
	}, s)
}

// Read gives what the client sends; io.EOF when it ended its direction.
func (c *Conn) Read(p []byte) (int, error) {
	if c.buffered != nil {
		if c.buffered.Buffered() > 0 {
			return c.buffered.Read(p[:min(len(p), c.buffered.Buffered())])
		}
		c.buffered = nil
	}
	return c.Conn.Read(p)
}

// CloseWrite ends our direction: the client reads EOF and may go on writing.
func (c *Conn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Close()
}

// Close ends both directions.
func (c *Conn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// WaitGone blocks until the client has left for good or the connection is closed
// here. It is meant for the time after Read gave io.EOF, when reading cannot tell any more.
func (c *Conn) WaitGone() {
	raw, ok := c.Conn.(syscall.Conn)
	if !ok {
		<-c.closed
		return
	}
	tick := time.NewTicker(gonePoll)
	defer tick.Stop()
	for {
		if hungUp(raw) {
			return
		}
		select {
		case <-c.closed:
			return
		case <-tick.C:
		}
	}
}

// hungUp asks the kernel whether both directions are shut (poll(2), POLLHUP).
func hungUp(c syscall.Conn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return true
	}
	gone := false
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd)}}
		for {
			_, err := unix.Poll(p, 0)
			if !errors.Is(err, unix.EINTR) {
				break
			}
		}
		gone = p[0].Revents&(unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0
	})
	return gone || err != nil
}
