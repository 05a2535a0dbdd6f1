package engine

import (
	"errors"
	"fmt"
	"os"
	"strconv"

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
func killTree(root int, start uint64) error {
	stopped := map[int]uint64{} // pid → start time
	for range killRounds {
		members, err := treeOf(root, start, stopped)
		if err != nil {
			return err
		}
		grown := false
		for pid, start := range members {
			if was, ok := stopped[pid]; ok && was == start {
				continue
			}
			if signalProcess(pid, start, unix.SIGSTOP) == nil {
				stopped[pid] = start
				grown = true
			}
		}
		if !grown {
			break
		}
	}
	var errs []error
	for pid, start := range stopped {
		if err := signalProcess(pid, start, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("kill process %d: %w", pid, err))
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

// signalProcess signals exactly this process: through a descriptor of it, whose start
// time was looked at after it was opened.
func signalProcess(pid int, start uint64, sig unix.Signal) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if processStart(pid) != start {
		return unix.ESRCH
	}
	return unix.PidfdSendSignal(fd, sig, nil, 0)
}
