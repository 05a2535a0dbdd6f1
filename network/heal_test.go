package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/hako-engine/hako/network/internal/nstest"
)

func TestHeal(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := context.Background()
	m := manager(t, options(t))
	if _, err := m.Create(ctx, Config{Name: "apps"}); err != nil {
		t.Fatal(err)
	}
	a, b := newBox(t, m, "a"), newBox(t, m, "b")
	ea := a.connect("apps", func(c *EndpointConfig) {
		c.Ports = []PortMapping{{Proto: "tcp", ContainerPort: 80, HostPort: 18060}, {Proto: "udp", ContainerPort: 80, HostPort: 18060}}
	})
	b.connect("apps", nil)
	a.serve(80)
	works := func(what string) {
		t.Helper()
		eventually(t, what, func() error {
			for _, proto := range []string{"tcp", "udp"} {
				// Not through the relay: only the firewall rewrites to the gateway's own source here.
				if got, err := b.ask(proto, ea.Gateway4.String()+":18060", refused); err != nil || got != "a sees "+ea.Gateway4.String() {
					return fmt.Errorf("published, %s: %q, %v", proto, got, err)
				}
				if got, err := b.ask(proto, ea.IPv4.Addr().String()+":80", refused); err != nil {
					return fmt.Errorf("direct, %s: %q, %v", proto, got, err)
				}
				if readSysctl(sysctlForward4) != "1" {
					return errors.New("the host does not route")
				}
				if got, err := ask(proto, "127.0.0.1:18060", refused); err != nil {
					return fmt.Errorf("loopback, %s: %q, %v", proto, got, err)
				}
			}
			m.fw.mu.Lock()
			defer m.fw.mu.Unlock()
			if !m.fw.whole() {
				return errors.New("the table is not whole")
			}
			return nil
		})
	}
	works("before")
	nft := func(do func(*nftables.Conn)) {
		t.Helper()
		c, err := nftables.New()
		if err != nil {
			t.Fatal(err)
		}
		do(c)
		if err := c.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	bridge := "hk-" + ea.NetworkID[:12]
	for what, harm := range map[string]func(){
		"table deleted": func() { nft(func(c *nftables.Conn) { c.DelTable(m.fw.table()) }) },
		"table flushed": func() { nft(func(c *nftables.Conn) { c.FlushTable(m.fw.table()) }) },
		"map flushed": func() {
			nft(func(c *nftables.Conn) { c.FlushSet(&nftables.Set{Table: m.fw.table(), Name: mapPorts4}) })
		},
		"bridge deleted": func() { must(t, m.removeLink(bridge)) },
		"bridge down": func() {
			l, err := m.host.LinkByName(bridge)
			must(t, err)
			must(t, m.host.LinkSetDown(l))
		},
		"address removed": func() {
			l, err := m.host.LinkByName(bridge)
			must(t, err)
			must(t, m.host.AddrDel(l, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(ea.Gateway4, ea.IPv4.Bits()))}))
		},
		"port taken out": func() {
			l, err := m.host.LinkByName(ea.HostIfName)
			must(t, err)
			must(t, m.host.LinkSetNoMaster(l))
		},
		"routing off":   func() { must(t, writeSysctl(sysctlForward4, "0")) },
		"cable removed": func() { must(t, m.removeLink(ea.HostIfName)) },
	} {
		harm()
		works(what)
	}
	t.Run("the healer ends with the last endpoint", func(t *testing.T) {
		a.remove("apps")
		b.remove("apps")
		eventually(t, "end", func() error {
			m.mu.Lock()
			defer m.mu.Unlock()
			if m.healing {
				return errors.New("it still runs")
			}
			return nil
		})
	})
}

// TestLateHealer: a look at the host's state that began while there was an endpoint makes no bridge for a network that is
// gone by the time it comes to it.
func TestLateHealer(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := context.Background()
	m := manager(t, options(t))
	n, err := m.Create(ctx, Config{Name: "apps"})
	must(t, err)
	a := newBox(t, m, "a")
	ep := a.connect("apps", nil)
	m.mu.RLock()
	late, e := m.nets[n.ID], m.nets[n.ID].eps["a"]
	m.mu.RUnlock()
	a.remove("apps")
	must(t, m.Settle(ctx))
	must(t, m.Remove(ctx, n.ID))
	m.healBridge(ctx, late, nil)
	if _, err := m.host.LinkByName("hk-" + ep.NetworkID[:12]); err == nil {
		t.Error("the bridge of a network that was removed is there again")
	}
	m.dismiss(e) // the undoing of a Connect that met the Disconnect
}
