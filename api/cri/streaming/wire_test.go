package streaming

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/gorilla/websocket"
	"github.com/moby/spdystream/spdy"
)

// TestWebSocketMessages speaks each protocol message by message.
func TestWebSocketMessages(t *testing.T) {
	rt := newFake()
	s := start(t, rt, nil)
	for _, protocol := range []string{"v5.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io", "channel.k8s.io", "base64.channel.k8s.io", ""} {
		t.Run(protocol, func(t *testing.T) {
			u, err := s.Exec(RemoteOptions{ContainerID: "c", Cmd: []string{"cat"}, Stdin: true, Stdout: true, Stderr: true})
			if err != nil {
				t.Fatal(err)
			}
			var protocols []string
			if protocol != "" {
				protocols = []string{protocol, "unknown"}
			}
			c := dialWebSocket(t, u, protocols...)
			defer c.Close()
			text := strings.Contains(protocol, "base64")
			read := func() (byte, string) {
				t.Helper()
				c.SetReadDeadline(time.Now().Add(5 * time.Minute))
				typ, p, err := c.ReadMessage()
				if err != nil {
					t.Fatal(err)
				}
				if text {
					raw, err := base64.StdEncoding.DecodeString(string(p[1:]))
					if err != nil || typ != websocket.TextMessage {
						t.Fatalf("%q, type %d: %v", p, typ, err)
					}
					return p[0] - '0', string(raw)
				}
				if typ != websocket.BinaryMessage {
					t.Fatalf("%q, type %d", p, typ)
				}
				return p[0], string(p[1:])
			}
			write := func(channel byte, data string) {
				t.Helper()
				typ, p := websocket.BinaryMessage, append([]byte{channel}, data...)
				if text {
					typ, p = websocket.TextMessage, append([]byte{'0' + channel}, base64.StdEncoding.EncodeToString([]byte(data))...)
				}
				if err := c.WriteMessage(typ, p); err != nil {
					t.Fatal(err)
				}
			}
			if ch, p := read(); ch != 1 || p != "" {
				t.Fatalf("first message: %d %q", ch, p)
			}
			write(9, "nobody's")
			if err := c.WriteMessage(websocket.BinaryMessage, nil); err != nil {
				t.Fatal(err)
			}
			write(4, `{"Width":80,"Height":24}`)
			write(0, "hello")
			if ch, p := read(); ch != 1 || p != "hello" {
				t.Fatalf("stdout: %d %q", ch, p)
			}
			if protocol != "v5.channel.k8s.io" {
				c.Close()
				rt.await(t)
				return
			}
			write(255, "\x00")
			if ch, p := read(); ch != 2 || p != "done" {
				t.Errorf("stderr: %d %q", ch, p)
			}
			if ch, p := read(); ch != 3 || p != `{"status":"Success"}` {
				t.Errorf("status: %d %q", ch, p)
			}
			if _, _, err := c.ReadMessage(); !websocket.IsCloseError(err, websocket.CloseNormalClosure) {
				t.Errorf("end: %v", err)
			}
			if err := rt.await(t); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestBlockedInput: a client is told that the server lives while its input is not read.
func TestBlockedInput(t *testing.T) {
	var mu sync.Mutex
	called := 0
	p := newPipe(4)
	p.blocked = func() { mu.Lock(); called++; mu.Unlock() }
	done := make(chan struct{})
	go func() { defer close(done); p.Write([]byte("123456")) }()
	b := make([]byte, 10)
	var got []byte
	for len(got) < 6 {
		n, err := p.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, b[:n]...)
	}
	<-done
	p.end(io.EOF)
	if n, err := p.Read(b); n != 0 || err != io.EOF || string(got) != "123456" {
		t.Errorf("%q, %d, %v", got, n, err)
	}
	// Whoever waits to write is let go by either side.
	for _, end := range []func(*pipe){func(p *pipe) { p.Close() }, func(p *pipe) { p.abort(errGone) }} {
		p := newPipe(1)
		done := make(chan struct{})
		go func() { defer close(done); p.Write([]byte("12")) }()
		time.Sleep(10 * time.Millisecond)
		end(p)
		<-done
		if _, err := p.Read(b); err == nil {
			t.Error("no error")
		}
	}
}

func TestTokens(t *testing.T) { synctest.Test(t, testTokens) } // the time is its own

func testTokens(t *testing.T) {
	k := newTokens()
	k.life, k.max = 100*time.Millisecond, 3
	seen := map[string]bool{}
	var last string
	for i := range 3 {
		token, err := k.put(i)
		if err != nil || seen[token] || len(token) != 32 || strings.Trim(token, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			t.Fatalf("%q, %v", token, err)
		}
		seen[token], last = true, token
	}
	if _, err := k.put(3); !errors.Is(err, errdefs.ErrResourceExhausted) {
		t.Errorf("one too many: %v", err)
	}
	if r, ok := k.take(last); !ok || r != 2 {
		t.Errorf("%v, %v", r, ok)
	}
	if _, ok := k.take(last); ok {
		t.Error("a token worked twice")
	}
	var token string
	var err error
	if token, err = k.put(4); err != nil {
		t.Errorf("there is room: %v", err)
	}
	time.Sleep(300 * time.Millisecond)
	synctest.Wait()
	if _, ok := k.take(token); ok {
		t.Error("a token lived too long")
	}
	if len(k.byHash) != 0 {
		t.Errorf("%d tokens are kept", len(k.byHash))
	}
	// One of many askers gets it.
	k.life = time.Minute
	if token, err = k.put(5); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	winners := make(chan any, 20)
	for range 20 {
		wg.Go(func() {
			if r, ok := k.take(token); ok {
				winners <- r
			}
		})
	}
	wg.Wait()
	if len(winners) != 1 {
		t.Errorf("%d askers got it", len(winners))
	}
	k.clear()
}

// TestStreamBound: a client gets no more streams than it may have, and bad frames end
// its connection.
func TestStreamBound(t *testing.T) {
	rt := newFake()
	s := start(t, rt, nil)
	u, err := s.PortForward("pod", nil)
	if err != nil {
		t.Fatal(err)
	}
	c := rawUpgrade(t, u, "SPDY/3.1", http.Header{"X-Stream-Protocol-Version": {"portforward.k8s.io"}}, 101)
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Minute))
	f, err := spdy.NewFramer(c, bufio.NewReader(c))
	if err != nil {
		t.Fatal(err)
	}
	const more = 10
	go func() {
		for i := range 2*maxForwards + more {
			f.WriteFrame(&spdy.SynStreamFrame{StreamId: spdy.StreamId(2*i + 1), Headers: http.Header{
				"Port": {"1"}, "Streamtype": {"error"}, "Requestid": {strings.Repeat("x", i)}}})
		}
	}()
	replies, refusals := 0, 0
	for replies+refusals < 2*maxForwards+more {
		frame, err := f.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		switch frame.(type) {
		case *spdy.SynReplyFrame:
			replies++
		case *spdy.RstStreamFrame:
			refusals++
		}
	}
	if replies != 2*maxForwards || refusals != more {
		t.Errorf("%d replies, %d refusals", replies, refusals)
	}
	if err := f.WriteFrame(&spdy.PingFrame{Id: 7}); err != nil {
		t.Fatal(err)
	}
	if frame, err := f.ReadFrame(); err != nil || frame.(*spdy.PingFrame).Id != 7 {
		t.Errorf("ping: %v, %v", frame, err)
	}
	if _, err := c.Write([]byte{0x80, 3, 0, 99, 0, 0, 0, 0}); err != nil { // there is no such frame
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, c); err != nil {
		t.Errorf("the connection stays: %v", err)
	}
}

// FuzzURL: no path reaches a request but the one that was given.
func FuzzURL(f *testing.F) {
	s, err := New(Options{Runtime: newFake()})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { s.Close() })
	for _, seed := range []string{"/exec/", "/exec/AAAA", "/attach/../exec/x", "/portforward/%2e%2e/%00", "//exec//", "/exec/" + strings.Repeat("A", 32), "/exec/" + strings.Repeat("A", 32) + "?x=y#z"} {
		f.Add(seed, "SPDY/3.1", "v4.channel.k8s.io, v3.channel.k8s.io")
	}
	f.Fuzz(func(t *testing.T, path, upgrade, protocol string) {
		req, err := http.NewRequest("GET", "http://x/", nil)
		if err != nil {
			t.Fatal(err)
		}
		if req.URL, err = req.URL.Parse(path); err != nil {
			return
		}
		req.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {upgrade}, "X-Stream-Protocol-Version": {protocol}, "Sec-Websocket-Protocol": {protocol}}
		w := httptest.NewRecorder()
		s.http.Handler.ServeHTTP(w, req)
		if w.Code < 300 {
			t.Errorf("%q: %d", path, w.Code)
		}
		// The upgrade alone, as behind a good token: a recorder cannot be taken over.
		w = httptest.NewRecorder()
		s.serveExec(w, req, execRequest{RemoteOptions{ContainerID: "c", Cmd: []string{"exit", "0"}, Stdout: true}})
		if w.Code < 400 {
			t.Errorf("%q, %q: %d", upgrade, protocol, w.Code)
		}
	})
}

