// Command pods lives through the lives of pods, many side by side, as a kubelet would.
//
// In flows the socket of a CRI, or the command line of a daemon that serves it; out flow
// errors, one a line, and how long the calls took:
//
//	pods -socket PATH -image NAME [-lives N] [-side N] [-net pod|host]
//	pods ... -exhaust ROUNDS              runs pods until there is no address left, ROUNDS times
//	pods ... -kill N -- DAEMON FLAGS...   kills the daemon N times meanwhile
//
// It exits with 1 when something was wrong.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// options are the command line.
type options struct {
	socket, image, net, logs, cgroup string
	lives, side, keep                int
	exhaust, kill                    int
	seed                             uint64
}

// driver is the client, and what it has seen.
type driver struct {
	options
	cri.RuntimeServiceClient
	daemon *daemon // nil: it is not ours
	times  times
	errors atomic.Int64
}

func main() {
	var o options
	flag.StringVar(&o.socket, "socket", "/run/hako/cri.sock", "the CRI")
	flag.StringVar(&o.image, "image", "", "an image with sh, sleep and touch")
	flag.StringVar(&o.net, "net", "pod", "pod, or host: the network namespace of the pods")
	flag.StringVar(&o.logs, "logs", "", "a folder for the containers' logs")
	flag.StringVar(&o.cgroup, "cgroup", "", "parent of the cgroups of every other pod")
	flag.IntVar(&o.lives, "lives", 500, "how many pods; with -kill: at least")
	flag.IntVar(&o.side, "side", 16, "how many side by side")
	flag.IntVar(&o.keep, "keep", 4, "how many pods run on all the time")
	flag.IntVar(&o.exhaust, "exhaust", 0, "rounds in which the addresses are exhausted")
	flag.IntVar(&o.kill, "kill", 0, "how often the daemon is killed")
	flag.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()), "of the moments in which the daemon is killed")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "pods:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options, command []string) error {
	conn, err := grpc.NewClient("unix://"+o.socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(grpc.ConnectParams{
		MinConnectTimeout: time.Second, Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.2, MaxDelay: 100 * time.Millisecond},
	}))
	if err != nil {
		return err
	}
	defer conn.Close()
	d := &driver{options: o, RuntimeServiceClient: cri.NewRuntimeServiceClient(conn)}
	if len(command) > 0 {
		d.daemon = &daemon{command: command, ready: d.ready}
		if err := d.daemon.start(ctx); err != nil {
			return err
		}
		defer d.daemon.stop()
	}
	start := time.Now()
	if o.exhaust > 0 {
		err = d.exhaustAll(ctx)
	} else {
		err = d.all(ctx)
	}
	if err != nil {
		d.complain("%v", err)
	}
	if list, err := d.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{}); err != nil || len(list.Items) > 0 {
		d.complain("sandboxes left: %v %v", list.GetItems(), err)
	}
	if list, err := d.ListContainers(ctx, &cri.ListContainersRequest{}); err != nil || len(list.Containers) > 0 {
		d.complain("containers left: %v %v", list.GetContainers(), err)
	}
	d.times.print()
	fmt.Printf("%d errors, %.1f s\n", d.errors.Load(), time.Since(start).Seconds())
	if d.errors.Load() > 0 {
		return fmt.Errorf("%d errors", d.errors.Load())
	}
	return nil
}

func (d *driver) complain(format string, args ...any) {
	if d.errors.Add(1) <= 50 {
		fmt.Printf("error: "+format+"\n", args...)
	}
}

// ready tells whether the daemon answers.
func (d *driver) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_, err := d.Status(ctx, &cri.StatusRequest{})
	return err
}

// all runs the lives, beside pods that run on.
func (d *driver) all(ctx context.Context) error {
	var kept []*life
	for i := range d.keep {
		l := d.newLife(fmt.Sprint("kept", i), i)
		if err := l.up(ctx); err != nil {
			return err
		}
		kept = append(kept, l)
	}
	work, done := context.WithCancel(ctx)
	var killer sync.WaitGroup
	if d.kill > 0 {
		killer.Go(func() { defer done(); d.killAll(work, kept) })
	}
	var wg sync.WaitGroup
	var next, ended atomic.Int64
	for range d.side {
		wg.Go(func() {
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= d.lives && (d.kill == 0 || work.Err() != nil) {
					return
				}
				if err := d.newLife(fmt.Sprint("p", i), i).live(ctx); err != nil {
					d.complain("pod %d: %v", i, err)
				}
				ended.Add(1)
			}
		})
	}
	wg.Wait()
	done()
	killer.Wait()
	fmt.Printf("%d lives, %d side by side\n", ended.Load(), d.side)
	for _, l := range kept {
		if err := l.check(ctx); err != nil {
			d.complain("%v", err)
		}
		if err := l.live(ctx); err != nil {
			d.complain("end of a pod that ran on: %v", err)
		}
	}
	return ctx.Err()
}
