package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/miekg/dns"
	"golang.org/x/net/netutil"
	"golang.org/x/sys/unix"
)

const (
	dnsTTL       = 10 // seconds: containers move to other addresses when they restart
	dnsTable     = "hako-dns"
	dnsForwards  = 64 // of one sandbox at a time
	dnsConns     = 32 // TCP, the same
	dnsServer    = 2 * time.Second
	dnsQuery     = 5 * time.Second // all servers together
	dnsBadFor    = 10 * time.Second
	dnsShutdown  = 200 * time.Millisecond
	dnsMaxServer = 3 // as MAXNS in resolv.h
)

// nameserver answers at 127.0.0.11 in one sandbox. Its sockets were opened inside and have
// a random port, to which rules in the sandbox lead: port 53 stays free for the container.
type nameserver struct {
	m        *Manager
	box      *sandbox
	port     uint16
	udp, tcp *dns.Server
	forwards chan struct{}
	done     sync.WaitGroup
}

// setDNSNames collects the names under which others on the network find the endpoint.
func (e *endpoint) setDNSNames() {
	e.DNSNames = nil
	if e.net.Predefined {
		return // as in Docker, the default network has no names
	}
	for _, s := range append([]string{e.Name, shortID(e.ID), e.hostname}, e.Aliases...) {
		if s != "" && !slices.Contains(e.DNSNames, s) {
			e.DNSNames = append(e.DNSNames, s)
		}
	}
}

// shortID is what Docker shows of an id: 12 characters.
func shortID(id string) string {
	if len(id) > 12 {
		return id[:12]
	}
	return id
}

// publish makes the endpoint's names known. The caller holds Manager.mu, as for unpublish.
func (n *netw) publish(e *endpoint) {
	for _, s := range e.DNSNames {
		s = strings.ToLower(s)
		n.names[s] = append(n.names[s], e)
	}
}

func (n *netw) unpublish(e *endpoint) {
	for _, s := range e.DNSNames {
		s = strings.ToLower(s)
		if n.names[s] = slices.DeleteFunc(n.names[s], func(o *endpoint) bool { return o == e }); len(n.names[s]) == 0 {
			delete(n.names, s)
		}
	}
}

// Rename changes the DNS name of an endpoint; one that does not exist is no error, since a
// container that is not running has none.
func (m *Manager) Rename(_ context.Context, networkRef, endpointID, newName string) error {
	m.mu.RLock()
	n, err := m.find(networkRef)
	var e *endpoint
	if err == nil {
		e = n.eps[endpointID]
	}
	m.mu.RUnlock()
	if err != nil {
		return fmt.Errorf("rename endpoint %s: %w", endpointID, err)
	}
	if e == nil {
		return nil
	}
	e.box.mu.Lock() // orders the records
	defer e.box.mu.Unlock()
	m.mu.Lock()
	if n.eps[endpointID] != e || !e.live {
		m.mu.Unlock()
		return nil
	}
	n.unpublish(e)
	e.Name = newName
	e.setDNSNames()
	n.publish(e)
	m.mu.Unlock()
	return m.saveEndpoint(e, false)
}

