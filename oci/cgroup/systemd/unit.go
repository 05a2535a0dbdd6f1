//go:build linux

package systemd

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/oci/internal/classed"
)

// Unit says which unit a container is.
type Unit struct {
	Slice string // "system.slice"
	Name  string // "hako-box.scope", or a slice of the container's own
}

// Parse reads a cgroupsPath for the systemd driver, slice:prefix:name. An empty one
// stands for a scope named after the container. user: systemd is the calling user's.
func Parse(cgroupsPath, id string, user bool) (Unit, error) {
	u := Unit{Slice: "system.slice"}
	if user {
		u.Slice = "user.slice"
	}
	prefix, name := "hako", id
	if cgroupsPath != "" {
		f := strings.Split(cgroupsPath, ":")
		if len(f) != 3 {
			return u, classed.Errorf(errdefs.ErrInvalidArgument, "expected cgroupsPath to be of format \"slice:prefix:name\" for systemd cgroups, got %.200q instead", cgroupsPath)
		}
		if f[0] != "" {
			u.Slice = f[0]
		}
		prefix, name = f[1], f[2]
	}
	switch {
	case strings.HasSuffix(name, ".slice"):
		u.Name = name
	case prefix != "":
		u.Name = prefix + "-" + name + ".scope"
	default:
		u.Name = name + ".scope"
	}
	for _, n := range []string{u.Slice, u.Name} {
		if !validName(n) {
			return u, classed.Errorf(errdefs.ErrInvalidArgument, "cgroupsPath %.200q: %q cannot be the name of a unit", cgroupsPath, n)
		}
	}
	if name == "" {
		return u, classed.Errorf(errdefs.ErrInvalidArgument, "cgroupsPath %.200q: the name is missing", cgroupsPath)
	}
	if _, err := expand(u.Slice); err != nil {
		return u, err
	}
	return u, nil
}

// validName: what systemd takes as the name of a unit.
func validName(s string) bool {
	if s == "" || len(s) > 255 {
		return false
	}
	for _, c := range []byte(s) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte(":-_.\\@", c) >= 0) {
			return false
		}
	}
	return true
}

// expand gives the path of a slice: "a-b.slice" lies in "a.slice".
func expand(slice string) (string, error) {
	name, ok := strings.CutSuffix(slice, ".slice")
	if !ok || name == "" {
		return "", classed.Errorf(errdefs.ErrInvalidArgument, "%q is not the name of a slice", slice)
	}
	if name == "-" {
		return "/", nil
	}
	out, prefix := "/", ""
	for part := range strings.SplitSeq(name, "-") {
		if part == "" {
			return "", classed.Errorf(errdefs.ErrInvalidArgument, "%q is not the name of a slice", slice)
		}
		out = path.Join(out, prefix+part+".slice")
		prefix += part + "-"
	}
	return out, nil
}

// Path gives the unit's cgroup, below control, the cgroup of systemd itself.
func (u Unit) Path(control string) string {
	dir, err := expand(u.Slice)
	if err != nil {
		dir = "/"
	}
	if strings.HasSuffix(u.Name, ".slice") {
		if own, err := expand(u.Name); err == nil {
			return path.Join("/", control, own)
		}
	}
	return path.Join("/", control, dir, u.Name)
}

// scope gives the properties that make a unit fit for a container with the process pid.
func (u Unit) scope(id string, pid int, v2 bool) []Property {
	p := []Property{
		{"Description", "hako container " + id},
		{"DefaultDependencies", false},
	}
	if strings.HasSuffix(u.Name, ".slice") {
		p = append(p, Property{"Wants", []string{u.Slice}})
	} else {
		p = append(p, Property{"Slice", u.Slice}, Property{"Delegate", true}, Property{"PIDs", []uint32{uint32(pid)}})
	}
	p = append(p, Property{"MemoryAccounting", true}, Property{"CPUAccounting", true}, Property{"TasksAccounting", true})
	if v2 {
		return append(p, Property{"IOAccounting", true})
	}
	return append(p, Property{"BlockIOAccounting", true})
}

const infinity = math.MaxUint64

func limit(v int64) uint64 {
	if v < 0 {
		return infinity
	}
	return uint64(v)
}

func given[T comparable](v *T) bool {
	var zero T
	return v != nil && *v != zero
}

