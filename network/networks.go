package network

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Driver options, Docker's names.
const (
	optBridgeName = "com.docker.network.bridge.name"
	optMTU        = "com.docker.network.driver.mtu"
	optICC        = "com.docker.network.bridge.enable_icc"
	optMasq       = "com.docker.network.bridge.enable_ip_masquerade"
	optBindIP     = "com.docker.network.bridge.host_binding_ipv4"
)

var nameRE = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

// withDefaults completes the pools; the IPv6 pool is a unique local prefix (RFC 4193) of this machine and bridge.
func withDefaults(pools []Pool, bridge string) []Pool {
	has := func(is4 bool) bool {
		return slices.ContainsFunc(pools, func(p Pool) bool { return p.Base.Addr().Is4() == is4 })
	}
	if !has(true) {
		pools = append(slices.Clone(pools), DefaultPools()...)
	}
	if !has(false) {
		machine, _ := os.ReadFile("/etc/machine-id")
		sum := sha256.Sum256(append(machine, "\x00hako\x00"+bridge...))
		a := [16]byte{0xfd}
		copy(a[1:6], sum[:5])
		pools = append(slices.Clone(pools), Pool{netip.PrefixFrom(netip.AddrFrom16(a), 48), 64})
	}
	return pools
}

// newNetw prepares a network for use; it checks what the record says.
func newNetw(n Network) (*netw, error) {
	nw := &netw{Network: n, masq: true, eps: map[string]*endpoint{}, names: map[string][]*endpoint{}}
	for _, s := range n.Subnets {
		p, err := newPool(s)
		if err != nil {
			return nil, fmt.Errorf("network %s: %w", n.Name, err)
		}
		nw.pools = append(nw.pools, p)
	}
	for k, v := range n.Options {
		var err error
		var yes bool
		switch k {
		case optICC:
			yes, err = strconv.ParseBool(v)
			nw.isolated = !yes
		case optMasq:
			nw.masq, err = strconv.ParseBool(v)
		case optBindIP:
			nw.bindIP, err = netip.ParseAddr(v)
		}
		if err != nil {
			return nil, fmt.Errorf("network %s: option %s=%q: %w", n.Name, k, v, errdefs.ErrInvalidArgument)
		}
	}
	return nw, nil
}

// addPredefined completes the networks that always exist. The default bridge's subnet is kept from the
// first start on, unless the options ask for another one.
func (m *Manager) addPredefined(ctx context.Context, states []endpointState) error {
	predefined := func(name, driver string) Network {
		sum := sha256.Sum256([]byte("hako\x00" + m.o.BridgeName + "\x00" + name))
		return Network{ID: hex.EncodeToString(sum[:]), Name: name, Driver: driver, EnableIPv4: true, Created: time.Now().UTC(), Predefined: true}
	}
	for _, n := range []Network{predefined("host", DriverHost), predefined("none", DriverNone)} {
		if _, known := m.nets[n.ID]; known {
			continue
		}
		n.EnableIPv4 = false
		nw, err := newNetw(n)
		if err != nil {
			return err
		}
		m.nets[n.ID] = nw
	}
	n := predefined(DefaultName, DriverBridge)
	n.Bridge, n.MTU = m.o.BridgeName, m.o.MTU
	n.Options = map[string]string{"com.docker.network.bridge.default_bridge": "true", optBridgeName: n.Bridge, optICC: "true",
		optMasq: "true", optMTU: strconv.Itoa(n.MTU)}
	old := m.nets[n.ID]
	want := m.o.BridgeSubnet
	if !want.IsValid() {
		used, err := m.hostPrefixes()
		if err != nil {
			return err
		}
		for id, o := range m.nets {
			if id != n.ID {
				used = append(used, prefixes(o.Subnets)...)
			}
		}
		want = netip.MustParsePrefix("172.29.0.0/16")
		if old != nil && len(old.Subnets) > 0 {
			want = old.Subnets[0].Prefix
		} else if overlapsAny(want, used) {
			if want, err = choose(m.o.Pools, used, true); err != nil {
				return err
			}
		}
	}
	n.Subnets = []Subnet{{Prefix: want.Masked(), Gateway: gatewayOf(want)}}
	if p := m.o.BridgeSubnet6; p.IsValid() {
		n.EnableIPv6 = true
		n.Subnets = append(n.Subnets, Subnet{Prefix: p.Masked(), Gateway: gatewayOf(p)})
	}
	if old != nil && old.MTU == n.MTU && slices.EqualFunc(old.Subnets, n.Subnets, func(a, b Subnet) bool { return a.Prefix == b.Prefix && a.Gateway == b.Gateway }) {
		return nil
	}
	if old != nil {
		if slices.ContainsFunc(states, func(s endpointState) bool { return s.Endpoint.NetworkID == n.ID && !s.Unfinished }) {
			m.log.Warn("the default network keeps its subnets and MTU until no container is on it", "subnets", prefixes(old.Subnets), "wanted", prefixes(n.Subnets))
			return nil
		}
		n.Created = old.Created
	}
	nw, err := newNetw(n)
	if err != nil {
		return err
	}
	if err := m.records.Put(ctx, n.ID, n); err != nil {
		return err
	}
	m.nets[n.ID] = nw
	return nil
}