// startDNS gives the sandbox a nameserver if the endpoint's network has names. The caller holds box.mu.
func (m *Manager) startDNS(e *endpoint) error {
	if e.net.Predefined || e.net.Driver != DriverBridge || e.box.dns != nil {
		return nil
	}
	ns, err := openNamespace(e.Netns)
	if err != nil {
		return fmt.Errorf("nameserver: %w", err)
	}
	defer ns.Close()
	var pc net.PacketConn
	var l net.Listener
	err = m.inNamespace(ns, func() (err error) {
		// The port of an earlier daemon is taken again if it is free: then its rules are right.
		if pc, l, err = listenDNS(e.box.port); err != nil {
			if pc, l, err = listenDNS(0); err != nil {
				return err
			}
		}
		// To look is cheap, to try and fail takes the kernel 10 ms.
		port := portOf(pc)
		there, err := hasTable(nftables.TableFamilyIPv4, dnsTable)
		if err == nil && !(there && port == e.box.port) {
			err = redirectDNS(port, there)
		}
		return err
	})
	if err != nil {
		if pc != nil {
			pc.Close()
			l.Close()
		}
		return fmt.Errorf("nameserver in %s: %w", e.Netns, err)
	}
	s := &nameserver{m: m, box: e.box, port: portOf(pc), forwards: make(chan struct{}, dnsForwards)}
	h := dns.HandlerFunc(s.serve)
	s.udp = &dns.Server{PacketConn: pc, Handler: h}
	s.tcp = &dns.Server{Listener: netutil.LimitListener(l, dnsConns), Handler: h, ReadTimeout: dnsQuery, MaxTCPQueries: 128}
	for _, srv := range []*dns.Server{s.udp, s.tcp} {
		started, failed := make(chan struct{}), make(chan error, 1)
		srv.NotifyStartedFunc = func() { close(started) }
		s.done.Go(func() {
			if err := srv.ActivateAndServe(); err != nil { // nil after close
				m.log.Error("a nameserver has ended", "netns", e.Netns, "error", err)
				failed <- err
			}
		})
		select {
		case <-started:
		case err := <-failed:
			s.close()
			pc.Close()
			l.Close()
			return fmt.Errorf("nameserver in %s: %w", e.Netns, err)
		}
	}
	e.box.dns, e.box.port = s, s.port
	return nil
}

// listenDNS opens the sockets of a nameserver on one port, 0 for a random one, in the namespace of the calling thread.
func listenDNS(port uint16) (net.PacketConn, net.Listener, error) {
	pc, err := net.ListenPacket("udp4", netip.AddrPortFrom(EmbeddedDNS, port).String())
	if err != nil {
		return nil, nil, err
	}
	l, err := net.Listen("tcp4", netip.AddrPortFrom(EmbeddedDNS, portOf(pc)).String())
	if err != nil {
		pc.Close()
		return nil, nil, err
	}
	return pc, l, nil
}

func portOf(pc net.PacketConn) uint16 { return uint16(pc.LocalAddr().(*net.UDPAddr).Port) }

// stopDNS ends the sandbox's nameserver if no other endpoint needs it. The caller holds box.mu.
func (m *Manager) stopDNS(leaving *endpoint) error {
	if leaving.box.dns == nil || leaving.net.Predefined {
		return nil
	}
	m.mu.RLock()
	needed := slices.ContainsFunc(leaving.box.eps, func(e *endpoint) bool {
		return e != leaving && e.leaving == nil && !e.net.Predefined && e.net.Driver == DriverBridge
	})
	m.mu.RUnlock()
	if needed {
		return nil
	}
	leaving.box.dns.close()
	leaving.box.dns, leaving.box.port = nil, 0
	ns, err := openNamespace(leaving.Netns)
	if err != nil {
		return nil // the rules went with the namespace
	}
	defer ns.Close()
	return m.inNamespace(ns, func() error { return dropTable(nftables.TableFamilyIPv4, dnsTable) })
}

func (s *nameserver) close() {
	// Questions that are being forwarded may go on for seconds; nobody waits for their answers.
	ctx, cancel := context.WithTimeout(context.Background(), dnsShutdown)
	defer cancel()
	s.udp.ShutdownContext(ctx)
	s.tcp.ShutdownContext(ctx)
	s.done.Wait()
}

func hasTable(fam nftables.TableFamily, name string) (bool, error) {
	c, err := nftables.New()
	if err != nil {
		return false, fmt.Errorf("nftables: %w", err)
	}
	tables, err := c.ListTablesOfFamily(fam)
	if err != nil {
		return false, fmt.Errorf("nftables: list tables: %w", err)
	}
	return slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == name }), nil
}

func dropTable(fam nftables.TableFamily, name string) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	t := c.AddTable(&nftables.Table{Family: fam, Name: name})
	c.DelTable(t)
	return c.Flush()
}

