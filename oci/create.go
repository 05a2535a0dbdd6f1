//go:build linux && (amd64 || arm64)

package oci

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/longoverlay"
	"github.com/hako-engine/hako/internal/undo"
	"github.com/hako-engine/hako/oci/cgroup"
	"github.com/hako-engine/hako/oci/cgroup/systemd"
	"github.com/hako-engine/hako/oci/early"
	"github.com/hako-engine/hako/oci/internal/classed"
	"github.com/hako-engine/hako/oci/internal/rawfile"
	"github.com/hako-engine/hako/oci/launch"
	"github.com/hako-engine/hako/oci/netdev"
	"github.com/hako-engine/hako/oci/plan"
	"github.com/hako-engine/hako/oci/seccomp"
	"github.com/hako-engine/hako/oci/spec"
)

// CreateOptions says what a container is made of.
type CreateOptions struct {
	Bundle string      // directory; relative paths of the specification start here
	Spec   *specs.Spec // nil: Bundle/config.json
	Raw    []byte      // the text of Spec, nil: it is made
	// Rootfs is mounted as the root, bottom first, inside the container's mount namespace
	// only: the host's mount table does not show it. Empty: spec.Root.Path.
	Rootfs []specs.Mount
	// Nil is /dev/null. Ignored with spec.Process.Terminal: see Container.Console.
	Stdin, Stdout, Stderr *os.File
	PreserveFDs           []*os.File // 3, 4, ... of the process
	NoPivot               bool       // for a host whose root is an initramfs
	NoNewKeyring          bool

	run bool // execute at once, without waiting for Start
}

// Create makes a container whose process waits for Start. The process is a child of
// the caller, who has to reap it.
func (r *Runtime) Create(ctx context.Context, id string, o CreateOptions) (*Container, error) {
	return r.create(ctx, id, o)
}

// Run is Create and Start in one, and quicker than both.
func (r *Runtime) Run(ctx context.Context, id string, o CreateOptions) (*Container, error) {
	o.run = true
	return r.create(ctx, id, o)
}

// creation is a Create on its way.
type creation struct {
	r      *Runtime
	o      CreateOptions
	spec   *specs.Spec
	raw    []byte // of the specification
	c      *Container
	layout cgroup.Layout
	cg     *cgroup.Cgroup
	begun  *early.Begin // nil: nothing was made before
	files  *launch.Opening
	proc   *launch.Process
	undo   undo.Stack
	ctx    context.Context
	// hookFailed: what was made is destroyed as by Delete, with hooks.
	hookFailed bool

	// With the cgroup driver systemd.
	systemd     *systemd.Manager
	properties  []systemd.Property
	unitStarted bool

	namespace *os.File // of the network, with devices
	devices   []*netdev.Moved
}

func (r *Runtime) create(ctx context.Context, id string, o CreateOptions) (_ *Container, err error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	k := &creation{r: r, o: o, ctx: ctx}
	if b := r.Begun; b != nil && b.There() && b.Root == r.Root && b.ID == id {
		k.begun = b
		defer b.Take()
		k.undo.Add("what was begun", func(context.Context) error { b.Discard(); return nil })
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.undo.Run(ctx))
			if k.hookFailed {
				k.c.poststop(context.WithoutCancel(ctx), k.spec)
			}
		}
		if k.namespace != nil {
			k.namespace.Close()
		}
		if err == nil && k.systemd != nil {
			k.systemd.Close()
		}
	}()
	if err := k.readSpec(); err != nil {
		return nil, err
	}
	if err := k.makeDir(id); err != nil {
		return nil, err
	}
	if err := k.makeCgroup(); err != nil {
		return nil, err
	}
	if err := k.makeRdt(); err != nil {
		return nil, fmt.Errorf("container %s: %w", id, err)
	}
	if p := k.spec.Process; p != nil {
		withEnv, s := *p, *k.spec
		root := rootAt(k.c.state.Rootfs)
		if len(o.Rootfs) > 0 {
			root = func() (*os.File, error) { return mountedRoot(o.Rootfs, k.o.Bundle) }
		}
		withEnv.Env = withHome(p, root)
		s.Process, k.spec = &withEnv, &s
	}
	p, err := k.compile(id)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", id, err)
	}
	for _, w := range p.Warnings {
		r.log().Warn(w)
	}
	if err := k.launch(p); err != nil {
		return nil, fmt.Errorf("unable to start container process: %w", classify(err))
	}
	if hook := k.spec.Hooks; o.run && hook != nil && !k.needsHold() {
		if err := k.c.poststart(ctx, k.spec); err != nil {
			k.hookFailed = true
			return nil, err
		}
	}
	k.undo.Release()
	if o.run && k.needsHold() {
		if err := k.c.Start(ctx); err != nil {
			if derr := k.c.Delete(context.WithoutCancel(ctx), true); !errdefs.IsNotFound(derr) {
				err = errors.Join(err, derr)
			}
			k.proc.Kill() // the caller never hears of this child
			return nil, err
		}
	}
	return k.c, nil
}

