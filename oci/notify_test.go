//go:build linux && (amd64 || arm64)

package oci

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// agent is a seccomp agent that answers every call with an errno.
type agent struct {
	path   string
	mu     sync.Mutex
	states []specs.ContainerProcessState
	fds    []int // that came with each
}

// The requests and structures of seccomp_unotify(2).
const (
	notifRecv = 0xc0502100
	notifSend = 0xc0182101
)

func newAgent(t *testing.T, errno unix.Errno) *agent {
	t.Helper()
	a := &agent{path: filepath.Join(t.TempDir(), strings.Repeat("long", 30), "agent.sock")}
	if err := os.MkdirAll(filepath.Dir(a.path), 0o755); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(filepath.Dir(a.path))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: "/proc/self/fd/" + itoa(int(dir.Fd())) + "/agent.sock"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			go a.serve(c, errno)
		}
	}()
	return a
}

func itoa(n int) string { b, _ := json.Marshal(n); return string(b) }

func (a *agent) serve(c *net.UnixConn, errno unix.Errno) {
	defer c.Close()
	buf, oob := make([]byte, 1<<16), make([]byte, 256)
	n, oobn, _, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return
	}
	for {
		k, err := c.Read(buf[n:])
		if n += k; err != nil {
			break
		}
	}
	var st specs.ContainerProcessState
	json.Unmarshal(buf[:n], &st)
	var fds []int
	if msgs, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil && len(msgs) == 1 {
		fds, _ = unix.ParseUnixRights(&msgs[0])
	}
	a.mu.Lock()
	a.states, a.fds = append(a.states, st), append(a.fds, len(fds))
	a.mu.Unlock()
	if len(fds) != 1 {
		return
	}
	defer unix.Close(fds[0])
	for {
		var req [80]byte
		_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fds[0]), notifRecv, uintptr(unsafe.Pointer(&req)))
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return // the last process is gone
		}
		var resp [24]byte // id, value, error, flags
		copy(resp[:8], req[:8])
		*(*int32)(unsafe.Pointer(&resp[16])) = -int32(errno)
		unix.Syscall(unix.SYS_IOCTL, uintptr(fds[0]), notifSend, uintptr(unsafe.Pointer(&resp)))
	}
}

func notifyProfile(path string) *specs.LinuxSeccomp {
	return &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow, ListenerPath: path, ListenerMetadata: "meta",
		Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdirat", "mkdir"}, Action: specs.ActNotify}},
	}
}

func TestSeccompNotify(t *testing.T) {
	t.Parallel()
	for _, nnp := range []bool{false, true} {
		a := newAgent(t, unix.ELIBBAD)
		b := newBox(t)
		b.spec.Process.NoNewPrivileges = nnp
		b.spec.Annotations = map[string]string{"key": "value"}
		b.spec.Linux.Seccomp = notifyProfile(a.path)
		c, o := b.start("mkdir", "/tmp/x", "sleep", "3600")
		out, _, err := b.exec(c, nil, "mkdir", "/tmp/y")
		if err != nil {
			t.Fatal(err)
		}
		const refused = "accessing a corrupted shared library"
		same(t, out, "error: mkdir /tmp/y: "+refused)
		o.await(t, "/tmp/x: "+refused)
		a.mu.Lock()
		if len(a.states) != 2 {
			t.Fatalf("the agent got %d states", len(a.states))
		}
		if a.states[0].State.Status == specs.StateRunning { // connections are served side by side
			slices.Reverse(a.states)
		}
		for i, want := range []string{"creating", "running"} {
			st := a.states[i]
			if a.fds[i] != 1 || len(st.Fds) != 1 || st.Fds[0] != "seccompFd" || st.Metadata != "meta" || st.Version == "" || st.State.ID != b.id ||
				string(st.State.Status) != want || st.State.Pid != c.Pid() || st.State.Bundle != b.bundle || st.State.Annotations["key"] != "value" {
				t.Errorf("state %d: %+v with %d descriptors", i, st, a.fds[i])
			}
			if (st.Pid == c.Pid()) != (i == 0) || st.Pid == 0 {
				t.Errorf("state %d is of process %d, the first one is %d", i, st.Pid, c.Pid())
			}
		}
		a.mu.Unlock()
	}
}

func TestSeccompNotifyOfWhatTheRuntimeDoes(t *testing.T) {
	t.Parallel()
	a := newAgent(t, unix.ENOSYS)
	b := newBox(t)
	b.spec.Linux.Seccomp = notifyProfile(a.path)
	b.args("sleep", "3600")
	c, _ := b.start("sleep", "3600")
	// The loader clones once more in exec: the agent must have the listener by then.
	s := *b.spec
	s.Linux.Seccomp.Syscalls[0].Names = append(s.Linux.Seccomp.Syscalls[0].Names, "setsid")
	raw, err := json.Marshal(&s)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.dir, configFile), raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.exec(c, nil, "true"); err == nil || !strings.Contains(err.Error(), "start a session") {
		t.Errorf("setsid, which the agent refuses: %v", err)
	}
}

func TestSeccompNotifyNeedsAnAgent(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]string{"": "needs a listenerPath", "/no/such/agent.sock": "/no/such/agent.sock"} {
		b := newBox(t)
		b.spec.Linux.Seccomp = notifyProfile(path)
		b.spec.Linux.Seccomp.ListenerMetadata = ""
		if _, _, err := b.tryRun("true"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", path, err)
		}
	}
	b := newBox(t) // nobody is asked
	b.spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, ListenerPath: "/no/such/agent.sock"}
	if out, _ := b.run("echo", "ok"); out != "ok\n" {
		t.Error(out)
	}
	b = newBox(t)
	b.spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, ListenerMetadata: "x"}
	if _, _, err := b.tryRun("true"); err == nil || !strings.Contains(err.Error(), "listenerMetadata") {
		t.Error(err)
	}
}
