//go:build linux && (amd64 || arm64)

package security

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// kubelet is a client of the CRI.
type kubelet struct {
	cri.RuntimeServiceClient
	n    *node
	ref  string // an image of busybox
	logs string
}

func newKubelet(t *testing.T) *kubelet {
	t.Helper()
	n := engineNode(t)
	conn, err := grpc.NewClient("unix://"+filepath.Join(n.dir, "run/cri.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return &kubelet{cri.NewRuntimeServiceClient(conn), n, "docker.io/library/" + n.plain(t), t.TempDir()}
}

func limited(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// pod runs a sandbox until the test ends.
func (k *kubelet) pod(t *testing.T, change func(*cri.PodSandboxConfig)) (id string, c *cri.PodSandboxConfig, err error) {
	t.Helper()
	name := fmt.Sprintf("pod%d", counter.Add(1))
	c = &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: name, Namespace: "security", Uid: name}, LogDirectory: filepath.Join(k.logs, name),
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}}},
	}
	if change != nil {
		change(c)
	}
	resp, err := k.RunPodSandbox(limited(t), &cri.RunPodSandboxRequest{Config: c})
	if err != nil {
		return "", c, err
	}
	id = resp.PodSandboxId
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		_, err := k.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id})
		_, rerr := k.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id})
		if err = errors.Join(err, rerr); err != nil {
			t.Error(err)
		}
	})
	return id, c, nil
}

// container makes and starts one.
func (k *kubelet) container(t *testing.T, pod string, pc *cri.PodSandboxConfig, change func(*cri.ContainerConfig), cmd ...string) (string, error) {
	t.Helper()
	c := &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: fmt.Sprintf("c%d", counter.Add(1))}, Image: &cri.ImageSpec{Image: k.ref}, Command: cmd, LogPath: "0.log",
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: pc.GetLinux().GetSecurityContext().GetNamespaceOptions()}},
	}
	if change != nil {
		change(c)
	}
	resp, err := k.CreateContainer(limited(t), &cri.CreateContainerRequest{PodSandboxId: pod, SandboxConfig: pc, Config: c})
	if err != nil {
		return "", err
	}
	_, err = k.StartContainer(limited(t), &cri.StartContainerRequest{ContainerId: resp.ContainerId})
	return resp.ContainerId, err
}

// sleeper is a pod with a container that does nothing.
func (k *kubelet) sleeper(t *testing.T) string {
	t.Helper()
	pod, pc, err := k.pod(t, nil)
	must(t, err)
	id, err := k.container(t, pod, pc, nil, "sleep", "100000")
	must(t, err)
	return id
}

func (k *kubelet) sh(t *testing.T, id, text string) string {
	t.Helper()
	resp, err := k.ExecSync(limited(t), &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", text}, Timeout: 60})
	must(t, err)
	return strings.TrimSpace(string(resp.Stdout) + string(resp.Stderr))
}

// statusOf gives a value of /proc/PID/status.
func statusOf(t *testing.T, pid int, key string) []string {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if k, v, ok := strings.Cut(sc.Text(), ":"); ok && k == key {
			return strings.Fields(v)
		}
	}
	t.Fatalf("/proc/%d/status has no %s", pid, key)
	return nil
}

// CVE-2022-31030: output of ExecSync that fills the memory.
func TestD2ExecSyncOutput(t *testing.T) {
	k := newKubelet(t)
	id := k.sleeper(t)
	const size, sideBySide, most = 200 << 20, 4, 16 << 20
	script := fmt.Sprintf("head -c %d /dev/zero", size)
	// The same command, to whoever takes what comes.
	control := ""
	if out := k.sh(t, id, script+" | wc -c"); out == strconv.Itoa(size) {
		control = out + " bytes"
	}
	pid := k.n.cmd.Process.Pid
	must(t, os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0)) // the peak begins anew
	before, err := strconv.Atoi(statusOf(t, pid, "VmRSS")[0])
	must(t, err)
	var wg sync.WaitGroup
	var mu sync.Mutex
	hit := ""
	for range sideBySide {
		wg.Go(func() {
			resp, err := k.ExecSync(limited(t), &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", script}, Timeout: 120})
			mu.Lock()
			defer mu.Unlock()
			if n := len(resp.GetStdout()); n > most || err == nil && n == 0 {
				hit += fmt.Sprintf("an answer of %d bytes, %v ", n, err)
			}
		})
	}
	wg.Wait()
	peak, err := strconv.Atoi(statusOf(t, pid, "VmHWM")[0])
	must(t, err)
	if grown := (peak - before) << 10; grown > sideBySide*4*most {
		hit += fmt.Sprintf("the daemon grew by %d bytes", grown)
	}
	compared(t, "D2 CVE-2022-31030 output of ExecSync", "a pipe", control, hit)
}

