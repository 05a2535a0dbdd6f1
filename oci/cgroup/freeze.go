//go:build linux

package cgroup

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// freezeFor bounds Freeze: a process that forks without pause, or one in
	// uninterruptible sleep, can keep a v1 cgroup from ever being frozen. On a machine
	// that is very busy each process waits for its turn to stop.
	freezeFor = 15 * time.Second
	// freezeToKill is the same where to kill does not depend on it.
	freezeToKill = 3 * time.Second
	// redoAfter is how long the first attempt to freeze on v1 gets before processes are
	// let go for a moment: what waits for a frozen one (vfork(2), a FUSE server) can only
	// then get to where it can be frozen. Each further one gets twice as long.
	redoAfter = 50 * time.Millisecond
)

// Freeze stops all processes of the cgroup, and those below it, and returns when all
// have stopped. If they do not within some seconds it lets them run again and gives an
// errdefs.ErrUnavailable.
func (c *Cgroup) Freeze() error { return c.freeze(freezeFor) }

func (c *Cgroup) freeze(limit time.Duration) error {
	var err error
	if c.byV2("cgroup.freeze") {
		err = freezeV2(c.v2, limit)
	} else if dir, ok := c.v1["freezer"]; ok {
		err = freezeV1(dir, limit)
	} else if c.Exists() {
		err = &MissingError{"freezer", "freezing"}
	} else {
		err = unix.ENOENT
	}
	if gone(err) {
		err = classed(err, errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("freeze cgroup: %w", err)
	}
	return nil
}

// byV2 tells whether the v2 hierarchy is the one to freeze and kill by: it has the
// file and holds the processes. In hybrid mode this is preferred to the v1 freezer,
// which needs retries and whose frozen processes cannot be killed.
func (c *Cgroup) byV2(file string) bool {
	if c.v2 == "" || !exists(c.v2+"/"+file) {
		return false
	}
	for name := range c.v1 {
		if !strings.HasPrefix(name, "name=") {
			events, err := readFile(c.v2 + "/cgroup.events")
			return err == nil && keyed(events)["populated"] == 1
		}
	}
	return true
}

func freezeV2(dir string, limit time.Duration) error {
	if err := writeFile(dir+"/cgroup.freeze", "1"); err != nil {
		return err
	}
	fd, err := open(dir+"/cgroup.events", unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	buf := make([]byte, 512)
	for deadline := time.Now().Add(limit); ; {
		n, err := unix.Pread(fd, buf, 0)
		if err != nil {
			return fmt.Errorf("read %s/cgroup.events: %w", dir, err)
		}
		if keyed(buf[:n])["frozen"] == 1 {
			return nil
		}
		left := time.Until(deadline)
		if left <= 0 {
			_ = writeFile(dir+"/cgroup.freeze", "0")
			return fmt.Errorf("processes do not stop: %w", errdefs.ErrUnavailable)
		}
		// The kernel marks the file when it changes after it was read.
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}, int(left.Milliseconds())+1)
	}
}

func freezeV1(dir string, limit time.Duration) error {
	state := dir + "/freezer.state"
	deadline := time.Now().Add(limit)
	for attempt := redoAfter; ; attempt *= 2 {
		if err := writeFile(state, "FROZEN"); err != nil {
			return err
		}
		pause := 10 * time.Microsecond
		for redo := time.Now().Add(min(attempt, time.Until(deadline))); time.Now().Before(redo); pause = min(2*pause, 5*time.Millisecond) {
			s, err := readString(state)
			if err != nil {
				return err
			}
			if s == "FROZEN" {
				return nil
			}
			time.Sleep(pause)
		}
		if err := writeFile(state, "THAWED"); err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes do not stop: %w", errdefs.ErrUnavailable)
		}
		time.Sleep(attempt / 50)
	}
}

