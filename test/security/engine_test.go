//go:build linux && (amd64 || arm64)

package security

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
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

	"github.com/hako-engine/hako/internal/execfile"
)

// CVE-2019-18837 and its kin in the engine: what it makes in a container's file system.
func TestA12EngineFiles(t *testing.T) {
	n := engineNode(t)
	c := newCanary(t)
	hit := ""
	for i, name := range []string{"etc", "etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/mtab", "etc/passwd", "run", "dev", "sys", "proc", "tmp", ".dockerenv", "work", "vol"} {
		target := []string{c.dir, strings.Repeat("../", 30) + c.dir + "/sub", c.dir + "/sub/new"}[i%3]
		ref, err := n.load(t, func(cf *v1.Config) {
			cf.WorkingDir, cf.Volumes = "/work/deep", map[string]struct{}{"/vol/deep": {}, "/tmp/v": {}}
		}, base(t), []entry{{name: name, link: target}})
		if err != nil {
			continue // refused as an image
		}
		out, _ := n.run(t, script(ref, "cat /vol/deep/* /work/* /etc/*; ls /vol/deep", object{"User": "user"}))
		if strings.Contains(out, secret) {
			hit = name + ": host files in the container"
		}
		if h := c.touched(t); h != "" {
			hit = name + ": " + h
		}
	}
	verdict(t, "A12 engine's own files", "see A12", hit)
}

// CVE-2018-10892 and others: what the host's /proc and /sys tell.
func TestA14MaskedPaths(t *testing.T) {
	n := engineNode(t)
	ref := n.plain(t)
	text := `for f in /proc/acpi /proc/keys /proc/timer_list /proc/interrupts /proc/sched_debug /proc/scsi /proc/latency_stats /proc/kcore /sys/firmware /sys/devices/virtual/powercap /sys/devices/system/cpu/cpu0/thermal_throttle; do
		if [ -d $f ]; then ls $f; else head -c 20 $f; fi 2>/dev/null | grep -q . && echo open $f; done
		for f in /proc/sys/kernel/core_pattern /proc/sysrq-trigger /proc/irq/default_smp_affinity /proc/fs/nfsd /sys/kernel/mm/ksm/run /sys/fs/cgroup/memory/x; do { true >>$f; } 2>/dev/null && echo writable $f; done; mkdir /sys/fs/cgroup/memory/x 2>/dev/null && echo writable cgroup; echo done`
	look := func(privileged bool) string {
		out, err := n.run(t, script(ref, text, object{"HostConfig": object{"Privileged": privileged}}))
		if err != nil || !strings.Contains(out, "done") {
			t.Fatal(out, err)
		}
		return strings.TrimSpace(strings.ReplaceAll(out, "done\n", ""))
	}
	compared(t, "A14 CVE-2018-10892 masked paths", "privileged", look(true), look(false))
}

// CVE-2026-31431's hardening and the default profile: system calls.
func TestA15SystemCalls(t *testing.T) {
	n := engineNode(t)
	program, err := os.ReadFile(built(t, probeBinary))
	must(t, err)
	ref, err := n.load(t, nil, base(t), []entry{{name: "bin/probe", content: string(program)}})
	must(t, err)
	probe := func(options ...string) (hit string) {
		out, err := n.run(t, script(ref, "probe", object{"HostConfig": object{"SecurityOpt": options}}))
		if err != nil || !strings.Contains(out, "clone_user") {
			t.Fatal(out, err)
		}
		var hits []string
		for line := range strings.Lines(out) {
			f := strings.Fields(line)
			if len(f) > 1 && f[1] != "EPERM" && f[1] != "ENOSYS" {
				hits = append(hits, strings.Join(f[:2], "="))
			}
		}
		return strings.Join(hits, " ")
	}
	compared(t, "A15 CVE-2026-31431 system calls", "unconfined", probe("seccomp=unconfined"), probe())
}

