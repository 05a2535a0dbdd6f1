//go:build linux

package plan

import (
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Origin is what asked for a step: a place of the configuration, a promise of the
// specification that no field mentions, or, if everything is empty, nobody but the
// runtime, which protects itself or the container.
type Origin struct {
	Field   string // JSON path, as "linux.maskedPaths"
	Index   int    // the element of that array, -1: all of it
	Key     string // the member of that object
	Promise string // of the specification
}

// OriginRef is a step's origin, as a number within its plan.
type OriginRef uint16

// String gives the JSON path ("mounts[3]", `linux.sysctl["net.core.somaxconn"]`), or "" if
// the configuration did not ask.
func (o Origin) String() string {
	switch {
	case o.Field == "":
		return ""
	case o.Key != "":
		return member(o.Field, o.Key)
	case o.Index >= 0:
		return o.Field + "[" + strconv.Itoa(o.Index) + "]"
	}
	return o.Field
}

// Origin tells what asked for a step of this plan.
func (p *Plan) Origin(s *Step) Origin {
	if int(s.From) >= len(p.origins) {
		return Origin{Index: -1}
	}
	return p.origins[s.From]
}

// origin makes o that of the steps that follow, of both builders, and gives the one
// before.
func (c *compiler) origin(o Origin) OriginRef {
	p := c.p
	before := p.at
	if len(p.origins) == 0 {
		p.origins = append(make([]Origin, 0, 128), Origin{Index: -1})
	}
	switch {
	case o == p.origins[p.at]:
	case o == p.origins[0]:
		p.at = 0
	case len(p.origins) < 1<<16:
		p.origins = append(p.origins, o)
		p.at = OriginRef(len(p.origins) - 1)
	default:
		p.at = 0 // a configuration of so many lists is not one that anybody reads
	}
	return before
}

// at says that a field of the configuration, or one element of it, asks for the steps
// that follow.
func (c *compiler) at(field string, index ...int) OriginRef {
	o := Origin{Field: field, Index: -1}
	if len(index) > 0 {
		o.Index = index[0]
	}
	return c.origin(o)
}

func (c *compiler) atKey(field, key string) OriginRef {
	return c.origin(Origin{Field: field, Index: -1, Key: key})
}

func (c *compiler) atNamespace(typ string) OriginRef {
	return c.at("linux.namespaces", slices.IndexFunc(c.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return string(n.Type) == typ }))
}

// atMount finds the entry that made m, by its slot.
func (c *compiler) atMount(m *mount) OriginRef {
	if m.slot >= 0 {
		if n, ok := strings.CutPrefix(c.p.Slots[m.slot], "mount"); ok {
			if i, err := strconv.Atoi(n); err == nil {
				return c.at("mounts", i)
			}
		}
	}
	return c.at("mounts")
}

// promised says that the specification promises the steps that follow to every container.
func (c *compiler) promised(what string) OriginRef {
	return c.origin(Origin{Index: -1, Promise: what})
}

// own says that the steps that follow are the runtime's own.
func (c *compiler) own() OriginRef { return c.origin(Origin{Index: -1}) }

// back returns to the origin before a call of one of the others.
func (c *compiler) back(to OriginRef) { c.p.at = to }