// descriptors counts a process's; goroutines asks it.
func (n *node) usage(t *testing.T) (descriptors, goroutines int) {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", n.cmd.Process.Pid))
	must(t, err)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(n.dir, "run/debug.sock"))
	}}}
	resp, err := client.Get("http://x/debug/pprof/goroutine?debug=1")
	must(t, err)
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	must(t, err)
	_, rest, _ := strings.Cut(string(raw), "total ")
	total, _, _ := strings.Cut(rest, "\n")
	goroutines, err = strconv.Atoi(total)
	must(t, err)
	return len(list), goroutines
}

// CVE-2022-23471, 2025-64329: what an exec or an attach leaves behind in the daemon.
func TestD3LeaksOfExec(t *testing.T) {
	k := newKubelet(t)
	id := k.sleeper(t)
	const rounds = 40
	round := func() {
		ctx, cancel := context.WithCancel(limited(t))
		defer cancel()
		_, _ = k.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"no-such-command"}, Timeout: 30})
		_, err := k.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", "sleep 1000 & echo x"}, Timeout: 30})
		must(t, err)
		_, err = k.Exec(ctx, &cri.ExecRequest{ContainerId: id, Cmd: []string{"no-such-command"}, Tty: true, Stdin: true, Stdout: true})
		must(t, err)
		_, err = k.Attach(ctx, &cri.AttachRequest{ContainerId: id, Stdout: true})
		must(t, err)
		gone, hangUp := context.WithCancel(ctx)
		go hangUp()
		_, _ = k.ExecSync(gone, &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"sleep", "1000"}, Timeout: 300})
	}
	for range 5 {
		round()
	}
	fds, routines := k.n.usage(t)
	for range rounds {
		round()
	}
	// What is on its way may end; what leaked stays. A leak of one a round is far above the slack.
	leaked := func() (descriptors, goroutines string) {
		f, g := k.n.usage(t)
		if f > fds+rounds/2 {
			descriptors = fmt.Sprintf("%d descriptors after %d ", f, fds)
		}
		if g > routines+rounds/2 {
			goroutines = fmt.Sprintf("%d goroutines after %d ", g, routines)
		}
		return descriptors, goroutines
	}
	hit := ""
	for end := time.Now().Add(5 * time.Minute); ; time.Sleep(200 * time.Millisecond) {
		f, g := leaked()
		if hit = f + g; hit == "" || time.Now().After(end) {
			break
		}
	}
	// The control is what the daemon cannot let go of: clients that stay.
	control := ""
	var clients []net.Conn
	eventually(t, "the clients are seen", func() bool {
		conn, err := net.Dial("unix", k.n.socket)
		must(t, err)
		clients = append(clients, conn)
		f, g := leaked()
		control = f + g
		return f != "" && g != ""
	})
	for _, conn := range clients {
		conn.Close()
	}
	eventually(t, "the clients are gone", func() bool {
		f, g := leaked()
		return f+g == "" || hit != ""
	})
	compared(t, "D3 CVE-2022-23471, 2025-64329 leaks of exec", "clients that stay", control, hit)
}

