package integration

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// kubelet is a client of a node's CRI.
type kubelet struct {
	cri.RuntimeServiceClient
	images cri.ImageServiceClient
	t      *testing.T
	n      *node
	logs   string
}

func newKubelet(t *testing.T, n *node) *kubelet {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+filepath.Join(n.dir, "run", "cri.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second}), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &kubelet{cri.NewRuntimeServiceClient(conn), cri.NewImageServiceClient(conn), t, n, t.TempDir()}
}

// removePods removes all sandboxes.
func (n *node) removePods() error {
	conn, err := grpc.NewClient("unix://"+filepath.Join(n.dir, "run", "cri.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	c := cri.NewRuntimeServiceClient(conn)
	list, err := c.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return fmt.Errorf("list sandboxes: %w", err)
	}
	for _, p := range list.Items {
		if _, err := c.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.Id}); err != nil {
			return err
		}
	}
	return nil
}

func ctx(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	t.Cleanup(cancel)
	return ctx
}

func (k *kubelet) config(name string, pid cri.NamespaceMode) *cri.PodSandboxConfig {
	return &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: name, Namespace: "default", Uid: "uid-" + name}, Hostname: name + "-host", LogDirectory: k.logs,
		Labels: map[string]string{"app": name}, Annotations: map[string]string{"a": "b"},
		DnsConfig: &cri.DNSConfig{Servers: []string{"10.9.9.9"}, Searches: []string{"cluster.local"}, Options: []string{"ndots:5"}},
		Linux: &cri.LinuxPodSandboxConfig{
			Sysctls:         map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_forward": "1"},
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Pid: pid}},
		},
	}
}

func (k *kubelet) runPod(c *cri.PodSandboxConfig) string {
	k.t.Helper()
	resp, err := k.RunPodSandbox(ctx(k.t), &cri.RunPodSandboxRequest{Config: c})
	if err != nil {
		k.t.Fatal(err)
	}
	return resp.PodSandboxId
}

// run makes and starts a container.
func (k *kubelet) run(pod string, pc *cri.PodSandboxConfig, name string, cmd ...string) string {
	k.t.Helper()
	id := k.create(pod, pc, name, cmd...)
	if _, err := k.StartContainer(ctx(k.t), &cri.StartContainerRequest{ContainerId: id}); err != nil {
		k.t.Fatal(err)
	}
	return id
}

func (k *kubelet) create(pod string, pc *cri.PodSandboxConfig, name string, cmd ...string) string {
	k.t.Helper()
	resp, err := k.CreateContainer(ctx(k.t), &cri.CreateContainerRequest{PodSandboxId: pod, SandboxConfig: pc, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: name}, Image: &cri.ImageSpec{Image: testImage}, Command: cmd, LogPath: name + ".log",
		Labels: map[string]string{"name": name},
		Linux: &cri.LinuxContainerConfig{
			Resources: &cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuShares: 100},
			SecurityContext: &cri.LinuxContainerSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Pid: pc.Linux.SecurityContext.NamespaceOptions.Pid}, Seccomp: &cri.SecurityProfile{},
			},
		},
	}})
	if err != nil {
		k.t.Fatal(err)
	}
	return resp.ContainerId
}

func (k *kubelet) status(id string) *cri.ContainerStatus {
	k.t.Helper()
	resp, err := k.ContainerStatus(ctx(k.t), &cri.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		k.t.Fatal(err)
	}
	return resp.Status
}

func (k *kubelet) podStatus(id string) *cri.PodSandboxStatus {
	k.t.Helper()
	resp, err := k.PodSandboxStatus(ctx(k.t), &cri.PodSandboxStatusRequest{PodSandboxId: id})
	if err != nil {
		k.t.Fatal(err)
	}
	return resp.Status
}

