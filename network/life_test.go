package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/hako-engine/hako/network/internal/nstest"
)

func tableGone(name string) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	tables, err := c.ListTables()
	if err != nil {
		return err
	}
	for _, t := range tables {
		if t.Name == name {
			return fmt.Errorf("table %s is still there", name)
		}
	}
	return nil
}

// census lists everything that a Manager may leave on the host.
func census(t testing.TB, m *Manager) string {
	t.Helper()
	var out []string
	links, err := dump(netlink.LinkList)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		out = append(out, "link "+l.Attrs().Name)
	}
	for _, dir := range []string{m.netnsDir, m.endpointDir} {
		files, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			out = append(out, "file "+filepath.Join(dir, f.Name()))
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, m.o.State) {
			out = append(out, "mount "+line)
		}
	}
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range hostSets() {
		s.Table = m.fw.table()
		if es, err := c.GetSetElements(s); err == nil {
			for _, e := range es {
				out = append(out, fmt.Sprintf("%s %x", s.Name, e.Key))
			}
		}
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, n := range m.nets {
		for _, p := range n.pools {
			for a := range p.held {
				out = append(out, "address "+a.String())
			}
		}
		for name := range n.names {
			out = append(out, "name "+name)
		}
		for id := range n.eps {
			out = append(out, "endpoint "+id)
		}
	}
	for path := range m.boxes {
		out = append(out, "sandbox "+path)
	}
	for k := range m.ports.used {
		out = append(out, fmt.Sprint("port ", k))
	}
	for id := range m.fw.ports {
		out = append(out, "rules of "+id)
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}

func TestManyLives(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := context.Background()
	m := manager(t, options(t))
	if _, err := m.Create(ctx, Config{Name: "many", EnableIPv4: true, EnableIPv6: true}); err != nil {
		t.Fatal(err)
	}
	life := func(worker, i int) error {
		id := fmt.Sprintf("w%d-%d", worker, i)
		path, err := m.NewNetns(ctx, id)
		if err != nil {
			return err
		}
		for _, n := range []string{"bridge", "many"} {
			c := EndpointConfig{ID: id, Network: n, Netns: path, Name: id, Aliases: []string{"all"}}
			if n == "bridge" && i%2 == 0 {
				c.Ports = []PortMapping{{Proto: "tcp", ContainerPort: 80}, {Proto: "udp", ContainerPort: 80}}
			}
			if _, err := m.Connect(ctx, c); err != nil {
				return err
			}
		}
		if i%3 == 0 { // the namespace may go first
			if err := m.DeleteNetns(ctx, path); err != nil {
				return err
			}
		}
		return errors.Join(m.Disconnect(ctx, "many", id), m.Disconnect(ctx, "bridge", id), m.DeleteNetns(ctx, path), m.Disconnect(ctx, "bridge", id))
	}
	if err := life(99, 0); err != nil { // makes the bridges
		t.Fatal(err)
	}
	must(t, m.Settle(ctx))
	before := census(t, m)
	files := openFiles(t)
	start := time.Now()
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 25 {
				if err := life(w, i); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	t.Logf("200 lives on two networks, 8 side by side: %v", time.Since(start))
	eventually(t, "nothing is left", func() error {
		if after := census(t, m); after != before {
			return fmt.Errorf("--- before\n%s\n--- after\n%s", before, after)
		}
		return nil
	})
	eventually(t, "no file is left open", func() error {
		if n := openFiles(t); n > files+spareNamespaces {
			return fmt.Errorf("%d open files, %d before", n, files)
		}
		return nil
	})
}

func openFiles(t testing.TB) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

func TestNothingBeforeTheFirst(t *testing.T) {
	nstest.NeedRoot(t)
	o := options(t)
	m := manager(t, o)
	if _, err := m.Create(context.Background(), Config{Name: "lazy"}); err != nil {
		t.Fatal(err)
	}
	// Cables of an earlier test go with its namespaces, when the kernel comes to it.
	eventually(t, "no interface", func() error {
		links, err := dump(netlink.LinkList)
		if err != nil {
			return err
		}
		for _, l := range links {
			if l.Attrs().Name != "lo" {
				return fmt.Errorf("there is %s", l.Attrs().Name)
			}
		}
		return nil
	})
	if err := tableGone(m.o.FirewallTable); err != nil {
		t.Error(err)
	}
	if len(m.spare) != 0 {
		t.Error("namespaces were made ahead")
	}
}

func TestNetworks(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := context.Background()
	o := options(t)
	m := manager(t, o)
	mk := func(c Config) Network {
		t.Helper()
		n, err := m.Create(ctx, c)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	n := mk(Config{Name: "full", EnableIPv6: true, EnableIPv4: true, Labels: map[string]string{"a": "b"},
		Options: map[string]string{optMTU: "1400", optBridgeName: "hkfull", optMasq: "false"},
		Subnets: []Subnet{{Prefix: netip.MustParsePrefix("10.98.0.0/16"), Range: netip.MustParsePrefix("10.98.7.0/24"), Gateway: addr("10.98.0.254"), Reserved: map[string]netip.Addr{"x": addr("10.98.7.1")}}}})
	if n.MTU != 1400 || n.Bridge != "hkfull" || len(n.Subnets) != 2 || n.Subnets[1].Prefix.Addr().Is4() {
		t.Errorf("%+v", n)
	}
	mk(Config{Name: "auto"})
	for _, x := range []struct {
		c     Config
		class error
	}{
		{Config{}, errdefs.ErrInvalidArgument},
		{Config{Name: "a/b"}, errdefs.ErrInvalidArgument},
		{Config{Name: "auto"}, errdefs.ErrAlreadyExists},
		{Config{Name: "bridge"}, errdefs.ErrAlreadyExists},
		{Config{Name: "x", Driver: "host"}, errdefs.ErrPermissionDenied},
		{Config{Name: "x", Driver: "weave"}, errdefs.ErrNotFound},
		{Config{Name: "x", Options: map[string]string{optMTU: "12"}}, errdefs.ErrInvalidArgument},
		{Config{Name: "x", Options: map[string]string{optICC: "maybe"}}, errdefs.ErrInvalidArgument},
		{Config{Name: "x", Options: map[string]string{optBridgeName: "hkfull"}}, errdefs.ErrFailedPrecondition},
		{Config{Name: "x", Options: map[string]string{optBridgeName: "lo"}}, errdefs.ErrFailedPrecondition},
		{Config{Name: "x", Options: map[string]string{optBridgeName: "has a space"}}, errdefs.ErrInvalidArgument},
		{Config{Name: "x", Subnets: []Subnet{{Prefix: netip.MustParsePrefix("10.98.1.0/24")}}}, errdefs.ErrFailedPrecondition},
		{Config{Name: "x", Subnets: []Subnet{{Prefix: netip.MustParsePrefix("10.97.1.0/24"), Gateway: addr("10.97.2.1")}}}, errdefs.ErrInvalidArgument},
		{Config{Name: "x", Subnets: []Subnet{{Prefix: netip.MustParsePrefix("fd01::/64")}}}, errdefs.ErrInvalidArgument},
		{Config{Name: "x", Subnets: []Subnet{{Prefix: netip.MustParsePrefix("10.97.1.0/24")}, {Prefix: netip.MustParsePrefix("10.97.2.0/24")}}}, errdefs.ErrInvalidArgument},
	} {
		if got, err := m.Create(ctx, x.c); !errors.Is(err, x.class) {
			t.Errorf("create %+v: %+v, %v", x.c, got, err)
		}
	}
	b := newBox(t, m, "b")
	e := b.connect("full", func(c *EndpointConfig) { c.MAC, c.IfName = "02:00:00:00:00:07", "net0" })
	if e.IPv4.String() != "10.98.7.0/16" || e.Gateway4 != addr("10.98.0.254") || e.IfName != "net0" {
		t.Errorf("%+v", e)
	}
	if err := b.run(func() error {
		i, err := net.InterfaceByName("net0")
		if err == nil && (i.MTU != 1400 || i.HardwareAddr.String() != "02:00:00:00:00:07") {
			err = fmt.Errorf("%+v", i)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	for ref, class := range map[string]error{"full": errdefs.ErrFailedPrecondition, "bridge": errdefs.ErrPermissionDenied, "host": errdefs.ErrPermissionDenied, "nobody": errdefs.ErrNotFound} {
		if err := m.Remove(ctx, ref); !errors.Is(err, class) {
			t.Errorf("remove %s: %v", ref, err)
		}
	}
	for ref, want := range map[string]string{n.ID: "full", n.ID[:10]: "full", "full": "full", "default": "bridge", "none": "none"} {
		if got, err := m.Get(ctx, ref); err != nil || got.Name != want {
			t.Errorf("get %s: %+v, %v", ref, got, err)
		}
	}
	if _, err := m.Get(ctx, ""); !errors.Is(err, errdefs.ErrNotFound) && !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Error(err)
	}
	b.remove("full")
	if err := m.Remove(ctx, "full"); err != nil {
		t.Error(err)
	}
	if _, err := m.host.LinkByName("hkfull"); err == nil {
		t.Error("the bridge is still there")
	}
	list, err := m.List(ctx)
	var names []string
	for _, n := range list {
		names = append(names, n.Name)
	}
	if err != nil || fmt.Sprint(names) != "[auto bridge host none]" {
		t.Error(names, err)
	}
	if gw, err := m.HostGateway(ctx); err != nil || gw != o.BridgeSubnet.Addr().Next() {
		t.Error(gw, err)
	}

	t.Run("subnets of the host are left alone", func(t *testing.T) {
		// The pool has 8 subnets of 27 bits; "auto" has the first.
		la := netlink.NewLinkAttrs()
		la.Name = "hostnet"
		second := netip.PrefixFrom(o.Pools[0].Base.Addr(), 27)
		gw := lastAddr(second).Next().Next()
		if err := m.host.LinkAdd(&netlink.Bridge{LinkAttrs: la}); err != nil {
			t.Fatal(err)
		}
		defer m.removeLink("hostnet")
		l, err := m.host.LinkByName("hostnet")
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(m.host.AddrAdd(l, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(gw, 27))}), m.host.LinkSetUp(l)); err != nil {
			t.Fatal(err)
		}
		n := mk(Config{Name: "third"})
		if n.Subnets[0].Prefix.Contains(gw) {
			t.Errorf("got %v", n.Subnets)
		}
	})
	t.Run("host and none", func(t *testing.T) {
		for _, n := range []string{"host", "none"} {
			e, err := m.Connect(ctx, EndpointConfig{ID: "h", Network: n, Netns: "", Name: "h"})
			if err != nil || e.IPv4.IsValid() || e.IfName != "" {
				t.Errorf("%+v, %v", e, err)
			}
			if es, err := m.Endpoints(ctx, n); err != nil || len(es) != 1 {
				t.Error(es, err)
			}
			if err := m.Disconnect(ctx, n, "h"); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestConnectErrors(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := context.Background()
	o := options(t)
	o.HealEvery = time.Hour // it would repair what is broken here
	m := manager(t, o)
	a := newBox(t, m, "a")
	ea := a.connect("bridge", func(c *EndpointConfig) { c.Ports = []PortMapping{{Proto: "tcp", ContainerPort: 80, HostPort: 18090}} })
	b := newBox(t, m, "b")
	before := census(t, m)
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name  string
		set   func(*EndpointConfig)
		class error
	}{
		{"no network", func(c *EndpointConfig) { c.Network = "nobody" }, errdefs.ErrNotFound},
		{"twice", func(c *EndpointConfig) { c.ID = "a" }, errdefs.ErrAlreadyExists},
		{"address taken", func(c *EndpointConfig) { c.IPv4 = ea.IPv4.Addr() }, errdefs.ErrAlreadyExists},
		{"address of another subnet", func(c *EndpointConfig) { c.IPv4 = addr("192.0.2.1") }, errdefs.ErrInvalidArgument},
		{"no IPv6", func(c *EndpointConfig) { c.IPv6 = addr("2001:db8::1") }, errdefs.ErrInvalidArgument},
		{"no namespace", func(c *EndpointConfig) { c.Netns = filepath.Join(t.TempDir(), "none") }, os.ErrNotExist},
		{"not a namespace", func(c *EndpointConfig) { c.Netns = plain }, errdefs.ErrInvalidArgument},
		{"second port taken", func(c *EndpointConfig) {
			c.Ports = []PortMapping{{Proto: "tcp", ContainerPort: 80, HostPort: 18091}, {Proto: "tcp", ContainerPort: 80, HostPort: 18090}}
		}, errdefs.ErrAlreadyExists},
		{"interface taken", func(c *EndpointConfig) { c.IfName = "lo" }, errdefs.ErrAlreadyExists},
		{"unknown sysctl", func(c *EndpointConfig) { c.Sysctls = map[string]string{"net.ipv4.conf.IFNAME.nonsense": "1"} }, os.ErrNotExist},
	} {
		c := EndpointConfig{ID: "b", Network: "bridge", Netns: b.path, Name: "b", Ports: []PortMapping{{Proto: "udp", ContainerPort: 1}}}
		x.set(&c)
		if e, err := m.Connect(ctx, c); !errors.Is(err, x.class) {
			t.Errorf("%s: %+v, %v", x.name, e, err)
		}
		if err := m.Settle(ctx); err != nil {
			t.Error(err)
		}
		if after := census(t, m); after != before {
			t.Errorf("%s: something is left\n--- before\n%s\n--- after\n%s", x.name, before, after)
		}
	}
	// What fails on the host, late in Connect.
	if _, err := m.Create(ctx, Config{Name: "named"}); err != nil {
		t.Fatal(err)
	}
	for name, harm := range map[string]func() (repair func()){
		"firewall": func() func() {
			old := m.fw.name
			m.fw.name = strings.Repeat("x", 300)
			return func() { m.fw.name = old; must(t, m.fw.build()) }
		},
		"nameserver": func() func() {
			lo := func(do func(h *netlink.Handle, l netlink.Link, a *netlink.Addr) error) {
				must(t, b.run(func() error {
					h, err := netlink.NewHandle()
					if err != nil {
						return err
					}
					defer h.Close()
					l, err := h.LinkByName("lo")
					if err != nil {
						return err
					}
					return do(h, l, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix("127.0.0.1/8"))})
				}))
			}
			lo(func(h *netlink.Handle, l netlink.Link, a *netlink.Addr) error { return h.AddrDel(l, a) })
			return func() { lo(func(h *netlink.Handle, l netlink.Link, a *netlink.Addr) error { return h.AddrAdd(l, a) }) }
		},
		"record": func() func() {
			old := m.endpointDir
			m.endpointDir = filepath.Join(old, "none")
			return func() { m.endpointDir = old }
		},
	} {
		c := EndpointConfig{ID: "b", Network: "named", Netns: b.path, Name: "b", Ports: []PortMapping{{Proto: "tcp", ContainerPort: 80}, {Proto: "udp", ContainerPort: 80}}}
		e, err := m.Connect(ctx, c) // makes the bridge
		if err != nil {
			t.Fatal(err, e)
		}
		must(t, errors.Join(m.Disconnect(ctx, "named", "b"), m.Settle(ctx)))
		before := census(t, m)
		repair := harm()
		_, err = m.Connect(ctx, c)
		repair()
		if err == nil {
			t.Errorf("%s: no error", name)
			must(t, errors.Join(m.Disconnect(ctx, "named", "b")))
		}
		must(t, m.Settle(ctx))
		if after := census(t, m); after != before {
			t.Errorf("%s: %v: something is left\n--- before\n%s\n--- after\n%s", name, err, before, after)
		}
	}
	e := b.connect("bridge", func(c *EndpointConfig) { c.Sysctls = map[string]string{"net.ipv4.conf.IFNAME.log_martians": "1"} })
	if err := b.run(func() error {
		if v := readSysctl("net/ipv4/conf/" + e.IfName + "/log_martians"); v != "1" {
			return fmt.Errorf("sysctl is %q", v)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if stats, err := NetnsStats(b.path); err != nil || len(stats) != 1 {
		t.Error(stats, err)
	}
}

// TestUDPFlows: a client that keeps its source port reaches the container that has the port now.
func TestUDPFlows(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := context.Background()
	m := manager(t, options(t))
	publish := func(c *EndpointConfig) { c.Ports = []PortMapping{{Proto: "udp", ContainerPort: 80, HostPort: 18040}} }
	keep := newBox(t, m, "keep") // so that the bridge is there all the time
	ek := keep.connect("bridge", nil)
	var client net.Conn
	must(t, keep.run(func() (err error) {
		client, err = net.Dial("udp", ek.Gateway4.String()+":18040")
		return err
	}))
	defer client.Close()
	for _, id := range []string{"a", "b"} {
		x := newBox(t, m, id)
		x.connect("bridge", publish)
		x.serve(80)
		eventually(t, id+" answers", func() error {
			if _, err := client.Write([]byte("x")); err != nil {
				return err
			}
			client.SetReadDeadline(time.Now().Add(refused))
			buf := make([]byte, 100)
			n, err := client.Read(buf)
			if err == nil && !strings.HasPrefix(string(buf[:n]), id+" sees") {
				err = fmt.Errorf("got %q", buf[:n])
			}
			return err
		})
		x.remove("bridge")
		must(t, m.Settle(ctx))
		client.Write([]byte("nobody is there"))
	}
}

func TestManyPorts(t *testing.T) {
	nstest.NeedRoot(t)
	m := manager(t, options(t))
	a := newBox(t, m, "a")
	var ports []PortMapping
	for p := range uint16(1000) {
		ports = append(ports, PortMapping{Proto: "tcp", ContainerPort: 1000 + p, HostPort: 20000 + p})
	}
	start := time.Now()
	a.connect("bridge", func(c *EndpointConfig) { c.Ports = ports })
	t.Logf("1000 ports: %v", time.Since(start))
	a.serve(1999)
	if got, err := ask("tcp", "127.0.0.1:20999", patience); err != nil || !strings.HasPrefix(got, "a sees") {
		t.Error(got, err)
	}
	start = time.Now()
	a.remove("bridge")
	t.Logf("removed: %v", time.Since(start))
	// They are free for another at once.
	b := newBox(t, m, "b")
	b.connect("bridge", func(c *EndpointConfig) { c.Ports = ports })
	b.serve(1999)
	if got, err := ask("tcp", "127.0.0.1:20999", patience); err != nil || !strings.HasPrefix(got, "b sees") {
		t.Error(got, err)
	}
}

func TestGateway(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := context.Background()
	m := manager(t, options(t))
	for _, n := range []string{"aaa", "zzz"} {
		if _, err := m.Create(ctx, Config{Name: n, EnableIPv4: true, EnableIPv6: true}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := m.Create(ctx, Config{Name: "aa-inside", Internal: true}); err != nil {
		t.Fatal(err)
	}
	b := newBox(t, m, "b")
	want := func(e Endpoint) {
		t.Helper()
		err := b.run(func() error {
			h, err := netlink.NewHandle()
			if err != nil {
				return err
			}
			defer h.Close()
			for fam, gw := range map[int]netip.Addr{netlink.FAMILY_V4: e.Gateway4, netlink.FAMILY_V6: e.Gateway6} {
				routes, err := h.RouteList(nil, fam)
				if err != nil {
					return err
				}
				var got []string
				for _, r := range routes {
					if r.Gw != nil {
						got = append(got, r.Gw.String())
					}
				}
				expect := []string{}
				if gw.IsValid() {
					expect = append(expect, gw.String())
				}
				if fmt.Sprint(got) != fmt.Sprint(expect) {
					return fmt.Errorf("default routes via %v, want %v", got, expect)
				}
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	b.connect("aa-inside", nil)
	want(Endpoint{})
	z := b.connect("zzz", nil)
	want(z)
	a := b.connect("aaa", nil)
	want(a)
	br := b.connect("bridge", func(c *EndpointConfig) { c.GatewayPriority = 5 })
	want(Endpoint{Gateway4: br.Gateway4, Gateway6: a.Gateway6})
	must(t, errors.Join(m.Disconnect(ctx, "bridge", "b"), m.Settle(ctx)))
	want(a)
	must(t, errors.Join(m.Disconnect(ctx, "aaa", "b"), m.Settle(ctx)))
	want(z)
	if again := b.connect("bridge", nil); again.IfName != "eth2" {
		t.Errorf("%+v", again)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestTwoDaemons(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := context.Background()
	m1, m2 := manager(t, options(t)), manager(t, options(t))
	a, b := newBox(t, m1, "a"), newBox(t, m2, "b")
	ea := a.connect("bridge", func(c *EndpointConfig) { c.Ports = []PortMapping{{Proto: "tcp", ContainerPort: 80, HostPort: 18050}} })
	eb := b.connect("bridge", nil)
	a.serve(80)
	b.serve(80)
	if got, err := b.ask("tcp", eb.Gateway4.String()+":18050", patience); err != nil || !strings.HasPrefix(got, "a sees") {
		t.Errorf("published by the other daemon: %q, %v", got, err)
	}
	if got, err := b.ask("tcp", ea.IPv4.Addr().String()+":80", refused); err == nil {
		t.Errorf("the networks of two daemons are not apart: %q", got)
	}
	if _, err := m2.Connect(ctx, EndpointConfig{ID: "x", Network: "bridge", Netns: b.path, Ports: []PortMapping{{Proto: "tcp", ContainerPort: 80, HostPort: 18050}}}); !errors.Is(err, errdefs.ErrAlreadyExists) || !strings.Contains(err.Error(), "address already in use") {
		t.Error(err)
	}
}
