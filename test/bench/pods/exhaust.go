package main

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// exhaustAll runs pods until there is no address for one more, and removes them: each round
// must get as many as the first.
func (d *driver) exhaustAll(ctx context.Context) error {
	first := 0
	for round := range d.exhaust {
		start := time.Now()
		n, refusal, err := d.exhaustOnce(ctx, round)
		if err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
		fmt.Printf("round %d: %d pods in %.1f s, then: %v\n", round, n, time.Since(start).Seconds(), refusal)
		if code := status.Code(refusal); code != codes.ResourceExhausted {
			d.complain("round %d: code %v for a pod that gets no address", round, code)
		}
		if round == 0 {
			first = n
		}
		if n != first {
			d.complain("round %d: %d pods, not %d", round, n, first)
		}
	}
	return nil
}

func (d *driver) exhaustOnce(ctx context.Context, round int) (pods int, refusal, err error) {
	var mu sync.Mutex
	var ids []string
	addresses := map[string]bool{}
	var wg sync.WaitGroup
	next := make(chan int)
	full, stop := context.WithCancel(ctx)
	for range d.side {
		wg.Go(func() {
			for i := range next {
				l := d.newLife(fmt.Sprintf("r%dp%d", round, i), 0)
				resp, rerr := timed(ctx, l, "RunPodSandbox", l.RunPodSandbox, &cri.RunPodSandboxRequest{Config: l.config})
				if rerr != nil {
					mu.Lock()
					refusal = rerr
					mu.Unlock()
					stop()
					continue
				}
				fmt.Fprintln(os.Stderr, "pods: sandbox", l.name, resp.PodSandboxId)
				st, serr := timed(ctx, l, "PodSandboxStatus", l.PodSandboxStatus, &cri.PodSandboxStatusRequest{PodSandboxId: resp.PodSandboxId})
				mu.Lock()
				ids = append(ids, resp.PodSandboxId)
				ip := st.GetStatus().GetNetwork().GetIp()
				if serr != nil || ip == "" || addresses[ip] {
					d.complain("pod %s: address %q: %v", l.name, ip, serr)
				}
				addresses[ip] = true
				mu.Unlock()
			}
		})
	}
	for i := 0; full.Err() == nil && i < 1<<12; i++ {
		select {
		case next <- i:
		case <-full.Done():
		}
	}
	close(next)
	wg.Wait()
	stop()
	ends := make(chan string)
	for range d.side {
		wg.Go(func() {
			for id := range ends {
				l := d.newLife(id, 0)
				if _, rerr := timed(ctx, l, "StopPodSandbox", l.StopPodSandbox, &cri.StopPodSandboxRequest{PodSandboxId: id}); rerr != nil {
					d.complain("%v", rerr)
				}
				if _, rerr := timed(ctx, l, "RemovePodSandbox", l.RemovePodSandbox, &cri.RemovePodSandboxRequest{PodSandboxId: id}); rerr != nil {
					d.complain("%v", rerr)
				}
			}
		})
	}
	for _, id := range ids {
		ends <- id
	}
	close(ends)
	wg.Wait()
	return len(ids), refusal, ctx.Err()
}
