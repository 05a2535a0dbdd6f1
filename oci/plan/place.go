//go:build linux

package plan

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"
)

// member is the path of an object's member: "linux.sysctl" and "net.core.somaxconn" give
// `linux.sysctl["net.core.somaxconn"]`.
func member(path, key string) string {
	plain := key != "" && strings.IndexFunc(key, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_')
	}) < 0
	switch {
	case !plain:
		return path + "[" + strconv.Quote(key) + "]"
	case path == "":
		return key
	}
	return path + "." + key
}

func element(path string, i int) string { return path + "[" + strconv.Itoa(i) + "]" }

// Lines finds the line of every value of a JSON text by its path ("mounts[3].source"). A
// member lies where its name is. Of a text that is not JSON it gives what comes before
// the mistake.
func Lines(raw []byte) map[string]int {
	l := liner{raw: raw, dec: json.NewDecoder(bytes.NewReader(raw)), line: 1, lines: map[string]int{}}
	l.dec.UseNumber()
	l.value("", 0)
	return l.lines
}

type liner struct {
	raw   []byte
	dec   *json.Decoder
	at    int64 // up to where lines have been counted
	line  int
	lines map[string]int
}

// token reads one token, and counts lines up to its end.
func (l *liner) token() (json.Token, bool) {
	t, err := l.dec.Token()
	if err != nil {
		return nil, false
	}
	end := l.dec.InputOffset()
	l.line += bytes.Count(l.raw[l.at:end], []byte("\n"))
	l.at = end
	return t, true
}

const maxDepth = 100

// value reads a value. A path of "" is the whole text.
func (l *liner) value(path string, depth int) bool {
	t, ok := l.token()
	if !ok || depth > maxDepth {
		return false
	}
	if _, known := l.lines[path]; !known {
		l.lines[path] = l.line
	}
	switch t {
	case json.Delim('{'):
		for l.dec.More() {
			key, ok := l.token()
			name, isString := key.(string)
			if !ok || !isString {
				return false
			}
			p := member(path, name)
			l.lines[p] = l.line
			if !l.value(p, depth+1) {
				return false
			}
		}
	case json.Delim('['):
		for i := 0; l.dec.More(); i++ {
			if !l.value(element(path, i), depth+1) {
				return false
			}
		}
	default:
		return true
	}
	_, ok = l.token()
	return ok
}
