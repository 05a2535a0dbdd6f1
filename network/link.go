package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/undo"
)

// Attributes of linux/if_link.h that the netlink library does not name.
const (
	iflaInfoSlaveKind = 4
	iflaInfoSlaveData = 5
	brportMode        = 4  // hairpin
	brportIsolated    = 33 // no traffic between isolated ports
)

const (
	sysctlForward4 = "net/ipv4/ip_forward"
	sysctlForward6 = "net/ipv6/conf/all/forwarding"
)

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// makeBridge creates the bridge of a network with the gateways' addresses, or completes one that is there.
func (m *Manager) makeBridge(ctx context.Context, n Network) (err error) {
	var u undo.Stack
	defer func() { err = errors.Join(err, u.Run(ctx)) }()

	la := netlink.NewLinkAttrs()
	la.Name, la.MTU, la.HardwareAddr = n.Bridge, n.MTU, bridgeMAC(n)
	var link netlink.Link = &netlink.Bridge{LinkAttrs: la}
	switch err := m.host.LinkAdd(link); {
	case err == nil:
		u.Add("bridge "+n.Bridge, func(context.Context) error { return m.removeLink(n.Bridge) })
	case errors.Is(err, unix.EEXIST):
		old, err := m.host.LinkByName(n.Bridge)
		if err != nil {
			return fmt.Errorf("bridge %s: %w", n.Bridge, err)
		}
		if old.Type() != "bridge" {
			return fmt.Errorf("bridge %s: an interface of type %s has that name", n.Bridge, old.Type())
		}
		link = old
		if err := m.dropOtherAddresses(n, link); err != nil {
			return err
		}
	default:
		return fmt.Errorf("make bridge %s: %w", n.Bridge, err)
	}

	// The order matters: no address may appear before router advertisements are off.
	conf6 := [][2]string{{"accept_ra", "0"}, {"autoconf", "0"}, {"disable_ipv6", "1"}}
	if n.EnableIPv6 {
		conf6[2][1] = "0"
	}
	for _, kv := range conf6 {
		if err := writeSysctl("net/ipv6/conf/"+n.Bridge+"/"+kv[0], kv[1]); err != nil && (n.EnableIPv6 || !errors.Is(err, os.ErrNotExist)) {
			return err
		}
	}
	if n.EnableIPv4 {
		// Lets 127.0.0.1:port of the host reach a container; the firewall keeps containers from the other way.
		if err := writeSysctl("net/ipv4/conf/"+n.Bridge+"/route_localnet", "1"); err != nil {
			return err
		}
	}
	for _, s := range n.Subnets {
		if !s.Gateway.IsValid() {
			continue
		}
		a := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(s.Gateway, s.Prefix.Bits()))}
		if s.Gateway.Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := m.host.AddrReplace(link, a); err != nil {
			return fmt.Errorf("bridge %s: address %s: %w", n.Bridge, s.Gateway, err)
		}
	}
	if err := m.host.LinkSetUp(link); err != nil {
		return fmt.Errorf("bridge %s: up: %w", n.Bridge, err)
	}
	u.Release()
	return nil
}

// dropOtherAddresses removes what an earlier configuration left on the bridge.
func (m *Manager) dropOtherAddresses(n Network, link netlink.Link) error {
	addrs, err := dump(func() ([]netlink.Addr, error) { return m.host.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("bridge %s: list addresses: %w", n.Bridge, err)
	}
	for _, a := range addrs {
		ours := slices.ContainsFunc(n.Subnets, func(s Subnet) bool { return a.IP.Equal(s.Gateway.AsSlice()) })
		if ours || a.IP.IsLinkLocalUnicast() {
			continue
		}
		if err := m.host.AddrDel(link, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("bridge %s: remove address %s: %w", n.Bridge, a.IP, err)
		}
	}
	return nil
}

// bridgeMAC is stable, so that neighbours stay right when a lost bridge is made again.
func bridgeMAC(n Network) net.HardwareAddr {
	mac := net.HardwareAddr{0x02, 0x42, 0, 0, 0, 0}
	for i := range 4 {
		b, _ := strconv.ParseUint(n.ID[2*i:2*i+2], 16, 8)
		mac[2+i] = byte(b)
	}
	return mac
}

// removeLink deletes a host interface by name; one that is gone is no error.
func (m *Manager) removeLink(name string) error {
	req := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove interface %s: %w", name, err)
	}
	return nil
}

// vethSpec is one cable: the host's end is a port of a bridge.
type vethSpec struct {
	host, peer string // names
	ns         *os.File
	mac        net.HardwareAddr
	mtu        int
	master     int // index of the bridge
}

