package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// fwNet is what the firewall knows of a network.
type fwNet struct {
	bridge   string
	subnets  []netip.Prefix
	internal bool
	masq     bool
	isolated bool // no traffic between its endpoints
}

// fwPort sends one port of the host to a container.
type fwPort struct {
	proto uint8
	host  netip.Addr // zero: every local address
	port  uint16
	dest  netip.AddrPort
}

// firewall is our table and the model that it can be made from again at any time.
type firewall struct {
	name string

	mu      sync.Mutex // held over netlink: nftables serialises its transactions anyway
	nets    map[string]fwNet
	ports   map[string][]fwPort // by endpoint
	retired map[string][]fwPort // no longer published, but their rules are still there
	built   bool
	checked uint32 // nftables generation at which the table was last seen to be whole; 0: never
}

func newFirewall(name string) *firewall {
	return &firewall{name: name, nets: map[string]fwNet{}, ports: map[string][]fwPort{}, retired: map[string][]fwPort{}}
}

func (f *firewall) table() *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyINet, Name: f.name}
}

func ifname(s string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, s)
	return b
}

func padProto(p uint8) []byte    { return []byte{p, 0, 0, 0} }
func padPort(p uint16) []byte    { return append(binary.BigEndian.AppendUint16(nil, p), 0, 0) }
func key(parts ...[]byte) []byte { return slices.Concat(parts...) }

type elements map[string][]nftables.SetElement

func (e elements) put(set string, el ...nftables.SetElement) { e[set] = append(e[set], el...) }

func (n fwNet) elements(e elements) {
	e.put(setBridges, nftables.SetElement{Key: ifname(n.bridge)})
	if !n.isolated { // else the ports of the bridge are isolated, and routing through the gateway is no way around that
		e.put(setSame, nftables.SetElement{Key: key(ifname(n.bridge), ifname(n.bridge))})
	}
	if n.internal {
		e.put(setInternal, nftables.SetElement{Key: ifname(n.bridge)})
	} else if n.masq {
		e.put(setMasq, nftables.SetElement{Key: ifname(n.bridge)})
	}
	for _, p := range n.subnets {
		set := setSubnets4
		if !p.Addr().Is4() {
			set = setSubnets6
		}
		e.put(set, nftables.SetElement{Key: p.Masked().Addr().AsSlice()})
		if end := lastAddr(p).Next(); end.IsValid() {
			e.put(set, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
		}
	}
}

func (p fwPort) elements(e elements) {
	v := key(p.dest.Addr().AsSlice(), padPort(p.dest.Port()))
	k := key(padProto(p.proto), padPort(p.port))
	every, one := mapPorts4, mapAddr4
	if !p.dest.Addr().Is4() {
		every, one = mapPorts6, mapAddr6
	}
	if p.host.IsValid() {
		e.put(one, nftables.SetElement{Key: key(p.host.AsSlice(), k), Val: v})
	} else {
		e.put(every, nftables.SetElement{Key: k, Val: v})
	}
}

// model gives everything that the table has to hold now.
func (f *firewall) model() elements {
	e := elements{}
	for _, n := range f.nets {
		n.elements(e)
	}
	for _, ps := range f.ports {
		for _, p := range ps {
			p.elements(e)
		}
	}
	return e
}

// build makes the table from the model, in one transaction that replaces what there was.
// Replacing costs ten times as much as making, because the kernel waits for readers.
func (f *firewall) build() error {
	there, err := hasTable(nftables.TableFamilyINet, f.name)
	if err != nil {
		return err
	}
	return f.write(there)
}

func (f *firewall) write(replace bool) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	t := f.table()
	if replace {
		c.AddTable(t) // so that it exists and can be deleted
		c.DelTable(t)
	}
	c.CreateTable(t)
	model := f.model()
	for _, s := range hostSets() {
		s.Table = t
		if err := c.AddSet(s, nil); err != nil {
			return fmt.Errorf("nftables: set %s: %w", s.Name, err)
		}
		if err := addElements(c, s, model[s.Name]); err != nil {
			return err
		}
	}
	for _, ch := range hostChains() {
		policy := nftables.ChainPolicyAccept
		nc := c.AddChain(&nftables.Chain{Name: ch.name, Table: t, Type: ch.typ, Hooknum: ch.hook, Priority: &ch.prio, Policy: &policy})
		for _, r := range ch.rules {
			c.AddRule(&nftables.Rule{Table: t, Chain: nc, Exprs: r.exprs})
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("nftables: build table %s: %w", f.name, err)
	}
	f.built, f.retired = true, map[string][]fwPort{}
	return nil
}

// maxElements keeps one netlink message below its attributes' limit of 64 KiB.
const maxElements = 400

func addElements(c *nftables.Conn, s *nftables.Set, all []nftables.SetElement) error {
	for part := range slices.Chunk(all, maxElements) {
		if err := c.SetAddElements(s, part); err != nil {
			return fmt.Errorf("nftables: elements of %s: %w", s.Name, err)
		}
	}
	return nil
}

// change applies elements to a table that exists; on any surprise it builds the table again.
func (f *firewall) change(add, del elements) error {
	if !f.built {
		return f.build()
	}
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	for _, s := range hostSets() {
		s.Table, s.ID = f.table(), 0
		for part := range slices.Chunk(del[s.Name], maxElements) {
			if err := c.SetDeleteElements(s, part); err != nil {
				return fmt.Errorf("nftables: elements of %s: %w", s.Name, err)
			}
		}
		if err := addElements(c, s, add[s.Name]); err != nil {
			return err
		}
	}
	if c.Flush() != nil {
		return f.build() // somebody removed the table, or parts of it
	}
	return nil
}

// addNetwork makes a network known; it is idempotent.
func (f *firewall) addNetwork(id string, n fwNet) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, known := f.nets[id]; known && f.built {
		return nil
	}
	f.nets[id] = n
	e := elements{}
	n.elements(e)
	return f.change(e, nil)
}

