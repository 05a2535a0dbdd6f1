package docker

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"
)

// response remembers whether the answer has begun.
type response struct {
	http.ResponseWriter
	wrote bool
	code  int // 0: not set
}

// status is that of the answer. A connection that was taken over has none of ours: 101.
func (w *response) status() int {
	switch {
	case w.code != 0:
		return w.code
	case w.wrote:
		return http.StatusOK
	}
	return http.StatusSwitchingProtocols
}

func (w *response) WriteHeader(code int) {
	if !w.wrote {
		w.code = code
	}
	w.wrote = true
	w.ResponseWriter.WriteHeader(code)
}

func (w *response) Write(p []byte) (int, error) {
	w.wrote = true
	return w.ResponseWriter.Write(p)
}

// Unwrap lets http.ResponseController reach the connection.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *response) flush() { _ = http.NewResponseController(w.ResponseWriter).Flush() }

// json answers with a value.
func (c *call) json(code int, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	h := c.w.Header()
	h.Set("Content-Type", "application/json")
	c.w.WriteHeader(code)
	_, _ = c.w.Write(append(b, '\n')) // fails when the client left
	return nil
}

// empty answers without a body.
func (c *call) empty(code int) error {
	c.w.WriteHeader(code)
	return nil
}

// fail answers with an error; when the answer has begun, it breaks the connection
// off, so that the client does not take a part for the whole.
func (c *call) fail(err error) {
	if errors.Is(err, context.Canceled) && context.Cause(c.Context()) == errShutdown {
		err = errShutdown // it was not the client that left
	}
	code := statusOf(err)
	level := c.log.Debug
	if code >= http.StatusInternalServerError && code != http.StatusNotImplemented && code != http.StatusServiceUnavailable {
		level = c.log.Error
	}
	level("request failed", "method", c.Method, "path", c.URL.Path, "status", code, "error", err)
	if c.w.wrote {
		panic(http.ErrAbortHandler)
	}
	if code == http.StatusNotModified {
		c.w.WriteHeader(code)
		return
	}
	_ = c.json(code, errorBody(err)) // a struct of one string
}

// Media types of streams of JSON objects.
const (
	typeJSON    = "application/json"
	typeNDJSON  = "application/x-ndjson"
	typeJSONL   = "application/jsonl"
	typeJSONSeq = "application/json-seq" // RFC 7464
)

// begin answers 200 with a content type and lets the client see it at once.
func (c *call) begin(contentType string) {
	c.w.Header().Set("Content-Type", contentType)
	c.w.WriteHeader(http.StatusOK)
	c.w.flush()
}

// objects writes a stream of JSON objects, one a line. It is safe for concurrent use.
type objects struct {
	mu    sync.Mutex
	c     *call
	kind  string
	began bool
	err   error // of the first failed write, or errEnded
}

// errEnded refuses what comes after the handler has returned, when the connection
// belongs to the next request.
var errEnded = errors.New("the stream has ended")

// end lets nothing more out.
func (o *objects) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.beginLocked()
	o.err = errEnded
}

// objects starts the stream with the first object, or with begin.
func (c *call) objects(kind string) *objects { return &objects{c: c, kind: kind} }

func (o *objects) begin() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.beginLocked()
}

// begun tells whether the client has been answered; if not, nothing will be any more.
func (o *objects) begun() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.began {
		o.err = errEnded
	}
	return o.began
}

// started tells whether anything was sent.
func (o *objects) started() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.began
}

func (o *objects) beginLocked() {
	if !o.began {
		o.began = true
		o.c.begin(o.kind)
	}
}

// write sends one object and gives an error when the client has left.
func (o *objects) write(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err != nil {
		return o.err
	}
	o.beginLocked()
	if o.kind == typeJSONSeq {
		b = append([]byte{0x1e}, b...)
	}
	if _, o.err = o.c.w.Write(append(b, '\r', '\n')); o.err == nil {
		o.c.w.flush()
	}
	return o.err
}

// flushDelay is how long a byte of a stream may wait for company.
const flushDelay = 2 * time.Millisecond

// batcher gathers small writes into large ones, none later than flushDelay.
type batcher struct {
	mu    sync.Mutex
	buf   *bufio.Writer
	flush func()
	timer *time.Timer
	armed bool
}

func newBatcher(w io.Writer, flush func()) *batcher {
	b := &batcher{buf: bufio.NewWriterSize(w, 32<<10), flush: flush}
	b.timer = time.AfterFunc(time.Hour, b.Flush)
	b.timer.Stop()
	return b
}

func (b *batcher) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.armed {
		b.armed = true
		b.timer.Reset(flushDelay)
	}
	return b.buf.Write(p)
}

// Flush sends what was gathered.
func (b *batcher) Flush() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.armed = false
	if b.buf.Flush() == nil {
		b.flush()
	}
}

// close sends the rest; nothing is written to the client after it.
func (b *batcher) close() {
	b.Flush()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.timer.Stop()
	b.flush = func() {}
}
