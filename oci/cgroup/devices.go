//go:build linux

package cgroup

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	maxMajor = 1<<12 - 1 // of a device that exists, see MAJOR in the kernel's kdev_t.h
	maxMinor = 1<<20 - 1

	anyNumber = -1

	// maxRules bounds hostile input; a GPU node has some dozens. The time that the kernel
	// takes to verify a program grows with the square of its length, and it refuses what
	// takes too long.
	maxRules = 512
)

// access is a set of what can be done with a device, in the kernel's bits
// (BPF_DEVCG_ACC_*).
type access uint8

const (
	accMknod access = 1 << iota
	accRead
	accWrite
	accAll = accMknod | accRead | accWrite
)

func (a access) String() string {
	var b []byte
	for _, f := range []struct {
		bit    access
		letter byte
	}{{accRead, 'r'}, {accWrite, 'w'}, {accMknod, 'm'}} {
		if a&f.bit != 0 {
			b = append(b, f.letter)
		}
	}
	return string(b)
}

// deviceSet names devices of one type. Numbers may be anyNumber.
type deviceSet struct {
	kind         byte // 'b' or 'c'
	major, minor int64
}

func (d deviceSet) String() string {
	n := func(n int64) string {
		if n == anyNumber {
			return "*"
		}
		return strconv.FormatInt(n, 10)
	}
	return string(d.kind) + " " + n(d.major) + ":" + n(d.minor)
}

// covers tells whether every device of e is one of d.
func (d deviceSet) covers(e deviceSet) bool {
	return d.kind == e.kind && (d.major == anyNumber || d.major == e.major) && (d.minor == anyNumber || d.minor == e.minor)
}

// meets tells whether some device is in both.
func (d deviceSet) meets(e deviceSet) bool {
	same := func(a, b int64) bool { return a == anyNumber || b == anyNumber || a == b }
	return d.kind == e.kind && same(d.major, e.major) && same(d.minor, e.minor)
}

type deviceRule struct {
	deviceSet
	access access
	allow  bool
}

// deviceRules is the specification's list in its own order: for each kind of access
// the last rule that names the device decides. Where none does, allow decides.
type deviceRules struct {
	allow bool
	rules []deviceRule
}

// parseDevices checks the specification's rules and drops those that later ones make
// void. A list that begins without a rule for everything begins with "deny".
func parseDevices(rules []specs.LinuxDeviceCgroup) (*deviceRules, error) {
	if len(rules) > maxRules {
		return nil, invalid("devices: %d rules are more than %d", len(rules), maxRules)
	}
	var d deviceRules
	for i, r := range rules {
		var acc access
		for _, letter := range r.Access {
			switch letter {
			case 'r':
				acc |= accRead
			case 'w':
				acc |= accWrite
			case 'm':
				acc |= accMknod
			default:
				return nil, invalid("devices: access %q of rule %d", short(r.Access), i)
			}
		}
		if acc == 0 {
			return nil, invalid("devices: rule %d names no access", i)
		}
		major, err := ruleNumber(r.Major)
		if err != nil {
			return nil, fmt.Errorf("devices: major number of rule %d: %w", i, err)
		}
		minor, err := ruleNumber(r.Minor)
		if err != nil {
			return nil, fmt.Errorf("devices: minor number of rule %d: %w", i, err)
		}
		kinds := "bc"
		switch r.Type {
		case "", "a":
		case "b", "c":
			kinds = r.Type
		case "u":
			kinds = "c"
		default:
			return nil, invalid("devices: type %q of rule %d", short(r.Type), i)
		}
		if len(kinds) == 2 && major == anyNumber && minor == anyNumber && acc == accAll {
			d = deviceRules{allow: r.Allow}
			continue
		}
		for _, kind := range []byte(kinds) {
			d.rules = append(d.rules, deviceRule{deviceSet{kind, major, minor}, acc, r.Allow})
		}
	}
	return &d, nil
}

func ruleNumber(n *int64) (int64, error) {
	switch {
	case n == nil || *n == anyNumber:
		return anyNumber, nil
	case *n < 0 || *n > 1<<32-1:
		return 0, invalid("%d", *n)
	}
	return *n, nil
}