// CVE-2022-0811: a sysctl whose value is more than one, or that is the host's.
func TestD5Sysctls(t *testing.T) {
	k := newKubelet(t)
	read := func(name string) string {
		raw, err := os.ReadFile(filepath.Join("/proc/sys", strings.ReplaceAll(name, ".", "/")))
		must(t, err)
		return strings.TrimSpace(string(raw))
	}
	watched := []string{"kernel.core_pattern", "kernel.shm_rmid_forced", "net.ipv4.ip_forward", "net.ipv4.conf.all.log_martians", "kernel.msgmax", "vm.swappiness", "kernel.panic"}
	before := map[string]string{}
	for _, w := range watched {
		before[w] = read(w)
	}
	set := func(host cri.NamespaceMode, name, value string) error {
		_, _, err := k.pod(t, func(c *cri.PodSandboxConfig) {
			c.Linux.Sysctls = map[string]string{name: value}
			c.Linux.SecurityContext.NamespaceOptions.Network, c.Linux.SecurityContext.NamespaceOptions.Ipc = host, host
		})
		return err
	}
	pod, own := cri.NamespaceMode_NODE, cri.NamespaceMode_POD
	control := ""
	if err := set(own, "kernel.shm_rmid_forced", "1"); err == nil {
		control = "kernel.shm_rmid_forced=1 of a pod's own"
	} else {
		t.Log(err)
	}
	hit := ""
	for _, c := range []struct {
		host        cri.NamespaceMode
		name, value string
	}{
		{own, "kernel.shm_rmid_forced", "1+kernel.core_pattern=|/bin/evil"}, {own, "kernel.shm_rmid_forced", "1\nkernel.core_pattern=|/bin/evil"}, {own, "kernel.shm_rmid_forced=1+kernel.core_pattern", "|/bin/evil"},
		{own, "kernel.core_pattern", "|/bin/evil"}, {own, "kernel/core_pattern", "|/bin/evil"}, {own, "net/../kernel/core_pattern", "|/bin/evil"}, {own, "net.ipv4.conf./../../../kernel.core_pattern", "|/bin/evil"},
		{own, "vm.swappiness", "1"}, {own, "kernel.panic", "77"}, {pod, "net.ipv4.conf.all.log_martians", "1"}, {pod, "kernel.msgmax", "4242"}, {pod, "kernel.shm_rmid_forced", "1"},
	} {
		if err := set(c.host, c.name, c.value); err == nil {
			hit += fmt.Sprintf("%s=%q was taken ", c.name, c.value)
		}
	}
	for _, w := range watched {
		if now := read(w); now != before[w] {
			hit += fmt.Sprintf("%s is %q now ", w, now)
		}
	}
	compared(t, "D5 CVE-2022-0811 sysctls", "one that is the pod's", control, hit)
}

// CVE-2025-0750: the log of a container outside of its folder.
func TestD6LogPath(t *testing.T) {
	k := newKubelet(t)
	elsewhere := t.TempDir()
	write := func(path string) string {
		pod, pc, err := k.pod(t, nil)
		must(t, err)
		id, err := k.container(t, pod, pc, func(c *cri.ContainerConfig) { c.LogPath = strings.Replace(path, "LOGS", pc.LogDirectory, 1) }, "echo", "logged")
		if err != nil {
			return ""
		}
		// Stopped: the log is whole.
		_, err = k.StopContainer(limited(t), &cri.StopContainerRequest{ContainerId: id, Timeout: 30})
		must(t, err)
		found := ""
		for _, dir := range []string{elsewhere, k.logs} {
			must(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
				if err == nil && d.Type().IsRegular() {
					inside := strings.HasPrefix(p, pc.LogDirectory+"/")
					found += strings.TrimPrefix(fmt.Sprintf(" %s (inside: %v)", filepath.Base(p), inside), " ")
					if !inside {
						found += " OUTSIDE"
					}
					err = os.Remove(p)
				}
				return err
			}))
		}
		return found
	}
	control := write("deep/0.log")
	up := strings.Repeat("../", 30)
	hit := ""
	for _, path := range []string{up + elsewhere[1:] + "/x.log", "../x.log", elsewhere + "/x.log", "a/../../x.log", ".."} {
		if got := write(path); strings.Contains(got, "OUTSIDE") {
			hit += path + ": " + got + " "
		}
	}
	compared(t, "D6 CVE-2025-0750 paths of logs", "a path inside", control, hit)
}

// Streams without a token, and tokens that were used or guessed.
func TestD7StreamTokens(t *testing.T) {
	k := newKubelet(t)
	id := k.sleeper(t)
	resp, err := k.Exec(limited(t), &cri.ExecRequest{ContainerId: id, Cmd: []string{"true"}, Stdout: true})
	must(t, err)
	get := func(url string) int {
		resp, err := http.Get(url)
		must(t, err)
		resp.Body.Close()
		return resp.StatusCode
	}
	u, err := url.Parse(resp.Url)
	must(t, err)
	hit, token := "", u.Path[strings.LastIndexByte(u.Path, '/')+1:]
	if len(token) < 22 { // 128 bits in base64
		hit += fmt.Sprintf("a token of %d characters ", len(token))
	}
	if ip := net.ParseIP(u.Hostname()); ip == nil || !ip.IsLoopback() || strings.Contains(resp.Url, "true") || strings.Contains(resp.Url, id[:12]) {
		hit += resp.Url + " "
	}
	for i := range 1000 {
		guess := strings.TrimSuffix(resp.Url, token) + fmt.Sprintf("%0*d", len(token), i)
		if code := get(guess); code != http.StatusNotFound {
			hit += fmt.Sprintf("a guess: %d ", code)
		}
	}
	control := ""
	if code := get(resp.Url); code != http.StatusNotFound {
		control = fmt.Sprintf("answered with %d", code)
	}
	if code := get(resp.Url); code != http.StatusNotFound {
		hit += fmt.Sprintf("the second use: %d", code)
	}
	compared(t, "D7 tokens of streams", "the token, once", control, hit)
}

