package streaming

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	restclient "k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	utilexec "k8s.io/client-go/util/exec"
)

func spdyExecutorFor(cfg *restclient.Config, u *url.URL, protocol string) (remotecommand.Executor, error) {
	transport, upgrader, err := spdy.RoundTripperFor(cfg)
	if err != nil {
		return nil, err
	}
	return remotecommand.NewSPDYExecutorForProtocols(transport, upgrader, "POST", u, protocol)
}

// transports are all that client-go's executors speak.
var transports = []string{"spdy", "websocket",
	"spdy:channel.k8s.io", "spdy:v2.channel.k8s.io", "spdy:v3.channel.k8s.io", "spdy:v4.channel.k8s.io", "spdy:v5.channel.k8s.io",
	"websocket:channel.k8s.io", "websocket:v4.channel.k8s.io"}

// hasStatus tells whether a transport reports exit codes.
func hasStatus(transport string) bool {
	return !strings.HasSuffix(transport, ":channel.k8s.io") && !strings.Contains(transport, "v2") && !strings.Contains(transport, "v3")
}

func TestExec(t *testing.T) {
	rt := newFake()
	s := start(t, rt, nil)
	input := bytes.Repeat([]byte("0123456789abcdef"), 100_000) // more than any buffer
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
			defer cancel()
			run := func(o RemoteOptions, in io.Reader) (string, string, error) {
				t.Helper()
				o.ContainerID = "c"
				u, err := s.Exec(o)
				if err != nil {
					t.Fatal(err)
				}
				var out, errs output
				so := remotecommand.StreamOptions{Stdin: in}
				if o.Stdout {
					so.Stdout = &out
				}
				if o.Stderr {
					so.Stderr = &errs
				}
				err = executor(t, transport, u).StreamWithContext(ctx, so)
				rt.await(t)
				return out.String(), errs.String(), err
			}
			// Only v5 can end stdin over WebSocket, and the client's v1 ends it nowhere. Nor
			// does that wait for the error stream.
			v1 := strings.HasSuffix(transport, ":channel.k8s.io")
			if !strings.HasPrefix(transport, "websocket:") && !v1 {
				out, errs, err := run(RemoteOptions{Cmd: []string{"cat"}, Stdin: true, Stdout: true, Stderr: true}, bytes.NewReader(input))
				if err != nil || out != string(input) || errs != "done" {
					t.Errorf("cat: %d bytes of %d, %q, %v", len(out), len(input), errs, err)
				}
			}
			out, _, err := run(RemoteOptions{Cmd: []string{"write", "3000000"}, Stdout: true}, nil)
			if err != nil || len(out) != 3_000_000 {
				t.Errorf("write: %d bytes, %v", len(out), err)
			}
			_, _, err = run(RemoteOptions{Cmd: []string{"exit", "42"}, Stdout: true, Stderr: true}, nil)
			var exit utilexec.ExitError
			switch {
			case v1:
			case hasStatus(transport) && (!errors.As(err, &exit) || exit.ExitStatus() != 42):
				t.Errorf("exit: %v", err)
			case !hasStatus(transport) && (err == nil || !strings.Contains(err.Error(), "exit status 42")):
				t.Errorf("exit: %v", err)
			}
			_, _, err = run(RemoteOptions{Cmd: []string{"fail", "no such program"}, Stderr: true}, nil)
			if !v1 && (err == nil || !strings.Contains(err.Error(), "error executing command in container: no such program")) {
				t.Errorf("fail: %v", err)
			}
			// What the client still sends is no reason to lose the end.
			if !strings.HasPrefix(transport, "websocket:") && !v1 {
				_, _, err = run(RemoteOptions{Cmd: []string{"exit", "3"}, Stdin: true, Stdout: true}, endless{})
				if hasStatus(transport) && (!errors.As(err, &exit) || exit.ExitStatus() != 3) {
					t.Errorf("exit with input: %v", err)
				}
			}
		})
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// sizes gives sizes to a client.
type sizes chan remotecommand.TerminalSize