func (k *kubelet) sh(id, script string) string {
	k.t.Helper()
	resp, err := k.ExecSync(ctx(k.t), &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", script}, Timeout: 300})
	if err != nil {
		k.t.Fatal(err)
	}
	return strings.TrimSpace(string(resp.Stdout) + string(resp.Stderr))
}

func (k *kubelet) log(name string) string {
	b, err := os.ReadFile(filepath.Join(k.logs, name+".log"))
	if err != nil {
		k.t.Error(err)
	}
	return string(b)
}

// end removes a pod and checks that nothing of it is left in the lists.
func (k *kubelet) end(pod string) {
	k.t.Helper()
	for range 2 { // the kubelet does it until it succeeds, and once more
		if _, err := k.StopPodSandbox(ctx(k.t), &cri.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
			k.t.Error(err)
		}
		if _, err := k.RemovePodSandbox(ctx(k.t), &cri.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
			k.t.Error(err)
		}
	}
	if l, err := k.ListPodSandbox(ctx(k.t), &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{Id: pod}}); err != nil || len(l.Items) != 0 {
		k.t.Errorf("sandboxes left: %v, %v", l, err)
	}
	if l, err := k.ListContainers(ctx(k.t), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: pod}}); err != nil || len(l.Containers) != 0 {
		k.t.Errorf("containers left: %v, %v", l, err)
	}
}

