//go:build linux

package cgroup

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// rules parses "deny a *:* rwm" lines, for tests.
func rules(t testing.TB, text string) []specs.LinuxDeviceCgroup {
	t.Helper()
	var out []specs.LinuxDeviceCgroup
	for line := range strings.Lines(text) {
		f := strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r == ':' || r == '\n' })
		if len(f) == 0 {
			continue
		}
		num := func(s string) *int64 {
			if s == "*" {
				return nil
			}
			var n int64
			if _, err := fmt.Sscan(s, &n); err != nil {
				t.Fatal(err)
			}
			return &n
		}
		out = append(out, specs.LinuxDeviceCgroup{Allow: f[0] == "allow", Type: f[1], Major: num(f[2]), Minor: num(f[3]), Access: f[4]})
	}
	return out
}

// allowed evaluates the specification's rules as they are written: the reference.
func allowed(list []specs.LinuxDeviceCgroup, kind byte, major, minor int64, acc access) bool {
	for _, bit := range []access{accRead, accWrite, accMknod} {
		if acc&bit == 0 {
			continue
		}
		ok := false
		for _, r := range list {
			if r.Type != "a" && r.Type != "" && r.Type[0] != kind ||
				r.Major != nil && *r.Major != -1 && *r.Major != major || r.Minor != nil && *r.Minor != -1 && *r.Minor != minor ||
				!strings.Contains(r.Access, bit.String()) {
				continue
			}
			ok = r.Allow
		}
		if !ok {
			return false
		}
	}
	return true
}

// runBPF interprets a device program as the kernel would.
func runBPF(t testing.TB, prog []insn, kind byte, major, minor int64, acc access) bool {
	t.Helper()
	code := map[byte]uint32{'b': 1, 'c': 2}[kind]
	ctx := map[int16]uint32{0: uint32(acc)<<16 | code, 4: uint32(major), 8: uint32(minor)}
	var r [11]uint64
	for pc, steps := 0, 0; ; pc, steps = pc+1, steps+1 {
		if pc >= len(prog) || steps > 1<<20 {
			t.Fatal("the program does not end")
		}
		i := prog[pc]
		dst, src := i.reg&15, i.reg>>4
		switch i.op {
		case opLoad32:
			v, ok := ctx[i.off]
			if !ok || src != regContext {
				t.Fatalf("load at %d", i.off)
			}
			r[dst] = uint64(v)
		case opMovImm:
			r[dst] = uint64(i.imm)
		case opMovReg:
			r[dst] = r[src]
		case opAnd32Imm:
			r[dst] = uint64(uint32(r[dst]) & uint32(i.imm))
		case opShr32Imm:
			r[dst] = uint64(uint32(r[dst]) >> uint32(i.imm))
		case opJne32Imm:
			if uint32(r[dst]) != uint32(i.imm) {
				pc += int(i.off)
			}
		case opJeq32Imm:
			if uint32(r[dst]) == uint32(i.imm) {
				pc += int(i.off)
			}
		case opExit:
			return r[regResult] == 1
		default:
			t.Fatalf("opcode %#x", i.op)
		}
	}
}

// allows evaluates a v1 list as the kernel does (devcgroup_check_permission).
func (w *whitelist) allows(kind byte, major, minor int64, acc access) bool {
	dev := deviceSet{kind, major, minor}
	for e, have := range w.exceptions {
		switch {
		case !e.covers(dev):
		case w.allow && have&acc != 0:
			return false
		case !w.allow && acc&^have == 0:
			return true
		}
	}
	return w.allow
}

// kernelV1 keeps a list as the kernel does when it gets lines written.
type kernelV1 struct{ whitelist }

func (k *kernelV1) write(t testing.TB, w deviceWrite) {
	t.Helper()
	allow := w.file == "devices.allow"
	if w.line == "a" {
		k.allow, k.exceptions = allow, map[deviceSet]access{}
		return
	}
	l, err := parseWhitelist([]byte(w.line + "\n"))
	if err != nil || len(l.exceptions) != 1 {
		t.Fatalf("line %q: %v", w.line, err)
	}
	for e, acc := range l.exceptions {
		if allow != k.allow {
			k.exceptions[e] |= acc
		} else if k.exceptions[e] &^= acc; k.exceptions[e] == 0 {
			delete(k.exceptions, e)
		}
	}
}

// checkDevices compares all three with the reference.
func checkDevices(t testing.TB, list []specs.LinuxDeviceCgroup) {
	t.Helper()
	d, err := parseDevices(list)
	if err != nil {
		if !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Fatal(err)
		}
		return
	}
	prog := d.deviceProgram()
	w, werr := d.whitelist()
	if werr != nil && !errors.Is(werr, errdefs.ErrInvalidArgument) {
		t.Fatal(werr)
	}
	majors, minors := map[int64]bool{0: true, 1: true, 4095: true}, map[int64]bool{0: true, 3: true, 1<<20 - 1: true}
	for _, r := range list {
		if r.Major != nil && *r.Major >= 0 {
			majors[*r.Major] = true
		}
		if r.Minor != nil && *r.Minor >= 0 {
			minors[*r.Minor] = true
		}
	}
	starts := []*whitelist{{allow: true}, {exceptions: map[deviceSet]access{{'c', 1, 3}: accRead, {'b', 9, anyNumber}: accAll}}}
	for _, from := range starts {
		if werr != nil {
			break
		}
		k := &kernelV1{whitelist{allow: from.allow, exceptions: maps.Clone(from.exceptions)}}
		if k.exceptions == nil {
			k.exceptions = map[deviceSet]access{}
		}
		for _, write := range from.change(w) {
			k.write(t, write)
		}
		if k.allow != w.allow || !maps.Equal(k.exceptions, w.exceptions) {
			t.Fatalf("%v: the writes %v lead to %v, want %v", list, from.change(w), k.whitelist, w)
		}
	}
	for _, kind := range []byte("bc") {
		for major := range majors {
			for minor := range minors {
				for acc := access(1); acc <= accAll; acc++ {
					want := allowed(list, kind, major, minor, acc)
					if got := runBPF(t, prog, kind, major, minor, acc); got != want {
						t.Fatalf("the eBPF program says %v for %c %d:%d %s, the rules %+v", got, kind, major, minor, acc, d)
					}
					// The kernel asks for mknod alone.
					if werr == nil && (acc == accMknod || acc&accMknod == 0) && w.allows(kind, major, minor, acc) != want {
						t.Fatalf("the v1 list %+v says %v for %c %d:%d %s, the rules %+v", w, !want, kind, major, minor, acc, d)
					}
				}
			}
		}
	}
}

