//go:build linux

package plan

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Explanation is a plan together with what asked for each step, and with what the runtime
// does that is no step: cgroups, maps, hooks.
type Explanation struct {
	Parts    []Part
	Warnings []string
	// Needs is the oldest kernel that knows all system calls of the plan, and NeedsFor the
	// call that it is needed for.
	Needs, NeedsFor string

	plan  *Plan
	facts Facts
	who   string // the process that is made
}

// The stages of a container's creation, in their order.
const (
	StagePrepare   = "prepare"   // by the runtime, before the clone
	StageClone     = "clone"     // of the container's first process
	StageAccompany = "accompany" // by the runtime, while that process works
	StageProgram   = "program"   // by the container's first process
	StageStart     = "start"     // from start to the execution of the container's program
	StageStop      = "stop"
)

// Part is one action: one or more system calls with one sentence and one origin.
type Part struct {
	Stage string
	By    string // runtime, container, loader
	Do    string // the sentence
	// Call is the system call of an action that is no step of the machine.
	Call string
	// Details are what the action is made of, if that is no steps: names of system calls.
	Details []string
	// From is what asked for it. It is empty for what the runtime does of its own accord,
	// and for what the specification promises without a field, see Promise.
	From    []Place
	Promise string
	Steps   []PartStep

	format  string // of Do
	values  []any
	subject string // what From is about: a mount's destination, a device's path
}

// Place is a value of config.json.
type Place struct {
	Path  string // as "mounts[3]"
	Line  int    // 0: the file is not at hand, or does not give the value
	Given bool   // false: not in the file, the default applies
}

// PartStep is one step of a part.
type PartStep struct {
	Number int // from 1, as in errors
	Text   string
	// same is Text without what changes with the rest of the plan: step numbers are
	// relative, numbers of mounts are destinations.
	same  string
	brief string // the essence, "" if the sentence says it all
	step  *Step
}

// Explain explains the plan of a container. raw is the text of the configuration, for the
// numbers of lines; it may be nil.
func Explain(p *Plan, s *specs.Spec, f Facts, raw []byte) *Explanation {
	x := newExplainer(p, s, f, "the container's first process")
	if raw != nil {
		x.lines = Lines(raw)
	}
	x.cgroup()
	x.seccomp()
	x.before()
	x.steps(StagePrepare, "runtime", p.Host, 0)
	for _, c := range p.CopyUps {
		x.action(StagePrepare, "openat2, read, write", x.mountOf(c.Dest), "copy the image's %s into the new file system", c.Dest)
	}
	x.clone()
	x.accompany()
	x.steps(StageProgram, "container", p.Program, len(p.Host))
	x.start()
	x.e.needs()
	return x.e
}

func newExplainer(p *Plan, s *specs.Spec, f Facts, who string) *explainer {
	x := &explainer{p: p, s: s, e: &Explanation{plan: p, facts: f, Warnings: p.Warnings, who: who}}
	x.same = *p
	x.same.Slots = x.slots()
	return x
}

type explainer struct {
	p     *Plan
	same  Plan // with slots named by what they are for
	s     *specs.Spec
	e     *Explanation
	lines map[string]int
}

// slots names the slots of mounts by their destination: their numbers change with every
// entry that is added before them.
func (x *explainer) slots() []string {
	out := make([]string, len(x.p.Slots))
	for i, name := range x.p.Slots {
		out[i] = name
		number, ok := strings.CutPrefix(name, "mount")
		if n, err := strconv.Atoi(number); ok && err == nil && n >= 0 && n < len(x.s.Mounts) {
			out[i] = "mount:" + visible(x.s.Mounts[n].Destination)
		}
	}
	return out
}

func (x *explainer) place(path string) Place {
	p := Place{Path: path}
	if x.lines != nil {
		p.Line, p.Given = x.lines[path]
	}
	return p
}

// action adds what is no step. An empty path: the runtime's own.
func (x *explainer) action(stage, call, path, format string, a ...any) *Part {
	p := Part{Stage: stage, By: "runtime", Call: call, Do: visible(fmt.Sprintf(format, a...)), format: format, values: a, subject: path}
	if path != "" {
		p.From = []Place{x.place(path)}
	}
	x.e.Parts = append(x.e.Parts, p)
	return &x.e.Parts[len(x.e.Parts)-1]
}

// steps groups neighbours with the same sentence and origin.
func (x *explainer) steps(stage, by string, steps []Step, base int) {
	from := OriginRef(0)
	var part *Part
	for i := range steps {
		s := &steps[i]
		if do := visible(s.Do.String()); part == nil || part.Do != do || from != s.From {
			o := x.p.Origin(s)
			x.e.Parts = append(x.e.Parts, Part{
				Stage: stage, By: by, Do: do, Promise: o.Promise, format: s.Do.format, values: s.Do.args, subject: x.subject(o),
			})
			part, from = &x.e.Parts[len(x.e.Parts)-1], s.From
			if path := o.String(); path != "" {
				part.From = []Place{x.place(path)}
			}
		}
		part.Steps = append(part.Steps, PartStep{
			Number: base + i + 1,
			Text:   visible(x.p.line(s, i, func(to int) string { return strconv.Itoa(base + to + 1) })),
			same:   visible(sameBuffer(x.same.line(s, i, func(to int) string { return fmt.Sprintf("%+d", to-i) }))),
			brief:  visible(x.same.brief(s)),
			step:   s,
		})
	}
}

