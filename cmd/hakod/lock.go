package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// lockWait is how long a lock may outlive its daemon: one that is killed while it starts
// a process has a child that holds its descriptors until it executes.
const lockWait = time.Second

// lock makes the daemon's folders and takes the root and the bridge for this process
// alone. The kernel gives the locks back when the process ends, however it ends.
func lock(cfg config) (unlock func(), err error) {
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{{cfg.Root, 0o710}, {cfg.State, 0o711}} {
		if err := os.MkdirAll(d.path, d.mode); err != nil {
			return nil, err
		}
		if err := os.Chmod(d.path, d.mode); err != nil {
			return nil, err
		}
	}
	root, err := lockFile(filepath.Join(cfg.Root, "lock"), "the root "+cfg.Root)
	if err != nil {
		return nil, err
	}
	name, err := bridgeLock(cfg.BridgeName)
	if err != nil {
		root.Close()
		return nil, err
	}
	bridge, err := lockFile(name, "the bridge "+cfg.BridgeName+" (see --bridge-name, --bridge-subnet)")
	if err != nil {
		root.Close()
		return nil, err
	}
	return func() {
		_ = os.Remove(name) // while it is held: see lockFile
		bridge.Close()
		root.Close()
	}, nil
}

// bridgeLock names the file that stands for a bridge. It lies where only root writes, and
// belongs to the network namespace, in which the bridge's name counts.
func bridgeLock(bridge string) (string, error) {
	ns, err := os.Readlink("/proc/thread-self/ns/net") // net:[4026531840]
	if err != nil {
		return "", fmt.Errorf("find the network namespace: %w", err)
	}
	return fmt.Sprintf("/run/hako-%s-%s.lock", strings.Trim(strings.TrimPrefix(ns, "net:"), "[]"), strings.ReplaceAll(bridge, "/", "_")), nil
}

// lockFile takes a file for this process. what is for the message of the second one.
func lockFile(path, what string) (*os.File, error) {
	deadline := time.Now().Add(lockWait)
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			// Its holder may have removed it just before it let go.
			mine, merr := f.Stat()
			if there, terr := os.Lstat(path); merr == nil && terr == nil && os.SameFile(mine, there) {
				if f.Truncate(0) == nil {
					_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
				}
				return f, nil
			}
		}
		pid := make([]byte, 32)
		n, _ := f.ReadAt(pid, 0)
		f.Close()
		switch {
		case err != nil && !errors.Is(err, unix.EWOULDBLOCK):
			return nil, fmt.Errorf("lock %s: %w", path, err)
		case time.Now().After(deadline):
			return nil, fmt.Errorf("another daemon (process %s) uses %s", strings.TrimSpace(string(pid[:n])), what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
