//go:build linux

package plan

import (
	"encoding/binary"
	"fmt"
	"iter"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/defence"
)

// builder collects the steps of a program.
type builder struct {
	p      *Plan
	chunks [][]Step // in each a step keeps its place
	n      int      // steps in all of them
	args   []Arg    // room for the arguments of the next steps
	labels []int
	words  *Words // Do of the next steps
	class  ErrClass
	names  map[string]Slot
	pidns  Slot // the PID namespace that a new procfs shows, NoSlot: that of the process
}

// For how many steps there is room from the start: 390 to 470 are what a container with usual mounts takes, more with many,
// and 100 to 140 a process in one. All that comes in further chunks has to be put together.
const (
	containerSteps = 496
	insideSteps    = 160
	moreSteps      = 64
)

// newBuilder makes a builder with room for about so many steps. One allocation for all
// of them is a third of the work of compiling.
func newBuilder(p *Plan, names map[string]Slot, steps int) *builder {
	return &builder{p: p, names: names, pidns: NoSlot, chunks: [][]Step{make([]Step, 0, steps)}, args: make([]Arg, 0, 3*steps+steps/4), labels: make([]int, 0, steps/2)}
}

// do sets the sentence of the steps that follow.
func (b *builder) do(format string, a ...any) {
	b.words, b.class = &Words{format, a}, ClassSystem
}

func (b *builder) slot(name string) Slot {
	if s, ok := b.names[name]; ok {
		return s
	}
	s := Slot(len(b.p.Slots))
	b.p.Slots = append(b.p.Slots, name)
	b.names[name] = s
	return s
}

func (b *builder) buffer() Arg {
	a := Arg{Kind: ArgBuffer, Int: uint64(b.p.Buffers), Slot: NoSlot}
	b.p.Buffers++
	return a
}

// next gives the next step, with room for its arguments.
func (b *builder) next(op Op, args []Arg) *Step {
	last := &b.chunks[len(b.chunks)-1]
	if len(*last) == cap(*last) {
		b.chunks = append(b.chunks, make([]Step, 0, moreSteps))
		last = &b.chunks[len(b.chunks)-1]
	}
	*last = (*last)[:len(*last)+1]
	b.n++
	s := &(*last)[len(*last)-1]
	s.Op, s.Do, s.Class, s.Args, s.From = op, b.words, b.class, b.keep(args), b.p.at
	s.Fill, s.Expect, s.labels = NoSlot, -1, [2]label{-1, -1}
	return s
}

// since gives the steps from number n on.
func (b *builder) since(n int) iter.Seq[*Step] {
	return func(yield func(*Step) bool) {
		at := 0
		for _, chunk := range b.chunks {
			for i := range chunk {
				if at++; at > n && !yield(&chunk[i]) {
					return
				}
			}
		}
	}
}

func (b *builder) keep(args []Arg) []Arg {
	if len(args) == 0 {
		return nil
	}
	if len(b.args)+len(args) > cap(b.args) {
		b.args = make([]Arg, 0, max(256, len(args)))
	}
	at := len(b.args)
	b.args = append(b.args, args...)
	return b.args[at:len(b.args):len(b.args)]
}

func (b *builder) call(c sysCall, args ...Arg) *Step {
	s := b.next(Call, args)
	s.Nr, s.Name = c.nr, c.name
	return s
}

func (s *Step) into(slot Slot) *Step            { s.Fill = slot; return s }
func (s *Step) accept(e ...unix.Errno) *Step    { s.Accept = append(s.Accept, e...); return s }
func (s *Step) onFail(l label) *Step            { s.labels[1] = l; return s }
func (s *Step) onOK(l label) *Step              { s.labels[0] = l; return s }
func (s *Step) expect(n int64) *Step            { s.Expect = n; return s }
func (s *Step) says(c ErrClass, t string) *Step { s.Class, s.Text = c, t; return s }

// check compares a 32 bit word that an earlier step left in a buffer.
func (b *builder) check(buf Arg, off uintptr, mask, want uint32, errno unix.Errno) *Step {
	s := b.next(Check, []Arg{buf})
	s.Off, s.Mask, s.Want, s.Errno = uint32(off), uint64(mask), uint64(want), errno
	return s
}

func (b *builder) check64(buf Arg, off uintptr, want uint64, errno unix.Errno) *Step {
	s := b.next(Check, []Arg{buf})
	s.Off, s.Mask, s.Want, s.Wide, s.Errno = uint32(off), ^uint64(0), want, true, errno
	return s
}

func (b *builder) poke(list Arg, off int, v Arg) *Step {
	s := b.next(Poke, []Arg{list, v})
	s.Off = uint32(off)
	return s
}

func (b *builder) load(slot Slot, buf Arg, off int) *Step {
	s := b.next(Load, []Arg{buf}).into(slot)
	s.Off = uint32(off)
	return s
}

func (b *builder) set(slot Slot, v Arg) *Step {
	return b.next(Set, []Arg{v}).into(slot)
}

