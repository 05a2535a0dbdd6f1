//go:build linux && (amd64 || arm64)

package early

import "golang.org/x/sys/unix"

// state is what is read of state.json.
type state struct {
	pid, startTime uint64
	usual          bool
	cgroups        [32]struct{ controller, dir string }
}

// room is what a state of usual size fits into.
var room [16 << 10]byte

// read reads and understands the state of a usual container.
func (c *command) read() bool {
	fd := openAt(c.dir, StateFile, unix.O_RDONLY|unix.O_CLOEXEC)
	if fd < 0 {
		return false
	}
	n := readAll(fd, room[:])
	closeFD(fd)
	return n > 0 && n < len(room) && c.state.parse(room[:n]) && c.state.usual && c.state.pid > 0 && c.state.startTime > 0
}

// parse reads a flat object of JSON without escapes, which is what the state of a usual
// container is.
func (s *state) parse(b []byte) bool {
	r := reader{b: b}
	version := uint64(0)
	for r.next('{') {
		key := r.text()
		r.want(':')
		switch key {
		case "version":
			version = r.number()
		case "pid":
			s.pid = r.number()
		case "startTime":
			s.startTime = r.number()
		case "usual":
			s.usual = r.word("true")
		case "cgroups":
			i := 0
			for inner := (reader{b: r.b, bad: r.bad}); ; i++ {
				more := inner.next('{')
				if !more || i == len(s.cgroups) {
					r.b, r.bad = inner.b, inner.bad || more
					break
				}
				s.cgroups[i].controller = inner.text()
				inner.want(':')
				if s.cgroups[i].dir = inner.text(); s.cgroups[i].dir == "" {
					inner.bad = true
				}
			}
		case "id", "ociVersion", "bundle", "rootfs", "created":
			r.text()
		case "owner":
			r.number()
		case "annotations":
			inner := reader{b: r.b, bad: r.bad}
			for inner.next('{') {
				inner.text()
				inner.want(':')
				inner.text()
			}
			r.b, r.bad = inner.b, inner.bad
		default:
			return false
		}
	}
	return !r.bad && len(r.b) == 0 && version == 1
}

// reader takes JSON from the front of b. What it does not understand makes it bad.
type reader struct {
	b      []byte
	inside bool
	bad    bool
}

// next tells whether an object that begins with open has one more member.
func (r *reader) next(open byte) bool {
	switch {
	case r.bad:
		return false
	case !r.inside:
		r.want(open)
		r.inside = true
		if len(r.b) > 0 && r.b[0] == '}' {
			r.b = r.b[1:]
			return false
		}
		return !r.bad
	case len(r.b) > 0 && r.b[0] == ',':
		r.b = r.b[1:]
		return true
	}
	r.want('}')
	return false
}

func (r *reader) want(c byte) {
	if len(r.b) == 0 || r.b[0] != c {
		r.bad, r.b = true, nil
		return
	}
	r.b = r.b[1:]
}

func (r *reader) word(w string) bool {
	for i := 0; i < len(w); i++ {
		r.want(w[i])
	}
	return !r.bad
}

// text gives a string, which lies in b.
func (r *reader) text() string {
	r.want('"')
	for i := 0; i < len(r.b); i++ {
		switch c := r.b[i]; {
		case c == '"':
			s := text(r.b[:i])
			r.b = r.b[i+1:]
			return s
		case c == '\\' || c < ' ':
			r.bad, r.b = true, nil
			return ""
		}
	}
	r.bad, r.b = true, nil
	return ""
}

func (r *reader) number() uint64 {
	n, digits := number(r.b)
	if digits == 0 {
		r.bad, r.b = true, nil
		return 0
	}
	r.b = r.b[digits:]
	return n
}

// number gives the number that b begins with, and its length; 0 if there is none that fits.
func number(b []byte) (n uint64, digits int) {
	for digits < len(b) && b[digits] >= '0' && b[digits] <= '9' {
		if digits == 18 {
			return 0, 0
		}
		n = 10*n + uint64(b[digits]-'0')
		digits++
	}
	return n, digits
}

// alive tells whether the very process of the state lives: see oci.alive.
func (c *command) alive() bool {
	var digits [20]byte
	i := len(digits)
	for n := c.state.pid; n > 0 && i > 0; n /= 10 {
		i--
		digits[i] = byte('0' + n%10)
	}
	var p path
	if !p.set("/proc/", text(digits[i:]), "/stat") {
		return false
	}
	var buf [2048]byte
	b := buf[:max(p.read(buf[:]), 0)]
	// The command in parentheses may contain anything. Behind it is field 3, the state of the
	// process; 22 is its start.
	for i := len(b) - 1; i >= 0; i-- {
		if b[i] == ')' {
			b = b[i+1:]
			break
		}
	}
	field := 2
	for i := 0; i < len(b); i++ {
		if b[i] != ' ' {
			continue
		}
		b = b[i+1:]
		i = -1
		switch field++; {
		case field == 3 && len(b) > 0 && (b[0] == 'Z' || b[0] == 'X'):
			return false
		case field == 22:
			start, digits := number(b)
			return digits > 0 && start == c.state.startTime
		}
	}
	return false
}

// thawed: the container is not paused, for certain.
func (c *command) thawed() bool {
	for i := range c.state.cgroups {
		g := &c.state.cgroups[i]
		switch {
		case g.dir == "":
			return true
		case g.controller == "freezer" && !says(g.dir, "/freezer.state", "THAWED\n"):
			return false
		case g.controller == "" && !says(g.dir, "/cgroup.freeze", "0\n"):
			return false
		}
	}
	return true
}

// says tells whether a file has this content.
func says(dir, file, content string) bool {
	var p path
	var buf [64]byte
	if !p.set(dir, file) {
		return false
	}
	n := p.read(buf[:])
	return n > 0 && text(buf[:n]) == content
}
