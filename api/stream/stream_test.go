package stream

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"
)

// readFrame reads a frame as a client does: io.EOF is the end between frames.
func readFrame(r io.Reader) (stream int, p []byte, err error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return 0, nil, err
	}
	p = make([]byte, binary.BigEndian.Uint32(header[4:]))
	_, err = io.ReadFull(r, p)
	return int(header[0]), p, err
}

func TestFramesRoundTrip(t *testing.T) {
	var buf bytes.Buffer
	f := NewFramer(&buf)
	want := []struct {
		stream int
		data   string
	}{{Stdout, "hello\n"}, {Stderr, strings.Repeat("x", 70000)}, {Stdout, "bye"}}
	for _, w := range want {
		if err := f.WriteFrame(w.stream, []byte(w.data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.WriteFrame(Stdout, nil); err != nil {
		t.Fatal(err)
	}
	if got := buf.Bytes()[:8]; !bytes.Equal(got, []byte{1, 0, 0, 0, 0, 0, 0, 6}) {
		t.Errorf("first header = % x", got)
	}
	r := iotest.OneByteReader(&buf)
	for _, w := range want {
		stream, p, err := readFrame(r)
		if err != nil || stream != w.stream || string(p) != w.data {
			t.Fatalf("got %d %d bytes %v, want %d %d bytes", stream, len(p), err, w.stream, len(w.data))
		}
	}
	if _, _, err := readFrame(r); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
}

func TestParseDetachKeys(t *testing.T) {
	for in, want := range map[string][]byte{
		"":                 {16, 17},
		"ctrl-p,ctrl-q":    {16, 17},
		"ctrl-@":           {0},
		"ctrl-[,a":         {27, 'a'},
		"CTRL-\\,ctrl-_,:": {28, 31, ':'},
	} {
		got, err := ParseDetachKeys(in)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("ParseDetachKeys(%q) = %v, %v, want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"ctrl-", "ctrl-1", "ab", "a,,b", "alt-x", "ctrl-pp"} {
		if got, err := ParseDetachKeys(in); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("ParseDetachKeys(%q) = %v, %v", in, got, err)
		}
	}
}

func TestDetachReader(t *testing.T) {
	for _, tt := range []struct {
		name, keys, in, want string
		detached             bool
	}{
		{"none", "ab", "xyz", "xyz", false},
		{"at once", "ab", "ab", "", true},
		{"after text", "ab", "helloabrest", "hello", true},
		{"prefix only", "ab", "xa", "xa", false},
		{"prefix broken", "ab", "axab", "ax", true},
		{"prefix twice", "ab", "aab", "a", true},
		{"self overlap", "aab", "aaab", "a", true},
		{"overlap broken", "abac", "ababac", "ab", true},
		{"one key", "q", "xxqx", "xx", true},
		{"no keys", "", "abc", "abc", false},
	} {
		for kind, wrap := range map[string]func(io.Reader) io.Reader{
			"whole": func(r io.Reader) io.Reader { return r },
			"bytes": iotest.OneByteReader,
			"eof":   iotest.DataErrReader,
		} {
			got, err := io.ReadAll(NewDetachReader(wrap(strings.NewReader(tt.in)), []byte(tt.keys)))
			if string(got) != tt.want || errors.Is(err, ErrDetached) != tt.detached {
				t.Errorf("%s/%s: got %q, %v, want %q, detached %v", tt.name, kind, got, err, tt.want, tt.detached)
			}
		}
	}
}

func FuzzDetachReader(f *testing.F) {
	f.Add([]byte("ab"), []byte("aab"))
	f.Fuzz(func(t *testing.T, keys, in []byte) {
		if len(keys) == 0 {
			return
		}
		got, err := io.ReadAll(NewDetachReader(iotest.HalfReader(bytes.NewReader(in)), keys))
		want, _, found := bytes.Cut(in, keys)
		if !bytes.Equal(got, want) || errors.Is(err, ErrDetached) != found {
			t.Errorf("keys %q in %q: got %q, %v, want %q, %v", keys, in, got, err, want, found)
		}
	})
}

// process is a Process whose output a test writes and whose input it reads.
type process struct {
	frames chan string
	stdin  bytes.Buffer
	mu     sync.Mutex
	eof    chan struct{}
	closed chan struct{}
	once   sync.Once
	echo   bool // end when stdin ends
}

func newProcess() *process {
	return &process{frames: make(chan string, 10), eof: make(chan struct{}), closed: make(chan struct{})}
}

func (p *process) ReadFrame() (int, []byte, error) {
	select {
	case s, ok := <-p.frames:
		if !ok {
			return 0, nil, io.EOF
		}
		return Stdout, []byte(s), nil
	case <-p.closed:
		return 0, nil, net.ErrClosed
	}
}

func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stdin.Write(b)
}

func (p *process) CloseWrite() error {
	close(p.eof)
	if p.echo {
		p.mu.Lock()
		p.frames <- "got " + p.stdin.String()
		p.mu.Unlock()
		close(p.frames)
	}
	return nil
}

func (p *process) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

// serve runs an HTTP server on a unix socket whose every request is pumped to p, and gives a
// client connection on which the answer's header has been read.
func serve(t *testing.T, p *process, o PumpOptions, upgrade string) (*net.UnixConn, *bufio.Reader, <-chan error) {
	t.Helper()
	l, err := Listen(filepath.Join(t.TempDir(), "s"), -1)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	srv := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := Hijack(w, r, MediaTypeMultiplexed)
		if err != nil {
			done <- err
			return
		}
		done <- Pump(context.WithoutCancel(r.Context()), c, p, NewFramer(c), o)
	})}}
	srv.Start()
	t.Cleanup(srv.Close)
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	req := "POST /attach HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n"
	if upgrade != "" {
		req += "Connection: Upgrade\r\nUpgrade: " + upgrade + "\r\n"
	}
	// Bytes right behind the request must not get lost in the server's buffer.
	if _, err := io.WriteString(c, req+"\r\nearly "); err != nil {
		t.Fatal(err)
	}
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, &http.Request{Method: "POST"})
	if err != nil {
		t.Fatal(err)
	}
	want := http.StatusOK
	if upgrade != "" {
		want = http.StatusSwitchingProtocols
	}
	if resp.StatusCode != want || resp.Header.Get("Content-Type") != MediaTypeMultiplexed {
		t.Fatalf("answer %s %v", resp.Status, resp.Header)
	}
	return c.(*net.UnixConn), br, done
}

