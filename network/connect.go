package network

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/undo"
)

// Connect joins a sandbox to a network. Errors: ErrNotFound (network), ErrInvalidArgument,
// ErrAlreadyExists (endpoint, address, or port; for ports in Docker's words),
// ErrResourceExhausted (no address is free). What it did is taken back on an error. The caller
// names the endpoint and the network.
func (m *Manager) Connect(ctx context.Context, c EndpointConfig) (_ Endpoint, err error) {
	mac, err := checkEndpoint(c)
	if err != nil {
		return Endpoint{}, err
	}
	var u undo.Stack
	defer func() { err = errors.Join(err, u.Run(ctx)) }()

	e, err := m.admit(ctx, c, mac)
	if err != nil {
		return Endpoint{}, err
	}
	u.Add("endpoint "+c.ID, func(context.Context) error { m.dismiss(e); return nil })
	u.Add("record of "+c.ID, func(context.Context) error { return m.forgetEndpoint(e.EndpointID) })
	if e.net.Driver == DriverBridge {
		e.box.mu.Lock()
		defer e.box.mu.Unlock()
		// If the daemon dies in the middle, the next one finds what there is to take back.
		if err := m.saveEndpoint(e, true); err != nil {
			return Endpoint{}, err
		}
		if err := m.attach(ctx, e, c, &u); err != nil {
			return Endpoint{}, err
		}
	}
	if err := m.saveEndpoint(e, false); err != nil {
		return Endpoint{}, err
	}
	u.Release()
	m.mu.Lock()
	defer m.mu.Unlock()
	e.live = true
	e.net.publish(e)
	if e.net.Driver == DriverBridge {
		m.startHealing()
	}
	return e.Endpoint.clone(), nil
}

func checkEndpoint(c EndpointConfig) (net.HardwareAddr, error) {
	if c.ID == "" {
		return nil, fmt.Errorf("endpoint without an id: %w", errdefs.ErrInvalidArgument)
	}
	if c.IfName != "" && !validIfName(c.IfName) {
		return nil, fmt.Errorf("interface name %q is not possible: %w", c.IfName, errdefs.ErrInvalidArgument)
	}
	for k, v := range c.Sysctls {
		if _, err := sysctlPath(k, "eth0"); err != nil || strings.ContainsAny(v, "\x00\n") {
			return nil, fmt.Errorf("endpoint sysctl %s=%q: %w", k, v, errdefs.ErrInvalidArgument)
		}
	}
	if c.MAC == "" {
		return nil, nil
	}
	mac, err := net.ParseMAC(c.MAC)
	if err != nil || len(mac) != 6 || mac[0]&1 != 0 {
		return nil, fmt.Errorf("invalid MAC address %q: %w", c.MAC, errdefs.ErrInvalidArgument)
	}
	return mac, nil
}

// sysctlPath gives the file of a per-interface sysctl: net.ipv4.conf.IFNAME.x and its like.
func sysctlPath(key, ifName string) (string, error) {
	parts := strings.Split(key, ".")
	if len(parts) != 5 || parts[0] != "net" || parts[3] != "IFNAME" || !slices.Contains([]string{"ipv4", "ipv6", "mpls"}, parts[1]) ||
		strings.ContainsAny(key, "/\x00") || parts[2] == "" || parts[4] == "" {
		return "", fmt.Errorf("sysctl %q is not net.FAMILY.KIND.IFNAME.NAME: %w", key, errdefs.ErrInvalidArgument)
	}
	parts[3] = ifName
	return strings.Join(parts, "/"), nil
}

// admit enters the endpoint into the tables with its addresses and names, not yet live. Where an
// endpoint that is on its way out stands in the way, it waits for that.
func (m *Manager) admit(ctx context.Context, c EndpointConfig, mac net.HardwareAddr) (*endpoint, error) {
	limit := time.After(admitLimit)
	for {
		m.mu.Lock()
		e, err := m.enroll(c, mac)
		var wait <-chan struct{}
		if errors.Is(err, errdefs.ErrAlreadyExists) || errors.Is(err, errdefs.ErrResourceExhausted) || errors.Is(err, errLeaving) {
			wait = m.blocker(c)
		}
		m.mu.Unlock()
		if wait == nil {
			return e, err
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err())
		case <-limit:
			return nil, err
		}
	}
}

// admitLimit is far above what the kernel takes to remove an interface.
const admitLimit = 15 * time.Second

