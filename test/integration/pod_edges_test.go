package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hako-engine/hako/internal/execfile"
)

// request is for a container in a pod of pc, to be filled in by a test.
func (k *kubelet) request(pc *cri.PodSandboxConfig, name string, cmd ...string) *cri.ContainerConfig {
	return &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: name}, Image: &cri.ImageSpec{Image: testImage}, Command: cmd, LogPath: name + ".log",
		Linux: &cri.LinuxContainerConfig{
			Resources:       &cri.LinuxContainerResources{},
			SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: pc.GetLinux().GetSecurityContext().GetNamespaceOptions()},
		},
	}
}

func (k *kubelet) ask(pod string, pc *cri.PodSandboxConfig, c *cri.ContainerConfig) (string, error) {
	r, err := k.CreateContainer(ctx(k.t), &cri.CreateContainerRequest{PodSandboxId: pod, SandboxConfig: pc, Config: c})
	return r.GetContainerId(), err
}

// launch makes and starts a container.
func (k *kubelet) launch(pod string, pc *cri.PodSandboxConfig, c *cri.ContainerConfig) string {
	k.t.Helper()
	id, err := k.ask(pod, pc, c)
	if err != nil {
		k.t.Fatal(err)
	}
	if _, err := k.StartContainer(ctx(k.t), &cri.StartContainerRequest{ContainerId: id}); err != nil {
		k.t.Fatal(err)
	}
	return id
}

// pid gives the first process of a container.
func (k *kubelet) pid(id string) string {
	k.t.Helper()
	r, err := k.ContainerStatus(ctx(k.t), &cri.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		k.t.Fatal(err)
	}
	var v struct {
		Pid         int
		RuntimeSpec struct{ Process struct{ Args []string } }
	}
	if err := json.Unmarshal([]byte(r.Info["info"]), &v); err != nil || v.Pid == 0 || len(v.RuntimeSpec.Process.Args) == 0 {
		k.t.Fatalf("pid: %v: %.200s", err, r.Info["info"])
	}
	return strconv.Itoa(v.Pid)
}