// CVE-2022-24769: the engine asks for inheritable capabilities.
func TestB1EngineCapabilities(t *testing.T) {
	n := engineNode(t)
	ref := n.plain(t)
	hit := ""
	for _, o := range []object{{}, {"User": "1000"}, {"HostConfig": object{"Privileged": true}}, {"User": "user", "HostConfig": object{"CapAdd": []string{"ALL"}}}} {
		out, err := n.run(t, script(ref, "cat /proc/self/status", o))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(out) {
			for _, set := range []string{"CapInh:", "CapAmb:"} {
				if v, ok := strings.CutPrefix(line, set); ok && strings.Trim(v, "\t\n 0") != "" {
					hit = fmt.Sprint(o, line)
				}
			}
			if v, ok := strings.CutPrefix(line, "CapEff:"); ok && o["User"] != nil && strings.Trim(v, "\t\n 0") != "" {
				hit = fmt.Sprint(o, line)
			}
		}
	}
	verdict(t, "B1 CVE-2022-24769 engine", "see B1", hit)
}

// CVE-2016-3697, CVE-2024-40635: USER of the image; CVE-2022-36109: the primary group.
func TestB2B3User(t *testing.T) {
	n := engineNode(t)
	ref := n.plain(t)
	hit := ""
	for _, user := range []string{"4294967296", "18446744073709551616", "-1", "0x0", "1000:4294967296", "4294967295", "1000"} {
		out, err := n.run(t, script(ref, "id", object{"User": user}))
		if err == nil && (strings.Contains(out, "uid=0") || strings.Contains(out, "gid=0")) {
			hit = user + ": " + out
		}
	}
	verdict(t, "B2 CVE-2016-3697 USER of an image", "see B2", hit)
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
	hit := ""
	for _, home := range []string{"/\nx:x:0:0::/:/bin/sh", "/\rx:x:0:0::/:/bin/sh"} {
		for _, o := range []object{{"Env": []string{"HOME=" + home}}, {"WorkingDir": home}, {"User": "user" + home}} {
			if out, err := n.run(t, script(ref, "cat /etc/passwd", o)); err == nil && strings.Contains(out, "x:x:0:0") {
				hit = fmt.Sprintf("%q: %s", o, out)
			}
		}
	}
	verdict(t, "B4 CVE-2022-4318 HOME", "none: hako writes no accounts", hit)
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
	c := newCanary(t)
	program := filepath.Join(c.dir, "program")
	must(t, execfile.Write(program, []byte("#!/bin/sh\necho ran >"+c.dir+"/ran\n"), 0o755))
	c.before = c.look()
	labels := map[string]string{
		"containerd.io/restart.loguri": "binary://" + program, "containerd.io/restart.status": "running", "containerd.io/restart.policy": "always",
		"io.cri-containerd.kind": "container", "io.kubernetes.cri.container-type": "sandbox", "io.containerd.runc.v2.group": "x",
		"org.systemd.property.ExecStopPost": program, "hako.restart": "always", "run.oci.handler": "krun", "run.oci.hooks.stderr": c.dir + "/sub/file",
		"io.katacontainers.config.hypervisor.path": program, "dev.hako/runtime": program,
	}
	ref, err := n.load(t, func(cf *v1.Config) { cf.Labels = labels }, base(t))
	must(t, err)
	hit := ""
	id, err := n.start(t, script(ref, "sleep 100000"))
	must(t, err)
	if h := c.touched(t); h != "" {
		hit = "labels of an image: " + h
	}
	// Nothing of the image reaches the runtime's configuration as an annotation.
	_ = filepath.WalkDir(n.dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "config.json" && strings.Contains(path, id) {
			raw, _ := os.ReadFile(path)
			var spec struct{ Annotations map[string]string }
			if json.Unmarshal(raw, &spec) == nil {
				for k := range labels {
					if _, ok := spec.Annotations[k]; ok {
						hit = "the image's label " + k + " is an annotation"
					}
				}
			}
		}
		return nil
	})
	verdict(t, "B6 CVE-2026-53488 labels of images", "none: no label has a meaning", hit)
	hit = ""
	for k, v := range labels {
		if _, err := n.start(t, script(ref, "sleep 1", object{"HostConfig": object{"Annotations": object{k: v}}})); err == nil {
			if h := c.touched(t); h != "" {
				hit = k + ": " + h
			}
		}
	}
	verdict(t, "B7 CVE-2023-6476 annotations", "none: no annotation has a meaning", hit)
}