// redirectDNS leads 127.0.0.11:53 to port in the namespace of the calling thread.
// Replacing a table costs more than 10 ms, making one less than 1.
func redirectDNS(port uint16, replace bool) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: dnsTable}
	if replace {
		c.AddTable(t)
		c.DelTable(t)
	}
	c.CreateTable(t)
	ch := c.AddChain(&nftables.Chain{Name: "output", Table: t, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest})
	for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
		c.AddRule(&nftables.Rule{Table: t, Chain: ch, Exprs: []expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offDaddr4, Len: 4},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: EmbeddedDNS.AsSlice()},
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0, 53}},
			&expr.Immediate{Register: 1, Data: EmbeddedDNS.AsSlice()},
			&expr.Immediate{Register: 2, Data: binary.BigEndian.AppendUint16(nil, port)},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegProtoMin: 2},
		}})
	}
	return c.Flush()
}

func (s *nameserver) serve(w dns.ResponseWriter, req *dns.Msg) {
	resp := new(dns.Msg)
	if len(req.Question) != 1 || req.Opcode != dns.OpcodeQuery {
		resp.SetRcode(req, dns.RcodeNotImplemented)
		w.WriteMsg(resp)
		return
	}
	q := req.Question[0]
	if rrs, known := s.answer(q); known {
		resp.SetReply(req)
		resp.RecursionAvailable = true
		if resp.Answer = rrs; rrs == nil && q.Qtype == dns.TypePTR {
			resp.Rcode = dns.RcodeNameError
		}
		s.write(w, req, resp)
		return
	}
	s.write(w, req, s.forward(w, req))
}

func (s *nameserver) write(w dns.ResponseWriter, req, resp *dns.Msg) {
	if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
		size := dns.MinMsgSize
		if o := req.IsEdns0(); o != nil {
			size = max(size, int(o.UDPSize()))
		}
		resp.Truncate(size)
	}
	w.WriteMsg(resp)
}

// answer gives the records for a name or an address of the sandbox's networks, and whether
// the question is about one.
func (s *nameserver) answer(q dns.Question) (rrs []dns.RR, known bool) {
	if q.Qclass != dns.ClassINET {
		return nil, false
	}
	if q.Qtype == dns.TypePTR {
		return s.reverse(q.Name)
	}
	name := strings.ToLower(strings.TrimSuffix(q.Name, "."))
	s.m.mu.RLock()
	var found []*endpoint
	for _, mine := range s.box.eps {
		n := mine.net
		found = append(found, n.names[name]...)
		if host, ok := strings.CutSuffix(name, "."+strings.ToLower(n.Name)); ok {
			found = append(found, n.names[host]...)
		}
	}
	s.m.mu.RUnlock()
	hdr := dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: dns.ClassINET, Ttl: dnsTTL}
	for _, e := range found {
		switch {
		case q.Qtype == dns.TypeA && e.IPv4.IsValid():
			rrs = append(rrs, &dns.A{Hdr: hdr, A: e.IPv4.Addr().AsSlice()})
		case q.Qtype == dns.TypeAAAA && e.IPv6.IsValid():
			rrs = append(rrs, &dns.AAAA{Hdr: hdr, AAAA: e.IPv6.Addr().AsSlice()})
		}
	}
	// Several endpoints of one alias share the load.
	rand.Shuffle(len(rrs), func(i, j int) { rrs[i], rrs[j] = rrs[j], rrs[i] })
	return rrs, len(found) > 0
}

// reverse answers for the addresses of the sandbox's networks; nobody else knows about these.
func (s *nameserver) reverse(name string) (rrs []dns.RR, known bool) {
	addr, ok := reverseAddr(name)
	if !ok {
		return nil, false
	}
	s.m.mu.RLock()
	defer s.m.mu.RUnlock()
	for _, mine := range s.box.eps {
		n := mine.net
		if n.Predefined {
			continue
		}
		for _, p := range n.pools {
			if !p.prefix.Contains(addr) {
				continue
			}
			known = true
			holder := p.held[addr]
			for _, e := range n.eps {
				if e.EndpointID == holder && e.live && e.Name != "" {
					rrs = append(rrs, &dns.PTR{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypePTR, Class: dns.ClassINET, Ttl: dnsTTL},
						Ptr: dns.Fqdn(e.Name + "." + n.Name)})
				}
			}
		}
	}
	return rrs, known
}

