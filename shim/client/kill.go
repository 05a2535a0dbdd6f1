package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/shim/pidfd"
	"github.com/hako-engine/hako/shim/wire"
)

// Kill ends the shim of o.Bundle that does not do as it is told, and waits for its end:
// errdefs.ErrNotFound if there is no such process. What its container still holds is left
// to Reap.
//
// A number in a file says little of who has it now, so processes are asked: it is the shim
// if it is the host's and this user's, has this bundle in its arguments, and either is the
// shim's program or holds a shim's socket.
func (Manager) Kill(ctx context.Context, o StartOptions) error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return fmt.Errorf("kill shim %s: %w", o.ID, err)
	}
	found := false
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || !servesBundle(pid, o.Bundle) {
			continue
		}
		ended, err := o.kill(ctx, pid)
		if err != nil {
			return fmt.Errorf("kill shim %s: process %d: %w", o.ID, pid, err)
		}
		found = found || ended
	}
	if !found {
		return fmt.Errorf("kill shim %s: no process serves %s: %w", o.ID, o.Bundle, errdefs.ErrNotFound)
	}
	return nil
}

// kill ends a process if it is the shim.
func (o StartOptions) kill(ctx context.Context, pid int) (ended bool, err error) {
	p, err := pidfd.Open(pid)
	if errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer p.Close()
	// Looked at with the process in hand: if it is the shim and still lives, it is what the
	// descriptor refers to.
	if !servesBundle(pid, o.Bundle) || !o.isProgram(pid) && !holdsSocket(pid) {
		return false, nil
	}
	if err := p.Kill(unix.SIGKILL); err != nil {
		if errdefs.IsNotFound(err) {
			err = nil
		}
		return false, err
	}
	stop := context.AfterFunc(ctx, func() { p.Close() })
	defer stop()
	if err := p.Wait(); err != nil {
		return false, fmt.Errorf("it does not end: %w", context.Cause(ctx))
	}
	return true, nil
}

// servesBundle looks at a process's arguments, as StartOptions.flags makes them. A process
// in a container can have any, but not our namespaces.
func servesBundle(pid int, bundle string) bool {
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d", pid), &st); err != nil || int(st.Uid) != os.Geteuid() {
		return false
	}
	for _, ns := range []string{"pid", "mnt"} {
		its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
		ours, oerr := os.Readlink("/proc/self/ns/" + ns)
		if err != nil || oerr != nil || its != ours {
			return false
		}
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return false
	}
	args := strings.Split(string(bytes.TrimSuffix(b, []byte{0})), "\x00")
	i := slices.Index(args, "-bundle")
	return i > 0 && i+1 < len(args) && args[i+1] == bundle && args[len(args)-1] == "serve"
}

// isProgram tells whether a process executes the shim's binary.
func (o StartOptions) isProgram(pid int) bool {
	binary, err := o.Program()
	if err != nil {
		return false
	}
	var its, ours unix.Stat_t
	if unix.Stat(fmt.Sprintf("/proc/%d/exe", pid), &its) != nil || unix.Stat(binary, &ours) != nil {
		return false
	}
	return its.Dev == ours.Dev && its.Ino == ours.Ino
}

// holdsSocket tells whether a process has a socket of a shim's name: so is one known whose
// binary was replaced since it began.
func holdsSocket(pid int) bool {
	b, err := os.ReadFile("/proc/self/net/unix")
	if err != nil {
		return false
	}
	sockets := map[string]bool{}
	// Num RefCount Protocol Flags Type St Inode Path (unix(7)). A long path was bound by a short
	// name of its folder.
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 8 && filepath.Base(f[7]) == wire.SocketFile {
			sockets["socket:["+f[6]+"]"] = true
		}
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(fds, func(e os.DirEntry) bool {
		link, err := os.Readlink(filepath.Join(dir, e.Name()))
		return err == nil && sockets[link]
	})
}
