//go:build linux

package plan

import (
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// LongOptions tells whether an option is longer than fsconfig(2) takes, 255 bytes.
func LongOptions(options []string) bool {
	return slices.ContainsFunc(options, func(o string) bool {
		_, v, _ := strings.Cut(o, "=")
		return len(v) > 255
	})
}

// overlayOf sorts the options of an overlay.
func overlayOf(m *mount) Overlay {
	o := Overlay{Slot: m.slot, Attr: m.set | m.recSet}
	for _, opt := range m.data {
		switch k, v, _ := strings.Cut(opt, "="); k {
		case "lowerdir":
			start := 0
			for i := 0; i < len(v); i++ {
				switch v[i] {
				case '\\':
					i++
				case ':':
					o.Lower = append(o.Lower, v[start:i])
					start = i + 1
				}
			}
			o.Lower = append(o.Lower, v[start:])
		case "upperdir":
			o.Upper = v
		case "workdir":
			o.Work = v
		default:
			o.Options = append(o.Options, opt)
		}
	}
	return o
}

// Copy is what is to be known of a mount by who makes it without a plan.
type Copy struct {
	Bind, Recursive bool
	Source          string
	Set, Clear      uint64 // MOUNT_ATTR_ bits
	Overlay         Overlay
	// Propagation are MS_ flags to set one after the other, with MS_REC or without.
	Propagation []uint64
}

// ParseCopy sorts the options of a bind mount, or of a mount of the root file system.
// Maps of ids are refused.
func ParseCopy(s specs.Mount, rootfsPropagation string) (Copy, error) {
	root, err := propagation(rootfsPropagation)
	if err != nil {
		return Copy{}, err
	}
	m, err := parseMount(s)
	if err != nil {
		return Copy{}, err
	}
	if m.idmap {
		return Copy{}, fmt.Errorf("mount %s: mapped ids", m.source)
	}
	c := Copy{Bind: m.bind, Recursive: m.rec, Source: m.source, Set: m.set | m.recSet, Clear: m.clr | m.recClr, Overlay: overlayOf(m)}
	if m.bind && root&unix.MS_SHARED == 0 {
		first := uint64(unix.MS_SLAVE)
		if root&(unix.MS_PRIVATE|unix.MS_UNBINDABLE) != 0 {
			first = unix.MS_PRIVATE
		}
		c.Propagation = append(c.Propagation, first|unix.MS_REC)
	}
	if p := m.propagation; p != 0 && p != unix.MS_UNBINDABLE {
		if m.propagationRec {
			p |= unix.MS_REC
		}
		c.Propagation = append(c.Propagation, p)
	}
	return c, nil
}

// splitLong breaks overlay's lowerdir into one option a layer: the kernel takes at
// most 255 bytes in one.
func (c *compiler) splitLong(m *mount) []string {
	var out []string
	for _, o := range m.data {
		dirs, ok := strings.CutPrefix(o, "lowerdir=")
		if m.typ != "overlay" || !ok || len(dirs) <= 255 || strings.Contains(dirs, "::") {
			out = append(out, o)
			continue
		}
		for dir := range splitEscaped(dirs) {
			out = append(out, "lowerdir+="+dir)
		}
	}
	return out
}
