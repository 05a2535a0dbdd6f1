//go:build linux && (amd64 || arm64)

package oci

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/cgroup"
	"github.com/hako-engine/hako/oci/internal/classed"
	"github.com/hako-engine/hako/oci/launch"
	"github.com/hako-engine/hako/oci/plan"
	"github.com/hako-engine/hako/oci/spec"
)

// ExecOptions says what to execute in a container.
type ExecOptions struct {
	// Process is executed. What it leaves out is taken from the container's own process:
	// capabilities, rlimits, labels, oom_score_adj.
	Process *specs.Process
	// Nil is /dev/null. Ignored with Process.Terminal: see Process.Console.
	Stdin, Stdout, Stderr *os.File
	PreserveFDs           []*os.File // 3, 4, ... of the process
	IgnorePaused          bool       // also in a paused container, where it waits
	NoNewKeyring          bool
	// Cgroup is a cgroup below the container's, by controller; "" stands for all.
	Cgroup map[string]string
}

// Process is a process that Exec has started. It is a child of the caller, who reaps it.
type Process struct {
	Pid     int
	PidFD   *os.File
	Console *os.File // master of the terminal, nil without one
}

// Exec runs one more process in the container. It returns when the process has
// executed its program.
func (c *Container) Exec(ctx context.Context, o ExecOptions) (*Process, error) {
	if o.Process == nil {
		return nil, classed.Errorf(errdefs.ErrInvalidArgument, "exec in container %s: no process", c.ID())
	}
	if err := spec.ValidateProcess(o.Process); err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.ID(), err)
	}
	switch st, err := c.Status(); {
	case err != nil:
		return nil, err
	case st == Stopped || st == Creating:
		return nil, classed.Errorf(errdefs.ErrFailedPrecondition, "container %q: cannot exec in a stopped container", c.ID())
	case st == Paused && !o.IgnorePaused:
		return nil, classed.Errorf(errdefs.ErrFailedPrecondition, "container %q: cannot exec in a paused container (use --ignore-paused to override)", c.ID())
	}
	s, err := c.readSpec()
	if err != nil {
		return nil, err
	}
	p := inherit(*o.Process, s.Process)
	p.Env = withHome(&p, rootAt(procRoot(c.Pid())))
	facts, err := c.insideFacts(&p)
	if err != nil {
		return nil, err
	}
	po := plan.Options{ID: c.ID(), NoNewKeyring: o.NoNewKeyring, Preserve: len(o.PreserveFDs)}
	if po.Filter, err = filter(s); err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.ID(), err)
	}
	cg, err := c.execCgroup(o.Cgroup)
	if err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.ID(), err)
	}
	if err := ownStdio(s, &p, o.Stdin, o.Stdout, o.Stderr); err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.ID(), err)
	}
	cfg := launch.Config{Stdin: o.Stdin, Stdout: o.Stdout, Stderr: o.Stderr, Preserve: o.PreserveFDs, TimerSlack: c.r.TimerSlack}
	cfg.Listener = func(pid int, f *os.File) error {
		st, err := c.State()
		if err != nil {
			return err
		}
		return sendListener(s.Linux.Seccomp, pid, st, f)
	}
	var limits []plan.Rlimit
	cfg.Place = func(pid int) error {
		if c.state.Rdt != nil {
			if err := c.state.Rdt.Add(pid); err != nil {
				return err
			}
		}
		if p.OOMScoreAdj != nil {
			if err := setOOMScore(pid, *p.OOMScoreAdj); err != nil {
				return err
			}
		}
		return raiseLimits(pid, limits)
	}
	proc, err := c.inside(ctx, cg, cfg, &po, func(o plan.Options) (*plan.Plan, error) {
		pl, err := plan.Exec(s, &p, facts, o)
		if err == nil {
			limits = pl.Rlimits
			for _, w := range pl.Warnings {
				c.r.log().Warn(w)
			}
		}
		return pl, err
	})
	if err != nil {
		return nil, fmt.Errorf("exec failed: unable to start container process: %w", classify(err))
	}
	return &Process{Pid: proc.Pid, PidFD: proc.PidFD, Console: proc.Console}, nil
}

// inherit fills what a process for exec leaves out.
func inherit(p specs.Process, of *specs.Process) specs.Process {
	if of == nil {
		return p
	}
	if p.Capabilities == nil {
		p.Capabilities = of.Capabilities
	}
	if len(p.Rlimits) == 0 {
		p.Rlimits = of.Rlimits
	}
	if p.ApparmorProfile == "" {
		p.ApparmorProfile = of.ApparmorProfile
	}
	if p.SelinuxLabel == "" {
		p.SelinuxLabel = of.SelinuxLabel
	}
	if p.OOMScoreAdj == nil {
		p.OOMScoreAdj = of.OOMScoreAdj
	}
	if p.Scheduler == nil {
		p.Scheduler = of.Scheduler
	}
	if p.IOPriority == nil {
		p.IOPriority = of.IOPriority
	}
	if p.ExecCPUAffinity == nil {
		p.ExecCPUAffinity = of.ExecCPUAffinity
	}
	return p
}

// execCgroup gives the cgroup for the new process.
func (c *Container) execCgroup(sub map[string]string) (*cgroup.Cgroup, error) {
	if len(c.state.Cgroups) == 0 {
		return nil, nil
	}
	if len(sub) == 0 {
		return c.cgroup(), nil
	}
	paths := make(map[string]string, len(c.state.Cgroups))
	for name, dir := range c.state.Cgroups {
		s, ok := sub[name]
		if !ok {
			s = sub[""]
		}
		// Clean with a leading slash keeps it below the container's cgroup.
		paths[name] = filepath.Join(dir, filepath.Clean("/"+s))
	}
	return cgroup.Layout{}.Load(paths), nil
}