func (f *firewall) removeNetwork(id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, known := f.nets[id]
	if !known {
		return nil
	}
	delete(f.nets, id)
	if len(f.nets) == 0 {
		return f.destroy()
	}
	e := elements{}
	n.elements(e)
	return f.change(nil, e)
}

// addPorts publishes the ports of an endpoint, all or none.
func (f *firewall) addPorts(endpoint string, ports []fwPort) error {
	if len(ports) == 0 {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ports[endpoint] = ports
	add, del := elements{}, elements{}
	for _, p := range ports {
		p.elements(add)
		for id, old := range f.retired {
			if i := slices.IndexFunc(old, p.sameKey); i >= 0 {
				old[i].elements(del)
				f.retired[id] = slices.Delete(slices.Clone(old), i, i+1)
			}
		}
	}
	if err := f.change(add, del); err != nil {
		delete(f.ports, endpoint)
		return err
	}
	return nil
}

func (p fwPort) sameKey(o fwPort) bool {
	return p.proto == o.proto && p.port == o.port && p.host == o.host && p.dest.Addr().Is4() == o.dest.Addr().Is4()
}

// retirePorts lets the ports of an endpoint be published anew at once; sweepPorts removes
// their rules. To delete from a map takes the kernel 5 to 15 ms, which nobody has to wait for.
func (f *firewall) retirePorts(endpoint string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if ports := f.ports[endpoint]; len(ports) > 0 {
		f.retired[endpoint] = ports
		delete(f.ports, endpoint)
	}
}

// sweepPorts removes what retirePorts left, also of other endpoints: those that wait for their
// turn then find nothing to do.
func (f *firewall) sweepPorts() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	e := elements{}
	for _, ports := range f.retired {
		for _, p := range ports {
			p.elements(e)
		}
	}
	if len(e) > 0 {
		if err := f.change(nil, e); err != nil {
			return err
		}
	}
	f.retired = map[string][]fwPort{}
	return nil
}

// destroy removes the table.
func (f *firewall) destroy() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	c.AddTable(f.table())
	c.DelTable(f.table())
	if err := c.Flush(); err != nil {
		return fmt.Errorf("nftables: remove table %s: %w", f.name, err)
	}
	f.built = false
	return nil
}