// DefaultDevices are the rules that give every container the devices which the OCI
// specification promises it (null, zero, full, random, urandom, tty, ptmx, pts), and
// mknod(2) of any device, without which an image could not be unpacked inside a
// container. They go after the specification's own rules, also when these are updated.
//
// Not among them is 5:1, the machine's own console: a container's /dev/console is one
// of the pts.
func DefaultDevices() []specs.LinuxDeviceCgroup {
	rule := func(kind string, major, minor int64, acc string) specs.LinuxDeviceCgroup {
		return specs.LinuxDeviceCgroup{Allow: true, Type: kind, Major: &major, Minor: &minor, Access: acc}
	}
	return []specs.LinuxDeviceCgroup{
		rule("c", anyNumber, anyNumber, "m"),
		rule("b", anyNumber, anyNumber, "m"),
		rule("c", 1, 3, "rwm"),           // null
		rule("c", 1, 5, "rwm"),           // zero
		rule("c", 1, 7, "rwm"),           // full
		rule("c", 1, 8, "rwm"),           // random
		rule("c", 1, 9, "rwm"),           // urandom
		rule("c", 5, 0, "rwm"),           // tty
		rule("c", 5, 2, "rwm"),           // ptmx
		rule("c", 136, anyNumber, "rwm"), // pts
	}
}

func (c *Cgroup) applyDevices(d *deviceRules) error {
	if dir, ok := c.v1["devices"]; ok {
		return applyDevicesV1(dir, d, c.fresh)
	}
	return applyDevicesV2(c.v2, d)
}

// whitelist is what a v1 devices cgroup can hold: a default, and exceptions from it.
// order has the sets in the order of the rules, which the kernel's list is to show.
type whitelist struct {
	allow      bool
	exceptions map[deviceSet]access
	order      []deviceSet
}

// whitelist brings the rules into the form of v1. Some lists have none: an exception
// from an exception ("allow c 1:*, deny c 1:3"). The kernel would take such a rule and
// ignore it, which would leave a device open that was to be closed, so it is refused.
func (d *deviceRules) whitelist() (*whitelist, error) {
	w := &whitelist{allow: d.allow, exceptions: map[deviceSet]access{}}
	for _, r := range d.rules {
		if r.allow != w.allow {
			if !slices.Contains(w.order, r.deviceSet) {
				w.order = append(w.order, r.deviceSet)
			}
			w.exceptions[r.deviceSet] |= r.access
			continue
		}
		for e, acc := range w.exceptions {
			switch {
			case acc&r.access == 0 || !r.meets(e):
			case r.covers(e):
				if acc &^= r.access; acc == 0 {
					delete(w.exceptions, e)
				} else {
					w.exceptions[e] = acc
				}
			default:
				verb := map[bool]string{true: "allow", false: "deny"}
				return nil, fmt.Errorf("devices: cgroup v1 cannot %s %s %s after %s %s %s: %w",
					verb[r.allow], r.deviceSet, r.access, verb[!r.allow], e, acc, errdefs.ErrInvalidArgument)
			}
		}
	}
	if err := w.join(); err != nil {
		return nil, err
	}
	return w, nil
}

// join makes up for the kernel wanting one exception to grant all that an open asks for
// at once: where two do so together ("c *:* r" and "c 1:3 w"), the narrower one gets what
// the other grants, and where none is the narrower ("c 1:* r" and "c *:3 w"), one is
// added for what they have in common. mknod(2) is asked for alone, so that it stays as
// it is.
func (w *whitelist) join() error {
	if w.allow {
		return nil
	}
	const open = accRead | accWrite
	for e, acc := range maps.Clone(w.exceptions) {
		for f, more := range w.exceptions {
			if e.kind == f.kind && e.major != anyNumber && e.minor == anyNumber && f.major == anyNumber && f.minor != anyNumber && (acc|more)&open == open && acc&open != more&open {
				w.exceptions[deviceSet{e.kind, e.major, f.minor}] |= (acc | more) & open
			}
		}
	}
	if len(w.exceptions) > 8*maxRules {
		return invalid("devices: the rules overlap in too many ways")
	}
	for e, acc := range w.exceptions {
		for _, wider := range []deviceSet{{e.kind, e.major, anyNumber}, {e.kind, anyNumber, e.minor}, {e.kind, anyNumber, anyNumber}} {
			if acc&open != 0 {
				w.exceptions[e] |= w.exceptions[wider] & open
			}
		}
	}
	return nil
}

