package integration

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// cgroupFile reads a file with one number of the cgroup that a process is in: of the unified hierarchy, or of the one with a controller of
// cgroup v1.
func cgroupFile(t *testing.T, pid, v1, v2 string) uint64 {
	t.Helper()
	b, err := os.ReadFile("/proc/" + pid + "/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	_, err = os.Stat("/sys/fs/cgroup/cgroup.controllers")
	unified := err == nil
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		controller, file, _ := strings.Cut(v1, "/")
		path := ""
		switch {
		case unified && f[1] == "":
			path = filepath.Join("/sys/fs/cgroup", f[2], v2)
		case !unified && strings.Contains(","+f[1]+",", ","+controller+","):
			path = filepath.Join("/sys/fs/cgroup", controller, f[2], file)
		default:
			continue
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		n, _ := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
		return n
	}
	t.Fatalf("process %s is in no such cgroup: %s", pid, b)
	return 0
}

// TestPodMeasured: statistics and metrics of a pod say what the kernel's files say, of whatever kind the cgroups are, and
// whoever makes them: also without a cgroup that the kubelet has made.
func TestPodMeasured(t *testing.T) {
	n := own(t)
	k := newKubelet(t, n)
	pc := k.config("measured", cri.NamespaceMode_CONTAINER)
	pod := k.runPod(pc)
	busy := k.run(pod, pc, "busy", "sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; exec sleep 1000")
	idle := k.run(pod, pc, "idle", "sleep", "1000")
	k.sh(idle, "g=$(busybox ip route | busybox awk '/default/ {print $3}'); busybox nc -w 1 $g 1 </dev/null; true") // a packet, at least
	eventually(t, "the end of the work", func() bool { return strings.Contains(k.log("busy"), "done") })
	info, err := k.ContainerStatus(ctx(t), &cri.ContainerStatusRequest{ContainerId: busy, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var verbose struct{ Pid int }
	if err := json.Unmarshal([]byte(info.Info["info"]), &verbose); err != nil || verbose.Pid == 0 {
		t.Fatalf("pid: %v: %.200s", err, info.Info["info"])
	}
	pid := strconv.Itoa(verbose.Pid)
	memory := cgroupFile(t, pid, "memory/memory.usage_in_bytes", "memory.current")

	stats, err := k.ContainerStats(ctx(t), &cri.ContainerStatsRequest{ContainerId: busy})
	if err != nil {
		t.Fatal(err)
	}
	near := func(what string, got, want, by uint64) {
		t.Helper()
		if got+by < want || got > want+by {
			t.Errorf("%s is %d, the kernel says %d", what, got, want)
		}
	}
	st := stats.Stats
	near("memory of the container", st.Memory.UsageBytes.GetValue(), memory, 4<<20)
	if st.Cpu.UsageCoreNanoSeconds.GetValue() < 1e6 || st.Memory.WorkingSetBytes.GetValue() == 0 || st.Memory.AvailableBytes.GetValue() == 0 {
		t.Errorf("statistics %v", st)
	}
	ps, err := k.PodSandboxStats(ctx(t), &cri.PodSandboxStatsRequest{PodSandboxId: pod})
	if err != nil {
		t.Fatal(err)
	}
	total := ps.Stats.Linux
	if cpu := total.Cpu.UsageCoreNanoSeconds.GetValue(); cpu < st.Cpu.UsageCoreNanoSeconds.GetValue() {
		t.Errorf("the pod has used %d ns of CPU time, its container %d", cpu, st.Cpu.UsageCoreNanoSeconds.GetValue())
	}
	if total.Memory.UsageBytes.GetValue()+4<<20 < memory || total.Process.ProcessCount.GetValue() < 2 || len(total.Containers) != 2 || total.Network.DefaultInterface.GetName() == "" {
		t.Errorf("statistics of the pod: %v", total)
	}

	desc, err := k.ListMetricDescriptors(ctx(t), &cri.ListMetricDescriptorsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]int{}
	for _, d := range desc.Descriptors {
		labels[d.Name] = len(d.LabelKeys)
	}
	resp, err := k.ListPodSandboxMetrics(ctx(t), &cri.ListPodSandboxMetricsRequest{})
	if err != nil || len(resp.PodMetrics) != 1 {
		t.Fatalf("metrics of %d pods: %v", len(resp.GetPodMetrics()), err)
	}
	seen := map[string]bool{}
	values := map[string]uint64{} // of the busy container
	podValues := map[string]uint64{}
	note := func(ms []*cri.Metric, into map[string]uint64) {
		for _, m := range ms {
			if n, ok := labels[m.Name]; !ok || n != len(m.LabelValues) {
				t.Errorf("metric %s with %d labels, described with %d", m.Name, len(m.LabelValues), n)
			}
			seen[m.Name] = true
			into[m.Name] += m.Value.GetValue()
		}
	}
	note(resp.PodMetrics[0].Metrics, podValues)
	for _, c := range resp.PodMetrics[0].ContainerMetrics {
		if c.ContainerId == busy {
			note(c.Metrics, values)
		} else {
			note(c.Metrics, map[string]uint64{})
		}
	}
	near("metric of memory", values["container_memory_usage_bytes"], memory, 4<<20)
	near("metric of the limit", values["container_spec_memory_limit_bytes"], 64<<20, 4096)
	near("metric of the shares", values["container_spec_cpu_shares"], 100, 0)
	near("metric of processes", values["container_processes"], cgroupFile(t, pid, "pids/pids.current", "pids.current"), 0)
	for _, name := range []string{"container_threads", "container_file_descriptors", "container_start_time_seconds", "container_fs_limit_bytes"} {
		if values[name] == 0 {
			t.Errorf("%s is 0", name)
		}
	}
	if podValues["container_memory_usage_bytes"]+4<<20 < values["container_memory_usage_bytes"] || podValues["container_network_receive_packets_total"]+podValues["container_network_transmit_packets_total"] == 0 {
		t.Errorf("metrics of the pod: %v", podValues)
	}
	var missing []string
	for name := range labels {
		// What the kernel or the machine may lack: pages of other sizes, block devices that nobody has used, pressure.
		if !seen[name] && !strings.Contains(name, "hugetlb") && !strings.Contains(name, "blkio") && !strings.Contains(name, "pressure") && !strings.Contains(name, "_fs_") && !strings.Contains(name, "quota") {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		t.Errorf("described, and not there: %q", missing)
	}

	// CPU time of a pod never falls, also when a container takes its own along.
	before := total.Cpu.UsageCoreNanoSeconds.GetValue()
	if _, err := k.StopContainer(ctx(t), &cri.StopContainerRequest{ContainerId: busy}); err != nil {
		t.Fatal(err)
	}
	if ps, err = k.PodSandboxStats(ctx(t), &cri.PodSandboxStatsRequest{PodSandboxId: pod}); err != nil || ps.Stats.Linux.Cpu.UsageCoreNanoSeconds.GetValue() < before {
		t.Errorf("CPU time of the pod fell from %d: %v, %v", before, ps.GetStats().GetLinux().GetCpu(), err)
	}
	k.end(pod)
}

// TestPodCheckpoint: a real CRIU writes the archive that the API describes, and the container goes on. It works in the
// virtual machine: MODES=systemd RUN=TestPodCheckpoint test/vm/suite.sh ./test/integration
func TestPodCheckpoint(t *testing.T) {
	n := own(t)
	k := newKubelet(t, n)
	pc := k.config("frozen", cri.NamespaceMode_CONTAINER)
	pod := k.runPod(pc)
	id := k.run(pod, pc, "main", "sh", "-c", "echo changed >/new; i=0; while :; do i=$((i+1)); echo $i >/dev/shm/count; sleep 0.1; done")
	archive := filepath.Join(t.TempDir(), "checkpoint.tar")
	checkpoint := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute) // an emulated machine is slow
		defer cancel()
		_, err := k.CheckpointContainer(ctx, &cri.CheckpointContainerRequest{ContainerId: id, Location: archive})
		return err
	}
	if _, err := exec.LookPath("criu"); err != nil {
		if err := checkpoint(); status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), "criu") {
			t.Errorf("without CRIU: %v", err)
		}
		t.Skipf("needs CRIU: %s", t.Name())
	}
	needsCRIU(t)
	for k.sh(id, "cat /dev/shm/count 2>/dev/null || echo 0") == "0" {
		time.Sleep(50 * time.Millisecond)
	}
	if err := checkpoint(); err != nil {
		t.Fatal(err)
	}
	count := k.sh(id, "cat /dev/shm/count")
	eventually(t, "the container to go on", func() bool { after := k.sh(id, "cat /dev/shm/count"); return after != "" && after != count })
	if s := k.status(id).State; s != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("after the checkpoint it is %v", s)
	}
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	have := map[string]bool{}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		have[strings.TrimPrefix(h.Name, "./")] = true
		if h.Name == "rootfs-diff.tar" {
			names := map[string]bool{}
			for d := tar.NewReader(r); ; {
				h, err := d.Next()
				if err != nil {
					break
				}
				names[strings.TrimPrefix(h.Name, "./")] = true
			}
			if !names["new"] {
				t.Errorf("rootfs-diff.tar has %v, not the file that was written", names)
			}
		}
	}
	for _, name := range []string{"config.dump", "spec.dump", "rootfs-diff.tar", "checkpoint/inventory.img"} {
		if !have[name] {
			t.Errorf("the archive lacks %s: %v", name, have)
		}
	}
	if err := checkpoint(); err != nil { // once more, over the first
		t.Errorf("a second one: %v", err)
	}
	k.end(pod)
}