// classify gives a failed step the class that callers map.
func classify(err error) error {
	var step *launch.StepError
	if !errors.As(err, &step) {
		return err
	}
	switch {
	case step.Step.Class == plan.ClassInvalid:
		return classed.As(errdefs.ErrInvalidArgument, err)
	case step.Step.Class == plan.ClassNoExec && step.Errno == unix.ENOENT:
		return classed.As(errdefs.ErrNotFound, err)
	case step.Errno == unix.EPERM || step.Errno == unix.EACCES:
		return classed.As(errdefs.ErrPermissionDenied, err)
	}
	return err
}

// needsHold: hooks have to run between creation and execution.
func (k *creation) needsHold() bool {
	return k.spec.Hooks != nil && len(k.spec.Hooks.StartContainer) > 0
}

func (k *creation) readSpec() (err error) {
	if k.o.Bundle, err = filepath.Abs(k.o.Bundle); err != nil {
		return err
	}
	if k.spec = k.o.Spec; k.spec == nil {
		k.spec, k.raw, err = spec.Read(filepath.Join(k.o.Bundle, configFile))
		return err
	}
	if k.raw = k.o.Raw; k.raw == nil {
		if k.raw, err = json.Marshal(k.spec); err != nil {
			return err
		}
	}
	return spec.Validate(k.spec)
}

func (k *creation) makeDir(id string) error {
	dir := filepath.Join(k.r.Root, id)
	var err error
	if k.begun == nil {
		err = os.Mkdir(dir, 0o711)
	}
	if errors.Is(err, os.ErrNotExist) {
		if err := os.MkdirAll(k.r.Root, 0o711); err != nil {
			return err
		}
		err = os.Mkdir(dir, 0o711)
	}
	if err != nil {
		if errors.Is(err, os.ErrExist) {
			return classed.Errorf(errdefs.ErrAlreadyExists, "container with given ID already exists: %s", id)
		}
		return err
	}
	k.undo.Add("the state directory", func(context.Context) error { return os.RemoveAll(dir) })
	if k.begun == nil || !bytes.Equal(k.raw, k.begun.Config) {
		if err := rawfile.Write(filepath.Join(dir, configFile), k.raw, 0o600); err != nil {
			return err
		}
	}
	rootfs := k.spec.Root.Path
	if !filepath.IsAbs(rootfs) {
		rootfs = filepath.Join(k.o.Bundle, rootfs)
	}
	k.c = &Container{r: k.r, dir: dir, state: state{
		Version: stateVersion, ID: id, OCIVersion: k.spec.Version, Bundle: k.o.Bundle, Rootfs: rootfs, Annotations: k.spec.Annotations,
		Created: time.Now().UTC(), Owner: os.Geteuid(), Rootless: os.Geteuid() != 0,
	}}
	k.c.keep(k.spec)
	return nil
}

func (k *creation) makeCgroup() (err error) {
	var mounts []byte
	if k.begun != nil {
		mounts = k.begun.Process.Mounts()
	}
	if k.layout, err = cgroup.DetectIn(mounts); err != nil {
		return err
	}
	if k.r.CgroupDriver == "systemd" {
		if err := k.makeUnit(); err != nil {
			return fmt.Errorf("container %s: %w", k.c.ID(), err)
		}
		return nil
	}
	path := k.spec.Linux.CgroupsPath
	if path == "" {
		path = k.c.ID()
	}
	create := k.layout.Begin
	if b := k.begun; b != nil {
		if b.Cgroup != k.layout.V2Dir(path) {
			b.Leave()
		}
		create = func(path string) (*cgroup.Cgroup, error) { return k.layout.BeginWith(path, b.Cgroup) }
	}
	if os.Geteuid() != 0 {
		create = k.layout.New // whether it can be made decides whether there is one
	}
	if k.cg, err = create(path); err != nil && os.Geteuid() != 0 && errors.Is(err, os.ErrPermission) {
		return k.withoutCgroup(err)
	}
	if err != nil {
		return err
	}
	k.undo.Add("the cgroup", func(context.Context) error { return k.cg.Delete() })
	k.c.state.Cgroups = k.cg.Paths()
	if k.begun != nil {
		k.undo.Add("the first process", func(context.Context) error { k.begun.Process.Kill(); return nil })
		if !k.begun.Process.InUserNamespace() { // there it may not make cgroups
			k.files = k.begun.Process.Files(k.cg.Later(), k.cg.DoorFiles())
		}
	}
	return nil
}

