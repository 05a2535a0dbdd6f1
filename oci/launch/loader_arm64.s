#include "textflag.h"

// See loader_amd64.s.

TEXT loader<>(SB), NOSPLIT|NOFRAME, $0
	MOVD RSP, R19
	MOVD $0x4000b0, R20
	SUB  $64, RSP
	MOVWU 12(R20), R22   // where words go
	MOVD $126, R21
	MOVD R22, R0         // fcntl(sync, F_GETFD): see loader_amd64.s
	MOVD $1, R1
	MOVD $25, R8
	SVC
	CMP  $0, R0
	BLT  exit
	MOVWU 4(R20), R0
	TBZ  $0, R0, hold
	MOVD $0x8011, R0     // clone(CLONE_PARENT|SIGCHLD)
	MOVD ZR, R1
	MOVD ZR, R2
	MOVD ZR, R3
	MOVD ZR, R4
	MOVD $-8, R21        // what failed
	MOVD $220, R8
	SVC
	CMP  $0, R0
	BLT  fail
	BEQ  session
	MOVD $-4, R1         // plan.MsgPid
	MOVW R1, 0(RSP)
	MOVW R0, 4(RSP)
	MOVD ZR, R21         // exit status
	B    report

session:
	MOVD $-10, R21
	MOVD $157, R8        // setsid
	SVC
	CMP  $0, R0
	BLT  fail
	MOVWU 4(R20), R0
	TBZ  $2, R0, hold
	MOVD ZR, R0          // ioctl(0, TIOCSCTTY, 0)
	MOVD $0x540e, R1
	MOVD ZR, R2
	MOVD $29, R8
	SVC
	CMP  $0, R0
	BLT  fail

hold:
	MOVWU 4(R20), R0
	TBZ  $1, R0, filter
	MOVD $-9, R21
	MOVD $-3, R1         // write(sync, {plan.MsgReady, 0}, 8)
	MOVW R1, 0(RSP)
	MOVW ZR, 4(RSP)
	MOVD R22, R0
	MOVD RSP, R1
	MOVD $8, R2
	MOVD $64, R8
	SVC
	CMP  $0, R0
	BLT  fail
	MOVD R22, R0         // close(sync)
	MOVD $57, R8
	SVC
	MOVWU 0(R20), R22
again:
	MOVWU 16(R20), R0    // read(start, RSP, 1)
	MOVD RSP, R1
	MOVD $1, R2
	MOVD $63, R8
	SVC
	CMN  $4, R0          // EINTR
	BEQ  again
	CMP  $1, R0
	BNE  fail
	MOVWU 16(R20), R0    // close(start)
	MOVD $57, R8
	SVC

filter:
	MOVHU 24(R20), R0
	CBZ  R0, exec
	MOVD $1, R0          // seccomp(SECCOMP_SET_MODE_FILTER, flags, &fprog)
	MOVWU 8(R20), R1
	ADD  $24, R20, R2
	MOVD $-7, R21
	MOVD $277, R8
	SVC
	CMP  $0, R0
	BLT  fail

exec:
	MOVWU 0(R20), R0     // fcntl(report, F_SETFD, FD_CLOEXEC)
	MOVD $2, R1
	MOVD $1, R2
	MOVD $-5, R21
	MOVD $25, R8
	SVC
	CMP  $0, R0
	BLT  fail
	MOVD 0(R19), R3      // argc
	MOVD 8(R19), R0
	ADD  $16, R19, R1
	ADD  R3<<3, R1, R2
	MOVD $221, R8        // execve(path, argv, envp)
	SVC

fail:
	NEG  R0, R0
	MOVW R21, 0(RSP)
	MOVW R0, 4(RSP)
	MOVD $255, R21

report:
	MOVD R22, R0         // write(words, RSP, 8)
	MOVD RSP, R1
	MOVD $8, R2
	MOVD $64, R8
	SVC

exit:
	MOVD R21, R0         // exit_group
	MOVD $94, R8
	SVC
	BRK

TEXT loaderEnd<>(SB), NOSPLIT|NOFRAME, $0
	RET

// func loaderText() (start, end uintptr)
TEXT ·loaderText(SB), NOSPLIT, $0-16
	MOVD $loader<>(SB), R0
	MOVD R0, start+0(FP)
	MOVD $loaderEnd<>(SB), R0
	MOVD R0, end+8(FP)
	RET
