//go:build linux && (amd64 || arm64)

package security

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/execfile"
)

// CVE-2022-24769: the engine asks for inheritable capabilities.
func TestB1EngineCapabilities(t *testing.T) {
	n := engineNode(t)
	ref := n.plain(t)
	// sets gives those that are not empty and should be.
	sets := func(status string, empty ...string) (found string) {
		for _, set := range empty {
			_, rest, ok := strings.Cut(status, "\n"+set+":")
			if !ok {
				t.Fatalf("no %s in %q", set, status)
			}
			v, _, _ := strings.Cut(rest, "\n")
			if strings.Trim(v, "\t 0") != "" {
				found += set + v + " "
			}
		}
		return found
	}
	hit := ""
	for _, o := range []object{{}, {"User": "1000"}, {"HostConfig": object{"Privileged": true}}, {"User": "user", "HostConfig": object{"CapAdd": []string{"ALL"}}}} {
		out, err := n.run(t, script(ref, "cat /proc/self/status", o))
		if err != nil {
			t.Fatal(err)
		}
		empty := []string{"CapInh", "CapAmb"}
		if o["User"] != nil {
			empty = append(empty, "CapEff")
		}
		if found := sets(out, empty...); found != "" {
			hit = fmt.Sprint(o, found)
		}
	}
	// The control has them.
	cmd := exec.Command("busybox", "cat", "/proc/self/status")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 61234, Gid: 61234}, AmbientCaps: []uintptr{unix.CAP_CHOWN}}
	status, err := cmd.Output()
	must(t, err)
	compared(t, "B1 CVE-2022-24769 engine", "a process with an ambient set", sets(string(status), "CapInh", "CapAmb", "CapEff"), hit)
}

// CVE-2016-3697, CVE-2024-40635: USER of the image; CVE-2022-36109: the primary group.
func TestB2B3User(t *testing.T) {
	n := engineNode(t)
	ref := n.plain(t)
	root := func(user string) string {
		out, err := n.run(t, script(ref, "id", object{"User": user}))
		if err == nil && (strings.Contains(out, "uid=0") || strings.Contains(out, "gid=0")) {
			return user + ": " + out
		}
		return ""
	}
	hit := ""
	for _, user := range []string{"4294967296", "18446744073709551616", "-1", "0x0", "1000:4294967296", "4294967295", "1000"} {
		hit += root(user)
	}
	overflowed := uint64(4294967296)
	compared(t, "B2 CVE-2016-3697 USER of an image", "32 bits of the number", root(fmt.Sprint(uint32(overflowed))), hit)
	group := func(user string) string {
		out, err := n.run(t, script(ref, "id -G; cat /group-denied", object{"User": user}))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(out, "denied to the group") {
			return "a file that is denied to the group was read"
		}
		return ""
	}
	ref, err := n.load(t, nil, base(t), []entry{{name: "group-denied", content: "denied to the group", mode: 0o604}, {name: "etc/passwd", content: "user:x:1000:0::/:/bin/sh\nother:x:1001:2000::/:/bin/sh\n"}})
	must(t, err)
	compared(t, "B3 CVE-2022-36109 primary group", "a user of another group", group("other"), group("user"))
}

