//go:build linux

package plan

import (
	"encoding/binary"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/defence"
)

// builder collects the steps of a program.
type builder struct {
	p      *Plan
	steps  []*Step
	labels []int
	words  Words // Do of the next steps
	class  ErrClass
	names  map[string]Slot
}

func newBuilder(p *Plan, names map[string]Slot) *builder {
	return &builder{p: p, names: names}
}

// do sets the sentence of the steps that follow.
func (b *builder) do(format string, a ...any) {
	b.words, b.class = Words{format, a}, ClassSystem
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

func (b *builder) add(s *Step) *Step {
	s.Do, s.Class, s.From = b.words, b.class, b.p.at
	s.Fill, s.Expect = NoSlot, -1
	s.labels = [2]label{-1, -1}
	b.steps = append(b.steps, s)
	return s
}

func (b *builder) call(c sysCall, args ...Arg) *Step {
	return b.add(&Step{Op: Call, Nr: c.nr, Name: c.name, Args: args})
}

func (s *Step) into(slot Slot) *Step            { s.Fill = slot; return s }
func (s *Step) accept(e ...unix.Errno) *Step    { s.Accept = append(s.Accept, e...); return s }
func (s *Step) acceptAny() *Step                { s.Any = true; return s }
func (s *Step) onFail(l label) *Step            { s.labels[1] = l; return s }
func (s *Step) onOK(l label) *Step              { s.labels[0] = l; return s }
func (s *Step) expect(n int64) *Step            { s.Expect = n; return s }
func (s *Step) says(c ErrClass, t string) *Step { s.Class, s.Text = c, t; return s }

// check compares a 32 bit word that an earlier step left in a buffer.
func (b *builder) check(buf Arg, off uintptr, mask, want uint32, errno unix.Errno) *Step {
	s := b.add(&Step{Op: Check, Args: []Arg{buf}, Off: uint32(off), Mask: uint64(mask), Want: uint64(want), Errno: errno})
	return s
}

func (b *builder) check64(buf Arg, off uintptr, want uint64, errno unix.Errno) *Step {
	return b.add(&Step{Op: Check, Args: []Arg{buf}, Off: uint32(off), Mask: ^uint64(0), Want: want, Wide: true, Errno: errno})
}

func (b *builder) poke(list Arg, off int, v Arg) *Step {
	return b.add(&Step{Op: Poke, Args: []Arg{list, v}, Off: uint32(off)})
}

func (b *builder) set(slot Slot, v Arg) *Step {
	return b.add(&Step{Op: Set, Args: []Arg{v}}).into(slot)
}

func (b *builder) fail(e unix.Errno) *Step { return b.add(&Step{Op: Fail, Errno: e}) }

// skip goes to l unconditionally.
func (b *builder) skip(l label) *Step {
	return b.add(&Step{Op: Branch, Args: []Arg{num(0)}}).onOK(l)
}

func (b *builder) label() label { b.labels = append(b.labels, -1); return label(len(b.labels) - 1) }
func (b *builder) here(l label) { b.labels[l] = len(b.steps) }

// finish resolves labels to indexes.
func (b *builder) finish() []Step {
	out := make([]Step, len(b.steps))
	for i, s := range b.steps {
		s.OnOK, s.OnFail = i+1, i+1
		if l := s.labels[0]; l >= 0 {
			s.OnOK = b.labels[l]
		}
		if l := s.labels[1]; l >= 0 {
			s.OnFail = b.labels[l]
		}
		out[i] = *s
	}
	return out
}

func num[T ~int | ~int32 | ~int64 | ~uint | ~uint32 | ~uint64 | ~uintptr](v T) Arg {
	return Arg{Kind: ArgInt, Int: uint64(v), Slot: NoSlot}
}
func flags(v uint64, text string) Arg {
	return Arg{Kind: ArgInt, Int: v, Str: text, Slot: NoSlot}
}
func str(s string) Arg    { return Arg{Kind: ArgString, Str: s, Slot: NoSlot} }
func in(s Slot) Arg       { return Arg{Kind: ArgSlot, Slot: s} }
func list(v []string) Arg { return Arg{Kind: ArgStrings, Strs: v, Slot: NoSlot} }
func data(v []byte, text string) Arg {
	return Arg{Kind: ArgBytes, Bytes: v, Str: text, Slot: NoSlot}
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
	return Arg{Kind: ArgInt, Int: uint64(v), Slot: NoSlot, text: func() string { return flagText(uint64(v), openFlags) }}
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
	a.text = func() string {
		return "{" + flagText(uint64(flag), openFlags) + ", 0, " + flagText(resolve, resolveFlags) + "}"
	}
	return a
}
