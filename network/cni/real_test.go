package cni

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/network"
	"github.com/hako-engine/hako/network/internal/nstest"
)

// debianPlugins is where Debian's containernetworking-plugins are; .ci/run installs them.
const debianPlugins = "/usr/lib/cni"

// real is a world of Debian's plugins, with a bridge and addresses of its own.
func real(t testing.TB) *world {
	t.Helper()
	nstest.NeedRoot(t)
	for _, p := range []string{"bridge", "host-local", "portmap", "bandwidth", "loopback"} {
		if _, err := os.Stat(filepath.Join(debianPlugins, p)); err != nil {
			t.Skip("needs containernetworking-plugins: " + t.Name())
		}
	}
	w := newWorld(t)
	w.bin = debianPlugins
	return w
}

func (w *world) bridge(name string, ranges ...string) map[string]any {
	var sets [][]ipRange
	routes := []map[string]string{}
	for _, r := range ranges {
		sets = append(sets, []ipRange{{r}})
		dst := "0.0.0.0/0"
		if netip.MustParsePrefix(r).Addr().Is6() {
			dst = "::/0"
		}
		routes = append(routes, map[string]string{"dst": dst})
	}
	w.t.Cleanup(func() {
		if l, err := netlink.LinkByName(name); err == nil {
			_ = netlink.LinkDel(l)
		}
	})
	return map[string]any{"type": "bridge", "bridge": name, "isGateway": true, "hairpinMode": true,
		"ipam": map[string]any{"type": "host-local", "dataDir": filepath.Join(w.state, "leases"), "ranges": sets, "routes": routes}}
}

// leases are the addresses that host-local holds.
func (w *world) leases(network string) (out []string) {
	files, err := os.ReadDir(filepath.Join(w.state, "leases", network))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		w.t.Fatal(err)
	}
	for _, f := range files {
		if _, err := netip.ParseAddr(f.Name()); err == nil {
			out = append(out, f.Name())
		}
	}
	return out
}

// inside runs f in a namespace, on a thread that is thrown away.
func inside(t testing.TB, netns string, f func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		ns, err := os.Open(netns)
		if err != nil {
			done <- err
			return
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// hostVeths counts the ends of cables on the host.
func hostVeths(t testing.TB) (n int) {
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if l.Type() == "veth" {
			n++
		}
	}
	return n
}

func TestDebianPluginsDualStack(t *testing.T) {
	w := real(t)
	ctx := context.Background()
	w.write("10-x.conflist", "1.0.0", "dual", w.bridge("hkcnidual", "10.214.0.0/24", "fd00:214::/64"),
		map[string]any{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}},
		map[string]any{"type": "bandwidth", "capabilities": map[string]bool{"bandwidth": true}})
	m := w.open(nil)
	eventually(t, "a network", func() bool { return m.Ready() == nil })
	p := w.pod("web")
	p.Annotations = map[string]string{annotationIngress: "80M"}
	for _, proto := range []string{"tcp", "udp", "sctp"} {
		p.Ports = append(p.Ports, network.PortMapping{Proto: proto, ContainerPort: 80, HostPort: 18080})
	}
	p.Ports = append(p.Ports, network.PortMapping{Proto: "tcp", ContainerPort: 80, HostPort: 18081, HostIP: netip.MustParseAddr("10.214.0.1")})
	res, err := m.Setup(ctx, p)
	if err != nil {
		t.Fatal(err)
	}
	if len(res.IPs) != 2 || !res.IPs[0].Is4() || !res.IPs[1].Is6() || res.MAC == "" {
		t.Fatalf("%+v", res)
	}
	var l net.Listener
	inside(t, p.NetNS, func() (err error) { l, err = net.Listen("tcp", ":80"); return err })
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "web")
			c.Close()
		}
	}()
	for _, to := range []string{net.JoinHostPort(res.IPs[0].String(), "80"), net.JoinHostPort(res.IPs[1].String(), "80"), "10.214.0.1:18080", "10.214.0.1:18081"} {
		var got []byte
		eventually(t, "answer of "+to, func() bool { // an IPv6 address is usable after its detection of duplicates
			c, err := net.DialTimeout("tcp", to, time.Second)
			if err != nil {
				return false
			}
			defer c.Close()
			got, err = io.ReadAll(c)
			return err == nil
		})
		if string(got) != "web" {
			t.Errorf("%s: %q", to, got)
		}
	}
	nat, err := exec.Command("iptables-save", "-t", "nat").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, nat)
	}
	for _, proto := range []string{"tcp", "udp", "sctp"} {
		if want := "-p " + proto; !strings.Contains(string(nat), want) {
			t.Errorf("no rule with %s:\n%s", want, nat)
		}
	}
	if !limited(t) {
		t.Error("the cable is not limited")
	}
	inside(t, p.NetNS, func() error {
		lo, err := netlink.LinkByName("lo")
		if err == nil && lo.Attrs().Flags&net.FlagUp == 0 {
			t.Error("the loopback is down")
		}
		return err
	})
	for range 2 {
		if err := m.Teardown(ctx, p.ID); err != nil {
			t.Error(err)
		}
	}
	if nat, _ := exec.Command("iptables-save", "-t", "nat").CombinedOutput(); strings.Contains(string(nat), "18080") {
		t.Errorf("rules are left:\n%s", nat)
	}
	if left := w.leases("dual"); len(left) > 0 {
		t.Errorf("leases are left: %v", left)
	}
	w.nothingLeft()
}

