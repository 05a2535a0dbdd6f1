package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// userHZ is the unit of /proc's clock ticks on every architecture that Linux has today.
const userHZ = 100

// psLimit bounds what is read of the host's ps.
const psLimit = 30 * time.Second

// TopContainer lists the processes of a container as the host sees them. The default
// columns (those of ps -ef) are read from /proc; others come from the host's ps. Nothing
// of the container is executed (CVE-2022-1227).
func (e *Engine) TopContainer(ctx context.Context, ref string, psArgs []string) (Top, error) {
	c, err := e.find(ctx, ref)
	if err != nil {
		return Top{}, err
	}
	r, err := c.live("use")
	if err != nil {
		return Top{}, err
	}
	pids, err := r.shim.get().Pids(ctx, c.id)
	if err != nil {
		return Top{}, fmt.Errorf("processes of container %s: %w", ref, err)
	}
	e.emit(c, "top")
	args := strings.Fields(strings.Join(psArgs, " "))
	if len(args) == 0 || len(args) == 1 && args[0] == "-ef" {
		return topDefault(pids), nil
	}
	return topByPS(ctx, pids, args)
}

// topDefault is ps -ef.
func topDefault(pids []int) Top {
	t := Top{Titles: []string{"UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"}, Processes: [][]string{}}
	boot := bootTime()
	slices.Sort(pids)
	for _, pid := range pids {
		if row, err := psRow(pid, boot); err == nil {
			t.Processes = append(t.Processes, row)
		}
	}
	return t
}

// procStat are the fields of /proc/PID/stat that are used here, see proc_pid_stat(5).
type procStat struct {
	comm         string
	state        byte
	ppid         int
	session      int
	tty          int
	utime, stime uint64 // ticks
	start        uint64 // ticks after boot
}

func readStat(pid int) (s procStat, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return s, err
	}
	// The name may hold anything, also parentheses and spaces.
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 0 || end < open {
		return s, errors.New("malformed stat")
	}
	s.comm = string(b[open+1 : end])
	f := strings.Fields(string(b[end+1:]))
	if len(f) < 20 {
		return s, errors.New("malformed stat")
	}
	num := func(i int) uint64 { n, _ := strconv.ParseUint(f[i], 10, 64); return n }
	s.state, s.ppid, s.session, s.tty = f[0][0], int(num(1)), int(num(3)), int(num(4))
	s.utime, s.stime, s.start = num(11), num(12), num(19)
	return s, nil
}

func bootTime() time.Time {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return time.Time{}
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "btime "); ok {
			n, _ := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
			return time.Unix(n, 0)
		}
	}
	return time.Time{}
}

func psRow(pid int, boot time.Time) ([]string, error) {
	s, err := readStat(pid)
	if err != nil {
		return nil, err
	}
	uid := "?"
	if fi, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
		uid = strconv.Itoa(int(sysStat(fi).Uid))
		if u, err := user.LookupId(uid); err == nil { // the host's accounts, as ps does
			uid = u.Username
		}
	}
	start := boot.Add(time.Duration(s.start) * time.Second / userHZ)
	stime := start.Format("15:04")
	if time.Since(start) > 24*time.Hour {
		stime = start.Format("Jan02")
	}
	cpu := (s.utime + s.stime) / userHZ
	c := 0
	if alive := time.Since(start).Seconds(); alive > 0 {
		c = min(99, int(float64(cpu)*100/alive))
	}
	cmd := "[" + s.comm + "]"
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && len(b) > 0 {
		cmd = strings.TrimSpace(strings.ReplaceAll(string(bytes.TrimRight(b, "\x00")), "\x00", " "))
	}
	return []string{uid, strconv.Itoa(pid), strconv.Itoa(s.ppid), strconv.Itoa(c), stime, ttyName(s.tty),
		fmt.Sprintf("%02d:%02d:%02d", cpu/3600, cpu/60%60, cpu%60), cmd}, nil
}

// ttyName names a terminal by its device number, see proc_pid_stat(5).
func ttyName(dev int) string {
	major, minor := dev>>8&0xfff, dev&0xff|dev>>12&0xfff00
	switch {
	case dev == 0:
		return "?"
	case major >= 136 && major <= 143:
		return fmt.Sprintf("pts/%d", (major-136)*256+minor)
	case major == 4:
		return fmt.Sprintf("tty%d", minor)
	}
	return "?"
}

// topByPS runs the host's ps and keeps the container's rows.
func topByPS(ctx context.Context, pids []int, args []string) (Top, error) {
	ps := ""
	for _, dir := range []string{"/usr/bin", "/bin"} {
		if p := filepath.Join(dir, "ps"); isExecutable(p) {
			ps = p
			break
		}
	}
	if ps == "" {
		return Top{}, notImplementedf("other columns than those of ps -ef need the host's ps, which is not installed")
	}
	ctx, cancel := context.WithTimeout(ctx, psLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, ps, args...)
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C"}
	out, err := cmd.Output()
	if err != nil {
		var ee *exec.ExitError
		if errors.As(err, &ee) {
			first, _, _ := strings.Cut(strings.TrimSpace(string(ee.Stderr)), "\n")
			return Top{}, invalidf("ps: %s", first)
		}
		return Top{}, fmt.Errorf("run ps: %w", err)
	}
	return parsePS(string(out), pids)
}

// parsePS reads ps's table. Its last column may hold spaces.
func parsePS(out string, pids []int) (Top, error) {
	lines := strings.Split(strings.TrimRight(out, "\n"), "\n")
	t := Top{Titles: strings.Fields(lines[0]), Processes: [][]string{}}
	col := slices.Index(t.Titles, "PID")
	if col < 0 {
		return t, invalidf("Couldn't find PID field in ps output")
	}
	for _, line := range lines[1:] {
		f := strings.Fields(line)
		if len(f) <= col {
			continue
		}
		pid, err := strconv.Atoi(f[col])
		if err != nil {
			return t, fmt.Errorf("unexpected pid %q in ps output", f[col])
		}
		if !slices.Contains(pids, pid) {
			continue
		}
		if n := len(t.Titles); len(f) > n {
			f = append(f[:n-1:n-1], strings.Join(f[n-1:], " "))
		}
		t.Processes = append(t.Processes, f)
	}
	return t, nil
}

func isExecutable(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0
}
