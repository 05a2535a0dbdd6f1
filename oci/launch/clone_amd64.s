#include "textflag.h"

// func clone3(args unsafe.Pointer, size, start uintptr, p *loaded) (r uintptr)
//
// The child has a stack of its own. It calls start, the code of a Go function that takes p
// (in AX, with X15 zero: Go's internal calling convention), and never returns.
TEXT ·clone3(SB), NOSPLIT, $0-40
	MOVQ	args+0(FP), DI
	MOVQ	size+8(FP), SI
	MOVQ	start+16(FP), R12
	MOVQ	p+24(FP), R13
	MOVL	$435, AX
	SYSCALL
	TESTQ	AX, AX
	JEQ	child
	MOVQ	AX, r+32(FP)
	RET
child:
	XORL	BP, BP
	XORPS	X15, X15
	MOVQ	R13, AX
	CALL	R12
	INT	$3
