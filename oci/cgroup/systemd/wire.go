//go:build linux

package systemd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// maxMessage bounds what is read, in bytes. Answers of systemd to our few calls are small.
const maxMessage = 1 << 20

// Types of messages, and of the fields of a header.
const (
	typeCall, typeReturn, typeError, typeSignal = 1, 2, 3, 4

	fieldPath, fieldInterface, fieldMember, fieldError, fieldReply, fieldDestination, fieldSignature = 1, 2, 3, 4, 5, 6, 8
)

// encoder writes values as the D-Bus specification lays them out, little endian.
type encoder struct{ b []byte }

func (e *encoder) align(n int) {
	for len(e.b)%n != 0 {
		e.b = append(e.b, 0)
	}
}

func (e *encoder) uint32(v uint32) {
	e.align(4)
	e.b = binary.LittleEndian.AppendUint32(e.b, v)
}

func (e *encoder) uint64(v uint64) {
	e.align(8)
	e.b = binary.LittleEndian.AppendUint64(e.b, v)
}

func (e *encoder) string(s string) {
	e.uint32(uint32(len(s)))
	e.b = append(append(e.b, s...), 0)
}

func (e *encoder) signature(s string) { e.b = append(append(append(e.b, byte(len(s))), s...), 0) }

// array writes what items writes, with its length in front. The padding to the first
// element does not count.
func (e *encoder) array(alignment int, items func()) {
	e.uint32(0)
	at := len(e.b) - 4
	e.align(alignment)
	start := len(e.b)
	items()
	binary.LittleEndian.PutUint32(e.b[at:], uint32(len(e.b)-start))
}

// value writes a variant.
func (e *encoder) value(v any) error {
	switch v := v.(type) {
	case string:
		e.signature("s")
		e.string(v)
	case bool:
		e.signature("b")
		n := uint32(0)
		if v {
			n = 1
		}
		e.uint32(n)
	case uint32:
		e.signature("u")
		e.uint32(v)
	case int32:
		e.signature("i")
		e.uint32(uint32(v))
	case uint64:
		e.signature("t")
		e.uint64(v)
	case []string:
		e.signature("as")
		e.array(4, func() {
			for _, s := range v {
				e.string(s)
			}
		})
	case []uint32:
		e.signature("au")
		e.array(4, func() {
			for _, n := range v {
				e.uint32(n)
			}
		})
	case []byte:
		e.signature("ay")
		e.array(1, func() { e.b = append(e.b, v...) })
	case [][2]string:
		e.signature("a(ss)")
		e.array(8, func() {
			for _, p := range v {
				e.align(8)
				e.string(p[0])
				e.string(p[1])
			}
		})
	default:
		return fmt.Errorf("no D-Bus type for %T", v)
	}
	return nil
}

// message is one D-Bus message.
type message struct {
	typ                  byte
	serial, reply        uint32
	path, iface, member  string
	failure, destination string // failure is the name of an error
	signature            string
	body                 []byte
}

func (m *message) encode() []byte {
	e := &encoder{b: []byte{'l', m.typ, 0, 1}}
	e.uint32(uint32(len(m.body)))
	e.uint32(m.serial)
	e.array(8, func() {
		field := func(code byte, sig, v string) {
			if v == "" {
				return
			}
			e.align(8)
			e.b = append(e.b, code)
			e.signature(sig)
			if sig == "g" {
				e.signature(v)
			} else {
				e.string(v)
			}
		}
		field(fieldPath, "o", m.path)
		field(fieldInterface, "s", m.iface)
		field(fieldMember, "s", m.member)
		field(fieldError, "s", m.failure)
		if m.reply != 0 {
			e.align(8)
			e.b = append(e.b, fieldReply)
			e.signature("u")
			e.uint32(m.reply)
		}
		field(fieldDestination, "s", m.destination)
		field(fieldSignature, "g", m.signature)
	})
	e.align(8)
	return append(e.b, m.body...)
}