// openDoors gives what the child has opened, and does what it could not.
func (k *creation) openDoors() ([]int, error) {
	made, fds := k.files.Wait()
	k.cg.Adopt(made)
	err := k.cg.Complete()
	if err != nil || !slices.Contains(fds, -1) {
		return fds, err
	}
	rawfile.CloseAll(fds...)
	return k.doors()
}

// doors opens the ways into the v1 cgroups.
func (k *creation) doors() ([]int, error) {
	if err := k.cg.Complete(); err != nil {
		return nil, err
	}
	doors, err := k.cg.Doors()
	if err != nil {
		return nil, err
	}
	rawfile.CloseAll(doors.V2)
	return doors.FDs(), nil
}

func (k *creation) compile(id string) (*plan.Plan, error) {
	facts := probe(k.spec, k.o.Bundle, k.layout, k.c.state.Cgroups)
	for _, m := range k.o.Rootfs {
		if m.Type == "overlay" && plan.LongOptions(m.Options) {
			facts.LayerByLayer = longoverlay.LayerByLayer()
		}
	}
	return k.compileFor(id, facts)
}

func (k *creation) compileFor(id string, facts plan.Facts) (*plan.Plan, error) {
	o := plan.Options{
		ID: id, Bundle: k.o.Bundle, NoPivot: k.o.NoPivot, NoNewKeyring: k.o.NoNewKeyring, Hold: !k.o.run || k.needsHold(),
		Preserve: len(k.o.PreserveFDs), Hooks: k.setupHooks(),
	}
	for _, m := range k.o.Rootfs {
		o.Root = append(o.Root, plan.Mount{Type: m.Type, Source: m.Source, Options: m.Options, UIDMappings: m.UIDMappings, GIDMappings: m.GIDMappings})
	}
	switch {
	case k.r.CgroupDriver == "systemd":
	case k.cg != nil: // in the order in which they are opened
		for _, f := range k.cg.DoorFiles() {
			o.Doors = append(o.Doors, filepath.Dir(f))
		}
	default: // to be explained
		for _, h := range facts.Cgroup.Hierarchies {
			if !h.V2 {
				o.Doors = append(o.Doors, h.Name)
			}
		}
	}
	o.LateDoors = k.files == nil
	var err error
	if o.Filter, err = filter(k.spec); err != nil {
		return nil, err
	}
	return plan.Container(k.spec, facts, o)
}

func mountOverlay(o plan.Overlay) (*os.File, error) {
	return longoverlay.Overlay{Lower: o.Lower, Upper: o.Upper, Work: o.Work, Options: o.Options, Attr: o.Attr}.Mount()
}

func filter(s *specs.Spec) (plan.Filter, error) {
	if s.Linux == nil || s.Linux.Seccomp == nil {
		return plan.Filter{}, nil
	}
	f, err := seccomp.Compile(s.Linux.Seccomp, seccomp.Options{})
	if err == nil && f.Notify {
		err = checkListener(s.Linux.Seccomp)
	}
	return plan.Filter{Program: f.Program, Flags: uint32(f.Flags), Notify: f.Notify}, err
}

func (k *creation) setupHooks() bool {
	h := k.spec.Hooks
	return h != nil && len(h.Prestart)+len(h.CreateRuntime)+len(h.CreateContainer) > 0 //nolint:staticcheck // prestart is deprecated, not gone
}

func (k *creation) launch(p *plan.Plan) (err error) {
	cfg := launch.Config{
		Stdin: k.o.Stdin, Stdout: k.o.Stdout, Stderr: k.o.Stderr, Preserve: k.o.PreserveFDs, CgroupFD: -1, TimerSlack: k.r.TimerSlack,
		Overlay: mountOverlay, CopyUp: copyUp, IDMaps: func(pid int) error { return writeMaps(pid, k.spec.Linux) },
		Place: func(pid int) error { return k.place(pid, p) }, Hooks: k.runSetupHooks, Ready: k.ready,
		Listener: func(pid int, f *os.File) error {
			st := k.c.specState(Creating)
			st.Pid = pid
			return sendListener(k.spec.Linux.Seccomp, pid, st, f)
		},
	}
	if err := ownStdio(k.spec, k.spec.Process, k.o.Stdin, k.o.Stdout, k.o.Stderr); err != nil {
		return err
	}
	// The child is born in its v2 cgroup, and walks into the v1 ones, which are made
	// meanwhile, through files that it is handed.
	// Systemd moves it instead.
	if k.systemd == nil && k.cg != nil {
		if cfg.CgroupFD, err = k.cg.Birthplace(); err != nil {
			return err
		}
		defer rawfile.CloseAll(cfg.CgroupFD)
		if k.begun != nil {
			cfg.Early = &k.begun.Process
		}
		if k.files != nil {
			cfg.OpenDoors = k.openDoors
		}
		if k.files == nil {
			cfg.LateDoors = k.doors
		}
	}
	k.undo.Add("the systemd unit", k.undoUnit)
	if p.Hold {
		for name, f := range map[string]**os.File{startFifo: &cfg.Start, reportFifo: &cfg.Report} {
			if *f, err = makeFifo(filepath.Join(k.c.dir, name)); err != nil {
				return err
			}
			defer (*f).Close()
		}
	}
	if p.NewTime {
		cfg.TimeOffsets = plan.TimeOffsets(k.spec.Linux.TimeOffsets)
	}
	k.undo.Add("network devices", k.moveDevicesBack)
	proc, err := launch.Start(p, cfg)
	if err != nil {
		return err
	}
	k.undo.Add("the process", func(context.Context) error { proc.Kill(); return nil })
	k.proc = proc
	k.c.Console, k.c.PidFD = proc.Console, proc.PidFD
	return nil
}

