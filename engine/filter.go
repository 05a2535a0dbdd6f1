package engine

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// check refuses fields that the list does not know.
func (f Filters) check(known ...string) error {
	for field := range f {
		if !slices.Contains(known, field) {
			return invalidf("invalid filter '%s'", field)
		}
	}
	return nil
}

// any tells whether one value of the field fits, or the field is not asked for.
func (f Filters) any(field string, fits func(string) bool) bool {
	want, asked := f[field]
	return !asked || len(want) == 0 || slices.ContainsFunc(want, fits)
}

// labels tells whether the labels have all of `label` and none of `label!`.
func (f Filters) labels(have map[string]string) bool {
	for _, w := range f["label"] {
		if !matchLabel(have, w) {
			return false
		}
	}
	for _, w := range f["label!"] {
		if matchLabel(have, w) {
			return false
		}
	}
	return true
}

// bool reads a boolean field. asked is false if it is not there.
func (f Filters) bool(field string) (value, asked bool, err error) {
	want, ok := f[field]
	if !ok || len(want) == 0 {
		return false, false, nil
	}
	for i, w := range want {
		var b bool
		switch strings.ToLower(w) {
		case "1", "true":
			b = true
		case "0", "false":
		default:
			return false, false, invalidf("invalid filter '%s=%s'", field, w)
		}
		if i > 0 && b != value {
			return false, false, invalidf("invalid filter '%s=%s'", field, strings.Join(want, ","))
		}
		value = b
	}
	return value, true, nil
}

// until reads the prune filter of that name: a time or a duration back from now.
func (f Filters) until() (time.Time, error) {
	want := f["until"]
	switch len(want) {
	case 0:
		return time.Time{}, nil
	case 1:
	default:
		return time.Time{}, invalidf("more than one until filter specified")
	}
	return parseTime(want[0], time.Now())
}

// parseTime reads a Unix time (with fraction), an RFC 3339 time or date, or a Go
// duration back from now.
func parseTime(s string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(s); err == nil {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05.999999999", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	whole, frac, _ := strings.Cut(s, ".")
	sec, err := strconv.ParseInt(whole, 10, 64)
	if err != nil {
		return time.Time{}, invalidf("invalid time %q", s)
	}
	var nsec int64
	if frac != "" {
		if len(frac) > 9 {
			frac = frac[:9]
		}
		if nsec, err = strconv.ParseInt(frac+strings.Repeat("0", 9-len(frac)), 10, 64); err != nil {
			return time.Time{}, invalidf("invalid time %q", s)
		}
	}
	return time.Unix(sec, nsec), nil
}

// matchLabel tells whether the labels have "key" or "key=value".
func matchLabel(have map[string]string, want string) bool {
	k, v, hasValue := strings.Cut(want, "=")
	got, ok := have[k]
	return ok && (!hasValue || got == v)
}

// matchName applies Docker's name filter: a regular expression, or else a part of the name.
func matchName(name, pattern string) bool {
	if name == pattern || strings.Contains(name, pattern) {
		return true
	}
	re, err := regexp.Compile(pattern)
	return err == nil && (re.MatchString(name) || re.MatchString("/"+name))
}
