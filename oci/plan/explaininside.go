//go:build linux

package plan

import (
	"maps"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// ExplainExec explains the plan of one more process, proc, in a container with the
// specification s. raw is the text of proc, and config that of s, for the numbers of
// lines; they may be nil.
func ExplainExec(p *Plan, s *specs.Spec, proc *specs.Process, f Facts, raw, config []byte) *Explanation {
	inside := &specs.Spec{Process: proc, Linux: s.Linux}
	x := newExplainer(p, inside, f, "the new process")
	if raw != nil {
		x.lines = map[string]int{}
		for path, line := range Lines(config) {
			if !strings.HasPrefix(path, "process") {
				x.lines[path] = line
			}
		}
		maps.Copy(x.lines, Lines([]byte(`{"process":`+string(raw)+`}`)))
	}
	x.seccomp()
	x.join("the container's first process")
	if n := p.OOMScoreAdj; n != nil {
		x.action(StageAccompany, "write", "process.oomScoreAdj", "set oom_score_adj to %d", *n)
	}
	x.raiseLimits()
	x.steps(StageProgram, "container", p.Program, len(p.Host))
	x.start()
	x.e.needs()
	return x.e
}

// ExplainHook explains the plan of a hook that runs in the namespaces of a container with
// the specification s. name is its place there, as "hooks.createContainer[0]".
func ExplainHook(p *Plan, s *specs.Spec, name string, h specs.Hook, f Facts, raw []byte) *Explanation {
	x := newExplainer(p, &specs.Spec{Linux: s.Linux}, f, "the hook")
	if raw != nil {
		x.lines = Lines(raw)
	}
	x.action(StagePrepare, "memfd_create, write", name, "write the state of the container for the hook's standard input")
	x.join(name)
	if h.Timeout != nil {
		x.action(StageAccompany, "poll, wait4", name+".timeout", "wait for its end, and kill it after %d s", *h.Timeout)
	} else {
		x.action(StageAccompany, "poll, wait4", name, "wait for its end")
	}
	x.steps(StageProgram, "container", p.Program, len(p.Host))
	x.action(StageProgram, "execve", name, "execute %q", append([]string{h.Path}, h.Args[min(1, len(h.Args)):]...)).By = "loader"
	x.e.needs()
	return x.e
}

// join tells what happens until a process is in the container.
func (x *explainer) join(whose string) {
	x.steps(StagePrepare, "runtime", x.p.Host, 0)
	x.action(StageClone, "clone("+x.p.cloneText()+")", "", "clone %s, which then joins the namespaces of the container", x.e.who).subject = "clone:" + whose
}
