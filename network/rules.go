package network

import (
	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Sets and maps of the host table. All that differs between hosts, networks and
// ports is in them; the chains are always the same, so that the cost per packet
// and the cost of a change do not grow.
const (
	setBridges  = "bridges"       // interfaces of our networks
	setInternal = "internal"      // those with no way out
	setMasq     = "masquerade"    // those whose containers leave under the host's address
	setSame     = "same_bridge"   // (in, out) pairs of one network
	setSubnets4 = "subnets4"      // our networks' addresses
	setSubnets6 = "subnets6"      //
	mapPorts4   = "ports4"        // protocol, port → container address, port; on every local address
	mapPorts6   = "ports6"        //
	mapAddr4    = "address_port4" // the same on one host address
	mapAddr6    = "address_port6" //
)

// A rule is kept in both forms: what the kernel gets, and what nft(8) would print,
// which is what the golden test compares and a reader understands.
type rule struct {
	text  []string
	exprs []expr.Any
}

// Registers: 16-byte ones are numbered from 1, the 4-byte ones that overlay them from 8.
const (
	reg1   = 1
	reg32a = 8
)

func newRule() *rule { return &rule{} }

func (r *rule) add(text string, e ...expr.Any) *rule {
	r.text = append(r.text, text)
	r.exprs = append(r.exprs, e...)
	return r
}

func (r *rule) v4() *rule {
	return r.add("meta nfproto ipv4", &expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{unix.NFPROTO_IPV4}})
}

func (r *rule) v6() *rule {
	return r.add("meta nfproto ipv6", &expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{unix.NFPROTO_IPV6}})
}

func (r *rule) iifIn(set string) *rule {
	return r.add("iifname @"+set, &expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg1},
		&expr.Lookup{SourceRegister: reg1, SetName: set})
}

func (r *rule) oifIn(set string) *rule {
	return r.add("oifname @"+set, &expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg1},
		&expr.Lookup{SourceRegister: reg1, SetName: set})
}

func (r *rule) oifNotIn(set string) *rule {
	return r.add("oifname != @"+set, &expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg1},
		&expr.Lookup{SourceRegister: reg1, SetName: set, Invert: true})
}

func (r *rule) sameBridge() *rule {
	return r.add("iifname . oifname @"+setSame,
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg32a},
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg32a + 4},
		&expr.Lookup{SourceRegister: reg1, SetName: setSame})
}

const (
	offSaddr4, offDaddr4 = 12, 16
	offSaddr6, offDaddr6 = 8, 24
)

func (r *rule) loopback4(text string, offset uint32) *rule {
	return r.add("ip "+text+" 127.0.0.0/8",
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{127}})
}

func (r *rule) daddrLoopback6() *rule {
	lo := make([]byte, 16)
	lo[15] = 1
	return r.add("ip6 daddr ::1",
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseNetworkHeader, Offset: offDaddr6, Len: 16},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: lo})
}

func (r *rule) saddrIn(set string, v6 bool) *rule {
	offset, n, name := uint32(offSaddr4), uint32(4), "ip"
	if v6 {
		offset, n, name = offSaddr6, 16, "ip6"
	}
	return r.add(name+" saddr @"+set,
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: n},
		&expr.Lookup{SourceRegister: reg1, SetName: set})
}

func (r *rule) daddrLocal() *rule {
	return r.add("fib daddr type local", &expr.Fib{Register: reg1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)})
}

func (r *rule) ctState(text string, bits uint32) *rule {
	return r.add("ct state "+text, &expr.Ct{Register: reg1, Key: expr.CtKeySTATE},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: make([]byte, 4)})
}

// ctDNAT matches connections whose destination was rewritten (IPS_DST_NAT, nf_conntrack_common.h).
func (r *rule) ctDNAT() *rule {
	return r.add("ct status dnat", &expr.Ct{Register: reg1, Key: expr.CtKeySTATUS},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(32), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: make([]byte, 4)})
}

// dnat sends to the container that m has for the packet's protocol and port, with byAddr
// also for its destination address. A packet for which there is none goes on to the next rule.
func (r *rule) dnat(m string, v6, byAddr bool) *rule {
	fam, addr, addrLen, offset := "ip", uint32(unix.NFPROTO_IPV4), uint32(4), uint32(offDaddr4)
	if v6 {
		fam, addr, addrLen, offset = "ip6", unix.NFPROTO_IPV6, 16, offDaddr6
	}
	reg, key := uint32(reg32a), ""
	if byAddr {
		key = fam + " daddr . "
		r.exprs = append(r.exprs, &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: addrLen})
		reg += addrLen / 4
	}
	return r.add("dnat "+fam+" to "+key+"meta l4proto . th dport map @"+m,
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg},
		&expr.Payload{DestRegister: reg + 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: reg1, SetName: m, DestRegister: reg1, IsDestRegSet: true},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: addr, RegAddrMin: reg1, RegProtoMin: reg32a + addrLen/4})
}

func (r *rule) masquerade() *rule { return r.add("masquerade", &expr.Masq{}) }

