//go:build linux && (amd64 || arm64)

// Package oci is the runtime: it makes containers of OCI configurations, and finds,
// starts, stops and removes them.
//
// In flow a configuration, descriptors for standard input and output, and calls on
// containers; out flow processes, which are children of the caller, and small files
// below Runtime.Root by which any process finds the container again. A call goes
// through three stages: package spec checks the configuration, package plan compiles
// it to a list of system calls, package launch executes that list.
//
// What the kernel knows is never stored: the status of a container is derived from its
// process (pid and start time), from the FIFO that start removes, and from the freezer.
//
//	        create             start            exit, kill
//	(none) ───────▶ created ──────────▶ running ───────────▶ stopped ──delete──▶ (none)
//	                   │               pause│▲resume             ▲
//	                   │                    ▼│                   │
//	                   │                  paused ────── kill ────┤
//	                   └──────────────── kill ───────────────────┘
package oci

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/cgroup"
	"github.com/hako-engine/hako/oci/early"
	"github.com/hako-engine/hako/oci/internal/classed"
)

// Runtime is a directory of containers.
type Runtime struct {
	Root         string // made when missing, with mode 0711
	CgroupDriver string // "cgroupfs" (or "") and "systemd"
	Log          *slog.Logger
	// TimerSlack of processes that are made, in nanoseconds, where the calling process has
	// another one. 0: they inherit its.
	TimerSlack int
	// Begun is a creation that was begun before the Go runtime started, nil for none. Create
	// takes it over if it is the one of the container.
	Begun *early.Begin
}

func (r *Runtime) log() *slog.Logger {
	if r.Log != nil {
		return r.Log
	}
	return slog.New(slog.DiscardHandler)
}

// Status of a container.
type Status string

// States of a container, in the words of the specification and of runc.
const (
	Creating Status = "creating"
	Created  Status = "created"
	Running  Status = "running"
	Paused   Status = "paused"
	Stopped  Status = "stopped"
)

const (
	stateFile  = early.StateFile
	configFile = early.ConfigFile
	startFifo  = early.StartFifo
	reportFifo = early.ReportFifo
)

// Container is a container that exists. Its methods may be called side by side, and
// from several processes.
type Container struct {
	r     *Runtime
	dir   string
	state state
	// spec is the whole configuration, kept by its creator until the process is started (by
	// Run, for ever); brief is what kill and delete look at. Where nil they are read.
	kept struct {
		sync.Mutex
		spec, brief *specs.Spec
	}

	// Console is the master of the terminal, for the caller that has created the
	// container with one. The caller closes it.
	Console *os.File
	// PidFD refers to the first process, for the caller that has created it. The caller
	// closes it.
	PidFD *os.File
}

// ID gives the container's name.
func (c *Container) ID() string { return c.state.ID }

// Pid gives the first process, also after it has ended.
func (c *Container) Pid() int { return c.state.Pid }

// Bundle gives the directory that the container was made of.
func (c *Container) Bundle() string { return c.state.Bundle }

// Rootfs gives the path of the root file system on the host.
func (c *Container) Rootfs() string { return c.state.Rootfs }

// CreatedAt tells when the container was created.
func (c *Container) CreatedAt() time.Time { return c.state.Created }

// Owner gives the user who has created the container.
func (c *Container) Owner() int { return c.state.Owner }

// CgroupPaths gives the directory in each cgroup hierarchy, by controller ("" for v2).
func (c *Container) CgroupPaths() map[string]string { return c.state.Cgroups }

const maxID = 1024

// CheckID tells whether id can name a container.
func CheckID(id string) error {
	if id == "" || len(id) > maxID || id == "." || id == ".." {
		return classed.Errorf(errdefs.ErrInvalidArgument, "invalid container ID format: %.64q", id)
	}
	for _, b := range []byte(id) {
		if !(b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9' || b == '_' || b == '+' || b == '-' || b == '.') {
			return classed.Errorf(errdefs.ErrInvalidArgument, "invalid container ID format: %.64q", id)
		}
	}
	return nil
}

