//go:build linux

package netdev

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/classed"
)

var native = binary.NativeEndian

// request is a message to the kernel.
type request struct{ b []byte }

func newRequest(typ, flags uint16) *request {
	r := &request{b: make([]byte, unix.NLMSG_HDRLEN, 128)}
	native.PutUint16(r.b[4:], typ)
	native.PutUint16(r.b[6:], flags|unix.NLM_F_REQUEST)
	return r
}

// link adds a struct ifinfomsg.
func (r *request) link(index int32, flags, change uint32) {
	b := make([]byte, unix.SizeofIfInfomsg)
	native.PutUint32(b[4:], uint32(index))
	native.PutUint32(b[8:], flags)
	native.PutUint32(b[12:], change)
	r.b = append(r.b, b...)
}

// attribute adds a struct rtattr with its value.
func (r *request) attribute(typ uint16, value []byte) {
	r.b = native.AppendUint16(r.b, uint16(unix.SizeofRtAttr+len(value)))
	r.b = native.AppendUint16(r.b, typ)
	r.b = append(r.b, value...)
	for len(r.b)%4 != 0 {
		r.b = append(r.b, 0)
	}
}

func (r *request) string(typ uint16, s string) { r.attribute(typ, append([]byte(s), 0)) }
func (r *request) uint32(typ uint16, v uint32) { r.attribute(typ, native.AppendUint32(nil, v)) }
func (r *request) finish(seq uint32) []byte {
	native.PutUint32(r.b, uint32(len(r.b)))
	native.PutUint32(r.b[8:], seq)
	return r.b
}

// attributes splits a list of attributes.
func attributes(b []byte) map[uint16][]byte {
	out := map[uint16][]byte{}
	for len(b) >= unix.SizeofRtAttr {
		n := int(native.Uint16(b))
		if n < unix.SizeofRtAttr || n > len(b) {
			break
		}
		out[native.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER)] = b[unix.SizeofRtAttr:n]
		b = b[min((n+3)&^3, len(b)):]
	}
	return out
}

// conn is a connection to the kernel, in the network namespace of the thread that made
// it.
type conn struct {
	fd  int
	seq uint32
}

// patience bounds a wait for the kernel, which answers at once.
const patience = 10 * time.Second

func dial() (*conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	tv := unix.NsecToTimeval(patience.Nanoseconds())
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	return &conn{fd: fd}, nil
}

func (c *conn) close() { unix.Close(c.fd) }

