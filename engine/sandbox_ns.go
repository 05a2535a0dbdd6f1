//go:build linux

package engine

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/ownthread"
)

// The namespaces of a sandbox live without a process: each is kept by a bind mount of its
// file, which containers join by path. They outlive the daemon and every container.

// pinned lists the files of a sandbox's namespaces below its folder.
var pinned = []string{"ipc", "uts", "user", "pid"}

func nsPath(dir, kind string) string { return filepath.Join(dir, "ns", kind) }

// pin keeps a namespace by its file.
func pin(from, to string) error {
	f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		os.Remove(to)
		return fmt.Errorf("keep namespace %s: mount: %w", filepath.Base(to), err)
	}
	return nil
}

// unpin lets the namespaces of a sandbox go.
func unpin(dir string) error {
	var errs []error
	for _, kind := range pinned {
		err := unix.Unmount(nsPath(dir, kind), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("let namespace %s go: %w", kind, err))
		}
	}
	return errors.Join(errs...)
}

// onThread runs f on a thread that may change its namespaces.
func onThread(f func() error) (err error) {
	ownthread.Run(func() { err = f() })
	return err
}

// makeNamespaces makes the IPC and UTS namespaces of a sandbox that has no user namespace.
func makeNamespaces(dir string, ipc, uts bool) error {
	flags := 0
	if ipc {
		flags |= unix.CLONE_NEWIPC
	}
	if uts {
		flags |= unix.CLONE_NEWUTS
	}
	if flags == 0 {
		return nil
	}
	return onThread(func() error {
		if err := unix.Unshare(flags); err != nil {
			return fmt.Errorf("make namespaces: unshare: %w", err)
		}
		for kind, wanted := range map[string]bool{"ipc": ipc, "uts": uts} {
			if !wanted {
				continue
			}
			if err := pin("/proc/thread-self/ns/"+kind, nsPath(dir, kind)); err != nil {
				return err
			}
		}
		return nil
	})
}

// configureNamespaces sets host name and sysctls of a sandbox, each in the namespace that it belongs to. root is the
// host's id of the root of its user namespace, 0 without one.
func configureNamespaces(dir, netns, hostname string, sysctls map[string]string, root uint32) error {
	return onThread(func() error {
		hasUTS := false
		for _, ns := range []struct {
			path string
			flag int
			may  bool // be missing: it is the host's
		}{
			{nsPath(dir, "ipc"), unix.CLONE_NEWIPC, true}, {nsPath(dir, "uts"), unix.CLONE_NEWUTS, true},
			{netns, unix.CLONE_NEWNET, netns == ""},
		} {
			f, err := os.Open(ns.path)
			if ns.may && errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			err = unix.Setns(int(f.Fd()), ns.flag)
			f.Close()
			if err != nil {
				return fmt.Errorf("enter namespace %s: %w", ns.path, err)
			}
			hasUTS = hasUTS || ns.flag == unix.CLONE_NEWUTS
		}
		if hasUTS {
			if err := unix.Sethostname([]byte(hostname)); err != nil {
				return fmt.Errorf("set host name %q: %w", hostname, err)
			}
		}
		// Those of the network ask for a capability over it; all others for the id of its user namespace's root,
		// whatever the writer may do. The thread ends with that id.
		for _, network := range []bool{true, false} {
			if !network && root != 0 {
				if err := becomeUser(root); err != nil {
					return err
				}
			}
			for k, v := range sysctls {
				if ofNetwork(k) != network {
					continue
				}
				if err := writeSysctl(k, v); err != nil {
					return sysctlError(k, v, err)
				}
			}
		}
		return nil
	})
}

// ofNetwork tells whether a sysctl belongs to the network namespace.
func ofNetwork(sysctl string) bool {
	return strings.HasPrefix(sysctl, "net.") || strings.HasPrefix(sysctl, "net/")
}