// blocker gives what to wait for before a refused request is tried again. The caller holds mu.
func (m *Manager) blocker(c EndpointConfig) <-chan struct{} {
	if n, err := m.find(c.Network); err == nil {
		for _, e := range n.eps {
			if e.leaving != nil {
				return e.leaving
			}
		}
	}
	if b := m.boxes[c.Netns]; b != nil {
		for _, e := range b.eps {
			if e.leaving != nil {
				return e.leaving
			}
		}
	}
	return nil
}

var errLeaving = fmt.Errorf("an interface of the sandbox is being removed: %w", errdefs.ErrUnavailable)

// enroll is one try of admit. The caller holds mu.
func (m *Manager) enroll(c EndpointConfig, mac net.HardwareAddr) (*endpoint, error) {
	n, err := m.find(c.Network)
	if err != nil {
		return nil, err
	}
	if b := m.boxes[c.Netns]; b != nil && slices.ContainsFunc(b.eps, func(e *endpoint) bool { return e.leaving != nil }) {
		return nil, errLeaving // its interface still has its name
	}
	if n.leaving {
		return nil, fmt.Errorf("network %s is being removed: %w", n.Name, errdefs.ErrFailedPrecondition)
	}
	if n.eps[c.ID] != nil {
		return nil, fmt.Errorf("endpoint with id %s already exists in network %s: %w", c.ID, n.Name, errdefs.ErrAlreadyExists)
	}
	id := make([]byte, 32)
	rand.Read(id)
	e := &endpoint{net: n, hostname: c.Hostname, priority: c.GatewayPriority, upstream: slices.Clone(c.DNS), Endpoint: Endpoint{
		ID: c.ID, EndpointID: hex.EncodeToString(id), NetworkID: n.ID, NetworkName: n.Name, Netns: c.Netns,
		Name: c.Name, Aliases: slices.Clone(c.Aliases), IfName: c.IfName,
	}}
	if n.Driver == DriverBridge {
		if err := e.takeAddresses(c.IPv4, c.IPv6); err != nil {
			return nil, err
		}
		e.HostIfName = "veth" + e.EndpointID[:8]
		if mac == nil {
			mac = macOf(e.Endpoint)
		}
		e.MAC = mac.String()
		e.setDNSNames()
	}
	m.enter(e)
	if e.IfName == "" && n.Driver == DriverBridge {
		e.IfName = e.box.freeName()
	}
	return e, nil
}

// enter puts the endpoint into its network and its sandbox. The caller holds mu.
func (m *Manager) enter(e *endpoint) {
	b := m.boxes[e.Netns]
	if b == nil {
		b = &sandbox{path: e.Netns}
		m.boxes[e.Netns] = b
	}
	e.box, b.eps, e.net.eps[e.ID] = b, append(b.eps, e), e
}

// dismiss takes the endpoint out of the tables and frees its addresses.
func (m *Manager) dismiss(e *endpoint) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e.net.eps[e.ID] != e { // a Connect that failed met a Disconnect: one of them has done it
		return
	}
	e.net.unpublish(e)
	e.releaseAddresses()
	delete(e.net.eps, e.ID)
	e.box.eps = slices.DeleteFunc(e.box.eps, func(o *endpoint) bool { return o == e })
	if len(e.box.eps) == 0 && m.boxes[e.box.path] == e.box {
		delete(m.boxes, e.box.path)
	}
	if e.leaving != nil {
		close(e.leaving)
	}
}

// readmit takes up an endpoint of an earlier daemon.
func (m *Manager) readmit(s endpointState) (*endpoint, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.nets[s.Endpoint.NetworkID]
	if n == nil {
		return nil, fmt.Errorf("network %s: %w", s.Endpoint.NetworkID, errdefs.ErrNotFound)
	}
	e := &endpoint{Endpoint: s.Endpoint, hostname: s.Hostname, priority: s.GatewayPriority, upstream: s.DNS, net: n, live: !s.Unfinished}
	if err := e.takeAddresses(e.IPv4.Addr(), e.IPv6.Addr()); err != nil {
		return nil, err
	}
	m.enter(e)
	if e.live {
		n.publish(e)
		e.box.port = max(e.box.port, s.DNSPort)
	}
	return e, nil
}

func (e *endpoint) takeAddresses(want4, want6 netip.Addr) error {
	if want4.IsValid() && !e.net.EnableIPv4 || want6.IsValid() && !e.net.EnableIPv6 {
		return fmt.Errorf("network %s has no subnet for the address that was asked for: %w", e.net.Name, errdefs.ErrInvalidArgument)
	}
	for i, p := range e.net.pools {
		want := want4
		if !p.prefix.Addr().Is4() {
			want = want6
		}
		a, err := p.take(e.EndpointID, want)
		if err != nil {
			e.releaseAddresses()
			return err
		}
		gw := e.net.Subnets[i].Gateway
		if e.net.Internal {
			gw = netip.Addr{}
		}
		if a.Is4() {
			e.IPv4, e.Gateway4 = netip.PrefixFrom(a, p.prefix.Bits()), gw
		} else {
			e.IPv6, e.Gateway6 = netip.PrefixFrom(a, p.prefix.Bits()), gw
		}
	}
	return nil
}