func (s sizes) Next() *remotecommand.TerminalSize {
	size, ok := <-s
	if !ok {
		return nil
	}
	return &size
}

func TestResize(t *testing.T) {
	rt := newFake()
	s := start(t, rt, nil)
	for _, transport := range []string{"spdy", "spdy:v3.channel.k8s.io", "websocket", "websocket:v4.channel.k8s.io"} {
		u, err := s.Exec(RemoteOptions{ContainerID: "c", Cmd: []string{"size"}, Stdin: true, Stdout: true, TTY: true})
		if err != nil {
			t.Fatal(err)
		}
		q := make(sizes, 3)
		q <- remotecommand.TerminalSize{Width: 80, Height: 24}
		q <- remotecommand.TerminalSize{Width: 0, Height: 0}
		q <- remotecommand.TerminalSize{Width: 200, Height: 50}
		var out bytes.Buffer
		err = executor(t, transport, u).StreamWithContext(t.Context(), remotecommand.StreamOptions{
			Stdin: strings.NewReader(""), Stdout: &out, Tty: true, TerminalSizeQueue: q})
		close(q)
		if err != nil || out.String() != "200x50" {
			t.Errorf("%s: %q, %v", transport, &out, err)
		}
		rt.await(t)
	}
}

func TestAttach(t *testing.T) {
	rt := newFake()
	s := start(t, rt, nil)
	for _, transport := range []string{"spdy", "websocket"} {
		u, err := s.Attach(RemoteOptions{ContainerID: "cat", Stdin: true, Stdout: true, Stderr: true})
		if err != nil {
			t.Fatal(err)
		}
		var out, errs bytes.Buffer
		err = executor(t, transport, u).StreamWithContext(t.Context(), remotecommand.StreamOptions{
			Stdin: strings.NewReader("hello"), Stdout: &out, Stderr: &errs})
		if err != nil || out.String() != "hello" || errs.String() != "done" {
			t.Errorf("%s: %q, %q, %v", transport, &out, &errs, err)
		}
		rt.await(t)
		u, err = s.Attach(RemoteOptions{ContainerID: "fail gone", Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		err = executor(t, transport, u).StreamWithContext(t.Context(), remotecommand.StreamOptions{Stdout: &out})
		if err == nil || !strings.Contains(err.Error(), "error attaching to container: gone") {
			t.Errorf("%s: %v", transport, err)
		}
		rt.await(t)
	}
}

// TestVanish: the call of a client that leaves ends, also if nothing is read or written.
func TestVanish(t *testing.T) {
	rt := newFake()
	s := start(t, rt, nil)
	for _, transport := range []string{"spdy", "websocket", "websocket:v4.channel.k8s.io"} {
		u, err := s.Exec(RemoteOptions{ContainerID: "c", Cmd: []string{"wait"}, Stdin: true, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		in, feed := io.Pipe()
		done := make(chan error, 1)
		go func() {
			done <- executor(t, transport, u).StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: in, Stdout: io.Discard})
		}()
		rt.awaitBegin(t)
		cancel()
		<-done
		feed.Close()
		if err := rt.await(t); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", transport, err)
		}
	}
}

// TestVanishWithInput: also when input is queued that nobody reads.
func TestVanishWithInput(t *testing.T) {
	rt := newFake()
	s := start(t, rt, nil)
	for _, transport := range []string{"spdy", "websocket"} {
		u, err := s.Exec(RemoteOptions{ContainerID: "c", Cmd: []string{"deaf", "1s"}, Stdin: true, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			rt.awaitBegin(t)
			time.Sleep(100 * time.Millisecond) // for the input
			cancel()
		}()
		_ = executor(t, transport, u).StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: endless{}, Stdout: io.Discard})
		cancel()
		rt.await(t)
	}
}

