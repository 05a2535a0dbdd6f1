package cni

import (
	"fmt"
	"math"
	"math/big"
	"net/netip"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"

	"github.com/hako-engine/hako/network"
)

// Names of capabilities: https://www.cni.dev/docs/conventions/, and those that Kubernetes' runtimes share.
const (
	capPorts       = "portMappings"
	capBandwidth   = "bandwidth"
	capDNS         = "dns"
	capRanges      = "ipRanges"
	capIPs         = "ips"
	capMAC         = "mac"
	capCgroup      = "cgroupPath"
	capAnnotations = "io.kubernetes.cri.pod-annotations"
)

// Annotations that limit a pod's bandwidth, in bits a second, as a quantity of Kubernetes.
const (
	annotationIngress = "kubernetes.io/ingress-bandwidth"
	annotationEgress  = "kubernetes.io/egress-bandwidth"
)

type portMapping struct {
	HostPort      uint16 `json:"hostPort"`
	ContainerPort uint16 `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP,omitempty"`
}

type bandwidth struct {
	IngressRate  uint64 `json:"ingressRate,omitempty"` // bits a second
	IngressBurst uint64 `json:"ingressBurst,omitempty"`
	EgressRate   uint64 `json:"egressRate,omitempty"`
	EgressBurst  uint64 `json:"egressBurst,omitempty"`
}

// noBurstLimit is the burst, in bits, that Kubernetes gives with each rate: the plugin wants one.
const noBurstLimit = math.MaxInt32

// DNS is what a pod resolves with.
type DNS struct {
	Servers  []string `json:"servers,omitempty"`
	Searches []string `json:"searches,omitempty"`
	Options  []string `json:"options,omitempty"`
}

type ipRange struct {
	Subnet string `json:"subnet"`
}

// capabilities says what a pod asks of plugins that can do it; each plugin is given only what its
// configuration lists. ranges are those of the node.
func capabilities(p Pod, ranges []netip.Prefix) (map[string]any, error) {
	out := map[string]any{}
	var ports []portMapping
	for _, m := range p.Ports {
		if m.HostPort == 0 {
			continue
		}
		pm, err := cniPort(m)
		if err != nil {
			return nil, err
		}
		ports = append(ports, pm)
	}
	if len(ports) > 0 {
		out[capPorts] = ports
	}
	var b bandwidth
	for _, x := range []struct {
		annotation  string
		rate, burst *uint64
	}{{annotationIngress, &b.IngressRate, &b.IngressBurst}, {annotationEgress, &b.EgressRate, &b.EgressBurst}} {
		v, ok := p.Annotations[x.annotation]
		if !ok {
			continue
		}
		rate, err := parseRate(v)
		if err != nil {
			return nil, fmt.Errorf("annotation %s: %w", x.annotation, err)
		}
		*x.rate, *x.burst = rate, noBurstLimit
	}
	if b != (bandwidth{}) {
		out[capBandwidth] = b
	}
	if d := p.DNS; d != nil && len(d.Servers)+len(d.Searches)+len(d.Options) > 0 {
		out[capDNS] = *d
	}
	if len(p.Annotations) > 0 {
		out[capAnnotations] = p.Annotations
	}
	if p.CgroupParent != "" {
		out[capCgroup] = p.CgroupParent
	}
	if len(p.IPs) > 0 {
		out[capIPs] = p.IPs
	}
	if p.MAC != "" {
		out[capMAC] = p.MAC
	}
	if len(ranges) > 0 {
		sets := make([][]ipRange, len(ranges)) // an address of each set: one for each family
		for i, r := range ranges {
			sets[i] = []ipRange{{r.Masked().String()}}
		}
		out[capRanges] = sets
	}
	return out, nil
}

func cniPort(m network.PortMapping) (portMapping, error) {
	pm := portMapping{HostPort: m.HostPort, ContainerPort: m.ContainerPort, Protocol: strings.ToLower(m.Proto)}
	switch pm.Protocol {
	case "":
		pm.Protocol = "tcp"
	case "tcp", "udp", "sctp":
	default:
		return pm, fmt.Errorf("host port %d: invalid protocol %q: tcp, udp or sctp: %w", m.HostPort, m.Proto, errdefs.ErrInvalidArgument)
	}
	if m.ContainerPort == 0 {
		return pm, fmt.Errorf("host port %d: invalid container port 0: %w", m.HostPort, errdefs.ErrInvalidArgument)
	}
	if m.HostIP.IsValid() {
		pm.HostIP = m.HostIP.Unmap().String()
	}
	return pm, nil
}

// unserved lists what a pod asks for and no plugin of the network can do, where silence would surprise.
func unserved(list *libcni.NetworkConfigList, args map[string]any) []string {
	var out []string
	for _, c := range []string{capPorts, capBandwidth, capIPs, capMAC} {
		if _, asked := args[c]; !asked {
			continue
		}
		served := false
		for _, p := range list.Plugins {
			served = served || p.Network.Capabilities[c]
		}
		if !served {
			out = append(out, c)
		}
	}
	return out
}

// Bounds of a rate, bits a second (those of Kubernetes' documentation).
var (
	minRate = big.NewRat(1_000, 1)
	maxRate = big.NewRat(1_000_000_000_000_000, 1)
)

// parseRate reads a quantity of Kubernetes: a decimal number with an SI or binary suffix or an exponent.
func parseRate(s string) (uint64, error) {
	bad := func(why string) (uint64, error) {
		return 0, fmt.Errorf("%q is no bandwidth: %s: %w", shorten(s), why, errdefs.ErrInvalidArgument)
	}
	if len(s) > 64 {
		return bad("too long")
	}
	end := 0
	for end < len(s) && (s[end] >= '0' && s[end] <= '9' || s[end] == '.' || end == 0 && (s[end] == '+' || s[end] == '-')) {
		end++
	}
	number, suffix := s[:end], s[end:]
	scale, ok := map[string]*big.Rat{
		"": big.NewRat(1, 1), "m": big.NewRat(1, 1e3), "u": big.NewRat(1, 1e6), "n": big.NewRat(1, 1e9),
		"k": big.NewRat(1e3, 1), "M": big.NewRat(1e6, 1), "G": big.NewRat(1e9, 1),
		"T": big.NewRat(1e12, 1), "P": big.NewRat(1e15, 1), "E": big.NewRat(1e18, 1),
		"Ki": big.NewRat(1<<10, 1), "Mi": big.NewRat(1<<20, 1), "Gi": big.NewRat(1<<30, 1),
		"Ti": big.NewRat(1<<40, 1), "Pi": big.NewRat(1<<50, 1), "Ei": big.NewRat(1<<60, 1),
	}[suffix]
	if !ok {
		// An exponent of more than two digits is out of range, and would cost memory to find out.
		if digits := strings.TrimLeft(suffix, "eE+-"); digits == "" || len(digits) > 2 || strings.Trim(digits, "0123456789") != "" {
			return bad("unknown suffix")
		}
		number, scale = s, big.NewRat(1, 1)
	}
	v, ok := new(big.Rat).SetString(number)
	if !ok {
		return bad("not a number")
	}
	v.Mul(v, scale)
	if v.Cmp(minRate) < 0 || v.Cmp(maxRate) > 0 {
		return bad("not between 1k and 1P")
	}
	whole, rest := new(big.Int).QuoRem(v.Num(), v.Denom(), new(big.Int))
	if rest.Sign() != 0 { // as Kubernetes rounds
		whole.Add(whole, big.NewInt(1))
	}
	return whole.Uint64(), nil
}
