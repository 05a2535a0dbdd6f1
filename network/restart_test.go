package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"

	"github.com/hako-engine/hako/network/internal/nstest"
)

func TestRestart(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := context.Background()
	o := options(t)
	first, err := Open(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := first.Create(ctx, Config{Name: "apps", EnableIPv4: true, EnableIPv6: true}); err != nil {
		t.Fatal(err)
	}
	a, b, dead := newBox(t, first, "a"), newBox(t, first, "b"), newBox(t, first, "dead")
	ea := a.connect("apps", func(c *EndpointConfig) {
		c.Aliases, c.Ports = []string{"alias"}, []PortMapping{{Proto: "tcp", ContainerPort: 80, HostPort: 18070}, {Proto: "udp", ContainerPort: 80, HostPort: 18070}}
	})
	eb := b.connect("apps", nil)
	ed := dead.connect("bridge", func(c *EndpointConfig) { c.Ports = []PortMapping{{Proto: "tcp", ContainerPort: 80, HostPort: 18071}} })
	a.serve(80)
	dnsPort := first.boxes[b.path].dns.port
	// In the namespace of a the port is taken meanwhile.
	var squatter net.PacketConn
	aPort := first.boxes[a.path].dns.port
	defer func() { squatter.Close() }()
	// A daemon that is killed closes nothing; what it held open goes away. Close is the same but for
	// the namespaces' sockets, which the process of this test would else keep.
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	must(t, a.run(func() (err error) {
		squatter, err = net.ListenPacket("udp4", fmt.Sprintf("127.0.0.11:%d", aPort))
		return err
	}))
	if err := first.DeleteNetns(ctx, dead.path); err != nil {
		t.Fatal(err)
	}
	for _, proto := range []string{"tcp", "udp"} {
		if got, err := ask(proto, "127.0.0.1:18070", patience); err != nil || !strings.HasPrefix(got, "a sees") {
			t.Errorf("no daemon: %s %q, %v", proto, got, err)
		}
	}
	// Another program takes a port meanwhile.
	thief, err := net.Listen("tcp", ":18070")
	if err != nil {
		t.Fatal(err)
	}

	m := manager(t, o)
	a.m, b.m = m, m
	es, err := m.Endpoints(ctx, "apps")
	if err != nil || len(es) != 2 || fmt.Sprint(es[0]) != fmt.Sprint(ea) || fmt.Sprint(es[1]) != fmt.Sprint(eb) {
		t.Errorf("endpoints\n%+v\nwant\n%+v\n%+v\n%v", es, ea, eb, err)
	}
	must(t, m.Settle(ctx))
	if es, _ := m.Endpoints(ctx, "bridge"); len(es) != 0 {
		t.Errorf("the dead one is still there: %+v", es)
	}
	if _, err := m.host.LinkByName(ed.HostIfName); err == nil {
		t.Error("the dead one's interface is still there")
	}
	if got, err := ask("tcp", "127.0.0.1:18070", patience); err != nil || !strings.HasPrefix(got, "a sees") {
		t.Errorf("%q, %v", got, err)
	}
	thief.Close()
	eventually(t, "the port is held again", func() error {
		l, err := net.Listen("tcp", ":18070")
		if err == nil {
			l.Close()
			return errors.New("it is free")
		}
		return nil
	})
	if port := m.boxes[b.path].dns.port; port != dnsPort {
		t.Errorf("the nameserver has port %d, before it had %d", port, dnsPort)
	}
	for _, proto := range []string{"tcp", "udp"} {
		if got := b.query(proto, "alias", dns.TypeA); got != ea.IPv4.Addr().String() {
			t.Errorf("name over %s: %q", proto, got)
		}
	}
	if got := a.query("udp", "b", dns.TypeA); got != eb.IPv4.Addr().String() {
		t.Errorf("name where the port was taken: %q", got)
	}
	// Leases are known: neither address is given out again, by choice or by chance.
	c := newBox(t, m, "c")
	if _, err := m.Connect(ctx, EndpointConfig{ID: "c", Network: "apps", Netns: c.path, IPv4: ea.IPv4.Addr()}); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Error(err)
	}
	if ec := c.connect("apps", nil); ec.IPv4 == ea.IPv4 || ec.IPv4 == eb.IPv4 || ec.IPv6 == ea.IPv6 {
		t.Errorf("%+v", ec)
	}
	if _, err := m.Connect(ctx, EndpointConfig{ID: "x", Network: "bridge", Netns: c.path, Ports: []PortMapping{{Proto: "tcp", ContainerPort: 80, HostPort: 18070}}}); err == nil || !strings.Contains(err.Error(), "port is already allocated") {
		t.Error(err)
	}
	a.remove("apps")
	b.remove("apps")
	c.remove("apps")
	must(t, m.Settle(ctx))
	if es, _ := os.ReadDir(m.endpointDir); len(es) != 0 {
		t.Error("records are left", es)
	}
}

