package docker

import (
	"context"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"

	"github.com/hako-engine/hako/engine"
)

// statsInterval is how often docker stats hears of a container.
const statsInterval = time.Second

// containerStats streams samples, each with the one before it, from which clients
// compute rates. The first of a stream has an empty predecessor; a single one waits
// for a second sample unless one-shot asks for speed.
func (s *Server) containerStats(ctx context.Context, c *call) error {
	streaming := c.flagOr("stream", true)
	oneShot := c.flag("one-shot")
	if streaming && oneShot {
		return invalidf("cannot have stream=true and one-shot=true")
	}
	ctr, err := s.opt.Backend.Container(ctx, c.id())
	if err != nil {
		return err
	}
	prev, err := s.sample(ctx, &ctr)
	if err != nil {
		return err
	}
	out := c.objects(typeJSON)
	if streaming || oneShot || prev.Read.IsZero() {
		if err := out.write(statsOf(&ctr, &prev, &engine.Stats{})); err != nil || !streaming {
			return nil
		}
	}
	tick := time.NewTicker(statsInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		cur, err := s.sample(ctx, &ctr)
		if err != nil {
			if !c.w.wrote {
				return err
			}
			return nil // the container was removed: the stream ends
		}
		if err := out.write(statsOf(&ctr, &cur, &prev)); err != nil || !streaming {
			return nil
		}
		prev = cur
	}
}

// sample gives the zero Stats for a container that does not run.
func (s *Server) sample(ctx context.Context, ctr *engine.Container) (engine.Stats, error) {
	st, err := s.opt.Backend.Stats(ctx, ctr.ID)
	if errdefs.IsConflict(err) || errdefs.IsFailedPrecondition(err) {
		return engine.Stats{}, nil
	}
	return st, err
}

func statsOf(ctr *engine.Container, cur, prev *engine.Stats) container.StatsResponse {
	out := container.StatsResponse{
		ID: ctr.ID, Name: "/" + ctr.Name, OSType: "linux",
		Read: cur.Read, PreRead: prev.Read,
		CPUStats:    cpuOf(cur),
		PreCPUStats: cpuOf(prev),
		MemoryStats: container.MemoryStats{
			Usage: cur.MemUsage, MaxUsage: cur.MemMax, Limit: cur.MemLimit, Failcnt: cur.MemFailcnt, Stats: cur.MemStats,
		},
		PidsStats: container.PidsStats{Current: cur.Pids, Limit: cur.PidsLimit},
	}
	for _, e := range cur.Blkio {
		op := strings.ToLower(e.Op)
		out.BlkioStats.IoServiceBytesRecursive = append(out.BlkioStats.IoServiceBytesRecursive,
			container.BlkioStatEntry{Major: e.Major, Minor: e.Minor, Op: op, Value: e.Bytes})
		out.BlkioStats.IoServicedRecursive = append(out.BlkioStats.IoServicedRecursive,
			container.BlkioStatEntry{Major: e.Major, Minor: e.Minor, Op: op, Value: e.Ops})
	}
	if len(cur.Networks) > 0 {
		out.Networks = make(map[string]container.NetworkStats, len(cur.Networks))
		for name, n := range cur.Networks {
			out.Networks[name] = container.NetworkStats{
				RxBytes: n.RxBytes, RxPackets: n.RxPackets, RxErrors: n.RxErrors, RxDropped: n.RxDropped,
				TxBytes: n.TxBytes, TxPackets: n.TxPackets, TxErrors: n.TxErrors, TxDropped: n.TxDropped,
			}
		}
	}
	return out
}

func cpuOf(s *engine.Stats) container.CPUStats {
	return container.CPUStats{
		CPUUsage: container.CPUUsage{
			TotalUsage: s.CPUTotal, PercpuUsage: s.PerCPU, UsageInKernelmode: s.CPUKernel, UsageInUsermode: s.CPUUser,
		},
		SystemUsage: s.SystemCPU,
		OnlineCPUs:  uint32(s.OnlineCPUs),
		ThrottlingData: container.ThrottlingData{
			Periods: s.Periods, ThrottledPeriods: s.Throttled, ThrottledTime: s.ThrottledNS,
		},
	}
}