// obstacles names the chains of others that drop what is forwarded unless they know it (Docker's, ufw's). An accept of ours
// does not overrule them: nftables asks every chain of a hook.
func (f *firewall) obstacles() []string {
	c, err := nftables.New()
	if err != nil {
		return nil
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil
	}
	var out []string
	for _, ch := range chains {
		if ch.Hooknum != nil && *ch.Hooknum == *nftables.ChainHookForward && ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop && ch.Type == nftables.ChainTypeFilter &&
			(ch.Table.Family == nftables.TableFamilyINet || ch.Table.Family == nftables.TableFamilyIPv4 || ch.Table.Family == nftables.TableFamilyIPv6) {
			out = append(out, ch.Table.Name+" "+ch.Name)
		}
	}
	return out
}

// heal builds the table again if it is not as it was made, and tells whether it had to.
func (f *firewall) heal() (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.nets) == 0 {
		return false, nil
	}
	gen, err := nftGeneration()
	if err == nil && gen == f.checked && gen != 0 {
		return false, nil
	}
	if f.whole() {
		f.built, f.checked = true, gen
		return false, nil
	}
	return true, f.build()
}

// whole compares the table's chains, rules and elements by name and number with the model.
func (f *firewall) whole() bool {
	c, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return false
	}
	defer c.CloseLasting()
	t := f.table()
	for _, ch := range hostChains() {
		if rules, err := c.GetRules(t, &nftables.Chain{Name: ch.name, Table: t}); err != nil || len(rules) != len(ch.rules) {
			return false
		}
	}
	model := f.model()
	for _, ps := range f.retired {
		for _, p := range ps {
			p.elements(model)
		}
	}
	for _, s := range hostSets() {
		s.Table = t
		have, err := c.GetSetElements(s)
		if err != nil {
			return false
		}
		if !sameElements(have, model[s.Name]) {
			return false
		}
	}
	return true
}

func sameElements(have, want []nftables.SetElement) bool {
	index := func(es []nftables.SetElement) map[string]string {
		m := make(map[string]string, len(es))
		for _, e := range es {
			k := string(e.Key)
			if e.IntervalEnd {
				k += "\x00end"
			}
			m[k] = string(e.Val)
		}
		return m
	}
	// The kernel lists an interval end at the lowest address that nobody asked for.
	h := index(slices.DeleteFunc(slices.Clone(have), func(e nftables.SetElement) bool {
		return e.IntervalEnd && allZero(e.Key)
	}))
	return maps.Equal(h, index(want))
}

func allZero(b []byte) bool {
	return !slices.ContainsFunc(b, func(c byte) bool { return c != 0 })
}

// nftGeneration gives the number of the last transaction of this network namespace (NFT_MSG_GETGEN).
func nftGeneration() (uint32, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return 0, fmt.Errorf("nftables generation: %w", err)
	}
	defer c.Close()
	msgs, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   []byte{unix.AF_UNSPEC, 0, 0, 0},
	})
	if err != nil {
		return 0, fmt.Errorf("nftables generation: %w", err)
	}
	for _, m := range msgs {
		if len(m.Data) < 4 {
			continue
		}
		d, err := netlink.NewAttributeDecoder(m.Data[4:])
		if err != nil {
			return 0, fmt.Errorf("nftables generation: %w", err)
		}
		d.ByteOrder = binary.BigEndian
		for d.Next() {
			if d.Type() == unix.NFTA_GEN_ID {
				return d.Uint32(), nil
			}
		}
	}
	return 0, errors.Join(errors.New("nftables generation: no answer"), errdefs.ErrUnknown)
}

// expect puts into the model what an earlier daemon made; heal then compares.
func (f *firewall) expect(id string, n fwNet, endpoint string, ports []fwPort) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.nets[id] = n
	if len(ports) > 0 {
		f.ports[endpoint] = ports
	}
}

// clear forgets everything and removes the table if there is one.
func (f *firewall) clear() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.nets, f.ports, f.retired = map[string]fwNet{}, map[string][]fwPort{}, map[string][]fwPort{}
	there, err := hasTable(nftables.TableFamilyINet, f.name)
	if err != nil || !there {
		f.built = false
		return err
	}
	return f.destroy()
}
