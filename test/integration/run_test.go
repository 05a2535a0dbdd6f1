package integration

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/console"
)

func TestRun(t *testing.T) {
	t.Parallel()
	n := shared(t)
	for name, tt := range map[string]struct {
		args []string
		code int
		want string // the whole of stdout
	}{
		"default command": {[]string{testImage}, 0, "default command\n"},
		"exit code":       {[]string{testImage, "sh", "-c", "exit 37"}, 37, ""},
		"entrypoint":      {[]string{"--entrypoint", "echo", testImage, "a", "b c"}, 0, "a b c\n"},
		"environment":     {[]string{"-e", "A=1", "-e", "FROM_IMAGE", testImage, "sh", "-c", "echo $A:$FROM_IMAGE:$PATH"}, 0, "1::/bin\n"},
		"workdir":         {[]string{"-w", "/made/up", testImage, "pwd"}, 0, "/made/up\n"},
		"image workdir":   {[]string{testImage, "pwd"}, 0, "/home\n"},
		"user":            {[]string{"-u", "user", testImage, "id"}, 0, "uid=1000(user) gid=1000(user) groups=1000(user),2000(extra)\n"},
		"numeric user":    {[]string{"-u", "7:8", "--group-add", "9", testImage, "sh", "-c", "id -u; id -g; id -G"}, 0, "7\n8\n8 9\n"},
		"hostname":        {[]string{"--hostname", "boxy", testImage, "hostname"}, 0, "boxy\n"},
		"pid one":         {[]string{testImage, "sh", "-c", "echo $$"}, 0, "1\n"},
		"read-only":       {[]string{"--read-only", testImage, "sh", "-c", "touch /x 2>/dev/null || echo refused"}, 0, "refused\n"},
		"tmpfs":           {[]string{"--tmpfs", "/scratch:size=1m", testImage, "sh", "-c", "grep -c '^tmpfs /scratch.*size=1024k' /proc/mounts"}, 0, "1\n"},
		"shm size":        {[]string{"--shm-size", "2m", testImage, "sh", "-c", "grep -c '/dev/shm.*size=2048k' /proc/mounts"}, 0, "1\n"},
		"capabilities":    {[]string{"--cap-drop", "ALL", testImage, "grep", "CapEff", "/proc/self/status"}, 0, "CapEff:\t0000000000000000\n"},
		"seccomp":         {[]string{testImage, "grep", "Seccomp:", "/proc/self/status"}, 0, "Seccomp:\t2\n"},
		"no new privs":    {[]string{"--security-opt", "no-new-privileges", testImage, "grep", "NoNewPrivs", "/proc/self/status"}, 0, "NoNewPrivs:\t1\n"},
		"sysctl":          {[]string{"--sysctl", "net.ipv4.ip_default_ttl=33", testImage, "cat", "/proc/sys/net/ipv4/ip_default_ttl"}, 0, "33\n"},
		"ulimit":          {[]string{"--ulimit", "nofile=77:88", testImage, "sh", "-c", "ulimit -n"}, 0, "77\n"},
		"no network":      {[]string{"--network", "none", testImage, "ls", "/sys/class/net"}, 0, "lo\n"},
		"host network":    {[]string{"--network", "host", testImage, "readlink", "/proc/self/ns/net"}, 0, readlink(t, "/proc/self/ns/net") + "\n"},
		"host pid":        {[]string{"--pid", "host", testImage, "readlink", "/proc/self/ns/pid"}, 0, readlink(t, "/proc/self/ns/pid") + "\n"},
		"add host":        {[]string{"--add-host", "db:10.9.8.7", testImage, "grep", "10.9.8.7", "/etc/hosts"}, 0, "10.9.8.7\tdb\n"},
		"dns":             {[]string{"--dns", "9.9.9.9", "--dns-search", "example.org", "--network", "bridge", testImage, "sh", "-c", "grep -c -e 9.9.9.9 -e example.org /etc/resolv.conf"}, 0, "2\n"},
		"init":            {[]string{testImage, "cat", "/proc/1/comm"}, 0, "cat\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := n.run(nil, append([]string{"run", "--rm"}, tt.args...)...)
			if r.code != tt.code || r.out != tt.want {
				t.Errorf("want exit %d and %q:\n%v", tt.code, tt.want, r)
			}
		})
	}
}

