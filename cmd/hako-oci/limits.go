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
	memory := fs.String("memory", "", "memory limit: bytes, or as 512m")
	reservation := fs.String("memory-reservation", "", "soft limit of memory")
	swap := fs.String("memory-swap", "", "limit of memory and swap together, -1 for none")
	pids := fs.String("pids-limit", "", "most processes, -1 for no limit")
	kernel := fs.String("kernel-memory", "", "ignored: the kernel has no such limit any more")
	kernelTCP := fs.String("kernel-memory-tcp", "", "ignored, as --kernel-memory")
	l3 := fs.String("l3-cache-schema", "", "Intel RDT: schema of the L3 cache")
	bandwidth := fs.String("mem-bw-schema", "", "Intel RDT: schema of the memory bandwidth")
	return func(args []string) (int, error) {
		c, err := a.rt.Load(args[0])
		if err != nil {
			return 0, err
		}
		r := new(specs.LinuxResources)
		if *file != "" {
			if r, err = readResources(*file); err != nil {
				return 0, err
			}
		} else {
			var e errs
			cpu := specs.LinuxCPU{
				Shares: e.uint("cpu-share", *shares), Quota: e.int("cpu-quota", *quota), Period: e.uint("cpu-period", *period), Burst: e.uint("cpu-burst", *burst),
				RealtimePeriod: e.uint("cpu-rt-period", *rtPeriod), RealtimeRuntime: e.int("cpu-rt-runtime", *rtRuntime), Cpus: *cpus, Mems: *mems, Idle: e.int("cpu-idle", *idle),
			}
			mem := specs.LinuxMemory{Limit: e.bytes("memory", *memory), Reservation: e.bytes("memory-reservation", *reservation), Swap: e.bytes("memory-swap", *swap)}
			r.CPU, r.Memory = &cpu, &mem
			if e.bytes("kernel-memory", *kernel) != nil || e.bytes("kernel-memory-tcp", *kernelTCP) != nil {
				a.rt.Log.Warn("limits of kernel memory are ignored")
			}
			if p := e.int("pids-limit", *pids); p != nil {
				r.Pids = &specs.LinuxPids{Limit: p}
			}
			if w := e.uint("blkio-weight", *blkio); w != nil {
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
		return 0, c.UpdateAll(context.Background(), r, &specs.LinuxIntelRdt{L3CacheSchema: *l3, MemBwSchema: *bandwidth})
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

// errs parses the values of flags and keeps all errors. An empty string is nil.
type errs struct{ err error }

func (e *errs) failed(flag string, err error) {
	e.err = errors.Join(e.err, fmt.Errorf("invalid value for %s: %w", flag, err))
}

func (e *errs) int(flag, s string) *int64 {
	if s == "" {
		return nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		e.failed(flag, err)
	}
	return &n
}

func (e *errs) uint(flag, s string) *uint64 {
	if s == "" {
		return nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		e.failed(flag, err)
	}
	return &n
}

// bytes takes a size, or -1.
func (e *errs) bytes(flag, s string) *int64 {
	if s == "" || s == "-1" {
		return e.int(flag, s)
	}
	n, err := parseSize(s)
	if err != nil {
		e.failed(flag, err)
	}
	return &n
}

// parseSize reads a number of bytes: digits, perhaps with a point, perhaps a space, and perhaps
// a unit that is a power of 1024: k, m, g, t or p, as kb or KiB, too.
func parseSize(s string) (int64, error) {
	number, unit := s, ""
	if i := strings.IndexFunc(s, func(r rune) bool { return r != '.' && (r < '0' || r > '9') }); i >= 0 {
		number, unit = s[:i], strings.ToLower(strings.TrimPrefix(s[i:], " "))
	}
	scale := 1.0
	if i := strings.IndexByte("kmgtp", (unit + " ")[0]); i >= 0 {
		scale = float64(int64(1) << (10 * (i + 1)))
		switch unit[1:] {
		case "", "b", "ib":
			unit = ""
		}
	}
	// A float64 has fewer digits.
	if n, err := strconv.ParseInt(number, 10, 64); err == nil && scale == 1 && (unit == "" || unit == "b") {
		return n, nil
	}
	v, err := strconv.ParseFloat(number, 64)
	if err != nil || unit != "" && unit != "b" || v*scale >= 1<<63 {
		return 0, fmt.Errorf("invalid size: '%s'", s)
	}
	return int64(v * scale), nil
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
			s, err := readEventStats(c)
			if err != nil {
				return err
			}
			return out.Encode(event{"stats", c.ID(), s})
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
