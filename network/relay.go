package network

import (
	"context"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// target is where a published port leads.
type target struct {
	v4, v6 netip.Addr
	port   uint16
}

// address picks the container's address for a client: of the client's own family if the container has one.
func (t target) address(client netip.Addr) string {
	a := t.v4
	if !a.IsValid() || t.v6.IsValid() && client.Is6() && !client.Is4In6() {
		a = t.v6
	}
	return net.JoinHostPort(a.String(), strconv.Itoa(int(t.port)))
}

// Bounds of one relayed port. The kernel carries nearly all traffic; only what cannot be
// routed (::1, IPv6 to a container without it) comes through here.
const (
	maxRelayed     = 512
	relayDial      = 10 * time.Second
	udpIdle        = 90 * time.Second
	maxUDPDatagram = 65535
)

// relay holds a published port in the daemon and carries what the firewall does not.
type relay struct {
	allowed func(netip.Addr) bool
	ctx     context.Context
	cancel  context.CancelFunc
	closer  io.Closer
	wg      sync.WaitGroup
	slots   chan struct{}
}

func newRelay(c io.Closer, allowed func(netip.Addr) bool) *relay {
	ctx, cancel := context.WithCancel(context.Background())
	return &relay{allowed: allowed, ctx: ctx, cancel: cancel, closer: c, slots: make(chan struct{}, maxRelayed)}
}

// close frees the port and ends the connections that are relayed.
func (r *relay) close() {
	r.cancel()
	r.closer.Close()
	r.wg.Wait()
}

func relayTCP(l net.Listener, to target, allowed func(netip.Addr) bool) *relay {
	r := newRelay(l, allowed)
	r.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				if r.ctx.Err() != nil {
					return
				}
				select { // out of file descriptors, most likely
				case <-r.ctx.Done():
					return
				case <-time.After(100 * time.Millisecond):
				}
				continue
			}
			select {
			case r.slots <- struct{}{}:
				r.wg.Go(func() {
					defer func() { <-r.slots }()
					r.serveTCP(c.(*net.TCPConn), to)
				})
			default:
				c.Close()
			}
		}
	})
	return r
}

func (r *relay) serveTCP(client *net.TCPConn, to target) {
	defer client.Close()
	peer := client.RemoteAddr().(*net.TCPAddr).AddrPort().Addr()
	if !r.allowed(peer) {
		client.SetLinger(0)
		return
	}
	d := net.Dialer{Timeout: relayDial}
	back, err := d.DialContext(r.ctx, "tcp", to.address(peer))
	if err != nil {
		client.SetLinger(0) // the client sees a reset, as from a closed port
		return
	}
	defer back.Close()
	stop := context.AfterFunc(r.ctx, func() { client.Close(); back.Close() })
	defer stop()
	server := back.(*net.TCPConn)
	var half sync.WaitGroup
	half.Go(func() { copyHalf(server, client) })
	copyHalf(client, server)
	half.Wait()
}

// copyHalf carries one direction to its end and passes the end on.
func copyHalf(dst, src *net.TCPConn) {
	if _, err := io.Copy(dst, src); err != nil {
		dst.SetLinger(0)
		dst.Close()
		src.Close()
		return
	}
	dst.CloseWrite()
}

func relayUDP(pc net.PacketConn, to target, allowed func(netip.Addr) bool) *relay {
	r := newRelay(pc, allowed)
	r.wg.Go(func() { r.serveUDP(pc.(*net.UDPConn), to) })
	return r
}

func (r *relay) serveUDP(pc *net.UDPConn, to target) {
	var mu sync.Mutex
	sessions := map[netip.AddrPort]*net.UDPConn{}
	var buf []byte
	for {
		// The buffer is made when the first datagram has come: most ports never relay one.
		if buf == nil {
			if err := waitReadable(pc); err != nil {
				return
			}
			buf = make([]byte, maxUDPDatagram)
		}
		n, from, err := pc.ReadFromUDPAddrPort(buf)
		if err != nil {
			if r.ctx.Err() != nil {
				return
			}
			continue // an ICMP error of an earlier answer
		}
		if !r.allowed(from.Addr()) {
			continue
		}
		mu.Lock()
		back := sessions[from]
		full := len(sessions) >= maxRelayed
		mu.Unlock()
		if back == nil {
			if full {
				continue
			}
			c, err := net.Dial("udp", to.address(from.Addr()))
			if err != nil {
				continue
			}
			back = c.(*net.UDPConn)
			mu.Lock()
			sessions[from] = back
			mu.Unlock()
			stop := context.AfterFunc(r.ctx, func() { back.Close() })
			r.wg.Go(func() {
				defer stop()
				answerUDP(pc, back, from)
				mu.Lock()
				delete(sessions, from)
				mu.Unlock()
				back.Close()
			})
		}
		back.SetReadDeadline(time.Now().Add(udpIdle))
		back.Write(buf[:n])
	}
}

// answerUDP sends what comes from the container to the client until the session is idle.
func answerUDP(pc, back *net.UDPConn, client netip.AddrPort) {
	buf := make([]byte, maxUDPDatagram)
	for {
		n, err := back.Read(buf)
		if err != nil {
			return
		}
		if _, err := pc.WriteToUDPAddrPort(buf[:n], client); err != nil {
			return
		}
		back.SetReadDeadline(time.Now().Add(udpIdle))
	}
}

// waitReadable blocks until a datagram is there or the socket is closed.
func waitReadable(c *net.UDPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool { return readable(int(fd)) })
}

func readable(fd int) bool {
	n, _, err := unix.Recvfrom(fd, nil, unix.MSG_PEEK|unix.MSG_DONTWAIT|unix.MSG_TRUNC)
	return n > 0 || err == nil || err != unix.EAGAIN
}
