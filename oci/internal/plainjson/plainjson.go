//go:build linux

// Package plainjson reads JSON without reflection. encoding/json spends some tenths of a
// millisecond on learning a type before it reads the first byte, which a program that lives
// for a few milliseconds feels.
//
// In flow the bytes of a text; out flow values, or that the text is not plain: an exotic
// escape, a repeated key, null, a fraction, more than 40 keys. That is no error: such a text
// is for encoding/json. Of one that is plain the two never disagree.
package plainjson

import (
	"slices"
	"strconv"
	"unicode/utf8"
)

// New makes a decoder.
func New(b []byte) *Decoder { return &Decoder{b: b} }

// Plain tells, after the last value, whether the text was plain, and nothing came behind.
func (d *Decoder) Plain() bool {
	d.space()
	return !d.bad && d.i == len(d.b)
}

// Decoder reads one text.
type Decoder struct {
	b     []byte
	i     int
	depth int
	bad   bool
}

const maxNesting = 64

// Fail says that the text is not plain.
func (d *Decoder) Fail() { d.bad = true; d.i = len(d.b) }

func (d *Decoder) space() {
	for d.i < len(d.b) && (d.b[d.i] == ' ' || d.b[d.i] == '\n' || d.b[d.i] == '\t' || d.b[d.i] == '\r') {
		d.i++
	}
}

// next skips white space and takes c if it is there.
func (d *Decoder) next(c byte) bool {
	d.space()
	if d.i < len(d.b) && d.b[d.i] == c {
		d.i++
		return true
	}
	return false
}

// Object calls field for each key; field reads the value.
func (d *Decoder) Object(field func(key string)) {
	if d.depth++; d.depth > maxNesting || !d.next('{') {
		d.Fail()
		return
	}
	defer func() { d.depth-- }()
	if d.next('}') {
		return
	}
	var seen [40]string
	keys := seen[:0]
	for !d.bad {
		k := d.Str()
		if slices.Contains(keys, k) || len(keys) == cap(keys) || !d.next(':') {
			d.Fail()
			return
		}
		keys = append(keys, k)
		field(k)
		if d.next('}') {
			return
		}
		if !d.next(',') {
			d.Fail()
		}
	}
}

// List calls item for each element. The result of encoding/json is never nil for [].
func List[T any](d *Decoder, item func(*T)) []T {
	out := []T{}
	if d.depth++; d.depth > maxNesting || !d.next('[') {
		d.Fail()
		return out
	}
	defer func() { d.depth-- }()
	if d.next(']') {
		return out
	}
	for !d.bad {
		var v T
		item(&v)
		out = append(out, v)
		if d.next(']') {
			return out
		}
		if !d.next(',') {
			d.Fail()
		}
	}
	return out
}

// Str reads a string.
func (d *Decoder) Str() string {
	if !d.next('"') {
		d.Fail()
		return ""
	}
	start, plain := d.i, true
	for d.i < len(d.b) {
		switch c := d.b[d.i]; {
		case c == '"':
			raw := d.b[start:d.i]
			d.i++
			if plain {
				return string(raw)
			}
			return d.unescape(raw)
		case c < ' ':
			d.Fail()
			return ""
		case c == '\\':
			plain = false
			d.i += 2
		case c >= utf8.RuneSelf:
			plain = false
			d.i++
		default:
			d.i++
		}
	}
	d.Fail()
	return ""
}

func (d *Decoder) unescape(raw []byte) string {
	if !utf8.Valid(raw) {
		d.Fail()
		return ""
	}
	out := make([]byte, 0, len(raw))
	for i := 0; i < len(raw); i++ {
		if raw[i] != '\\' {
			out = append(out, raw[i])
			continue
		}
		i++
		switch raw[i] {
		case '"', '\\', '/':
			out = append(out, raw[i])
		case 'n':
			out = append(out, '\n')
		case 't':
			out = append(out, '\t')
		case 'r':
			out = append(out, '\r')
		case 'u': // as encoding/json writes <, > and &
			if i+5 > len(raw) {
				d.Fail()
				return ""
			}
			n, err := strconv.ParseUint(string(raw[i+1:i+5]), 16, 16)
			if err != nil || n >= 0xd800 && n < 0xe000 {
				d.Fail()
				return ""
			}
			out = utf8.AppendRune(out, rune(n))
			i += 4
		default:
			d.Fail()
			return ""
		}
	}
	return string(out)
}

// Strs reads a list of strings.
func (d *Decoder) Strs() []string { return List(d, func(s *string) { *s = d.Str() }) }

// Bool reads true or false.
func (d *Decoder) Bool() bool {
	d.space()
	rest := d.b[d.i:]
	switch {
	case len(rest) >= 4 && string(rest[:4]) == "true":
		d.i += 4
		return true
	case len(rest) >= 5 && string(rest[:5]) == "false":
		d.i += 5
		return false
	}
	d.Fail()
	return false
}

// number reads an integer. Fractions and exponents are unusual.
func (d *Decoder) number() (text string) {
	d.space()
	start := d.i
	if d.i < len(d.b) && d.b[d.i] == '-' {
		d.i++
	}
	digits := d.i
	for d.i < len(d.b) && d.b[d.i] >= '0' && d.b[d.i] <= '9' {
		d.i++
	}
	if d.i == digits || d.b[digits] == '0' && d.i > digits+1 {
		d.Fail()
		return "0"
	}
	return string(d.b[start:d.i])
}

// Int reads an integer of so many bits.
func (d *Decoder) Int(bits int) int64 {
	n, err := strconv.ParseInt(d.number(), 10, bits)
	if err != nil {
		d.Fail()
	}
	return n
}

// Uint reads one that is not negative.
func (d *Decoder) Uint(bits int) uint64 {
	n, err := strconv.ParseUint(d.number(), 10, bits)
	if err != nil {
		d.Fail()
	}
	return n
}

// StrMap reads an object of strings.
func (d *Decoder) StrMap() map[string]string {
	m := map[string]string{}
	// Maps may be larger than object allows: annotations are left to encoding/json then.
	d.Object(func(k string) { m[k] = d.Str() })
	return m
}
