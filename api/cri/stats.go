package cri

import (
	"cmp"
	"context"
	"slices"
	"strings"

	"google.golang.org/grpc"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hako-engine/hako/engine"
)

func (s *runtimeService) ContainerStats(ctx context.Context, r *api.ContainerStatsRequest) (*api.ContainerStatsResponse, error) {
	v, err := s.member(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	all := s.opt.Backend.PodContainerUsage(ctx, func(o engine.Container) bool { return o.ID == v.ID })
	if len(all) == 0 {
		return nil, failedf("container %s is not running", v.ID)
	}
	return &api.ContainerStatsResponse{Stats: containerStats(all[0])}, nil
}

func (s *runtimeService) ListContainerStats(ctx context.Context, r *api.ListContainerStatsRequest) (*api.ListContainerStatsResponse, error) {
	return &api.ListContainerStatsResponse{Stats: s.listContainerStats(ctx, r.GetFilter())}, nil
}

func (s *runtimeService) StreamContainerStats(r *api.StreamContainerStatsRequest, to grpc.ServerStreamingServer[api.StreamContainerStatsResponse]) error {
	return inParts(s.listContainerStats(to.Context(), r.GetFilter()), func(p []*api.ContainerStats) error {
		return to.Send(&api.StreamContainerStatsResponse{ContainerStats: p})
	})
}

func (s *Server) listContainerStats(ctx context.Context, f *api.ContainerStatsFilter) []*api.ContainerStats {
	want := func(v engine.Container) bool {
		return strings.HasPrefix(v.ID, f.GetId()) && strings.HasPrefix(v.Config.Pod.Sandbox, f.GetPodSandboxId()) &&
			matchLabels(v.Config.Labels, f.GetLabelSelector())
	}
	var out []*api.ContainerStats
	for _, u := range s.opt.Backend.PodContainerUsage(ctx, want) {
		out = append(out, containerStats(u))
	}
	return out
}

func (s *runtimeService) PodSandboxStats(ctx context.Context, r *api.PodSandboxStatsRequest) (*api.PodSandboxStatsResponse, error) {
	u, err := s.opt.Backend.SandboxUsage(ctx, r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	return &api.PodSandboxStatsResponse{Stats: sandboxStats(u)}, nil
}

func (s *runtimeService) ListPodSandboxStats(ctx context.Context, r *api.ListPodSandboxStatsRequest) (*api.ListPodSandboxStatsResponse, error) {
	return &api.ListPodSandboxStatsResponse{Stats: s.listSandboxStats(ctx, r.GetFilter())}, nil
}

func (s *runtimeService) StreamPodSandboxStats(r *api.StreamPodSandboxStatsRequest, to grpc.ServerStreamingServer[api.StreamPodSandboxStatsResponse]) error {
	return inParts(s.listSandboxStats(to.Context(), r.GetFilter()), func(p []*api.PodSandboxStats) error {
		return to.Send(&api.StreamPodSandboxStatsResponse{PodSandboxStats: p})
	})
}

func (s *Server) listSandboxStats(ctx context.Context, f *api.PodSandboxStatsFilter) []*api.PodSandboxStats {
	want := func(sb engine.Sandbox) bool {
		return strings.HasPrefix(sb.ID, f.GetId()) && matchLabels(sb.Config.Labels, f.GetLabelSelector())
	}
	var out []*api.PodSandboxStats
	for _, u := range s.opt.Backend.SandboxUsages(ctx, want) {
		out = append(out, sandboxStats(u))
	}
	return out
}

func containerStats(u engine.ContainerUsage) *api.ContainerStats {
	v, p := u.Container, u.Container.Config.Pod
	return &api.ContainerStats{
		Attributes: &api.ContainerAttributes{
			Id: v.ID, Metadata: &api.ContainerMetadata{Name: p.Name, Attempt: p.Attempt},
			Labels: v.Config.Labels, Annotations: v.Config.Annotations,
		},
		Cpu: cpuUsage(u.Usage), Memory: memoryUsage(u.Usage), WritableLayer: fsUsage(u.Writable),
		Swap: swapUsage(u.Usage), Io: ioUsage(u.Usage),
	}
}

func sandboxStats(u engine.SandboxUsage) *api.PodSandboxStats {
	c, now := u.Sandbox.Config, u.Usage.Time.UnixNano()
	w := &api.PodSandboxStats{
		Attributes: &api.PodSandboxAttributes{
			Id: u.Sandbox.ID, Metadata: sandboxMetadata(c), Labels: c.Labels, Annotations: c.Annotations,
		},
		Linux: &api.LinuxPodSandboxStats{
			Cpu: cpuUsage(u.Usage), Memory: memoryUsage(u.Usage), Io: ioUsage(u.Usage),
			Process: &api.ProcessUsage{Timestamp: now, ProcessCount: count(u.Usage.Pids)},
		},
	}
	for _, ctr := range u.Containers {
		w.Linux.Containers = append(w.Linux.Containers, containerStats(ctr))
	}
	if u.Networks != nil {
		w.Linux.Network = &api.NetworkUsage{Timestamp: now}
		var all []*api.NetworkInterfaceUsage
		for name, n := range u.Networks {
			all = append(all, &api.NetworkInterfaceUsage{Name: name, RxBytes: count(n.RxBytes), RxErrors: count(n.RxErrors), TxBytes: count(n.TxBytes), TxErrors: count(n.TxErrors)})
		}
		slices.SortFunc(all, func(a, b *api.NetworkInterfaceUsage) int { return cmp.Compare(a.Name, b.Name) })
		for _, n := range all {
			if n.Name == defaultInterface {
				w.Linux.Network.DefaultInterface = n
			} else {
				w.Linux.Network.Interfaces = append(w.Linux.Network.Interfaces, n)
			}
		}
	}
	return w
}

// defaultInterface is the name of a pod's first interface.
const defaultInterface = "eth0"

func count(n uint64) *api.UInt64Value { return &api.UInt64Value{Value: n} }

func cpuUsage(u engine.Usage) *api.CpuUsage {
	w := &api.CpuUsage{Timestamp: u.Time.UnixNano(), UsageCoreNanoSeconds: count(u.CPU), Psi: psi(u.CPUPressure)}
	if u.NanoCores != nil {
		w.UsageNanoCores = count(*u.NanoCores)
	}
	return w
}

func memoryUsage(u engine.Usage) *api.MemoryUsage {
	w := &api.MemoryUsage{
		Timestamp: u.Time.UnixNano(), WorkingSetBytes: count(u.WorkingSet), UsageBytes: count(u.Memory), RssBytes: count(u.RSS),
		PageFaults: count(u.Faults), MajorPageFaults: count(u.MajorFault), AvailableBytes: count(0), Psi: psi(u.MemoryPressure),
	}
	if u.Limit > u.WorkingSet {
		w.AvailableBytes = count(u.Limit - u.WorkingSet)
	}
	return w
}

func swapUsage(u engine.Usage) *api.SwapUsage {
	return &api.SwapUsage{
		Timestamp: u.Time.UnixNano(), SwapUsageBytes: count(u.Swap), SwapAvailableBytes: count(u.SwapLimit - min(u.SwapLimit, u.Swap)),
	}
}

func ioUsage(u engine.Usage) *api.IoUsage {
	if u.IOPressure == nil {
		return nil
	}
	return &api.IoUsage{Timestamp: u.Time.UnixNano(), Psi: psi(u.IOPressure)}
}

func psi(p *engine.PSI) *api.PsiStats {
	if p == nil {
		return nil
	}
	data := func(l engine.Pressure) *api.PsiData {
		return &api.PsiData{Total: l.Total, Avg10: l.Avg10, Avg60: l.Avg60, Avg300: l.Avg300}
	}
	return &api.PsiStats{Some: data(p.Some), Full: data(p.Full)}
}
