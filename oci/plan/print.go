//go:build linux

package plan

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Text prints the plan for people: one action a paragraph, one system call a line.
func (p *Plan) Text() string {
	var b strings.Builder
	total := len(p.Host) + len(p.Program)
	fmt.Fprintf(&b, "# %d steps: %d by the runtime, %d by the container's first process\n", total, len(p.Host), len(p.Program))
	if len(p.Affinity) > 0 {
		fmt.Fprintf(&b, "# cloned on the CPUs of the mask %x\n", p.Affinity)
	}
	if len(p.Host)+len(p.Overlays)+len(p.UserNamespaces) > 0 {
		b.WriteString("\n## runtime\n")
		for _, n := range p.UserNamespaces {
			fmt.Fprintf(&b, "make a user namespace for the ids of mounts, uids %s, gids %s\n     clone3(CLONE_NEWUSER) -> %s\n", mapsText(n.UIDs), mapsText(n.GIDs), p.slotName(n.Slot))
		}
		for _, o := range p.Overlays {
			fmt.Fprintf(&b, "mount an overlay of %d layers\n     mount(2) in a mount namespace of its own -> %s\n", len(o.Lower), p.slotName(o.Slot))
		}
		p.section(&b, p.Host, 0)
	}
	for _, c := range p.CopyUps {
		fmt.Fprintf(&b, "     copy the image's %s into %s\n", c.Dest, p.slotName(c.Slot))
	}
	fmt.Fprintf(&b, "\n## clone(%s)\n", p.cloneText())
	p.section(&b, p.Program, len(p.Host))
	if p.Hold {
		b.WriteString("     the loader waits for start\n")
	}
	if p.Waits {
		b.WriteString("     the loader waits for the runtime\n")
	}
	if len(p.Scheduler) > 0 {
		fmt.Fprintf(&b, "     the runtime sets the scheduler to %s\n", p.SchedulerName)
	}
	if n := len(p.Filter.Program); n > 0 {
		fmt.Fprintf(&b, "     the loader loads the seccomp filter (%d instructions)\n", n)
	}
	b.WriteString("     the loader executes the program\n")
	for _, w := range p.Warnings {
		fmt.Fprintf(&b, "# warning: %s\n", w)
	}
	return b.String()
}

// mapsText prints maps as container:host:size.
func mapsText(maps []specs.LinuxIDMapping) string {
	out := make([]string, len(maps))
	for i, m := range maps {
		out[i] = fmt.Sprintf("%d:%d:%d", m.ContainerID, m.HostID, m.Size)
	}
	return strings.Join(out, ",")
}

func (p *Plan) cloneText() string {
	if p.CloneFlags == 0 {
		return "0"
	}
	return cloneText(p.CloneFlags)
}

func (p *Plan) section(b *strings.Builder, steps []Step, base int) {
	last := ""
	for i := range steps {
		s := &steps[i]
		if do := s.Do.String(); do != last {
			fmt.Fprintf(b, "%s\n", do)
			last = do
		}
		fmt.Fprintf(b, "%4d %s\n", base+i+1, p.line(s, i, func(i int) string { return strconv.Itoa(base + i + 1) }))
	}
}

// line prints one step: "openat2(root, "proc", {...}, 24) -> target; ENOENT: 17". target
// names the step of an index.
func (p *Plan) line(s *Step, i int, target func(int) string) string {
	var b strings.Builder
	switch s.Op {
	case Call:
		fmt.Fprintf(&b, "%s(%s)", s.Name, p.args(s.Args))
		if s.Fill >= 0 {
			fmt.Fprintf(&b, " -> %s", p.slotName(s.Fill))
		}
		if s.Expect >= 0 {
			fmt.Fprintf(&b, " = %d", s.Expect)
		}
	case Check:
		fmt.Fprintf(&b, "check %s[%d] & %#x == %#x", p.arg(s.Args[0]), s.Off, s.Mask, s.Want)
	case Poke:
		fmt.Fprintf(&b, "store %s[%d] = %s", p.arg(s.Args[0]), s.Off, p.arg(s.Args[1]))
	case Load:
		fmt.Fprintf(&b, "set %s = %s[%d]", p.slotName(s.Fill), p.arg(s.Args[0]), s.Off)
	case Set:
		fmt.Fprintf(&b, "set %s = %s", p.slotName(s.Fill), p.arg(s.Args[0]))
	case Branch:
		if s.Args[0].Kind == ArgInt {
			fmt.Fprintf(&b, "go to %s", target(s.OnOK))
		} else {
			fmt.Fprintf(&b, "if %s != 0 go to %s", p.arg(s.Args[0]), target(s.OnFail))
		}
	case Fail:
		fmt.Fprintf(&b, "fail %s", errnoName(s.Errno))
	case CloseAll:
		if len(s.Args) == 0 {
			b.WriteString("close_range: all but the slots")
		} else {
			fmt.Fprintf(&b, "close_range: from %d, all but %s", 3+s.Off, p.args(s.Args))
		}
	}
	var why []string
	if s.Any {
		why = append(why, "any failure")
	}
	for _, e := range s.Accept {
		why = append(why, errnoName(e))
	}
	if len(why) > 0 {
		fmt.Fprintf(&b, "; %s: %s", strings.Join(why, ", "), target(s.OnFail))
	}
	if s.OnOK != i+1 && s.Op != Branch && s.Op != Fail {
		fmt.Fprintf(&b, "; then %s", target(s.OnOK))
	}
	return b.String()
}

func (p *Plan) slotName(s Slot) string {
	if s < 0 || int(s) >= len(p.Slots) {
		return "-"
	}
	return "$" + p.Slots[s]
}

func (p *Plan) args(args []Arg) string {
	out := make([]string, len(args))
	for i, a := range args {
		out[i] = p.arg(a)
	}
	return strings.Join(out, ", ")
}

func (p *Plan) arg(a Arg) string {
	switch a.Kind {
	case ArgString:
		return fmt.Sprintf("%q", a.Str)
	case ArgSlot:
		return p.slotName(a.Slot)
	case ArgBytes:
		return a.text()
	case ArgBuffer:
		return fmt.Sprintf("buffer%d", a.Int)
	case ArgStrings:
		return fmt.Sprintf("%q", a.Strs())
	case ArgFilter:
		return fmt.Sprintf("filter of %d instructions", len(a.Filter()))
	case ArgMessage:
		return "SCM_RIGHTS " + p.slotName(a.Slot)
	case ArgReceive:
		return fmt.Sprintf("SCM_RIGHTS into buffer%d", a.Int)
	}
	if text := a.text(); text != "" {
		return text
	}
	return fmt.Sprint(a.Int)
}

func errnoName(e unix.Errno) string {
	if n := unix.ErrnoName(e); n != "" {
		return n
	}
	return fmt.Sprintf("errno %d", int(e))
}