func (e *endpoint) releaseAddresses() {
	for _, p := range e.net.pools {
		p.release(e.EndpointID, e.IPv4.Addr())
		p.release(e.EndpointID, e.IPv6.Addr())
	}
}

// macOf derives the address from the IPv4 address, so that a neighbour's stale entry for a reused address is right.
func macOf(e Endpoint) net.HardwareAddr {
	mac := net.HardwareAddr{0x02, 0x42, 0, 0, 0, 0}
	if e.IPv4.IsValid() {
		copy(mac[2:], e.IPv4.Addr().AsSlice())
	} else {
		sum := sha256.Sum256(e.IPv6.Addr().AsSlice())
		copy(mac[2:], sum[:4])
	}
	return mac
}

// freeName gives the first ethN that no endpoint of the sandbox has.
func (b *sandbox) freeName() string {
	for i := 0; ; i++ {
		name := "eth" + strconv.Itoa(i)
		if !slices.ContainsFunc(b.eps, func(e *endpoint) bool { return e.IfName == name }) {
			return name
		}
	}
}

func (e *endpoint) target(p PortMapping) target {
	return target{v4: e.IPv4.Addr(), v6: e.IPv6.Addr(), port: p.ContainerPort}
}

func (e *endpoint) firewallPorts() []fwPort {
	var out []fwPort
	for _, p := range e.Ports {
		proto, err := protoNumber(p.Proto)
		if err != nil {
			continue // of a record; Connect has refused it
		}
		r := reservation{PortMapping: p, proto: proto}
		out = append(out, r.firewallPorts(e.target(p))...)
	}
	return out
}

// attach does the work of Connect on a bridge network. The caller holds box.mu.
func (m *Manager) attach(ctx context.Context, e *endpoint, c EndpointConfig, u *undo.Stack) error {
	ns, err := openNamespace(e.Netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	if !e.net.Internal { // nothing is published into an internal network
		if err := m.reservePorts(e, c.Ports, u); err != nil {
			return err
		}
	}
	if err := m.bringUp(ctx, e.net); err != nil {
		return err
	}
	if err := m.plug(e, ns, c, u); err != nil {
		return err
	}
	u.Add("names for "+e.ID, func(context.Context) error { return m.stopDNS(e) })
	if err := m.startDNS(e); err != nil {
		return err
	}
	e.Nameservers = reachableServers(m.o.ResolvConf)
	if e.box.dns != nil {
		e.Nameservers = []netip.Addr{EmbeddedDNS}
	}
	ports := e.firewallPorts()
	u.Add("published ports of "+e.ID, func(context.Context) error {
		m.fw.retirePorts(e.EndpointID)
		return m.fw.sweepPorts()
	})
	if err := m.fw.addPorts(e.EndpointID, ports); err != nil {
		return err
	}
	flushFlows(ports)
	return nil
}

func openNamespace(path string) (*os.File, error) {
	if path == "" {
		return nil, fmt.Errorf("endpoint without a network namespace: %w", errdefs.ErrInvalidArgument)
	}
	ns, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(ns.Fd()), &st); err != nil || st.Type != unix.NSFS_MAGIC {
		ns.Close()
		return nil, fmt.Errorf("%s is not a network namespace: %w", path, errdefs.ErrInvalidArgument)
	}
	return ns, nil
}

func (m *Manager) reservePorts(e *endpoint, want []PortMapping, u *undo.Stack) error {
	u.Add("port reservations of "+e.ID, func(context.Context) error { m.releasePorts(e); return nil })
	for _, p := range want {
		if !p.HostIP.IsValid() {
			p.HostIP = e.net.bindIP
		}
		r, err := m.ports.reserve(p, e.target(p))
		if err != nil {
			return err
		}
		e.held = append(e.held, r)
		e.Ports = append(e.Ports, r.PortMapping)
	}
	return nil
}

func (m *Manager) releasePorts(e *endpoint) {
	for _, r := range e.held {
		m.ports.release(r)
	}
	e.held = nil
}

