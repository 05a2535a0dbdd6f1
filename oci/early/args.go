//go:build linux && (amd64 || arm64)

package early

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxArgs is more than a usual command line has.
const maxArgs = 16

// parse understands argc, argv and the environment at stack. It is false for all that is not
// usual, or is wrong.
func (c *command) parse(stack *uintptr) bool {
	argc := int(*stack)
	if argc < 3 || argc > maxArgs {
		return false
	}
	var args [maxArgs]string
	at := unsafe.Pointer(stack)
	word := func(i int) *byte { return *(**byte)(unsafe.Add(at, uintptr(i)*unsafe.Sizeof(uintptr(0)))) }
	for i := range argc {
		args[i] = ofC(word(1 + i))
	}
	for i := argc + 2; word(i) != nil; i++ {
		if e := ofC(word(i)); begins(e, "NOTIFY_SOCKET=") || begins(e, "LISTEN_FDS=") {
			return false
		}
	}
	return c.parseArgs(args[1:argc])
}

func (c *command) parseArgs(args []string) bool {
	c.root, c.signal = "/run/hako-oci", uintptr(unix.SIGTERM)
	for len(args) > 0 && begins(args[0], "-") {
		var name, value string
		if name, value, args = flag(args); value == "" {
			return false
		}
		switch name {
		case "root":
			c.root = value
		case "log":
			c.log = value
		case "log-format":
			if value != "json" && value != "text" {
				return false
			}
		default:
			return false
		}
	}
	if len(args) == 0 {
		return false
	}
	c.verb, args = args[0], args[1:]
	if c.verb == "delete" && len(args) > 0 && (args[0] == "--force" || args[0] == "-f") {
		c.force, args = true, args[1:]
	}
	if c.verb == "create" || c.verb == "run" {
		var ok bool
		if args, ok = c.parseCreate(args); !ok {
			return false
		}
	}
	if len(args) == 0 || !validID(args[0]) {
		return false
	}
	c.id, args = args[0], args[1:]
	switch c.verb {
	case "create", "run":
		return len(args) == 0
	case "start", "delete":
		return len(args) == 0
	case "kill":
		return len(args) == 0 || len(args) == 1 && c.parseSignal(args[0])
	}
	return false
}

// parseCreate knows the flags that engines give to create and run.
func (c *command) parseCreate(args []string) (rest []string, ok bool) {
	c.bundle = "."
	for len(args) > 0 && begins(args[0], "-") {
		switch args[0] {
		case "--detach", "-d", "--keep", "--no-new-keyring", "--no-pivot":
			args = args[1:]
			continue
		}
		var name, value string
		if name, value, args = flag(args); value == "" {
			return nil, false
		}
		switch name {
		case "bundle", "b":
			c.bundle = value
		case "pid-file", "console-socket":
		default:
			return nil, false
		}
	}
	return args, true
}

// flag takes --name=value or --name value from args. value is empty if there is none.
func flag(args []string) (name, value string, rest []string) {
	name = args[0][1:]
	if begins(name, "-") {
		name = name[1:]
	}
	for i := 0; i < len(name); i++ {
		if name[i] == '=' {
			return name[:i], name[i+1:], args[1:]
		}
	}
	if len(args) < 2 {
		return name, "", nil
	}
	return name, args[1], args[2:]
}

// validID is oci.CheckID, for shorter ones.
func validID(id string) bool {
	if id == "" || len(id) > 255 || id[0] == '-' || id == "." || id == ".." {
		return false
	}
	for i := 0; i < len(id); i++ {
		switch b := id[i]; {
		case b >= 'a' && b <= 'z', b >= 'A' && b <= 'Z', b >= '0' && b <= '9', b == '_', b == '+', b == '-', b == '.':
		default:
			return false
		}
	}
	return true
}

// parseSignal knows the signals that engines send to end a container.
func (c *command) parseSignal(s string) bool {
	if begins(s, "SIG") {
		s = s[3:]
	}
	switch s {
	case "KILL", "9":
		c.signal = uintptr(unix.SIGKILL)
	case "TERM", "15":
		c.signal = uintptr(unix.SIGTERM)
	case "0": // does it live?
		c.signal = 0
	default:
		return false
	}
	return true
}

func begins(s, with string) bool { return len(s) >= len(with) && s[:len(with)] == with }

// ofC is the string of C at p.
func ofC(p *byte) string {
	n := 0
	for *(*byte)(unsafe.Add(unsafe.Pointer(p), n)) != 0 {
		n++
	}
	return unsafe.String(p, n)
}
