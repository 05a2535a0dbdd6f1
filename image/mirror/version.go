package mirror

import (
	"cmp"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// version is a semantic version (semver.org), as tags have them: with a leading v or
// without, and with fewer than three numbers.
type version struct {
	n     [3]uint64
	parts int
	pre   string // after the dash
}

var versionForm = regexp.MustCompile(`^v?(\d{1,18})(?:\.(\d{1,18}))?(?:\.(\d{1,18}))?(?:-([0-9A-Za-z.-]+))?(?:\+[0-9A-Za-z.-]+)?$`)

func parseVersion(s string) (version, bool) {
	m := versionForm.FindStringSubmatch(s)
	if m == nil {
		return version{}, false
	}
	v := version{pre: m[4]}
	for i, t := range m[1:4] {
		if t == "" {
			break
		}
		v.n[i], _ = strconv.ParseUint(t, 10, 64) // of at most 18 digits
		v.parts++
	}
	return v, true
}

func (v version) compare(o version) int {
	for i := range v.n {
		if c := cmp.Compare(v.n[i], o.n[i]); c != 0 {
			return c
		}
	}
	switch {
	case v.pre == o.pre:
		return 0
	case v.pre == "":
		return 1 // 1.0 is newer than 1.0-rc1
	case o.pre == "":
		return -1
	}
	a, b := strings.Split(v.pre, "."), strings.Split(o.pre, ".")
	for i := range min(len(a), len(b)) {
		if c := compareIdentifier(a[i], b[i]); c != 0 {
			return c
		}
	}
	return cmp.Compare(len(a), len(b))
}

// compareIdentifier compares as semver.org, 11.4 says: numbers by value, before words.
func compareIdentifier(a, b string) int {
	x, errA := strconv.ParseUint(a, 10, 64)
	y, errB := strconv.ParseUint(b, 10, 64)
	switch {
	case errA == nil && errB == nil:
		return cmp.Compare(x, y)
	case errA == nil:
		return -1
	case errB == nil:
		return 1
	}
	return strings.Compare(a, b)
}

// constraint is alternatives (||) of conditions that hold together.
type constraint [][]condition

type condition struct {
	op string
	v  version
}

var conditionForm = regexp.MustCompile(`^(>=|<=|!=|>|<|=|\^|~)?\s*(v?[0-9][0-9A-Za-z.+-]*)$`)

// parseConstraint reads ">=1.2, <2", "^1.2", "~1.2.3", "1.2.x || 2".
func parseConstraint(s string) (constraint, error) {
	var c constraint
	for alternative := range strings.SplitSeq(s, "||") {
		var all []condition
		for part := range strings.SplitSeq(alternative, ",") {
			part = strings.TrimSpace(part)
			// 1.2.x is 1.2: what is missing is free.
			part = strings.NewReplacer(".x", "", ".X", "", ".*", "").Replace(part)
			m := conditionForm.FindStringSubmatch(part)
			if m == nil {
				return nil, fmt.Errorf("semver %q: expected such as >=1.2, <2 or ^1.2 or ~1.2.3 or 1.2.x", s)
			}
			v, ok := parseVersion(m[2])
			if !ok {
				return nil, fmt.Errorf("semver %q: %q is no version", s, m[2])
			}
			all = append(all, condition{m[1], v})
		}
		c = append(c, all)
	}
	return c, nil
}

// match says whether a version is within. One before a release (1.0-rc1) is only if a
// condition names such a one of the same release.
func (c constraint) match(v version) bool {
	for _, all := range c {
		ok, named := true, v.pre == ""
		for _, k := range all {
			ok = ok && k.match(v)
			named = named || k.v.pre != "" && k.v.n == v.n
		}
		if ok && named {
			return true
		}
	}
	return false
}

func (k condition) match(v version) bool {
	c := v.compare(k.v)
	switch k.op {
	case ">=":
		return c >= 0
	case "<=":
		return c <= 0 || k.same(v)
	case ">":
		return c > 0 && !k.same(v)
	case "<":
		return c < 0
	case "!=":
		return !k.same(v)
	case "^":
		return c >= 0 && v.compare(k.next(k.caret())) < 0
	case "~":
		return c >= 0 && v.compare(k.next(min(1, k.v.parts-1))) < 0
	}
	return k.same(v)
}

// same says whether a version is the condition's, as far as that says: 1.2 means all 1.2.
func (k condition) same(v version) bool {
	for i := range k.v.parts {
		if v.n[i] != k.v.n[i] {
			return false
		}
	}
	return k.v.parts < 3 || v.pre == k.v.pre
}

// caret is the place of the first number that is not zero: changes right of it are taken.
func (k condition) caret() int {
	for i := range k.v.parts {
		if k.v.n[i] != 0 {
			return i
		}
	}
	return k.v.parts - 1
}

// next is the first version that differs at a place.
func (k condition) next(place int) version {
	v := version{parts: 3}
	copy(v.n[:], k.v.n[:place+1])
	v.n[place]++
	v.pre = "0" // its release candidates do not count as before it
	return v
}
