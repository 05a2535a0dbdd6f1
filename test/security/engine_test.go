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
	"syscall"
	"testing"

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
	// The control writes one of these files by its path.
	root := t.TempDir()
	must(t, os.Symlink(c.dir, filepath.Join(root, "etc")))
	must(t, os.WriteFile(filepath.Join(root, "etc/hosts"), nil, 0o644))
	compared(t, "A12 engine's own files", "os.WriteFile below the root", c.touched(t), hit)
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
	// The same without a checkpoint is a start.
	control := ""
	if code, _ := n.call("POST", "/containers/"+id+"/start", object{"CheckpointID": "one"}); code < 400 {
		control = fmt.Sprint("answered with ", code)
	}
	compared(t, "E1, E2, E3 engine", "a start without a checkpoint", control, hit)
}
