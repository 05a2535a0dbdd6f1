package cni

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// prepare makes a namespace what plugins expect of a new one: IPv6 allowed on interfaces to come. hako's
// own namespaces are born with IPv6 off but for the loopback, which is up; router advertisements stay off
// (CVE-2020-10749) unless a plugin turns them on for its interface.
func prepare(netns string) error {
	f, err := os.Open(netns)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", netns, err)
	}
	defer f.Close()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer home.Close()
		if err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err == nil {
			err = allowIPv6()
		}
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread() // else it ends with the goroutine
		}
		done <- err
	}()
	if err := <-done; err != nil {
		return fmt.Errorf("prepare network namespace %s: %w", netns, err)
	}
	return nil
}

func allowIPv6() error {
	f, err := os.OpenFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", os.O_WRONLY, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil // a kernel without IPv6
	}
	if err != nil {
		return err
	}
	_, err = f.WriteString("0")
	return errors.Join(err, f.Close())
}

// alive gives the path of a namespace, or "" when there is none any more: so says the specification that
// plugins are told on DEL.
func alive(netns string) string {
	var st unix.Statfs_t
	if netns == "" || unix.Statfs(netns, &st) != nil || st.Type != unix.NSFS_MAGIC && st.Type != unix.PROC_SUPER_MAGIC {
		return ""
	}
	return netns
}