const dockerRules = `deny a *:* rwm
allow c 1:5 rwm
allow c 1:3 rwm
allow c 1:9 rwm
allow c 1:8 rwm
allow c 5:0 rwm
allow c 5:1 rwm
deny c 10:229 rwm
`

func TestDevices(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		rules, refused string // refused: what v1 says
		writes         []string
	}{
		{"allow a *:* rwm\n", "", nil},
		{"deny a *:* rwm\n", "", []string{"devices.deny a"}},
		{dockerRules, "", []string{
			"devices.deny a", "devices.allow c 1:5 rwm", "devices.allow c 1:3 rwm", "devices.allow c 1:9 rwm", "devices.allow c 1:8 rwm",
			"devices.allow c 5:0 rwm", "devices.allow c 5:1 rwm",
		}},
		{"deny a *:* rwm\nallow c *:* m\nallow c 1:3 rw\n", "", []string{"devices.deny a", "devices.allow c *:* m", "devices.allow c 1:3 rw"}},
		{"deny a *:* rwm\nallow c *:* r\nallow c 1:3 w\n", "", []string{"devices.deny a", "devices.allow c *:* r", "devices.allow c 1:3 rw"}},
		{"allow c 1:3 rwm\n", "", []string{"devices.deny a", "devices.allow c 1:3 rwm"}},
		{"deny c 1:3 rwm\nallow a *:* rwm\ndeny b 8:* w\n", "", []string{"devices.deny b 8:* w"}},
		{"deny a *:* rwm\nallow c 1:* rwm\ndeny c 1:3 r\n", "cgroup v1 cannot deny c 1:3 r after allow c 1:* rwm", nil},
		{"allow a *:* rwm\ndeny c 1:* rwm\nallow c 1:3 r\n", "cgroup v1 cannot allow c 1:3 r after deny c 1:* rwm", nil},
		{"deny a *:* rwm\nallow c 1:3 rwm\ndeny c *:* w\n", "", []string{"devices.deny a", "devices.allow c 1:3 rm"}},
		{"deny a *:* rwm\nallow a 7:1 r\n", "", []string{"devices.deny a", "devices.allow b 7:1 r", "devices.allow c 7:1 r"}},
		{"deny a *:* rwm\nallow u 7:1 r\n", "", []string{"devices.deny a", "devices.allow c 7:1 r"}},
	} {
		list := rules(t, c.rules)
		if !strings.Contains(c.rules, " u ") {
			checkDevices(t, list)
		}
		d, err := parseDevices(list)
		if err != nil {
			t.Fatal(err)
		}
		w, err := d.whitelist()
		if c.refused != "" {
			if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), c.refused) {
				t.Errorf("%s: %v", c.rules, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		var writes []string
		for _, w := range (&whitelist{allow: true}).change(w) {
			writes = append(writes, w.file+" "+w.line)
		}
		if !slices.Equal(writes, c.writes) {
			t.Errorf("%s: writes are %q", c.rules, writes)
		}
		if same := w.change(w); len(same) != 0 {
			t.Errorf("%s: writes that change nothing: %v", c.rules, same)
		}
	}
	checkDevices(t, append(rules(t, dockerRules), DefaultDevices()...))
	for text, bad := range map[string]specs.LinuxDeviceCgroup{
		"access":       {Allow: true, Type: "c", Access: "rx"},
		"no access":    {Allow: true, Type: "c"},
		"type":         {Type: "z", Access: "r"},
		"major number": {Type: "c", Major: ptr(int64(1 << 32)), Access: "r"},
		"minor number": {Type: "c", Minor: ptr(int64(-2)), Access: "r"},
	} {
		if _, err := parseDevices([]specs.LinuxDeviceCgroup{bad}); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), text) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	if _, err := parseDevices(make([]specs.LinuxDeviceCgroup, maxRules+1)); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("too many rules: %v", err)
	}
}

func FuzzDevices(f *testing.F) {
	f.Add([]byte{0, 0, 0, 7, 1, 2, 3, 7, 0, 2, 0, 1})
	f.Add([]byte{1, 0, 0, 7, 0, 0x11, 3, 6, 1, 0x12, 3, 2})
	f.Fuzz(func(t *testing.T, b []byte) {
		var list []specs.LinuxDeviceCgroup
		for ; len(b) >= 4 && len(list) < 24; b = b[4:] {
			r := specs.LinuxDeviceCgroup{Allow: b[0]&1 == 1, Type: []string{"a", "b", "c", ""}[b[0]>>1&3], Access: access(b[3] & 7).String()}
			if b[1]&0x30 != 0 {
				r.Major = ptr(int64(b[1] & 3))
			}
			if b[2]&0x30 != 0 {
				r.Minor = ptr(int64(b[2] & 3))
			}
			list = append(list, r)
		}
		checkDevices(t, list)
	})
}
