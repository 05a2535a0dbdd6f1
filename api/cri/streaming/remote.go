package streaming

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"
)

// Versions of the remote command protocol.
const (
	protocolV1 = "channel.k8s.io"
	protocolV2 = "v2.channel.k8s.io"
	protocolV3 = "v3.channel.k8s.io" // adds resize
	protocolV4 = "v4.channel.k8s.io" // the error stream carries a status
	protocolV5 = "v5.channel.k8s.io" // adds CLOSE of a channel over WebSocket
)

const (
	// stdinBuffer is how much input waits for a process that does not read, in bytes.
	stdinBuffer = 256 << 10
	// resizeBuffer and maxResize bound messages that set the terminal's size, in bytes.
	resizeBuffer = 4 << 10
	maxResize    = 1 << 10
	// drainLimit is how long a client may take to close its side after it has been
	// told the end. Closing over bytes that it still sends would reset the connection, and
	// it would lose the last output.
	drainLimit = 10 * time.Second
)

// errGone is why a call's context ended: nobody is there any more.
var errGone = errors.New("the client has gone")

// remote is one exec or attach as its transport presents it.
type remote struct {
	stdin  io.ReadCloser // nil: not asked for
	stdout io.Writer
	stderr io.Writer
	resize io.ReadCloser // JSON values; nil: none
	// status writes to the error stream.
	status io.Writer
	// statusJSON tells whether that takes a status object, or text and only for errors.
	statusJSON bool
	// gone is closed when the client has left.
	gone <-chan struct{}
	// finish says to the client that everything was sent, and waits for it to close;
	// not longer than ctx.
	finish func(ctx context.Context)
	// close releases the connection.
	close func()
}

// serveRemote serves an exec or attach, over the transport that the client asks for.
func (s *Server) serveRemote(w http.ResponseWriter, r *http.Request, o RemoteOptions, call func(context.Context, Streams) (int, error)) {
	open := s.openSPDY
	if isWebSocket(r) {
		open = s.openWebSocket
	}
	rem := open(w, r, o)
	if rem == nil {
		return // the client was told
	}
	defer rem.close()
	ctx, cancel := context.WithCancelCause(s.ctx)
	defer cancel(nil)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-rem.gone:
			cancel(errGone)
		case <-ctx.Done():
		}
	}()
	defer func() { <-watched }()
	defer cancel(nil)
	st := Streams{Stdout: rem.stdout, Stderr: rem.stderr, TTY: o.TTY}
	if rem.stdin != nil {
		st.Stdin = rem.stdin
		defer rem.stdin.Close()
	}
	if rem.resize != nil {
		sizes := make(chan Size, 1)
		done := make(chan struct{})
		go func() { defer close(done); readSizes(rem.resize, sizes) }()
		defer func() { rem.resize.Close(); <-done }()
		if o.TTY {
			st.Resize = sizes
		}
	}
	code, err := call(ctx, st)
	if ctx.Err() != nil {
		s.log.Debug("stream ended early", "container", o.ContainerID, "cause", context.Cause(ctx), "error", err)
		return
	}
	if err != nil {
		s.log.Debug("stream", "container", o.ContainerID, "error", err)
	}
	if p := statusFor(code, err, rem.statusJSON); p != nil {
		_, _ = rem.status.Write(p)
	}
	rem.finish(ctx)
}

// statusObject has the fields of Kubernetes' metav1.Status that clients read.
type statusObject struct {
	Status  string         `json:"status"`
	Message string         `json:"message,omitempty"`
	Reason  string         `json:"reason,omitempty"`
	Details *statusDetails `json:"details,omitempty"`
	Code    int            `json:"code,omitempty"`
}

type statusDetails struct {
	Causes []statusCause `json:"causes"`
}

type statusCause struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

// statusFor is the message on the error stream; nil: none. Before v4 success has no
// message, and the code stands in a text.
func statusFor(code int, err error, object bool) []byte {
	st := statusObject{Status: "Success"}
	switch {
	case err != nil:
		st = statusObject{Status: "Failure", Reason: "InternalError", Code: http.StatusInternalServerError,
			Message: fmt.Sprintf("Internal error occurred: %v", err)}
	case code != 0:
		st = statusObject{Status: "Failure", Reason: "NonZeroExitCode",
			Message: fmt.Sprintf("command terminated with non-zero exit code: exit status %d", code),
			Details: &statusDetails{Causes: []statusCause{{Reason: "ExitCode", Message: strconv.Itoa(code)}}}}
	}
	if !object {
		if st.Message == "" {
			return nil
		}
		return []byte(st.Message)
	}
	raw, err := json.Marshal(st)
	if err != nil {
		return nil // strings and numbers only
	}
	return raw
}

// readSizes keeps the newest size in the channel, until the client sends something
// else or ends the stream.
func readSizes(r io.Reader, to chan Size) {
	limited := &io.LimitedReader{R: r}
	dec := json.NewDecoder(limited)
	for {
		limited.N = maxResize
		var size Size
		if err := dec.Decode(&size); err != nil {
			_, _ = io.Copy(io.Discard, r)
			return
		}
		if size.Width == 0 || size.Height == 0 {
			continue
		}
		select {
		case <-to:
		default:
		}
		to <- size // the only sender; there is room
	}
}
