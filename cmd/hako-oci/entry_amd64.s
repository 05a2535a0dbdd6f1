#include "textflag.h"
#include "go_asm.h"

DATA oneProc<>+0(SB)/8, $"GOMAXPRO"
DATA oneProc<>+8(SB)/8, $"CS=1\x00\x00\x00\x00"
GLOBL oneProc<>(SB), RODATA|NOPTR, $16
DATA noGC<>+0(SB)/8, $"GOGC=off"
DATA noGC<>+8(SB)/8, $"\x00\x00\x00\x00\x00\x00\x00\x00"
GLOBL noGC<>(SB), RODATA|NOPTR, $16

// entry(SB) is where a hako-oci of `make build` begins (the linker's flag -E main.entry).
// It does what comes too late once the Go runtime has started, and goes on as ever. See
// quiet.go.
//
//   - It starts, kills and deletes usual containers, and exits: see package early.
//   - It sets the timer slack, which the Go runtime's threads inherit.
//   - It takes away the descriptors, if those below 3 are open, until main gives them back:
//     the Go runtime reads mountinfo, whatever GOMAXPROCS says, and does without if it
//     cannot.
//   - It puts GOMAXPROCS=1 and GOGC=off in front of the environment: the Go runtime then
//     makes room for one processor, and wakes no threads to look for work that is not
//     there. argc and argv move two words down the stack for it, which stays aligned to 16
//     bytes.
TEXT ·entry(SB), NOSPLIT|NOFRAME, $0
	// beforeRuntime(stack), by Go's internal calling convention: the argument in AX, the
	// goroutine in R14, X15 zero, and room on the stack for the argument.
	MOVQ	SP, AX
	LEAQ	·noG(SB), R14
	XORPS	X15, X15
	MOVQ	·beforeRuntime(SB), DX
	MOVQ	(DX), R12
	SUBQ	$64, SP
	CALL	R12
	ADDQ	$64, SP

	MOVL	$157, AX // prctl
	MOVL	$30, DI  // PR_GET_TIMERSLACK
	SYSCALL
	MOVQ	AX, ·ownSlack(SB)
	MOVL	$157, AX
	MOVL	$29, DI // PR_SET_TIMERSLACK
	MOVL	$const_monitorSlack, SI
	SYSCALL

	MOVL	$2, R12
open:
	MOVL	$72, AX // fcntl(R12, F_GETFD)
	MOVL	R12, DI
	MOVL	$1, SI
	SYSCALL
	TESTQ	AX, AX
	JLT	start
	DECL	R12
	JGE	open
	MOVL	$302, AX // prlimit64(0, RLIMIT_NOFILE, nil, &ownFiles)
	XORL	DI, DI
	MOVL	$7, SI
	XORL	DX, DX
	LEAQ	·ownFiles(SB), R10
	SYSCALL
	TESTQ	AX, AX
	JNE	start
	MOVQ	·ownFiles+8(SB), AX
	MOVQ	AX, ·noFiles+8(SB)
	MOVL	$302, AX // prlimit64(0, RLIMIT_NOFILE, &noFiles, nil)
	XORL	DI, DI
	MOVL	$7, SI
	LEAQ	·noFiles(SB), DX
	XORL	R10, R10
	SYSCALL

start:
	MOVQ	0(SP), CX
	MOVQ	SP, SI
	SUBQ	$16, SP
	MOVQ	SP, DI
	ADDQ	$2, CX // argc itself, and the null behind argv
	CLD
	REP; MOVSQ
	LEAQ	oneProc<>(SB), AX
	MOVQ	AX, 0(DI)
	LEAQ	noGC<>(SB), AX
	MOVQ	AX, 8(DI)
	JMP	_rt0_amd64_linux(SB)
