package streaming

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	restclient "k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	utilexec "k8s.io/client-go/util/exec"

	"github.com/hako-engine/hako/api/cri/streaming"
	"github.com/hako-engine/hako/engine"
)

// serve gives a streaming server on the engine. A container stands for its pod.
func serve(t *testing.T, e *engine.Engine) *streaming.Server {
	t.Helper()
	s, err := streaming.New(streaming.Options{Runtime: &streaming.EngineRuntime{Engine: e,
		Netns: func(ctx context.Context, id string) (string, error) {
			c, err := e.Container(ctx, id)
			return c.SandboxKey, err
		}}})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve() }()
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), <-done); err != nil {
			t.Error(err)
		}
	})
	return s
}

func executor(t *testing.T, transport, address string) remotecommand.Executor {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	cfg := &restclient.Config{Host: u.Host}
	x, err := remotecommand.NewSPDYExecutor(cfg, "POST", u)
	if transport == "websocket" {
		x, err = remotecommand.NewWebSocketExecutor(cfg, "GET", address)
	}
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// sizes gives sizes to a client.
type sizes chan remotecommand.TerminalSize

func (s sizes) Next() *remotecommand.TerminalSize {
	size, ok := <-s
	if !ok {
		return nil
	}
	return &size
}

// output can be read while it is written.
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

// await waits until the output holds a text.
func (o *output) await(t *testing.T, text string) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Minute); !strings.Contains(o.String(), text); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %q in %q", text, o)
		}
	}
}

var transports = []string{"spdy", "websocket"}

func TestExec(t *testing.T) {
	e := open(t)
	id := run(t, e, nil)
	nothingLeft(t, e, id)
	s := serve(t, e)
	exec := func(transport string, o streaming.RemoteOptions, so remotecommand.StreamOptions) error {
		t.Helper()
		o.ContainerID = id
		u, err := s.Exec(o)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		return executor(t, transport, u).StreamWithContext(ctx, so)
	}
	input := bytes.Repeat([]byte("0123456789abcdef"), 100_000)
	for _, transport := range transports {
		var out, errs output
		err := exec(transport, streaming.RemoteOptions{Cmd: []string{"sh", "-c", "cat; echo end >&2; exit 5"}, Stdin: true, Stdout: true, Stderr: true},
			remotecommand.StreamOptions{Stdin: bytes.NewReader(input), Stdout: &out, Stderr: &errs})
		var exit utilexec.ExitError
		if out.String() != string(input) || errs.String() != "end\n" || !errors.As(err, &exit) || exit.ExitStatus() != 5 {
			t.Errorf("%s: %d bytes, %q, %v", transport, len(out.String()), &errs, err)
		}
		out = output{}
		err = exec(transport, streaming.RemoteOptions{Cmd: []string{"no-such-program"}, Stdout: true}, remotecommand.StreamOptions{Stdout: &out})
		if err == nil || !strings.Contains(err.Error(), "no-such-program") {
			t.Errorf("%s: %v", transport, err)
		}
		// The size is there before the program is.
		q := make(sizes, 1)
		q <- remotecommand.TerminalSize{Width: 101, Height: 37}
		out = output{}
		err = exec(transport, streaming.RemoteOptions{Cmd: []string{"sh", "-c", "stty size; tty"}, Stdin: true, Stdout: true, TTY: true},
			remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: &out, Tty: true, TerminalSizeQueue: q})
		if err != nil || out.String() != "37 101\r\n/dev/pts/0\r\n" && !strings.HasPrefix(out.String(), "37 101\r\n/dev/pts/") {
			t.Errorf("%s: %q, %v", transport, &out, err)
		}
		close(q)
		// And follows.
		q = make(sizes, 2)
		q <- remotecommand.TerminalSize{Width: 80, Height: 24}
		out = output{}
		in, feed := io.Pipe()
		done := make(chan error, 1)
		go func() {
			done <- exec(transport, streaming.RemoteOptions{Cmd: []string{"sh", "-c", `echo ready; until [ "$(stty size)" = "40 120" ]; do sleep 0.05; done; read x; stty size`}, Stdin: true, Stdout: true, TTY: true},
				remotecommand.StreamOptions{Stdin: in, Stdout: &out, Tty: true, TerminalSizeQueue: q})
		}()
		out.await(t, "ready")
		q <- remotecommand.TerminalSize{Width: 120, Height: 40}
		fmt.Fprint(feed, "x\n")
		out.await(t, "40 120")
		if err := <-done; err != nil {
			t.Errorf("%s: %v", transport, err)
		}
		close(q)
		feed.Close()
	}
}

