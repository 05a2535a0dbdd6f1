//go:build linux && (amd64 || arm64)

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/oci"
	"github.com/hako-engine/hako/oci/spec"
)

func updateCommand(a *app, fs *flag.FlagSet) (action, error) {
	file := stringFlag(fs, "resources", "r", "", "file with the limits as JSON, - for standard input")
	blkio := fs.String("blkio-weight", "", "relative weight of block I/O, 10 to 1000")
	shares := fs.String("cpu-share", "", "relative weight of CPU time")
	period := fs.String("cpu-period", "", "CFS period in microseconds")
	quota := fs.String("cpu-quota", "", "CFS quota in microseconds")
	burst := fs.String("cpu-burst", "", "CFS burst in microseconds")
	rtPeriod := fs.String("cpu-rt-period", "", "realtime period in microseconds")
	rtRuntime := fs.String("cpu-rt-runtime", "", "realtime runtime in microseconds")
	cpus := fs.String("cpuset-cpus", "", "CPUs to use")
	mems := fs.String("cpuset-mems", "", "memory nodes to use")
	idle := fs.String("cpu-idle", "", "1: SCHED_IDLE")
	memory := fs.String("memory", "", "memory limit in bytes")
	reservation := fs.String("memory-reservation", "", "soft limit in bytes")
	swap := fs.String("memory-swap", "", "limit of memory and swap in bytes, -1 for none")
	pids := fs.String("pids-limit", "", "most processes, -1 for no limit")
	fs.String("kernel-memory", "", "ignored: the kernel has no such limit any more")
	fs.String("kernel-memory-tcp", "", "ignored")
	l3 := fs.String("l3-cache-schema", "", "not supported: refused")
	bandwidth := fs.String("mem-bw-schema", "", "not supported: refused")
	return func(args []string) (int, error) {
		c, err := a.rt.Load(args[0])
		if err != nil {
			return 0, err
		}
		if *l3 != "" || *bandwidth != "" {
			return 0, errors.New("update: --l3-cache-schema and --mem-bw-schema are not supported")
		}
		r := new(specs.LinuxResources)
		if *file != "" {
			if r, err = readResources(*file); err != nil {
				return 0, err
			}
		} else {
			var e errs
			cpu := specs.LinuxCPU{
				Shares: e.uint(*shares), Quota: e.int(*quota), Period: e.uint(*period), Burst: e.uint(*burst),
				RealtimePeriod: e.uint(*rtPeriod), RealtimeRuntime: e.int(*rtRuntime), Cpus: *cpus, Mems: *mems, Idle: e.int(*idle),
			}
			mem := specs.LinuxMemory{Limit: e.bytes(*memory), Reservation: e.bytes(*reservation), Swap: e.bytes(*swap)}
			r.CPU, r.Memory = &cpu, &mem
			if p := e.int(*pids); p != nil {
				r.Pids = &specs.LinuxPids{Limit: p}
			}
			if w := e.uint(*blkio); w != nil {
				if *w > 1000 {
					return 0, fmt.Errorf("--blkio-weight %d is out of range", *w)
				}
				weight := uint16(*w)
				r.BlockIO = &specs.LinuxBlockIO{Weight: &weight}
			}
			if e.err != nil {
				return 0, e.err
			}
		}
		return 0, c.Update(context.Background(), r)
	}, nil
}

func readResources(file string) (*specs.LinuxResources, error) {
	in := io.Reader(os.Stdin)
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	r := new(specs.LinuxResources)
	if err := json.NewDecoder(io.LimitReader(in, spec.MaxSize)).Decode(r); err != nil {
		return nil, fmt.Errorf("resources: %w", err)
	}
	return r, nil
}

// errs parses numbers and keeps the first error. An empty string is nil.
type errs struct{ err error }

func (e *errs) int(s string) *int64 {
	if s == "" {
		return nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		e.err = errors.Join(e.err, err)
	}
	return &n
}

func (e *errs) uint(s string) *uint64 {
	if s == "" {
		return nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		e.err = errors.Join(e.err, err)
	}
	return &n
}

// bytes takes a number with an optional unit (k, m, g; powers of 1024), or -1.
func (e *errs) bytes(s string) *int64 {
	if s == "" || s == "-1" {
		return e.int(s)
	}
	shift := 0
	lower := strings.TrimSuffix(strings.ToLower(s), "b")
	if i := strings.IndexByte("kmgt", lower[max(len(lower)-1, 0)]); len(lower) > 1 && i >= 0 {
		shift, lower = 10*(i+1), lower[:len(lower)-1]
	}
	n, err := strconv.ParseUint(lower, 10, 63-shift)
	if err != nil {
		e.err = errors.Join(e.err, fmt.Errorf("invalid size %q", s))
	}
	v := int64(n << shift)
	return &v
}

// event is a line of the events command.
type event struct {
	Type string `json:"type"`
	ID   string `json:"id"`
	Data any    `json:"data,omitempty"`
}

func eventsCommand(a *app, fs *flag.FlagSet) (action, error) {
	once := fs.Bool("stats", false, "print the statistics once")
	interval := fs.Duration("interval", 5*time.Second, "time between two statistics")
	return func(args []string) (int, error) {
		c, err := a.rt.Load(args[0])
		if err != nil {
			return 0, err
		}
		if *interval <= 0 {
			return 0, errors.New("duration interval must be greater than 0")
		}
		out := json.NewEncoder(os.Stdout)
		if st, err := c.Status(); err != nil || st == oci.Stopped {
			return 0, errors.Join(err, fmt.Errorf("container with id %s is not running", c.ID()))
		}
		stats := func() error {
			s, err := c.Stats()
			if err != nil {
				return err
			}
			return out.Encode(event{"stats", c.ID(), eventData(s)})
		}
		if *once {
			return 0, stats()
		}
		oom, err := c.NotifyOOM(context.Background())
		if err != nil {
			return 0, err
		}
		tick := time.NewTicker(*interval)
		defer tick.Stop()
		for {
			select {
			case _, ok := <-oom:
				if !ok {
					return 0, nil
				}
				if err := out.Encode(event{Type: "oom", ID: c.ID()}); err != nil {
					return 0, err
				}
			case <-tick.C:
				if st, err := c.Status(); err != nil || st == oci.Stopped {
					return 0, nil
				}
				if err := stats(); err != nil {
					return 0, err
				}
			}
		}
	}, nil
}
