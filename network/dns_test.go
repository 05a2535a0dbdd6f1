package network

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/network/internal/nstest"
)

// query asks the nameserver of a box and gives the answers' data, sorted, or the response code.
func (b *box) query(proto, name string, qtype uint16) string {
	req := new(dns.Msg)
	req.SetQuestion(dns.Fqdn(name), qtype)
	var resp *dns.Msg
	err := b.run(func() (err error) {
		c := dns.Client{Net: proto, Timeout: patience}
		resp, _, err = c.Exchange(req, "127.0.0.11:53")
		return err
	})
	if err != nil {
		return err.Error()
	}
	if resp.Rcode != dns.RcodeSuccess {
		return dns.RcodeToString[resp.Rcode]
	}
	var out []string
	for _, rr := range resp.Answer {
		switch rr := rr.(type) {
		case *dns.A:
			out = append(out, rr.A.String())
		case *dns.AAAA:
			out = append(out, rr.AAAA.String())
		case *dns.PTR:
			out = append(out, rr.Ptr)
		default:
			out = append(out, rr.String())
		}
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// stub is a resolver on the host's loopback, as systemd-resolved is. It knows only outside.test.
func stub(t *testing.T, m *Manager) *atomic.Int32 {
	t.Helper()
	var queries atomic.Int32
	pc, err := net.ListenPacket("udp", "127.0.0.53:53")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.53:53")
	if err != nil {
		t.Fatal(err)
	}
	h := dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		queries.Add(1)
		resp := new(dns.Msg)
		resp.SetReply(req)
		if strings.EqualFold(req.Question[0].Name, "outside.test.") {
			resp.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: req.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.IPv4(203, 0, 113, 9)}}
		} else {
			resp.Rcode = dns.RcodeNameError
		}
		w.WriteMsg(resp)
	})
	for _, s := range []*dns.Server{{PacketConn: pc, Handler: h}, {Listener: l, Handler: h}} {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		go s.ActivateAndServe()
		<-started
		t.Cleanup(func() { s.Shutdown() })
	}
	if err := os.WriteFile(m.o.ResolvConf, []byte("nameserver 127.0.0.53\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return &queries
}

func TestDNS(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := context.Background()
	m := manager(t, options(t))
	queries := stub(t, m)
	for _, c := range []Config{{Name: "apps", EnableIPv4: true, EnableIPv6: true}, {Name: "db"}, {Name: "inside", Internal: true}} {
		if _, err := m.Create(ctx, c); err != nil {
			t.Fatal(err)
		}
	}
	web, web2, sql, hidden := newBox(t, m, "web"), newBox(t, m, "web2"), newBox(t, m, "sql"), newBox(t, m, "hidden")
	e1 := web.connect("apps", func(c *EndpointConfig) { c.Hostname, c.Aliases = "www-host", []string{"www", "Shared"} })
	e2 := web2.connect("apps", func(c *EndpointConfig) { c.Aliases = []string{"shared"} })
	e3 := sql.connect("db", func(c *EndpointConfig) {
		c.ID = "0123456789abcdef0123456789abcdef"
		c.Name = "sql"
	})
	e4 := web.connect("db", nil)
	eh := hidden.connect("inside", nil)
	plain := newBox(t, m, "plain")
	ep := plain.connect("bridge", nil)
	if len(ep.DNSNames) != 0 || slices.Contains(ep.Nameservers, EmbeddedDNS) {
		t.Errorf("the default network has names: %+v", ep)
	}
	if fmt.Sprint(e1.Nameservers) != "[127.0.0.11]" || e4.IfName != "eth1" {
		t.Errorf("%+v\n%+v", e1, e4)
	}
	v4 := func(e Endpoint) string { return e.IPv4.Addr().String() }
	v6 := func(e Endpoint) string { return e.IPv6.Addr().String() }
	ptr := func(a netip.Addr) string {
		s, err := dns.ReverseAddr(a.String())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	both := []string{v4(e1), v4(e2)}
	slices.Sort(both)
	check := func(from *box, name string, qtype uint16, want string) {
		t.Helper()
		for _, proto := range []string{"udp", "tcp"} {
			if got := from.query(proto, name, qtype); got != want {
				t.Errorf("%s asks for %s %s (%s): got %q, want %q", from.id, dns.TypeToString[qtype], name, proto, got, want)
			}
		}
	}
	check(web2, "web", dns.TypeA, v4(e1))
	check(web2, "WEB", dns.TypeA, v4(e1))
	check(web2, "web.apps", dns.TypeA, v4(e1))
	check(web2, "web", dns.TypeAAAA, v6(e1))
	check(web2, "web", dns.TypeMX, "")
	check(web2, "www", dns.TypeA, v4(e1))
	check(web2, "www-host", dns.TypeA, v4(e1))
	check(web2, "shared", dns.TypeA, strings.Join(both, " "))
	check(web2, ptr(e1.IPv4.Addr()), dns.TypePTR, "web.apps.")
	check(web2, ptr(e1.IPv6.Addr()), dns.TypePTR, "web.apps.")
	check(web2, ptr(e1.Gateway4), dns.TypePTR, "NXDOMAIN")
	check(web2, "sql", dns.TypeA, "NXDOMAIN") // another network
	check(web, "sql", dns.TypeA, v4(e3))
	check(web, "0123456789ab", dns.TypeA, v4(e3))
	check(web, "sql", dns.TypeAAAA, "")
	check(sql, "web", dns.TypeA, v4(e4))
	check(web, "hidden", dns.TypeA, "NXDOMAIN")

	if got := web.query("udp", "outside.test", dns.TypeA); got != "203.0.113.9" {
		t.Errorf("forwarded: %q", got)
	}
	if err := m.Rename(ctx, "apps", "web", "renamed"); err != nil {
		t.Fatal(err)
	}
	check(web2, "renamed", dns.TypeA, v4(e1))
	check(web2, "renamed.apps", dns.TypeA, v4(e1))

	t.Run("an internal network asks nobody outside", func(t *testing.T) {
		before := queries.Load()
		check(hidden, "outside.test", dns.TypeA, "NXDOMAIN")
		check(hidden, "hidden", dns.TypeA, v4(eh))
		if n := queries.Load(); n != before {
			t.Errorf("%d queries went out", n-before)
		}
	})
	t.Run("servers of its own are asked from inside", func(t *testing.T) {
		server := newBox(t, m, "server") // on the internal network, as the one that asks
		es := server.connect("inside", nil)
		var pc net.PacketConn
		must(t, server.run(func() (err error) { pc, err = net.ListenPacket("udp", ":53"); return err }))
		srv := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
			resp := new(dns.Msg)
			resp.SetReply(req)
			resp.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: req.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.ParseIP(hostOf(w.RemoteAddr()))}}
			w.WriteMsg(resp)
		})}
		go srv.ActivateAndServe()
		defer srv.Shutdown()
		before := queries.Load()
		client := newBox(t, m, "client")
		ec := client.connect("inside", func(c *EndpointConfig) { c.DNS = []netip.Addr{es.IPv4.Addr()} })
		if got := client.query("udp", "anything.test", dns.TypeA); got != v4(ec) || queries.Load() != before {
			t.Errorf("got %q, want the client's own address %s", got, v4(ec))
		}
	})
	t.Run("port 53 is free for the container", func(t *testing.T) {
		err := web.run(func() error {
			l, err := net.ListenPacket("udp4", ":53")
			if err == nil {
				l.Close()
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
	t.Run("dead servers do not hold up for long", func(t *testing.T) {
		if err := os.WriteFile(m.o.ResolvConf, []byte("nameserver 127.0.0.54\nnameserver 127.0.0.53\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		// A socket that never answers.
		pc, err := net.ListenPacket("udp", "127.0.0.54:53")
		if err != nil {
			t.Fatal(err)
		}
		defer pc.Close()
		if got := web.query("udp", "outside.test", dns.TypeA); got != "203.0.113.9" {
			t.Errorf("first: %q", got)
		}
		// The next one is not sent there any more, as long as the other one answers.
		if !m.upstream.isBad(netip.MustParseAddr("127.0.0.54")) {
			t.Error("the server that does not answer is not known as dead")
		}
		raw, err := pc.(*net.UDPConn).SyscallConn()
		must(t, err)
		// What was sent on the loopback is there.
		asked := func() (n int) {
			must(t, raw.Control(func(fd uintptr) {
				for buf := make([]byte, 512); ; n++ {
					if _, _, err := unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT); err != nil {
						return
					}
				}
			}))
			return n
		}
		if asked() == 0 {
			t.Error("the first server was not asked")
		}
		if got := web.query("udp", "outside.test", dns.TypeA); got != "203.0.113.9" || asked() != 0 {
			t.Errorf("second: %q", got)
		}
	})
	t.Run("the nameserver goes with the last network that has names", func(t *testing.T) {
		if err := m.Disconnect(ctx, "db", "web"); err != nil {
			t.Fatal(err)
		}
		check(web, "web2", dns.TypeA, v4(e2))
		if err := m.Disconnect(ctx, "apps", "web"); err != nil {
			t.Fatal(err)
		}
		must(t, m.Settle(ctx))
		if got := web.query("udp", "web2", dns.TypeA); !strings.Contains(got, "refused") {
			t.Errorf("answered %q", got)
		}
		if err := web.run(func() error { return tableGone(dnsTable) }); err != nil {
			t.Error(err)
		}
		check(web2, "renamed", dns.TypeA, "NXDOMAIN")
	})
}

func TestReverseAddr(t *testing.T) {
	for _, a := range []string{"192.0.2.1", "2001:db8::1", "fd00:1:2:3:4:5:6:7"} {
		name, err := dns.ReverseAddr(a)
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := reverseAddr(name); !ok || got.String() != a {
			t.Errorf("%s: %v %v", name, got, ok)
		}
	}
	for _, bad := range []string{"", "example.test.", "1.2.3.in-addr.arpa.", "1.2.3.4.5.in-addr.arpa.", "1.2.ip6.arpa.", strings.Repeat("xx.", 32) + "ip6.arpa."} {
		if got, ok := reverseAddr(bad); ok {
			t.Errorf("%s: %v", bad, got)
		}
	}
}
