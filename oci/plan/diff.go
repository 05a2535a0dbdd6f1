//go:build linux

package plan

import (
	"fmt"
	"strings"
)

// Diff prints what b does differently from a, in the manner of a unified diff. Actions are
// matched by what they are about (a mount's destination, a masked path, a limit) and steps
// within them by what they do; numbers of steps, of descriptors and of list entries do not
// matter. It is empty if there is no difference. With brief, each action is one line.
func Diff(a, b *Explanation, nameA, nameB string, brief bool) string {
	d := differ{a: a, b: b, brief: brief}
	d.match()
	d.moves()
	var out strings.Builder
	for _, m := range align(a.Warnings, b.Warnings) {
		switch {
		case m[1] < 0:
			fmt.Fprintf(&out, "-# warning: %s\n", visible(a.Warnings[m[0]]))
		case m[0] < 0:
			fmt.Fprintf(&out, "+# warning: %s\n", visible(b.Warnings[m[1]]))
		}
	}
	for _, stage := range []string{StagePrepare, StageClone, StageAccompany, StageProgram, StageStart, StageStop} {
		before := out.Len()
		d.stage(&out, stage)
		if text := out.String(); len(text) > before {
			out.Reset()
			out.WriteString(text[:before] + "## " + b.title(stage) + "\n" + text[before:])
		}
	}
	if out.Len() == 0 {
		return ""
	}
	return "--- " + nameA + "\n+++ " + nameB + "\n" + out.String()
}

// pair is an action of either plan, or the same action of both.
type pair struct {
	old, now *Part
	moved    bool
}

func (p pair) part() *Part {
	if p.now != nil {
		return p.now
	}
	return p.old
}

type differ struct {
	a, b  *Explanation
	brief bool
	pairs []pair
}

// key is what makes two actions the same one.
func (p *Part) key() string {
	format := p.format
	if format == "%s" {
		format = p.Do
	}
	return p.Stage + "\x00" + p.By + "\x00" + p.subject + "\x00" + format
}

// text is what makes two actions equal.
func (p *Part) text() string {
	lines := append([]string{p.Do, p.Call}, p.Details...)
	for _, s := range p.Steps {
		lines = append(lines, s.same)
	}
	return strings.Join(lines, "\n")
}

func (d *differ) match() {
	keys := func(e *Explanation) []string {
		out := make([]string, len(e.Parts))
		for i := range e.Parts {
			out[i] = e.Parts[i].key()
		}
		return out
	}
	for _, m := range align(keys(d.a), keys(d.b)) {
		var p pair
		if m[0] >= 0 {
			p.old = &d.a.Parts[m[0]]
		}
		if m[1] >= 0 {
			p.now = &d.b.Parts[m[1]]
		}
		d.pairs = append(d.pairs, p)
	}
}

// moves finds actions that are only in another place.
func (d *differ) moves() {
	for i := range d.pairs {
		p := &d.pairs[i]
		if p.now == nil || p.old != nil {
			continue
		}
		for j := range d.pairs {
			q := &d.pairs[j]
			if q.now == nil && q.old != nil && q.old.key() == p.now.key() {
				p.old, p.moved = q.old, true
				q.old = nil
				break
			}
		}
	}
}

