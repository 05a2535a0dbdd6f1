#include "textflag.h"

// The code of the loader: see loader.go. It is copied into a file of its own and runs
// there at a fixed address, so it refers to nothing but its configuration (at 0x4000b0)
// and the stack that execve(2) has made: argc, path, argv..., 0, envp..., 0.
//
// configuration: 0 report, 4 flags (1: clone once more, 2: wait for start,
// 4: take the terminal),
// 8 seccomp flags, 12 sync, 16 start, 24 sock_fprog

TEXT loader<>(SB), NOSPLIT|NOFRAME, $0
	MOVQ SP, R12
	MOVL $0x4000b0, R13
	SUBQ $64, SP
	MOVL 12(R13), R14    // where words go
	MOVL $126, BX
	MOVL $72, AX         // fcntl(sync, F_GETFD): closed if it is not the runtime who
	MOVL R14, DI         // executes this, but a script that names /proc/self/exe
	MOVL $1, SI
	SYSCALL
	CMPQ AX, $0
	JLT  exit
	MOVL 4(R13), AX
	TESTL $1, AX
	JZ   hold
	MOVL $56, AX         // clone(CLONE_PARENT|SIGCHLD)
	MOVL $0x8011, DI
	XORL SI, SI
	XORL DX, DX
	XORL R10, R10
	XORL R8, R8
	MOVL $-8, BX         // what failed
	SYSCALL
	CMPQ AX, $0
	JLT  fail
	JEQ  session
	MOVL $-4, 0(SP)      // plan.MsgPid
	MOVL AX, 4(SP)
	XORL BX, BX          // exit status
	JMP  report

session:
	MOVL $-10, BX
	MOVL $112, AX        // setsid
	SYSCALL
	CMPQ AX, $0
	JLT  fail
	MOVL 4(R13), AX
	TESTL $4, AX
	JZ   hold
	MOVL $16, AX         // ioctl(0, TIOCSCTTY, 0)
	XORL DI, DI
	MOVL $0x540e, SI
	XORL DX, DX
	SYSCALL
	CMPQ AX, $0
	JLT  fail

hold:
	MOVL 4(R13), AX
	TESTL $2, AX
	JZ   filter
	MOVL $-9, BX
	MOVL $1, AX          // write(sync, {plan.MsgReady, 0}, 8)
	MOVL R14, DI
	MOVL $-3, 0(SP)
	MOVL $0, 4(SP)
	MOVQ SP, SI
	MOVL $8, DX
	SYSCALL
	CMPQ AX, $0
	JLT  fail
	MOVL $3, AX          // close(sync)
	MOVL R14, DI
	SYSCALL
	MOVL 0(R13), R14
again:
	XORL AX, AX          // read(start, SP, 1)
	MOVL 16(R13), DI
	MOVQ SP, SI
	MOVL $1, DX
	SYSCALL
	CMPQ AX, $-4         // EINTR
	JEQ  again
	CMPQ AX, $1
	JNE  fail
	MOVL $3, AX          // close(start)
	MOVL 16(R13), DI
	SYSCALL

filter:
	CMPW 24(R13), $0
	JEQ  exec
	MOVL $317, AX        // seccomp(SECCOMP_SET_MODE_FILTER, flags, &fprog)
	MOVL $1, DI
	MOVL 8(R13), SI
	LEAQ 24(R13), DX
	MOVL $-7, BX
	SYSCALL
	CMPQ AX, $0
	JLT  fail

exec:
	MOVL $72, AX         // fcntl(report, F_SETFD, FD_CLOEXEC)
	MOVL 0(R13), DI
	MOVL $2, SI
	MOVL $1, DX
	MOVL $-5, BX
	SYSCALL
	CMPQ AX, $0
	JLT  fail
	MOVQ 0(R12), CX      // argc
	MOVQ 8(R12), DI
	LEAQ 16(R12), SI
	LEAQ 16(R12)(CX*8), DX
	MOVL $59, AX         // execve(path, argv, envp)
	SYSCALL

fail:
	NEGL AX
	MOVL BX, 0(SP)
	MOVL AX, 4(SP)
	MOVL $255, BX

report:
	MOVL $1, AX          // write(words, SP, 8)
	MOVL R14, DI
	MOVQ SP, SI
	MOVL $8, DX
	SYSCALL

exit:
	MOVL $231, AX        // exit_group
	MOVL BX, DI
	SYSCALL
	INT  $3

TEXT loaderEnd<>(SB), NOSPLIT|NOFRAME, $0
	RET

// func loaderText() (start, end uintptr)
TEXT ·loaderText(SB), NOSPLIT, $0-16
	LEAQ loader<>(SB), AX
	MOVQ AX, start+0(FP)
	LEAQ loaderEnd<>(SB), AX
	MOVQ AX, end+8(FP)
	RET
