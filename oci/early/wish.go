//go:build linux && (amd64 || arm64)

package early

import "golang.org/x/sys/unix"

// wish is what is read of a configuration. Whether it was understood shows later, by the plan
// that is made of it.
type wish struct {
	flags  uint64 // of new namespaces
	cgroup string // cgroupsPath
}

// parse is false for a configuration that is not usual.
func (w *wish) parse(b []byte) bool {
	s := scanner{b: b}
	for s.open('{'); s.more('}'); {
		if s.key() != "linux" {
			s.skip()
			continue
		}
		for s.open('{'); s.more('}'); {
			switch s.key() {
			case "namespaces":
				for s.open('['); s.more(']'); {
					s.bad = !w.namespace(&s) || s.bad
				}
			case "cgroupsPath":
				if p := s.text(); p != "" {
					w.cgroup = p
				}
			case "netDevices", "timeOffsets", "intelRdt":
				return false
			default:
				s.skip()
			}
		}
	}
	return !s.bad
}

func (w *wish) namespace(s *scanner) bool {
	kind, path := "", ""
	for s.open('{'); s.more('}'); {
		switch s.key() {
		case "type":
			kind = s.text()
		case "path":
			path = s.text()
		default:
			s.skip()
		}
	}
	flag := uint64(0)
	switch kind {
	case "user":
		flag = unix.CLONE_NEWUSER
	case "mount":
		flag = unix.CLONE_NEWNS
	case "pid":
		flag = unix.CLONE_NEWPID
	case "ipc":
		flag = unix.CLONE_NEWIPC
	case "uts":
		flag = unix.CLONE_NEWUTS
	case "network":
		flag = unix.CLONE_NEWNET
	case "cgroup": // made once it is in its cgroup
		return path == ""
	default:
		return false
	}
	if path != "" {
		// Joined, which the plan does; but the order matters with a user namespace, and a PID
		// namespace takes one clone more.
		return kind == "network" || kind == "ipc" || kind == "uts"
	}
	w.flags |= flag
	return true
}

// scanner takes JSON from b. What it does not understand makes it bad.
type scanner struct {
	b   []byte
	i   int
	bad bool
}

// peek gives the next byte that is not a space, 0 for the end.
func (s *scanner) peek() byte {
	for ; s.i < len(s.b); s.i++ {
		switch c := s.b[s.i]; c {
		case ' ', '\t', '\n', '\r':
		default:
			return c
		}
	}
	return 0
}

func (s *scanner) open(c byte) {
	if s.peek() != c {
		s.bad = true
		return
	}
	s.i++
}

// more tells whether something comes before the end of an object or a list.
func (s *scanner) more(end byte) bool {
	c := s.peek()
	if c == ',' {
		s.i++
		c = s.peek()
	}
	if c == end {
		s.i++
		return false
	}
	s.bad = s.bad || c == 0
	return !s.bad
}

func (s *scanner) key() string {
	k := s.text()
	s.open(':')
	return k
}

// text gives a string as it is written. One with escapes is nothing usual.
func (s *scanner) text() string {
	s.open('"')
	for first := s.i; !s.bad && s.i < len(s.b); s.i++ {
		switch s.b[s.i] {
		case '"':
			s.i++
			return text(s.b[first : s.i-1])
		case '\\':
			s.bad = true
		}
	}
	s.bad = true
	return ""
}

// skip leaves a value out.
func (s *scanner) skip() {
	depth, quoted := 0, false
	for s.peek(); s.i < len(s.b) && !s.bad; s.i++ {
		c := s.b[s.i]
		switch {
		case quoted && c == '\\':
			s.i++
		case c == '"':
			quoted = !quoted
			if depth == 0 && !quoted {
				s.i++
				return
			}
		case quoted:
		case c == '{' || c == '[':
			depth++
		case depth == 0 && (c == ',' || c == '}' || c == ']'):
			return
		case c == '}' || c == ']':
			if depth--; depth == 0 {
				s.i++
				return
			}
		}
	}
	s.bad = true
}
