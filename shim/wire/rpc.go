package wire

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
)

// A ttrpc frame is a header (length, stream: uint32 big endian; type, flags: byte)
// and a message (github.com/containerd/ttrpc, PROTOCOL.md). Only unary calls exist
// in the shim protocol.
const (
	headerSize   = 10
	maxFrame     = 4 << 20
	typeRequest  = 1
	typeResponse = 2
)

type request struct {
	Service, Method string
	Payload         []byte
	TimeoutNano     int64
	Metadata        []keyValue
}

func (m *request) fields(c *coder) {
	c.string(1, &m.Service)
	c.string(2, &m.Method)
	c.data(3, &m.Payload)
	c.int64(4, &m.TimeoutNano)
	repeated(c, 5, &m.Metadata)
}

type response struct {
	Status  *status
	Payload []byte
}

func (m *response) fields(c *coder) {
	optional(c, 1, &m.Status)
	c.data(2, &m.Payload)
}

type frame struct {
	stream uint32
	typ    byte
	body   []byte
}

func readFrame(r io.Reader) (f frame, err error) {
	var h [headerSize]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return f, err
	}
	n := binary.BigEndian.Uint32(h[:])
	if n > maxFrame {
		return f, fmt.Errorf("ttrpc frame of %d bytes: %w", n, errdefs.ErrResourceExhausted)
	}
	f = frame{binary.BigEndian.Uint32(h[4:]), h[8], make([]byte, n)}
	if _, err := io.ReadFull(r, f.body); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return f, err
	}
	return f, nil
}

// writeFrame sends a message in one write.
func writeFrame(w io.Writer, stream uint32, typ byte, m Message) error {
	b := AppendMarshal(make([]byte, headerSize, 256), m)
	n := len(b) - headerSize
	if n > maxFrame {
		return fmt.Errorf("ttrpc frame of %d bytes: %w", n, errdefs.ErrResourceExhausted)
	}
	binary.BigEndian.PutUint32(b, uint32(n))
	binary.BigEndian.PutUint32(b[4:], stream)
	b[8] = typ
	_, err := w.Write(b)
	return err
}

// Handler serves one method: payload is the encoded request.
type Handler func(ctx context.Context, payload []byte) (Message, error)

// Handle makes a handler of a typed function.
func Handle[T any, P pointer[T]](serve func(context.Context, P) (Message, error)) Handler {
	return func(ctx context.Context, payload []byte) (Message, error) {
		var req T
		if err := Unmarshal(payload, P(&req)); err != nil {
			return nil, fmt.Errorf("decode request: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		return serve(ctx, P(&req))
	}
}

// Services maps service name and method name to handlers.
type Services map[string]map[string]Handler

// Serve answers the calls of one connection until it ends; each call runs in a
// goroutine of its own, under a context that ends with the connection. r is the
// reading side of conn, with what was peeked at.
func (s Services) Serve(ctx context.Context, conn net.Conn, r *bufio.Reader) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer conn.Close()
	var mu sync.Mutex // one frame at a time
	for {
		f, err := readFrame(r)
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		if f.typ != typeRequest {
			continue // a data frame of a stream that we never opened
		}
		var req request
		if err := Unmarshal(f.body, &req); err != nil {
			return fmt.Errorf("decode ttrpc request: %w", err)
		}
		go func() {
			resp := s.call(ctx, &req)
			mu.Lock()
			defer mu.Unlock()
			if err := writeFrame(conn, f.stream, typeResponse, resp); err != nil {
				conn.Close()
			}
		}()
	}
}

func (s Services) call(ctx context.Context, req *request) *response {
	h := s[req.Service][req.Method]
	if h == nil {
		return &response{Status: toStatus(fmt.Errorf("%s/%s: %w", req.Service, req.Method, errdefs.ErrNotImplemented))}
	}
	if req.TimeoutNano > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(req.TimeoutNano))
		defer cancel()
	}
	m, err := h(ctx, req.Payload)
	if err != nil {
		return &response{Status: toStatus(err)}
	}
	// An empty status is how generated servers answer, and old clients look at it.
	return &response{Status: &status{}, Payload: Marshal(m)}
}

// Client makes calls over one connection. It is safe for concurrent use.
type Client struct {
	conn net.Conn
	done chan struct{}
	// header is sent with every call, such as the namespace.
	header []keyValue

	write sync.Mutex // one frame at a time

	mu struct {
		sync.Mutex
		next  uint32
		calls map[uint32]chan *response
		err   error
	}
}

// NamespaceHeader is the metadata key that containerd expects its namespace in.
const NamespaceHeader = "containerd-namespace-ttrpc"

// NewClient makes a client that owns the connection.
func NewClient(conn net.Conn, namespace string) *Client {
	c := &Client{conn: conn, done: make(chan struct{})}
	if namespace != "" {
		c.header = []keyValue{{NamespaceHeader, namespace}}
	}
	c.mu.next, c.mu.calls = 1, map[uint32]chan *response{}
	go c.receive()
	return c
}

func (c *Client) receive() {
	r := bufio.NewReaderSize(c.conn, 512)
	var err error
	for {
		var f frame
		if f, err = readFrame(r); err != nil {
			break
		}
		if f.typ != typeResponse {
			continue
		}
		resp := new(response)
		if err = Unmarshal(f.body, resp); err != nil {
			break
		}
		c.mu.Lock()
		ch := c.mu.calls[f.stream]
		delete(c.mu.calls, f.stream)
		c.mu.Unlock()
		if ch != nil {
			ch <- resp // has room for it
		}
	}
	c.conn.Close()
	c.mu.Lock()
	c.mu.err = fmt.Errorf("connection lost: %w: %w", err, errdefs.ErrUnavailable)
	c.mu.Unlock()
	close(c.done)
}

// Call makes a call and waits for the answer, the end of ctx, or of the connection
// (errdefs.ErrUnavailable). resp may be nil.
func (c *Client) Call(ctx context.Context, service, method string, req, resp Message) error {
	b, err := c.CallRaw(ctx, service, method, Marshal(req))
	if err != nil || resp == nil {
		return err
	}
	return Unmarshal(b, resp)
}

// CallRaw is Call with encoded messages.
func (c *Client) CallRaw(ctx context.Context, service, method string, req []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r := request{Service: service, Method: method, Payload: req, Metadata: c.header}
	if d, ok := ctx.Deadline(); ok {
		r.TimeoutNano = max(1, int64(time.Until(d)))
	}
	ch := make(chan *response, 1)
	c.mu.Lock()
	if c.mu.err != nil {
		defer c.mu.Unlock()
		return nil, c.mu.err
	}
	id := c.mu.next
	c.mu.next += 2 // a client's streams are odd
	c.mu.calls[id] = ch
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.mu.calls, id)
		c.mu.Unlock()
	}()

	c.write.Lock()
	err := writeFrame(c.conn, id, typeRequest, &r)
	c.write.Unlock()
	if errors.Is(err, errdefs.ErrResourceExhausted) {
		return nil, err
	} else if err != nil {
		c.conn.Close() // receive reports it
	}
	select {
	case got := <-ch:
		return got.Payload, got.Status.error()
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-c.done:
		select {
		case got := <-ch: // the answer came with the end
			return got.Payload, got.Status.error()
		default:
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		return nil, c.mu.err
	}
}

// Done is closed when the connection is lost.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the connection; calls under way fail with errdefs.ErrUnavailable.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.done
	return err
}
