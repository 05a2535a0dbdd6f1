package log

import "bytes"

// criTime is RFC3339 with all nine digits: 30 characters in UTC.
const criTime = "2006-01-02T15:04:05.000000000Z07:00"

// appendCRI appends a CRI record: TIME STREAM P|F LINE. The newline is not content;
// a carriage return before it is dropped, as containerd does.
func appendCRI(dst []byte, t []byte, stream string, line []byte, whole bool) []byte {
	dst = append(dst, t...)
	dst = append(dst, ' ')
	dst = append(dst, stream...)
	if whole {
		dst = append(dst, " F "...)
		if n := len(line); n > 0 && line[n-1] == '\r' {
			line = line[:n-1]
		}
	} else {
		dst = append(dst, " P "...)
	}
	dst = append(dst, line...)
	return append(dst, '\n')
}

// parseCRI decodes a record (without its newline). The line is appended to buf[:0].
func parseCRI(rec, buf []byte) (e Entry, err error) {
	t, rest, ok := bytes.Cut(rec, []byte{' '})
	if !ok {
		return e, errRecord
	}
	if e.Time, err = parseTime(t); err != nil {
		return Entry{}, errRecord
	}
	stream, rest, ok := bytes.Cut(rest, []byte{' '})
	if !ok {
		return Entry{}, errRecord
	}
	switch string(stream) {
	case Stdout:
		e.Stream = Stdout
	case Stderr:
		e.Stream = Stderr
	default:
		return Entry{}, errRecord
	}
	tags, line, ok := bytes.Cut(rest, []byte{' '})
	if !ok {
		return Entry{}, errRecord
	}
	e.Line = append(buf[:0], line...)
	// Further tags may follow after a colon.
	switch first, _, _ := bytes.Cut(tags, []byte{':'}); string(first) {
	case "F":
		e.Line = append(e.Line, '\n')
	case "P":
	default:
		return Entry{}, errRecord
	}
	return e, nil
}