// gatewayOf is the prefix's own address if it has one (192.0.2.9/24), else the first one.
func gatewayOf(p netip.Prefix) netip.Addr {
	if p.Addr() != p.Masked().Addr() {
		return p.Addr()
	}
	return p.Addr().Next()
}

func prefixes(s []Subnet) []netip.Prefix {
	out := make([]netip.Prefix, len(s))
	for i := range s {
		out[i] = s[i].Prefix
	}
	return out
}

func (n *netw) firewall() fwNet {
	return fwNet{bridge: n.Bridge, subnets: prefixes(n.Subnets), internal: n.Internal, masq: n.masq, isolated: n.isolated}
}

// list gives the networks in the order of their names.
func (m *Manager) list() []*netw {
	m.mu.RLock()
	defer m.mu.RUnlock()
	out := make([]*netw, 0, len(m.nets))
	for _, n := range m.nets {
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b *netw) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	return out
}

// List gives all networks in the order of their names.
func (m *Manager) List(context.Context) ([]Network, error) {
	var out []Network
	for _, n := range m.list() {
		out = append(out, n.Network.clone())
	}
	return out, nil
}

func (n Network) clone() Network {
	n.Options, n.Labels, n.Subnets = maps.Clone(n.Options), maps.Clone(n.Labels), slices.Clone(n.Subnets)
	for i := range n.Subnets {
		n.Subnets[i].Reserved = maps.Clone(n.Subnets[i].Reserved)
	}
	return n
}

// Get finds a network by id, name or unique prefix of the id: ErrNotFound, or ErrInvalidArgument if ambiguous.
func (m *Manager) Get(_ context.Context, ref string) (Network, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n, err := m.find(ref)
	if err != nil {
		return Network{}, err
	}
	return n.Network.clone(), nil
}

