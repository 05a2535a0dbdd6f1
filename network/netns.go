package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// spareNamespaces is how many namespaces are kept ready. One is 1-10 ms of kernel
// time; two cover `run` in a row, and idle ones cost about 100 KiB each.
const spareNamespaces = 2

// newNamespace makes a network namespace with its loopback up and gives a file that keeps it.
func (m *Manager) newNamespace() (f *os.File, err error) {
	err = m.onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		if f, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		if err := prepareNamespace(); err != nil {
			f.Close()
			return err
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("make network namespace: %w", err)
	}
	return f, nil
}

// prepareNamespace sets up the namespace of the calling thread.
func prepareNamespace() error {
	// IPv6 is switched on per interface by the networks that have it, so that a container on an
	// IPv4 network has no link-local address (CVE-2024-32473); router advertisements are never
	// believed (CVE-2020-13401). The loopback, which exists already, keeps ::1.
	for _, kv := range [][2]string{
		{"net/ipv6/conf/default/disable_ipv6", "1"},
		{"net/ipv6/conf/default/accept_ra", "0"},
		{"net/ipv6/conf/default/autoconf", "0"},
		{"net/ipv6/conf/all/accept_ra", "0"},
	} {
		if err := writeSysctl(kv[0], kv[1]); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	defer unix.Close(s)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}

// onThread runs fn on an operating system thread that may change its network
// namespace; the thread goes back to the host's, or is thrown away.
func (m *Manager) onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := fn()
		if back := unix.Setns(int(m.hostNS.Fd()), unix.CLONE_NEWNET); back == nil {
			runtime.UnlockOSThread()
		}
		// A goroutine that ends locked takes its thread with it.
		done <- err
	}()
	return <-done
}

// inNamespace runs fn on a thread that is in the network namespace ns.
func (m *Manager) inNamespace(ns *os.File, fn func() error) error {
	return m.onThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", ns.Name(), err)
		}
		return fn()
	})
}

// NewNetns gives a network namespace with the loopback up. The namespace lives, also without the
// daemon, until DeleteNetns. The id names the path; a namespace of that id that exists already is an error.
func (m *Manager) NewNetns(ctx context.Context, id string) (string, error) {
	if err := checkNetnsID(id); err != nil {
		return "", err
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	var ns *os.File
	select {
	case ns = <-m.spare:
	default:
		var err error
		if ns, err = m.newNamespace(); err != nil {
			return "", err
		}
	}
	defer ns.Close()
	defer m.refillSpare()
	return m.keep(id, ns)
}

// KeepNetns is NewNetns of a namespace that somebody else has made, at the path from: one of a user
// namespace, for example.
func (m *Manager) KeepNetns(ctx context.Context, id, from string) (string, error) {
	if err := checkNetnsID(id); err != nil {
		return "", err
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	ns, err := os.Open(from)
	if err != nil {
		return "", fmt.Errorf("keep network namespace %s: %w", id, err)
	}
	defer ns.Close()
	if err := m.inNamespace(ns, prepareNamespace); err != nil {
		return "", fmt.Errorf("keep network namespace %s: %w", id, err)
	}
	return m.keep(id, ns)
}

func checkNetnsID(id string) error {
	if id == "" || id == "." || id == ".." || strings.ContainsAny(id, "/\x00") || len(id) > 200 {
		return fmt.Errorf("make network namespace: bad id %q: %w", id, errdefs.ErrInvalidArgument)
	}
	return nil
}

// keep gives a namespace a path that it lives by.
func (m *Manager) keep(id string, ns *os.File) (string, error) {
	path := filepath.Join(m.netnsDir, id)
	target, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	switch {
	case errors.Is(err, os.ErrExist):
		if isNamespace(path) {
			return "", fmt.Errorf("network namespace %s: %w", id, errdefs.ErrAlreadyExists)
		}
	case err != nil:
		return "", fmt.Errorf("make network namespace %s: %w", id, err)
	default:
		target.Close()
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", ns.Fd()), path, "", unix.MS_BIND, ""); err != nil {
		os.Remove(path)
		return "", fmt.Errorf("keep network namespace %s: mount: %w", id, err)
	}
	return path, nil
}

// DeleteNetns forgets a namespace that NewNetns made; the kernel frees it once its last process is gone.
// It is idempotent.
func (m *Manager) DeleteNetns(_ context.Context, path string) error {
	if filepath.Dir(filepath.Clean(path)) != m.netnsDir {
		return fmt.Errorf("delete network namespace %s: not one of ours: %w", path, errdefs.ErrInvalidArgument)
	}
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("delete network namespace %s: unmount: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("delete network namespace %s: %w", path, err)
	}
	return nil
}

// Netns gives the paths of all namespaces that NewNetns made and DeleteNetns did not delete,
// so that a caller can find those that it has forgotten.
func (m *Manager) Netns(context.Context) ([]string, error) {
	files, err := os.ReadDir(m.netnsDir)
	if err != nil {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	out := make([]string, len(files))
	for i, f := range files {
		out[i] = filepath.Join(m.netnsDir, f.Name())
	}
	return out, nil
}

// refillSpare makes namespaces ahead, in the background and one at a time.
func (m *Manager) refillSpare() {
	if !m.refilling.CompareAndSwap(false, true) {
		return
	}
	m.background.Go(func() {
		defer m.refilling.Store(false)
		for len(m.spare) < cap(m.spare) && m.ctx.Err() == nil {
			ns, err := m.newNamespace()
			if err != nil {
				m.log.Warn("cannot make a network namespace ahead", "error", err)
				return
			}
			select {
			case m.spare <- ns:
			default:
				ns.Close()
			}
		}
	})
}

// isNamespace tells whether path is a network namespace that is alive (nsfs).
func isNamespace(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC
}

// writeSysctl writes a value below /proc/sys in the namespace of the calling thread.
func writeSysctl(name, value string) error {
	f, err := os.OpenFile("/proc/sys/"+name, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("set sysctl %s: %w", name, err)
	}
	defer f.Close()
	if _, err := f.WriteString(value); err != nil {
		return fmt.Errorf("set sysctl %s to %q: %w", name, value, err)
	}
	return nil
}

func readSysctl(name string) string {
	b, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
