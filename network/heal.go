package network

import (
	"context"
	"errors"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/undo"
)

// startHealing starts the check of the host's state; it ends by itself with the last
// endpoint. The caller holds mu.
func (m *Manager) startHealing() {
	if m.healing || m.ctx.Err() != nil {
		return
	}
	m.healing = true
	m.background.Go(func() {
		t := time.NewTicker(m.o.HealEvery)
		defer t.Stop()
		for {
			select {
			case <-m.ctx.Done():
				return
			case <-t.C:
			}
			m.mu.Lock()
			if m.healing = m.hasBridged(); !m.healing {
				m.mu.Unlock()
				return
			}
			m.mu.Unlock()
			m.heal(m.ctx)
		}
	})
}

func (m *Manager) hasBridged() bool {
	for _, n := range m.nets {
		if n.Driver == DriverBridge && len(n.eps) > 0 {
			return true
		}
	}
	return false
}

// heal looks once for what others removed from the host, and makes it again.
func (m *Manager) heal(ctx context.Context) {
	// In this order: whatever an endpoint needs was there before it became live.
	eps := m.liveEndpoints()
	links, err := dump(m.host.LinkList)
	if err != nil {
		m.log.Warn("cannot list the host's interfaces", "error", err)
		return
	}
	byName := make(map[string]netlink.Link, len(links))
	for _, l := range links {
		byName[l.Attrs().Name] = l
	}
	m.healForwarding(eps)
	seen := map[*netw]bool{}
	for _, e := range eps {
		if e.net.Driver == DriverBridge && !seen[e.net] {
			seen[e.net] = true
			m.healBridge(ctx, e.net, byName[e.net.Bridge])
		}
	}
	if rebuilt, err := m.fw.heal(); err != nil {
		m.log.Error("cannot restore the firewall table", "table", m.fw.name, "error", err)
	} else if rebuilt {
		m.log.Warn("the firewall table was changed by others and is restored", "table", m.fw.name)
	}
	for _, e := range eps {
		if e.net.Driver == DriverBridge {
			m.healEndpoint(ctx, e, byName[e.HostIfName])
		}
	}
}

// healForwarding turns the host's routing on again, which a reload of its sysctls turns off.
func (m *Manager) healForwarding(eps []*endpoint) {
	var v4, v6 bool
	for _, e := range eps {
		if e.net.Driver == DriverBridge && !e.net.Internal {
			v4, v6 = v4 || e.net.EnableIPv4, v6 || e.net.EnableIPv6
		}
	}
	for _, f := range []struct {
		used   bool
		sysctl string
		on     func() error
	}{{v4, sysctlForward4, forwardIPv4}, {v6, sysctlForward6, m.forwardIPv6}} {
		if !f.used || readSysctl(f.sysctl) != "0" {
			continue
		}
		if err := f.on(); err != nil {
			m.log.Error("cannot let the host route for containers", "sysctl", f.sysctl, "error", err)
			continue
		}
		m.log.Warn("routing was turned off on the host and is on again", "sysctl", f.sysctl)
	}
}

func (m *Manager) healBridge(ctx context.Context, n *netw, link netlink.Link) {
	index := int32(0)
	if link != nil && link.Attrs().RawFlags&unix.IFF_UP != 0 {
		index = int32(link.Attrs().Index)
	}
	old := n.index.Load()
	if index != 0 && (index == old || old == 0) && m.hasGateways(n, link) {
		n.index.CompareAndSwap(0, index)
		return
	}
	if old != 0 {
		m.log.Warn("a bridge was changed by others and is restored", "network", n.Name, "bridge", n.Bridge)
	}
	n.index.CompareAndSwap(old, 0)
	if err := m.bringUp(ctx, n); err != nil {
		m.log.Error("cannot restore a bridge", "network", n.Name, "bridge", n.Bridge, "error", err)
	}
}

func (m *Manager) hasGateways(n *netw, link netlink.Link) bool {
	addrs, err := dump(func() ([]netlink.Addr, error) { return m.host.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return false
	}
	for _, s := range n.Subnets {
		found := false
		for _, a := range addrs {
			found = found || a.IP.Equal(s.Gateway.AsSlice())
		}
		if !found && s.Gateway.IsValid() {
			return false
		}
	}
	return true
}

// healEndpoint puts the endpoint's cable back into its bridge, lays a new one if it is
// gone, and takes ports that another program had.
func (m *Manager) healEndpoint(ctx context.Context, e *endpoint, link netlink.Link) {
	if link != nil && link.Attrs().MasterIndex == int(e.net.index.Load()) && link.Attrs().RawFlags&unix.IFF_UP != 0 && !m.lacksPorts(e) {
		return
	}
	e.box.mu.Lock()
	defer e.box.mu.Unlock()
	m.mu.RLock()
	here := e.net.eps[e.ID] == e && e.live
	m.mu.RUnlock()
	index := int(e.net.index.Load())
	if !here || index == 0 {
		return
	}
	for _, r := range e.held {
		if r.relay == nil && r.proto != unix.IPPROTO_SCTP && m.ports.bind(r, e.target(r.PortMapping)) == nil {
			m.log.Info("a published port is held again", "endpoint", e.ID, "port", r.HostPort, "protocol", r.Proto)
		}
	}
	link, err := m.host.LinkByName(e.HostIfName)
	switch {
	case err == nil && link.Attrs().MasterIndex == index && link.Attrs().RawFlags&unix.IFF_UP != 0:
		return
	case err == nil:
		if err = m.host.LinkSetMasterByIndex(link, index); err == nil {
			err = raisePort(e.HostIfName, e.net.isolated)
		}
	default:
		if _, gone := err.(netlink.LinkNotFoundError); !gone || !isNamespace(e.Netns) {
			return
		}
		err = m.replug(ctx, e)
	}
	if err != nil {
		m.log.Error("cannot restore an endpoint", "endpoint", e.ID, "network", e.NetworkName, "interface", e.HostIfName, "error", err)
		return
	}
	m.log.Warn("an endpoint was changed by others and is restored", "endpoint", e.ID, "network", e.NetworkName, "interface", e.HostIfName)
}

func (m *Manager) lacksPorts(e *endpoint) bool {
	e.box.mu.Lock()
	defer e.box.mu.Unlock()
	for _, r := range e.held {
		if r.relay == nil && r.proto != unix.IPPROTO_SCTP {
			return true
		}
	}
	return false
}

func (m *Manager) replug(ctx context.Context, e *endpoint) error {
	ns, err := openNamespace(e.Netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	var u undo.Stack
	if err := m.plug(e, ns, EndpointConfig{IfName: e.IfName}, &u); err != nil {
		return errors.Join(err, u.Run(ctx))
	}
	u.Release()
	return nil
}
