package cri

import (
	"context"
	"slices"
	"strconv"
	"time"

	"google.golang.org/grpc"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hako-engine/hako/engine"
)

// The metrics have the names, labels and meanings that cAdvisor gave them, which dashboards
// and alerts are written for. Their values are whole numbers, as the API has no others.

// subject is what a metric is measured of: a pod or one of its containers.
type subject struct {
	cgroup    *engine.CgroupMetrics
	container *engine.ContainerMetrics // nil: a pod
	pod       *engine.PodMetrics
	now       time.Time
	devices   map[[2]uint64]string
}

// metric is one of the table below. values calls add with the labels beyond the common ones.
type metric struct {
	name   string
	kind   api.MetricType
	help   string
	labels []string
	values func(s *subject, add func(v uint64, labels ...string))
}

// commonLabels are those of every metric. The last three are empty for a pod.
var commonLabels = []string{"id", "namespace", "pod", "container", "name", "image"}

type addFunc = func(v uint64, labels ...string)

// seconds turns nanoseconds into what the API can say.
func seconds(ns uint64) uint64 { return ns / uint64(time.Second) }

// cpu, memory and so on make the values of metrics that need one controller.
func cpu(get func(*engine.CgroupMetrics) uint64, labels ...string) func(*subject, addFunc) {
	return func(s *subject, add addFunc) {
		if s.cgroup != nil && s.cgroup.HasCPU {
			add(get(s.cgroup), labels...)
		}
	}
}

func memory(get func(*engine.CgroupMetrics) uint64, labels ...string) func(*subject, addFunc) {
	return func(s *subject, add addFunc) {
		if s.cgroup != nil && s.cgroup.HasMemory {
			add(get(s.cgroup), labels...)
		}
	}
}

func pids(get func(*engine.CgroupMetrics) uint64) func(*subject, addFunc) {
	return func(s *subject, add addFunc) {
		if s.cgroup != nil && s.cgroup.HasPids {
			add(get(s.cgroup))
		}
	}
}

func process(get func(engine.ProcessMetrics) uint64) func(*subject, addFunc) {
	return func(s *subject, add addFunc) {
		if s.container != nil {
			add(get(s.container.Process))
		}
	}
}

func volume(get func(engine.VolumeMetrics) uint64) func(*subject, addFunc) {
	return func(s *subject, add addFunc) {
		if s.container != nil && s.container.Volume.Device != "" {
			add(get(s.container.Volume), s.container.Volume.Device)
		}
	}
}

func iface(get func(engine.NetStats) uint64) func(*subject, addFunc) {
	return func(s *subject, add addFunc) {
		if s.container == nil { // the interfaces are the pod's
			for name, n := range s.pod.Networks {
				add(get(n), name)
			}
		}
	}
}

func pressure(get func(engine.Usage) *engine.PSI, full bool) func(*subject, addFunc) {
	return func(s *subject, add addFunc) {
		if s.cgroup == nil {
			return
		}
		if p := get(s.cgroup.Usage); p != nil {
			line := p.Some
			if full {
				line = p.Full
			}
			add(seconds(line.Total))
		}
	}
}

// blockIO gives one counter of each device.
func blockIO(op string, get func(engine.BlkioEntry) uint64) func(*subject, addFunc) {
	return func(s *subject, add addFunc) {
		if s.cgroup == nil || !s.cgroup.HasIO {
			return
		}
		for _, b := range s.cgroup.Counts.Blkio {
			if b.Op == op {
				add(get(b), s.device(b))
			}
		}
	}
}

// device names a block device, and remembers the name: many containers use the same ones.
func (s *subject) device(b engine.BlkioEntry) string {
	key := [2]uint64{b.Major, b.Minor}
	name, ok := s.devices[key]
	if !ok {
		name = engine.DeviceName(b.Major, b.Minor)
		s.devices[key] = name
	}
	return name
}

const (
	counter = api.MetricType_COUNTER
	gauge   = api.MetricType_GAUGE
)