func (r *rule) verdict(kind expr.VerdictKind) *rule {
	name := map[expr.VerdictKind]string{expr.VerdictAccept: "accept", expr.VerdictDrop: "drop", expr.VerdictReturn: "return"}[kind]
	return r.add(name, &expr.Verdict{Kind: kind})
}

type chain struct {
	name  string
	typ   nftables.ChainType
	hook  *nftables.ChainHook
	prio  nftables.ChainPriority
	label string // hook and priority as nft(8) prints them
	rules []*rule
}

// hostChains are the chains of the host's table.
func hostChains() []chain {
	return []chain{
		// A container must not reach the host's loopback, which route_localnet on the bridge would let it (CVE-2020-8558).
		{"raw_prerouting", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, *nftables.ChainPriorityRaw, "filter hook prerouting priority raw", []*rule{
			newRule().iifIn(setBridges).v4().loopback4("daddr", offDaddr4).verdict(expr.VerdictDrop),
		}},
		// Packets for 127.0.0.1 that come from outside are left for the kernel to drop: what is published there
		// is for this machine only (CVE-2025-54410).
		{"prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, *nftables.ChainPriorityNATDest, "nat hook prerouting priority dstnat", []*rule{
			newRule().v4().loopback4("daddr", offDaddr4).verdict(expr.VerdictReturn),
			newRule().v4().dnat(mapAddr4, false, true),
			newRule().v4().daddrLocal().dnat(mapPorts4, false, false),
			newRule().v6().dnat(mapAddr6, true, true),
			newRule().v6().daddrLocal().dnat(mapPorts6, true, false),
		}},
		// IPv6 has no route_localnet: connections to ::1 are carried by the proxy in the daemon.
		{"output", nftables.ChainTypeNAT, nftables.ChainHookOutput, *nftables.ChainPriorityNATDest, "nat hook output priority dstnat", []*rule{
			newRule().v6().daddrLoopback6().verdict(expr.VerdictReturn),
			newRule().v4().dnat(mapAddr4, false, true),
			newRule().v4().daddrLocal().dnat(mapPorts4, false, false),
			newRule().v6().dnat(mapAddr6, true, true),
			newRule().v6().daddrLocal().dnat(mapPorts6, true, false),
		}},
		{"postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource, "nat hook postrouting priority srcnat", []*rule{
			newRule().iifIn(setMasq).oifNotIn(setBridges).masquerade(),
			newRule().oifIn(setBridges).v4().loopback4("saddr", offSaddr4).masquerade(),
			// A container that uses a published port: without this the answer would take the direct way back.
			newRule().oifIn(setBridges).ctDNAT().v4().saddrIn(setSubnets4, false).masquerade(),
			newRule().oifIn(setBridges).ctDNAT().v6().saddrIn(setSubnets6, true).masquerade(),
		}},
		{"forward", nftables.ChainTypeFilter, nftables.ChainHookForward, *nftables.ChainPriorityFilter, "filter hook forward priority filter", []*rule{
			newRule().ctState("established,related", expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED).verdict(expr.VerdictAccept),
			newRule().sameBridge().verdict(expr.VerdictAccept),
			newRule().iifIn(setInternal).verdict(expr.VerdictDrop),
			newRule().oifIn(setInternal).verdict(expr.VerdictDrop),
			newRule().oifIn(setBridges).ctDNAT().verdict(expr.VerdictAccept),
			newRule().oifIn(setBridges).verdict(expr.VerdictDrop),
		}},
	}
}

func mustConcat(t ...nftables.SetDatatype) nftables.SetDatatype {
	return nftables.MustConcatSetType(t...)
}

// hostSets are the sets and maps of the host's table, empty.
func hostSets() []*nftables.Set {
	proto, port, a4, a6 := nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeIPAddr, nftables.TypeIP6Addr
	return []*nftables.Set{
		{ID: 1, Name: setBridges, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian},
		{ID: 2, Name: setInternal, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian},
		{ID: 3, Name: setMasq, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian},
		{ID: 4, Name: setSame, KeyType: mustConcat(nftables.TypeIFName, nftables.TypeIFName), Concatenation: true},
		{ID: 5, Name: setSubnets4, KeyType: a4, Interval: true},
		{ID: 6, Name: setSubnets6, KeyType: a6, Interval: true},
		{ID: 7, Name: mapPorts4, IsMap: true, KeyType: mustConcat(proto, port), DataType: mustConcat(a4, port), Concatenation: true},
		{ID: 8, Name: mapPorts6, IsMap: true, KeyType: mustConcat(proto, port), DataType: mustConcat(a6, port), Concatenation: true},
		{ID: 9, Name: mapAddr4, IsMap: true, KeyType: mustConcat(a4, proto, port), DataType: mustConcat(a4, port), Concatenation: true},
		{ID: 10, Name: mapAddr6, IsMap: true, KeyType: mustConcat(a6, proto, port), DataType: mustConcat(a6, port), Concatenation: true},
	}
}
