#include "textflag.h"

// forwardSignal(SB) is the handler of the signals that attend forwards: one
// pidfd_send_signal(2). It uses no stack and no Go.
TEXT ·forwardSignal(SB), NOSPLIT|NOFRAME, $0
	MOVW	R0, R1
	MOVW	·forwardTo(SB), R0
	MOVD	$0, R2
	MOVD	$0, R3
	MOVD	$424, R8 // pidfd_send_signal
	SVC
	RET

// forwardReturn(SB) is where the handler returns to: rt_sigreturn(2).
TEXT ·forwardReturn(SB), NOSPLIT|NOFRAME, $0
	MOVD	$139, R8
	SVC
	UNDEF

TEXT ·forwardCode(SB), NOSPLIT, $0-16
	MOVD	$·forwardSignal(SB), R0
	MOVD	R0, handler+0(FP)
	MOVD	$·forwardReturn(SB), R0
	MOVD	R0, restorer+8(FP)
	RET
