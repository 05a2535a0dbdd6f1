#include "textflag.h"
#include "go_asm.h"

DATA oneProc<>+0(SB)/8, $"GOMAXPRO"
DATA oneProc<>+8(SB)/8, $"CS=1\x00\x00\x00\x00"
GLOBL oneProc<>(SB), RODATA|NOPTR, $16
DATA noGC<>+0(SB)/8, $"GOGC=off"
DATA noGC<>+8(SB)/8, $"\x00\x00\x00\x00\x00\x00\x00\x00"
GLOBL noGC<>(SB), RODATA|NOPTR, $16

// entry(SB): see entry_amd64.s.
TEXT ·entry(SB), NOSPLIT|NOFRAME, $0
	// beforeRuntime(stack), by Go's internal calling convention: the argument in R0, the
	// goroutine in R28, and room on the stack for the argument.
	MOVD	RSP, R0
	MOVD	$·noG(SB), g
	MOVD	·beforeRuntime(SB), R26
	MOVD	(R26), R1
	SUB	$64, RSP
	BL	(R1)
	ADD	$64, RSP

	MOVD	$30, R0  // PR_GET_TIMERSLACK
	MOVD	$167, R8 // prctl
	SVC
	MOVD	R0, ·ownSlack(SB)
	MOVD	$29, R0 // PR_SET_TIMERSLACK
	MOVD	$const_monitorSlack, R1
	SVC

	MOVD	$2, R9
open:
	MOVD	R9, R0 // fcntl(R9, F_GETFD)
	MOVD	$1, R1
	MOVD	$25, R8
	SVC
	TBNZ	$63, R0, start
	SUBS	$1, R9
	BPL	open
	MOVD	$0, R0 // prlimit64(0, RLIMIT_NOFILE, nil, &ownFiles)
	MOVD	$7, R1
	MOVD	$0, R2
	MOVD	$·ownFiles(SB), R3
	MOVD	$261, R8
	SVC
	CBNZ	R0, start
	MOVD	·ownFiles+8(SB), R3
	MOVD	R3, ·noFiles+8(SB)
	MOVD	$0, R0 // prlimit64(0, RLIMIT_NOFILE, &noFiles, nil)
	MOVD	$7, R1
	MOVD	$·noFiles(SB), R2
	MOVD	$0, R3
	MOVD	$261, R8
	SVC

start:
	MOVD	0(RSP), R0
	MOVD	RSP, R1
	SUB	$16, RSP
	MOVD	RSP, R2
	ADD	$2, R0 // argc itself, and the null behind argv
move:
	MOVD.P	8(R1), R3
	MOVD.P	R3, 8(R2)
	SUB	$1, R0
	CBNZ	R0, move
	MOVD	$oneProc<>(SB), R3
	MOVD	R3, 0(R2)
	MOVD	$noGC<>(SB), R3
	MOVD	R3, 8(R2)
	JMP	_rt0_arm64_linux(SB)