// find is Get for a caller that holds mu.
func (m *Manager) find(ref string) (*netw, error) {
	if n := m.nets[ref]; n != nil {
		return n, nil
	}
	if ref == "default" {
		ref = DefaultName
	}
	var found []*netw
	for _, n := range m.nets {
		if n.Name == ref {
			return n, nil
		}
		if ref != "" && strings.HasPrefix(n.ID, ref) {
			found = append(found, n)
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("network %s not found: %w", ref, errdefs.ErrNotFound)
	case 1:
		return found[0], nil
	}
	return nil, fmt.Errorf("network %s is ambiguous (%d matches found on ID prefix): %w", ref, len(found), errdefs.ErrInvalidArgument)
}

// Create makes a network known. Errors: ErrInvalidArgument, ErrAlreadyExists (name), ErrFailedPrecondition
// (a subnet or bridge that is in use), ErrResourceExhausted (no free subnet).
func (m *Manager) Create(ctx context.Context, c Config) (Network, error) {
	m.creating.Lock()
	defer m.creating.Unlock()
	n, err := m.plan(c)
	if err != nil {
		return Network{}, fmt.Errorf("create network %s: %w", c.Name, err)
	}
	nw, err := newNetw(n.clone()) // the caller keeps its maps
	if err != nil {
		return Network{}, fmt.Errorf("create network: %w", err)
	}
	if err := m.records.Put(ctx, n.ID, n); err != nil {
		return Network{}, fmt.Errorf("create network %s: %w", c.Name, err)
	}
	m.mu.Lock()
	m.nets[n.ID] = nw
	m.mu.Unlock()
	return n, nil
}

// plan completes and checks a configuration.
func (m *Manager) plan(c Config) (Network, error) {
	if !nameRE.MatchString(c.Name) || len(c.Name) > 255 {
		return Network{}, fmt.Errorf("invalid network name %q: letters, digits, and _ . - after the first: %w", c.Name, errdefs.ErrInvalidArgument)
	}
	switch c.Driver {
	case "", DriverBridge, "default":
	case DriverHost, DriverNone, "none":
		return Network{}, fmt.Errorf("only one instance of %q network is allowed: %w", c.Driver, errdefs.ErrPermissionDenied)
	default:
		return Network{}, fmt.Errorf("network driver %q is not known, only bridge: %w", c.Driver, errdefs.ErrNotFound)
	}
	id := make([]byte, 32)
	rand.Read(id)
	n := Network{
		ID: hex.EncodeToString(id), Name: c.Name, Driver: DriverBridge,
		EnableIPv4: c.EnableIPv4, EnableIPv6: c.EnableIPv6, Internal: c.Internal, Attachable: c.Attachable,
		Options: c.Options, Labels: c.Labels, MTU: m.o.MTU, Created: time.Now().UTC(),
	}
	if !n.EnableIPv4 && !n.EnableIPv6 {
		n.EnableIPv4 = true
	}
	// 15 characters are what an interface name can have.
	n.Bridge = "hk-" + n.ID[:12]
	if b := c.Options[optBridgeName]; b != "" {
		if !validIfName(b) {
			return Network{}, fmt.Errorf("bridge name %q is not possible: %w", b, errdefs.ErrInvalidArgument)
		}
		if _, err := m.host.LinkByName(b); err == nil {
			return Network{}, fmt.Errorf("the host has an interface %s already: %w", b, errdefs.ErrFailedPrecondition)
		}
		n.Bridge = b
	}
	if s := c.Options[optMTU]; s != "" {
		mtu, err := strconv.Atoi(s)
		if err != nil || mtu < 68 || mtu > 65535 || n.EnableIPv6 && mtu < 1280 {
			return Network{}, fmt.Errorf("invalid MTU %q: 68 to 65535, with IPv6 at least 1280: %w", s, errdefs.ErrInvalidArgument)
		}
		n.MTU = mtu
	}
	var taken []netip.Prefix
	for _, o := range m.list() {
		if o.Name == c.Name {
			return Network{}, fmt.Errorf("network with name %s already exists: %w", c.Name, errdefs.ErrAlreadyExists)
		}
		if o.Bridge == n.Bridge {
			return Network{}, fmt.Errorf("network %s has the bridge %s already: %w", o.Name, n.Bridge, errdefs.ErrFailedPrecondition)
		}
		taken = append(taken, prefixes(o.Subnets)...)
	}
	has4, has6 := false, false
	for _, s := range c.Subnets {
		if !s.Prefix.IsValid() {
			continue // gives only options for the automatic choice, of which there are none
		}
		if s.Gateway = s.Gateway.Unmap(); !s.Gateway.IsValid() {
			s.Gateway = gatewayOf(s.Prefix.Masked())
		}
		s.Prefix = s.Prefix.Masked()
		is4 := s.Prefix.Addr().Is4()
		if is4 && !n.EnableIPv4 || !is4 && !n.EnableIPv6 {
			return Network{}, fmt.Errorf("subnet %s: IPv%d is not enabled: %w", s.Prefix, family(s.Prefix), errdefs.ErrInvalidArgument)
		}
		if is4 && has4 || !is4 && has6 {
			return Network{}, fmt.Errorf("subnet %s: bridge networks have one IPv%d subnet: %w", s.Prefix, family(s.Prefix), errdefs.ErrInvalidArgument)
		}
		has4, has6 = has4 || is4, has6 || !is4
		if overlapsAny(s.Prefix, taken) {
			return Network{}, fmt.Errorf("invalid pool request: Pool overlaps with other one on this address space: %s: %w", s.Prefix, errdefs.ErrFailedPrecondition)
		}
		n.Subnets = append(n.Subnets, s)
	}
	used, err := m.hostPrefixes()
	if err != nil {
		return Network{}, err
	}
	used = append(used, taken...)
	for _, fam := range []struct{ want, is4 bool }{{n.EnableIPv4 && !has4, true}, {n.EnableIPv6 && !has6, false}} {
		if !fam.want {
			continue
		}
		p, err := choose(m.o.Pools, used, fam.is4)
		if err != nil {
			return Network{}, err
		}
		n.Subnets = append(n.Subnets, Subnet{Prefix: p, Gateway: gatewayOf(p)})
	}
	return n, nil
}

// Remove deletes a network without endpoints. Errors: ErrNotFound, ErrPermissionDenied (predefined),
// ErrFailedPrecondition (it has endpoints).
func (m *Manager) Remove(ctx context.Context, ref string) (err error) {
	m.mu.Lock()
	n, err := m.find(ref)
	for err == nil {
		wait := m.blocker(EndpointConfig{Network: n.ID})
		if wait == nil {
			break
		}
		m.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return fmt.Errorf("remove network %s: %w", ref, ctx.Err())
		}
		m.mu.Lock()
		n, err = m.find(ref)
	}
	switch {
	case err != nil:
	case n.Predefined:
		err = fmt.Errorf("%s is a pre-defined network and cannot be removed: %w", n.Name, errdefs.ErrPermissionDenied)
	case len(n.eps) > 0:
		err = fmt.Errorf("network %s id %s has active endpoints: %w", n.Name, n.ID, errdefs.ErrFailedPrecondition)
	case n.leaving:
		err = fmt.Errorf("network %s is being removed: %w", n.Name, errdefs.ErrFailedPrecondition)
	default:
		n.leaving = true
	}
	m.mu.Unlock()
	if err != nil {
		return fmt.Errorf("remove network: %w", err)
	}
	err = m.takeDown(n)
	if err == nil {
		err = m.records.Delete(ctx, n.ID)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if n.leaving = false; err != nil {
		return fmt.Errorf("remove network %s: %w", n.Name, err)
	}
	delete(m.nets, n.ID)
	return nil
}

// bringUp makes the network's bridge and rules if they are not there. Without an endpoint it makes nothing: the healer
// may come here late, when the network is gone, and nobody would ever take down what it made.
func (m *Manager) bringUp(ctx context.Context, n *netw) error {
	if n.index.Load() != 0 {
		return nil
	}
	n.up.Lock()
	defer n.up.Unlock()
	m.mu.RLock()
	unused := len(n.eps) == 0
	m.mu.RUnlock()
	if unused || n.index.Load() != 0 {
		return nil
	}
	if err := m.makeBridge(ctx, n.Network); err != nil {
		return err
	}
	link, err := m.host.LinkByName(n.Bridge)
	if err != nil {
		return fmt.Errorf("bridge %s: %w", n.Bridge, err)
	}
	if !n.Internal {
		if n.EnableIPv4 {
			if err := forwardIPv4(); err != nil {
				return err
			}
		}
		if n.EnableIPv6 {
			if err := m.forwardIPv6(); err != nil {
				return err
			}
		}
	}
	if err := m.fw.addNetwork(n.ID, n.firewall()); err != nil {
		return err
	}
	n.index.Store(int32(link.Attrs().Index))
	if o := m.fw.obstacles(); len(o) > 0 && !n.Internal {
		m.log.Warn("another firewall drops what it does not know; containers reach nothing outside until it lets the bridge pass", "network", n.Name, "bridge", n.Bridge, "chains", o)
	}
	return nil
}

// takeDown removes the network's bridge and rules from the host.
func (m *Manager) takeDown(n *netw) error {
	n.up.Lock()
	defer n.up.Unlock()
	n.index.Store(0)
	return errors.Join(m.removeLink(n.Bridge), m.fw.removeNetwork(n.ID))
}

// Endpoints gives the endpoints of a network in the order of their names.
func (m *Manager) Endpoints(_ context.Context, networkRef string) ([]Endpoint, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n, err := m.find(networkRef)
	if err != nil {
		return nil, err
	}
	out := []Endpoint{}
	for _, e := range n.eps {
		if e.live {
			out = append(out, e.Endpoint.clone())
		}
	}
	slices.SortFunc(out, func(a, b Endpoint) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	return out, nil
}

// HostGateway is the address at which containers reach the host: the default network's gateway.
func (m *Manager) HostGateway(ctx context.Context) (netip.Addr, error) {
	n, err := m.Get(ctx, DefaultName)
	if err != nil {
		return netip.Addr{}, err
	}
	return n.Subnets[0].Gateway, nil
}