func (d *differ) stage(out *strings.Builder, stage string) {
	// In the short form neighbours share lines where they can.
	var gone, come []*Part
	flush := func() {
		for _, l := range d.a.briefLines(gone) {
			fmt.Fprintf(out, "-%s\n", l)
		}
		for _, l := range d.b.briefLines(come) {
			fmt.Fprintf(out, "+%s\n", l)
		}
		gone, come = nil, nil
	}
	for _, p := range d.pairs {
		if p.old == nil && p.now == nil || p.part().Stage != stage {
			continue
		}
		if p.old != nil && p.now != nil && p.old.text() == p.now.text() {
			if p.moved {
				flush()
				fmt.Fprintf(out, " %-9s  %s: at another time\n", p.now.By, p.now.Do)
			}
			continue
		}
		if !d.brief {
			d.full(out, p)
			continue
		}
		if p.old != nil && p.now != nil {
			if len(gone) == 0 || len(come) == 0 || !alike(gone[0], p.old) || !alike(come[0], p.now) {
				flush()
			}
			old, now := d.a.briefLines([]*Part{p.old})[0], d.b.briefLines([]*Part{p.now})[0]
			if names := changes(p.old.Details, p.now.Details); names != "" {
				flush()
				fmt.Fprintf(out, " %-9s  %s:%s\n", now.by, now.do, names)
				continue
			}
			if old.do == now.do && old.more == now.more {
				flush()
				fmt.Fprintf(out, " %-9s  %s: changed in detail\n", now.by, now.do)
				continue
			}
			gone, come = append(gone, p.old), append(come, p.now)
			continue
		}
		if p.old == nil && len(gone) > 0 || p.now == nil && len(come) > 0 {
			flush()
		}
		if p.old == nil {
			come = append(come, p.now)
		} else {
			gone = append(gone, p.old)
		}
	}
	flush()
}

// changes lists what is only in one of two lists of words.
func changes(old, now []string) string {
	text := ""
	for _, m := range align(old, now) {
		switch {
		case m[1] < 0:
			text += " -" + old[m[0]]
		case m[0] < 0:
			text += " +" + now[m[1]]
		}
	}
	return text
}

// full prints one action with its steps.
func (d *differ) full(out *strings.Builder, p pair) {
	fmt.Fprintf(out, "@@ %s", p.part().By)
	if p.old != nil {
		fmt.Fprintf(out, " -%s", p.old.origin(d.a.hasLines()))
	}
	if p.now != nil {
		fmt.Fprintf(out, " +%s", p.now.origin(d.b.hasLines()))
	}
	if p.moved {
		out.WriteString(" moved")
	}
	out.WriteString(" @@\n")
	lines := func(p *Part) []string {
		if p == nil {
			return nil
		}
		text := []string{p.Do}
		if p.Call != "" {
			text = append(text, "    "+p.Call)
		}
		for _, s := range p.Details {
			text = append(text, "    "+s)
		}
		for _, s := range p.Steps {
			text = append(text, "    "+s.same)
		}
		return text
	}
	old, now := lines(p.old), lines(p.now)
	for _, m := range align(old, now) {
		switch {
		case m[1] < 0:
			out.WriteString("-" + old[m[0]] + "\n")
		case m[0] < 0:
			out.WriteString("+" + now[m[1]] + "\n")
		default:
			out.WriteString(" " + now[m[1]] + "\n")
		}
	}
}

// align finds a longest common subsequence of a and b, and gives all elements of both in
// order, as indexes; -1 where the other has no such element.
func align(a, b []string) (out [][2]int) {
	// What both begin and end with needs no table.
	first := 0
	for first < len(a) && first < len(b) && a[first] == b[first] {
		out = append(out, [2]int{first, first})
		first++
	}
	n, m := len(a), len(b)
	for n > first && m > first && a[n-1] == b[m-1] {
		n, m = n-1, m-1
	}
	common := make([][]int, n-first+1)
	for i := range common {
		common[i] = make([]int, m-first+1)
	}
	for i := n - 1; i >= first; i-- {
		for j := m - 1; j >= first; j-- {
			if a[i] == b[j] {
				common[i-first][j-first] = common[i-first+1][j-first+1] + 1
			} else {
				common[i-first][j-first] = max(common[i-first+1][j-first], common[i-first][j-first+1])
			}
		}
	}
	i, j := first, first
	for i < n || j < m {
		switch {
		case i < n && j < m && a[i] == b[j]:
			out = append(out, [2]int{i, j})
			i, j = i+1, j+1
		case j == m || i < n && common[i-first+1][j-first] >= common[i-first][j-first+1]:
			out = append(out, [2]int{i, -1})
			i++
		default:
			out = append(out, [2]int{-1, j})
			j++
		}
	}
	for ; i < len(a); i, j = i+1, j+1 {
		out = append(out, [2]int{i, j})
	}
	return out
}
