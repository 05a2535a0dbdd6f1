package streaming

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"time"
)

// maxRemoteStreams is one of each kind, and room for those that are refused.
const maxRemoteStreams = 8

// openSPDY waits for the streams that an exec or attach needs.
func (s *Server) openSPDY(w http.ResponseWriter, r *http.Request, o RemoteOptions) *remote {
	conn, buf, protocol := negotiateSPDY(w, r, protocolV5, protocolV4, protocolV3, protocolV2, protocolV1)
	if conn == nil {
		return nil
	}
	want := map[string]bool{"error": true}
	for kind, wanted := range map[string]bool{"stdin": o.Stdin, "stdout": o.Stdout, "stderr": o.Stderr,
		"resize": o.TTY && protocol != protocolV1 && protocol != protocolV2} {
		if wanted {
			want[kind] = true
		}
	}
	var mu sync.Mutex
	streams := map[string]*spdyStream{}
	complete := make(chan struct{})
	c := newSPDY(conn, buf, stdinBuffer, maxRemoteStreams, func(st *spdyStream) error {
		kind := st.headers.Get("Streamtype")
		mu.Lock()
		defer mu.Unlock()
		if !want[kind] || streams[kind] != nil {
			return fmt.Errorf("unexpected stream %q", kind)
		}
		if kind == "resize" {
			st.in.limit = resizeBuffer
		}
		streams[kind] = st
		if len(streams) == len(want) {
			close(complete)
		}
		return nil
	})
	c.act = watchActivity(s.opt.Idle, func() { c.conn.Close() })
	go c.serve()
	release := func() {
		c.act.stop()
		c.close()
	}
	limit := time.NewTimer(s.opt.Creation)
	defer limit.Stop()
	select {
	case <-complete:
	case <-c.done:
	case <-s.ctx.Done():
	case <-limit.C:
		s.log.Debug("client did not open its streams", "container", o.ContainerID)
	}
	select {
	case <-complete:
	default:
		release()
		return nil
	}
	rem := &remote{
		status: streams["error"], statusJSON: protocol == protocolV4 || protocol == protocolV5,
		gone: c.done, close: release,
		finish: func(ctx context.Context) {
			for _, kind := range []string{"stdout", "stderr", "error", "stdin", "resize"} {
				if st := streams[kind]; st != nil {
					_ = st.CloseWrite()
				}
			}
			c.finish(ctx.Done())
		},
	}
	// A nil *spdyStream must not become an interface that is not nil.
	if st := streams["stdin"]; st != nil {
		rem.stdin = st
	}
	if st := streams["stdout"]; st != nil {
		rem.stdout = st
	}
	if st := streams["stderr"]; st != nil {
		rem.stderr = st
	}
	if st := streams["resize"]; st != nil {
		rem.resize = st
	}
	return rem
}