func TestDebianPluginsCheck(t *testing.T) {
	w := real(t)
	ctx := context.Background()
	w.write("10-x.conflist", "1.0.0", "checked", w.bridge("hkcnicheck", "10.217.0.0/24"))
	m := w.open(nil)
	p := w.pod("web")
	if _, err := m.Setup(ctx, p); err != nil {
		t.Fatal(err)
	}
	if err := m.Check(ctx, p.ID); err != nil {
		t.Error(err)
	}
	inside(t, p.NetNS, func() error {
		eth, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkDel(eth)
	})
	if err := m.Check(ctx, p.ID); err == nil {
		t.Error("a pod without its interface passes the check")
	}
	if err := m.Teardown(ctx, p.ID); err != nil {
		t.Error(err)
	}
	w.nothingLeft()
}

// limited tells whether a cable of the host has a token bucket.
func limited(t testing.TB) bool {
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		qs, err := netlink.QdiscList(l)
		if err != nil {
			t.Fatal(err)
		}
		for _, q := range qs {
			if q.Type() == "tbf" {
				return true
			}
		}
	}
	return false
}

// TestDebianPluginsSubnetExhausted fills a /24, is refused, empties it in every way there is, and fills it again.
func TestDebianPluginsSubnetExhausted(t *testing.T) {
	w := real(t)
	ctx := context.Background()
	size, subnet := 253, "10.215.0.0/24"
	if testing.Short() {
		size, subnet = 13, "10.215.0.0/28"
	}
	before := hostVeths(t)
	w.write("10-x.conflist", "1.0.0", "small", w.bridge("hkcnismall", subnet))
	m := w.open(nil)
	fill := func(n int) []Pod {
		t.Helper()
		pods := make([]Pod, n)
		for i := range pods {
			pods[i] = w.pod("p")
		}
		var wg sync.WaitGroup
		work := make(chan Pod, n)
		var mu sync.Mutex
		seen := map[netip.Addr]string{}
		for range 8 {
			wg.Go(func() {
				for p := range work {
					res, err := m.Setup(ctx, p)
					if err != nil {
						t.Error(err)
						continue
					}
					mu.Lock()
					if other := seen[res.IPs[0]]; other != "" {
						t.Errorf("%s and %s have %s", other, p.ID, res.IPs[0])
					}
					seen[res.IPs[0]] = p.ID
					mu.Unlock()
				}
			})
		}
		for _, p := range pods {
			work <- p
		}
		close(work)
		wg.Wait()
		return pods
	}
	empty := func(pods []Pod) {
		t.Helper()
		var wg sync.WaitGroup
		work := make(chan Pod, len(pods))
		for range 8 {
			wg.Go(func() {
				for p := range work {
					if err := m.Teardown(ctx, p.ID); err != nil {
						t.Error(err)
					}
				}
			})
		}
		for _, p := range pods {
			work <- p
		}
		close(work)
		wg.Wait()
	}
	pods := fill(size)
	over := w.pod("over")
	if _, err := m.Setup(ctx, over); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "no address left for the pod") {
		t.Errorf("one too many: %v", err)
	}
	if got := len(w.leases("small")); got != size {
		t.Errorf("%d leases", got)
	}
	// A third is stopped, a third is found by GC, and a third lost its namespaces, as by a reboot.
	third := size / 3
	empty(pods[:third])
	m.Close()
	m = w.open(nil)
	for _, p := range pods[2*third:] {
		if err := w.nets.DeleteNetns(ctx, p.NetNS); err != nil {
			t.Fatal(err)
		}
	}
	var valid []string
	for _, p := range pods[2*third:] {
		valid = append(valid, p.ID)
	}
	if err := m.GC(ctx, valid); err != nil {
		t.Error(err)
	}
	if got, want := len(w.leases("small")), len(valid); got != want {
		t.Errorf("%d leases after GC, want %d", got, want)
	}
	empty(pods[2*third:])
	if left := w.leases("small"); len(left) > 0 {
		t.Errorf("leases are left: %v", left)
	}
	w.nothingLeft()
	empty(fill(size))
	if left := w.leases("small"); len(left) > 0 {
		t.Errorf("leases are left: %v", left)
	}
	w.nothingLeft()
	eventually(t, "the cables' end", func() bool { return hostVeths(t) <= before })
}