// CVE-2021-21334, CVE-2020-14370: environments leak from one container or the host to another.
func TestB8Environment(t *testing.T) {
	n := engineNode(t)
	ref := n.plain(t)
	var wg sync.WaitGroup
	var mu sync.Mutex
	hit := ""
	limit := make(chan struct{}, 4)
	for i := range 24 {
		wg.Go(func() {
			limit <- struct{}{}
			defer func() { <-limit }()
			mine := fmt.Sprintf("MINE_%d=%d", i, i)
			out, err := n.run(t, script(ref, "env", object{"Env": []string{mine}}))
			mu.Lock()
			defer mu.Unlock()
			if err != nil || !strings.Contains(out, mine) {
				t.Error(out, err)
			}
			if strings.Count(out, "MINE_") != 1 || strings.Contains(out, n.token) {
				hit = out
			}
		})
	}
	wg.Wait()
	verdict(t, "B8 CVE-2021-21334 environments", "none: compared with what was given", hit)
}

// CVE-2019-14891: who is killed first when memory runs out.
func TestB11OOMScores(t *testing.T) {
	n := engineNode(t)
	ref := n.plain(t)
	id, err := n.start(t, script(ref, "sleep 100000"))
	must(t, err)
	_, body := n.call("GET", "/containers/"+id+"/json", nil)
	var c struct{ State struct{ Pid int } }
	must(t, json.Unmarshal([]byte(body), &c))
	score := func(pid int) (v int) {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
		must(t, err)
		_, err = fmt.Sscan(string(raw), &v)
		must(t, err)
		return v
	}
	var stat struct{ ppid int }
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.State.Pid))
	must(t, err)
	_, err = fmt.Sscan(strings.Fields(string(raw[strings.LastIndexByte(string(raw), ')')+1:]))[1], &stat.ppid)
	must(t, err)
	hit := ""
	if score(stat.ppid) > score(c.State.Pid) || score(n.cmd.Process.Pid) > score(c.State.Pid) {
		hit = fmt.Sprintf("shim %d, engine %d, container %d", score(stat.ppid), score(n.cmd.Process.Pid), score(c.State.Pid))
	}
	verdict(t, "B11 CVE-2019-14891 OOM scores", "none: a rule", hit)
}

