//go:build linux

package plan

import (
	"fmt"
	"strconv"
	"strings"
)

// since tells in which Linux a system call came, for those that are younger than 5.0
// (man-pages, section 2).
var since = table[version]{
	// close_range itself is of 5.9, its flag CLOEXEC of 5.11.
	{"open_tree", version{5, 2}}, {"move_mount", version{5, 2}}, {"fsopen", version{5, 2}}, {"fsconfig", version{5, 2}}, {"fsmount", version{5, 2}}, {"fspick", version{5, 2}},
	{"openat2", version{5, 6}}, {"faccessat2", version{5, 8}}, {"close_range", version{5, 11}}, {"mount_setattr", version{5, 12}},
}

type version [2]int

func (v version) String() string        { return fmt.Sprintf("%d.%d", v[0], v[1]) }
func (v version) before(w version) bool { return v[0] < w[0] || v[0] == w[0] && v[1] < w[1] }

// parseVersion reads the first two numbers of a kernel's release.
func parseVersion(release string) (v version, ok bool) {
	parts := strings.SplitN(release, ".", 3)
	if len(parts) < 2 {
		return v, false
	}
	for i := range v {
		digits := strings.TrimRightFunc(parts[i], func(r rune) bool { return r < '0' || r > '9' })
		if j := strings.IndexFunc(digits, func(r rune) bool { return r < '0' || r > '9' }); j >= 0 {
			digits = digits[:j]
		}
		n, err := strconv.ParseUint(digits, 10, 16)
		if err != nil {
			return v, false
		}
		v[i] = int(n)
	}
	return v, true
}

// needs finds the oldest kernel for the plan, and warns of what the host's lacks.
func (e *Explanation) needs() {
	var need version
	host, known := parseVersion(e.facts.Kernel)
	warned := map[string]bool{}
	for i := range e.Parts {
		for _, s := range e.Parts[i].Steps {
			name := s.step.Name
			v, young := since.find(name)
			if !young {
				continue
			}
			if need.before(v) {
				need, e.Needs, e.NeedsFor = v, v.String(), fmt.Sprintf("%s (step %d)", name, s.Number)
			}
			if known && host.before(v) && !warned[name] {
				warned[name] = true
				e.Warnings = append(e.Warnings[:len(e.Warnings):len(e.Warnings)],
					fmt.Sprintf("Linux %s does not know %s (Linux %s), which is needed to %s", host, name, v, e.Parts[i].Do))
			}
		}
	}
}