// Load finds a container.
func (r *Runtime) Load(id string) (*Container, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	c := &Container{r: r, dir: filepath.Join(r.Root, id)}
	if err := c.readState(); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, classed.Errorf(errdefs.ErrNotFound, "container %q: container does not exist", id)
		}
		return nil, fmt.Errorf("container %q: %w", id, err)
	}
	return c, nil
}

// List gives all containers. One that is just being made or removed is left out.
func (r *Runtime) List() ([]*Container, error) {
	entries, err := os.ReadDir(r.Root)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []*Container
	for _, e := range entries {
		if !e.IsDir() || CheckID(e.Name()) != nil {
			continue
		}
		c, err := r.Load(e.Name())
		if err != nil {
			if !errdefs.IsNotFound(err) {
				r.log().Warn("cannot read container", "id", e.Name(), "error", err)
			}
			continue
		}
		out = append(out, c)
	}
	return out, nil
}

// Status derives what the container is doing.
func (c *Container) Status() (Status, error) {
	if c.state.Pid == 0 {
		return Creating, nil
	}
	if !alive(c.state.Pid, c.state.StartTime) {
		return Stopped, nil
	}
	frozen, err := c.frozen()
	if err != nil {
		return "", fmt.Errorf("container %q: %w", c.ID(), err)
	}
	if frozen {
		return Paused, nil
	}
	switch err := unix.Access(filepath.Join(c.dir, startFifo), unix.F_OK); err {
	case nil:
		return Created, nil
	case unix.ENOENT:
		return Running, nil
	default:
		return "", fmt.Errorf("container %q: %w", c.ID(), err)
	}
}

func (c *Container) frozen() (bool, error) {
	if len(c.state.Cgroups) == 0 {
		return false, nil
	}
	frozen, err := c.cgroup().Frozen()
	if errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
		return false, nil
	}
	return frozen, err
}

func (c *Container) cgroup() *cgroup.Cgroup { return cgroup.Layout{}.Load(c.state.Cgroups) }

// State gives the container's state in the form of the specification.
func (c *Container) State() (specs.State, error) {
	st, err := c.Status()
	if err != nil {
		return specs.State{}, err
	}
	return c.specState(st), nil
}

func (c *Container) specState(st Status) specs.State {
	s := specs.State{
		Version: c.state.OCIVersion, ID: c.state.ID, Status: specs.ContainerState(st),
		Bundle: c.state.Bundle, Annotations: c.state.Annotations,
	}
	if st != Stopped {
		s.Pid = c.state.Pid
	}
	return s
}

// require fails unless the container is in one of the states.
func (c *Container) require(text string, want ...Status) error {
	st, err := c.Status()
	if err != nil {
		return err
	}
	for _, w := range want {
		if st == w {
			return nil
		}
	}
	return classed.Errorf(errdefs.ErrFailedPrecondition, "container %q: %s", c.ID(), text)
}

// Processes gives the pids of all processes of the container, as the host sees them.
func (c *Container) Processes() ([]int, error) {
	if len(c.state.Cgroups) == 0 {
		if alive(c.state.Pid, c.state.StartTime) {
			return []int{c.state.Pid}, nil
		}
		return nil, nil
	}
	pids, err := c.cgroup().AllProcs()
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	return pids, err
}

// Stats reads the container's counters.
func (c *Container) Stats() (*cgroup.Stats, error) {
	if err := c.needCgroup(); err != nil {
		return nil, err
	}
	return c.cgroup().Stats()
}

// CPUSet reads the settings of the container's cpuset on cgroup v1.
func (c *Container) CPUSet() (cgroup.CPUSetStats, error) {
	if err := c.needCgroup(); err != nil {
		return cgroup.CPUSetStats{}, err
	}
	return c.cgroup().CPUSet()
}

// NotifyOOM gives a channel that receives when the container runs out of memory.
func (c *Container) NotifyOOM(ctx context.Context) (<-chan struct{}, error) {
	if err := c.needCgroup(); err != nil {
		return nil, err
	}
	return c.cgroup().OOM(ctx)
}
