package engine

import (
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// parseSignal reads a signal's number or name, with or without SIG, also RTMIN+n.
func parseSignal(s string) (int, error) {
	bad := func() error { return invalidf("Invalid signal: %s", s) }
	if n, err := strconv.Atoi(s); err == nil {
		if n < 1 || n > 64 {
			return 0, bad()
		}
		return n, nil
	}
	name := "SIG" + strings.TrimPrefix(strings.ToUpper(s), "SIG")
	if n := unix.SignalNum(name); n != 0 {
		return int(n), nil
	}
	// Of the real-time signals Go knows no names. libc uses 32 and 33 itself.
	for _, rt := range []struct {
		name string
		base int
	}{{"SIGRTMIN", 34}, {"SIGRTMAX", 64}} {
		rest, ok := strings.CutPrefix(name, rt.name)
		if !ok {
			continue
		}
		if rest == "" {
			return rt.base, nil
		}
		off, err := strconv.Atoi(rest)
		if n := rt.base + off; err == nil && n >= 34 && n <= 64 {
			return n, nil
		}
	}
	return 0, bad()
}
