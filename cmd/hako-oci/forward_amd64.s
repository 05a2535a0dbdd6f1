#include "textflag.h"

// forwardSignal(SB) is the handler of the signals that attend forwards: one
// pidfd_send_signal(2). It uses no stack and no Go.
TEXT ·forwardSignal(SB), NOSPLIT|NOFRAME, $0
	MOVL	DI, SI
	MOVL	·forwardTo(SB), DI
	XORL	DX, DX
	XORL	R10, R10
	MOVL	$424, AX // pidfd_send_signal
	SYSCALL
	RET

// forwardReturn(SB) is where the handler returns to: rt_sigreturn(2).
TEXT ·forwardReturn(SB), NOSPLIT|NOFRAME, $0
	MOVL	$15, AX
	SYSCALL
	INT	$3

TEXT ·forwardCode(SB), NOSPLIT, $0-16
	LEAQ	·forwardSignal(SB), AX
	MOVQ	AX, handler+0(FP)
	LEAQ	·forwardReturn(SB), AX
	MOVQ	AX, restorer+8(FP)
	RET