// parseWhitelist reads devices.list. Where everything is allowed the kernel does not
// show the exceptions.
func parseWhitelist(list []byte) (*whitelist, error) {
	w := &whitelist{exceptions: map[deviceSet]access{}}
	for line := range strings.Lines(string(list)) {
		var e deviceSet
		f := strings.Fields(line)
		if len(f) != 3 || len(f[0]) != 1 {
			return nil, fmt.Errorf("devices.list: line %q: %w", short(line), errdefs.ErrDataLoss)
		}
		if f[0] == "a" {
			w.allow = true
			continue
		}
		major, minor, ok := strings.Cut(f[1], ":")
		var err error
		if e.kind = f[0][0]; !ok || e.kind != 'b' && e.kind != 'c' {
			return nil, fmt.Errorf("devices.list: line %q: %w", short(line), errdefs.ErrDataLoss)
		}
		if e.major, err = listNumber(major); err == nil {
			e.minor, err = listNumber(minor)
		}
		if err != nil {
			return nil, fmt.Errorf("devices.list: line %q: %w", short(line), errdefs.ErrDataLoss)
		}
		var acc access
		for _, letter := range f[2] {
			acc |= map[rune]access{'r': accRead, 'w': accWrite, 'm': accMknod}[letter]
		}
		w.exceptions[e] |= acc
	}
	return w, nil
}

func listNumber(s string) (int64, error) {
	if s == "*" {
		return anyNumber, nil
	}
	n, err := strconv.ParseUint(s, 10, 32)
	return int64(n), err
}

// deviceWrite is one line for devices.allow or devices.deny.
type deviceWrite struct {
	file, line string
}

// change gives the writes that lead from one list to another, as few as possible. It
// does not lock the container out in between if that can be helped: a switch of the
// default resets the list, and is refused by the kernel where there are cgroups below.
func (from *whitelist) change(to *whitelist) []deviceWrite {
	const allow, deny = "devices.allow", "devices.deny"
	var out []deviceWrite
	now := from.exceptions
	if from.allow != to.allow {
		file := deny
		if to.allow {
			file = allow
		}
		out = append(out, deviceWrite{file, "a"})
		now = nil
	}
	except, restore := allow, deny // with a default of "deny" an exception is allowed
	if to.allow {
		except, restore = deny, allow
	}
	order := func(a, b deviceSet) int {
		return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.major, b.major), cmp.Compare(a.minor, b.minor))
	}
	// Those that join has added come last.
	listed := append([]deviceSet{}, to.order...)
	for _, e := range slices.SortedFunc(maps.Keys(to.exceptions), order) {
		if !slices.Contains(to.order, e) {
			listed = append(listed, e)
		}
	}
	for _, e := range listed {
		if missing := to.exceptions[e] &^ now[e]; missing != 0 {
			out = append(out, deviceWrite{except, e.String() + " " + missing.String()})
		}
	}
	for _, e := range slices.SortedFunc(maps.Keys(now), order) {
		if extra := now[e] &^ to.exceptions[e]; extra != 0 {
			out = append(out, deviceWrite{restore, e.String() + " " + extra.String()})
		}
	}
	return out
}

// applyDevicesV1 writes a list. What a fresh cgroup has does not matter where everything is
// denied first, nor does it have to be restored.
func applyDevicesV1(dir string, d *deviceRules, fresh bool) error {
	to, err := d.whitelist()
	if err != nil {
		return err
	}
	if fresh && !to.allow {
		return writeDevices(dir, (&whitelist{allow: true}).change(to))
	}
	list, err := readFile(dir + "/devices.list")
	if err != nil {
		return err
	}
	from, err := parseWhitelist(list)
	if err != nil {
		return err
	}
	if err := writeDevices(dir, from.change(to)); err != nil {
		if list, rerr := readFile(dir + "/devices.list"); rerr == nil {
			if now, rerr := parseWhitelist(list); rerr == nil {
				_ = writeDevices(dir, now.change(from))
			}
		}
		return err
	}
	return nil
}

func writeDevices(dir string, writes []deviceWrite) error {
	// Most lines go into one of the two files, so that it is kept open.
	fd, path := -1, ""
	defer func() {
		if fd >= 0 {
			unix.Close(fd)
		}
	}()
	for _, w := range writes {
		if p := dir + "/" + w.file; p != path {
			if fd >= 0 {
				unix.Close(fd)
			}
			path = p
			var err error
			if fd, err = open(path, unix.O_WRONLY); err != nil {
				return err
			}
		}
		err := writeFD(fd, path, w.line)
		switch {
		case errors.Is(err, unix.EPERM):
			return classed(fmt.Errorf("%w (the cgroup above does not have this device)", err), errdefs.ErrPermissionDenied)
		case errors.Is(err, unix.EINVAL):
			return classed(fmt.Errorf("%w (the default cannot change while there are cgroups below)", err), errdefs.ErrFailedPrecondition)
		case err != nil:
			return err
		}
	}
	return nil
}