// TestPodEvents: events come in the order of what happened, and the status of a pod holds those of its containers.
func TestPodEvents(t *testing.T) {
	n := own(t)
	k := newKubelet(t, n)
	ectx, cancel := context.WithCancel(ctx(t))
	stream, err := k.GetContainerEvents(ectx, &cri.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Header(); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var seen []*cri.ContainerEventResponse
	var ended sync.WaitGroup
	ended.Go(func() {
		for {
			ev, err := stream.Recv()
			if err != nil {
				return
			}
			mu.Lock()
			seen = append(seen, ev)
			mu.Unlock()
		}
	})
	defer ended.Wait()
	defer cancel()
	pc := k.config("events", cri.NamespaceMode_CONTAINER)
	pod := k.runPod(pc)
	id := k.run(pod, pc, "main", "sleep", "1000")
	if _, err := k.StopContainer(ctx(t), &cri.StopContainerRequest{ContainerId: id}); err != nil {
		t.Fatal(err)
	}
	st, err := k.PodSandboxStatus(ctx(t), &cri.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil || st.Timestamp == 0 || len(st.ContainersStatuses) != 1 || !proto.Equal(st.ContainersStatuses[0], k.status(id)) {
		t.Errorf("status of the pod: %v, %v", st, err)
	}
	k.end(pod)
	want := []string{"CREATED pod", "STARTED pod", "CREATED container", "STARTED container", "STOPPED container", "STOPPED pod", "DELETED container", "DELETED pod"}
	eventually(t, "all events", func() bool { mu.Lock(); defer mu.Unlock(); return len(seen) >= len(want) })
	mu.Lock()
	defer mu.Unlock()
	var got []string
	for _, ev := range seen {
		what := map[string]string{pod: "pod", id: "container"}[ev.ContainerId]
		got = append(got, strings.TrimSuffix(strings.TrimPrefix(ev.ContainerEventType.String(), "CONTAINER_"), "_EVENT")+" "+what)
		if ev.PodSandboxStatus.GetId() != pod || ev.PodSandboxStatus.GetMetadata().GetUid() != "uid-events" || ev.CreatedAt == 0 {
			t.Errorf("event %v", ev)
		}
		for _, s := range ev.ContainersStatuses {
			if ev.ContainerEventType == cri.ContainerEventType_CONTAINER_STOPPED_EVENT && s.State != cri.ContainerState_CONTAINER_EXITED {
				t.Errorf("an event of the end with %v", s)
			}
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("events %q", got)
	}
}

// TestPodResources: an update changes all or nothing, in the kernel and in the status, and holds over a restart.
func TestPodResources(t *testing.T) {
	n := own(t)
	k := newKubelet(t, n)
	pc := k.config("resources", cri.NamespaceMode_CONTAINER)
	pod := k.runPod(pc)
	c := k.request(pc, "main", "sleep", "1000")
	c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuShares: 256, CpuQuota: 50000, CpuPeriod: 100000, OomScoreAdj: 500}
	id := k.launch(pod, pc, c)
	pid := k.pid(id)
	state := func() string {
		t.Helper()
		score, err := os.ReadFile("/proc/" + pid + "/oom_score_adj")
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(cgroupFile(t, pid, "memory/memory.limit_in_bytes", "memory.max"), cgroupFile(t, pid, "cpu/cpu.shares", "cpu.weight"),
			strings.TrimSpace(string(score)), k.status(id).Resources)
	}
	update := func(id string, r *cri.LinuxContainerResources) error {
		_, err := k.UpdateContainerResources(ctx(t), &cri.UpdateContainerResourcesRequest{ContainerId: id, Linux: r})
		return err
	}
	before := state()
	for what, r := range map[string]*cri.LinuxContainerResources{
		"processors":   {MemoryLimitInBytes: 32 << 20, CpuShares: 1024, CpusetCpus: "0-4000", OomScoreAdj: 700},
		"a score":      {MemoryLimitInBytes: 32 << 20, CpuShares: 1024, OomScoreAdj: 5000},
		"a file":       {MemoryLimitInBytes: 32 << 20, Unified: map[string]string{"../x": "1"}},
		"little swap":  {MemoryLimitInBytes: 32 << 20, CpuShares: 1024, MemorySwapLimitInBytes: 1 << 20},
		"a tiny quota": {MemoryLimitInBytes: 32 << 20, CpuShares: 1024, CpuQuota: 1, CpuPeriod: 100000},
	} {
		if err := update(id, r); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", what, err)
		}
		if now := state(); now != before {
			t.Errorf("%s: %s has become %s", what, before, now)
		}
	}
	if err := update(id, &cri.LinuxContainerResources{MemoryLimitInBytes: 48 << 20, CpuShares: 512, OomScoreAdj: 600}); err != nil {
		t.Error(err)
	}
	after := state()
	if r := k.status(id).Resources.Linux; r.MemoryLimitInBytes != 48<<20 || r.CpuShares != 512 || r.OomScoreAdj != 600 || r.CpuQuota != 50000 || after == before {
		t.Errorf("resources %v, %s", r, after)
	}
	// Of one that has not been started, they are those that it starts with.
	created, err := k.ask(pod, pc, k.request(pc, "created", "sleep", "1000"))
	if err := errors.Join(err, update(created, &cri.LinuxContainerResources{MemoryLimitInBytes: 40 << 20})); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(n.signal(syscall.SIGKILL), n.start()); err != nil {
		t.Fatal(err)
	}
	if now := state(); now != after {
		t.Errorf("after a restart: %s has become %s", after, now)
	}
	if _, err := k.StartContainer(ctx(t), &cri.StartContainerRequest{ContainerId: created}); err != nil {
		t.Fatal(err)
	}
	if got := cgroupFile(t, k.pid(created), "memory/memory.limit_in_bytes", "memory.max"); got != 40<<20 {
		t.Errorf("a container that was updated before its start has %d bytes", got)
	}
	k.end(pod)
}

// TestPodLogs: no line is lost however often the log is rotated while it is written, and a full disk holds up no
// container.
func TestPodLogs(t *testing.T) {
	n := own(t)
	k := newKubelet(t, n)
	pc := k.config("logs", cri.NamespaceMode_CONTAINER)
	pod := k.runPod(pc)
	const lines = 200000
	id := k.run(pod, pc, "main", "sh", "-c", fmt.Sprintf("busybox seq 1 %d; sleep 1000", lines))
	path := filepath.Join(k.logs, "main.log")
	last := fmt.Sprintf(" F %d\n", lines)
	var files []string
	for i := 0; i < 100 && !strings.HasSuffix(k.log("main"), last); i++ {
		to := fmt.Sprintf("%s.%03d", path, i)
		if err := os.Rename(path, to); err != nil {
			t.Fatal(err)
		}
		if _, err := k.ReopenContainerLog(ctx(t), &cri.ReopenContainerLogRequest{ContainerId: id}); err != nil {
			t.Fatal(err)
		}
		files = append(files, to)
	}
	var all []byte
	eventually(t, "the last line", func() bool {
		all = nil
		for _, f := range append(slices.Clip(files), path) {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, b...)
		}
		return bytes.HasSuffix(all, []byte(last))
	})
	i := 0
	for line := range bytes.Lines(all) {
		if i++; !bytes.HasSuffix(line, fmt.Appendf(nil, " stdout F %d\n", i)) {
			t.Fatalf("line %d, after %d rotations, is %q", i, len(files), line)
		}
	}
	k.end(pod)

	full := t.TempDir()
	if err := unix.Mount("full", full, "tmpfs", 0, "size=65536"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(full, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	pc = k.config("full", cri.NamespaceMode_CONTAINER)
	pc.LogDirectory = full
	pod = k.runPod(pc)
	id = k.run(pod, pc, "main", "sh", "-c", "busybox seq 1 100000; touch /tmp/through; while :; do echo again; sleep 0.05; done")
	eventually(t, "the program to be through", func() bool { return k.sh(id, "ls /tmp") == "through" })
	path = filepath.Join(full, "main.log")
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	if _, err := k.ReopenContainerLog(ctx(t), &cri.ReopenContainerLogRequest{ContainerId: id}); err != nil {
		t.Error(err)
	}
	if err := os.Remove(path + ".1"); err != nil {
		t.Fatal(err)
	}
	var b []byte
	eventually(t, "lines where there is space again", func() bool { b, _ = os.ReadFile(path); return bytes.Contains(b, []byte(" stdout F again\n")) })
	for line := range bytes.Lines(b[:bytes.LastIndexByte(b, '\n')+1]) { // the last line may be on its way
		if !bytes.Contains(line, []byte(" stdout F ")) {
			t.Errorf("half a line: %q", line)
		}
	}
	k.end(pod)
}

// hung mounts a file system whose server never answers.
func hung(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("%s needs FUSE: %v", t.Name(), err)
	}
	if err := unix.Mount("hung", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)); err != nil {
		unix.Close(fd)
		t.Skipf("%s needs FUSE: %v", t.Name(), err)
	}
	t.Cleanup(func() {
		// Whoever waits gets an error, and the daemon ends.
		if err := errors.Join(unix.Close(fd), unix.Unmount(dir, unix.MNT_DETACH)); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestPodWithAHungMount: a mount that hangs stalls the container that asks for it and nothing else, and its pod can be
// removed meanwhile.
func TestPodWithAHungMount(t *testing.T) {
	n := own(t)
	k := newKubelet(t, n)
	impatient := func(f func(context.Context) error) {
		t.Helper()
		c, cancel := context.WithTimeout(ctx(t), time.Second)
		defer cancel()
		if err := f(c); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("of a mount that hangs: %v", err)
		}
	}
	pc := k.config("hung", cri.NamespaceMode_CONTAINER)
	pod := k.runPod(pc)
	k.run(pod, pc, "before", "sleep", "1000")
	c := k.request(pc, "main", "sleep", "1000")
	c.Mounts = []*cri.Mount{{HostPath: filepath.Join(hung(t), "sub"), ContainerPath: "/x"}}
	impatient(func(ctx context.Context) error {
		_, err := k.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod, SandboxConfig: pc, Config: c})
		return err
	})
	lc := k.config("hunglog", cri.NamespaceMode_CONTAINER)
	lc.LogDirectory = filepath.Join(hung(t), "logs")
	logs := k.runPod(lc)
	id, err := k.ask(logs, lc, k.request(lc, "main", "sleep", "1000"))
	if err != nil {
		t.Fatal(err)
	}
	impatient(func(ctx context.Context) error {
		_, err := k.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: id})
		return err
	})
	for what, f := range map[string]func() error{
		"containers": func() error { _, err := k.ListContainers(ctx(t), &cri.ListContainersRequest{}); return err },
		"status":     func() error { _, err := k.Status(ctx(t), &cri.StatusRequest{}); return err },
		"statistics": func() error { _, err := k.ListPodSandboxStats(ctx(t), &cri.ListPodSandboxStatsRequest{}); return err },
		"metrics": func() error {
			_, err := k.ListPodSandboxMetrics(ctx(t), &cri.ListPodSandboxMetricsRequest{})
			return err
		},
		"images": func() error { _, err := k.images.ImageFsInfo(ctx(t), &cri.ImageFsInfoRequest{}); return err },
	} {
		if err := f(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	k.run(pod, pc, "after", "sleep", "1000")
	oc := k.config("other", cri.NamespaceMode_CONTAINER)
	other := k.runPod(oc)
	k.run(other, oc, "main", "sleep", "1000")
	k.end(other)
	k.end(pod)
	k.end(logs)
}

// TestPodRefusals: what cannot be given is refused with the code, and the beginning of the text, that the kubelet acts on.
func TestPodRefusals(t *testing.T) {
	runtime := filepath.Join(t.TempDir(), "other")
	if err := execfile.Write(runtime, []byte("#!/bin/sh\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	n := own(t, "--runtime", "other="+runtime)
	k := newKubelet(t, n)
	pc := k.config("refusals", cri.NamespaceMode_CONTAINER)
	pod := k.runPod(pc)
	foreign, err := k.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: k.config("foreign", cri.NamespaceMode_CONTAINER), RuntimeHandler: "other"})
	if err != nil {
		t.Fatal(err)
	}
	image := func(m *cri.Mount) *cri.Mount {
		m.Image, m.ContainerPath = &cri.ImageSpec{Image: testImage}, "/v"
		return m
	}
	for what, want := range map[string]struct {
		pod   string
		mount *cri.Mount
		code  codes.Code
		text  string
	}{
		"a folder that the image lacks": {pod, image(&cri.Mount{Readonly: true, ImageSubPath: "no/such"}), codes.InvalidArgument, "ImageVolumeMountFailed: cannot access path no/such"},
		"a writable image":              {pod, image(&cri.Mount{}), codes.InvalidArgument, "ImageVolumeMountFailed: "},
		"an image that is not there":    {pod, &cri.Mount{Image: &cri.ImageSpec{Image: "no/such:1"}, ContainerPath: "/v", Readonly: true}, codes.NotFound, "ImageVolumeMountFailed: "},
		"recursively, by others":        {foreign.PodSandboxId, &cri.Mount{HostPath: "/tmp", ContainerPath: "/v", Readonly: true, RecursiveReadOnly: true}, codes.InvalidArgument, "RROUnsupported: "},
		"recursively, and writable":     {pod, &cri.Mount{HostPath: "/tmp", ContainerPath: "/v", RecursiveReadOnly: true}, codes.InvalidArgument, "mount /v: recursive read-only needs"},
		"an unknown option":             {pod, &cri.Mount{HostPath: "/tmp", ContainerPath: "/v", MountOptions: []string{"suid"}}, codes.InvalidArgument, `mount option "suid"`},
	} {
		c := k.request(pc, "main", "sleep", "1000")
		c.Mounts = []*cri.Mount{want.mount}
		if _, err := k.ask(want.pod, pc, c); status.Code(err) != want.code || !strings.HasPrefix(status.Convert(err).Message(), want.text) {
			t.Errorf("%s: %v", what, err)
		}
	}
	pc = k.config("sysctl", cri.NamespaceMode_CONTAINER)
	pc.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "nonsense"}
	if _, err := k.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: pc}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a sysctl without sense: %v", err)
	}
	n.docker(t, "commit", n.docker(t, "create", "--name", n.name(t, "origin"), testImage, "true"), "volume:1")
	pc = k.config("volume", cri.NamespaceMode_CONTAINER)
	c := k.request(pc, "main", "sleep", "1000")
	c.Mounts = []*cri.Mount{{Image: &cri.ImageSpec{Image: "volume:1"}, ContainerPath: "/v", Readonly: true, ImageSubPath: "etc"}}
	user := k.runPod(pc)
	k.launch(user, pc, c)
	for range 2 {
		if _, err := k.images.RemoveImage(ctx(t), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: "volume:1"}}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("the image of a volume in use: %v", err)
		}
		if err := errors.Join(n.signal(syscall.SIGKILL), n.start()); err != nil {
			t.Fatal(err)
		}
	}
	k.end(user)
	if _, err := k.images.RemoveImage(ctx(t), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: "volume:1"}}); err != nil {
		t.Errorf("an image that was a volume: %v", err)
	}
	k.end(foreign.PodSandboxId)
	k.end(pod)
}

