//go:build linux

package plan

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TimeOffsets gives the content of timens_offsets.
func TimeOffsets(offsets map[string]specs.LinuxTimeOffset) string {
	var b strings.Builder
	for _, clock := range slices.Sorted(maps.Keys(offsets)) {
		fmt.Fprintf(&b, "%s %d %d\n", clock, offsets[clock].Secs, offsets[clock].Nanosecs)
	}
	return b.String()
}

// makeTime makes the time namespace in the child, where the parent has no right to:
// offsets can only be set while nobody is in it, so it is entered afterwards.
func (c *compiler) makeTime() {
	b := c.child
	c.p.NeedsProc = true
	b.do("make the time namespace")
	b.call(sysUnshare, flags(unix.CLONE_NEWTIME, "CLONE_NEWTIME"))
	file := b.slot("file")
	if text := TimeOffsets(c.spec.Linux.TimeOffsets); text != "" {
		b.call(sysOpenat, in(SlotSelf), str("self/timens_offsets"), openFlag(unix.O_WRONLY|unix.O_CLOEXEC), none).into(file)
		b.call(sysWrite, in(file), str(text), num(len(text))).expect(int64(len(text)))
	}
	b.call(sysOpenat, in(SlotSelf), str("self/ns/time_for_children"), openFlag(unix.O_CLOEXEC), none).into(file)
	b.call(sysSetns, in(file), flags(unix.CLONE_NEWTIME, "CLONE_NEWTIME"))
}