// Resources gives the properties that say the same as resources do in the files of the
// cgroup. Systemd has to know them: it writes its own values when it reloads. version is
// systemd's; weight turns cpu.shares into cpu.weight. What systemd has no property for is
// left to the files.
func Resources(r *specs.LinuxResources, v2 bool, version int, weight func(uint64) uint64) (p []Property) {
	add := func(name string, v any) { p = append(p, Property{name, v}) }
	if r == nil {
		return nil
	}
	if c := r.CPU; c != nil {
		if given(c.Shares) && v2 {
			add("CPUWeight", weight(*c.Shares))
		} else if given(c.Shares) {
			add("CPUShares", *c.Shares)
		}
		if v2 && version >= 252 && given(c.Idle) && *c.Idle == 1 {
			add("CPUWeight", uint64(0))
		}
		if given(c.Quota) || given(c.Period) {
			period := uint64(100000)
			if given(c.Period) {
				period = *c.Period
			}
			if given(c.Period) && version >= 242 {
				add("CPUQuotaPeriodUSec", period)
			}
			if given(c.Quota) {
				quota := uint64(infinity)
				if *c.Quota > 0 {
					// Systemd knows whole hundredths of a CPU: rounded up, so that no less
					// is granted than is asked for.
					const step = 10000
					quota = (uint64(*c.Quota)*1000000/period + step - 1) / step * step
				}
				add("CPUQuotaPerSecUSec", quota)
			}
		}
		if v2 && version >= 244 {
			if mask, ok := mask(c.Cpus); ok {
				add("AllowedCPUs", mask)
			}
			if mask, ok := mask(c.Mems); ok {
				add("AllowedMemoryNodes", mask)
			}
		}
	}
	if m := r.Memory; m != nil {
		switch {
		case given(m.Limit) && v2:
			add("MemoryMax", limit(*m.Limit))
		case given(m.Limit):
			add("MemoryLimit", limit(*m.Limit))
		}
		if v2 && given(m.Reservation) {
			add("MemoryLow", limit(*m.Reservation))
		}
		if v2 && given(m.Swap) {
			switch {
			case *m.Swap < 0:
				add("MemorySwapMax", uint64(infinity))
			case given(m.Limit) && *m.Swap >= *m.Limit:
				add("MemorySwapMax", uint64(*m.Swap-*m.Limit))
			}
		}
	}
	if r.Pids != nil && r.Pids.Limit != nil {
		n := limit(*r.Pids.Limit)
		if n == 0 {
			n = 1 // as in the file
		}
		add("TasksMax", n)
	}
	if b := r.BlockIO; b != nil && given(b.Weight) {
		if v2 {
			add("IOWeight", ioWeight(uint64(*b.Weight)))
		} else {
			add("BlockIOWeight", uint64(*b.Weight))
		}
	}
	return p
}

// ioWeight turns v1's weight (10 to 1000) into v2's (1 to 10000).
func ioWeight(w uint64) uint64 {
	if w < 10 {
		return 1
	}
	return 1 + (w-10)*9999/990
}

// mask turns a list like "0-3,7" into the bytes that systemd wants, low ones first.
func mask(list string) (out []byte, ok bool) {
	if list == "" {
		return nil, false
	}
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(strings.TrimSpace(part), "-")
		a, err := strconv.ParseUint(first, 10, 13)
		b := a
		if err == nil && isRange {
			b, err = strconv.ParseUint(last, 10, 13)
		}
		if err != nil || b < a {
			return nil, false // the cgroup's own check names it
		}
		for i := a; i <= b; i++ {
			for len(out) <= int(i/8) {
				out = append(out, 0)
			}
			out[i/8] |= 1 << (i % 8)
		}
	}
	return out, true
}

// AnnotationPrefix starts the names of annotations that set properties of the unit.
const AnnotationPrefix = "org.systemd.property."

// allowed are the properties that an annotation may set, with their types. They concern
// how the unit is ordered, stopped and accounted for. Others could make systemd execute
// something, or undo the limits of the container.
var allowed = map[string]string{
	"After": "as", "Before": "as", "Wants": "as", "Requires": "as", "Requisite": "as", "BindsTo": "as", "PartOf": "as", "Conflicts": "as",
	"Description": "s", "Documentation": "as", "CollectMode": "s", "DefaultDependencies": "b", "KillMode": "s", "KillSignal": "i",
	"SendSIGHUP": "b", "SendSIGKILL": "b", "TimeoutStopUSec": "t", "RuntimeMaxUSec": "t", "OOMPolicy": "s", "ManagedOOMSwap": "s",
	"ManagedOOMMemoryPressure": "s", "ManagedOOMPreference": "s", "MemoryHigh": "t", "MemoryMin": "t", "IOWeight": "t", "StartupCPUWeight": "t", "StartupIOWeight": "t",
}