// becomeUser gives the calling thread, and no other, the effective id of a user.
func becomeUser(uid uint32) error {
	const same = ^uintptr(0)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, same, uintptr(uid), same); errno != 0 {
		return fmt.Errorf("become user %d: setresuid: %w", uid, errno)
	}
	return nil
}

// sysctlError tells values and names that the kernel does not take from what is wrong with the machine.
func sysctlError(name, value string, err error) error {
	for _, class := range []error{unix.EINVAL, unix.ERANGE, fs.ErrNotExist} {
		if errors.Is(err, class) {
			return invalidf("set sysctl %s to %q: %v", name, value, err)
		}
	}
	return fmt.Errorf("set sysctl %s to %q: %w", name, value, err)
}

// writeSysctl writes a value in the namespaces of the calling thread. The name has been
// validated; its separator is a dot, and a slash in it stands for a dot, or the other way
// round (sysctl(8)).
func writeSysctl(name, value string) error {
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '.' {
		name = strings.Map(func(r rune) rune {
			switch r {
			case '.':
				return '/'
			case '/':
				return '.'
			}
			return r
		}, name)
	}
	f, err := os.OpenFile("/proc/sys/"+name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// usernsHolder is a process that is born in a new user namespace with all others that a
// sandbox has: only a process can be the first in one. It ends when the namespaces are kept.
type usernsHolder struct {
	cmd   *exec.Cmd
	stdin io.Closer
}

// startHolder starts binary, which waits for the end of its input with --hold.
func startHolder(binary string, u Userns, ipc, uts, net bool) (*usernsHolder, error) {
	if binary == "" {
		return nil, failedf("a user namespace takes an init binary, and this daemon has none")
	}
	attr := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, GidMappingsEnableSetgroups: true}
	for flag, wanted := range map[uintptr]bool{unix.CLONE_NEWIPC: ipc, unix.CLONE_NEWUTS: uts, unix.CLONE_NEWNET: net} {
		if wanted {
			attr.Cloneflags |= flag
		}
	}
	for _, m := range u.UIDs {
		attr.UidMappings = append(attr.UidMappings, syscall.SysProcIDMap{ContainerID: int(m.Container), HostID: int(m.Host), Size: int(m.Size)})
	}
	for _, m := range u.GIDs {
		attr.GidMappings = append(attr.GidMappings, syscall.SysProcIDMap{ContainerID: int(m.Container), HostID: int(m.Host), Size: int(m.Size)})
	}
	cmd := &exec.Cmd{Path: binary, Args: []string{filepath.Base(binary), "--hold"}, Env: []string{}, Dir: "/", SysProcAttr: attr}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		in.Close()
		return nil, fmt.Errorf("make user namespace: %w", err)
	}
	return &usernsHolder{cmd, in}, nil
}

func (h *usernsHolder) path(kind string) string {
	return fmt.Sprintf("/proc/%d/ns/%s", h.cmd.Process.Pid, kind)
}

// end lets the holder go.
func (h *usernsHolder) end() {
	h.stdin.Close()
	_ = h.cmd.Process.Kill()
	_ = h.cmd.Wait()
}

// validateUserns checks the maps of a sandbox as the API wants them: one line, from root on,
// the same for users and groups.
func (u *Userns) validate() error {
	if u == nil {
		return nil
	}
	if len(u.UIDs) != 1 || len(u.GIDs) != 1 {
		return invalidf("a user namespace takes exactly one mapping of uids and one of gids, not %d and %d", len(u.UIDs), len(u.GIDs))
	}
	if !slices.Equal(u.UIDs, u.GIDs) {
		return invalidf("the mappings of uids and gids of a user namespace differ")
	}
	m := u.UIDs[0]
	if m.Container != 0 {
		return invalidf("the mapping of a user namespace begins at container id %d, not 0", m.Container)
	}
	if m.Size == 0 || uint64(m.Host)+uint64(m.Size) > 1<<32-1 {
		return invalidf("the mapping of a user namespace is out of range: %d ids from %d", m.Size, m.Host)
	}
	return nil
}
