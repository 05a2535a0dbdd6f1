package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/hako-engine/hako/network/internal/nstest"
)

// lan gives a machine on the host's LAN: 198.51.100.2, with the host (198.51.100.1) as its router.
func lan(t *testing.T, m *Manager) *box {
	t.Helper()
	b := newBox(t, m, "lan")
	ns, err := openNamespace(b.path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	la := netlink.NewLinkAttrs()
	la.Name = "testlan"
	veth := &netlink.Veth{LinkAttrs: la, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(ns.Fd())), PeerTxQLen: -1}
	if err := m.host.LinkAdd(veth); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.removeLink("testlan") })
	// What follows is done by a thread in each namespace, so that the sysctls are theirs.
	end := func(name, a4, a6 string) func() error {
		return func() error {
			if err := writeSysctl("net/ipv6/conf/"+name+"/disable_ipv6", "0"); err != nil {
				return err
			}
			h, err := netlink.NewHandle()
			if err != nil {
				return err
			}
			defer h.Close()
			l, err := h.LinkByName(name)
			if err != nil {
				return err
			}
			for _, a := range []string{a4, a6} {
				p := netip.MustParsePrefix(a)
				na := &netlink.Addr{IPNet: ipNet(p)}
				if p.Addr().Is6() {
					na.Flags = 2 // IFA_F_NODAD
				}
				if err := h.AddrAdd(l, na); err != nil {
					return err
				}
			}
			if err := h.LinkSetUp(l); err != nil {
				return err
			}
			if name == "eth0" {
				if err := setRoute(h, l.Attrs().Index, netip.MustParseAddr("198.51.100.1")); err != nil {
					return err
				}
				return setRoute(h, l.Attrs().Index, netip.MustParseAddr("2001:db8:99::1"))
			}
			return nil
		}
	}
	if err := end("testlan", "198.51.100.1/24", "2001:db8:99::1/64")(); err != nil {
		t.Fatal(err)
	}
	if err := b.run(end("eth0", "198.51.100.2/24", "2001:db8:99::2/64")); err != nil {
		t.Fatal(err)
	}
	return b
}

const refused = 250 * time.Millisecond // how long a packet that is dropped is waited for