var errMalformed = errors.New("a malformed D-Bus message")

// decoder reads values. After a failure all of them are zero.
type decoder struct {
	b     []byte
	i     int
	order binary.ByteOrder
	bad   bool
}

func (d *decoder) take(n int) []byte {
	if d.bad || n < 0 || n > len(d.b)-d.i {
		d.bad = true
		return nil
	}
	out := d.b[d.i : d.i+n]
	d.i += n
	return out
}

func (d *decoder) align(n int) {
	if r := d.i % n; r != 0 {
		d.take(n - r)
	}
}

func (d *decoder) byte() byte {
	if b := d.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (d *decoder) uint32() uint32 {
	d.align(4)
	if b := d.take(4); b != nil {
		return d.order.Uint32(b)
	}
	return 0
}

func (d *decoder) string() string {
	n := d.uint32()
	if n > maxMessage {
		d.bad = true
		return ""
	}
	s := string(d.take(int(n)))
	d.take(1)
	return s
}

func (d *decoder) signature() string {
	s := string(d.take(int(d.byte())))
	d.take(1)
	return s
}

// headerSize is the length of the part of a message that tells how long the rest is.
const headerSize = 16

// sizes gives the lengths of a message's header, with padding, and of its body.
func sizes(b []byte) (header, body int, err error) {
	d := &decoder{b: b, order: binary.LittleEndian}
	if len(b) < headerSize || b[3] != 1 {
		return 0, 0, errMalformed
	}
	switch b[0] {
	case 'l':
	case 'B':
		d.order = binary.BigEndian
	default:
		return 0, 0, errMalformed
	}
	d.i = 4
	bodyLen := d.uint32()
	d.uint32()
	fields := d.uint32()
	if bodyLen > maxMessage || fields > maxMessage {
		return 0, 0, errMalformed
	}
	return (headerSize + int(fields) + 7) &^ 7, int(bodyLen), nil
}

// decode reads a whole message.
func decode(b []byte) (*message, error) {
	header, body, err := sizes(b)
	if err != nil || header+body != len(b) {
		return nil, errMalformed
	}
	d := &decoder{b: b[:header], order: binary.LittleEndian}
	if b[0] == 'B' {
		d.order = binary.BigEndian
	}
	m := &message{typ: b[1], body: b[header:]}
	d.i = 8
	m.serial = d.uint32()
	end := headerSize + int(d.uint32())
	for d.i < end && !d.bad {
		d.align(8)
		code, sig := d.byte(), d.signature()
		switch {
		case sig == "u":
			v := d.uint32()
			if code == fieldReply {
				m.reply = v
			}
		case sig == "g":
			v := d.signature()
			if code == fieldSignature {
				m.signature = v
			}
		case sig == "s" || sig == "o":
			v := d.string()
			switch code {
			case fieldPath:
				m.path = v
			case fieldInterface:
				m.iface = v
			case fieldMember:
				m.member = v
			case fieldError:
				m.failure = v
			case fieldDestination:
				m.destination = v
			}
		default:
			return nil, errMalformed
		}
	}
	if d.bad {
		return nil, errMalformed
	}
	return m, nil
}

// strings reads the values of a body that has only numbers and strings ("uoss").
func (m *message) strings(signature string, order binary.ByteOrder) ([]string, error) {
	if !strings.HasPrefix(m.signature, signature) {
		return nil, fmt.Errorf("%w: %s has signature %q, want %q", errMalformed, m.member, m.signature, signature)
	}
	d := &decoder{b: m.body, order: order}
	var out []string
	for _, c := range signature {
		switch c {
		case 'u':
			out = append(out, fmt.Sprint(d.uint32()))
		case 'v':
			if sig := d.signature(); sig != "s" {
				return nil, errMalformed
			}
			out = append(out, d.string())
		default:
			out = append(out, d.string())
		}
	}
	if d.bad {
		return nil, errMalformed
	}
	return out, nil
}