// Annotated gives the properties that annotations ask for. Seconds are taken for
// properties that end in Sec (TimeoutStopSec), which systemd calls USec.
func Annotated(annotations map[string]string) ([]Property, error) {
	var out []Property
	for _, key := range slices.Sorted(maps.Keys(annotations)) {
		name, ok := strings.CutPrefix(key, AnnotationPrefix)
		if !ok {
			continue
		}
		text := strings.TrimSpace(annotations[key])
		var v any
		var err error
		if typ, ok := allowed[name]; ok {
			v, err = parse(text, typ)
		} else if base, ok := strings.CutSuffix(name, "Sec"); ok && allowed[base+"USec"] == "t" {
			var s float64
			if s, err = strconv.ParseFloat(text[strings.LastIndexByte(text, ' ')+1:], 64); err == nil && (s < 0 || s > 1e12) {
				err = strconv.ErrRange
			}
			name, v = base+"USec", uint64(s*1e6)
		} else {
			return nil, classed.Errorf(errdefs.ErrInvalidArgument, "annotation %.100s: this property may not be set, those may: %s", key, strings.Join(slices.Sorted(maps.Keys(allowed)), ", "))
		}
		if err != nil {
			return nil, classed.Errorf(errdefs.ErrInvalidArgument, "annotation %s: %.100q: %w", key, text, err)
		}
		out = append(out, Property{name, v})
	}
	return out, nil
}

// parse reads a value in the text form of GVariant, as far as the types need it:
// 'text', true, 5, uint64 5, ['a', 'b'].
func parse(text, typ string) (any, error) {
	switch typ {
	case "s":
		return unquote(text)
	case "b":
		return strconv.ParseBool(text)
	case "i":
		n, err := strconv.ParseInt(number(text), 0, 32)
		return int32(n), err
	case "t":
		return strconv.ParseUint(number(text), 0, 64)
	}
	inner, ok := strings.CutPrefix(text, "[")
	if inner, ok2 := strings.CutSuffix(inner, "]"); ok && ok2 {
		out := []string{}
		for part := range strings.SplitSeq(inner, ",") {
			if part = strings.TrimSpace(part); part == "" {
				continue
			}
			s, err := unquote(part)
			if err != nil {
				return nil, err
			}
			out = append(out, s)
		}
		return out, nil
	}
	return nil, fmt.Errorf("a list like ['a', 'b'] is expected")
}

// number drops the name of the type.
func number(text string) string { return text[strings.LastIndexByte(text, ' ')+1:] }

func unquote(text string) (string, error) {
	if n := len(text); n >= 2 && (text[0] == '\'' || text[0] == '"') && text[n-1] == text[0] {
		text = text[1 : n-1]
		if !strings.ContainsAny(text, "'\"\\\x00") {
			return text, nil
		}
	}
	return "", fmt.Errorf("a quoted text without quotes or escapes in it is expected")
}

// Start makes the unit with the process pid in it.
func (m *Manager) Start(u Unit, id string, pid int, v2 bool, properties []Property) error {
	list := u.scope(id, pid, v2)
	// Later ones win.
	for _, p := range properties {
		list = slices.DeleteFunc(list, func(o Property) bool { return o.Name == p.Name && p.Name != "Wants" })
		list = append(list, p)
	}
	err := m.StartTransientUnit(u.Name, list)
	if errdefs.IsAlreadyExists(err) {
		// A failed unit of that name is in the way only as long as somebody remembers it.
		if m.ResetFailedUnit(u.Name) == nil {
			err = m.StartTransientUnit(u.Name, list)
		}
	}
	if errors.Is(err, os.ErrDeadlineExceeded) && inUnit(pid, u) {
		return nil // the answer was lost, the process is where it was to go
	}
	return err
}

// inUnit tells whether a process is in the unit's cgroup.
func inUnit(pid int, u Unit) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	return err == nil && strings.Contains(string(raw), "/"+u.Name+"\n")
}

// Stop ends the unit. That it is gone already is no error.
func (m *Manager) Stop(u Unit) error {
	err := m.StopUnit(u.Name)
	if errdefs.IsNotFound(err) {
		err = nil
	}
	if rerr := m.ResetFailedUnit(u.Name); err == nil && !errdefs.IsNotFound(rerr) {
		err = rerr
	}
	return err
}
