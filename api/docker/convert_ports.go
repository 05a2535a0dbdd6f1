package docker

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/container"
	wire "github.com/moby/moby/api/types/network"

	"github.com/hako-engine/hako/engine"
)

func exposedFrom(ports wire.PortSet) []string {
	var out []string
	for _, p := range slices.SortedFunc(maps.Keys(ports), comparePorts) {
		out = append(out, p.String())
	}
	return out
}

func comparePorts(a, b wire.Port) int {
	return cmp.Or(cmp.Compare(a.Num(), b.Num()), cmp.Compare(a.Proto(), b.Proto()))
}

// portsFrom converts the ports to publish, in the order of their numbers.
func portsFrom(bindings wire.PortMap) ([]engine.PortMapping, error) {
	var out []engine.PortMapping
	for _, port := range slices.SortedFunc(maps.Keys(bindings), comparePorts) {
		switch port.Proto() {
		case wire.TCP, wire.UDP, wire.SCTP:
		default:
			return nil, invalidf("invalid port specification: %q: unknown protocol", port)
		}
		for _, b := range bindings[port] {
			m := engine.PortMapping{Proto: string(port.Proto()), ContainerPort: port.Num(), HostIP: b.HostIP}
			first, last, isRange := strings.Cut(b.HostPort, "-")
			if b.HostPort != "" {
				n, err := strconv.ParseUint(first, 10, 16)
				if err != nil {
					return nil, invalidf("invalid port specification: %q", b.HostPort)
				}
				m.HostPort = uint16(n)
			}
			if isRange {
				n, err := strconv.ParseUint(last, 10, 16)
				if err != nil || uint16(n) < m.HostPort || m.HostPort == 0 {
					return nil, invalidf("invalid port specification: %q", b.HostPort)
				}
				if uint16(n) > m.HostPort {
					m.HostPortEnd = uint16(n)
				}
			}
			out = append(out, m)
		}
	}
	return out, nil
}

// portBindings gives back what was asked to be published.
func portBindings(ports []engine.PortMapping) wire.PortMap {
	out := wire.PortMap{}
	for _, m := range ports {
		port, ok := wire.PortFrom(m.ContainerPort, wire.IPProtocol(m.Proto))
		if !ok {
			continue
		}
		b := wire.PortBinding{HostIP: m.HostIP}
		if m.HostPort != 0 {
			b.HostPort = strconv.Itoa(int(m.HostPort))
		}
		if m.HostPortEnd > m.HostPort {
			b.HostPort += "-" + strconv.Itoa(int(m.HostPortEnd))
		}
		out[port] = append(out[port], b)
	}
	return out
}

// published lists every port of a container: with where it is published, or null when it is only exposed.
func published(ctr *engine.Container) wire.PortMap {
	out := wire.PortMap{}
	for _, s := range ctr.ExposedPorts {
		if p, err := wire.ParsePort(s); err == nil {
			out[p] = nil
		}
	}
	for _, ep := range ctr.Endpoints {
		for _, m := range ep.Ports {
			p, ok := wire.PortFrom(m.ContainerPort, wire.IPProtocol(m.Proto))
			if !ok {
				continue
			}
			for _, ip := range hostIPs(m.HostIP) {
				b := wire.PortBinding{HostIP: ip, HostPort: strconv.Itoa(int(m.HostPort))}
				if !slices.Contains(out[p], b) {
					out[p] = append(out[p], b)
				}
			}
		}
	}
	return out
}

// hostIPs spells out what no address means.
func hostIPs(ip netip.Addr) []netip.Addr {
	if ip.IsValid() {
		return []netip.Addr{ip}
	}
	return []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
}

// portSummaries is the short form of published, for lists.
func portSummaries(ctr *engine.Container) []container.PortSummary {
	out := []container.PortSummary{}
	if ctr.State.Status != engine.StatusRunning && ctr.State.Status != engine.StatusPaused {
		return out
	}
	ports := published(ctr)
	for _, p := range slices.SortedFunc(maps.Keys(ports), comparePorts) {
		s := container.PortSummary{PrivatePort: p.Num(), Type: string(p.Proto())}
		if len(ports[p]) == 0 {
			out = append(out, s)
		}
		for _, b := range ports[p] {
			n, err := strconv.ParseUint(b.HostPort, 10, 16)
			if err != nil {
				continue
			}
			s.IP, s.PublicPort = b.HostIP, uint16(n)
			out = append(out, s)
		}
	}
	return out
}

func exposedSet(ports []string) wire.PortSet {
	if len(ports) == 0 {
		return nil
	}
	out := wire.PortSet{}
	for _, s := range ports {
		if p, err := wire.ParsePort(s); err == nil {
			out[p] = struct{}{}
		}
	}
	return out
}