// CVE-2022-4318: a home folder that is several lines.
func TestB4HomeOfSeveralLines(t *testing.T) {
	n := engineNode(t)
	ref := n.plain(t)
	account := func(ref string, o object) string {
		if out, err := n.run(t, script(ref, "cat /etc/passwd", o)); err == nil && strings.Contains(out, "x:x:0:0") {
			return fmt.Sprintf("%q: %s ", o, out)
		}
		return ""
	}
	hit, naive, podman := "", 0, ""
	homes := []string{"/\nx:x:0:0::/:/bin/sh", "/\rx:x:0:0::/:/bin/sh"}
	for _, home := range homes {
		for _, o := range []object{{"Env": []string{"HOME=" + home}}, {"WorkingDir": home}, {"User": "user" + home}} {
			hit += account(ref, o)
		}
		// The controls: the obvious way to write the account of a user whom the image does not know, and an engine that does it.
		written, err := n.load(t, nil, base(t), []entry{{name: "etc/passwd", content: fmt.Sprintf("%d:x:%d:%d::%s:/bin/sh\n", 1234, 1234, 1234, home), mode: 0o644}})
		must(t, err)
		if account(written, object{}) != "" {
			naive++
		}
		if strings.Contains(podmanAccounts(t, home), "x:x:0:0") {
			podman += fmt.Sprintf("podman: %q; ", home)
		}
	}
	control := ""
	if naive == len(homes) {
		control = podman + "fmt.Sprintf"
	}
	compared(t, "B4 CVE-2022-4318 HOME", "accounts that are written", control, hit)
}

// podmanAccounts gives the account file of a root file system after Debian's podman, where it is installed, has made a container of
// it for a user that it does not know.
func podmanAccounts(t *testing.T, home string) string {
	t.Helper()
	if _, err := exec.LookPath("podman"); err != nil {
		return ""
	}
	b := newBundle(t, "")
	must(t, os.WriteFile(filepath.Join(b.rootfs, "etc/passwd"), []byte("root:x:0:0::/:/bin/sh\n"), 0o644))
	config := filepath.Join(b.dir, "containers.conf")
	// Other users of podman, with other folders, have the locks in shared memory in common with it.
	must(t, os.WriteFile(config, []byte("[engine]\nlock_type = \"file\"\nevents_logger = \"none\"\n"), 0o600))
	podman := func(args ...string) string {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		at := func(dir string) string { return filepath.Join(b.dir, dir) }
		cmd := exec.CommandContext(ctx, "podman", append([]string{"--root", at("root"), "--runroot", at("run"), "--tmpdir", at("tmp"), "--storage-driver", "vfs",
			"--runtime", "runc", "--cgroup-manager", "cgroupfs"}, args...)...)
		cmd.Env = append(os.Environ(), "CONTAINERS_CONF="+config)
		raw, err := cmd.CombinedOutput()
		return fmt.Sprint(string(raw), err)
	}
	// The folder does not exist: the container is never started.
	out := podman("create", "--network", "none", "--cgroup-parent", "/"+b.id, "--user", "1234", "--workdir", home, "--name", b.id, "--rootfs", b.rootfs, "true")
	out += podman("init", b.id)
	out += podman("rm", "--force", b.id)
	raw, err := os.ReadFile(filepath.Join(b.rootfs, "etc/passwd"))
	must(t, err)
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/" + b.id)
	for _, g := range groups {
		_ = os.Remove(filepath.Join(g, "conmon"))
		_ = os.Remove(g)
	}
	t.Logf("podman: %q %q", out, raw)
	return string(raw)
}

