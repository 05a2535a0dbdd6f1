//go:build linux

package plan

import (
	"bytes"
	"encoding/json"
)

// The JSON form of an explanation; docs/plan.md documents it, and a test holds it to
// docs/plan.schema.json.

// FormatVersion is that of the JSON form. It grows when a reader would have to change.
const FormatVersion = 1

type jsonPlan struct {
	Version  int          `json:"version"`
	Needs    string       `json:"needsLinux,omitempty"`
	Facts    Facts        `json:"facts"`
	Actions  []jsonAction `json:"actions"`
	Terminal bool         `json:"terminal"`
	Hold     bool         `json:"waitsForStart"`
	Warnings []string     `json:"warnings,omitempty"`
}

type jsonAction struct {
	Stage   string      `json:"stage"`
	By      string      `json:"by"`
	Do      string      `json:"do"`
	Call    string      `json:"call,omitempty"`
	Details []string    `json:"details,omitempty"`
	From    []jsonPlace `json:"from,omitempty"`
	Promise string      `json:"promise,omitempty"`
	Steps   []jsonStep  `json:"steps,omitempty"`
}

type jsonPlace struct {
	Path    string `json:"path"`
	Line    int    `json:"line,omitempty"`
	Default bool   `json:"default,omitempty"`
}

type jsonStep struct {
	Step   int      `json:"step"`
	Op     string   `json:"op"`
	Call   string   `json:"syscall,omitempty"`
	Args   []string `json:"args,omitempty"`
	Into   string   `json:"into,omitempty"`
	Accept []string `json:"accept,omitempty"`
	OnFail int      `json:"onAccepted,omitempty"`
	Next   int      `json:"next,omitempty"`
	Text   string   `json:"text"`
}

// MarshalJSON gives the explanation for programs. Step numbers count from 1, as in errors.
func (e *Explanation) MarshalJSON() ([]byte, error) {
	p := e.plan
	out := jsonPlan{
		Version: FormatVersion, Needs: e.Needs, Facts: e.facts, Terminal: p.Terminal, Hold: p.Hold, Warnings: e.Warnings,
		Actions: make([]jsonAction, 0, len(e.Parts)),
	}
	lines := e.hasLines()
	for i := range e.Parts {
		part := &e.Parts[i]
		a := jsonAction{Stage: part.Stage, By: part.By, Do: part.Do, Call: part.Call, Details: part.Details, Promise: part.Promise}
		for _, f := range part.From {
			a.From = append(a.From, jsonPlace{f.Path, f.Line, lines && !f.Given})
		}
		base := 0
		if part.Stage == StageProgram {
			base = len(p.Host)
		}
		for _, s := range part.Steps {
			a.Steps = append(a.Steps, p.jsonStep(&s, base))
		}
		out.Actions = append(out.Actions, a)
	}
	// "->" stays readable.
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(out)
	return b.Bytes(), err
}

func (p *Plan) jsonStep(ps *PartStep, base int) jsonStep {
	s := ps.step
	j := jsonStep{Step: ps.Number, Op: opNames[s.Op], Call: s.Name, Text: ps.Text}
	for _, a := range s.Args {
		j.Args = append(j.Args, p.arg(a))
	}
	if s.Fill >= 0 {
		j.Into = p.slotName(s.Fill)
	}
	for _, e := range s.Accept {
		j.Accept = append(j.Accept, errnoName(e))
	}
	if s.Any {
		j.Accept = append(j.Accept, "*")
	}
	if len(j.Accept) > 0 || s.Op == Branch {
		j.OnFail = base + s.OnFail + 1
	}
	if s.OnOK != ps.Number-base {
		j.Next = base + s.OnOK + 1
	}
	return j
}
