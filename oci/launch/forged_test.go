//go:build linux && (amd64 || arm64)

package launch

import (
	"encoding/binary"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/plan"
)

// The clone in the container's PID namespace holds the socket, and the container may trace
// it: a process id that does not come from the runtime's own child is a forgery.
func TestForgedProcessID(t *testing.T) {
	t.Parallel()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	if err := unix.SetsockoptInt(pair[0], unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		t.Fatal(err)
	}
	const child = 1 << 21 // nobody, and not this test
	r := &runner{p: &plan.Plan{LoaderForks: true}, sync: pair[0], proc: &Process{Pid: child}}
	word := binary.NativeEndian.AppendUint32(nil, uint32(0xffffffff+plan.MsgPid+1))
	word = binary.NativeEndian.AppendUint32(word, 1)
	if _, err := unix.Write(pair[1], word); err != nil {
		t.Fatal(err)
	}
	if err := r.expect(0); err == nil || !strings.Contains(err.Error(), "a process id came from process") {
		t.Errorf("a forged process id: %v", err)
	}
	if r.proc.Pid != child {
		t.Errorf("the process is %d now", r.proc.Pid)
	}
}
