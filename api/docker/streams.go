package docker

import (
	"context"
	"errors"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/net/websocket"

	"github.com/hako-engine/hako/api/stream"
	"github.com/hako-engine/hako/engine"
)

var errWaitEnded = errors.New("the daemon stopped waiting for the container")

// streamType is the content type of a container's output. Clients before 1.42 know
// from the container's configuration whether it is framed.
func (v version) streamType(tty bool) string {
	if tty || v.less(v1_42) {
		return stream.MediaTypeRaw
	}
	return stream.MediaTypeMultiplexed
}

func (s *Server) containerLogs(ctx context.Context, c *call) error {
	o := engine.LogOptions{
		Stdout: c.flag("stdout"), Stderr: c.flag("stderr"),
		Follow: c.flag("follow"), Details: c.flag("details"), Tail: -1,
	}
	if !o.Stdout && !o.Stderr {
		return invalidf("Bad parameters: you must choose at least one stream")
	}
	if tail := c.query("tail"); tail != "" && tail != "all" {
		n, err := strconv.Atoi(tail)
		if err != nil {
			return invalidf("invalid value for tail: %q is neither a number nor all", tail)
		}
		o.Tail = max(n, -1)
	}
	var err error
	if o.Since, err = c.moment("since"); err != nil {
		return err
	}
	if o.Until, err = c.moment("until"); err != nil {
		return err
	}
	ctr, err := s.opt.Backend.Container(ctx, c.id())
	if err != nil {
		return err
	}
	entries, err := s.opt.Backend.Logs(ctx, ctr.ID, o)
	if err != nil {
		return err
	}
	c.begin(c.version.streamType(ctr.Config.TTY))
	out := newBatcher(c.w, c.w.flush)
	defer out.close()
	var sink stream.Sink = stream.Raw{W: out}
	if !ctr.Config.TTY {
		sink = stream.NewFramer(out)
	}
	lines := logWriter{sink: sink, timestamps: c.flag("timestamps"), details: o.Details}
	for e, err := range entries {
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			// The answer has begun; the format has a stream for this.
			return sink.WriteFrame(stream.SystemError, []byte("Error grabbing logs: "+err.Error()+"\n"))
		}
		if lines.write(e) != nil {
			return nil // the client left
		}
	}
	return nil
}

// logTime is the format of docker logs --timestamps: of constant width.
const logTime = "2006-01-02T15:04:05.000000000Z07:00"

// logWriter formats entries of a log. Pieces of one long line are joined.
type logWriter struct {
	sink                stream.Sink
	timestamps, details bool
	midline             [3]bool // by stream
	buf                 []byte
}

func (w *logWriter) write(e engine.LogEntry) error {
	which := stream.Stdout
	if e.Stream == stream.Stderr {
		which = stream.Stderr
	}
	w.buf = w.buf[:0]
	if !w.midline[which] {
		if w.timestamps {
			w.buf = append(e.Time.UTC().AppendFormat(w.buf, logTime), ' ')
		}
		if w.details {
			w.buf = append(appendDetails(w.buf, e.Attrs), ' ')
		}
	}
	w.midline[which] = e.Partial
	w.buf = append(w.buf, e.Line...)
	return w.sink.WriteFrame(which, w.buf)
}

// appendDetails writes attributes as k=v,k=v with the parts escaped as in a URL's query.
func appendDetails(b []byte, attrs map[string]string) []byte {
	pairs := make([]string, 0, len(attrs))
	for k, v := range attrs {
		pairs = append(pairs, url.QueryEscape(k)+"="+url.QueryEscape(v))
	}
	slices.Sort(pairs)
	return append(b, strings.Join(pairs, ",")...)
}

// attachRequest is what both forms of attach have in common.
type attachRequest struct {
	container engine.Container
	options   engine.AttachOptions
	keys      []byte
}

func (s *Server) attachRequest(ctx context.Context, c *call, all bool) (attachRequest, error) {
	r := attachRequest{options: engine.AttachOptions{
		Stdin:  c.flagOr("stdin", all),
		Stdout: c.flagOr("stdout", all),
		Stderr: c.flagOr("stderr", all),
		Stream: c.flagOr("stream", all),
		Logs:   c.flag("logs"),
	}}
	var err error
	if r.keys, err = stream.ParseDetachKeys(c.query("detachKeys")); err != nil {
		return r, err
	}
	if r.container, err = s.opt.Backend.Container(ctx, c.id()); err != nil {
		return r, err
	}
	if !r.options.Stream {
		r.options.Stdin = false
	}
	// A container without stdin takes none, and attaching to it is no error.
	r.options.Stdin = r.options.Stdin && r.container.Config.OpenStdin
	return r, nil
}

func (r *attachRequest) pump() stream.PumpOptions {
	o := stream.PumpOptions{
		Stdin:     r.options.Stdin,
		KeepStdin: !r.container.Config.StdinOnce || r.container.Config.TTY,
		Output:    r.options.Stdout || r.options.Stderr,
	}
	if r.container.Config.TTY {
		o.DetachKeys = r.keys
	}
	return o
}

func (s *Server) containerAttach(ctx context.Context, c *call) error {
	r, err := s.attachRequest(ctx, c, false)
	if err != nil {
		return err
	}
	process, err := s.opt.Backend.Attach(ctx, r.container.ID, r.options)
	if err != nil {
		return err
	}
	conn, err := c.hijack(r.container.Config.TTY)
	if err != nil {
		process.Close()
		return err
	}
	s.pump(ctx, c, conn, process, r.container.Config.TTY, r.pump())
	return nil
}

// hijack takes the connection over; an answer has been given when it succeeds.
func (c *call) hijack(tty bool) (*stream.Conn, error) {
	conn, err := stream.Hijack(c.w, c.Request, c.version.streamType(tty))
	c.w.wrote = err == nil
	return conn, err
}

// pump connects a client to a process until one of them ends.
func (s *Server) pump(ctx context.Context, c *call, conn *stream.Conn, p engine.Attachment, tty bool, o stream.PumpOptions) {
	var sink stream.Sink = stream.Raw{W: conn}
	if !tty {
		sink = stream.NewFramer(conn)
	}
	if err := stream.Pump(ctx, conn, p, sink, o); err != nil && !errors.Is(err, stream.ErrDetached) {
		s.log.Debug("attachment ended", "path", c.URL.Path, "error", err)
	}
}

// containerAttachWS is attach over a WebSocket: raw bytes, without frames.
func (s *Server) containerAttachWS(ctx context.Context, c *call) error {
	r, err := s.attachRequest(ctx, c, true)
	if err != nil {
		return err
	}
	process, err := s.opt.Backend.Attach(ctx, r.container.ID, r.options)
	if err != nil {
		return err
	}
	defer process.Close()
	c.w.wrote = true
	websocket.Server{Handler: func(ws *websocket.Conn) {
		ws.PayloadType = websocket.BinaryFrame
		client := wsClient{ws}
		if err := stream.Pump(ctx, client, process, stream.Raw{W: ws}, r.pump()); err != nil && !errors.Is(err, stream.ErrDetached) {
			s.log.Debug("attachment ended", "path", c.URL.Path, "error", err)
		}
	}}.ServeHTTP(c.w.ResponseWriter, c.Request)
	return nil
}

// wsClient is a WebSocket as the far side of an attachment. It has no half-close.
type wsClient struct{ *websocket.Conn }

// CloseWrite leaves the connection to Close, as a WebSocket ends both ways at once.
func (c wsClient) CloseWrite() error { return c.Close() }

// WaitGone returns at once: the end of a WebSocket's input is its end.
func (c wsClient) WaitGone() {}
