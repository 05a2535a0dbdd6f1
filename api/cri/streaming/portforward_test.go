package streaming

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/gorilla/websocket"
	"golang.org/x/sys/unix"
	restclient "k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/streaming/pkg/httpstream"
)

// dialer makes the client of a transport.
func dialer(t *testing.T, transport, address string) httpstream.Dialer {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	cfg := &restclient.Config{Host: u.Host}
	if transport == "websocket" {
		d, err := portforward.NewSPDYOverWebsocketDialerForStreaming(u, cfg)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	rt, up, err := spdy.RoundTripperFor(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return spdy.NewDialerForStreaming(up, &http.Client{Transport: rt}, "POST", u)
}

// forwardPort runs client-go's port-forward and gives the local port.
func forwardPort(t *testing.T, s *Server, transport string, port int) (local uint16, errs *bytes.Buffer, stop func()) {
	t.Helper()
	u, err := s.PortForward("pod", nil)
	if err != nil {
		t.Fatal(err)
	}
	stopc, ready := make(chan struct{}), make(chan struct{})
	errs = new(bytes.Buffer)
	f, err := portforward.NewForStreaming(dialer(t, transport, u), []string{"0:" + strconv.Itoa(port)}, stopc, ready, io.Discard, errs)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- f.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	case <-time.After(5 * time.Minute):
		t.Fatal("not ready")
	}
	ports, err := f.GetPorts()
	if err != nil {
		t.Fatal(err)
	}
	return ports[0].Local, errs, func() { close(stopc); <-done }
}

func TestPortForward(t *testing.T) {
	// The pod answers when the client has ended its direction.
	port := listen(t, func(c *net.TCPConn) {
		b, err := io.ReadAll(c)
		if err != nil {
			return
		}
		fmt.Fprintf(c, "got %d bytes", len(b))
	})
	big := listen(t, func(c *net.TCPConn) { _, _ = io.Copy(c, io.LimitReader(endless{}, 20<<20)) })
	for _, transport := range []string{"spdy", "websocket"} {
		t.Run(transport, func(t *testing.T) {
			rt := newFake()
			s := start(t, rt, nil)
			local, _, stop := forwardPort(t, s, transport, port)
			conns := make([]*net.TCPConn, 5) // side by side
			for i := range conns {
				c, err := net.Dial("tcp", fmt.Sprintf("localhost:%d", local))
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				conns[i] = c.(*net.TCPConn)
			}
			for i, c := range conns {
				if _, err := c.Write(make([]byte, 100_000*(i+1))); err != nil {
					t.Fatal(err)
				}
				c.CloseWrite()
			}
			for i, c := range conns {
				c.SetDeadline(time.Now().Add(5 * time.Minute))
				b, err := io.ReadAll(c)
				if want := fmt.Sprintf("got %d bytes", 100_000*(i+1)); err != nil || string(b) != want {
					t.Errorf("connection %d: %q, %v", i, b, err)
				}
				if err := rt.await(t); err != nil {
					t.Error(err)
				}
			}
			stop()
			local, _, stop = forwardPort(t, s, transport, big)
			defer stop()
			c, err := net.Dial("tcp", fmt.Sprintf("localhost:%d", local))
			if err != nil {
				t.Fatal(err)
			}
			n, err := io.Copy(io.Discard, c)
			c.Close()
			if n != 20<<20 || err != nil {
				t.Errorf("%d bytes, %v", n, err)
			}
			rt.await(t)
		})
	}
}

// TestPortForwardRefused: one connection that cannot be made leaves others alone.
func TestPortForwardRefused(t *testing.T) {
	port := listen(t, func(c *net.TCPConn) { io.Copy(c, c) })
	// Held, so that nobody else listens there.
	held, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(held)
	if err := unix.Bind(held, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	at, err := unix.Getsockname(held)
	if err != nil {
		t.Fatal(err)
	}
	closed := at.(*unix.SockaddrInet4).Port
	for _, transport := range []string{"spdy", "websocket"} {
		t.Run(transport, func(t *testing.T) {
			rt := newFake()
			s := start(t, rt, nil)
			u, err := s.PortForward("pod", nil)
			if err != nil {
				t.Fatal(err)
			}
			conn, protocol, err := dialer(t, transport, u).Dial("portforward.k8s.io")
			if err != nil || protocol != "portforward.k8s.io" {
				t.Fatal(protocol, err)
			}
			defer conn.Close()
			open := func(port int, id, kind string) httpstream.Stream {
				t.Helper()
				h := http.Header{"port": {strconv.Itoa(port)}, "streamType": {kind}}
				if id != "" {
					h.Set("requestID", id)
				}
				st, err := conn.CreateStream(h)
				if err != nil {
					t.Fatal(err)
				}
				return st
			}
			e1 := open(port, "", "error") // a client without request ids
			d1 := open(port, "", "data")
			e2 := open(closed, "2", "error")
			d2 := open(closed, "2", "data")
			b, err := io.ReadAll(e2)
			if err != nil || !strings.Contains(string(b), fmt.Sprintf("error forwarding port %d to pod pod:", closed)) || !strings.Contains(string(b), "refused") {
				t.Errorf("error stream: %q, %v", b, err)
			}
			if b, err := io.ReadAll(d2); len(b) > 0 || err != nil {
				t.Errorf("data stream: %q, %v", b, err)
			}
			if err := rt.await(t); err == nil {
				t.Error("no error")
			}
			for _, h := range []http.Header{{"port": {"0"}, "streamType": {"data"}}, {"port": {"1"}, "streamType": {"stdin"}}, {"streamType": {"data"}}} {
				st, err := conn.CreateStream(h)
				if err == nil { // the reply comes before the refusal
					if b, err := io.ReadAll(st); len(b) > 0 || err != nil {
						t.Errorf("%v: %q, %v", h, b, err)
					}
				}
			}
			if _, err := d1.Write([]byte("still there")); err != nil {
				t.Fatal(err)
			}
			d1.Close()
			if b, err := io.ReadAll(d1); string(b) != "still there" || err != nil {
				t.Errorf("data: %q, %v", b, err)
			}
			if b, err := io.ReadAll(e1); len(b) > 0 || err != nil {
				t.Errorf("error stream: %q, %v", b, err)
			}
			if err := rt.await(t); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestPortForwardVanish: connections of a client that leaves end.
func TestPortForwardVanish(t *testing.T) {
	ended := make(chan error, 10)
	port := listen(t, func(c *net.TCPConn) {
		_, err := io.Copy(io.Discard, c)
		ended <- err
	})
	rt := newFake()
	s := start(t, rt, func(o *Options) { o.Creation = 200 * time.Millisecond })
	for _, transport := range []string{"spdy", "websocket"} {
		u, err := s.PortForward("pod", nil)
		if err != nil {
			t.Fatal(err)
		}
		conn, _, err := dialer(t, transport, u).Dial("portforward.k8s.io")
		if err != nil {
			t.Fatal(err)
		}
		var streams []httpstream.Stream
		for _, kind := range []string{"error", "data"} {
			st, err := conn.CreateStream(http.Header{"port": {strconv.Itoa(port)}, "requestID": {"1"}, "streamType": {kind}})
			if err != nil {
				t.Fatal(err)
			}
			streams = append(streams, st)
		}
		// A pair that stays half is given up.
		half, err := conn.CreateStream(http.Header{"port": {strconv.Itoa(port)}, "requestID": {"2"}, "streamType": {"error"}})
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(half); err != nil || !strings.Contains(string(b), "timed out") {
			t.Errorf("%q, %v", b, err)
		}
		if _, err := streams[1].Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		conn.Close()
		rt.await(t)
		<-ended
	}
}

func dialWebSocket(t *testing.T, address string, protocols ...string) *websocket.Conn {
	t.Helper()
	d := websocket.Dialer{Subprotocols: protocols}
	c, resp, err := d.Dial(strings.Replace(address, "http", "ws", 1), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if len(protocols) > 0 && c.Subprotocol() != protocols[0] {
		t.Fatalf("protocol %q of %q", c.Subprotocol(), protocols)
	}
	return c
}

// TestPortForwardChannels speaks the old protocol.
func TestPortForwardChannels(t *testing.T) {
	port := listen(t, func(c *net.TCPConn) {
		b := make([]byte, 5)
		io.ReadFull(c, b)
		fmt.Fprintf(c, "you said %s", b)
	})
	rt := newFake()
	s := start(t, rt, nil)
	for _, protocol := range []string{"v4.channel.k8s.io", ""} {
		u, err := s.PortForward("pod", []int32{1, int32(port)}) // nobody listens on port 1
		if err != nil {
			t.Fatal(err)
		}
		var protocols []string
		if protocol != "" {
			protocols = []string{protocol}
		}
		c := dialWebSocket(t, u, protocols...)
		if err := c.WriteMessage(websocket.BinaryMessage, []byte("\x02hello")); err != nil {
			t.Fatal(err)
		}
		got := map[byte][]byte{}
		for {
			_, p, err := c.ReadMessage()
			if err != nil {
				if !websocket.IsCloseError(err, websocket.CloseNormalClosure) {
					t.Error(err)
				}
				break
			}
			got[p[0]] = append(got[p[0]], p[1:]...)
		}
		c.Close()
		rt.await(t)
		rt.await(t)
		le := func(port int) string { return string(binary.LittleEndian.AppendUint16(nil, uint16(port))) }
		if string(got[0]) != le(1) || !strings.HasPrefix(string(got[1]), le(1)+"error forwarding port 1") ||
			string(got[2]) != le(port)+"you said hello" || string(got[3]) != le(port) {
			t.Errorf("%q: %q", protocol, got)
		}
	}
	u, err := s.PortForward("pod", nil)
	if err != nil {
		t.Fatal(err)
	}
	rawUpgrade(t, u, "websocket", http.Header{"Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="}}, 403).Close()
}

// threadsOutside counts the threads that are in another network namespace.
func threadsOutside(t *testing.T, own string) (n int) {
	t.Helper()
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		if ns, err := os.Readlink("/proc/self/task/" + task.Name() + "/ns/net"); err == nil && ns != own {
			n++
		}
	}
	return n
}

// TestDialLoopback enters a namespace and comes back.
func TestDialLoopback(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s", t.Name())
	}
	path := t.TempDir() + "/ns"
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	own, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	listeners := map[string]net.Listener{}
	ready := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		ready <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
				return err
			}
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			ifr, err := unix.NewIfreq("lo")
			if err != nil {
				return err
			}
			ifr.SetUint16(unix.IFF_UP)
			if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
				return err
			}
			for _, a := range []string{"127.0.0.1:7001", "[::1]:7002"} {
				l, err := net.Listen("tcp", a)
				if err != nil {
					return err
				}
				listeners[a] = l
			}
			return nil
		}()
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(path, unix.MNT_DETACH)
	for _, l := range listeners {
		defer l.Close()
	}
	before := openFiles(t)
	for range 20 {
		for _, port := range []uint16{7001, 7002} {
			c, err := dialLoopback(t.Context(), path, port)
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
		}
		if _, err := dialLoopback(t.Context(), path, 7003); !errors.Is(err, unix.ECONNREFUSED) || !errdefs.IsUnavailable(err) {
			t.Fatalf("closed port: %v", err)
		}
		if _, err := dialLoopback(t.Context(), "", 7001); err == nil {
			t.Fatal("the host has that port")
		}
	}
	// Threads end, and connections of tests before, when they come to it.
	for deadline := time.Now().Add(5 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		outside, after := threadsOutside(t, own), openFiles(t)
		if outside <= 1 && after <= before { // one thread is the test's own, if that was the main thread, which cannot end
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d threads stayed in the namespace; %d files before, %d after", outside, before, after)
		}
	}
	file := path + "-file"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	link := path + "-link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{file, path + "-none"} {
		if _, err := dialLoopback(t.Context(), p, 7001); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", p, err)
		}
	}
	if _, err := dialLoopback(t.Context(), link, 7001); err == nil {
		t.Error("a symbolic link was followed")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := dialLoopback(ctx, path, 7001); err == nil {
		t.Error("dialled for nobody")
	}
}
