//go:build linux

package seccomp

import (
	"encoding/binary"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data. Its numbers are in the machine's byte order; amd64
// and arm64 are little-endian.
const (
	offNr   = 0
	offArch = 4
	offArgs = 16
)

// maxJump is how far a conditional jump goes: its offsets have eight bits.
const maxJump = 255

// builder writes a program from its end to its beginning. An instruction is known by
// its distance from the end, which does not change as more are written before it.
type builder struct {
	rev   []unix.SockFilter
	rets  map[uint32]int // the last "return" of each answer
	full  bool           // there is no room for more
	progs map[string]int // argument checks that are written already
}

func (b *builder) push(op uint16, jt, jf uint8, k uint32) int {
	if len(b.rev) >= MaxInstructions {
		b.full = true
		return len(b.rev) - 1
	}
	b.rev = append(b.rev, unix.SockFilter{Code: op, Jt: jt, Jf: jf, K: k})
	return len(b.rev) - 1
}

// offset is what an instruction that is written next has to jump to reach target.
func (b *builder) offset(target int) int { return len(b.rev) - target - 1 }

// ret gives an instruction that returns the answer and can be reached from here.
func (b *builder) ret(answer uint32) int {
	if at, ok := b.rets[answer]; ok && b.offset(at) <= maxJump/2 {
		return at
	}
	if b.rets == nil {
		b.rets = map[uint32]int{}
	}
	b.rets[answer] = b.push(unix.BPF_RET|unix.BPF_K, 0, 0, answer)
	return b.rets[answer]
}

// near gives target, or a jump to it where a conditional one could not reach it.
func (b *builder) near(target int) int {
	if b.offset(target) > maxJump-2 { // two: the other target's jump, and some
		return b.push(unix.BPF_JMP|unix.BPF_JA, 0, 0, uint32(b.offset(target)))
	}
	return target
}

// jump compares the accumulator with k.
func (b *builder) jump(op uint16, k uint32, yes, no int) int {
	if yes == no {
		return yes
	}
	yes = b.near(yes)
	no = b.near(no)
	return b.push(unix.BPF_JMP|op|unix.BPF_K, uint8(b.offset(yes)), uint8(b.offset(no)), k)
}

// straight gives target if what is written next runs into it, or a jump to it.
func (b *builder) straight(target int) {
	if b.offset(target) > 0 {
		b.push(unix.BPF_JMP|unix.BPF_JA, 0, 0, uint32(b.offset(target)))
	}
}

// load puts 32 bits of seccomp_data into the accumulator.
func (b *builder) load(offset uint32, next int) int {
	b.straight(next)
	return b.push(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, 0, 0, offset)
}

func (b *builder) and(mask uint32, next int) int {
	b.straight(next)
	return b.push(unix.BPF_ALU|unix.BPF_AND|unix.BPF_K, 0, 0, mask)
}

func (b *builder) program() []unix.SockFilter {
	slices.Reverse(b.rev)
	return b.rev
}

// arch writes the part for one architecture.
func (b *builder) arch(a arch, p *profile) int {
	return b.load(offNr, b.tree(p.spans(a)))
}

// tree searches for the accumulator in the spans, halving them at each step.
func (b *builder) tree(s []span) int {
	switch {
	case b.full:
		return len(b.rev) - 1
	case len(s) == 1:
		return b.outcome(s[0].outcome)
	case len(s) == 3 && s[2].start-s[1].start == 1 && s[0].equal(s[2].outcome):
		// One number among others of one kind: a comparison less than by halving.
		no := b.outcome(s[0].outcome)
		yes := b.outcome(s[1].outcome)
		return b.jump(unix.BPF_JEQ, s[1].start, yes, no)
	}
	half := len(s) / 2
	yes := b.tree(s[half:])
	no := b.tree(s[:half])
	return b.jump(unix.BPF_JGE, s[half].start, yes, no)
}

// outcome writes the branches; the first one comes last.
func (b *builder) outcome(o outcome) int {
	if len(o.branches) == 0 {
		return b.ret(o.ret)
	}
	key := o.key()
	if at, ok := b.progs[key]; ok {
		return at
	}
	next := b.ret(o.ret)
	for _, br := range slices.Backward(o.branches) {
		if b.full {
			break
		}
		yes := b.ret(br.ret)
		// A fresh "return" may have come between, which moves nothing: next is a place.
		for _, c := range slices.Backward(br.conds) {
			yes = b.cond(c, yes, next)
		}
		next = yes
	}
	if b.progs == nil {
		b.progs = map[string]int{}
	}
	b.progs[key] = next
	return next
}

// key is the same for outcomes that are equal.
func (o outcome) key() string {
	k := binary.LittleEndian.AppendUint32(nil, o.ret)
	for _, br := range o.branches {
		k = binary.LittleEndian.AppendUint32(append(k, '|'), br.ret)
		for _, c := range br.conds {
			k = append(append(k, byte(c.index)), c.op...)
			k = binary.LittleEndian.AppendUint64(k, c.value)
			k = binary.LittleEndian.AppendUint64(k, c.value2)
		}
	}
	return string(k)
}

// cond compares an argument, by halves: a filter's accumulator has 32 bits.
func (b *builder) cond(c cond, yes, no int) int {
	low, high := offArgs+8*uint32(c.index), offArgs+8*uint32(c.index)+4
	vlow, vhigh := uint32(c.value), uint32(c.value>>32)
	switch c.op {
	case specs.OpNotEqual:
		c.op, yes, no = specs.OpEqualTo, no, yes
	case specs.OpLessThan:
		c.op, yes, no = specs.OpGreaterEqual, no, yes
	case specs.OpLessEqual:
		c.op, yes, no = specs.OpGreaterThan, no, yes
	}
	switch c.op {
	case specs.OpEqualTo:
		at := b.load(low, b.jump(unix.BPF_JEQ, vlow, yes, no))
		return b.load(high, b.jump(unix.BPF_JEQ, vhigh, at, no))
	case specs.OpMaskedEqual: // (argument & value) == value2
		if c.value2&^c.value != 0 {
			return no
		}
		wlow, whigh := uint32(c.value2), uint32(c.value2>>32)
		at := yes
		if vlow != 0 {
			at = b.load(low, b.and(vlow, b.jump(unix.BPF_JEQ, wlow, yes, no)))
		}
		if vhigh != 0 {
			at = b.load(high, b.and(vhigh, b.jump(unix.BPF_JEQ, whigh, at, no)))
		}
		return at
	}
	op := uint16(unix.BPF_JGE)
	if c.op == specs.OpGreaterThan {
		op = unix.BPF_JGT
	}
	at := b.load(low, b.jump(op, vlow, yes, no))
	return b.load(high, b.jump(unix.BPF_JGT, vhigh, yes, b.jump(unix.BPF_JEQ, vhigh, at, no)))
}