// Thaw lets the processes run again. It is no error if they run.
func (c *Cgroup) Thaw() error {
	var errs []error
	if dir, ok := c.v1["freezer"]; ok {
		errs = append(errs, writeFile(dir+"/freezer.state", "THAWED"))
	}
	if c.v2 != "" {
		if err := writeFile(c.v2+"/cgroup.freeze", "0"); len(c.v1) == 0 || !errors.Is(err, unix.ENOENT) {
			errs = append(errs, err)
		}
	}
	err := errors.Join(errs...)
	if gone(err) {
		err = classed(err, errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("thaw cgroup: %w", err)
	}
	return nil
}

// Frozen tells whether the cgroup is frozen, or about to be. One that is gone is not.
func (c *Cgroup) Frozen() (bool, error) {
	if dir, ok := c.v1["freezer"]; ok {
		s, err := readString(dir + "/freezer.state")
		if err != nil && !gone(err) {
			return false, fmt.Errorf("look whether the cgroup is frozen: %w", err)
		}
		if s == "FROZEN" || s == "FREEZING" {
			return true, nil
		}
	}
	if c.v2 != "" {
		s, err := readString(c.v2 + "/cgroup.freeze")
		if err != nil && !gone(err) {
			return false, fmt.Errorf("look whether the cgroup is frozen: %w", err)
		}
		return s == "1", nil
	}
	return false, nil
}

// Kill sends SIGKILL to all processes of the cgroup and below it, also frozen ones,
// without letting one escape by forking. It does not wait until they are gone. A
// cgroup that is gone is no error.
func (c *Cgroup) Kill() error {
	if err := c.kill(); err != nil && !gone(err) {
		return fmt.Errorf("kill cgroup: %w", err)
	}
	return nil
}

func (c *Cgroup) kill() error {
	if c.byV2("cgroup.kill") {
		if err := writeFile(c.v2+"/cgroup.kill", "1"); err != nil {
			return err
		}
		c.thawForDeath()
		if len(c.v1) == 0 {
			return nil
		}
		// One that was moved out of the v2 cgroup, and is only in those of v1, is still
		// to be killed. What died meanwhile, or is dying, is listed too: ask again.
		after, err := c.AllProcs()
		if err != nil {
			return err
		}
		if slices.ContainsFunc(after, func(pid int) bool { return !dying(pid) }) {
			return c.killByList()
		}
		return nil
	}
	return c.killByList()
}

// dying tells whether a process has ended or has a SIGKILL coming.
func dying(pid int) bool {
	status, err := readFile("/proc/" + itoa(int64(pid)) + "/status")
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch key {
		case "State":
			if strings.HasPrefix(value, "Z") || strings.HasPrefix(value, "X") {
				return true
			}
		case "SigPnd", "ShdPnd":
			if mask, err := strconv.ParseUint(value, 16, 64); err == nil && mask&(1<<(unix.SIGKILL-1)) != 0 {
				return true
			}
		}
	}
	return false
}

// thawForDeath lets processes go that a v1 freezer holds: they die only then.
func (c *Cgroup) thawForDeath() {
	if dir, ok := c.v1["freezer"]; ok {
		if s, err := readString(dir + "/freezer.state"); err == nil && s != "THAWED" {
			_ = writeFile(dir+"/freezer.state", "THAWED")
		}
	}
}

// killRounds bounds killByList where nothing stops the processes from forking.
const killRounds = 1000

// killByList kills one by one. The freezer keeps processes from forking, and their
// numbers from being used anew, while that happens.
func (c *Cgroup) killByList() error {
	defer func() {
		c.thawForDeath()
		if c.v2 != "" {
			_ = writeFile(c.v2+"/cgroup.freeze", "0")
		}
	}()
	_ = c.freeze(freezeToKill) // without it, the rounds below have to do
	sent := map[int]bool{}
	for range killRounds {
		pids, err := c.AllProcs()
		if err != nil {
			return err
		}
		more := false
		for _, pid := range pids {
			if sent[pid] {
				continue
			}
			sent[pid], more = true, true
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("process %d: %w", pid, err)
			}
		}
		if !more {
			return nil
		}
	}
	return fmt.Errorf("processes multiply faster than they can be killed: %w", errdefs.ErrUnavailable)
}