func TestClose(t *testing.T) {
	rt := newFake()
	s := start(t, rt, nil)
	for _, transport := range []string{"spdy", "websocket"} {
		u, err := s.Exec(RemoteOptions{ContainerID: "c", Cmd: []string{"wait"}, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		go executor(t, transport, u).StreamWithContext(t.Context(), remotecommand.StreamOptions{Stdout: io.Discard})
	}
	rt.awaitBegin(t)
	rt.awaitBegin(t)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	rt.await(t)
	rt.await(t)
}

func TestIdle(t *testing.T) {
	rt := newFake()
	s := start(t, rt, func(o *Options) { o.Idle = 2 * time.Second })
	for _, transport := range []string{"spdy", "websocket"} {
		u, err := s.Exec(RemoteOptions{ContainerID: "c", Cmd: []string{"cat"}, Stdin: true, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		in, feed := io.Pipe()
		done := make(chan error, 1)
		go func() {
			done <- executor(t, transport, u).StreamWithContext(t.Context(), remotecommand.StreamOptions{Stdin: in, Stdout: io.Discard})
		}()
		var gap time.Duration // the longest without traffic: a busy machine makes one, which may end it rightly
		last := time.Now()
		write := func() bool {
			_, err := feed.Write([]byte("x"))
			now := time.Now()
			gap, last = max(gap, now.Sub(last)), now
			return err == nil
		}
		write()
		gap = 0        // before the first byte nothing ran
		for range 25 { // traffic keeps it
			time.Sleep(100 * time.Millisecond)
			if !write() {
				break
			}
		}
		rt.await(t)
		if d := time.Since(last); d < 3*time.Second/2 && gap < time.Second {
			t.Errorf("%s: ended %v after traffic, with gaps of at most %v in it", transport, d, gap)
		}
		feed.Close()
		<-done
	}
}

// TestNoStreams: a client that opens no streams is let go.
func TestNoStreams(t *testing.T) {
	rt := newFake()
	s := start(t, rt, func(o *Options) { o.Creation = 100 * time.Millisecond })
	u, err := s.Exec(RemoteOptions{ContainerID: "c", Cmd: []string{"exit", "0"}, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	c := rawUpgrade(t, u, "SPDY/3.1", http.Header{"X-Stream-Protocol-Version": {"v4.channel.k8s.io"}}, 101)
	c.SetReadDeadline(time.Now().Add(5 * time.Minute))
	if _, err := io.ReadAll(c); err != nil {
		t.Errorf("the connection stays: %v", err)
	}
	c.Close()
	select {
	case <-rt.ended:
		t.Error("the command ran")
	default:
	}
}

// rawUpgrade asks for an upgrade and gives the connection behind the answer's head.
func rawUpgrade(t *testing.T, address, upgrade string, h http.Header, status int) net.Conn {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", u.Host)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: %s\r\n", u.Path, u.Host, upgrade)
	h.Write(c)
	io.WriteString(c, "\r\n")
	// Byte by byte: what follows belongs to the caller.
	var head []byte
	one := make([]byte, 1)
	for !bytes.HasSuffix(head, []byte("\r\n\r\n")) {
		if _, err := io.ReadFull(c, one); err != nil {
			t.Fatalf("%v after %q", err, head)
		}
		head = append(head, one...)
	}
	if !strings.HasPrefix(string(head), fmt.Sprintf("HTTP/1.1 %d ", status)) {
		t.Fatalf("answer %q, not %d", head, status)
	}
	return c
}

func TestRefusals(t *testing.T) {
	rt := newFake()
	s := start(t, rt, nil)
	get := func(method, path string, h http.Header) *http.Response {
		t.Helper()
		req, err := http.NewRequest(method, s.base+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		for k, v := range h {
			req.Header[k] = v
		}
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		return resp
	}
	defer http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	path := func() string {
		u, err := s.Exec(RemoteOptions{ContainerID: "c", Cmd: []string{"exit", "0"}, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimPrefix(u, s.base)
	}
	spdy := http.Header{"Connection": {"Upgrade"}, "Upgrade": {"SPDY/3.1"}}
	with := func(h http.Header, k, v string) http.Header {
		h = h.Clone()
		h.Set(k, v)
		return h
	}
	ws := http.Header{"Connection": {"keep-alive, Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="}}
	used := path()
	for _, c := range []struct {
		name, method, path string
		header             http.Header
		want               int
	}{
		{"no token", "GET", "/exec/", nil, 404},
		{"unknown token", "GET", "/exec/" + strings.Repeat("A", 32), nil, 404},
		{"other method", "DELETE", path(), nil, 405},
		{"no upgrade", "POST", used, nil, 400},
		{"a second time", "POST", used, spdy, 404},
		{"for something else", "POST", strings.Replace(path(), "exec", "attach", 1), spdy, 404},
		{"no protocol", "POST", path(), spdy, 400},
		{"no common protocol", "POST", path(), with(spdy, "X-Stream-Protocol-Version", "v9.channel.k8s.io"), 403},
		{"no common WebSocket protocol", "GET", path(), with(ws, "Sec-Websocket-Protocol", "v9.channel.k8s.io"), 403},
		{"bad WebSocket", "GET", path(), with(ws, "Sec-Websocket-Version", "1"), 400},
	} {
		resp := get(c.method, c.path, c.header)
		if resp.StatusCode != c.want {
			t.Errorf("%s: %s", c.name, resp.Status)
		}
		if c.name == "no common protocol" && len(resp.Header.Values("X-Accepted-Stream-Protocol-Versions")) != 5 {
			t.Errorf("accepted protocols: %v", resp.Header)
		}
	}
	for _, o := range []RemoteOptions{
		{Cmd: []string{"x"}, Stdout: true}, {ContainerID: "c", Stdout: true}, {ContainerID: "c", Cmd: []string{"x"}},
		{ContainerID: "c", Cmd: []string{"x"}, TTY: true, Stderr: true},
	} {
		if _, err := s.Exec(o); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	if _, err := s.PortForward("", nil); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("no sandbox: %v", err)
	}
	if _, err := s.PortForward("s", []int32{70000}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("bad port: %v", err)
	}
}

func TestListenAddress(t *testing.T) {
	for _, c := range []struct {
		addr string
		tls  bool
		ok   bool
	}{
		{"127.0.0.1:0", false, true}, {"localhost:0", false, true}, {"[::1]:80", false, true}, {"127.9.9.9:1", false, true},
		{"0.0.0.0:0", false, false}, {"[::]:0", false, false}, {":0", false, false}, {"10.0.0.1:80", false, false},
		{"0.0.0.0:0", true, true}, {":0", true, true}, {"10.0.0.1:80", true, true},
		{"example.org:80", true, false}, {"127.0.0.1", false, false}, {"", false, false}, {"[::ffff:8.8.8.8]:1", false, false},
	} {
		if _, err := listenAddress(c.addr, c.tls); (err == nil) != c.ok || err != nil && !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%q, TLS %v: %v", c.addr, c.tls, err)
		}
	}
}

func certificate(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func TestTLS(t *testing.T) {
	rt := newFake()
	s := start(t, rt, func(o *Options) {
		o.Address = "0.0.0.0:0"
		o.TLS = &tls.Config{Certificates: []tls.Certificate{certificate(t)}}
	})
	for _, transport := range []string{"spdy", "websocket"} {
		u, err := s.Exec(RemoteOptions{ContainerID: "c", Cmd: []string{"cat"}, Stdin: true, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(u, "https://127.0.0.1:") {
			t.Fatal(u)
		}
		var out bytes.Buffer
		err = executor(t, transport, u).StreamWithContext(t.Context(), remotecommand.StreamOptions{Stdin: strings.NewReader("secret"), Stdout: &out})
		if err != nil || out.String() != "secret" {
			t.Errorf("%s: %q, %v", transport, &out, err)
		}
		rt.await(t)
	}
}