func TestPod(t *testing.T) {
	n := own(t)
	k := newKubelet(t, n)
	for pid, processes := range map[cri.NamespaceMode]string{cri.NamespaceMode_CONTAINER: "1", cri.NamespaceMode_POD: "3"} {
		t.Run(pid.String(), func(t *testing.T) {
			k.t, k.logs = t, t.TempDir()
			name := "p" + strings.ToLower(pid.String())
			pc := k.config(name, pid)
			pod := k.runPod(pc)
			st := k.podStatus(pod)
			ip := net.ParseIP(st.Network.Ip)
			if st.State != cri.PodSandboxState_SANDBOX_READY || ip == nil || st.CreatedAt == 0 || st.Labels["app"] != name || st.Annotations["a"] != "b" {
				t.Errorf("sandbox %v", st)
			}
			if _, err := k.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: k.config(name, cri.NamespaceMode_NODE)}); status.Code(err) != codes.FailedPrecondition {
				t.Errorf("another pod of the same name: %v", err)
			}
			id := k.create(pod, pc, "main", "sh", "-c", "echo hello; printf partial >&2; sleep 1000")
			if s := k.status(id); s.State != cri.ContainerState_CONTAINER_CREATED || s.StartedAt != 0 || !strings.HasPrefix(s.ImageId, "sha256:") {
				t.Errorf("created: %v", s)
			}
			if _, err := k.StartContainer(ctx(t), &cri.StartContainerRequest{ContainerId: id}); err != nil {
				t.Fatal(err)
			}
			if s := k.status(id); s.State != cri.ContainerState_CONTAINER_RUNNING || s.StartedAt == 0 || s.User.Linux.Uid != 0 || s.LogPath != filepath.Join(k.logs, "main.log") {
				t.Errorf("running: %v", s)
			}
			side := k.run(pod, pc, "side", "sleep", "1000")
			for script, want := range map[string]string{
				"hostname": name + "-host", "cat /etc/hostname": name + "-host", "cat /proc/sys/kernel/shm_rmid_forced": "1", "cat /proc/sys/net/ipv4/ip_forward": "1",
				"cat /etc/resolv.conf":                   "search cluster.local\nnameserver 10.9.9.9\noptions ndots:5",
				"grep -c " + ip.String() + " /etc/hosts": "1", "echo x > /dev/shm/f": "",
			} {
				if got := k.sh(id, script); got != want {
					t.Errorf("%s: %q, want %q", script, got, want)
				}
			}
			if got := k.sh(side, "cat /dev/shm/f"); got != "x" {
				t.Errorf("/dev/shm is not the pod's: %q", got)
			}
			// The containers' own processes, an init where the namespace is shared, and nothing else.
			if got := k.sh(side, "ps -o comm | grep -c -e sleep -e docker-init"); got != processes {
				t.Errorf("%s processes are seen, want %s: %s", got, processes, k.sh(side, "ps"))
			}
			if names := n.docker(t, "ps", "--format", "{{.Names}}"); !strings.Contains(names, "k8s_main_"+name+"_default_uid-"+name+"_0") {
				t.Errorf("docker ps: %s", names)
			}
			lines := regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z stdout F hello\n$`)
			eventually(t, "the log", func() bool { return lines.MatchString(k.log("main")) })

			if _, err := k.UpdateContainerResources(ctx(t), &cri.UpdateContainerResourcesRequest{ContainerId: id, Linux: &cri.LinuxContainerResources{CpuShares: 512}}); err != nil {
				t.Error(err)
			}
			if r := k.status(id).Resources.Linux; r.CpuShares != 512 || r.MemoryLimitInBytes != 64<<20 {
				t.Errorf("resources: %v", r)
			}
			path := filepath.Join(k.logs, "main.log")
			if err := os.Rename(path, path+".1"); err != nil {
				t.Fatal(err)
			}
			if _, err := k.ReopenContainerLog(ctx(t), &cri.ReopenContainerLogRequest{ContainerId: id}); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(path); err != nil {
				t.Errorf("the new log: %v", err)
			}
			if l, err := k.ListContainerStats(ctx(t), &cri.ListContainerStatsRequest{}); err != nil || len(l.Stats) != 2 || l.Stats[0].Memory.WorkingSetBytes.Value == 0 {
				t.Errorf("stats: %v, %v", l, err)
			}
			if s, err := k.PodSandboxStats(ctx(t), &cri.PodSandboxStatsRequest{PodSandboxId: pod}); err != nil || s.Stats.Linux.Network.DefaultInterface == nil || s.Stats.Linux.Process.ProcessCount.Value < 2 {
				t.Errorf("sandbox stats: %v, %v", s, err)
			}
			if _, err := k.StopContainer(ctx(t), &cri.StopContainerRequest{ContainerId: id, Timeout: 0}); err != nil {
				t.Error(err)
			}
			if s := k.status(id); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 137 || s.Reason != "Error" || s.FinishedAt < s.StartedAt {
				t.Errorf("stopped: %v", s)
			}
			ended := k.run(pod, pc, "ended", "sh", "-c", "exit 3")
			eventually(t, "exit", func() bool { return k.status(ended).State == cri.ContainerState_CONTAINER_EXITED })
			if s := k.status(ended); s.ExitCode != 3 {
				t.Errorf("ended: %v", s)
			}
			wrong := k.create(pod, pc, "wrong", "/no/such")
			if _, err := k.StartContainer(ctx(t), &cri.StartContainerRequest{ContainerId: wrong}); err == nil {
				t.Error("a program that is not there was started")
			}
			if s := k.status(wrong); s.State != cri.ContainerState_CONTAINER_EXITED || s.Reason != "StartError" || s.ExitCode != 128 || !strings.Contains(s.Message, "/no/such") {
				t.Errorf("not started: %v", s)
			}
			k.end(pod)
		})
	}
}

// TestPodOutlivesDaemon kills the daemon: pods go on, what ends meanwhile is known afterwards,
// and everything can be used and removed.
func TestPodOutlivesDaemon(t *testing.T) {
	n := own(t)
	k := newKubelet(t, n)
	type one struct {
		pc                  *cri.PodSandboxConfig
		pod, runs, ends, ip string
	}
	var pods []one
	for _, pid := range []cri.NamespaceMode{cri.NamespaceMode_CONTAINER, cri.NamespaceMode_POD} {
		pc := k.config("k"+strings.ToLower(pid.String()), pid)
		p := one{pc: pc, pod: k.runPod(pc)}
		p.ip = k.podStatus(p.pod).Network.Ip
		p.runs = k.run(p.pod, pc, "runs"+pid.String(), "sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.1; done")
		p.ends = k.run(p.pod, pc, "ends"+pid.String(), "sh", "-c", "sleep 1; exit 7")
		pods = append(pods, p)
	}
	if err := n.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for _, p := range pods {
		n.awaitEnd(t, p.ends)
	}
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	for _, p := range pods {
		if st := k.podStatus(p.pod); st.State != cri.PodSandboxState_SANDBOX_READY || st.Network.Ip != p.ip {
			t.Errorf("sandbox: %v", st)
		}
		if s := k.status(p.runs); s.State != cri.ContainerState_CONTAINER_RUNNING {
			t.Errorf("running: %v", s)
		}
		eventually(t, "the end to be known", func() bool { return k.status(p.ends).State == cri.ContainerState_CONTAINER_EXITED })
		if s := k.status(p.ends); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 7 || s.Reason != "Error" {
			t.Errorf("ended: %v", s)
		}
		if got := k.sh(p.runs, "hostname"); got != p.pc.Hostname {
			t.Errorf("exec: %q", got)
		}
		if _, err := k.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: p.pc}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("its name is free: %v", err)
		}
		k.run(p.pod, p.pc, "late"+p.pc.Metadata.Name, "sleep", "1000")
		// No line of the log is missing.
		for i, line := range strings.Split(strings.TrimSpace(k.log("runs"+p.pc.Linux.SecurityContext.NamespaceOptions.Pid.String())), "\n") {
			if !strings.HasSuffix(line, fmt.Sprint(" stdout F ", i)) {
				t.Errorf("line %d of the log is %q", i, line)
				break
			}
		}
		k.end(p.pod)
	}
}

// TestPodCalls: a call that is cancelled leaves nothing, and one that has timed out is joined
// by the next.
func TestPodCalls(t *testing.T) {
	n := own(t)
	k := newKubelet(t, n)
	for i := range 20 {
		pc := k.config(fmt.Sprint("cancelled", i), cri.NamespaceMode_POD)
		c, cancel := context.WithCancel(ctx(t))
		time.AfterFunc(time.Duration(i)*time.Millisecond, cancel)
		if resp, err := k.RunPodSandbox(c, &cri.RunPodSandboxRequest{Config: pc}); err == nil {
			k.end(resp.PodSandboxId) // it was faster
		} else if l, err := k.ListPodSandbox(ctx(t), &cri.ListPodSandboxRequest{}); err != nil {
			t.Error(err)
		} else {
			// The answer was on its way when the client gave up: for the daemon that was no cancellation.
			for _, p := range l.Items {
				k.end(p.Id)
			}
		}
		// The name is free as soon as the undoing is over, which a new request waits for.
		k.end(k.runPod(pc))
	}
	for i := range 10 {
		pc := k.config(fmt.Sprint("slow", i), cri.NamespaceMode_CONTAINER)
		c, cancel := context.WithTimeout(ctx(t), time.Duration(i+1)*time.Millisecond)
		resp, err := k.RunPodSandbox(c, &cri.RunPodSandboxRequest{Config: pc})
		cancel()
		pod := resp.GetPodSandboxId()
		if err != nil {
			pod = k.runPod(pc)
		}
		if l, err := k.ListPodSandbox(ctx(t), &cri.ListPodSandboxRequest{}); err != nil || len(l.Items) != 1 {
			t.Errorf("sandboxes: %v, %v", l, err)
		}
		k.end(pod)
	}
	if l, err := k.ListPodSandbox(ctx(t), &cri.ListPodSandboxRequest{}); err != nil || len(l.Items) != 0 {
		t.Errorf("sandboxes left: %v, %v", l, err)
	}
}

// TestPodWithAHungShim: a shim that does nothing any more holds up nobody but its pod, and that
// can be ended.
func TestPodWithAHungShim(t *testing.T) {
	n := own(t)
	k := newKubelet(t, n)
	pc := k.config("hangs", cri.NamespaceMode_POD)
	pod := k.runPod(pc)
	id := k.run(pod, pc, "main", "sleep", "1000")
	hung := 0
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		b, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		if strings.Contains(string(b), pod) && strings.HasSuffix(string(b), "serve\x00") {
			fmt.Sscan(filepath.Base(dir), &hung)
		}
	}
	if hung == 0 {
		t.Fatal("no shim is found")
	}
	if err := syscall.Kill(hung, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if s := k.status(id); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("status %v", s)
	}
	if _, err := k.ListPodSandboxStats(ctx(t), &cri.ListPodSandboxStatsRequest{}); err != nil {
		t.Error(err)
	}
	opc := k.config("other", cri.NamespaceMode_CONTAINER)
	other := k.runPod(opc)
	k.run(other, opc, "other", "sleep", "1000")
	k.end(other)
	k.end(pod)
}

// TestPodsUnderLoad: many lives side by side make no error and leave nothing, and addresses that
// have run out can be used again.
func TestPodsUnderLoad(t *testing.T) {
	n := own(t)
	n.flags = append(n.flags, "--bridge-subnet", strings.Replace(n.subnet, "/24", "/27", 1)) // 29 addresses
	if err := errors.Join(n.signal(syscall.SIGTERM), n.start()); err != nil {
		t.Fatal(err)
	}
	k := newKubelet(t, n)
	const lives, clients = 120, 16
	var next atomic.Int32
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for i := next.Add(1); i <= lives && !t.Failed(); i = next.Add(1) {
				k.live(fmt.Sprint("p", i), int(i))
			}
		})
	}
	wg.Wait()
	for round := range 5 {
		var pods []string
		for i := 0; ; i++ {
			r, err := k.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: k.config(fmt.Sprintf("full%d-%d", round, i), cri.NamespaceMode_CONTAINER)})
			if status.Code(err) == codes.ResourceExhausted {
				break
			}
			if err != nil || i > 40 {
				t.Fatalf("pod %d of round %d: %v", i, round, err)
			}
			pods = append(pods, r.PodSandboxId)
		}
		if len(pods) != 29 {
			t.Errorf("round %d: %d pods", round, len(pods))
		}
		for _, p := range pods {
			k.end(p)
		}
	}
}

// TestEphemeralContainer joins the PID namespace of another container, as kubectl debug --target does.
func TestEphemeralContainer(t *testing.T) {
	n := own(t)
	k := newKubelet(t, n)
	pc := k.config("target", cri.NamespaceMode_CONTAINER)
	pod := k.runPod(pc)
	target := k.run(pod, pc, "main", "sleep", "4321")
	ended := k.run(pod, pc, "ended", "true")
	eventually(t, "exit", func() bool { return k.status(ended).State == cri.ContainerState_CONTAINER_EXITED })
	debug := func(name, target string) (*cri.CreateContainerResponse, error) {
		return k.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: pod, SandboxConfig: pc, Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: name}, Image: &cri.ImageSpec{Image: testImage}, Command: []string{"sleep", "1000"},
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_TARGET, TargetId: target},
			}},
		}})
	}
	r, err := debug("debug", target)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.StartContainer(ctx(t), &cri.StartContainerRequest{ContainerId: r.ContainerId}); err != nil {
		t.Fatal(err)
	}
	if got := k.sh(r.ContainerId, "ps -o args | grep -c '[4]321'"); got != "1" {
		t.Errorf("the target is not seen: %s", k.sh(r.ContainerId, "ps"))
	}
	if _, err := debug("none", "no-such"); status.Code(err) != codes.NotFound {
		t.Errorf("no target: %v", err)
	}
	if r, err = debug("late", ended); err != nil {
		t.Fatal(err)
	}
	if _, err := k.StartContainer(ctx(t), &cri.StartContainerRequest{ContainerId: r.ContainerId}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a target that has ended: %v", err)
	}
	k.end(pod)
}