func TestReachability(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := context.Background()
	m := manager(t, options(t))
	for _, c := range []Config{{Name: "other"}, {Name: "inside", Internal: true, EnableIPv4: true, EnableIPv6: true}, {Name: "lonely", Options: map[string]string{optICC: "false"}}, {Name: "six", EnableIPv4: true, EnableIPv6: true}, {Name: "sixonly", EnableIPv6: true}} {
		if _, err := m.Create(ctx, c); err != nil {
			t.Fatal(err)
		}
	}
	out := lan(t, m)
	out.serve(80)
	a, b, c, d, i, j := newBox(t, m, "a"), newBox(t, m, "b"), newBox(t, m, "c"), newBox(t, m, "d"), newBox(t, m, "i"), newBox(t, m, "j")
	l1, l2, s, s2 := newBox(t, m, "l1"), newBox(t, m, "l2"), newBox(t, m, "s"), newBox(t, m, "s2")
	a.connect("bridge", nil)
	eb := b.connect("bridge", func(c *EndpointConfig) {
		for _, p := range []string{"tcp", "udp"} {
			c.Ports = append(c.Ports,
				PortMapping{Proto: p, ContainerPort: 80, HostPort: 18080},
				PortMapping{Proto: p, ContainerPort: 80, HostPort: 18081, HostIP: netip.MustParseAddr("127.0.0.1")},
				PortMapping{Proto: p, ContainerPort: 80, HostPort: 18082, HostIP: netip.MustParseAddr("198.51.100.1")},
				PortMapping{Proto: p, ContainerPort: 80, HostPort: 18083, HostIP: netip.IPv4Unspecified()})
		}
	})
	c.connect("other", nil)
	ed := d.connect("other", nil)
	ei := i.connect("inside", nil)
	ej := j.connect("inside", func(c *EndpointConfig) { c.Ports = []PortMapping{{Proto: "tcp", ContainerPort: 80, HostPort: 18085}} })
	l1.connect("lonely", nil)
	el2 := l2.connect("lonely", nil)
	es := s.connect("six", func(c *EndpointConfig) {
		c.Ports = []PortMapping{{Proto: "tcp", ContainerPort: 80, HostPort: 18086}, {Proto: "udp", ContainerPort: 80, HostPort: 18086}}
	})
	es2 := s2.connect("six", nil)
	s3 := newBox(t, m, "s3")
	es3 := s3.connect("sixonly", func(c *EndpointConfig) {
		c.Ports = []PortMapping{{Proto: "tcp", ContainerPort: 80, HostPort: 18087}, {Proto: "udp", ContainerPort: 80, HostPort: 18087}}
	})
	if es3.IPv4.IsValid() || es3.MAC == "" {
		t.Errorf("%+v", es3)
	}
	for _, x := range []*box{b, d, j, l2, s, s2, s3} {
		x.serve(80)
	}
	host := &box{t: t, m: m, id: "host", path: fmt.Sprintf("/proc/self/fd/%d", m.hostNS.Fd())}
	direct := func(e Endpoint) string { return net.JoinHostPort(e.IPv4.Addr().String(), "80") }
	gw := func(e Endpoint, port int) string { return net.JoinHostPort(e.Gateway4.String(), fmt.Sprint(port)) }

	for _, x := range []struct {
		from *box
		to   string
		want string // "": not reachable
	}{
		{host, direct(eb), "b sees " + eb.Gateway4.String()},
		{host, "127.0.0.1:18080", "b sees " + eb.Gateway4.String()},
		{host, "127.0.0.1:18081", "b sees " + eb.Gateway4.String()},
		{host, "127.0.0.1:18082", ""},
		{host, "127.0.0.1:18083", "b sees " + eb.Gateway4.String()},
		{host, "198.51.100.1:18080", "b sees 198.51.100.1"},
		{host, "198.51.100.1:18081", ""},
		{host, "198.51.100.1:18082", "b sees 198.51.100.1"},
		{host, "[::1]:18080", "b sees " + eb.Gateway4.String()},
		{host, "[::1]:18083", ""},

		{out, "198.51.100.1:18080", "b sees 198.51.100.2"},
		{out, "198.51.100.1:18081", ""},
		{out, "198.51.100.1:18082", "b sees 198.51.100.2"},
		{out, "198.51.100.1:18083", "b sees 198.51.100.2"},
		{out, "[2001:db8:99::1]:18080", "b sees " + eb.Gateway4.String()},
		{out, direct(eb), ""}, // the LAN does not reach what is not published
		{out, direct(ed), ""},

		{a, direct(eb), "b sees"},
		{b, direct(eb), "b sees"},
		{a, gw(eb, 18080), "b sees " + eb.Gateway4.String()},
		{b, gw(eb, 18080), "b sees " + eb.Gateway4.String()},
		{a, "198.51.100.1:18082", "b sees " + eb.Gateway4.String()},
		{b, "198.51.100.1:18082", "b sees " + eb.Gateway4.String()},
		{a, "198.51.100.2:80", "lan sees 198.51.100.1"},
		{a, direct(ed), ""},
		{c, direct(eb), ""},
		{c, direct(ed), "d sees"},
		{c, "198.51.100.1:18080", "b sees"},
		{c, "127.0.0.1:18080", ""},

		{i, direct(ej), "j sees"},
		{i, direct(eb), ""},
		{i, "198.51.100.2:80", ""},
		{i, "198.51.100.1:18080", ""},
		// The gateway's addresses of the internal network are the host's: neither the kernel nor the relay leads on.
		{i, net.JoinHostPort(ei.bridge4(m), "18080"), ""},
		{i, net.JoinHostPort(ei.bridge6(m), "18080"), ""},
		{i, net.JoinHostPort(ei.bridge6(m), "18086"), ""},
		{host, direct(ej), "j sees"},
		{host, "127.0.0.1:18085", ""},
		{out, "198.51.100.1:18085", ""},
		{a, direct(ej), ""},

		{l1, direct(el2), ""},
		{l1, "198.51.100.2:80", "lan sees 198.51.100.1"},
		{host, direct(el2), "l2 sees"},

		{host, "127.0.0.1:18086", "s sees " + es.Gateway4.String()},
		{host, "[::1]:18086", "s sees " + es.Gateway6.String()},
		{host, "[2001:db8:99::1]:18086", "s sees 2001:db8:99::1"},
		{out, "[2001:db8:99::1]:18086", "s sees 2001:db8:99::2"},
		{out, net.JoinHostPort(es.IPv6.Addr().String(), "80"), ""},
		{s2, net.JoinHostPort(es.IPv6.Addr().String(), "80"), "s sees " + es2.IPv6.Addr().String()},
		{s2, net.JoinHostPort(es.Gateway6.String(), "18086"), "s sees " + es.Gateway6.String()},
		{s, net.JoinHostPort(es.Gateway6.String(), "18086"), "s sees " + es.Gateway6.String()},
		{host, "127.0.0.1:18087", "s3 sees " + es3.Gateway6.String()},
		{out, "198.51.100.1:18087", "s3 sees " + es3.Gateway6.String()},
		{out, "[2001:db8:99::1]:18087", "s3 sees 2001:db8:99::2"},
		{s2, net.JoinHostPort(es3.IPv6.Addr().String(), "80"), ""},
		{s2, "[2001:db8:99::2]:80", "lan sees 2001:db8:99::1"},
	} {
		for _, proto := range []string{"tcp", "udp"} {
			wait := patience
			if x.want == "" {
				wait = refused
			}
			got, err := x.from.ask(proto, x.to, wait)
			if x.want == "" && err == nil {
				t.Errorf("%s → %s %s: answered %q, should not be reachable", x.from.id, proto, x.to, got)
			} else if x.want != "" && (err != nil || !strings.HasPrefix(got, x.want)) {
				t.Errorf("%s → %s %s: got %q, %v; want %q", x.from.id, proto, x.to, got, err, x.want)
			}
		}
	}

	t.Run("no link-local address without IPv6", func(t *testing.T) {
		err := a.run(func() error {
			ifc, err := net.InterfaceByName("eth0")
			if err != nil {
				return err
			}
			addrs, err := ifc.Addrs()
			if err == nil && (len(addrs) != 1 || strings.Contains(fmt.Sprint(addrs), "fe80")) {
				err = fmt.Errorf("addresses %v", addrs)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
	t.Run("isolated endpoints do not meet at the gateway", func(t *testing.T) {
		detour := func(from *box, to Endpoint) {
			t.Helper()
			must(t, from.run(func() error {
				h, err := netlink.NewHandle()
				if err != nil {
					return err
				}
				defer h.Close()
				eth, err := h.LinkByName("eth0")
				if err != nil {
					return err
				}
				return h.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Dst: ipNet(netip.PrefixFrom(to.IPv4.Addr(), 32)), Gw: to.Gateway4.AsSlice()})
			}))
		}
		detour(l1, el2)
		if got, err := l1.ask("tcp", direct(el2), refused); err == nil {
			t.Errorf("reached: %q", got)
		}
		detour(a, eb) // control: on a network that is not isolated the detour works
		if got, err := a.ask("tcp", direct(eb), patience); err != nil {
			t.Error("control:", got, err)
		}
	})
	t.Run("router advertisements are not believed", func(t *testing.T) {
		for _, name := range []string{m.o.BridgeName, "hk-" + es.NetworkID[:12]} {
			if v := readSysctl("net/ipv6/conf/" + name + "/accept_ra"); v != "0" {
				t.Errorf("accept_ra of %s is %q", name, v)
			}
		}
		if err := s.run(func() error {
			if v := readSysctl("net/ipv6/conf/eth0/accept_ra"); v != "0" {
				return fmt.Errorf("accept_ra inside is %q", v)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	})
	t.Run("the host's loopback cannot be reached through the bridge", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:18099")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		stealLoopback(a, eb.Gateway4)
		if c, err := net.DialTimeout("tcp", "127.0.0.1:18099", patience); err != nil {
			t.Error("control: the service does not answer on the host:", err)
		} else {
			c.Close()
		}
		if _, err := a.ask("tcp", "127.0.0.1:18099", refused); err == nil {
			t.Error("a container reached the host's loopback")
		}
		if got, err := withoutFirstRule(t, m, "raw_prerouting", func() (string, error) { return "", dialClose(a, "127.0.0.1:18099") }); err != nil {
			t.Error("control: the attack does not work in this test:", got, err)
		}
	})

	t.Run("what is published on the loopback cannot be reached from the LAN", func(t *testing.T) {
		stealLoopback(out, netip.MustParseAddr("198.51.100.1"))
		if got, err := out.ask("tcp", "127.0.0.1:18081", refused); err == nil {
			t.Errorf("the LAN reached a port of 127.0.0.1: %q", got)
		}
		// Control: without the rule that prevents it, the attack works. And the missing rule is noticed.
		if got, err := withoutFirstRule(t, m, "prerouting", func() (string, error) { return out.ask("tcp", "127.0.0.1:18081", patience) }); err != nil {
			t.Error("control: the attack does not work in this test:", got, err)
		}
		eventually(t, "the rule is back", func() error {
			if got, err := out.ask("tcp", "127.0.0.1:18081", refused); err == nil {
				return fmt.Errorf("answered %q", got)
			}
			return nil
		})
	})

	// Without the daemon the kernel goes on: what was reached through a relay is the only thing that is lost.
	for _, e := range m.liveEndpoints() {
		e.box.mu.Lock()
		m.releasePorts(e)
		e.box.mu.Unlock()
	}
	for _, x := range []struct {
		from *box
		to   string
	}{{host, "127.0.0.1:18080"}, {host, "127.0.0.1:18081"}, {host, "198.51.100.1:18082"}, {out, "198.51.100.1:18083"}, {a, gw(eb, 18080)}, {b, gw(eb, 18080)}, {out, "[2001:db8:99::1]:18086"}} {
		for _, proto := range []string{"tcp", "udp"} {
			if got, err := x.from.ask(proto, x.to, patience); err != nil {
				t.Errorf("without the daemon: %s → %s %s: got %q, %v", x.from.id, proto, x.to, got, err)
			}
		}
	}
}

// stealLoopback makes a box send its packets for 127.0.0.1 to a router.
func stealLoopback(b *box, router netip.Addr) {
	b.t.Helper()
	err := b.run(func() error {
		if err := writeSysctl("net/ipv4/conf/all/route_localnet", "1"); err != nil {
			return err
		}
		h, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer h.Close()
		lo, err := h.LinkByName("lo")
		if err != nil {
			return err
		}
		eth, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		// Its own 127.0.0.1 has to go, with the routes to it.
		if err := h.AddrDel(lo, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix("127.0.0.1/8"))}); err != nil {
			return err
		}
		return h.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Dst: ipNet(netip.MustParsePrefix("127.0.0.1/32")), Gw: router.AsSlice()})
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

// eventually waits until check succeeds.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Errorf("%s: %v", what, err)
}

func dialClose(b *box, addr string) error {
	return b.run(func() error {
		c, err := net.DialTimeout("tcp", addr, patience)
		if err == nil {
			c.Close()
		}
		return err
	})
}

// withoutFirstRule runs fn while the first rule of a chain is missing; the healer has to wait.
func withoutFirstRule(t *testing.T, m *Manager, chain string, fn func() (string, error)) (string, error) {
	t.Helper()
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	m.fw.mu.Lock()
	defer m.fw.mu.Unlock()
	rules, err := conn.GetRules(m.fw.table(), &nftables.Chain{Name: chain, Table: m.fw.table()})
	if err != nil || len(rules) == 0 {
		t.Fatal("no rules", err)
	}
	if err := errors.Join(conn.DelRule(rules[0]), conn.Flush()); err != nil {
		t.Fatal(err)
	}
	return fn()
}

func (e Endpoint) bridge4(m *Manager) string { return m.nets[e.NetworkID].Subnets[0].Gateway.String() }
func (e Endpoint) bridge6(m *Manager) string { return m.nets[e.NetworkID].Subnets[1].Gateway.String() }