// CVE-2026-47262, GHSA-mjcv-p78q-w5fw: account files of the image that never end.
func TestB5AccountFiles(t *testing.T) {
	n := engineNode(t)
	hit := ""
	before := resident(t, n.cmd.Process.Pid)
	for name, e := range map[string]entry{
		"fifo":       {name: "etc/passwd", typ: '6'},
		"zero":       {name: "etc/passwd", link: "/dev/zero"},
		"kmsg":       {name: "etc/passwd", link: "/proc/kmsg"},
		"host":       {name: "etc/passwd", link: "/proc/1/root/etc/shadow"},
		"self":       {name: "etc/group", link: "passwd/../group"},
		"big":        {name: "etc/passwd", size: 64 << 20},
		"many lines": {name: "etc/group", content: strings.Repeat("a:x:1:user\n", 600000)},
		"long line":  {name: "etc/passwd", content: "user:x:" + strings.Repeat("1", 1<<20)},
		"directory":  {name: "etc/passwd/"},
	} {
		layers := [][]entry{base(t), {{name: "etc/.wh.passwd"}}, {e}}
		ref, err := n.load(t, nil, layers...)
		if err != nil {
			continue
		}
		start := time.Now()
		_, _ = n.run(t, script(ref, "true", object{"User": "user"})) // an error, or not: but soon
		if d := time.Since(start); d > 10*time.Minute {
			hit = fmt.Sprintf("%s: took %v", name, d)
		}
	}
	if grown := resident(t, n.cmd.Process.Pid) - before; grown > 96<<20 {
		hit = fmt.Sprintf("the engine has grown by %d MiB", grown>>20)
	}
	// The control is the obvious way to read such a file.
	fifo := filepath.Join(t.TempDir(), "passwd")
	must(t, syscall.Mkfifo(fifo, 0o600))
	done := make(chan struct{})
	go func() { defer close(done); _, _ = os.ReadFile(fifo) }()
	control := "never ends"
	select {
	case <-done:
		control = ""
	case <-time.After(300 * time.Millisecond):
		f, err := os.OpenFile(fifo, os.O_WRONLY, 0) // lets the reader go
		must(t, err)
		f.Close()
		<-done
	}
	compared(t, "B5 CVE-2026-47262 account files", "os.ReadFile", control, hit)
}

func resident(t *testing.T, pid int) int64 {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	must(t, err)
	var size, rss int64
	_, err = fmt.Sscan(string(raw), &size, &rss)
	must(t, err)
	return rss * int64(os.Getpagesize())
}

// CVE-2026-53488, CVE-2023-6476, CVE-2024-3154: labels and annotations that mean something to
// an engine, a shim or systemd.
func TestB6B7LabelsAndAnnotations(t *testing.T) {
	n := engineNode(t)
	plant := func() (*canary, map[string]string) {
		c := newCanary(t)
		program := filepath.Join(c.dir, "program")
		must(t, execfile.Write(program, []byte("#!/bin/sh\necho ran >"+c.dir+"/ran\n"), 0o755))
		c.before = c.look()
		return c, map[string]string{
			"containerd.io/restart.loguri": "binary://" + program, "containerd.io/restart.status": "running", "containerd.io/restart.policy": "always",
			"io.cri-containerd.kind": "container", "io.kubernetes.cri.container-type": "sandbox", "io.containerd.runc.v2.group": "x",
			"org.systemd.property.ExecStopPost": program, "hako.restart": "always", "run.oci.handler": "krun", "run.oci.hooks.stderr": c.dir + "/sub/file",
			"io.katacontainers.config.hypervisor.path": program, "dev.hako/runtime": program,
		}
	}
	// The control obeys whoever has written a label or an annotation, as the peers of these rows did.
	var obeyed []string
	for _, k := range []string{"containerd.io/restart.loguri", "org.systemd.property.ExecStopPost", "run.oci.hooks.stderr", "io.katacontainers.config.hypervisor.path", "dev.hako/runtime"} {
		c, labels := plant()
		if k == "run.oci.hooks.stderr" {
			must(t, os.WriteFile(labels[k], []byte("from a hook"), 0o600))
		} else {
			must(t, exec.Command(strings.TrimPrefix(labels[k], "binary://")).Run())
		}
		if h := c.touched(t); h != "" {
			obeyed = append(obeyed, k)
		}
	}
	control := ""
	if len(obeyed) == 5 {
		control = strings.Join(obeyed, ", ")
	}
	c, labels := plant()
	ref, err := n.load(t, func(cf *v1.Config) { cf.Labels = labels }, base(t))
	must(t, err)
	hit := ""
	_, err = n.run(t, script(ref, "true"))
	must(t, err)
	if h := c.touched(t); h != "" {
		hit = "labels of an image: " + h
	}
	compared(t, "B6 CVE-2026-53488 labels of images", "obeying them", control, hit)
	// Nothing of the image reaches the runtime's configuration as an annotation; what the client asks for does.
	annotations := func(more ...object) (found string) {
		id, err := n.start(t, script(ref, "sleep 100000", more...))
		must(t, err)
		configs := 0
		_ = filepath.WalkDir(n.dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.Name() != "config.json" || !strings.Contains(path, id) {
				return nil
			}
			raw, err := os.ReadFile(path)
			must(t, err)
			var spec struct{ Annotations map[string]string }
			must(t, json.Unmarshal(raw, &spec))
			configs++
			for k := range labels {
				if _, ok := spec.Annotations[k]; ok {
					found += k + " is an annotation "
				}
			}
			return nil
		})
		if configs == 0 {
			t.Error("no configuration of the container was found")
		}
		return found
	}
	compared(t, "B6 CVE-2026-53488 labels as annotations", "asked for by the client", annotations(object{"HostConfig": object{"Annotations": object{"hako.restart": "always"}}}), annotations())
	hit = ""
	for k, v := range labels {
		if _, err := n.run(t, script(ref, "true", object{"HostConfig": object{"Annotations": object{k: v}}})); err == nil {
			if h := c.touched(t); h != "" {
				hit = k + ": " + h
			}
		}
	}
	compared(t, "B7 CVE-2023-6476 annotations", "obeying them", control, hit)
}