// namespaceTypes in the order in which they are joined.
var namespaceTypes = []string{"user", "pid", "ipc", "uts", "network", "cgroup", "mount", "time"}

// namespaceFile gives the name in /proc/PID/ns, "" for an unknown type.
func namespaceFile(typ string) string {
	switch {
	case typ == "network":
		return "net"
	case typ == "mount":
		return "mnt"
	case slices.Contains(namespaceTypes, typ):
		return typ
	}
	return ""
}

// insideFacts probes what joining the container needs.
func (c *Container) insideFacts(p *specs.Process) (plan.Facts, error) {
	f := ownFacts()
	probeLabels(&f, p)
	for _, typ := range namespaceTypes {
		var own, its unix.Stat_t
		file := namespaceFile(typ)
		if unix.Stat("/proc/thread-self/ns/"+file, &own) != nil {
			continue // the kernel has no such namespaces
		}
		if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/%s", c.state.Pid, file), &its); err != nil {
			return f, fmt.Errorf("container %q: read its %s namespace: %w", c.ID(), typ, err)
		}
		if own.Ino != its.Ino || own.Dev != its.Dev {
			f.Joined = append(f.Joined, typ)
		}
	}
	return f, nil
}

// inside launches a plan that joins the container.
func (c *Container) inside(_ context.Context, cg *cgroup.Cgroup, cfg launch.Config, o *plan.Options, compile func(plan.Options) (*plan.Plan, error)) (*launch.Process, error) {
	fd, err := unix.PidfdOpen(c.state.Pid, 0)
	if err != nil {
		return nil, fmt.Errorf("pidfd_open %d: %w", c.state.Pid, err)
	}
	pidfd := os.NewFile(uintptr(fd), "pidfd")
	defer pidfd.Close()
	if !alive(c.state.Pid, c.state.StartTime) {
		return nil, classed.Errorf(errdefs.ErrFailedPrecondition, "container %q: container not running", c.ID())
	}
	cfg.Pidfd, cfg.CgroupFD = pidfd, -1
	if cg != nil {
		doors, err := cg.Doors()
		if err != nil {
			return nil, err
		}
		defer doors.Close()
		cfg.CgroupFD, cfg.Doors = doors.V2, doors.FDs()
		for _, d := range doors.V1 {
			o.Doors = append(o.Doors, d.Dir)
		}
	}
	p, err := compile(*o)
	if err != nil {
		return nil, err
	}
	proc, err := launch.Start(p, cfg)
	if errors.Is(err, unix.EBUSY) && cfg.CgroupFD >= 0 {
		// A v2 cgroup that has handed controllers down takes no processes itself: then the
		// container manages its own cgroups, and the first process shows where to go.
		if dir, ok := c.initCgroup(); ok {
			if f, err := os.Open(dir); err == nil {
				defer f.Close()
				cfg.CgroupFD = int(f.Fd())
				return launch.Start(p, cfg)
			}
		}
	}
	return proc, err
}

// initCgroup finds the directory of the first process's v2 cgroup, below the container's.
func (c *Container) initCgroup() (string, bool) {
	top := c.state.Cgroups[""]
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", c.state.Pid))
	if err != nil || top == "" {
		return "", false
	}
	for line := range strings.Lines(string(raw)) {
		path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::")
		if _, below, found := strings.Cut(path, "/"+filepath.Base(top)+"/"); ok && found {
			return filepath.Join(top, filepath.Clean("/"+below)), true
		}
	}
	return "", false
}

// pidInside gives the pid that a process has in its own PID namespace: what hooks read who
// run there.
func pidInside(pid int) int {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return pid
	}
	for line := range strings.Lines(string(raw)) {
		if pids, ok := strings.CutPrefix(line, "NSpid:"); ok {
			if f := strings.Fields(pids); len(f) > 0 {
				if n, err := strconv.Atoi(f[len(f)-1]); err == nil {
					return n
				}
			}
		}
	}
	return pid
}

// hookInside runs a hook in the container's namespaces.
func (c *Container) hookInside(ctx context.Context, kind string, i int, h specs.Hook, st specs.State) error {
	st.Pid = pidInside(st.Pid)
	return c.r.runHook(ctx, kind, i, h, st, func(h specs.Hook, stdin, stdout, stderr *os.File) (int, error) {
		f, err := c.insideFacts(nil)
		if err != nil {
			return 0, err
		}
		o := &plan.Options{ID: c.ID()}
		cfg := launch.Config{Stdin: stdin, Stdout: stdout, Stderr: stderr, TimerSlack: c.r.TimerSlack}
		proc, err := c.inside(ctx, c.cgroup(), cfg, o, func(o plan.Options) (*plan.Plan, error) {
			return plan.Hook(h, fmt.Sprintf("/proc/%d/root", c.state.Pid), f, o)
		})
		if err != nil {
			return 0, err
		}
		proc.PidFD.Close()
		return proc.Pid, nil
	})
}

// ExecProcess gives a process for Exec that is like the container's own, with other
// arguments.
func (c *Container) ExecProcess(args []string) (*specs.Process, error) {
	s, err := c.readSpec()
	if err != nil {
		return nil, err
	}
	if s.Process == nil {
		return nil, classed.Errorf(errdefs.ErrFailedPrecondition, "container %q: its configuration has no process", c.ID())
	}
	p := *s.Process
	p.Args, p.ConsoleSize, p.Terminal = args, nil, false
	return &p, nil
}
