package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net/netip"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/network/internal/nstest"
)

// sctpInit is an SCTP packet with one chunk, INIT (1) or INIT ACK (2) (RFC 9260, sections 3.3.2 and 3.3.3).
func sctpInit(from, to uint16, verification uint32, chunk byte) []byte {
	p := make([]byte, 12, 36)
	binary.BigEndian.PutUint16(p[0:], from)
	binary.BigEndian.PutUint16(p[2:], to)
	binary.BigEndian.PutUint32(p[4:], verification)
	p = append(p, chunk, 0, 0, 20,
		0, 0, 0, 42, // initiate tag
		0, 0, 0xff, 0xff, // window
		0, 1, 0, 1, // streams
		0, 0, 0, 7) // TSN
	if chunk == 2 { // with a state cookie
		p[12+3] = 28
		p = append(p, 0, 7, 0, 8, 1, 2, 3, 4)
	}
	binary.LittleEndian.PutUint32(p[8:], crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli)))
	return p
}

// sctpSocket is a raw socket in the sandbox: the kernel of the machine need not have SCTP.
func (b *box) sctpSocket() int {
	b.t.Helper()
	fd := -1
	if err := b.run(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
		return err
	}); err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { unix.Close(fd) })
	return fd
}

type sctpPacket struct {
	source   netip.Addr
	from     uint16
	chunk    byte
	checksum bool // it is right
}

// receiveSCTP waits for a packet to the given port.
func receiveSCTP(fd int, port uint16, wait time.Duration) (sctpPacket, error) {
	for end := time.Now().Add(wait); ; {
		left := time.Until(end)
		if left <= 0 {
			return sctpPacket{}, fmt.Errorf("no SCTP packet to port %d", port)
		}
		tv := unix.NsecToTimeval(left.Nanoseconds())
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return sctpPacket{}, err
		}
		buf := make([]byte, 1500)
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err != nil {
			return sctpPacket{}, err
		}
		ip := buf[:n]
		body := ip[int(ip[0]&15)*4:]
		if len(body) < 32 || binary.BigEndian.Uint16(body[2:]) != port {
			continue
		}
		p := sctpPacket{from: binary.BigEndian.Uint16(body), chunk: body[12]}
		p.source, _ = netip.AddrFromSlice(ip[12:16])
		sum := binary.LittleEndian.Uint32(body[8:])
		binary.LittleEndian.PutUint32(body[8:], 0)
		p.checksum = sum == crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli))
		return p, nil
	}
}

// TestPublishedSCTP sends an association's first packets through published ports, there and back.
func TestPublishedSCTP(t *testing.T) {
	nstest.NeedRoot(t)
	m := manager(t, options(t))
	out := lan(t, m)
	b := newBox(t, m, "b")
	host := netip.MustParseAddr("198.51.100.1")
	e := b.connect("bridge", func(c *EndpointConfig) {
		c.Ports = []PortMapping{
			{Proto: "sctp", ContainerPort: 80, HostPort: 18080},
			{Proto: "tcp", ContainerPort: 80, HostPort: 18080}, // another number space
			{Proto: "sctp", ContainerPort: 81, HostPort: 18081, HostIP: host},
			{Proto: "sctp", ContainerPort: 82, HostPort: 18082, HostIP: netip.MustParseAddr("127.0.0.1")},
			{Proto: "sctp", ContainerPort: 83, HostPort: 18083, HostIP: netip.MustParseAddr("198.51.100.77")},
		}
	})
	client, server := out.sctpSocket(), b.sctpSocket()
	for i, x := range []struct {
		port, inner uint16
		reaches     bool
	}{{18080, 80, true}, {18081, 81, true}, {18082, 82, false}, {18083, 83, false}, {18089, 89, false}} {
		mine := uint16(40000 + i)
		var got sctpPacket
		err := errors.New("not sent")
		// Sent again as SCTP does: the first packets after a cable was laid may get lost.
		for end := time.Now().Add(patience); err != nil && time.Now().Before(end); {
			if err := unix.Sendto(client, sctpInit(mine, x.port, 0, 1), 0, &unix.SockaddrInet4{Addr: host.As4()}); err != nil {
				t.Fatal(err)
			}
			if got, err = receiveSCTP(server, x.inner, refused); !x.reaches {
				break
			}
		}
		if (err == nil) != x.reaches {
			t.Errorf("port %d: reaches %v, want %v (%v)", x.port, err == nil, x.reaches, err)
		}
		if err != nil {
			continue
		}
		if got.source.String() != "198.51.100.2" || got.from != mine || got.chunk != 1 || !got.checksum {
			t.Errorf("port %d: %+v", x.port, got)
		}
		if err := unix.Sendto(server, sctpInit(x.inner, mine, 42, 2), 0, &unix.SockaddrInet4{Addr: got.source.As4()}); err != nil {
			t.Fatal(err)
		}
		back, err := receiveSCTP(client, mine, patience)
		if err != nil {
			t.Fatal(err)
		}
		if back.source != host || back.from != x.port || back.chunk != 2 || !back.checksum {
			t.Errorf("port %d: answer %+v", x.port, back)
		}
	}
	c := newBox(t, m, "c")
	_, err := m.Connect(context.Background(), EndpointConfig{ID: "c", Network: "bridge", Netns: c.path, Name: "c",
		Ports: []PortMapping{{Proto: "sctp", ContainerPort: 80, HostPort: 18081}}})
	if !errdefs.IsAlreadyExists(err) {
		t.Errorf("a port that is taken: %v", err)
	}
	if got := e.Ports; len(got) != 5 {
		t.Errorf("%v", got)
	}
	b.remove("bridge")
	c.connect("bridge", func(ec *EndpointConfig) {
		ec.Ports = []PortMapping{{Proto: "sctp", ContainerPort: 80, HostPort: 18081}}
	})
	c.remove("bridge")
	out.remove()
}
