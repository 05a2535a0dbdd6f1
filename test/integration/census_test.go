package integration

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// census is what a daemon and its containers may leave on the machine, by kind.
type census map[string][]string

// census counts what belongs to this daemon: it is asked for on a machine on which other engines work too.
func (n *node) census() (census, error) {
	c := census{}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], n.dir+"/") {
			c["mount"] = append(c["mount"], f[4])
		}
	}
	links, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		if l.Name == n.bridge || n.onBridge(l.Name) {
			c["link"] = append(c["link"], l.Name)
		}
	}
	if c["nft"], err = n.nftElements(); err != nil {
		return nil, err
	}
	if c["cgroup"], err = n.cgroups(); err != nil {
		return nil, err
	}
	if c["process"], err = n.processes(); err != nil {
		return nil, err
	}
	for _, dir := range []string{"run"} {
		err := filepath.WalkDir(filepath.Join(n.dir, dir), func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil && !d.IsDir() {
				c["file"] = append(c["file"], strings.TrimPrefix(path, n.dir))
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	for _, list := range c {
		slices.Sort(list)
	}
	return c, nil
}

// onBridge tells whether a host interface is a port of one of this daemon's bridges.
func (n *node) onBridge(link string) bool {
	master, err := os.Readlink("/sys/class/net/" + link + "/master")
	return err == nil && filepath.Base(master) == n.bridge
}

// nftElements lists the elements of the sets and maps, and the rules, of this daemon's table.
func (n *node) nftElements() ([]string, error) {
	out, err := exec.Command("nft", "list", "tables").Output()
	if err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return nil, nil
		}
		return nil, fmt.Errorf("nft: %w", err)
	}
	var lines []string
	for table := range strings.Lines(string(out)) {
		table = strings.TrimPrefix(strings.TrimSpace(table), "table ")
		if !strings.HasSuffix(table, n.bridge) {
			continue
		}
		rules, err := exec.Command("nft", append([]string{"list", "table"}, strings.Fields(table)...)...).Output()
		if err != nil {
			return nil, fmt.Errorf("nft list table %s: %w", table, err)
		}
		for line := range strings.Lines(string(rules)) {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines, nil
}

// cgroups lists the groups that hold the daemon's mark: containers' groups are named by their ids, which
// the daemon's own records name.
func (n *node) cgroups() ([]string, error) {
	ids := map[string]bool{}
	for _, sub := range []string{"run", "lib"} {
		err := filepath.WalkDir(filepath.Join(n.dir, sub), func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() && len(d.Name()) == 64 {
				ids[d.Name()] = true
			}
			if err == nil && d.IsDir() && (d.Name() == "content" || d.Name() == "snapshots") {
				return fs.SkipDir
			}
			return nil // what vanishes meanwhile is no longer there
		})
		if err != nil {
			return nil, err
		}
	}
	for id := range seenIDs(n) {
		ids[id] = true
	}
	var found []string
	err := filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			name := d.Name()
			for id := range ids {
				if strings.Contains(name, id) {
					found = append(found, path)
				}
			}
		}
		return nil
	})
	return found, err
}

// seenIDs gives the ids of containers that the daemon's log named: their groups are looked for
// even when the daemon has forgotten them.
func seenIDs(n *node) map[string]bool {
	ids := map[string]bool{}
	b, err := os.ReadFile(filepath.Join(n.dir, "log"))
	if err != nil {
		return ids
	}
	hex := func(c byte) bool { return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' }
	for i := 0; i < len(b); {
		j := i
		for j < len(b) && hex(b[j]) {
			j++
		}
		if j-i == 64 {
			ids[string(b[i:j])] = true
		}
		i = j + 1
	}
	return ids
}

// processes lists processes that run from or for this daemon's folder.
func (n *node) processes() ([]string, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var out []string
	for _, dir := range dirs {
		cmdline, err := os.ReadFile(dir + "/cmdline")
		if err != nil {
			continue // it ended
		}
		cwd, _ := os.Readlink(dir + "/cwd")
		root, _ := os.Readlink(dir + "/root")
		exe, _ := os.Readlink(dir + "/exe")
		pid := filepath.Base(dir)
		if n.cmd != nil && pid == fmt.Sprint(n.cmd.Process.Pid) || pid == fmt.Sprint(os.Getpid()) {
			continue
		}
		// The docker command line of a test names the folder in its environment only.
		if bytes.Contains(cmdline, []byte(n.dir+"/")) || strings.HasPrefix(cwd, n.dir+"/") || strings.HasPrefix(root, n.dir+"/") ||
			exe == filepath.Join(workDir, "hako-shim") && bytes.Contains(environ(dir), []byte(n.dir+"/")) {
			out = append(out, pid+" "+strings.ReplaceAll(string(cmdline), "\x00", " "))
		}
	}
	return out, nil
}

func environ(dir string) []byte {
	b, _ := os.ReadFile(dir + "/environ") // of a process that may have ended
	return b
}

// diff tells what one census has more than another.
func (c census) diff(before census) (out []string) {
	for _, kind := range slices.Sorted(maps.Keys(c)) {
		rest := slices.Clone(before[kind])
		for _, v := range c[kind] {
			if i := slices.Index(rest, v); i >= 0 {
				rest = slices.Delete(rest, i, i+1)
				continue
			}
			out = append(out, kind+" "+v)
		}
	}
	return out
}

// expectCensus waits until nothing is there that was not there before: what ends
// asynchronously has a moment to do so.
func (n *node) expectCensus(before census) error {
	deadline := time.Now().Add(hangLimit)
	for {
		now, err := n.census()
		left := now.diff(before)
		if err == nil && len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			if err != nil { // at first only because something went while it was looked at
				return err
			}
			const most = 40
			if len(left) > most {
				left = append(left[:most], "…")
			}
			return fmt.Errorf("left behind:\n\t%s", strings.Join(left, "\n\t"))
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// sweep removes what a failed test left, so that the machine is clean for the next.
func (n *node) sweep() {
	if n.cmd != nil {
		_ = n.cmd.Process.Kill()
		<-n.exited
		n.cmd = nil
	}
	if list, err := n.processes(); err == nil {
		for _, p := range list {
			var pid int
			if _, err := fmt.Sscan(p, &pid); err == nil && pid > 1 {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}
	if c, err := n.census(); err == nil {
		for _, g := range c["cgroup"] {
			killAll(g)
		}
		slices.Reverse(c["mount"])
		for _, m := range c["mount"] {
			_ = syscall.Unmount(m, syscall.MNT_DETACH)
		}
		for _, l := range c["link"] {
			_ = exec.Command("ip", "link", "del", l).Run()
		}
		slices.Reverse(c["cgroup"])
		for _, g := range c["cgroup"] {
			_ = os.Remove(g)
		}
	}
	if out, err := exec.Command("nft", "list", "tables").Output(); err == nil {
		for line := range strings.Lines(string(out)) {
			if f := strings.Fields(line); len(f) == 3 && strings.HasSuffix(f[2], n.bridge) {
				_ = exec.Command("nft", "delete", "table", f[1], f[2]).Run()
			}
		}
	}
}

// killAll ends the processes of a container's group, and waits a moment for them to be gone.
func killAll(group string) {
	for range 50 {
		b, err := os.ReadFile(filepath.Join(group, "cgroup.procs"))
		if err != nil || len(b) == 0 {
			return
		}
		for p := range strings.FieldsSeq(string(b)) {
			if pid, err := strconv.Atoi(p); err == nil && pid > 1 {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
}