// CVE-2022-23648, CVE-2023-0778: the first content of a volume, exports and copies come from
// the host.
func TestC7VolumesAndExports(t *testing.T) {
	n := engineNode(t)
	c := newCanary(t)
	hit := ""
	for name, target := range map[string]string{"absolute": c.dir, "relative": strings.Repeat("../", 40) + c.dir, "magic": "/proc/1/root" + c.dir, "self": "/proc/self/cwd/" + strings.Repeat("../", 40) + c.dir} {
		ref, err := n.load(t, func(cf *v1.Config) {
			cf.Volumes = map[string]struct{}{"/vol": {}, "/dir/sub": {}}
		}, base(t), []entry{{name: "vol", link: target}, {name: "dir", link: target}, {name: "file", link: target + "/host-secret"}})
		if err != nil {
			continue
		}
		out, _ := n.run(t, script(ref, "cat /vol/* /dir/sub/* /dir/*; find /vol /dir"))
		if strings.Contains(out, secret) || strings.Contains(out, "host-secret") {
			hit = name + ": a volume holds the host's files"
		}
		id, _, _ := n.create(t, script(ref, "true"))
		for _, path := range []string{"/vol/host-secret", "/dir/host-secret", "/file", "/vol/."} {
			if _, body := n.call("GET", "/containers/"+id+"/archive?path="+path, nil); strings.Contains(body, secret) {
				hit = name + ": copied " + path
			}
		}
		if _, body := n.call("GET", "/containers/"+id+"/export", nil); strings.Contains(body, secret) {
			hit = name + ": exported"
		}
		if h := c.touched(t); h != "" {
			hit = name + ": " + h
		}
	}
	// What a container may only read, a copy into it may not write either.
	readonly := n.plain(t)
	for what, o := range map[string]object{
		"bind":   {"HostConfig": object{"Binds": []string{c.dir + ":/ro:ro"}}},
		"root":   {"HostConfig": object{"ReadonlyRootfs": true}},
		"nested": {"HostConfig": object{"Binds": []string{c.dir + ":/ro:ro", filepath.Join(c.dir, "sub") + ":/ro/kernel:ro"}}},
	} {
		for _, running := range []bool{false, true} {
			id, _, body := n.create(t, script(readonly, "sleep 100000", o))
			if id == "" {
				t.Fatal(body)
			}
			if running {
				n.call("POST", "/containers/"+id+"/start", nil)
			}
			tarball, err := archive(entry{name: "ptmx", content: "owned"}, entry{name: "sub/file", content: "owned"}, entry{name: "kernel/file", content: "owned"})
			must(t, err)
			for _, path := range []string{"/ro", "/ro/sub", "/ro/kernel", "/", "/etc"} {
				if what != "root" && !strings.HasPrefix(path, "/ro") {
					continue
				}
				if code, body := n.call("PUT", "/containers/"+id+"/archive?path="+path, bytes.NewReader(tarball), "Content-Type", "application/x-tar"); code < 400 {
					hit = fmt.Sprintf("read-only %s, running %t: wrote %s (%d %s)", what, running, path, code, body)
				}
			}
			if h := c.touched(t); h != "" {
				hit = "read-only " + what + ": " + h
			}
		}
	}
	// The control follows the link as a string, as the peers did.
	dir := t.TempDir()
	must(t, os.Symlink(c.dir, filepath.Join(dir, "vol")))
	raw, _ := os.ReadFile(filepath.Join(dir, "vol/host-secret"))
	control := ""
	if string(raw) == secret {
		control = "the host's file"
	}
	compared(t, "C7 CVE-2022-23648 volumes, exports", "os.ReadFile below the root", control, hit)
}

// CVE-2021-41091, CVE-2021-41103, CVE-2024-25621: users of the host walk the engine's folders.
func TestC8FoldersAreClosed(t *testing.T) {
	n := engineNode(t)
	ref, err := n.load(t, func(cf *v1.Config) { cf.Volumes = map[string]struct{}{"/vol": {}} }, base(t), []entry{{name: "bin/suid", content: "#!", mode: 0o4755}})
	must(t, err)
	id, err := n.start(t, script(ref, "cp -p /bin/suid /vol; echo logged; sleep 100000"))
	must(t, err)
	_ = id
	walk := func(dir string) (seen string) {
		cmd := exec.Command("busybox", "find", dir, "-type", "f", "-print", "-o", "-type", "d", "!", "-perm", "-1", "-print")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 61234, Gid: 61234}}
		raw, _ := cmd.Output()
		for line := range strings.Lines(string(raw)) {
			line = strings.TrimSpace(line)
			cmd := exec.Command("busybox", "head", "-c", "1", line)
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 61234, Gid: 61234}}
			if cmd.Run() == nil {
				seen += line + " "
			}
		}
		return seen
	}
	open := filepath.Join(workDir, "open")
	must(t, os.MkdirAll(open, 0o755))
	must(t, os.WriteFile(filepath.Join(open, "file"), []byte("x"), 0o644))
	hit := walk(filepath.Join(n.dir, "lib")) + walk(filepath.Join(n.dir, "run"))
	for dir, most := range map[string]fs.FileMode{"lib": 0o710, "run": 0o711} {
		if st, err := os.Stat(filepath.Join(n.dir, dir)); err != nil || st.Mode().Perm()&^most != 0 {
			hit += fmt.Sprintf("%s has mode %v (%v) ", dir, st.Mode(), err)
		}
	}
	compared(t, "C8 CVE-2021-41091 folders", "an open folder", walk(open), hit)
}