// reverseAddr reads in-addr.arpa and ip6.arpa names (RFC 1035 §3.5, RFC 3596 §2.5).
func reverseAddr(name string) (netip.Addr, bool) {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if s, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		parts := strings.Split(s, ".")
		slices.Reverse(parts)
		a, err := netip.ParseAddr(strings.Join(parts, "."))
		return a, err == nil && a.Is4()
	}
	s, ok := strings.CutSuffix(name, ".ip6.arpa")
	if parts := strings.Split(s, "."); ok && len(parts) == 32 {
		slices.Reverse(parts)
		var b strings.Builder
		for i, p := range parts {
			if i > 0 && i%4 == 0 {
				b.WriteByte(':')
			}
			b.WriteString(p)
		}
		a, err := netip.ParseAddr(b.String())
		return a, err == nil && a.Is6()
	}
	return netip.Addr{}, false
}

// upstream remembers which of the host's servers did not answer, so that a dead one is
// not waited for again and again.
type upstream struct {
	mu  sync.Mutex
	bad map[netip.Addr]time.Time // until when
}

func (u *upstream) isBad(a netip.Addr) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return time.Now().Before(u.bad[a])
}

func (u *upstream) mark(a netip.Addr, bad bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !bad {
		delete(u.bad, a)
		return
	}
	if u.bad == nil {
		u.bad = map[netip.Addr]time.Time{}
	}
	u.bad[a] = time.Now().Add(dnsBadFor)
}

// forward asks the host's servers, from the host's namespace, or those that the sandbox was given,
// from the sandbox. A sandbox that has only internal networks gets no answer from the host's (CVE-2024-29018).
func (s *nameserver) forward(w dns.ResponseWriter, req *dns.Msg) *dns.Msg {
	fail := func(rcode int) *dns.Msg {
		resp := new(dns.Msg)
		resp.SetRcode(req, rcode)
		resp.RecursionAvailable = true
		return resp
	}
	var own []netip.Addr
	outside := false
	s.m.mu.RLock()
	for _, e := range s.box.eps {
		outside = outside || !e.net.Internal && e.net.Driver == DriverBridge
		if len(own) == 0 {
			own = e.upstream
		}
	}
	s.m.mu.RUnlock()
	servers := slices.Clone(own)
	if len(own) == 0 {
		if !outside {
			return fail(dns.RcodeNameError)
		}
		if servers = hostResolver(s.m.o.ResolvConf).Servers; len(servers) == 0 {
			servers = fallbackServers()
		}
	}
	select {
	case s.forwards <- struct{}{}:
		defer func() { <-s.forwards }()
	default:
		return fail(dns.RcodeServerFailure)
	}
	servers = servers[:min(len(servers), dnsMaxServer)]
	// Dead servers come last, and briefly.
	slices.SortStableFunc(servers, func(a, b netip.Addr) int {
		return boolInt(s.m.upstream.isBad(a)) - boolInt(s.m.upstream.isBad(b))
	})
	ctx, cancel := context.WithTimeout(s.m.ctx, dnsQuery)
	defer cancel()
	proto := w.RemoteAddr().Network()
	for _, a := range servers {
		timeout := dnsServer
		if s.m.upstream.isBad(a) {
			timeout /= 4
		}
		resp, err := s.exchange(ctx, proto, a, req, timeout, len(own) > 0)
		if err != nil {
			s.m.upstream.mark(a, ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded))
			continue
		}
		s.m.upstream.mark(a, false)
		resp.Id = req.Id
		return resp
	}
	return fail(dns.RcodeServerFailure)
}

// exchange asks one server.
func (s *nameserver) exchange(ctx context.Context, proto string, server netip.Addr, req *dns.Msg, timeout time.Duration, inside bool) (*dns.Msg, error) {
	c := dns.Client{Net: proto, Timeout: timeout, UDPSize: dns.MaxMsgSize}
	var conn *dns.Conn
	dial := func() (err error) {
		conn, err = c.DialContext(ctx, netip.AddrPortFrom(server, 53).String())
		return err
	}
	var err error
	if inside {
		var ns *os.File
		if ns, err = openNamespace(s.box.path); err == nil {
			err = s.m.inNamespace(ns, dial)
			ns.Close()
		}
	} else {
		err = dial()
	}
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	resp, _, err := c.ExchangeWithConnContext(ctx, req, conn)
	return resp, err
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}
