package wire

import "encoding/binary"

// Types of containerd's cgroup statistics in an Any.
const (
	MetricsV1URL = "io.containerd.cgroups.v1.Metrics"
	MetricsV2URL = "io.containerd.cgroups.v2.Metrics"
)

// Record is a message that is only ever encoded, field by field. Zero values are
// left out, as protobuf does.
type Record struct{ c coder }

// Uint adds a number.
func (r *Record) Uint(field int, v uint64) {
	r.c.encode = true
	r.c.uint64(field, &v)
}

// String adds a string.
func (r *Record) String(field int, v string) {
	r.c.encode = true
	r.c.string(field, &v)
}

// Message adds a message, if it has any field.
func (r *Record) Message(field int, m *Record) {
	if len(m.c.out) > 0 {
		r.c.message(field, m)
	}
}

// Always adds a message, even an empty one: there are readers that do not expect it to be missing.
func (r *Record) Always(field int, m *Record) {
	m.c.encode = true // without a field it is of no kind yet
	r.c.encode = true
	r.c.message(field, m)
}

// Packed adds a list of numbers.
func (r *Record) Packed(field int, list []uint64) {
	if len(list) == 0 {
		return
	}
	var inner coder
	for _, v := range list {
		inner.out = binary.AppendUvarint(inner.out, v)
	}
	r.c.encode = true
	r.c.data(field, &inner.out)
}

func (r *Record) fields(c *coder) {
	if c.encode {
		c.out = append(c.out, r.c.out...)
	}
}
