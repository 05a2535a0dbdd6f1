package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Ephemeral host ports come from here: above the well-known registrations, and
// not up to the end, where some kernels and firewalls keep ranges of their own.
const (
	firstEphemeral = 49153
	lastEphemeral  = 60999
)

func protoNumber(name string) (uint8, error) {
	switch name {
	case "", "tcp":
		return unix.IPPROTO_TCP, nil
	case "udp":
		return unix.IPPROTO_UDP, nil
	case "sctp":
		return unix.IPPROTO_SCTP, nil
	}
	return 0, fmt.Errorf("invalid protocol %q: tcp, udp or sctp: %w", name, errdefs.ErrInvalidArgument)
}

// portKey is one number space of ports.
type portKey struct {
	proto uint8
	port  uint16
}

// ports holds the host's ports for endpoints: in this table against other endpoints, and
// with a socket against the other programs of the host.
type ports struct {
	// allowed tells whether a client may use what the daemon relays; the firewall decides for the rest.
	allowed func(client netip.Addr) bool

	mu   sync.Mutex
	used map[portKey][]netip.Addr // the zero address: all
	next uint16
}

func newPorts(allowed func(netip.Addr) bool) *ports {
	return &ports{allowed: allowed, used: map[portKey][]netip.Addr{}, next: firstEphemeral}
}

// reservation is one host port that is held.
type reservation struct {
	PortMapping
	proto uint8
	relay *relay // nil while another program has the port (after a restart), or for SCTP
}

// overlap tells whether two host addresses cannot both have one port.
func overlap(a, b netip.Addr) bool {
	all := func(x, y netip.Addr) bool { // x stands for all addresses of y's family
		return !x.IsValid() || x.IsUnspecified() && (!y.IsValid() || x.Is4() == y.Is4())
	}
	return all(a, b) || all(b, a) || a == b
}

// claim marks the port as used in the table, if it is free there.
func (p *ports) claim(k portKey, host netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if slices.ContainsFunc(p.used[k], func(a netip.Addr) bool { return overlap(a, host) }) {
		return false
	}
	p.used[k] = append(p.used[k], host)
	return true
}

func (p *ports) unclaim(k portKey, host netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.Index(p.used[k], host); i >= 0 {
		p.used[k] = slices.Delete(p.used[k], i, i+1)
	}
	if len(p.used[k]) == 0 {
		delete(p.used, k)
	}
}

// hostString is the address as Docker writes it in its messages.
func hostString(a netip.Addr) string {
	if !a.IsValid() {
		return "0.0.0.0"
	}
	return a.String()
}

// reserve takes the host port that m asks for and answers on it with to. The mapping
// in the result has its port filled in. Errors: ErrInvalidArgument; ErrAlreadyExists
// in Docker's words when the port, or each one of a range, is taken.
func (p *ports) reserve(m PortMapping, to target) (*reservation, error) {
	proto, err := protoNumber(m.Proto)
	if err != nil {
		return nil, err
	}
	if m.Proto == "" {
		m.Proto = "tcp"
	}
	if m.ContainerPort == 0 {
		return nil, fmt.Errorf("invalid container port 0: %w", errdefs.ErrInvalidArgument)
	}
	m.HostIP = m.HostIP.Unmap()
	first, last := m.HostPort, max(m.HostPort, m.HostPortEnd)
	start := first
	switch {
	case m.HostPort == 0:
		first, last = firstEphemeral, lastEphemeral
		p.mu.Lock()
		start = p.next
		p.mu.Unlock()
	case m.HostPortEnd != 0 && m.HostPortEnd < m.HostPort:
		return nil, fmt.Errorf("invalid host port range %d-%d: %w", m.HostPort, m.HostPortEnd, errdefs.ErrInvalidArgument)
	}
	var conflict error
	for i := range int(last) - int(first) + 1 {
		port := first + uint16((int(start)-int(first)+i)%(int(last)-int(first)+1))
		r, err := p.reserveOne(m, proto, port, to)
		if err == nil {
			if m.HostPort == 0 {
				p.mu.Lock()
				p.next = firstEphemeral + (port-firstEphemeral+1)%(lastEphemeral-firstEphemeral+1)
				p.mu.Unlock()
			}
			return r, nil
		}
		if !errors.Is(err, errdefs.ErrAlreadyExists) {
			return nil, err
		}
		conflict = err
	}
	if first != last {
		return nil, fmt.Errorf("Bind for %s failed: all ports are allocated: %w: %w",
			net.JoinHostPort(hostString(m.HostIP), fmt.Sprintf("%d-%d", first, last)), errdefs.ErrAlreadyExists, conflict)
	}
	return nil, conflict
}