// TestPodDevices: what the description of a device by name gives the container is also there for what is run in it,
// and the lowest score that the daemon can give is given to a pod that asks for less.
func TestPodDevices(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "vendor.json"), []byte(`{"cdiVersion": "0.6.0", "kind": "vendor.com/device", "devices": [
		{"name": "one", "containerEdits": {"deviceNodes": [{"path": "/dev/one", "hostPath": "/dev/zero"}], "env": ["FROM=vendor"]}}]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	n := own(t, "--cdi-spec-dirs", dir)
	k := newKubelet(t, n)
	pc := k.config("devices", cri.NamespaceMode_CONTAINER)
	pod := k.runPod(pc)
	c := k.request(pc, "main", "sleep", "1000")
	c.CDIDevices = []*cri.CDIDevice{{Name: "vendor.com/device=one"}}
	c.Envs = []*cri.KeyValue{{Key: "OWN", Value: []byte("1")}}
	c.Linux.Resources.OomScoreAdj = -998
	id := k.launch(pod, pc, c)
	if got := k.sh(id, "busybox head -c 3 /dev/one | busybox wc -c; echo $FROM $OWN"); got != "3\nvendor 1" {
		t.Errorf("the device: %q", got)
	}
	own, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		t.Fatal(err)
	}
	if got := k.sh(id, "cat /proc/1/oom_score_adj"); got != "-998" && got != strings.TrimSpace(string(own)) {
		t.Errorf("the score is %s", got)
	}
	k.end(pod)
}

// TestPodUserNamespace: the sysctls of a pod are those of its namespaces, whoever owns these.
func TestPodUserNamespace(t *testing.T) {
	n := own(t)
	k := newKubelet(t, n)
	if r, err := k.Status(ctx(t), &cri.StatusRequest{}); err != nil || !r.RuntimeHandlers[0].Features.UserNamespaces {
		t.Skipf("%s needs a kernel with user namespaces for pods: %v", t.Name(), err)
	}
	pc := k.config("userns", cri.NamespaceMode_CONTAINER)
	ids := []*cri.IDMapping{{HostId: 1 << 20, Length: 65536}}
	pc.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: ids, Gids: ids}
	pc.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "17", "net.ipv4.ip_forward": "1"}
	pod := k.runPod(pc)
	id := k.run(pod, pc, "main", "sleep", "1000")
	r, err := k.PodSandboxStatus(ctx(t), &cri.PodSandboxStatusRequest{PodSandboxId: pod, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var info struct{ RuntimeSpec specs.Spec }
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil || info.RuntimeSpec.Linux == nil {
		t.Fatalf("what is told of the pod: %v: %s", err, r.Info["info"])
	}
	own := map[specs.LinuxNamespaceType]bool{}
	for _, ns := range info.RuntimeSpec.Linux.Namespaces {
		file, ferr := os.Stat(ns.Path)
		name := map[specs.LinuxNamespaceType]string{specs.NetworkNamespace: "net", specs.UTSNamespace: "uts", specs.IPCNamespace: "ipc", specs.UserNamespace: "user"}[ns.Type]
		of, oerr := os.Stat("/proc/" + k.pid(id) + "/ns/" + name)
		own[ns.Type] = true
		if err := errors.Join(ferr, oerr); err != nil || !os.SameFile(file, of) {
			t.Errorf("%s namespace %s is not that of the container: %v", ns.Type, ns.Path, err)
		}
	}
	if len(own) != 4 {
		t.Errorf("namespaces of the pod: %v", own)
	}
	got := k.sh(id, "cat /proc/sys/kernel/shm_rmid_forced /proc/sys/fs/mqueue/msg_max /proc/sys/net/ipv4/ip_forward; grep -c ' /dev/mqueue mqueue ' /proc/mounts; cat /proc/self/uid_map | busybox awk '{print $1, $2}'")
	if got != "1\n17\n1\n1\n0 1048576" {
		t.Errorf("in the pod: %q", got)
	}
	k.end(pod)
}

// TestDamagedRecords: whatever record of the store is damaged, the daemon starts, and what does not need that record
// goes on.
func TestDamagedRecords(t *testing.T) {
	n := own(t)
	k := newKubelet(t, n)
	const pods = 2
	var sandboxes, containers []string
	for i := range pods {
		pc := k.config(fmt.Sprint("damage", i), cri.NamespaceMode_CONTAINER)
		sandboxes = append(sandboxes, k.runPod(pc))
		containers = append(containers, k.run(sandboxes[i], pc, "main", "sleep", "1000"))
	}
	path := filepath.Join(n.dir, "lib", "meta.db")
	if err := n.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// One record of each kind: the first of its bucket. What says which format the file has is none.
	var kinds [][]string
	change := func(f func(*bolt.Tx) error) {
		t.Helper()
		if err := os.WriteFile(path, good, 0o600); err != nil {
			t.Fatal(err)
		}
		db, err := bolt.Open(path, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(db.Update(f), db.Close()); err != nil {
			t.Fatal(err)
		}
	}
	change(func(tx *bolt.Tx) error {
		var walk func(b *bolt.Bucket, at []string) error
		walk = func(b *bolt.Bucket, at []string) error {
			first := true
			return b.ForEach(func(k, v []byte) error {
				p := append(slices.Clip(at), string(k))
				if v == nil {
					return walk(b.Bucket(k), p)
				}
				if first {
					kinds = append(kinds, p)
				}
				first = false
				return nil
			})
		}
		return tx.ForEach(func(name []byte, b *bolt.Bucket) error {
			if string(name) == "hako" {
				return nil
			}
			return walk(b, []string{string(name)})
		})
	})
	for _, kind := range kinds {
		for _, with := range []string{"", "{\"a", "\xff\x00\xfe\x01"} {
			change(func(tx *bolt.Tx) error {
				b := tx.Bucket([]byte(kind[0]))
				for _, name := range kind[1 : len(kind)-1] {
					b = b.Bucket([]byte(name))
				}
				return b.Put([]byte(kind[len(kind)-1]), []byte(with))
			})
			if err := n.start(); err != nil {
				t.Errorf("%q with %q: %v", kind, with, err)
				continue
			}
			running := 0
			for _, id := range containers {
				if s, err := k.ContainerStatus(ctx(t), &cri.ContainerStatusRequest{ContainerId: id}); err == nil && s.Status.State == cri.ContainerState_CONTAINER_RUNNING {
					running++
				}
			}
			if _, err := k.ListPodSandbox(ctx(t), &cri.ListPodSandboxRequest{}); err != nil || running < pods-1 {
				t.Errorf("%q with %q: %d of %d containers, %v", kind, with, running, pods, err)
			}
			if err := n.signal(syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := errors.Join(os.WriteFile(path, good, 0o600), n.start()); err != nil {
		t.Fatal(err)
	}
	for _, p := range sandboxes {
		k.end(p)
	}
}

// TestPodProc: paths of /proc are hidden as the client says, and none where it names none: so the kubelet asks for procMount Unmasked. An
// ambient capability reaches a program of another user; no quota and a grace for ever are no errors.
func TestPodProc(t *testing.T) {
	k := newKubelet(t, shared(t))
	pc := k.config("proc", cri.NamespaceMode_CONTAINER)
	pod := k.runPod(pc)
	t.Cleanup(func() { k.end(pod) })
	const script = "grep -c ' /proc/' /proc/mounts; grep -e CapAmb -e CapBnd /proc/self/status; id -u"
	c := k.request(pc, "unmasked", "sleep", "1000")
	c.Linux.Resources.CpuQuota = -1
	c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: 1000}
	c.Linux.SecurityContext.Capabilities = &cri.Capability{AddAmbientCapabilities: []string{"SYS_TIME"}, DropCapabilities: []string{"ALL"}}
	id := k.launch(pod, pc, c)
	if got := k.sh(id, script); got != "0\nCapBnd:\t0000000002000000\nCapAmb:\t0000000002000000\n1000" {
		t.Errorf("without a path that is hidden, with an ambient capability: %q", got)
	}
	c = k.request(pc, "masked", "sleep", "1000")
	c.Linux.SecurityContext.MaskedPaths, c.Linux.SecurityContext.ReadonlyPaths = []string{"/proc/interrupts"}, []string{"/proc/sys"}
	if got := k.sh(k.launch(pod, pc, c), "grep -o ' /proc/[a-z]*' /proc/mounts | sort | xargs"); got != "/proc/interrupts /proc/sys" {
		t.Errorf("hidden and read-only: %q", got)
	}
	c = k.request(pc, "trap", "sh", "-c", "trap 'sleep 1; exit 5' TERM; echo ready; while :; do sleep 0.05; done")
	id = k.launch(pod, pc, c)
	eventually(t, "the trap", func() bool { return strings.Contains(k.log("trap"), "ready") })
	if _, err := k.StopContainer(ctx(t), &cri.StopContainerRequest{ContainerId: id, Timeout: 18446744074}); err != nil || k.status(id).ExitCode != 5 {
		t.Errorf("with a grace of centuries it ended with %v, %v", k.status(id), err)
	}
}

// TestPodNetFiles: the files that tell of the pod's network lie on top of a volume at /etc, and are not written to where nothing of the root is.
func TestPodNetFiles(t *testing.T) {
	k := newKubelet(t, shared(t))
	pc := k.config("netfiles", cri.NamespaceMode_CONTAINER)
	pod := k.runPod(pc)
	t.Cleanup(func() { k.end(pod) })
	etc := t.TempDir()
	if err := os.WriteFile(filepath.Join(etc, "own"), []byte("own"), 0o644); err != nil {
		t.Fatal(err)
	}
	c := k.request(pc, "etc", "sleep", "1000")
	c.Mounts = []*cri.Mount{{HostPath: etc, ContainerPath: "/etc"}}
	if got := k.sh(k.launch(pod, pc, c), "cat /etc/own /etc/hostname; grep -o 10.9.9.9 /etc/resolv.conf; grep -c netfiles-host /etc/hosts"); got != "own"+pc.Hostname+"\n10.9.9.9\n1" {
		t.Errorf("with a volume at /etc: %q", got)
	}
	c = k.request(pc, "readonly", "sleep", "1000")
	c.Linux.SecurityContext.ReadonlyRootfs = true
	if got := k.sh(k.launch(pod, pc, c), "for f in hosts hostname resolv.conf; do { echo x >>/etc/$f; } 2>/dev/null && echo $f; done; true"); got != "" {
		t.Errorf("a container whose root is read-only can write %q", got)
	}
}
