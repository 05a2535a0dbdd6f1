#include "textflag.h"

// func clone3(args unsafe.Pointer, size, start uintptr, p *loaded) (r uintptr)
//
// See clone_amd64.s. The argument of start is in R0.
TEXT ·clone3(SB), NOSPLIT|NOFRAME, $0-40
	MOVD	args+0(FP), R0
	MOVD	size+8(FP), R1
	MOVD	start+16(FP), R9
	MOVD	p+24(FP), R10
	MOVD	$435, R8
	SVC
	CBZ	R0, child
	MOVD	R0, r+32(FP)
	RET
child:
	MOVD	ZR, R29
	MOVD	R10, R0
	CALL	(R9)
	BRK