func (p *ports) reserveOne(m PortMapping, proto uint8, port uint16, to target) (*reservation, error) {
	where := net.JoinHostPort(hostString(m.HostIP), strconv.Itoa(int(port)))
	k := portKey{proto, port}
	if !p.claim(k, m.HostIP) {
		return nil, fmt.Errorf("Bind for %s failed: port is already allocated: %w", where, errdefs.ErrAlreadyExists)
	}
	m.HostPort, m.HostPortEnd = port, 0
	r := &reservation{PortMapping: m, proto: proto}
	if err := p.bind(r, to); err != nil {
		p.unclaim(k, m.HostIP)
		if errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("failed to bind host port %s/%s: address already in use: %w", where, m.Proto, errdefs.ErrAlreadyExists)
		}
		return nil, fmt.Errorf("failed to bind host port %s/%s: %w: %w", where, m.Proto, err, errdefs.ErrFailedPrecondition)
	}
	return r, nil
}

// restore takes a port again after a restart of the daemon. It is ours in the table in any case,
// since the firewall forwards it; the error tells that another program took the socket.
func (p *ports) restore(m PortMapping, to target) (*reservation, error) {
	proto, err := protoNumber(m.Proto)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	k := portKey{proto, m.HostPort}
	p.used[k] = append(p.used[k], m.HostIP)
	p.mu.Unlock()
	r := &reservation{PortMapping: m, proto: proto}
	return r, p.bind(r, to)
}

func (p *ports) release(r *reservation) {
	if r.relay != nil {
		r.relay.close()
	}
	p.unclaim(portKey{r.proto, r.HostPort}, r.HostIP)
}

// bind opens the socket that keeps the port from other programs.
func (p *ports) bind(r *reservation, to target) error {
	suffix := ""
	switch {
	case !r.HostIP.IsValid(): // both families
	case r.HostIP.Is4():
		suffix = "4"
	default:
		suffix = "6"
	}
	host := ""
	if r.HostIP.IsValid() {
		host = r.HostIP.String()
	}
	addr := net.JoinHostPort(host, strconv.Itoa(int(r.HostPort)))
	var lc net.ListenConfig
	switch r.proto {
	case unix.IPPROTO_TCP:
		l, err := lc.Listen(context.Background(), "tcp"+suffix, addr)
		if err != nil {
			return err
		}
		r.relay = relayTCP(l, to, p.allowed)
	case unix.IPPROTO_UDP:
		c, err := lc.ListenPacket(context.Background(), "udp"+suffix, addr)
		if err != nil {
			return err
		}
		r.relay = relayUDP(c, to, p.allowed)
	}
	return nil
}

// firewallPorts gives the rules that carry the reservation's traffic in the kernel.
func (r *reservation) firewallPorts(to target) []fwPort {
	var out []fwPort
	for _, a := range []netip.Addr{to.v4, to.v6} {
		host := r.HostIP
		if host.IsUnspecified() {
			if host.Is4() != a.Is4() {
				continue
			}
			host = netip.Addr{}
		}
		if !a.IsValid() || host.IsValid() && (host.Is4() != a.Is4() || host == netip.IPv6Loopback()) {
			continue // the relay carries these
		}
		out = append(out, fwPort{proto: r.proto, host: host, port: r.HostPort, dest: netip.AddrPortFrom(a, r.ContainerPort)})
	}
	return out
}
