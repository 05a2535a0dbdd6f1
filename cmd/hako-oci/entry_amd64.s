#include "textflag.h"

DATA oneProc<>+0(SB)/8, $"GOMAXPRO"
DATA oneProc<>+8(SB)/8, $"CS=1\x00\x00\x00\x00"
GLOBL oneProc<>(SB), RODATA|NOPTR, $16

// entry(SB) is where a hako-oci of `make build` begins (the linker's flag -E main.entry).
// It puts GOMAXPROCS=1 in front of the environment and goes on as ever: the Go runtime
// then makes room for one processor, and wakes no threads to look for work that is not
// there. Once the process runs that is paid for already.
//
// argc and argv move two words down the stack. The word is there twice because the stack
// stays aligned to 16 bytes.
TEXT ·entry(SB), NOSPLIT|NOFRAME, $0
	MOVQ	0(SP), CX
	MOVQ	SP, SI
	SUBQ	$16, SP
	MOVQ	SP, DI
	ADDQ	$2, CX // argc itself, and the null behind argv
	CLD
	REP; MOVSQ
	LEAQ	oneProc<>(SB), AX
	MOVQ	AX, 0(DI)
	MOVQ	AX, 8(DI)
	JMP	_rt0_amd64_linux(SB)
