// Package network gives containers their place on a network: the built-in
// bridge (netlink and nftables, in process), addresses, published ports and DNS.
//
// In flow network and endpoint configurations from the engine; out flow network
// namespaces with interfaces, addresses and routes in them, host firewall rules,
// and endpoint descriptions. The package knows no containers: an endpoint is
// identified by the opaque id that its caller chose.
//
// On the host there is, once the first endpoint needs it: a bridge per network, a
// veth per endpoint, one nftables table, routing turned on (it stays on), and in the
// state folder a bind mount per namespace and a small file per endpoint. All of it
// works without the daemon, but for names, ::1, and IPv6 ports of containers that have
// no IPv6 address. What others remove is made again within seconds.
//
// Another firewall that drops what is forwarded (Docker's, ufw's) has to let the
// bridges pass: nftables asks every chain of a hook, and no accept overrules a drop.
package network

import (
	"net/netip"
	"time"
)

// Driver names accepted in Config.Driver.
const (
	DriverBridge = "bridge"
	DriverHost   = "host"
	DriverNone   = "null"
)

// DefaultName is the name of the network that a container joins when it names none.
const DefaultName = "bridge"

// Subnet is one address pool of a network.
type Subnet struct {
	Prefix  netip.Prefix `json:"prefix"`
	Gateway netip.Addr   `json:"gateway"`
	// Range restricts automatic allocation to a part of Prefix; the zero value means all of it.
	Range netip.Prefix `json:"range,omitzero"`
	// Reserved maps names to addresses that are never allocated (Docker's AuxAddress).
	Reserved map[string]netip.Addr `json:"reserved,omitempty"`
}

// Config asks for a network. Subnets left empty are chosen from the pools of the Manager.
type Config struct {
	Name       string
	Driver     string // default DriverBridge
	EnableIPv4 bool
	EnableIPv6 bool
	Internal   bool // no route out, no published ports
	Attachable bool
	Subnets    []Subnet
	Options    map[string]string // driver options, Docker's names (com.docker.network.bridge.name, ...mtu)
	Labels     map[string]string
}

// Network is one network as it is. It is a value: changing it changes nothing.
type Network struct {
	ID         string            `json:"id"` // 64 hex digits
	Name       string            `json:"name"`
	Driver     string            `json:"driver"`
	EnableIPv4 bool              `json:"enableIPv4"`
	EnableIPv6 bool              `json:"enableIPv6"`
	Internal   bool              `json:"internal"`
	Attachable bool              `json:"attachable"`
	Subnets    []Subnet          `json:"subnets,omitempty"`
	Options    map[string]string `json:"options,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	Bridge     string            `json:"bridge,omitempty"` // host interface
	MTU        int               `json:"mtu,omitempty"`
	Created    time.Time         `json:"created"`
	Predefined bool              `json:"predefined,omitempty"` // bridge, host, none: cannot be removed
}

// PortMapping publishes one container port on the host.
// HostPort 0 asks for an ephemeral port.
type PortMapping struct {
	Proto         string     `json:"proto"` // tcp, udp, sctp
	ContainerPort uint16     `json:"containerPort"`
	HostIP        netip.Addr `json:"hostIP,omitzero"` // zero: all addresses, IPv4 and IPv6
	HostPort      uint16     `json:"hostPort"`
	HostPortEnd   uint16     `json:"hostPortEnd,omitempty"` // > HostPort: take the first free one of the range
}

// EndpointConfig asks to join one sandbox (a network namespace) to one network.
type EndpointConfig struct {
	ID       string // the caller's id: unique per network, e.g. the container's id
	Network  string // name or id
	Netns    string // path of the network namespace
	Name     string // DNS name of the endpoint (container name)
	Hostname string
	Aliases  []string
	IPv4     netip.Addr // zero: automatic
	IPv6     netip.Addr
	MAC      string // empty: derived from the address
	Ports    []PortMapping
	// Sysctls of the interface, as Docker writes them: net.ipv4.conf.IFNAME.log_martians, IFNAME standing for itself.
	Sysctls map[string]string
	// DNS are the servers that the sandbox's nameserver asks instead of the host's, from within the sandbox.
	DNS []netip.Addr
	// IfName is the interface name inside; empty: first free ethN.
	IfName string
	// GatewayPriority decides which endpoint of a sandbox holds the default route: highest, then first by network name.
	GatewayPriority int
}

// Endpoint is a joined sandbox as it is.
type Endpoint struct {
	ID          string        `json:"id"`         // the caller's id
	EndpointID  string        `json:"endpointID"` // 64 hex digits
	NetworkID   string        `json:"networkID"`
	NetworkName string        `json:"networkName"`
	Netns       string        `json:"netns"`
	Name        string        `json:"name"`
	Aliases     []string      `json:"aliases,omitempty"`
	DNSNames    []string      `json:"dnsNames,omitempty"`
	IfName      string        `json:"ifName"`
	HostIfName  string        `json:"hostIfName,omitempty"`
	MAC         string        `json:"mac,omitempty"`
	IPv4        netip.Prefix  `json:"ipv4,omitzero"`
	IPv6        netip.Prefix  `json:"ipv6,omitzero"`
	Gateway4    netip.Addr    `json:"gateway4,omitzero"`
	Gateway6    netip.Addr    `json:"gateway6,omitzero"`
	Ports       []PortMapping `json:"ports,omitempty"` // HostPort filled in
	// Nameservers for the sandbox's resolv.conf; empty: use the host's.
	Nameservers []netip.Addr `json:"nameservers,omitempty"`
}
