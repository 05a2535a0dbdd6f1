package engine

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// killRounds bounds how often killTree looks again for processes that were forked
// meanwhile.
const killRounds = 20

// processStart tells one process from a later one of the same pid; 0: there is none.
func processStart(pid int) uint64 {
	st, err := readStat(pid)
	if err != nil {
		return 0
	}
	return st.start
}

// killTree kills a process, which leads its session, with its descendants and all
// that is in that session. They are stopped first, so that none forks away. A descendant
// that began a session of its own and whose parent has ended is a daemon, and no
// longer one of them. An ended process, or another one that has its pid by now, is left alone.
//
// It returns when they are gone, but for zombies, or after limit.
func killTree(root int, start uint64, limit time.Duration) error {
	type victim struct {
		start uint64
		fd    int // pidfd
	}
	deadline := time.Now().Add(limit)
	victims := map[int]victim{}
	defer func() {
		for _, v := range victims {
			unix.Close(v.fd)
		}
	}()
	known := map[int]uint64{}
	for range killRounds {
		members, err := treeOf(root, start, known)
		if err != nil {
			return err
		}
		grown := false
		for pid, start := range members {
			if was, ok := known[pid]; ok && was == start {
				continue
			}
			fd, err := openProcess(pid, start)
			if err != nil {
				continue // ended meanwhile
			}
			if old, ok := victims[pid]; ok {
				unix.Close(old.fd)
			}
			victims[pid], known[pid] = victim{start, fd}, start
			grown = unix.PidfdSendSignal(fd, unix.SIGSTOP, nil, 0) == nil || grown
		}
		if !grown {
			break
		}
	}
	var errs []error
	for pid, v := range victims {
		if err := unix.PidfdSendSignal(v.fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("kill process %d: %w", pid, err))
		}
	}
	for _, v := range victims {
		for {
			left := time.Until(deadline)
			if left <= 0 {
				return errors.Join(errs...)
			}
			// Readable once the process has terminated, see pidfd_open(2).
			_, err := unix.Poll([]unix.PollFd{{Fd: int32(v.fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
			if !errors.Is(err, unix.EINTR) {
				break
			}
		}
	}
	return errors.Join(errs...)
}

// treeOf finds the live processes that belong to root, or to one of known: pid → start time.
func treeOf(root int, start uint64, known map[int]uint64) (map[int]uint64, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	names, err := dir.Readdirnames(-1)
	dir.Close()
	if err != nil {
		return nil, err
	}
	all := map[int]procStat{}
	children := map[int][]int{}
	members := map[int]uint64{}
	var next []int
	add := func(pid int) {
		if _, ok := members[pid]; !ok {
			members[pid] = all[pid].start
			next = append(next, pid)
		}
	}
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		st, err := readStat(pid)
		if err != nil || st.state == 'Z' || st.state == 'X' {
			continue // ended; its children have another parent
		}
		all[pid] = st
		children[st.ppid] = append(children[st.ppid], pid)
		was, ok := known[pid]
		if pid == root && st.start == start || pid != root && st.session == root || ok && was == st.start {
			add(pid)
		}
	}
	for len(next) > 0 {
		pid := next[0]
		next = next[1:]
		for _, child := range children[pid] {
			add(child)
		}
	}
	return members, nil
}

// openProcess opens exactly this process: its start time is looked at after that.
func openProcess(pid int, start uint64) (pidfd int, err error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, err
	}
	if processStart(pid) != start {
		unix.Close(fd)
		return -1, unix.ESRCH
	}
	return fd, nil
}