func (b *builder) fail(e unix.Errno) *Step {
	s := b.next(Fail, nil)
	s.Errno = e
	return s
}

func (b *builder) label() label { b.labels = append(b.labels, -1); return label(len(b.labels) - 1) }
func (b *builder) here(l label) { b.labels[l] = b.n }

// finish resolves labels to indexes.
func (b *builder) finish() []Step {
	out := b.chunks[0]
	if len(b.chunks) > 1 {
		out = slices.Concat(b.chunks...)
	}
	for i := range out {
		s := &out[i]
		s.OnOK, s.OnFail = i+1, i+1
		if l := s.labels[0]; l >= 0 {
			s.OnOK = b.labels[l]
		}
		if l := s.labels[1]; l >= 0 {
			s.OnFail = b.labels[l]
		}
	}
	return out
}

func num[T ~int | ~int32 | ~int64 | ~uint | ~uint32 | ~uint64 | ~uintptr](v T) Arg {
	return Arg{Kind: ArgInt, Int: uint64(v), Slot: NoSlot}
}
func flags(v uint64, text string) Arg {
	return Arg{Kind: ArgInt, Int: v, Str: text, Slot: NoSlot}
}
func str(s string) Arg { return Arg{Kind: ArgString, Str: s, Slot: NoSlot} }
func in(s Slot) Arg    { return Arg{Kind: ArgSlot, Slot: s} }
func data(v []byte, text string) Arg {
	return Arg{Kind: ArgBytes, Str: text, Slot: NoSlot, more: &argMore{bytes: v}}
}

var (
	atCwd = flags(uint64(0xffffffffffffff9c), "AT_FDCWD") // -100
	none  = num(0)
)

// words packs 64 bit words in the machine's order.
func words(v ...uint64) []byte {
	out := make([]byte, 0, 8*len(v))
	for _, w := range v {
		out = binary.NativeEndian.AppendUint64(out, w)
	}
	return out
}

func halves(v ...uint32) []byte {
	out := make([]byte, 0, 4*len(v))
	for _, w := range v {
		out = binary.NativeEndian.AppendUint32(out, w)
	}
	return out
}

// table finds a value by name. A map would be filled when the program starts, also when
// nobody asks.
type table[V any] []struct {
	name  string
	value V
}

func (t table[V]) find(name string) (value V, ok bool) {
	for i := range t {
		if t[i].name == name {
			return t[i].value, true
		}
	}
	return value, false
}

type flagName struct {
	bit  uint64
	name string
}

func flagText(v uint64, names []flagName) string {
	var out []string
	for _, n := range names {
		if v&n.bit == n.bit {
			out = append(out, n.name)
			v &^= n.bit
		}
	}
	if v != 0 || len(out) == 0 {
		out = append(out, fmt.Sprintf("%#x", v))
	}
	return strings.Join(out, "|")
}

var openFlags = []flagName{
	{unix.O_PATH, "O_PATH"}, {unix.O_RDWR, "O_RDWR"}, {unix.O_WRONLY, "O_WRONLY"}, {unix.O_DIRECTORY, "O_DIRECTORY"},
	{unix.O_NOFOLLOW, "O_NOFOLLOW"}, {unix.O_CREAT, "O_CREAT"}, {unix.O_EXCL, "O_EXCL"}, {unix.O_NOCTTY, "O_NOCTTY"},
	{unix.O_NONBLOCK, "O_NONBLOCK"}, {unix.O_TRUNC, "O_TRUNC"}, {unix.O_CLOEXEC, "O_CLOEXEC"},
}

func openFlag(v int) Arg {
	return Arg{Kind: ArgInt, Int: uint64(v), Slot: NoSlot, more: &argMore{text: func() string { return flagText(uint64(v), openFlags) }}}
}

var resolveFlags = []flagName{
	{unix.RESOLVE_IN_ROOT, "IN_ROOT"}, {unix.RESOLVE_NO_MAGICLINKS, "NO_MAGICLINKS"}, {unix.RESOLVE_NO_SYMLINKS, "NO_SYMLINKS"},
	{unix.RESOLVE_BENEATH, "BENEATH"}, {unix.RESOLVE_NO_XDEV, "NO_XDEV"},
}

// inRoot resolves as for a process that is chrooted, and never through a magic link.
const inRoot = unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS

// openIn opens name below the directory in slot dir with openat2(2).
func (b *builder) openIn(dir Slot, name string, flag int, resolve uint64, into Slot) *Step {
	flag |= unix.O_CLOEXEC
	if !defence.InRoot {
		name, resolve = "./"+name, 0
	}
	return b.call(sysOpenat2, in(dir), str(name), openHow(flag, resolve), num(24)).into(into)
}

// openHow lays out a struct open_how.
func openHow(flag int, resolve uint64) Arg {
	a := data(words(uint64(flag), 0, resolve), "")
	a.more.text = func() string {
		return "{" + flagText(uint64(flag), openFlags) + ", 0, " + flagText(resolve, resolveFlags) + "}"
	}
	return a
}