// sockets lists the listening unix sockets that anybody can reach: abstract ones, and those
// that others than root may connect to.
func sockets(t *testing.T, within string) (bad []string) {
	t.Helper()
	f, err := os.Open("/proc/net/unix")
	must(t, err)
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		f := strings.Fields(sc.Text())
		if len(f) < 8 || !strings.Contains(f[7], within) {
			continue
		}
		if strings.HasPrefix(f[7], "@") {
			bad = append(bad, f[7])
			continue
		}
		if st, err := os.Stat(f[7]); err == nil && st.Mode().Perm()&0o007 != 0 {
			bad = append(bad, fmt.Sprint(f[7], " ", st.Mode()))
		}
	}
	return bad
}

// CVE-2020-15257: a shim's socket that a container in the host's network reaches.
func TestD1Sockets(t *testing.T) {
	n := engineNode(t)
	ref := n.plain(t)
	id, err := n.start(t, script(ref, "sleep 100000", object{"HostConfig": object{"NetworkMode": "host"}}))
	must(t, err)
	mark := fmt.Sprint("hksec-control-", os.Getpid())
	l, err := net.Listen("unix", "@"+mark)
	must(t, err)
	defer l.Close()
	hit := strings.Join(append(append(sockets(t, n.dir), sockets(t, id)...), sockets(t, "hako-shim")...), " ")
	compared(t, "D1 CVE-2020-15257 sockets", "an abstract socket", strings.Join(sockets(t, mark), " "), hit)
}

// CVE-2018-15664, CVE-2026-42306: copies race with a container that exchanges folders.
func TestF1CopyRace(t *testing.T) {
	n := engineNode(t)
	ref := n.plain(t)
	c := newCanary(t)
	id, err := n.start(t, script(ref, "mkdir -p /work/x/sub; echo inside >/work/x/host-secret; sleep 1000"))
	must(t, err)
	_, body := n.call("GET", "/containers/"+id+"/json", nil)
	var info struct{ State struct{ Pid int } }
	must(t, json.Unmarshal([]byte(body), &info))
	root := fmt.Sprintf("/proc/%d/root", info.State.Pid)
	eventually(t, "the container's files", func() bool { _, err := os.Stat(root + "/work/x/host-secret"); return err == nil })
	must(t, os.Symlink(c.dir, root+"/work/link"))
	_, stop := racer(t, root+"/work/x", root+"/work/link")
	defer stop()
	tarball, err := archive(entry{name: "ptmx", content: "owned"}, entry{name: "sub/file", content: "owned"}, entry{name: "new", content: "owned"})
	must(t, err)
	hit := ""
	reader := func(path string) string {
		raw, _ := os.ReadFile(root + path)
		return string(raw)
	}
	control := ""
	for i := 0; i < max(starts(), 60) && hit == ""; i++ {
		if control == "" && reader("/work/link/host-secret")+reader("/work/x/host-secret") != "" && strings.Contains(reader("/work/x/host-secret"), secret) {
			control = "the host's file"
		}
		if _, body := n.call("GET", "/containers/"+id+"/archive?path=/work/x/host-secret", nil); strings.Contains(body, secret) {
			hit = "copied from the host"
		}
		n.call("PUT", "/containers/"+id+"/archive?path=/work/x", strings.NewReader(string(tarball)), "Content-Type", "application/x-tar")
		n.call("HEAD", "/containers/"+id+"/archive?path=/work/x/host-secret", nil)
		if h := c.touched(t); h != "" {
			hit = h
		}
	}
	if control == "" && !thorough() {
		control = "not seen in the time given"
	}
	compared(t, "F1 CVE-2018-15664 copy race", "os.ReadFile below the root", control, hit)
}

