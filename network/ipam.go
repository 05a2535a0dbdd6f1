package network

import (
	"fmt"
	"net/netip"

	"github.com/containerd/errdefs"
)

// pool hands out the addresses of one subnet, each to one holder. It goes on
// from the address after the last one given (next fit), so that an address just
// released is not used again at once while neighbours still remember its owner.
// It is not safe for concurrent use.
type pool struct {
	prefix  netip.Prefix
	span    netip.Prefix // where automatic addresses come from: prefix or a part of it
	blocked map[netip.Addr]string
	held    map[netip.Addr]string // address → holder
	next    netip.Addr
}

func newPool(s Subnet) (*pool, error) {
	p := &pool{prefix: s.Prefix.Masked(), span: s.Prefix.Masked(), blocked: map[netip.Addr]string{}, held: map[netip.Addr]string{}}
	if !s.Prefix.IsValid() {
		return nil, fmt.Errorf("subnet is empty: %w", errdefs.ErrInvalidArgument)
	}
	if s.Range.IsValid() {
		p.span = s.Range.Masked()
		if p.span.Bits() < p.prefix.Bits() || !p.prefix.Contains(p.span.Addr()) {
			return nil, fmt.Errorf("range %s is not part of subnet %s: %w", s.Range, s.Prefix, errdefs.ErrInvalidArgument)
		}
	}
	if single := p.prefix.Addr().BitLen() - p.prefix.Bits(); single >= 2 {
		p.blocked[p.prefix.Addr()] = "the network's address"
		if p.prefix.Addr().Is4() {
			p.blocked[lastAddr(p.prefix)] = "the broadcast address"
		}
	}
	if s.Gateway.IsValid() {
		if !p.prefix.Contains(s.Gateway) {
			return nil, fmt.Errorf("gateway %s is not in subnet %s: %w", s.Gateway, s.Prefix, errdefs.ErrInvalidArgument)
		}
		p.blocked[s.Gateway] = "the gateway"
	}
	for name, a := range s.Reserved {
		if !p.prefix.Contains(a) {
			return nil, fmt.Errorf("reserved address %s (%s) is not in subnet %s: %w", a, name, s.Prefix, errdefs.ErrInvalidArgument)
		}
		p.blocked[a] = "reserved for " + name
	}
	p.next = p.span.Addr()
	return p, nil
}

// take gives holder the address want, or the next free one when want is zero.
// Errors: ErrInvalidArgument (not of this subnet), ErrAlreadyExists (taken),
// ErrResourceExhausted (none is free).
func (p *pool) take(holder string, want netip.Addr) (netip.Addr, error) {
	if want.IsValid() {
		want = want.Unmap()
		if !p.prefix.Contains(want) {
			return netip.Addr{}, fmt.Errorf("address %s is not in subnet %s: %w", want, p.prefix, errdefs.ErrInvalidArgument)
		}
		if why, no := p.blocked[want]; no {
			return netip.Addr{}, fmt.Errorf("address %s of subnet %s is %s: %w", want, p.prefix, why, errdefs.ErrInvalidArgument)
		}
		if by, no := p.held[want]; no && by != holder {
			return netip.Addr{}, fmt.Errorf("address %s of subnet %s: Address already in use: %w", want, p.prefix, errdefs.ErrAlreadyExists)
		}
		p.held[want] = holder
		return want, nil
	}
	a := p.next
	// Among n addresses that are taken or blocked there is a free one after at most n+1 steps, or a full circle.
	for range len(p.held) + len(p.blocked) + 1 {
		_, taken := p.held[a]
		_, never := p.blocked[a]
		if !taken && !never {
			p.held[a] = holder
			p.next = p.after(a)
			return a, nil
		}
		if a = p.after(a); a == p.next {
			break
		}
	}
	return netip.Addr{}, fmt.Errorf("no available IPv%d addresses on subnet %s: %w", family(p.prefix), p.span, errdefs.ErrResourceExhausted)
}

// release gives an address back if holder still has it.
func (p *pool) release(holder string, a netip.Addr) {
	if p.held[a] == holder {
		delete(p.held, a)
	}
}

func (p *pool) after(a netip.Addr) netip.Addr {
	if a = a.Next(); a.IsValid() && p.span.Contains(a) {
		return a
	}
	return p.span.Addr()
}

func family(p netip.Prefix) int {
	if p.Addr().Is4() {
		return 4
	}
	return 6
}

func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Pool is a range of addresses that is cut into subnets of Bits for networks
// whose creator named none.
type Pool struct {
	Base netip.Prefix
	Bits int
}

// DefaultPools gives the IPv4 pools: two /16, then 16 /20, then 256 /24.
func DefaultPools() []Pool {
	return []Pool{
		{netip.MustParsePrefix("172.30.0.0/15"), 16},
		{netip.MustParsePrefix("192.168.0.0/16"), 20},
		{netip.MustParsePrefix("10.201.0.0/16"), 24},
	}
}

// choose gives the first subnet of the pools that overlaps nothing in used.
func choose(pools []Pool, used []netip.Prefix, is4 bool) (netip.Prefix, error) {
	for _, pl := range pools {
		if pl.Base.Addr().Is4() != is4 || pl.Bits < pl.Base.Bits() {
			continue
		}
		for p := netip.PrefixFrom(pl.Base.Masked().Addr(), pl.Bits); pl.Base.Contains(p.Addr()); {
			if !overlapsAny(p, used) {
				return p, nil
			}
			next := lastAddr(p).Next()
			if !next.IsValid() {
				break
			}
			p = netip.PrefixFrom(next, pl.Bits)
		}
	}
	return netip.Prefix{}, fmt.Errorf("could not find an available, non-overlapping address pool among the defaults to assign to the network: %w", errdefs.ErrResourceExhausted)
}

func overlapsAny(p netip.Prefix, used []netip.Prefix) bool {
	for _, u := range used {
		if p.Overlaps(u) {
			return true
		}
	}
	return false
}
