package cri

import (
	"context"
	"slices"
	"testing"
	"time"

	api "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hako-engine/hako/engine"
)

// fullMetrics has a value for every metric.
func fullMetrics() []engine.PodMetrics {
	cg := engine.CgroupMetrics{
		HasCPU: true, HasMemory: true, HasPids: true, HasIO: true, Quota: 20000, OOMKills: 3,
		Usage:  engine.Usage{CPUPressure: &engine.PSI{Some: engine.Pressure{Total: 2_500_000_000}}, MemoryPressure: &engine.PSI{}, IOPressure: &engine.PSI{}, Pids: 4},
		Counts: engine.Stats{CPUTotal: 7_900_000_000, Blkio: []engine.BlkioEntry{{Major: 999, Minor: 1, Op: "Read", Bytes: 9, Ops: 1}, {Major: 999, Minor: 1, Op: "Write"}}},
		Huge:   []engine.HugeMetrics{{Size: "2MB", HasMax: true}},
	}
	c := container("c", "s", engine.State{StartedAt: time.Unix(77, 0)})
	c.Config.Pod.UserImage = "img:1"
	return []engine.PodMetrics{{
		Sandbox: sandbox("s", engine.SandboxReady, nil), Cgroup: &cg, Path: "/hako/pods", Networks: map[string]engine.NetStats{"eth0": {RxBytes: 11}},
		Containers: []engine.ContainerMetrics{{
			Container: c, Cgroup: cg, Path: "/hako/pods/c", Process: engine.ProcessMetrics{Processes: 2, Sockets: 1, Limits: map[string]uint64{"max_open_files": 5}},
			Volume: engine.VolumeMetrics{Device: "/dev/x", Size: 100, Used: 10},
		}},
	}, {Sandbox: sandbox("empty", engine.SandboxReady, nil)}}
}

// TestMetrics holds that each metric is described, has as many labels as its description
// says, and that the table has no name twice.
func TestMetrics(t *testing.T) {
	f := &fake{metrics: fullMetrics()}
	rt, _ := clients(t, f)
	ctx := context.Background()
	desc, err := rt.ListMetricDescriptors(ctx, &api.ListMetricDescriptorsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string][]string{}
	for _, d := range desc.GetDescriptors() {
		if d.GetHelp() == "" || len(d.GetLabelKeys()) == 0 || keys[d.GetName()] != nil {
			t.Errorf("descriptor %v", d)
		}
		keys[d.GetName()] = d.GetLabelKeys()
	}
	if len(keys) != 56 {
		t.Errorf("%d metrics, want the 56 of cAdvisor", len(keys))
	}
	resp, err := rt.ListPodSandboxMetrics(ctx, &api.ListPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.GetPodMetrics()) != 2 {
		t.Fatalf("%d pods", len(resp.GetPodMetrics()))
	}
	pod := resp.GetPodMetrics()[0]
	seen := map[string]*api.Metric{}
	check := func(all []*api.Metric) {
		for _, m := range all {
			if len(m.GetLabelValues()) != len(keys[m.GetName()]) || m.GetTimestamp() != 0 {
				t.Errorf("%s: labels %q for keys %q, time %d", m.GetName(), m.GetLabelValues(), keys[m.GetName()], m.GetTimestamp())
			}
			seen[m.GetName()] = m
		}
	}
	check(pod.GetMetrics())
	if got := seen["container_network_receive_bytes_total"]; got.GetValue().GetValue() != 11 ||
		!slices.Equal(got.GetLabelValues(), []string{"/hako/pods", "ns", "n-s", "", "", "", "eth0"}) {
		t.Errorf("network of the pod: %v", got)
	}
	check(pod.GetContainerMetrics()[0].GetMetrics())
	for name := range keys {
		if seen[name] == nil {
			t.Errorf("%s has no value", name)
		}
	}
	for name, want := range map[string]uint64{
		"container_cpu_usage_seconds_total": 7, "container_oom_events_total": 3, "container_start_time_seconds": 77, "container_threads": 4,
		"container_fs_usage_bytes": 10, "container_ulimits_soft": 5, "container_pressure_cpu_waiting_seconds_total": 2, "container_fs_reads_total": 1,
	} {
		if got := seen[name].GetValue().GetValue(); got != want {
			t.Errorf("%s is %d, want %d", name, got, want)
		}
	}
	if got := seen["container_cpu_usage_seconds_total"]; !slices.Equal(got.GetLabelValues(), []string{"/hako/pods/c", "ns", "n-s", "c-c", "c", "img:1", "total"}) {
		t.Errorf("labels of a container: %v", got)
	}
	// A pod without a cgroup has what is known of it.
	for _, m := range resp.GetPodMetrics()[1].GetMetrics() {
		if m.GetName() != "container_last_seen" && m.GetName() != "container_start_time_seconds" {
			t.Errorf("a pod without a cgroup has %v", m)
		}
	}
}