// sameBuffer leaves the numbers of buffers out of a line.
func sameBuffer(line string) string {
	const name = "buffer"
	before, after, ok := strings.Cut(line, name)
	if !ok {
		return line
	}
	return before + name + sameBuffer(strings.TrimLeft(after, "0123456789"))
}

// visible shows what would move the cursor or begin a line: whoever wrote the configuration
// must not be able to write into the plan.
func visible(text string) string {
	hidden := func(r rune) bool { return !unicode.IsPrint(r) }
	if strings.IndexFunc(text, hidden) < 0 {
		return text
	}
	var b strings.Builder
	for _, r := range text {
		if hidden(r) {
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		} else {
			b.WriteRune(r)
		}
	}
	return b.String()
}

// subject names what an origin is about in a way that does not depend on its place in a
// list.
func (x *explainer) subject(o Origin) string {
	l := x.s.Linux
	switch i := o.Index; {
	case o.Promise != "":
		return "promise:" + o.Promise
	case i < 0:
	case o.Field == "mounts" && i < len(x.s.Mounts):
		return "mounts:" + x.s.Mounts[i].Destination
	case o.Field == "linux.devices" && i < len(l.Devices):
		return "devices:" + l.Devices[i].Path
	case o.Field == "linux.namespaces" && i < len(l.Namespaces):
		return "namespaces:" + string(l.Namespaces[i].Type)
	case o.Field == "linux.maskedPaths" && i < len(l.MaskedPaths):
		return "masked:" + l.MaskedPaths[i]
	case o.Field == "linux.readonlyPaths" && i < len(l.ReadonlyPaths):
		return "readonly:" + l.ReadonlyPaths[i]
	case o.Field == "process.rlimits" && x.s.Process != nil && i < len(x.s.Process.Rlimits):
		return "rlimits:" + x.s.Process.Rlimits[i].Type
	}
	return o.String()
}

// mountOf gives the path of the entry for a destination.
func (x *explainer) mountOf(dest string) string {
	for i, m := range x.s.Mounts {
		if m.Destination == dest {
			return element("mounts", i)
		}
	}
	return "mounts"
}

// origin says for people where a part comes from.
func (p *Part) origin(lines bool) string {
	var out []string
	if len(p.From) > 1 && !lines {
		return p.list()
	}
	for _, f := range p.From {
		switch {
		case lines && f.Given:
			out = append(out, fmt.Sprintf("%s, line %d", f.Path, f.Line))
		case lines && f.Line == 0:
			out = append(out, f.Path+" by default")
		default:
			out = append(out, f.Path)
		}
	}
	switch {
	case len(out) > 0:
		return strings.Join(out, "; ")
	case p.Promise != "":
		return "specification: " + p.Promise
	}
	return "runtime"
}

func (e *Explanation) title(stage string) string {
	switch stage {
	case StagePrepare:
		return "the runtime prepares"
	case StageClone:
		return "the runtime clones " + e.who
	case StageAccompany:
		return "the runtime, while that process works"
	case StageProgram:
		return e.who
	case StageStart:
		return "start"
	case StageStop:
		return "delete"
	}
	return ""
}

// Text prints the explanation: one action a paragraph, with its origin, one system call a
// line.
func (e *Explanation) Text() string {
	var b strings.Builder
	e.head(&b)
	stage, lines := "", e.hasLines()
	for i := range e.Parts {
		p := &e.Parts[i]
		if p.Stage != stage {
			stage = p.Stage
			fmt.Fprintf(&b, "\n## %s\n", e.title(stage))
		}
		fmt.Fprintf(&b, "%s  (%s)\n", p.Do, p.origin(lines))
		if p.Call != "" {
			fmt.Fprintf(&b, "     %s\n", p.Call)
		}
		wrap(&b, p.Details)
		for _, s := range p.Steps {
			fmt.Fprintf(&b, "%4d %s\n", s.Number, s.Text)
		}
	}
	return b.String()
}

// wrap prints words in lines of some 100 bytes.
func wrap(b *strings.Builder, words []string) {
	width := 0
	for i, w := range words {
		switch {
		case i == 0 || width+len(w) > 100:
			if i > 0 {
				b.WriteByte('\n')
			}
			b.WriteString("     ")
			width = 5
		default:
			b.WriteByte(' ')
		}
		b.WriteString(w)
		width += len(w) + 1
	}
	if len(words) > 0 {
		b.WriteByte('\n')
	}
}

func (e *Explanation) head(b *strings.Builder) {
	p := e.plan
	fmt.Fprintf(b, "# %d steps: %d by the runtime, %d by %s\n", len(p.Host)+len(p.Program), len(p.Host), len(p.Program), e.who)
	if e.Needs != "" {
		fmt.Fprintf(b, "# needs Linux %s or later, for %s\n", e.Needs, e.NeedsFor)
	}
	for _, w := range e.Warnings {
		fmt.Fprintf(b, "# warning: %s\n", visible(w))
	}
}

// hasLines tells whether the file was at hand.
func (e *Explanation) hasLines() bool {
	for i := range e.Parts {
		for _, f := range e.Parts[i].From {
			if f.Given {
				return true
			}
		}
	}
	return false
}