// metrics is the table of all metrics, by name.
var metrics = []metric{
	{"container_blkio_device_usage_total", counter, "Bytes that were read from or written to a block device, by operation.",
		[]string{"device", "major", "minor", "operation"}, func(s *subject, add addFunc) {
			if s.cgroup == nil || !s.cgroup.HasIO {
				return
			}
			for _, b := range s.cgroup.Counts.Blkio {
				add(b.Bytes, s.device(b), strconv.FormatUint(b.Major, 10), strconv.FormatUint(b.Minor, 10), b.Op)
			}
		}},
	{"container_cpu_cfs_periods_total", counter, "Periods in which a quota of CPU time was in force.", nil,
		cpu(func(m *engine.CgroupMetrics) uint64 { return m.Counts.Periods })},
	{"container_cpu_cfs_throttled_periods_total", counter, "Periods in which the quota of CPU time was used up.", nil,
		cpu(func(m *engine.CgroupMetrics) uint64 { return m.Counts.Throttled })},
	{"container_cpu_cfs_throttled_seconds_total", counter, "Time for which tasks were held back by the quota, in seconds.", nil,
		cpu(func(m *engine.CgroupMetrics) uint64 { return seconds(m.Counts.ThrottledNS) })},
	{"container_cpu_system_seconds_total", counter, "CPU time in the kernel, in seconds.", nil,
		cpu(func(m *engine.CgroupMetrics) uint64 { return seconds(m.Counts.CPUKernel) })},
	{"container_cpu_usage_seconds_total", counter, "CPU time, in seconds.", []string{"cpu"},
		cpu(func(m *engine.CgroupMetrics) uint64 { return seconds(m.Counts.CPUTotal) }, "total")},
	{"container_cpu_user_seconds_total", counter, "CPU time in user mode, in seconds.", nil,
		cpu(func(m *engine.CgroupMetrics) uint64 { return seconds(m.Counts.CPUUser) })},
	{"container_file_descriptors", gauge, "Open file descriptors.", nil,
		process(func(p engine.ProcessMetrics) uint64 { return p.Descriptors })},
	{"container_fs_inodes_free", gauge, "Free inodes of the file system of the writable layer.", []string{"device"},
		volume(func(v engine.VolumeMetrics) uint64 { return v.InodesFree })},
	{"container_fs_inodes_total", gauge, "Inodes of the file system of the writable layer.", []string{"device"},
		volume(func(v engine.VolumeMetrics) uint64 { return v.Inodes })},
	{"container_fs_limit_bytes", gauge, "Size of the file system of the writable layer, in bytes.", []string{"device"},
		volume(func(v engine.VolumeMetrics) uint64 { return v.Size })},
	{"container_fs_reads_bytes_total", counter, "Bytes read from a block device.", []string{"device"},
		blockIO("Read", func(b engine.BlkioEntry) uint64 { return b.Bytes })},
	{"container_fs_reads_total", counter, "Reads from a block device.", []string{"device"},
		blockIO("Read", func(b engine.BlkioEntry) uint64 { return b.Ops })},
	{"container_fs_usage_bytes", gauge, "Size of the writable layer, in bytes.", []string{"device"},
		volume(func(v engine.VolumeMetrics) uint64 { return v.Used })},
	{"container_fs_writes_bytes_total", counter, "Bytes written to a block device.", []string{"device"},
		blockIO("Write", func(b engine.BlkioEntry) uint64 { return b.Bytes })},
	{"container_fs_writes_total", counter, "Writes to a block device.", []string{"device"},
		blockIO("Write", func(b engine.BlkioEntry) uint64 { return b.Ops })},
	{"container_hugetlb_max_usage_bytes", gauge, "Most huge pages that were ever in use, in bytes; cgroup v1 only.", []string{"pagesize"},
		func(s *subject, add addFunc) {
			for _, h := range s.huge() {
				if h.HasMax {
					add(h.Max, h.Size)
				}
			}
		}},
	{"container_hugetlb_usage_bytes", gauge, "Huge pages in use, in bytes.", []string{"pagesize"},
		func(s *subject, add addFunc) {
			for _, h := range s.huge() {
				add(h.Usage, h.Size)
			}
		}},
	{"container_last_seen", gauge, "When this was measured, in seconds since 1970.", nil,
		func(s *subject, add addFunc) { add(uint64(s.now.Unix())) }},
	{"container_memory_cache", gauge, "Memory of the page cache, in bytes.", nil,
		memory(func(m *engine.CgroupMetrics) uint64 { return m.Cache })},
	{"container_memory_failcnt", counter, "How often use of memory met its limit.", nil,
		memory(func(m *engine.CgroupMetrics) uint64 { return m.Counts.MemFailcnt })},
	{"container_memory_failures_total", counter, "Page faults: pgfault or pgmajfault, of the container or with the cgroups below it.", []string{"failure_type", "scope"},
		func(s *subject, add addFunc) {
			if m := s.cgroup; m != nil && m.HasMemory {
				add(m.OwnFaults, "pgfault", "container")
				add(m.OwnMajor, "pgmajfault", "container")
				add(m.Usage.Faults, "pgfault", "hierarchy")
				add(m.Usage.MajorFault, "pgmajfault", "hierarchy")
			}
		}},
	{"container_memory_kernel_usage", gauge, "Memory that the kernel took on behalf of the processes, in bytes.", nil,
		memory(func(m *engine.CgroupMetrics) uint64 { return m.Kernel })},
	{"container_memory_mapped_file", gauge, "Memory of mapped files, in bytes.", nil,
		memory(func(m *engine.CgroupMetrics) uint64 { return m.Mapped })},
	{"container_memory_max_usage_bytes", gauge, "Most memory that was ever in use, in bytes.", nil,
		memory(func(m *engine.CgroupMetrics) uint64 { return m.Counts.MemMax })},
	{"container_memory_rss", gauge, "Anonymous memory, in bytes.", nil,
		memory(func(m *engine.CgroupMetrics) uint64 { return m.Usage.RSS })},
	{"container_memory_swap", gauge, "Swap space in use, in bytes.", nil,
		memory(func(m *engine.CgroupMetrics) uint64 { return m.Usage.Swap })},
	{"container_memory_usage_bytes", gauge, "Memory in use, in bytes, page cache included.", nil,
		memory(func(m *engine.CgroupMetrics) uint64 { return m.Usage.Memory })},
	{"container_memory_working_set_bytes", gauge, "Memory in use that cannot be given back at once, in bytes.", nil,
		memory(func(m *engine.CgroupMetrics) uint64 { return m.Usage.WorkingSet })},
	{"container_network_receive_bytes_total", counter, "Bytes received.", []string{"interface"},
		iface(func(n engine.NetStats) uint64 { return n.RxBytes })},
	{"container_network_receive_errors_total", counter, "Errors while receiving.", []string{"interface"},
		iface(func(n engine.NetStats) uint64 { return n.RxErrors })},
	{"container_network_receive_packets_dropped_total", counter, "Packets dropped while receiving.", []string{"interface"},
		iface(func(n engine.NetStats) uint64 { return n.RxDropped })},
	{"container_network_receive_packets_total", counter, "Packets received.", []string{"interface"},
		iface(func(n engine.NetStats) uint64 { return n.RxPackets })},
	{"container_network_transmit_bytes_total", counter, "Bytes sent.", []string{"interface"},
		iface(func(n engine.NetStats) uint64 { return n.TxBytes })},
	{"container_network_transmit_errors_total", counter, "Errors while sending.", []string{"interface"},
		iface(func(n engine.NetStats) uint64 { return n.TxErrors })},
	{"container_network_transmit_packets_dropped_total", counter, "Packets dropped while sending.", []string{"interface"},
		iface(func(n engine.NetStats) uint64 { return n.TxDropped })},
	{"container_network_transmit_packets_total", counter, "Packets sent.", []string{"interface"},
		iface(func(n engine.NetStats) uint64 { return n.TxPackets })},
	{"container_oom_events_total", counter, "Processes that the kernel killed for want of memory.", nil,
		memory(func(m *engine.CgroupMetrics) uint64 { return m.OOMKills })},
	{"container_pressure_cpu_stalled_seconds_total", counter, "Time in which all tasks waited for a CPU, in seconds.", nil,
		pressure(func(u engine.Usage) *engine.PSI { return u.CPUPressure }, true)},
	{"container_pressure_cpu_waiting_seconds_total", counter, "Time in which some tasks waited for a CPU, in seconds.", nil,
		pressure(func(u engine.Usage) *engine.PSI { return u.CPUPressure }, false)},
	{"container_pressure_io_stalled_seconds_total", counter, "Time in which all tasks waited for I/O, in seconds.", nil,
		pressure(func(u engine.Usage) *engine.PSI { return u.IOPressure }, true)},
	{"container_pressure_io_waiting_seconds_total", counter, "Time in which some tasks waited for I/O, in seconds.", nil,
		pressure(func(u engine.Usage) *engine.PSI { return u.IOPressure }, false)},
	{"container_pressure_memory_stalled_seconds_total", counter, "Time in which all tasks waited for memory, in seconds.", nil,
		pressure(func(u engine.Usage) *engine.PSI { return u.MemoryPressure }, true)},
	{"container_pressure_memory_waiting_seconds_total", counter, "Time in which some tasks waited for memory, in seconds.", nil,
		pressure(func(u engine.Usage) *engine.PSI { return u.MemoryPressure }, false)},
	{"container_processes", gauge, "Processes.", nil,
		process(func(p engine.ProcessMetrics) uint64 { return p.Processes })},
	{"container_sockets", gauge, "Open sockets, among the first 65536 file descriptors.", nil,
		process(func(p engine.ProcessMetrics) uint64 { return p.Sockets })},
	{"container_spec_cpu_period", gauge, "Period of the CPU quota, in microseconds.", nil,
		cpu(func(m *engine.CgroupMetrics) uint64 { return m.Period })},
	{"container_spec_cpu_quota", gauge, "CPU time in each period, in microseconds; missing without a quota.", nil,
		func(s *subject, add addFunc) {
			if s.cgroup != nil && s.cgroup.Quota > 0 {
				add(s.cgroup.Quota)
			}
		}},
	{"container_spec_cpu_shares", gauge, "Share of CPU time; 1024 is the usual one.", nil,
		cpu(func(m *engine.CgroupMetrics) uint64 { return m.Shares })},
	{"container_spec_memory_limit_bytes", gauge, "Limit of memory, in bytes; 0 is none.", nil,
		memory(func(m *engine.CgroupMetrics) uint64 { return m.Usage.Limit })},
	{"container_spec_memory_reservation_limit_bytes", gauge, "Memory that is reclaimed last, in bytes; 0 is none.", nil,
		memory(func(m *engine.CgroupMetrics) uint64 { return m.Reservation })},
	{"container_spec_memory_swap_limit_bytes", gauge, "Limit of memory and swap together, in bytes; 0 is none.", nil,
		memory(func(m *engine.CgroupMetrics) uint64 { return m.SwapLimit })},
	{"container_start_time_seconds", gauge, "Start of the container, or creation of the pod, in seconds since 1970.", nil,
		func(s *subject, add addFunc) {
			at := s.pod.Sandbox.Created
			if s.container != nil {
				at = s.container.Container.State.StartedAt
			}
			if !at.IsZero() {
				add(uint64(at.Unix()))
			}
		}},
	{"container_threads", gauge, "Threads.", nil, pids(func(m *engine.CgroupMetrics) uint64 { return m.Usage.Pids })},
	{"container_threads_max", gauge, "Limit of threads; 0 is none.", nil, pids(func(m *engine.CgroupMetrics) uint64 { return m.Counts.PidsLimit })},
	{"container_ulimits_soft", gauge, "Soft limits of the first process, those that are numbers.", []string{"ulimit"},
		func(s *subject, add addFunc) {
			if s.container != nil {
				for name, n := range s.container.Process.Limits {
					add(n, name)
				}
			}
		}},
}