// FuzzSPDY: whatever a client sends, the reader ends, and holds no more than it may.
func FuzzSPDY(f *testing.F) {
	var b bytes.Buffer
	fr, err := spdy.NewFramer(&b, &b)
	if err != nil {
		f.Fatal(err)
	}
	fr.WriteFrame(&spdy.SynStreamFrame{StreamId: 1, Headers: http.Header{"Streamtype": {"data"}, "Port": {"80"}}})
	fr.WriteFrame(&spdy.DataFrame{StreamId: 1, Data: []byte("hello")})
	fr.WriteFrame(&spdy.PingFrame{Id: 1})
	fr.WriteFrame(&spdy.DataFrame{StreamId: 1, Flags: spdy.DataFlagFin})
	fr.WriteFrame(&spdy.RstStreamFrame{StreamId: 1, Status: spdy.Cancel})
	fr.WriteFrame(&spdy.GoAwayFrame{})
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, in []byte) {
		conn := struct {
			io.Reader
			io.Writer
			io.Closer
		}{bytes.NewReader(in), io.Discard, io.NopCloser(nil)}
		n := 0
		c := newSPDY(conn, bufio.NewReader(conn), 1<<20, 4, func(s *spdyStream) error {
			if n++; n%3 == 0 {
				return errReset
			}
			s.Close()
			return nil
		})
		done := make(chan struct{})
		go func() { defer close(done); c.serve() }()
		select {
		case <-done:
		case <-time.After(5 * time.Minute):
			t.Fatal("the reader hangs")
		}
	})
}