// TestDebianPluginsDaemonKilled kills the daemon at random moments of ADD and DEL of many pods.
func TestDebianPluginsDaemonKilled(t *testing.T) {
	w := real(t)
	rounds := 5
	if testing.Short() {
		rounds = 2
	}
	before := hostVeths(t)
	br := w.bridge("hkcnikill", "10.218.0.0/24")
	br["ipMasq"] = true
	w.write("10-x.conflist", "1.0.0", "killed", br, map[string]any{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}})
	var pods []Pod
	for i := range 16 {
		p := w.pod("p")
		p.Ports = []network.PortMapping{{ContainerPort: 80, HostPort: uint16(18100 + i)}}
		pods = append(pods, p)
	}
	for range rounds {
		daemon := victim{w.options(), pods}.start(t)
		time.Sleep(time.Duration(200+rand.IntN(1500)) * time.Millisecond)
		if err := daemon.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := daemon.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Errorf("the daemon ended by itself: %v", err)
		}
		m := w.open(nil)
		if err := m.GC(context.Background(), nil); err != nil {
			t.Error(err)
		}
		m.Close()
		w.nothingLeft()
		if left := w.leases("killed"); len(left) > 0 {
			t.Errorf("leases are left: %v", left)
		}
		nat, err := exec.Command("iptables-save", "-t", "nat").CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, nat)
		}
		if strings.Contains(string(nat), "10.218.0.") || strings.Contains(string(nat), "--dport 181") {
			t.Errorf("rules are left:\n%s", nat)
		}
		eventually(t, "the cables' end", func() bool { return hostVeths(t) == before })
	}
}

// BenchmarkLife is a pod's attachment and its end with the bridge plugin, beside the plugins alone.
func BenchmarkLife(b *testing.B) {
	w := real(b)
	ctx := context.Background()
	br := w.bridge("hkcnibench", "10.216.0.0/16")
	br["ipMasq"] = true
	w.write("10-x.conflist", "1.0.0", "bench", br, map[string]any{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}})
	m := w.open(func(o *Options) { o.Log = slog.New(slog.DiscardHandler) })
	var add, del time.Duration
	for b.Loop() {
		p := w.pod("p")
		t0 := time.Now()
		if _, err := m.Setup(ctx, p); err != nil {
			b.Fatal(err)
		}
		t1 := time.Now()
		if err := m.Teardown(ctx, p.ID); err != nil {
			b.Fatal(err)
		}
		add += t1.Sub(t0)
		del += time.Since(t1)
	}
	b.ReportMetric(float64(add.Milliseconds())/float64(b.N), "ms/add")
	b.ReportMetric(float64(del.Milliseconds())/float64(b.N), "ms/del")
}
