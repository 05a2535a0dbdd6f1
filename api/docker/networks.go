package docker

import (
	"context"
	"net/http"

	wire "github.com/moby/moby/api/types/network"

	"github.com/hako-engine/hako/engine"
)

func (s *Server) networkList(ctx context.Context, c *call) error {
	f, err := c.filters("dangling", "driver", "id", "label", "name", "scope", "type")
	if err != nil {
		return err
	}
	networks, err := s.opt.Backend.Networks(ctx, f)
	if err != nil {
		return err
	}
	out := make([]any, 0, len(networks))
	for i := range networks {
		n := networkOf(&networks[i])
		if !c.version.less(v1_28) {
			out = append(out, wire.Summary{Network: n})
			continue
		}
		_, endpoints, err := s.opt.Backend.Network(ctx, n.ID)
		if err != nil {
			return err
		}
		out = append(out, wire.Inspect{Network: n, Containers: endpointsOf(endpoints)})
	}
	return c.json(http.StatusOK, out)
}

func (s *Server) networkInspect(ctx context.Context, c *call) error {
	if scope := c.query("scope"); scope != "" && scope != "local" {
		return notFoundf("network %s not found", c.id())
	}
	n, endpoints, err := s.opt.Backend.Network(ctx, c.id())
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, wire.Inspect{Network: networkOf(&n), Containers: endpointsOf(endpoints)})
}

func (s *Server) networkCreate(ctx context.Context, c *call) error {
	var req wire.CreateRequest
	if err := c.body(&req); err != nil {
		return err
	}
	config, err := networkFrom(&req)
	if err != nil {
		return err
	}
	n, err := s.opt.Backend.CreateNetwork(ctx, config)
	if err != nil {
		return err
	}
	return c.json(http.StatusCreated, wire.CreateResponse{ID: n.ID})
}

func (s *Server) networkRemove(ctx context.Context, c *call) error {
	if err := s.opt.Backend.RemoveNetwork(ctx, c.id()); err != nil {
		return err
	}
	return c.empty(http.StatusNoContent)
}

func (s *Server) networkConnect(ctx context.Context, c *call) error {
	var req wire.ConnectRequest
	if err := c.body(&req); err != nil {
		return err
	}
	if req.Container == "" {
		return invalidf("Container must not be empty")
	}
	es, err := endpointFrom(c.id(), req.EndpointConfig)
	if err != nil {
		return err
	}
	if err := s.opt.Backend.ConnectNetwork(ctx, c.id(), req.Container, es); err != nil {
		return err
	}
	return c.empty(http.StatusOK)
}

func (s *Server) networkDisconnect(ctx context.Context, c *call) error {
	var req wire.DisconnectRequest
	if err := c.body(&req); err != nil {
		return err
	}
	if req.Container == "" {
		return invalidf("Container must not be empty")
	}
	if err := s.opt.Backend.DisconnectNetwork(ctx, c.id(), req.Container, req.Force); err != nil {
		return err
	}
	return c.empty(http.StatusOK)
}

func (s *Server) networkPrune(ctx context.Context, c *call) error {
	f, err := c.filters("label", "label!", "until")
	if err != nil {
		return err
	}
	p, err := s.opt.Backend.PruneNetworks(ctx, f)
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, wire.PruneReport{NetworksDeleted: list(p.IDs)})
}

// networkFrom converts what a client asks of a new network.
func networkFrom(req *wire.CreateRequest) (engine.NetworkConfig, error) {
	c := engine.NetworkConfig{
		Name: req.Name, Driver: req.Driver, EnableIPv4: true, Internal: req.Internal, Attachable: req.Attachable,
		Options: req.Options, Labels: req.Labels,
	}
	switch {
	case req.Name == "":
		return c, invalidf("network name cannot be empty")
	case req.ConfigOnly || req.ConfigFrom != nil && req.ConfigFrom.Network != "":
		return c, notImplementedf("config-only networks are not in this version of hako")
	case req.Ingress || req.Scope == "swarm" || req.Driver == "overlay":
		return c, errNoSwarm
	}
	if c.Driver == "" {
		c.Driver = engine.DriverBridge
	}
	if req.EnableIPv4 != nil {
		c.EnableIPv4 = *req.EnableIPv4
	}
	if req.EnableIPv6 != nil {
		c.EnableIPv6 = *req.EnableIPv6
	}
	if req.IPAM == nil {
		return c, nil
	}
	if d := req.IPAM.Driver; d != "" && d != "default" && d != "null" {
		return c, invalidf("could not find an available IPAM driver %q", d)
	}
	for _, p := range req.IPAM.Config {
		sub := engine.Subnet{Prefix: p.Subnet, Gateway: p.Gateway, Range: p.IPRange, Reserved: p.AuxAddress}
		switch {
		case !sub.Prefix.IsValid():
			return c, invalidf("invalid network config: a pool without subnet")
		case sub.Prefix != sub.Prefix.Masked():
			return c, invalidf("invalid network config: invalid subnet %s: it should be %s", sub.Prefix, sub.Prefix.Masked())
		case sub.Gateway.IsValid() && !sub.Prefix.Contains(sub.Gateway):
			return c, invalidf("invalid network config: invalid gateway %s: parent subnet is %s", sub.Gateway, sub.Prefix)
		case sub.Range.IsValid() && (!sub.Prefix.Overlaps(sub.Range) || sub.Range.Bits() < sub.Prefix.Bits()):
			return c, invalidf("invalid network config: invalid ip-range %s: parent subnet is %s", sub.Range, sub.Prefix)
		}
		for name, a := range sub.Reserved {
			if !sub.Prefix.Contains(a) {
				return c, invalidf("invalid network config: invalid auxiliary address %s (%s): parent subnet is %s", a, name, sub.Prefix)
			}
		}
		c.Subnets = append(c.Subnets, sub)
	}
	return c, nil
}

func networkOf(n *engine.Network) wire.Network {
	out := wire.Network{
		Name: n.Name, ID: n.ID, Created: n.Created, Scope: "local", Driver: n.Driver,
		EnableIPv4: n.EnableIPv4, EnableIPv6: n.EnableIPv6, Internal: n.Internal, Attachable: n.Attachable,
		Options: dict(n.Options), Labels: dict(n.Labels),
		IPAM: wire.IPAM{Driver: "default", Config: []wire.IPAMConfig{}},
	}
	for _, s := range n.Subnets {
		out.IPAM.Config = append(out.IPAM.Config, wire.IPAMConfig{
			Subnet: s.Prefix, Gateway: s.Gateway, IPRange: s.Range, AuxAddress: s.Reserved,
		})
	}
	return out
}

func endpointsOf(endpoints []engine.Endpoint) map[string]wire.EndpointResource {
	out := map[string]wire.EndpointResource{}
	for i := range endpoints {
		ep := &endpoints[i]
		r := wire.EndpointResource{Name: ep.Name, EndpointID: ep.EndpointID, IPv4Address: ep.IPv4, IPv6Address: ep.IPv6}
		_ = r.MacAddress.UnmarshalText([]byte(ep.MAC)) // made by the network room
		out[ep.ID] = r
	}
	return out
}
