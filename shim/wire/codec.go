// Package wire is everything that crosses a shim's sockets: the messages of
// containerd's shim v2 protocol, the ttrpc frames that carry them, the classes of
// errors, hako's log URIs and its attach protocol (docs/shim.md).
//
// In flow bytes of a peer and Go values; out flow the same the other way round.
// The messages are encoded by hand (protobuf wire format) and not with the
// generated types: those link grpc, net/http and a registry of descriptors, which
// would be most of the memory of a shim. Tests compare each message with the
// generated one.
package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// Message is a protobuf message. Its one method visits the fields, both for
// encoding and for decoding, so that the two cannot differ.
type Message interface{ fields(*coder) }

// protobuf wire types.
const (
	typeVarint = 0
	typeI64    = 1
	typeBytes  = 2
	typeI32    = 5
)

var errTruncated = errors.New("truncated protobuf message")

// coder is a pass over a message's fields: with encode set every field is appended
// to out, otherwise the one field num is set from the value at hand.
type coder struct {
	encode bool
	out    []byte

	num   int
	typ   int
	value uint64
	bytes []byte
	err   error
}

// Marshal encodes a message.
func Marshal(m Message) []byte { return AppendMarshal(nil, m) }

// AppendMarshal encodes a message behind b.
func AppendMarshal(b []byte, m Message) []byte {
	c := coder{encode: true, out: b}
	m.fields(&c)
	return c.out
}

// Unmarshal decodes data into m. Unknown fields are ignored; strings and byte
// slices are copies.
func Unmarshal(data []byte, m Message) error {
	var c coder
	for len(data) > 0 {
		tag, n := binary.Uvarint(data)
		if n <= 0 || tag>>3 == 0 || tag>>3 > 1<<29-1 {
			return errTruncated
		}
		data = data[n:]
		c.num, c.typ = int(tag>>3), int(tag&7)
		switch c.typ {
		case typeVarint:
			c.value, n = binary.Uvarint(data)
			if n <= 0 {
				return errTruncated
			}
		case typeI64:
			if n = 8; len(data) < n {
				return errTruncated
			}
			c.value = binary.LittleEndian.Uint64(data)
		case typeI32:
			if n = 4; len(data) < n {
				return errTruncated
			}
			c.value = uint64(binary.LittleEndian.Uint32(data))
		case typeBytes:
			size, k := binary.Uvarint(data)
			if k <= 0 || size > uint64(len(data)-k) {
				return errTruncated
			}
			n = k + int(size)
			c.bytes = data[k:n]
		default:
			return fmt.Errorf("protobuf field %d has wire type %d", c.num, c.typ)
		}
		data = data[n:]
		if m.fields(&c); c.err != nil {
			return fmt.Errorf("field %d: %w", c.num, c.err)
		}
	}
	return nil
}

// is reports whether the field being decoded is n, of the given wire type.
func (c *coder) is(n, typ int) bool {
	if c.num != n {
		return false
	}
	if c.typ != typ {
		c.err = fmt.Errorf("wire type %d, not %d", c.typ, typ)
		return false
	}
	return true
}

func (c *coder) tag(n, typ int) { c.out = binary.AppendUvarint(c.out, uint64(n)<<3|uint64(typ)) }

func (c *coder) uint64(n int, v *uint64) {
	switch {
	case c.encode:
		if *v != 0 {
			c.tag(n, typeVarint)
			c.out = binary.AppendUvarint(c.out, *v)
		}
	case c.is(n, typeVarint):
		*v = c.value
	}
}

func (c *coder) uint32(n int, v *uint32) {
	x := uint64(*v)
	c.uint64(n, &x)
	*v = uint32(x)
}

func (c *coder) int64(n int, v *int64) {
	x := uint64(*v)
	c.uint64(n, &x)
	*v = int64(x)
}

// int32 is sign-extended on the wire, as protobuf's int32 and enums are.
func (c *coder) int32(n int, v *int32) {
	x := uint64(int64(*v))
	c.uint64(n, &x)
	*v = int32(x)
}

func (c *coder) bool(n int, v *bool) {
	var x uint64
	if *v {
		x = 1
	}
	c.uint64(n, &x)
	*v = x != 0
}

func (c *coder) string(n int, v *string) {
	switch {
	case c.encode:
		if *v != "" {
			c.tag(n, typeBytes)
			c.out = binary.AppendUvarint(c.out, uint64(len(*v)))
			c.out = append(c.out, *v...)
		}
	case c.is(n, typeBytes):
		*v = string(c.bytes)
	}
}

func (c *coder) strings(n int, v *[]string) {
	switch {
	case c.encode:
		for _, s := range *v {
			c.tag(n, typeBytes)
			c.out = binary.AppendUvarint(c.out, uint64(len(s)))
			c.out = append(c.out, s...)
		}
	case c.is(n, typeBytes):
		*v = append(*v, string(c.bytes))
	}
}

func (c *coder) data(n int, v *[]byte) {
	switch {
	case c.encode:
		if len(*v) != 0 {
			c.tag(n, typeBytes)
			c.out = binary.AppendUvarint(c.out, uint64(len(*v)))
			c.out = append(c.out, *v...)
		}
	case c.is(n, typeBytes):
		*v = append([]byte(nil), c.bytes...)
	}
}

// stringMap is map<string, string>: repeated entries of key = 1, value = 2.
func (c *coder) stringMap(n int, v *map[string]string) {
	switch {
	case c.encode:
		for k, s := range *v {
			c.message(n, &keyValue{k, s})
		}
	case c.is(n, typeBytes):
		var kv keyValue
		if c.err = Unmarshal(c.bytes, &kv); c.err == nil {
			if *v == nil {
				*v = map[string]string{}
			}
			(*v)[kv.Key] = kv.Value
		}
	}
}

// message encodes a nested message.
func (c *coder) message(n int, m Message) {
	inner := Marshal(m)
	c.tag(n, typeBytes)
	c.out = binary.AppendUvarint(c.out, uint64(len(inner)))
	c.out = append(c.out, inner...)
}

// pointer constrains P to be a pointer to T that is a message.
type pointer[T any] interface {
	*T
	Message
}

func optional[T any, P pointer[T]](c *coder, n int, v **T) {
	switch {
	case c.encode:
		if *v != nil {
			c.message(n, P(*v))
		}
	case c.is(n, typeBytes):
		if *v == nil {
			*v = new(T)
		}
		c.err = Unmarshal(c.bytes, P(*v))
	}
}

func repeated[T any, P pointer[T]](c *coder, n int, v *[]T) {
	switch {
	case c.encode:
		for i := range *v {
			c.message(n, P(&(*v)[i]))
		}
	case c.is(n, typeBytes):
		var m T
		if c.err = Unmarshal(c.bytes, P(&m)); c.err == nil {
			*v = append(*v, m)
		}
	}
}

type timestamp struct {
	Seconds int64
	Nanos   int32
}

func (m *timestamp) fields(c *coder) {
	c.int64(1, &m.Seconds)
	c.int32(2, &m.Nanos)
}

// time is google.protobuf.Timestamp; the zero time is an absent field.
func (c *coder) time(n int, v *time.Time) {
	switch {
	case c.encode:
		if !v.IsZero() {
			c.message(n, &timestamp{v.Unix(), int32(v.Nanosecond())})
		}
	case c.is(n, typeBytes):
		var t timestamp
		if c.err = Unmarshal(c.bytes, &t); c.err == nil {
			*v = time.Unix(t.Seconds, int64(t.Nanos)).UTC()
		}
	}
}
