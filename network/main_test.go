package network

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hako-engine/hako/network/internal/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m, prepareNamespace) }

var testNumber atomic.Int32

// options gives a Manager of its own bridge, subnet and table.
func options(t testing.TB) Options {
	n := testNumber.Add(1)
	dir := t.TempDir()
	resolv := filepath.Join(dir, "resolv.conf")
	if err := os.WriteFile(resolv, []byte("nameserver 192.0.2.53\nsearch example.test\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return Options{
		Root: filepath.Join(dir, "root"), State: filepath.Join(dir, "state"), BridgeName: fmt.Sprintf("hktest%d", n),
		BridgeSubnet: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 99, byte(n), 0}), 24),
		Pools: []Pool{
			{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 100, byte(n), 0}), 24), 27},
			{netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0, 0, 1, 0, byte(n)}), 48), 64},
		},
		ResolvConf: resolv, HealEvery: 200 * time.Millisecond,
		Log: slog.New(slog.NewTextHandler(testWriter{t}, nil)),
	}
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// manager opens a Manager that is purged at the end of the test.
func manager(t testing.TB, o Options) *Manager {
	t.Helper()
	m, err := Open(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Purge(context.Background()); err != nil {
			t.Error("purge:", err)
		}
		if err := m.Close(); err != nil {
			t.Error("close:", err)
		}
	})
	return m
}

// box is a sandbox of a test.
type box struct {
	t    testing.TB
	m    *Manager
	id   string
	path string
}

func newBox(t testing.TB, m *Manager, id string) *box {
	t.Helper()
	path, err := m.NewNetns(context.Background(), id)
	if err != nil {
		t.Fatal(err)
	}
	return &box{t, m, id, path}
}

func (b *box) connect(network string, set func(*EndpointConfig)) Endpoint {
	b.t.Helper()
	c := EndpointConfig{ID: b.id, Network: network, Netns: b.path, Name: b.id}
	if set != nil {
		set(&c)
	}
	e, err := b.m.Connect(context.Background(), c)
	if err != nil {
		b.t.Fatal(err)
	}
	return e
}

func (b *box) remove(networks ...string) {
	b.t.Helper()
	for _, n := range networks {
		if err := b.m.Disconnect(context.Background(), n, b.id); err != nil {
			b.t.Error(err)
		}
	}
	if err := b.m.DeleteNetns(context.Background(), b.path); err != nil {
		b.t.Error(err)
	}
}

// run runs fn inside the sandbox.
func (b *box) run(fn func() error) error {
	return inPath(b.m, b.path, fn)
}

func inPath(m *Manager, path string, fn func() error) error {
	ns, err := os.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	return m.inNamespace(ns, fn)
}

// serve answers TCP and UDP on port with "id sees CLIENT" until the test ends.
func (b *box) serve(port uint16) {
	b.t.Helper()
	var l net.Listener
	var pc net.PacketConn
	err := b.run(func() (err error) {
		if l, err = net.Listen("tcp", fmt.Sprintf(":%d", port)); err != nil {
			return err
		}
		pc, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port))
		return err
	})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { l.Close(); pc.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.WriteString(c, b.id+" sees "+hostOf(c.RemoteAddr()))
			}()
		}
	}()
	go func() {
		buf := make([]byte, 1500)
		for {
			_, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			pc.WriteTo([]byte(b.id+" sees "+hostOf(from)), from)
		}
	}()
}

func hostOf(a net.Addr) string {
	h, _, _ := net.SplitHostPort(a.String())
	return h
}

const patience = 5 * time.Minute // ends what hangs

// ask connects to addr ("tcp" or "udp") and gives what the server says.
func ask(proto, addr string, wait time.Duration) (string, error) {
	c, err := net.DialTimeout(proto, addr, wait)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(wait))
	if proto == "udp" {
		if _, err := c.Write([]byte("x")); err != nil {
			return "", err
		}
		buf := make([]byte, 1500)
		n, err := c.Read(buf)
		return string(buf[:n]), err
	}
	out, err := io.ReadAll(c)
	return string(out), err
}

func (b *box) ask(proto, addr string, wait time.Duration) (out string, err error) {
	err = b.run(func() (err error) { out, err = ask(proto, addr, wait); return err })
	return out, err
}
