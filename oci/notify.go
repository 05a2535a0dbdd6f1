//go:build linux && (amd64 || arm64)

package oci

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/classed"
)

// agentPatience bounds how long a seccomp agent may take to listen to us.
const agentPatience = 10 * time.Second

// sendListener hands a seccomp listener, and the container process state, to the agent
// behind the socket that the profile names. Each has a connection of its own.
func sendListener(p *specs.LinuxSeccomp, pid int, st specs.State, listener *os.File) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("hand the seccomp listener to %s: %w", p.ListenerPath, err)
		}
	}()
	raw, err := json.Marshal(specs.ContainerProcessState{
		Version: st.Version, Fds: []string{specs.SeccompFdName}, Pid: pid, Metadata: p.ListenerMetadata, State: st,
	})
	if err != nil {
		return err
	}
	fd, err := connect(p.ListenerPath)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// Descriptors go with the first call only.
	rights := unix.UnixRights(int(listener.Fd()))
	for len(raw) > 0 {
		n, err := unix.SendmsgN(fd, raw, rights, nil, unix.MSG_NOSIGNAL)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return os.NewSyscallError("sendmsg", err)
		}
		raw, rights = raw[n:], nil
	}
	return nil
}

// connect connects to a socket in the file system, also one whose path is too long for an
// address.
func connect(path string) (int, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return -1, os.NewSyscallError("stat", err)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	name := path
	if len(name) > 107 {
		dir, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			unix.Close(fd)
			return -1, os.NewSyscallError("open", err)
		}
		defer unix.Close(dir)
		name = fmt.Sprintf("/proc/self/fd/%d/%s", dir, filepath.Base(path))
	}
	tv := unix.NsecToTimeval(agentPatience.Nanoseconds())
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: name})
	}
	if err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("connect", err)
	}
	return fd, nil
}

// checkListener refuses a profile that asks somebody who cannot be found.
func checkListener(p *specs.LinuxSeccomp) error {
	if p.ListenerPath == "" {
		return classed.Errorf(errdefs.ErrInvalidArgument, "linux.seccomp: SCMP_ACT_NOTIFY needs a listenerPath")
	}
	if os.Geteuid() != 0 {
		return classed.Errorf(errdefs.ErrFailedPrecondition, "linux.seccomp: SCMP_ACT_NOTIFY needs privileges on the host")
	}
	return nil
}
