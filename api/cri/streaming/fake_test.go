package streaming

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	restclient "k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
)

// fakeRuntime runs small built-in commands, and forwards to ports of this machine.
type fakeRuntime struct {
	mu    sync.Mutex
	sizes []Size
	begun chan struct{} // one for each call of Exec, as long as somebody counts them
	ended chan error    // one for each call that returned
}

func newFake() *fakeRuntime {
	return &fakeRuntime{begun: make(chan struct{}, 100), ended: make(chan error, 100)}
}

func (f *fakeRuntime) Exec(ctx context.Context, id string, cmd []string, s Streams) (code int, err error) {
	defer func() { f.ended <- err }()
	select {
	case f.begun <- struct{}{}:
	default:
	}
	switch cmd[0] {
	case "cat": // stdin to stdout, then a word to stderr
		_, err := io.Copy(s.Stdout, s.Stdin)
		if s.Stderr != nil {
			fmt.Fprint(s.Stderr, "done")
		}
		return 0, err
	case "write": // so many bytes
		n, _ := strconv.Atoi(cmd[1])
		_, err := s.Stdout.Write(bytes.Repeat([]byte("x"), n))
		return 0, err
	case "exit":
		code, _ := strconv.Atoi(cmd[1])
		return code, nil
	case "fail":
		return 0, errors.New(cmd[1])
	case "wait": // until the client leaves
		<-ctx.Done()
		return 0, ctx.Err()
	case "deaf": // does not read, for so long
		d, _ := time.ParseDuration(cmd[1])
		time.Sleep(d)
		return 0, nil
	case "size":
		for {
			select {
			case size := <-s.Resize:
				f.mu.Lock()
				f.sizes = append(f.sizes, size)
				f.mu.Unlock()
				if size.Width == 200 {
					fmt.Fprintf(s.Stdout, "%dx%d", size.Width, size.Height)
					return 0, nil
				}
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}
	}
	return 127, nil
}

func (f *fakeRuntime) Attach(ctx context.Context, id string, s Streams) (err error) {
	_, err = f.Exec(ctx, id, strings.Fields(id), s)
	return err
}

func (f *fakeRuntime) PortForward(ctx context.Context, id string, port uint16, c Conn) (err error) {
	defer func() { f.ended <- err }()
	b, err := dialLoopback(ctx, "", port)
	if err != nil {
		return err
	}
	proxy(ctx, c, b)
	return nil
}

// awaitBegin waits until a command runs.
func (f *fakeRuntime) awaitBegin(t *testing.T) {
	t.Helper()
	select {
	case <-f.begun:
	case <-time.After(5 * time.Minute):
		t.Fatalf("nothing was called; goroutines:\n%s", stacks())
	}
}

// await is the result of the next call that returns.
func (f *fakeRuntime) await(t *testing.T) error {
	t.Helper()
	select {
	case err := <-f.ended:
		return err
	case <-time.After(5 * time.Minute):
		t.Fatalf("the call did not return; goroutines:\n%s", stacks())
		return nil
	}
}

func stacks() []byte {
	buf := make([]byte, 1<<20)
	return buf[:runtime.Stack(buf, true)]
}

// start serves until the end of the test, and checks that nothing of it is left then.
// Tests that use it do not run in parallel, because they count.
func start(t *testing.T, rt Runtime, change func(*Options)) *Server {
	t.Helper()
	goroutines, files := len(ours()), openFiles(t)
	o := Options{Runtime: rt}
	if change != nil {
		change(&o)
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve() }()
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
		deadline := time.Now().Add(5 * time.Minute)
		for len(ours()) > goroutines || openFiles(t) > files {
			if time.Now().After(deadline) {
				t.Fatalf("%d goroutines and %d files before, %d and %d after:\n%s", goroutines, files, len(ours()), openFiles(t), strings.Join(ours(), "\n\n"))
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
	return s
}

// ours are the goroutines that run code of this package, without tests.
func ours() (out []string) {
	for g := range strings.SplitSeq(string(stacks()), "\n\n") {
		for line := range strings.Lines(g) {
			if strings.Contains(line, "/api/cri/streaming/") && !strings.Contains(line, "_test.go") {
				out = append(out, g)
				break
			}
		}
	}
	return out
}

func openFiles(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// executor makes the client of a transport: spdy, or websocket, or a protocol's name.
func executor(t *testing.T, transport, address string) remotecommand.Executor {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	cfg := &restclient.Config{Host: u.Host, TLSClientConfig: restclient.TLSClientConfig{Insecure: u.Scheme == "https"}}
	var x remotecommand.Executor
	switch kind, protocol, _ := strings.Cut(transport, ":"); {
	case kind == "spdy" && protocol == "":
		x, err = remotecommand.NewSPDYExecutor(cfg, "POST", u)
	case kind == "spdy":
		x, err = spdyExecutorFor(cfg, u, protocol)
	case protocol == "":
		x, err = remotecommand.NewWebSocketExecutor(cfg, "GET", address)
	default:
		x, err = remotecommand.NewWebSocketExecutorForProtocols(cfg, "GET", address, protocol)
	}
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// output can be read while it is written: a client of v1 does not wait for its goroutines.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// listen serves one connection at a time on a port of this machine.
func listen(t *testing.T, serve func(*net.TCPConn)) (port int) {
	t.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	work.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			work.Go(func() { defer c.Close(); serve(c) })
		}
	})
	t.Cleanup(func() { l.Close(); work.Wait() })
	return l.Addr().(*net.TCPAddr).Port
}