// ask sends a request. Without each it waits for an acknowledgement, otherwise for the
// answers, which each gets without their headers.
func (c *conn) ask(r *request, each func(body []byte)) error {
	if each == nil {
		native.PutUint16(r.b[6:], native.Uint16(r.b[6:])|unix.NLM_F_ACK)
	}
	c.seq++
	if err := unix.Sendto(c.fd, r.finish(c.seq), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	buf := make([]byte, 64<<10)
	for {
		n, from, err := unix.Recvfrom(c.fd, buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("netlink: %w", err)
		}
		if a, ok := from.(*unix.SockaddrNetlink); !ok || a.Pid != 0 {
			continue // not the kernel
		}
		done, err := parse(buf[:n], c.seq, each)
		if done || err != nil {
			return err
		}
	}
}

// parse reads the messages of one datagram.
func parse(b []byte, seq uint32, each func([]byte)) (done bool, err error) {
	for len(b) >= unix.NLMSG_HDRLEN {
		n := int(native.Uint32(b))
		if n < unix.NLMSG_HDRLEN || n > len(b) {
			return true, errors.New("netlink: a malformed message")
		}
		body, typ, flags := b[unix.NLMSG_HDRLEN:n], native.Uint16(b[4:]), native.Uint16(b[6:])
		ours := native.Uint32(b[8:]) == seq
		b = b[min((n+3)&^3, len(b)):]
		switch {
		case !ours:
		case typ == unix.NLMSG_DONE:
			return true, nil
		case typ == unix.NLMSG_ERROR:
			if len(body) < 4 {
				return true, errors.New("netlink: a malformed message")
			}
			if code := int32(native.Uint32(body)); code != 0 {
				return true, unix.Errno(-code)
			}
			return true, nil
		case each != nil:
			each(body)
			if flags&unix.NLM_F_MULTI == 0 {
				return true, nil
			}
		}
	}
	return false, nil
}

type link struct {
	index int32
	flags uint32
	name  string
}

func parseLink(body []byte) (l link, ok bool) {
	if len(body) < unix.SizeofIfInfomsg {
		return l, false
	}
	l.index, l.flags = int32(native.Uint32(body[4:])), native.Uint32(body[8:])
	l.name = string(bytes.TrimRight(attributes(body[unix.SizeofIfInfomsg:])[unix.IFLA_IFNAME], "\x00"))
	return l, true
}

func (c *conn) link(name string) (l link, err error) {
	r := newRequest(unix.RTM_GETLINK, 0)
	r.link(0, 0, 0)
	r.string(unix.IFLA_IFNAME, name)
	found := false
	err = c.ask(r, func(body []byte) { l, found = parseLink(body) })
	if errors.Is(err, unix.ENODEV) || err == nil && !found {
		return l, classed.Errorf(errdefs.ErrNotFound, "there is no network device called %s", name)
	}
	return l, err
}

// links lists the devices in the namespace of the thread.
func links() (out []link, err error) {
	c, err := dial()
	if err != nil {
		return nil, err
	}
	defer c.close()
	r := newRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
	r.link(0, 0, 0)
	err = c.ask(r, func(body []byte) {
		if l, ok := parseLink(body); ok {
			out = append(out, l)
		}
	})
	return out, err
}

// address is an address of a device, as the kernel has told it.
type address struct {
	family, prefix byte
	flags          uint32
	attributes     map[uint16][]byte
}

// kept are the attributes that are given back with an address. IFA_FLAGS is made anew.
var kept = []uint16{unix.IFA_ADDRESS, unix.IFA_LOCAL, unix.IFA_BROADCAST, unix.IFA_ANYCAST, unix.IFA_MULTICAST, ifaRtPriority}

const ifaRtPriority = 9

// addresses gives the addresses that the specification wants kept: permanent ones of
// global scope.
func (c *conn) addresses(index int32) (out []address, err error) {
	r := newRequest(unix.RTM_GETADDR, unix.NLM_F_DUMP)
	r.b = append(r.b, make([]byte, unix.SizeofIfAddrmsg)...)
	err = c.ask(r, func(body []byte) {
		if a, ok := parseAddress(body, index); ok {
			out = append(out, a)
		}
	})
	return out, err
}

func parseAddress(body []byte, index int32) (a address, ok bool) {
	// struct ifaddrmsg: family, prefix length, flags, scope, index
	if len(body) < unix.SizeofIfAddrmsg || int32(native.Uint32(body[4:])) != index {
		return a, false
	}
	a = address{family: body[0], prefix: body[1], flags: uint32(body[2]), attributes: map[uint16][]byte{}}
	for typ, v := range attributes(body[unix.SizeofIfAddrmsg:]) {
		if typ == unix.IFA_FLAGS && len(v) == 4 {
			a.flags = native.Uint32(v)
		}
		if slices.Contains(kept, typ) {
			a.attributes[typ] = bytes.Clone(v)
		}
	}
	return a, a.flags&unix.IFA_F_PERMANENT != 0 && body[3] == unix.RT_SCOPE_UNIVERSE
}

func (a address) request(index int32) *request {
	r := newRequest(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	b := make([]byte, unix.SizeofIfAddrmsg)
	b[0], b[1], b[3] = a.family, a.prefix, unix.RT_SCOPE_UNIVERSE
	native.PutUint32(b[4:], uint32(index))
	r.b = append(r.b, b...)
	for _, typ := range kept {
		if v, ok := a.attributes[typ]; ok {
			r.attribute(typ, v)
		}
	}
	// The kernel keeps the state of these itself.
	const own = unix.IFA_F_SECONDARY | unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED | unix.IFA_F_DEPRECATED
	r.uint32(unix.IFA_FLAGS, a.flags&^own)
	return r
}