// TestExecVanish: the client's leaving ends input, hangs up a terminal, and leaves
// another command alone.
func TestExecVanish(t *testing.T) {
	e := open(t)
	id := run(t, e, nil)
	nothingLeft(t, e, id)
	s := serve(t, e)
	for _, transport := range transports {
		for _, c := range []struct {
			cmd  string
			tty  bool
			stay bool
		}{
			{"echo ready; sleep 3001", true, false},
			{"echo ready; cat; true", false, false},
			{"echo ready; sleep 3003", false, true},
		} {
			u, err := s.Exec(streaming.RemoteOptions{ContainerID: id, Cmd: []string{"sh", "-c", c.cmd}, Stdin: true, Stdout: true, TTY: c.tty})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			in, feed := io.Pipe()
			var out output
			done := make(chan struct{})
			go func() {
				defer close(done)
				_ = executor(t, transport, u).StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: in, Stdout: &out, Tty: c.tty})
			}()
			out.await(t, "ready")
			cancel()
			<-done
			feed.Close()
			if c.stay {
				time.Sleep(300 * time.Millisecond)
				if left := commands(t, e, id); !slices.Contains(left, "sleep 3003") {
					t.Errorf("%s: %q was ended: %q", transport, c.cmd, left)
				}
				if _, _, _, err := execSync(e, t.Context(), id, killOthers, 0); err != nil {
					t.Fatal(err)
				}
			}
			for deadline := time.Now().Add(5 * time.Minute); len(commands(t, e, id)) > 0; time.Sleep(20 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Errorf("%s: %q goes on: %q", transport, c.cmd, commands(t, e, id))
					break
				}
			}
		}
	}
}

func TestAttach(t *testing.T) {
	e := open(t)
	for _, transport := range transports {
		for _, once := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s stdinOnce %v", transport, once), func(t *testing.T) {
				id := run(t, e, func(c *engine.Config) {
					c.OpenStdin, c.StdinOnce = true, once
					c.Cmd = []string{"sh", "-c", "while read x; do echo got $x; done; echo end; exit 4"}
				})
				s := serve(t, e)
				attach := func(in io.Reader, out io.Writer) chan error {
					t.Helper()
					u, err := s.Attach(streaming.RemoteOptions{ContainerID: id, Stdin: true, Stdout: true, Stderr: true})
					if err != nil {
						t.Fatal(err)
					}
					done := make(chan error, 1)
					ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
					go func() {
						defer cancel()
						done <- executor(t, transport, u).StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: in, Stdout: out, Stderr: out})
					}()
					return done
				}
				var out, second output
				done := attach(strings.NewReader("one\n"), &out)
				out.await(t, "got one")
				if !once {
					// The first client's input has ended, and the container's has not.
					in, feed := io.Pipe()
					other := attach(in, &second)
					fmt.Fprint(feed, "two\n")
					second.await(t, "got two")
					out.await(t, "got two")
					if err := e.KillContainer(t.Context(), id, "KILL"); err != nil {
						t.Fatal(err)
					}
					if err := <-other; err != nil {
						t.Error(err)
					}
					feed.Close()
				} else {
					out.await(t, "end")
				}
				if err := <-done; err != nil { // its exit code is not the attach's
					t.Error(err)
				}
				for deadline := time.Now().Add(5 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
					c, err := e.Container(t.Context(), id)
					if err != nil {
						t.Fatal(err)
					}
					if c.State.Status == engine.StatusExited || time.Now().After(deadline) {
						break
					}
				}
				err := <-attach(strings.NewReader(""), io.Discard)
				if err == nil || !strings.Contains(err.Error(), "exited") {
					t.Errorf("attach to an ended container: %v", err)
				}
			})
		}
	}
}

func TestPortForward(t *testing.T) {
	e := open(t)
	id := run(t, e, func(c *engine.Config) {
		c.Cmd = []string{"sh", "-c", "nc -ll -p 8080 -e cat"}
	})
	s := serve(t, e)
	u, err := s.PortForward(id, nil)
	if err != nil {
		t.Fatal(err)
	}
	pu, err := url.Parse(u)
	if err != nil {
		t.Fatal(err)
	}
	rt, up, err := spdy.RoundTripperFor(&restclient.Config{Host: pu.Host})
	if err != nil {
		t.Fatal(err)
	}
	stop, ready := make(chan struct{}), make(chan struct{})
	f, err := portforward.NewForStreaming(spdy.NewDialerForStreaming(up, &http.Client{Transport: rt}, "POST", pu), []string{"0:8080"}, stop, ready, io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- f.ForwardPorts() }()
	defer func() { close(stop); <-done }()
	<-ready
	ports, err := f.GetPorts()
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		out, _, _, err := execSync(e, t.Context(), id, []string{"cat", "/proc/net/tcp", "/proc/net/tcp6"}, 5*time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(out), ":1F90 ") { // 8080, LISTEN
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("nobody listens: %s", out)
		}
	}
	c, err := net.Dial("tcp", fmt.Sprintf("localhost:%d", ports[0].Local))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "hello")
	c.(*net.TCPConn).CloseWrite()
	c.SetDeadline(time.Now().Add(5 * time.Minute))
	got, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != "hello" {
		t.Errorf("%q", got)
	}
	r := &streaming.EngineRuntime{Engine: e, Netns: func(context.Context, string) (string, error) { return "", errdefs.ErrNotFound }}
	if err := r.PortForward(t.Context(), "gone", 1, nil); !errdefs.IsNotFound(err) {
		t.Errorf("no sandbox: %v", err)
	}
}