func (s *subject) huge() []engine.HugeMetrics {
	if s.cgroup == nil {
		return nil
	}
	return s.cgroup.Huge
}

// common gives the values of commonLabels.
func (s *subject) common() []string {
	c := s.pod.Sandbox.Config
	if s.container == nil {
		return []string{s.pod.Path, c.Namespace, c.Name, "", "", ""}
	}
	v := s.container.Container
	return []string{s.container.Path, c.Namespace, c.Name, v.Config.Pod.Name, v.ID, v.Config.Pod.UserImage}
}

func (s *subject) measure() []*api.Metric {
	var out []*api.Metric
	common := s.common()
	for _, m := range metrics {
		m.values(s, func(v uint64, labels ...string) {
			out = append(out, &api.Metric{
				Name: m.name, MetricType: m.kind, Value: count(v), LabelValues: slices.Concat(common, labels),
			})
		})
	}
	return out
}

func (s *runtimeService) ListMetricDescriptors(context.Context, *api.ListMetricDescriptorsRequest) (*api.ListMetricDescriptorsResponse, error) {
	resp := &api.ListMetricDescriptorsResponse{}
	for _, m := range metrics {
		resp.Descriptors = append(resp.Descriptors, &api.MetricDescriptor{Name: m.name, Help: m.help, LabelKeys: slices.Concat(commonLabels, m.labels)})
	}
	return resp, nil
}

