package engine

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/network"
)

// PodNetwork joins sandboxes to the network of the pods: the bridge that the engine brings
// along, or what CNI plugins make.
type PodNetwork interface {
	// Ready tells why pods cannot get a network now; nil if they can.
	Ready() error
	// Setup joins a sandbox's namespace, in which the loopback is up. What it did is taken
	// back on an error.
	Setup(ctx context.Context, p PodEndpoint) (PodAddresses, error)
	// Teardown gives back all that Setup took. It is idempotent, and works when the namespace
	// is gone (p.NetNS is "" then) and after a reboot.
	Teardown(ctx context.Context, p PodEndpoint) error
	// SetPodCIDR tells the ranges that the cluster gave to this node.
	SetPodCIDR(ctx context.Context, ranges []netip.Prefix) error
}

// PodEndpoint is one sandbox, for the network.
type PodEndpoint struct {
	ID                   string // of the sandbox
	Name, Namespace, UID string
	NetNS                string
	Ports                []PortMapping // only those with a host port
	DNS                  *DNS
	Annotations          map[string]string
	CgroupParent         string
}

// PodAddresses is what a sandbox got.
type PodAddresses struct {
	IPs []netip.Addr `json:"ips,omitempty"` // the primary one first
}

// bridgePods is the PodNetwork of the built-in bridge.
type bridgePods struct{ nets Networks }

func (bridgePods) Ready() error                                     { return nil }
func (bridgePods) SetPodCIDR(context.Context, []netip.Prefix) error { return nil }

func (b bridgePods) Setup(ctx context.Context, p PodEndpoint) (PodAddresses, error) {
	ep, err := b.nets.Connect(ctx, network.EndpointConfig{
		ID: p.ID, Network: network.DefaultName, Netns: p.NetNS, Name: p.Name, Hostname: p.Name, Ports: p.Ports,
	})
	if err != nil {
		return PodAddresses{}, fmt.Errorf("connect sandbox %s to the built-in network: %w", p.ID, err)
	}
	var a PodAddresses
	for _, ip := range []netip.Prefix{ep.IPv4, ep.IPv6} {
		if ip.IsValid() {
			a.IPs = append(a.IPs, ip.Addr())
		}
	}
	return a, nil
}

func (b bridgePods) Teardown(ctx context.Context, p PodEndpoint) error {
	err := b.nets.Disconnect(ctx, network.DefaultName, p.ID)
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("disconnect sandbox %s from the built-in network: %w", p.ID, err)
	}
	return nil
}

// podEndpoint describes a sandbox to the network.
func podEndpoint(id string, c SandboxConfig, netns string) PodEndpoint {
	p := PodEndpoint{ID: id, Name: c.Name, Namespace: c.Namespace, UID: c.UID, NetNS: netns,
		DNS: c.DNS, Annotations: c.Annotations, CgroupParent: c.CgroupParent}
	for _, m := range c.Ports {
		if m.HostPort != 0 {
			p.Ports = append(p.Ports, m)
		}
	}
	return p
}