// TestKilledInConnect: a daemon that died in the middle leaves a cable and a record of it.
func TestKilledInConnect(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := context.Background()
	o := options(t)
	first, err := Open(ctx, o)
	must(t, err)
	a := newBox(t, first, "a")
	e := a.connect("bridge", nil)
	must(t, first.saveEndpoint(first.liveEndpoints()[0], true))
	must(t, first.Close())
	m := manager(t, o)
	if es, err := m.Endpoints(ctx, "bridge"); err != nil || len(es) != 0 {
		t.Error(es, err)
	}
	a.m = m
	again := a.connect("bridge", nil) // waits for the remains to go
	if again.IfName != "eth0" || again.IPv4 != e.IPv4 {
		t.Errorf("%+v, first %+v", again, e)
	}
	if _, err := m.host.LinkByName(e.HostIfName); err == nil {
		t.Error("the old cable is still there")
	}
	if paths, err := m.Netns(ctx); err != nil || fmt.Sprint(paths) != fmt.Sprint([]string{a.path}) {
		t.Error(paths, err)
	}
}

func TestChangedSubnet(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := context.Background()
	o := options(t)
	first, err := Open(ctx, o)
	must(t, err)
	a := newBox(t, first, "a")
	ea := a.connect("bridge", nil)
	must(t, first.Close())
	old := o.BridgeSubnet
	o.BridgeSubnet = netip.MustParsePrefix("10.96.0.9/24")
	second, err := Open(ctx, o)
	must(t, err)
	if n, err := second.Get(ctx, "bridge"); err != nil || n.Subnets[0].Prefix != old {
		t.Errorf("the subnet changed under a container: %+v, %v", n, err)
	}
	must(t, errors.Join(second.Disconnect(ctx, "bridge", "a"), second.Settle(ctx)))
	second.stop() // a bridge with the old address is left
	m := manager(t, o)
	a.m = m
	n, err := m.Get(ctx, "bridge")
	if err != nil || n.Subnets[0].Prefix.String() != "10.96.0.0/24" || n.Subnets[0].Gateway != addr("10.96.0.9") {
		t.Errorf("%+v, %v", n, err)
	}
	again := a.connect("bridge", func(c *EndpointConfig) { c.IPv4 = addr("10.96.0.77") })
	if again.IPv4.String() != "10.96.0.77/24" || again.NetworkID != ea.NetworkID {
		t.Errorf("%+v", again)
	}
	l, err := m.host.LinkByName(o.BridgeName)
	must(t, err)
	addrs, err := m.host.AddrList(l, netlink.FAMILY_V4)
	if err != nil || len(addrs) != 1 || addrs[0].IP.String() != "10.96.0.9" {
		t.Error(addrs, err)
	}
	// The address that was asked for is there again at once, also for a namespace of the same name.
	must(t, errors.Join(m.Disconnect(ctx, "bridge", "a"), m.DeleteNetns(ctx, a.path)))
	a = newBox(t, m, "a")
	if third := a.connect("bridge", func(c *EndpointConfig) { c.IPv4 = addr("10.96.0.77") }); third.IPv4 != again.IPv4 {
		t.Errorf("%+v", third)
	}
}

func TestEarlierBoot(t *testing.T) {
	nstest.NeedRoot(t)
	o := options(t)
	m, err := Open(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	a := newBox(t, m, "a")
	a.connect("bridge", nil)
	m.boot = "another"
	e := m.liveEndpoints()[0]
	if err := m.saveEndpoint(e, false); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(m.endpointDir, "broken.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	n := manager(t, o)
	if es := n.liveEndpoints(); len(es) != 0 {
		t.Error(es)
	}
	if files, _ := os.ReadDir(n.endpointDir); len(files) != 0 {
		t.Error(files)
	}
	n.removeLink(e.HostIfName)
}