// CVE-2019-14271, CVE-2022-1227: the engine runs programs of the container.
func TestF2ProgramsOfTheContainer(t *testing.T) {
	n := engineNode(t)
	trojan := "#!/bin/sh\necho \"$0 $HAKO_DAEMON_TOKEN\" >>/trojan-ran\nexec /bin/busybox sleep 0\n"
	layer := []entry{}
	for _, p := range []string{"ps", "xz", "gzip", "unpigz", "zstd", "tar", "nsenter", "getent", "id", "mount"} {
		for _, d := range []string{"bin/", "usr/bin/", "sbin/"} {
			layer = append(layer, entry{name: d + p, content: trojan})
		}
	}
	layer = append(layer, entry{name: "lib/libnss_files.so.2", content: "trojan"}, entry{name: "etc/nsswitch.conf", content: "passwd: files\n"})
	ref, err := n.load(t, nil, base(t), layer)
	must(t, err)
	id, err := n.start(t, object{"Image": ref, "Cmd": []string{"/bin/busybox", "sleep", "100000"}, "User": "user"})
	must(t, err)
	n.call("GET", "/containers/"+id+"/top", nil)
	n.call("GET", "/containers/"+id+"/top?ps_args=aux", nil)
	n.call("GET", "/containers/"+id+"/stats?stream=0&one-shot=1", nil)
	n.call("GET", "/containers/"+id+"/changes", nil)
	for _, magic := range []string{"\xfd7zXZ\x00", "\x1f\x8b\x08\x00", "BZh9", "\x28\xb5\x2f\xfd", "\x04\x22\x4d\x18"} {
		n.call("PUT", "/containers/"+id+"/archive?path=/tmp", strings.NewReader(magic+strings.Repeat("x", 600)), "Content-Type", "application/x-tar")
	}
	n.call("GET", "/containers/"+id+"/archive?path=/bin", nil)
	code, body := n.call("GET", "/containers/"+id+"/archive?path=/trojan-ran", nil)
	hit := ""
	if code != 404 {
		hit = fmt.Sprint(code, " ", body)
	}
	// The control runs one of them as a program of the container's folder.
	dir := t.TempDir()
	must(t, execfile.Write(filepath.Join(dir, "ps"), []byte(strings.ReplaceAll(trojan, "/trojan-ran", dir+"/trojan-ran")), 0o755))
	cmd := exec.Command(filepath.Join(dir, "ps"))
	cmd.Env = append(os.Environ(), "HAKO_DAEMON_TOKEN="+n.token)
	_ = cmd.Run()
	raw, _ := os.ReadFile(dir + "/trojan-ran")
	control := ""
	if strings.Contains(string(raw), n.token) {
		control = "the daemon's environment"
	}
	compared(t, "F2 CVE-2019-14271 programs of the container", "its ps, run by the host", control, hit)
}

// CVE-2025-9074 and rebinding: pages and containers that reach the API.
func TestF5ReachOfTheAPI(t *testing.T) {
	n := engineNode(t)
	hit := ""
	for _, h := range [][]string{{"Origin", "http://evil.example"}, {"Origin", "null"}, {"Host", "evil.example"}, {"Origin", "http://docker"}} {
		if h[0] == "Host" {
			continue // see api/docker.TestBrowsersAreRefused: the client here sets Host itself
		}
		if code, body := n.call("GET", "/containers/json", nil, h...); code != 403 {
			hit = fmt.Sprintf("%q: %d %s", h, code, clip(body, 80))
		}
	}
	// Everything that the daemon and its shims listen on is a unix socket, but for the streams of
	// the CRI: on the loopback, and with nothing for those who have no token.
	listeners := func(pid int) (found []string) {
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		inodes := map[string]bool{}
		for _, fd := range fds {
			if l, err := os.Readlink(fd); err == nil && strings.HasPrefix(l, "socket:[") {
				inodes[strings.Trim(l, "socket:[]")] = true
			}
		}
		for _, proto := range []string{"tcp", "tcp6"} {
			raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, proto))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			must(t, err)
			for line := range strings.Lines(string(raw)) {
				if f := strings.Fields(line); len(f) > 9 && f[3] == "0A" && inodes[f[9]] {
					found = append(found, proto+" "+f[1])
				}
			}
		}
		return found
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	for i, h := range listeners(n.cmd.Process.Pid) {
		port, loopback := strings.CutPrefix(h, "tcp 0100007F:")
		number, err := strconv.ParseUint(port, 16, 16)
		if i > 0 || !loopback || err != nil {
			hit += "the daemon listens on " + h
			continue
		}
		for _, path := range []string{"/", "/_ping", "/v1.50/containers/json", "/exec/" + strings.Repeat("A", 32), "/metrics", "/debug/pprof/"} {
			resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d%s", number, path))
			must(t, err)
			resp.Body.Close()
			if resp.StatusCode != http.StatusNotFound {
				hit += fmt.Sprintf("%s of its streams: %s ", path, resp.Status)
			}
		}
	}
	compared(t, "F5 CVE-2025-9074 reach of the API", "a listener of the test", strings.Join(listeners(os.Getpid()), " "), hit)
}