// makeVeth creates a cable with both ends where they belong in one request, which is
// what the library cannot do: the master, the peer's namespace and its address in it.
func makeVeth(v vethSpec) error {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(v.host)))
	req.AddData(nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(v.mtu))))
	req.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(v.master))))
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	peer := info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	nl.NewIfInfomsgChild(peer, unix.AF_UNSPEC)
	peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(v.peer))
	peer.AddRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(v.mtu)))
	peer.AddRtAttr(unix.IFLA_ADDRESS, v.mac)
	peer.AddRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(v.ns.Fd())))
	req.AddData(info)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// raisePort brings up the host's end and sets how the bridge treats it: hairpin, so that a
// container may reach itself through its published port where bridged packets pass the
// firewall (br_netfilter), and isolated if the network wants no traffic between containers.
func raisePort(name string, isolated bool) error {
	// The port's link-local address would answer on the bridge's segment beside the bridge.
	if err := writeSysctl("net/ipv6/conf/"+name+"/disable_ipv6", "1"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Flags, msg.Change = unix.IFF_UP, unix.IFF_UP
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(iflaInfoSlaveKind, nl.NonZeroTerminated("bridge"))
	data := info.AddRtAttr(iflaInfoSlaveData, nil)
	data.AddRtAttr(brportMode, nl.Uint8Attr(1))
	if isolated {
		data.AddRtAttr(brportIsolated, nl.Uint8Attr(1))
	}
	req.AddData(info)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// dump lists kernel objects again while others change them under the list.
func dump[T any](list func() ([]T, error)) (out []T, err error) {
	for range 20 {
		if out, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return out, err
}

// hostPrefixes are the destinations that the host has routes for, without the default routes.
func (m *Manager) hostPrefixes() ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, fam := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := dump(func() ([]netlink.Route, error) { return m.host.RouteList(nil, fam) })
		if err != nil {
			return nil, fmt.Errorf("list the host's routes: %w", err)
		}
		for _, r := range routes {
			if r.Dst == nil {
				continue
			}
			a, ok := netip.AddrFromSlice(r.Dst.IP)
			ones, _ := r.Dst.Mask.Size()
			if a = a.Unmap(); ok && ones > 0 {
				out = append(out, netip.PrefixFrom(a, ones))
			}
		}
	}
	return out, nil
}

// forwardIPv4 and forwardIPv6 let the host route. They stay on, as in Docker: others
// may have come to rely on them.
func forwardIPv4() error {
	if readSysctl(sysctlForward4) == "1" {
		return nil
	}
	return writeSysctl(sysctlForward4, "1")
}

func (m *Manager) forwardIPv6() error {
	if readSysctl(sysctlForward6) == "1" {
		return nil
	}
	// A forwarding host ignores router advertisements unless told 2: it must not lose its own default route.
	links, err := dump(m.host.LinkList)
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		name := "net/ipv6/conf/" + l.Attrs().Name + "/accept_ra"
		if readSysctl(name) == "1" {
			if err := writeSysctl(name, "2"); err != nil {
				return err
			}
		}
	}
	return writeSysctl(sysctlForward6, "1")
}

// setRoute makes gw the default route through link in the namespace of h.
func setRoute(h *netlink.Handle, link int, gw netip.Addr) error {
	dst := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if gw.Is6() {
		dst = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return h.RouteReplace(&netlink.Route{LinkIndex: link, Dst: dst, Gw: gw.AsSlice()})
}

// dropOtherRoutes removes default routes of one family that do not lead through link.
func dropOtherRoutes(h *netlink.Handle, link int, v6 bool) error {
	fam := netlink.FAMILY_V4
	if v6 {
		fam = netlink.FAMILY_V6
	}
	routes, err := dump(func() ([]netlink.Route, error) { return h.RouteList(nil, fam) })
	if err != nil {
		return err
	}
	for _, r := range routes {
		isDefault := r.Dst == nil
		if r.Dst != nil {
			ones, _ := r.Dst.Mask.Size()
			isDefault = ones == 0
		}
		if isDefault && r.LinkIndex != link && r.Gw != nil {
			if err := h.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		}
	}
	return nil
}

// validIfName follows dev_valid_name in the kernel, without spaces and control characters.
func validIfName(s string) bool {
	return s != "" && len(s) < unix.IFNAMSIZ && s != "." && s != ".." &&
		!slices.ContainsFunc([]byte(s), func(c byte) bool { return c <= ' ' || c == '/' || c == ':' || c >= 0x7f })
}
