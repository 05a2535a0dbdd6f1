//go:build linux

package plan

import (
	"fmt"
	"math/bits"
	"slices"
	"strings"
)

// lookups are calls whose only use is to find or check what the sentence names.
var lookups = []string{
	"openat2", "openat", "close", "close_range", "fstat", "fstatfs", "faccessat2", "getcwd", "read", "write", "mkdirat",
	"fchdir", "dup3", "fcntl", "move_mount", "sethostname", "setdomainname", "prlimit64", "execveat", "setns",
}

// brief gives the essence of a step: what a reader wants to know beyond the sentence.
func (p *Plan) brief(s *Step) string {
	if s.Op != Call || slices.Contains(lookups, s.Name) {
		return ""
	}
	arg := func(i int) string { return p.arg(s.Args[i]) }
	switch s.Name {
	case "fsopen":
		return s.Args[0].Str
	case "fsconfig":
		switch cmd := arg(1); {
		case cmd == "SET_STRING" && s.Args[2].Str == "source":
			return ""
		case cmd == "SET_STRING":
			return s.Args[2].Str + "=" + s.Args[3].Str
		case cmd == "SET_FLAG":
			return s.Args[2].Str
		case cmd == "SET_FD":
			return s.Args[2].Str + "=" + arg(4)
		}
		return ""
	case "fsmount":
		if a := arg(2); a != "0" {
			return a
		}
		return ""
	case "open_tree":
		text := "bind"
		if strings.Contains(arg(2), "RECURSIVE") {
			text = "rbind"
		}
		if s.Args[1].Str != "" {
			text += " " + s.Args[1].Str
		}
		return text
	case "mknodat":
		if strings.HasPrefix(arg(2), "S_IFREG") {
			return "" // a mount point
		}
	case "fchmodat":
		if s.Args[1].Str == "." {
			return "mode of the directory there"
		}
	case "mount_setattr":
		if s.Args[3].Kind == ArgBuffer {
			return "map" // the attributes hold a user namespace
		}
		text := arg(3)
		for _, nothing := range []string{"set 0, ", "clear 0, ", ", 0"} {
			text = strings.Replace(text, nothing, "", 1)
		}
		if strings.Contains(arg(2), "RECURSIVE") {
			text = "r" + text
		}
		return text
	}
	var args []string
	for _, a := range s.Args {
		if a.Kind != ArgSlot && a.Kind != ArgBuffer {
			args = append(args, p.arg(a))
		}
	}
	for len(args) > 1 && args[len(args)-1] == "0" {
		args = args[:len(args)-1]
	}
	return s.Name + "(" + strings.Join(args, ", ") + ")"
}

// essence is what a part does beyond its sentence, on one line.
func (e *Explanation) essence(p *Part) string {
	var out []string
	var drop uint64
	for i := range p.Steps {
		s := &p.Steps[i]
		if len(s.step.Args) > 1 && s.step.Name == "prctl" && e.plan.arg(s.step.Args[0]) == "PR_CAPBSET_DROP" {
			drop |= 1 << s.step.Args[1].Int
			continue
		}
		if s.brief != "" && (len(out) == 0 || out[len(out)-1] != s.brief) {
			out = append(out, s.brief)
		}
	}
	if drop != 0 {
		out = append(out, capText(drop, e.facts.LastCap))
	}
	if p.Call != "" {
		out = append(out, p.Call)
	}
	switch n := len(p.Details); {
	case n > 8:
		out = append(out, fmt.Sprintf("%d system calls", n))
	case n > 0:
		out = append(out, p.Details...)
	}
	return strings.Join(out, " ")
}

// capText names the capabilities that are dropped, or those that are left, whichever are
// fewer.
func capText(drop uint64, last int) string {
	all := uint64(1)<<(last+1) - 1
	verb, set := "drop", drop
	if bits.OnesCount64(all&^drop) < bits.OnesCount64(drop) {
		verb, set = "keep", all&^drop
	}
	var names []string
	for i := range last + 1 {
		switch {
		case set&(1<<i) == 0:
		case i < len(capabilities):
			names = append(names, capabilities[i])
		default:
			names = append(names, fmt.Sprint(i))
		}
	}
	if len(names) == 0 {
		return verb + " none"
	}
	return verb + " " + strings.Join(names, ",")
}

// briefLine is one line of the short form.
type briefLine struct {
	by, do, more, from string
}

func (l briefLine) String() string {
	text := fmt.Sprintf("%-9s  %s", l.by, l.do)
	if l.more != "" {
		text += ": " + l.more
	}
	return text + "  (" + l.from + ")"
}

// briefLines gives a line for each part. Neighbours that say the same of several things
// (masked paths, devices) share one.
func (e *Explanation) briefLines(parts []*Part) []briefLine {
	lines := e.hasLines()
	var out []briefLine
	done := make([]bool, len(parts))
	for i, p := range parts {
		if done[i] {
			continue
		}
		l := briefLine{p.By, p.Do, e.essence(p), p.origin(lines)}
		same := []*Part{p}
		for j := i + 1; j < len(parts); j++ {
			if !done[j] && alike(p, parts[j]) {
				same, done[j] = append(same, parts[j]), true
			} else if p.Promise == "" || parts[j].Promise != p.Promise {
				break // only what the specification promises is told together across others
			}
		}
		if len(same) > 1 {
			var values, more []string
			for _, q := range same {
				values = append(values, visible(fmt.Sprint(q.values...)))
				if m := e.essence(q); m != "" && !slices.Contains(more, m) {
					more = append(more, m)
				}
			}
			l.do = fmt.Sprintf(strings.NewReplacer("%d", "%s", "%q", "%s").Replace(p.format), strings.Join(values, ", "))
			l.more = strings.Join(more, ", ")
			if last := same[len(same)-1].origin(lines); last != l.from {
				l.from += " to " + last
			}
		}
		out = append(out, l)
	}
	return out
}

// alike tells whether two parts can share a line: one sentence about one thing each, of
// one list of names or of one and the same origin.
func alike(p, q *Part) bool {
	one := strings.Count(p.format, "%") == 1 && len(p.values) == 1 && p.format != "%s"
	if !one || p.Stage != q.Stage || p.By != q.By || p.format != q.format || p.Promise != q.Promise {
		return false
	}
	return p.origin(false) == q.origin(false) || p.list() == q.list() && slices.Contains(nameLists, p.list())
}

var nameLists = []string{"linux.maskedPaths", "linux.readonlyPaths", "process.env"}

// list is the field that a part's origins are elements of.
func (p *Part) list() string {
	if len(p.From) == 0 {
		return ""
	}
	name, _, _ := strings.Cut(p.From[0].Path, "[")
	return name
}

// Brief prints one line for each action, without the calls that only find things.
func (e *Explanation) Brief() string {
	var b strings.Builder
	e.head(&b)
	for i := 0; i < len(e.Parts); {
		stage := e.Parts[i].Stage
		var parts []*Part
		for ; i < len(e.Parts) && e.Parts[i].Stage == stage; i++ {
			parts = append(parts, &e.Parts[i])
		}
		fmt.Fprintf(&b, "\n## %s\n", e.title(stage))
		for _, l := range e.briefLines(parts) {
			b.WriteString(l.String() + "\n")
		}
	}
	return b.String()
}
