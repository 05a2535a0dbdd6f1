package log

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"
	"unicode/utf8"
)

const hexDigits = "0123456789abcdef"

// appendJSON appends a json-file record:
//
//	{"log":"text\n","stream":"stdout","attrs":{..},"time":"2006-01-02T15:04:05.999999999Z"}
//
// attrs is the encoded object, or nil.
func appendJSON(dst []byte, t []byte, stream string, attrs, line []byte, whole bool) []byte {
	dst = append(dst, `{"log":"`...)
	dst = appendEscaped(dst, line)
	if whole {
		dst = append(dst, `\n`...)
	}
	dst = append(dst, `","stream":"`...)
	dst = append(dst, stream...)
	if attrs != nil {
		dst = append(dst, `","attrs":`...)
		dst = append(dst, attrs...)
		dst = append(dst, `,"time":"`...)
	} else {
		dst = append(dst, `","time":"`...)
	}
	dst = append(dst, t...)
	return append(dst, "\"}\n"...)
}

// plain marks the bytes that a JSON string holds as they are. Docker escapes <, >
// and & as encoding/json does.
var plain = func() (t [256]bool) {
	for b := ' '; b < utf8.RuneSelf; b++ {
		t[b] = b != '"' && b != '\\' && b != '<' && b != '>' && b != '&'
	}
	return t
}()

// appendEscaped appends the inside of a JSON string as Docker writes it.
func appendEscaped(dst, s []byte) []byte {
	start := 0
	for i := 0; i < len(s); {
		b := s[i]
		if plain[b] {
			i++
			continue
		}
		if b < utf8.RuneSelf {
			dst = append(dst, s[start:i]...)
			switch b {
			case '"', '\\':
				dst = append(dst, '\\', b)
			case '\n':
				dst = append(dst, '\\', 'n')
			case '\r':
				dst = append(dst, '\\', 'r')
			default:
				dst = append(dst, '\\', 'u', '0', '0', hexDigits[b>>4], hexDigits[b&15])
			}
			i++
			start = i
			continue
		}
		r, size := utf8.DecodeRune(s[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			dst = append(dst, s[start:i]...)
			dst = append(dst, `\ufffd`...)
			start = i + 1
		case r == '\u2028' || r == '\u2029':
			dst = append(dst, s[start:i]...)
			dst = append(dst, '\\', 'u', '2', '0', '2', hexDigits[r&15])
			start = i + size
		}
		i += size
	}
	return append(dst, s[start:]...)
}

// encodeAttrs is the attrs object with its keys in order, or nil if there are none.
func encodeAttrs(attrs map[string]string) []byte {
	if len(attrs) == 0 {
		return nil
	}
	keys := make([]string, 0, len(attrs))
	for k := range attrs {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	b := []byte{'{'}
	for i, k := range keys {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(append(b, '"'), appendEscaped(nil, []byte(k))...)
		b = append(append(b, `":"`...), appendEscaped(nil, []byte(attrs[k]))...)
		b = append(b, '"')
	}
	return append(b, '}')
}

// cutRune gives how much of s, a full piece, to put into a record: all of it, or
// less by the beginning of a character whose end has not come yet. In JSON both
// halves would become U+FFFD.
func cutRune(s []byte) int {
	for back := 1; back < utf8.UTFMax && back <= len(s); back++ {
		b := s[len(s)-back]
		if utf8.RuneStart(b) {
			if b >= utf8.RuneSelf && !utf8.FullRune(s[len(s)-back:]) {
				return len(s) - back
			}
			break
		}
	}
	return len(s)
}

var errRecord = errors.New("malformed log record")

// parseJSON decodes a record (without its newline). The line is appended to buf[:0].
// The common shape, that which appendJSON writes, is decoded by hand.
func parseJSON(rec, buf []byte) (e Entry, err error) {
	if e, ok := parseJSONFast(rec, buf); ok {
		return e, nil
	}
	var r struct {
		Log    *string           `json:"log"`
		Stream string            `json:"stream"`
		Attrs  map[string]string `json:"attrs"`
		Time   time.Time         `json:"time"`
	}
	if err := json.Unmarshal(rec, &r); err != nil {
		return e, fmt.Errorf("%w: %w", errRecord, err)
	}
	if r.Log == nil {
		return e, errRecord
	}
	return Entry{Time: r.Time, Stream: r.Stream, Line: append(buf[:0], *r.Log...), Attrs: r.Attrs}, nil
}

func parseJSONFast(rec, buf []byte) (e Entry, ok bool) {
	rec, ok = bytes.CutPrefix(rec, []byte(`{"log":"`))
	if !ok {
		return e, false
	}
	line := buf[:0]
	for {
		i := bytes.IndexAny(rec, "\"\\")
		if i < 0 {
			return e, false
		}
		line = append(line, rec[:i]...)
		if rec[i] == '"' {
			rec = rec[i:]
			break
		}
		if i+1 >= len(rec) {
			return e, false
		}
		switch c := rec[i+1]; c {
		case '"', '\\', '/':
			line = append(line, c)
		case 'n':
			line = append(line, '\n')
		case 'r':
			line = append(line, '\r')
		case 't':
			line = append(line, '\t')
		case 'u':
			if i+6 > len(rec) {
				return e, false
			}
			var r rune
			for _, h := range rec[i+2 : i+6] {
				d := bytes.IndexByte([]byte(hexDigits), h|0x20)
				if d < 0 || h < '0' {
					return e, false
				}
				r = r<<4 | rune(d)
			}
			if r >= 0xd800 && r < 0xe000 {
				return e, false // surrogates: the slow way knows
			}
			line = utf8.AppendRune(line, r)
			i += 4
		default:
			return e, false
		}
		rec = rec[i+2:]
	}
	if !utf8.Valid(line) {
		return e, false
	}
	rec, ok = bytes.CutPrefix(rec, []byte(`","stream":"std`))
	if !ok || len(rec) < 3 {
		return e, false
	}
	switch string(rec[:3]) {
	case "out":
		e.Stream = Stdout
	case "err":
		e.Stream = Stderr
	default:
		return e, false
	}
	rec, ok = bytes.CutPrefix(rec[3:], []byte(`","time":"`))
	if !ok {
		return e, false // attrs
	}
	rec, ok = bytes.CutSuffix(rec, []byte(`"}`))
	if !ok {
		return e, false
	}
	t, err := parseTime(rec)
	if err != nil {
		return e, false
	}
	e.Time, e.Line = t, line
	return e, true
}

// parseTime is time.Parse for RFC3339Nano, without its cost for times in UTC.
func parseTime(b []byte) (time.Time, error) {
	var t time.Time
	err := t.UnmarshalText(b)
	return t, err
}