// plug lays the cable and configures the sandbox's end.
func (m *Manager) plug(e *endpoint, ns *os.File, c EndpointConfig, u *undo.Stack) error {
	mac, err := net.ParseMAC(e.MAC)
	if err != nil {
		return fmt.Errorf("MAC address: %w", err)
	}
	u.Add("interface "+e.HostIfName, func(context.Context) error { return m.removeLink(e.HostIfName) })
	for try := 0; ; try++ {
		err := makeVeth(vethSpec{host: e.HostIfName, peer: e.IfName, ns: ns, mac: mac, mtu: e.net.MTU, master: int(e.net.index.Load())})
		if err == nil {
			break
		}
		// The namespace may have interfaces that others put there.
		if errors.Is(err, unix.EEXIST) && c.IfName == "" && try < 64 {
			m.mu.Lock()
			e.IfName = "eth" + strconv.Itoa(try+1)
			m.mu.Unlock()
			continue
		}
		if errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("interface %s exists already in %s: %w", e.IfName, e.Netns, errdefs.ErrAlreadyExists)
		}
		return fmt.Errorf("make interface %s: %w", e.HostIfName, err)
	}
	if err := raisePort(e.HostIfName, e.net.isolated); err != nil {
		return fmt.Errorf("interface %s: %w", e.HostIfName, err)
	}
	if e.IPv6.IsValid() || len(c.Sysctls) > 0 {
		err := m.inNamespace(ns, func() error {
			if e.IPv6.IsValid() {
				if err := writeSysctl("net/ipv6/conf/"+e.IfName+"/disable_ipv6", "0"); err != nil {
					return err
				}
			}
			for k, v := range c.Sysctls {
				path, err := sysctlPath(k, e.IfName)
				if err != nil {
					return err
				}
				if err := writeSysctl(path, v); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	h, err := netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink in %s: %w", e.Netns, err)
	}
	defer h.Close()
	link, err := h.LinkByName(e.IfName)
	if err != nil {
		return fmt.Errorf("interface %s: %w", e.IfName, err)
	}
	for _, p := range []netip.Prefix{e.IPv4, e.IPv6} {
		if !p.IsValid() {
			continue
		}
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD // addresses are unique by allocation, and waiting costs a second
		}
		if err := h.AddrAdd(link, a); err != nil {
			return fmt.Errorf("interface %s: address %s: %w", e.IfName, p, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("interface %s: up: %w", e.IfName, err)
	}
	return m.electGateway(h, e.box, nil)
}

// electGateway gives the sandbox its default routes: through the endpoint of the highest
// priority, then the first by the network's name. The caller holds box.mu.
func (m *Manager) electGateway(h *netlink.Handle, b *sandbox, leaving *endpoint) error {
	m.mu.RLock()
	eps := slices.DeleteFunc(slices.Clone(b.eps), func(e *endpoint) bool { return e == leaving || e.leaving != nil || e.net.Driver != DriverBridge })
	m.mu.RUnlock()
	slices.SortFunc(eps, func(x, y *endpoint) int {
		return cmp.Or(-cmp.Compare(x.priority, y.priority), cmp.Compare(x.NetworkName, y.NetworkName), cmp.Compare(x.NetworkID, y.NetworkID))
	})
	for _, v6 := range []bool{false, true} {
		for _, e := range eps {
			gw := e.Gateway4
			if v6 {
				gw = e.Gateway6
			}
			if !gw.IsValid() {
				continue
			}
			link, err := h.LinkByName(e.IfName)
			if err != nil {
				continue // another Connect to this sandbox waits for its turn
			}
			if len(eps) > 1 {
				if err := dropOtherRoutes(h, link.Attrs().Index, v6); err != nil {
					return fmt.Errorf("default route: %w", err)
				}
			}
			if err := setRoute(h, link.Attrs().Index, gw); err != nil {
				return fmt.Errorf("default route via %s: %w", gw, err)
			}
			break
		}
	}
	return nil
}

// Disconnect gives back everything that Connect took. It is idempotent, and works when the
// namespace is gone. An endpoint that could not be removed completely stays, for another try.
func (m *Manager) Disconnect(ctx context.Context, networkRef, endpointID string) error {
	m.mu.RLock()
	n, err := m.find(networkRef)
	var e *endpoint
	if err == nil {
		e = n.eps[endpointID]
	}
	m.mu.RUnlock()
	if errors.Is(err, errdefs.ErrNotFound) || err == nil && e == nil {
		return nil
	}
	if err == nil {
		err = m.disconnect(context.WithoutCancel(ctx), e)
	}
	if err != nil {
		return fmt.Errorf("disconnect %s from network %s: %w", endpointID, networkRef, err)
	}
	return nil
}

func (m *Manager) disconnect(_ context.Context, e *endpoint) error {
	e.box.mu.Lock() // waits for a Connect under way
	defer e.box.mu.Unlock()
	m.mu.Lock()
	gone := e.net.eps[e.ID] != e || e.leaving != nil
	if !gone {
		e.net.unpublish(e)
	}
	m.mu.Unlock()
	if gone {
		return nil
	}
	if e.net.Driver == DriverBridge {
		m.fw.retirePorts(e.EndpointID)
		m.releasePorts(e)
	}
	m.mu.Lock()
	e.live, e.leaving = false, make(chan struct{})
	m.mu.Unlock()
	if e.net.Driver != DriverBridge {
		err := m.forgetEndpoint(e.EndpointID)
		m.dismiss(e)
		return err
	}
	// Removing rules and an interface keeps the caller for 20 ms to a second, most of it in waits of the
	// kernel for others to let go of it. Nobody needs to wait for that: the address stays taken
	// meanwhile, and a daemon that starts over finds in the record what is left to do.
	err := m.saveEndpoint(e, true)
	m.background.Go(func() { m.reap(e) })
	return err
}

// reap finishes Disconnect in the background.
func (m *Manager) reap(e *endpoint) {
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		err := m.finish(e)
		if err == nil {
			m.dismiss(e)
			return
		}
		m.log.Error("cannot remove all of an endpoint; trying again", "endpoint", e.ID, "network", e.NetworkName, "error", err)
		select {
		case <-m.ctx.Done():
			return // the record is there for the next daemon
		case <-time.After(wait):
		}
	}
}

func (m *Manager) finish(e *endpoint) error {
	if err := m.fw.sweepPorts(); err != nil {
		return err
	}
	flushFlows(e.firewallPorts())
	if err := m.removeLink(e.HostIfName); err != nil {
		return err
	}
	e.box.mu.Lock()
	defer e.box.mu.Unlock()
	if err := errors.Join(m.stopDNS(e), m.leaveGateway(e)); err != nil {
		return err
	}
	return m.forgetEndpoint(e.EndpointID)
}

// Settle waits until the background has done what Disconnect left to it: interfaces are
// gone and addresses free.
func (m *Manager) Settle(ctx context.Context) error {
	for {
		var wait <-chan struct{}
		m.mu.RLock()
		for _, n := range m.nets {
			for _, e := range n.eps {
				if e.leaving != nil {
					wait = e.leaving
				}
			}
		}
		m.mu.RUnlock()
		if wait == nil {
			return nil
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// leaveGateway moves the default routes to the endpoints that stay.
func (m *Manager) leaveGateway(e *endpoint) error {
	m.mu.RLock()
	alone := !slices.ContainsFunc(e.box.eps, func(o *endpoint) bool { return o != e && o.leaving == nil })
	m.mu.RUnlock()
	if alone || !isNamespace(e.Netns) {
		return nil
	}
	ns, err := netns.GetFromPath(e.Netns)
	if err != nil {
		return nil // gone meanwhile
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink in %s: %w", e.Netns, err)
	}
	defer h.Close()
	return m.electGateway(h, e.box, e)
}

// flushFlows makes the kernel forget flows of published ports that would else keep going where they went
// before: those of UDP, and of SCTP, whose peers keep their ports from one association to the next. TCP
// needs no such thing: a new connection is a new flow.
func flushFlows(ports []fwPort) {
	filters := map[netlink.InetFamily][]netlink.CustomConntrackFilter{}
	for _, p := range ports {
		if p.proto != unix.IPPROTO_UDP && p.proto != unix.IPPROTO_SCTP {
			continue
		}
		fam := netlink.InetFamily(unix.AF_INET)
		if p.dest.Addr().Is6() {
			fam = unix.AF_INET6
		}
		byPort, byDest := &netlink.ConntrackFilter{}, &netlink.ConntrackFilter{}
		err := errors.Join(byPort.AddProtocol(p.proto), byPort.AddPort(netlink.ConntrackOrigDstPort, p.port),
			byDest.AddProtocol(p.proto), byDest.AddIP(netlink.ConntrackReplySrcIP, p.dest.Addr().AsSlice()))
		if err == nil {
			filters[fam] = append(filters[fam], byPort, byDest)
		}
	}
	for fam, f := range filters {
		// Best effort: without it a client that keeps its source port waits until the flow times out.
		netlink.ConntrackDeleteFilters(netlink.ConntrackTable, fam, f...)
	}
}

func (e Endpoint) clone() Endpoint {
	e.Aliases, e.DNSNames = slices.Clone(e.Aliases), slices.Clone(e.DNSNames)
	e.Ports, e.Nameservers = slices.Clone(e.Ports), slices.Clone(e.Nameservers)
	return e
}
