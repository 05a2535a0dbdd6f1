#include "textflag.h"
#include "go_asm.h"

DATA oneProc<>+0(SB)/8, $"GOMAXPRO"
DATA oneProc<>+8(SB)/8, $"CS=1\x00\x00\x00\x00"
GLOBL oneProc<>(SB), RODATA|NOPTR, $16

// entry(SB) is where a hako-oci of `make build` begins (the linker's flag -E main.entry).
// It does two things that come too late once the Go runtime has started, and goes on as
// ever.
//
// It sets the timer slack, which the Go runtime's monitor thread inherits: see quiet.go.
//
// It puts GOMAXPROCS=1 in front of the environment: the Go runtime then makes room for one
// processor, and wakes no threads to look for work that is not there. argc and argv move
// two words down the stack for it. The word is there twice because the stack stays aligned
// to 16 bytes.
TEXT ·entry(SB), NOSPLIT|NOFRAME, $0
	MOVL	$157, AX // prctl
	MOVL	$30, DI  // PR_GET_TIMERSLACK
	SYSCALL
	MOVQ	AX, ·ownSlack(SB)
	MOVL	$157, AX
	MOVL	$29, DI // PR_SET_TIMERSLACK
	MOVL	$const_monitorSlack, SI
	SYSCALL

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