func (s *runtimeService) ListPodSandboxMetrics(ctx context.Context, _ *api.ListPodSandboxMetricsRequest) (*api.ListPodSandboxMetricsResponse, error) {
	return &api.ListPodSandboxMetricsResponse{PodMetrics: s.listMetrics(ctx)}, nil
}

func (s *runtimeService) StreamPodSandboxMetrics(_ *api.StreamPodSandboxMetricsRequest, to grpc.ServerStreamingServer[api.StreamPodSandboxMetricsResponse]) error {
	return inParts(s.listMetrics(to.Context()), func(p []*api.PodSandboxMetrics) error {
		return to.Send(&api.StreamPodSandboxMetricsResponse{PodSandboxMetrics: p})
	})
}

func (s *Server) listMetrics(ctx context.Context) []*api.PodSandboxMetrics {
	now, devices := time.Now(), map[[2]uint64]string{}
	var out []*api.PodSandboxMetrics
	for _, p := range s.opt.Backend.PodMetrics(ctx) {
		w := &api.PodSandboxMetrics{PodSandboxId: p.Sandbox.ID}
		w.Metrics = (&subject{cgroup: p.Cgroup, pod: &p, now: now, devices: devices}).measure()
		for _, c := range p.Containers {
			m := &subject{cgroup: &c.Cgroup, container: &c, pod: &p, now: now, devices: devices}
			w.ContainerMetrics = append(w.ContainerMetrics, &api.ContainerMetrics{ContainerId: c.Container.ID, Metrics: m.measure()})
		}
		out = append(out, w)
	}
	return out
}