// CVE-2020-13401: router advertisements; CVE-2024-32473: IPv6 in a network without.
func TestF7F8IPv6(t *testing.T) {
	n := engineNode(t)
	ref := n.plain(t)
	out, err := n.run(t, script(ref, "cd /proc/sys/net/ipv6/conf; for i in *; do [ $i = lo ] || grep -q 0 $i/accept_ra || echo $i; done; echo ra; ip -6 addr show dev eth0; ip -6 route"))
	must(t, err)
	if !strings.Contains(out, "ra\n") {
		t.Fatal(out)
	}
	hit := ""
	ra, v6, _ := strings.Cut(out, "ra\n")
	if strings.TrimSpace(ra) != "" {
		hit = "accept_ra in the container: " + ra
	}
	if raw, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + n.bridge + "/accept_ra"); err == nil && strings.TrimSpace(string(raw)) != "0" {
		hit = "accept_ra of the bridge is " + string(raw)
	}
	raw, err := os.ReadFile("/proc/sys/net/ipv6/conf/default/accept_ra")
	control := ""
	if err == nil && strings.TrimSpace(string(raw)) != "0" {
		control = "accept_ra=" + strings.TrimSpace(string(raw))
	}
	if err != nil {
		verdict(t, "F7 CVE-2020-13401 router advertisements", "none: the host has no IPv6", hit)
	} else {
		compared(t, "F7 CVE-2020-13401 router advertisements", "an interface by default", control, hit)
	}
	hit = ""
	if strings.Contains(v6, "fe80") || strings.Contains(v6, "inet6") {
		hit = v6
	}
	host, err := n.run(t, script(ref, "ip -6 addr", object{"HostConfig": object{"NetworkMode": "host"}}))
	must(t, err)
	control = ""
	if strings.Contains(host, "inet6") {
		control = "IPv6 addresses"
	}
	if control == "" {
		verdict(t, "F8 CVE-2024-32473 IPv6", "none: the host has no IPv6", hit)
	} else {
		compared(t, "F8 CVE-2024-32473 IPv6", "the host's network", control, hit)
	}
}

// The rows E1 to E3 through Docker's door.
func TestE1EngineRestoresNothing(t *testing.T) {
	n := engineNode(t)
	ref := n.plain(t)
	id, code, body := n.create(t, script(ref, "sleep 100000"))
	if id == "" {
		t.Fatal(code, body)
	}
	hit := ""
	for _, r := range [][2]string{{"POST", "/start?checkpoint=one&checkpoint-dir=/tmp"}, {"POST", "/checkpoints"}, {"GET", "/checkpoints"}} {
		if code, body := n.call(r[0], "/containers/"+id+r[1], object{"CheckpointID": "one"}); code < 400 {
			hit = fmt.Sprintf("%s %s: %d %s", r[0], r[1], code, body)
		}
	}
	verdict(t, "E1, E2, E3 engine", "none: there is no restore", hit)
}