func wait(t *testing.T, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(5 * time.Minute):
		t.Fatal("the pump did not end")
		return nil
	}
}

func TestPumpHalfClose(t *testing.T) {
	t.Parallel()
	for _, upgrade := range []string{"", "tcp"} {
		p := newProcess()
		p.echo = true
		c, br, done := serve(t, p, PumpOptions{Stdin: true, Output: true}, upgrade)
		io.WriteString(c, "late")
		c.CloseWrite()
		_, frame, err := readFrame(br)
		if err != nil || string(frame) != "got early late" {
			t.Errorf("upgrade %q: %q, %v", upgrade, frame, err)
		}
		if _, err := br.ReadByte(); !errors.Is(err, io.EOF) {
			t.Errorf("upgrade %q: after the output: %v", upgrade, err)
		}
		c.Close()
		if err := wait(t, done); err != nil {
			t.Errorf("upgrade %q: %v", upgrade, err)
		}
	}
}

func TestPumpEndsCleanlyOverUnreadInput(t *testing.T) {
	t.Parallel()
	p := newProcess()
	c, br, done := serve(t, p, PumpOptions{Output: true}, "tcp")
	io.WriteString(c, strings.Repeat("x", 100000))
	p.frames <- "bye"
	close(p.frames)
	if _, frame, err := readFrame(br); err != nil || string(frame) != "bye" {
		t.Errorf("%q, %v", frame, err)
	}
	if _, err := br.ReadByte(); !errors.Is(err, io.EOF) {
		t.Errorf("after the output: %v", err)
	}
	c.Close()
	if err := wait(t, done); err != nil {
		t.Error(err)
	}
}

func TestPumpClientLeaves(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]PumpOptions{
		"output":    {Output: true},
		"both":      {Stdin: true, Output: true},
		"keepstdin": {Stdin: true, Output: true, KeepStdin: true},
		"input":     {Stdin: true},
	} {
		p := newProcess()
		c, _, done := serve(t, p, o, "tcp")
		c.Close()
		if err := wait(t, done); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		select {
		case <-p.closed:
		default:
			t.Errorf("%s: still attached", name)
		}
	}
}

func TestPumpDetach(t *testing.T) {
	t.Parallel()
	p := newProcess()
	c, br, done := serve(t, p, PumpOptions{Stdin: true, Output: true, DetachKeys: []byte{16, 17}}, "tcp")
	c.Write([]byte("ls\n\x10\x11"))
	if err := wait(t, done); !errors.Is(err, ErrDetached) {
		t.Errorf("err = %v", err)
	}
	if _, err := br.ReadByte(); err == nil {
		t.Error("still attached")
	}
	if got := p.stdin.String(); got != "early ls\n" {
		t.Errorf("stdin got %q", got)
	}
	select {
	case <-p.eof:
		t.Error("stdin was closed")
	default:
	}
}

func TestPumpContext(t *testing.T) {
	t.Parallel()
	a, b := net.Pipe()
	defer b.Close()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	conn := &Conn{Conn: a, closed: make(chan struct{})}
	go func() { done <- Pump(ctx, conn, newProcess(), Raw{conn}, PumpOptions{Stdin: true, Output: true}) }()
	cancel()
	if err := wait(t, done); err != nil {
		t.Error(err)
	}
}

func TestHijackKeepsHeadersClean(t *testing.T) {
	if got := token("tcp\r\nEvil: 1"); strings.ContainsAny(got, "\r\n ") {
		t.Errorf("token = %q", got)
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.sock")
	l, err := Listen(path, os.Getgid())
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode() != os.ModeSocket|0o660 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	if _, err := Listen(path, -1); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("served twice: %v", err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	l, err = Listen(path, -1)
	if err != nil {
		t.Fatalf("stale socket: %v", err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode() != os.ModeSocket|0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	l.Close()

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{file, link, dir} {
		if _, err := Listen(p, -1); !errors.Is(err, errdefs.ErrFailedPrecondition) {
			t.Errorf("Listen(%s): %v", p, err)
		}
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "x" {
		t.Errorf("the file was touched: %q, %v", b, err)
	}
	if _, err := Listen(filepath.Join(dir, strings.Repeat("x", 200)), -1); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("long path: %v", err)
	}
}