// CVE-2021-21334, CVE-2020-14370: environments leak from one container or the host to another.
func TestB8Environment(t *testing.T) {
	n := engineNode(t)
	ref := n.plain(t)
	// leak gives the environment of a container if it is another than its own.
	leak := func(mine string, env ...string) string {
		out, err := n.run(t, script(ref, "env", object{"Env": env}))
		if err != nil {
			t.Error(err)
		}
		if strings.Contains(out, mine) && strings.Count(out, "MINE_") == 1 && !strings.Contains(out, n.token) {
			return ""
		}
		return fmt.Sprintf("%q", out)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	hit := ""
	limit := make(chan struct{}, 4)
	for i := range 24 {
		wg.Go(func() {
			limit <- struct{}{}
			defer func() { <-limit }()
			mine := fmt.Sprintf("MINE_%d=%d", i, i)
			h := leak(mine, mine)
			mu.Lock()
			defer mu.Unlock()
			hit += h
		})
	}
	wg.Wait()
	// The controls: two environments that are made of one slice, so that the first is the second (CVE-2021-21334), and the daemon's.
	image := append(make([]string, 0, 2), "PATH=/bin")
	one, two := append(image, "MINE_98=98"), append(image, "MINE_99=99")
	control := ""
	if leak("MINE_98=98", one...) != "" && leak("MINE_99=99", two...) == "" && leak("MINE_97=97", "MINE_97=97", "TOKEN="+n.token) != "" {
		control = "the other's, the daemon's"
	}
	compared(t, "B8 CVE-2021-21334 environments", "one slice for two", control, hit)
}

// CVE-2019-14891: who is killed when a container's memory runs out.
func TestB11OOMScores(t *testing.T) {
	n := engineNode(t)
	ref := n.plain(t)
	// exposed tells that a process goes with a container when memory runs out, or before it.
	exposed := func(pid, container int) string {
		switch {
		case memoryGroup(t, pid) == memoryGroup(t, container):
			return "in the container's cgroup"
		case oomScore(t, pid) > oomScore(t, container):
			return fmt.Sprintf("score %d above the container's %d", oomScore(t, pid), oomScore(t, container))
		}
		return ""
	}
	// start gives a container that fills its memory when fill is called, and that sees the program which did killed. Part of it is
	// in /dev/shm: that program is then smaller than a score of 1000 weighs.
	start := func() (id string, pid int, fill func()) {
		id, err := n.start(t, script(ref, "until [ -e /go ]; do sleep 0.05; done; dd if=/dev/zero of=/dev/shm/x bs=1M count=40; dd if=/dev/zero of=/dev/null bs=160M count=1 && echo survived || echo killed; sleep 100000",
			object{"HostConfig": object{"Memory": 64 << 20, "MemorySwap": 64 << 20}}))
		must(t, err)
		pid = n.pid(t, id)
		return id, pid, func() {
			must(t, os.WriteFile(fmt.Sprintf("/proc/%d/root/go", pid), nil, 0o600))
			out := ""
			eventually(t, "the end of memory", func() bool {
				_, out = n.call("GET", "/containers/"+id+"/logs?stdout=1", nil)
				return strings.Contains(out, "killed") || strings.Contains(out, "survived")
			})
			if strings.Contains(out, "survived") {
				t.Error("the container had enough memory")
			}
		}
	}

	// The control is a monitor as CRI-O's was: in the container's cgroup, and by its score the first to go.
	_, pid, fill := start()
	monitor := exec.Command("busybox", "sleep", "100000")
	must(t, monitor.Start())
	t.Cleanup(func() { _ = monitor.Process.Kill(); _ = monitor.Wait() })
	must(t, os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", monitor.Process.Pid), []byte("1000"), 0))
	control := []string{exposed(monitor.Process.Pid, pid)}
	must(t, os.WriteFile(filepath.Join(memoryGroup(t, pid), "cgroup.procs"), fmt.Append(nil, monitor.Process.Pid), 0))
	control = append(control, exposed(monitor.Process.Pid, pid))
	fill()
	// Whoever was not killed before ends by this.
	must(t, monitor.Process.Signal(syscall.SIGTERM))
	_ = monitor.Wait()
	if s, ok := monitor.ProcessState.Sys().(syscall.WaitStatus); ok && s.Signal() == syscall.SIGKILL {
		control = append(control, "killed in the container's place")
	}
	seen := strings.Join(control, ", ")
	if len(control) != 3 || control[0] == "" || control[1] == "" {
		t.Errorf("control: %q", control)
		seen = ""
	}

	id, pid, fill := start()
	neighbour, err := n.start(t, script(ref, "sleep 100000"))
	must(t, err)
	others := map[string]int{"shim": parent(t, pid), "engine": n.cmd.Process.Pid, "neighbour": n.pid(t, neighbour)}
	hit := ""
	for name, other := range others {
		if h := exposed(other, pid); h != "" {
			hit += name + ": " + h + " "
		}
	}
	fill()
	// The shim answers, and nobody is another.
	for _, call := range []string{"pause", "unpause"} {
		if code, body := n.call("POST", "/containers/"+id+"/"+call, nil); code != 204 {
			hit += fmt.Sprintf("%s: %d %s ", call, code, body)
		}
	}
	if now := n.pid(t, neighbour); now != others["neighbour"] || parent(t, pid) != others["shim"] {
		hit += "killed in the container's place"
	}
	compared(t, "B11 CVE-2019-14891 OOM", "a monitor in its cgroup", seen, hit)
}

// pid gives the first process of a container that runs.
func (n *node) pid(t *testing.T, id string) int {
	t.Helper()
	_, body := n.call("GET", "/containers/"+id+"/json", nil)
	var c struct{ State struct{ Pid int } }
	must(t, json.Unmarshal([]byte(body), &c))
	if c.State.Pid == 0 {
		t.Fatalf("container %s does not run", id)
	}
	return c.State.Pid
}

func parent(t *testing.T, pid int) int {
	t.Helper()
	v, err := strconv.Atoi(statusOf(t, pid, "PPid")[0])
	must(t, err)
	return v
}

func oomScore(t *testing.T, pid int) (v int) {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
	must(t, err)
	_, err = fmt.Sscan(string(raw), &v)
	must(t, err)
	return v
}

// memoryGroup gives the folder of a process's cgroup that bounds its memory.
func memoryGroup(t *testing.T, pid int) string {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	must(t, err)
	unified := ""
	for line := range strings.Lines(string(raw)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case len(f) < 3:
		case f[1] == "memory":
			return "/sys/fs/cgroup/memory" + f[2]
		case f[1] == "":
			unified = "/sys/fs/cgroup" + f[2]
		}
	}
	return unified
}