// ids is the user namespace that the pods of a test get.
const ids = 1_900_000_000

func userNamespace(c *cri.PodSandboxConfig) {
	m := []*cri.IDMapping{{HostId: ids, ContainerId: 0, Length: 65536}}
	c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: m, Gids: m}
}

// CVE-2023-25809: a root of a user namespace that writes into the cgroups' file system.
func TestA13CgroupFilesystem(t *testing.T) {
	k := newKubelet(t)
	attempt := func(privileged bool, change func(*cri.PodSandboxConfig)) string {
		pod, pc, err := k.pod(t, func(c *cri.PodSandboxConfig) {
			c.Linux.SecurityContext.Privileged = privileged
			if change != nil {
				change(c)
			}
		})
		must(t, err)
		id, err := k.container(t, pod, pc, func(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged = privileged }, "sleep", "100000")
		must(t, err)
		return strings.Join(strings.Fields(k.sh(t, id, "for d in $(find /sys/fs/cgroup -maxdepth 1 -type d); do mkdir $d/hksec-x 2>/dev/null && echo $d && rmdir $d/hksec-x; done")), " ")
	}
	compared(t, "A13 CVE-2023-25809 cgroups of a user namespace", "privileged", attempt(true, nil), attempt(false, userNamespace)+attempt(false, nil))
}

// CVE-2025-47291: a pod with a user namespace outside of its cgroup.
func TestB9UserNamespaceCgroup(t *testing.T) {
	k := newKubelet(t)
	ended := func(limit int64) string {
		pod, pc, err := k.pod(t, userNamespace)
		must(t, err)
		id, err := k.container(t, pod, pc, func(c *cri.ContainerConfig) {
			c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: limit}
		}, "sh", "-c", "read x </proc/self/uid_map; echo $x; dd if=/dev/zero of=/dev/null bs=160M count=1 && echo survived; cat /proc/self/cgroup >/dev/null; sleep 100000")
		must(t, err)
		log := filepath.Join(pc.LogDirectory, "0.log")
		for end := time.Now().Add(5 * time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			st, err := k.ContainerStatus(limited(t), &cri.ContainerStatusRequest{ContainerId: id, Verbose: true})
			must(t, err)
			if st.Status.State == cri.ContainerState_CONTAINER_EXITED {
				return st.Status.Reason
			}
			raw, _ := os.ReadFile(log)
			if !strings.Contains(string(raw), strconv.Itoa(ids)) {
				continue
			}
			if strings.Contains(string(raw), "survived") {
				return "survived"
			}
			if limit > 0 && strings.Contains(string(raw), "Killed") {
				return "killed"
			}
		}
		t.Fatal("neither killed nor done")
		return ""
	}
	control, hit := "", ""
	if got := ended(0); got == "survived" {
		control = "takes 160 MB"
	}
	if got := ended(32 << 20); got != "OOMKilled" && got != "killed" {
		hit = "the limit does not hold: " + got
	}
	compared(t, "B9 CVE-2025-47291 limits in a user namespace", "no limit", control, hit)
}

// CVE-2021-21284: the root of a user namespace, as the host sees it, in the daemon's folders.
func TestB10FoldersOfMappedRoot(t *testing.T) {
	k := newKubelet(t)
	pod, pc, err := k.pod(t, userNamespace)
	must(t, err)
	id, err := k.container(t, pod, pc, nil, "sleep", "100000")
	must(t, err)
	if out := k.sh(t, id, "read a b c </proc/self/uid_map; echo $b"); out != strconv.Itoa(ids) {
		t.Fatalf("mapped to %q", out)
	}
	// It would have to be the owner, or to get in.
	walk := func(dir string) (hit string) {
		must(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if err != nil {
				return nil // gone meanwhile
			}
			if info, err := d.Info(); err == nil {
				if st, ok := info.Sys().(*syscall.Stat_t); ok && (st.Uid >= ids || st.Gid >= ids) && len(hit) < 200 {
					hit += p + " is its own "
				}
			}
			return nil
		}))
		cmd := exec.Command("busybox", "ls", dir)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: ids, Gid: ids}}
		if cmd.Run() == nil {
			hit += dir + " is open to it"
		}
		return hit
	}
	open := filepath.Join(workDir, "mapped")
	must(t, os.MkdirAll(open, 0o755))
	must(t, os.Chown(open, ids, ids))
	compared(t, "B10 CVE-2021-21284 folders of a mapped root", "a folder of its own", walk(open), walk(filepath.Join(k.n.dir, "lib/containers"))+walk(filepath.Join(k.n.dir, "lib/content")))
}