// makeFifo makes a FIFO and opens it so that neither end ever blocks or is missing.
func makeFifo(path string) (*os.File, error) {
	if err := unix.Mkfifo(path, 0o622); err != nil {
		return nil, &os.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// place limits the new process. It goes on making mounts meanwhile.
func (k *creation) place(pid int, p *plan.Plan) error {
	if k.systemd != nil {
		if err := k.startUnit(pid); err != nil {
			return err
		}
	}
	if k.cg != nil {
		if err := k.cg.Complete(); err != nil {
			return err
		}
		if err := k.cg.Apply(k.resources()); err != nil {
			return err
		}
	}
	if k.c.state.Rdt != nil {
		if err := k.c.state.Rdt.Add(pid); err != nil {
			return err
		}
	}
	if err := k.moveDevices(pid); err != nil {
		return err
	}
	if p.OOMScoreAdj != nil {
		if err := setOOMScore(pid, *p.OOMScoreAdj); err != nil {
			return err
		}
	}
	return raiseLimits(pid, p.Rlimits)
}

// resources are those of the specification, with rules for devices if they can be: a
// plain user may load no filter, and cannot make devices either.
func (k *creation) resources() *specs.LinuxResources {
	r := k.spec.Linux.Resources
	if os.Geteuid() == 0 {
		return withDevices(r)
	}
	if r == nil {
		return nil
	}
	out := *r
	out.Devices = nil
	return &out
}

// withDevices adds the devices that every container may use. What no rule allows is
// denied, also where the specification has none.
func withDevices(r *specs.LinuxResources) *specs.LinuxResources {
	out := specs.LinuxResources{}
	if r != nil {
		out = *r
	}
	out.Devices = append(slices.Clip(out.Devices), cgroup.DefaultDevices()...)
	return &out
}

// setOOMScore changes how willingly the kernel kills the process. Lowering it needs a
// privilege; to ask for what is there already does not.
func setOOMScore(pid, score int) error {
	path := fmt.Sprintf("/proc/%d/oom_score_adj", pid)
	err := rawfile.Put(path, strconv.Itoa(score))
	if err == nil {
		return nil
	}
	if raw, rerr := os.ReadFile(path); rerr == nil && strings.TrimSpace(string(raw)) == strconv.Itoa(score) {
		return nil
	}
	return fmt.Errorf("set oom_score_adj to %d: %w", score, err)
}

// raiseLimits lifts hard limits that the child could not lift, because it may have
// given up the privilege. The limits themselves are set by the child at the end.
func raiseLimits(pid int, limits []plan.Rlimit) error {
	for _, l := range limits {
		var cur unix.Rlimit
		if err := unix.Prlimit(pid, l.Resource, nil, &cur); err != nil {
			return fmt.Errorf("read resource limit %d: %w", l.Resource, err)
		}
		if l.Hard <= cur.Max {
			continue
		}
		next := unix.Rlimit{Cur: cur.Cur, Max: l.Hard}
		if err := unix.Prlimit(pid, l.Resource, &next, nil); err != nil {
			return fmt.Errorf("raise hard resource limit %d from %d to %d: %w", l.Resource, cur.Max, l.Hard, err)
		}
	}
	return nil
}

// ready keeps what others need to find the container.
func (k *creation) ready(pid int) (err error) {
	k.c.state.Pid = pid
	if k.c.state.StartTime, _, err = startTime(pid); err != nil {
		return err
	}
	k.c.state.Usual = k.c.usual(k.spec)
	return k.c.writeState()
}

// CgroupV2 tells whether the machine has a single, unified cgroup hierarchy.
func CgroupV2() bool {
	l, err := cgroup.Detect()
	return err == nil && l.Mode == cgroup.V2
}