func readlink(t *testing.T, path string) string {
	t.Helper()
	s, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestRunSeparatesItsStreams(t *testing.T) {
	t.Parallel()
	n := shared(t)
	r := n.run(nil, "run", "--rm", testImage, "sh", "-c", "echo out; echo err >&2")
	if r.out != "out\n" || r.stderr != "err\n" || r.code != 0 {
		t.Error(r)
	}
}

func TestRunWithInput(t *testing.T) {
	t.Parallel()
	n := shared(t)
	in := strings.Repeat("0123456789abcde\n", 1<<16) // 1 MiB
	r := n.run(strings.NewReader(in), "run", "--rm", "-i", testImage, "cat")
	if r.out != in || r.code != 0 {
		t.Errorf("%d bytes of %d came back, exit %d: %s", len(r.out), len(in), r.code, clip(r.stderr))
	}
	// A process that reads only a part of its input ends the command.
	r = n.run(strings.NewReader(in), "run", "--rm", "-i", testImage, "head", "-c", "16")
	if r.out != "0123456789abcde\n" || r.code != 0 || r.stderr != "" {
		t.Error(r)
	}
}

func TestRunRemoves(t *testing.T) {
	t.Parallel()
	n := shared(t)
	name := n.name(t, "")
	n.docker(t, "run", "--rm", "--name", name, "-v", "/anonymous", testImage, "true")
	eventually(t, "the container to be removed", func() bool {
		return n.docker(t, "ps", "-aq", "--filter", "name=^/"+name+"$") == ""
	})
	n.expect(t, 1, "No such container: "+name, "logs", name)
}

// terminal runs a command line on a terminal of its own, types the input, and gives all
// that the terminal showed until the command ended.
func (n *node) terminal(t *testing.T, rows, columns uint16, input func(show func(string), typed io.Writer), args ...string) (string, int) {
	t.Helper()
	pty, slave, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	defer pty.Close()
	if err := pty.Resize(console.WinSize{Height: rows, Width: columns}); err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(slave, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	cmd := n.command(ctx, args...)
	cmd.Env = append(cmd.Env, "TERM=xterm")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		tty.Close()
		t.Fatal(err)
	}
	tty.Close()
	shown := make(chan string, 1000)
	go func() {
		defer close(shown)
		buf := make([]byte, 4096)
		for {
			k, err := pty.Read(buf)
			if k > 0 {
				shown <- string(buf[:k])
			}
			if err != nil {
				return
			}
		}
	}()
	var all strings.Builder
	input(func(text string) {
		t.Helper()
		timeout := time.After(5 * time.Minute)
		for !strings.Contains(all.String(), text) {
			select {
			case s, ok := <-shown:
				if !ok {
					t.Errorf("the terminal ended before %q: %q", text, all.String())
					return
				}
				all.WriteString(s)
			case <-timeout:
				t.Errorf("the terminal does not show %q: %q", text, all.String())
				cancel()
				return
			}
		}
	}, pty)
	err = cmd.Wait()
	for s := range shown {
		all.WriteString(s)
	}
	if ctx.Err() != nil {
		t.Errorf("docker %v hung: %q", args, all.String())
	}
	if err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return all.String(), cmd.ProcessState.ExitCode()
}

func TestTerminal(t *testing.T) {
	t.Parallel()
	n := shared(t)
	name := n.name(t, "")
	out, code := n.terminal(t, 41, 123, func(show func(string), typed io.Writer) {
		show("/home #")
		io.WriteString(typed, "tty; stty size; echo x$((6*7))x\n")
		show("x42x")
		io.WriteString(typed, "exit 5\n")
	}, "run", "-it", "--name", name, testImage, "sh")
	if code != 5 || !strings.Contains(out, "/dev/pts/0") || !strings.Contains(out, "41 123") {
		t.Errorf("exit %d: %q", code, out)
	}
	if got := n.docker(t, "inspect", "-f", "{{.Config.Tty}} {{.State.ExitCode}}", name); got != "true 5" {
		t.Error(got)
	}
}

func TestDetachKeys(t *testing.T) {
	t.Parallel()
	n := shared(t)
	name := n.name(t, "")
	_, code := n.terminal(t, 24, 80, func(show func(string), typed io.Writer) {
		show("/home #")
		typed.Write([]byte{16, 17})
	}, "run", "-it", "--name", name, testImage, "sh")
	if got := n.docker(t, "inspect", "-f", "{{.State.Status}}", name); got != "running" {
		t.Errorf("after ctrl-p ctrl-q (exit %d) it is %s", code, got)
	}
	out, code := n.terminal(t, 24, 80, func(show func(string), typed io.Writer) {
		io.WriteString(typed, "echo again$((1+1))\n")
		show("again2")
		io.WriteString(typed, "exit 6\n")
	}, "attach", name)
	if code != 6 {
		t.Errorf("attach: exit %d: %q", code, out)
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	n := shared(t)
	// The files of cgroup v1 or v2, whichever the machine has.
	script := `for f in memory/memory.limit_in_bytes memory.max pids/pids.max pids.max cpu/cpu.cfs_quota_us cpu.max cpu/cpu.shares cpuset/cpuset.cpus cpuset.cpus; do
		[ -r /sys/fs/cgroup/$f ] && echo "$f $(cat /sys/fs/cgroup/$f)"; done; true`
	out := n.docker(t, "run", "--rm", "--memory", "32m", "--pids-limit", "33", "--cpus", "0.5", "--cpu-shares", "256", "--cpuset-cpus", "0", testImage, "sh", "-c", script)
	v1 := "memory/memory.limit_in_bytes 33554432|pids/pids.max 33|cpu/cpu.cfs_quota_us 50000|cpu/cpu.shares 256|cpuset/cpuset.cpus 0"
	v2 := "memory.max 33554432|pids.max 33|cpu.max 50000 100000|cpuset.cpus 0"
	want := v2
	if strings.Contains(out, "memory/") {
		want = v1
	}
	for line := range strings.SplitSeq(want, "|") {
		if !strings.Contains(out+"\n", line+"\n") {
			t.Errorf("no %q in:\n%s", line, out)
		}
	}

	name := n.name(t, "-oom")
	r := n.run(nil, "run", "--name", name, "--memory", "16m", "--memory-swap", "16m", testImage, "helper", "oom", "67108864")
	if r.code != 137 {
		t.Error(r)
	}
	if got := n.docker(t, "inspect", "-f", "{{.State.OOMKilled}} {{.State.ExitCode}}", name); got != "true 137" {
		t.Error(got)
	}

	name = n.name(t, "")
	n.docker(t, "run", "-d", "--name", name, "--memory", "32m", testImage, "sleep", "1000")
	n.docker(t, "update", "--memory", "64m", "--memory-swap", "64m", "--pids-limit", "44", "--restart", "unless-stopped", name)
	if got := n.docker(t, "inspect", "-f", "{{.HostConfig.Memory}} {{.HostConfig.PidsLimit}} {{.HostConfig.RestartPolicy.Name}}", name); got != "67108864 44 unless-stopped" {
		t.Error(got)
	}
	out = n.docker(t, "exec", name, "sh", "-c", script)
	if !strings.Contains(out, " 67108864") || !strings.Contains(out, "pids.max 44") {
		t.Error(out)
	}
}

func TestPublishedPorts(t *testing.T) {
	t.Parallel()
	n := shared(t)
	name := n.name(t, "")
	n.docker(t, "run", "-d", "--name", name, "-p", "8080", "-p", "127.0.0.1::8081/udp", "--expose", "9", testImage, "helper", "serve", "8080", "hello from inside")
	port := n.docker(t, "inspect", "-f", `{{(index (index .NetworkSettings.Ports "8080/tcp") 0).HostPort}}`, name)
	ip := n.docker(t, "inspect", "-f", "{{.NetworkSettings.IPAddress}}", name)
	for _, host := range []string{"127.0.0.1:" + port, "localhost:" + port, ip + ":8080", gateway(n) + ":" + port} {
		eventually(t, "an answer on "+host, func() bool { return fetch(host) == "hello from inside" })
	}
	// From another container, by the host's address.
	if got := n.docker(t, "run", "--rm", testImage, "wget", "-q", "-O-", "http://"+gateway(n)+":"+port); got != "hello from inside" {
		t.Error(got)
	}
	if got := n.docker(t, "port", name, "8080"); !strings.Contains(got, "0.0.0.0:"+port) {
		t.Error(got)
	}
	if got := n.docker(t, "ps", "--filter", "name="+name, "--format", "{{.Ports}}"); !strings.Contains(got, "0.0.0.0:"+port+"->8080/tcp") || !strings.Contains(got, "9/tcp") {
		t.Error(got)
	}
	// A port is taken once. The container stays, created.
	second := n.name(t, "-second")
	r := n.expect(t, 125, "port is already allocated", "run", "-d", "--name", second, "-p", port+":8080", testImage, "sleep", "1000")
	if got := n.docker(t, "inspect", "-f", "{{.State.Status}}", second); got != "created" {
		t.Errorf("%s after %v", got, r)
	}
	// Nor is one taken from another program.
	other, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	held := other.Addr().String()
	n.expect(t, 125, "failed to bind host port "+held+"/tcp: address already in use", "run", "--rm", "-p", held+":8080", testImage, "true")
	n.docker(t, "rm", "-f", name)
	eventually(t, "the port to be closed", func() bool { return fetch("127.0.0.1:"+port) == "" })
	// Others may have the port for a moment: the kernel gives it away, too.
	eventually(t, "the start of the second", func() bool { return n.run(nil, "start", second).code == 0 })
}

func TestPublishedUDPAndRanges(t *testing.T) {
	t.Parallel()
	n := shared(t)
	name := n.name(t, "")
	n.docker(t, "run", "-d", "--name", name, "-p", "127.0.0.1::7777/udp", testImage, "helper", "udp", "7777")
	addr := n.docker(t, "port", name, "7777/udp")
	eventually(t, "an echo from "+addr, func() bool {
		c, err := net.Dial("udp", addr)
		if err != nil {
			return false
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(time.Second)); err != nil {
			return false
		}
		if _, err := c.Write([]byte("ping")); err != nil {
			return false
		}
		buf := make([]byte, 10)
		k, err := c.Read(buf)
		return err == nil && string(buf[:k]) == "ping"
	})
	// A range is one port for each of a range in the container.
	ranged := n.name(t, "-range")
	base := 20000 + os.Getpid()%10000
	n.docker(t, "run", "-d", "--name", ranged, "-p", fmt.Sprintf("127.0.0.1:%d-%d:8080-8081", base, base+1), testImage, "helper", "serve", "8081", "second")
	eventually(t, "an answer on the range's second port", func() bool { return fetch(fmt.Sprintf("127.0.0.1:%d", base+1)) == "second" })
}

func gateway(n *node) string { return strings.TrimSuffix(n.subnet, "0/24") + "1" }

func fetch(host string) string {
	client := http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + host + "/")
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return ""
	}
	return string(b)
}

func TestBinds(t *testing.T) {
	t.Parallel()
	n := shared(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := n.docker(t, "run", "--rm", "-v", dir+":/in", testImage, "sh", "-c", "cat /in/f; echo inside > /in/g"); got != "host" {
		t.Error(got)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "g")); err != nil || string(b) != "inside\n" {
		t.Errorf("%q %v", b, err)
	}
	n.expect(t, 1, "Read-only file system", "run", "--rm", "-v", dir+":/in:ro", testImage, "touch", "/in/h")
	n.docker(t, "run", "--rm", "-v", dir+"/made/by/engine:/in", testImage, "true")
	if st, err := os.Stat(filepath.Join(dir, "made/by/engine")); err != nil || !st.IsDir() {
		t.Errorf("the bind's source was not made: %v", err)
	}
	n.expect(t, 125, "bind source path does not exist", "run", "--rm", "--mount", "type=bind,source="+dir+"/nope,target=/in", testImage, "true")
}
