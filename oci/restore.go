//go:build linux && (amd64 || arm64)

package oci

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"github.com/checkpoint-restore/go-criu/v8/rpc"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/ownthread"
	"github.com/hako-engine/hako/internal/safepath"
	"github.com/hako-engine/hako/oci/criu"
	"github.com/hako-engine/hako/oci/internal/classed"
	"github.com/hako-engine/hako/oci/internal/rawfile"
	"github.com/hako-engine/hako/oci/plan"
)

// RestoreOptions says how to make a container of files that Checkpoint has written.
//
// The bundle says what the container may be, the images only what was in its memory:
// before the processes run for the first time they are compared with the bundle's
// configuration, and killed if they are more than that.
type RestoreOptions struct {
	// Bundle, Spec, Raw, Rootfs, standard input and output as for Create. The others are not
	// used: NoPivot, NoNewKeyring, PreserveFDs.
	CreateOptions
	CRIUOptions
	LSMProfile      string // KIND:LABEL instead of that of the configuration
	LSMMountContext string
	// Paused restores a container that does not run until it is resumed.
	Paused bool

	unverified bool // the control of the tests
}

// Restore makes a container that runs on where Checkpoint has stopped it. Its first
// process is a child of the caller, who has to reap it.
func (r *Runtime) Restore(ctx context.Context, id string, o RestoreOptions) (_ *Container, err error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	k := &restoration{creation: creation{r: r, o: o.CreateOptions, ctx: ctx}, o: o}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("restore container %q: %w", id, err), k.undo.Run(context.WithoutCancel(ctx)))
			if k.c != nil && k.c.Console != nil {
				k.c.Console.Close()
			}
			if k.c != nil && k.c.PidFD != nil {
				k.c.PidFD.Close()
			}
		}
		for _, f := range k.open {
			f.Close()
		}
		if err == nil && k.systemd != nil {
			k.systemd.Close()
		}
	}()
	if err := k.readSpec(); err != nil {
		return nil, err
	}
	opts, err := o.CRIUOptions.rpc(k.spec)
	if err != nil {
		return nil, err
	}
	if err := k.openImages(); err != nil {
		return nil, err
	}
	program, err := findCRIU(ctx, k.spec, o.CRIUOptions, false)
	if err != nil {
		return nil, err
	}
	if err := k.makeDir(id); err != nil {
		return nil, err
	}
	if err := k.makeCgroup(); err != nil {
		return nil, err
	}
	work, done, err := k.c.workDir(o.WorkPath)
	if err != nil {
		return nil, err
	}
	defer done()
	k.work = work
	opts.LogFile = new(restoreLog)
	// The newer way to restore mounts fails where mounts of several directories follow one
	// peer group of the host's.
	opts.RstSibling, opts.MntnsCompatMode = new(true), new(true)
	if k.spec.Process.Terminal {
		opts.OrphanPtsMaster = new(true)
	}
	if err := k.labels(opts); err != nil {
		return nil, err
	}
	files, err := k.inherit(opts)
	if err != nil {
		return nil, err
	}
	k.undo.Add("the systemd unit", k.undoUnit)
	k.undo.Add("the processes", k.kill)
	ownthread.Run(func() {
		k.r.setTimerSlack()
		err = k.converse(program, opts, files)
	})
	if err != nil {
		return nil, explainCRIU(err, work, restoreLog, o.WorkPath)
	}
	if fd, err := unix.PidfdOpen(k.c.Pid(), 0); err == nil {
		k.c.PidFD = os.NewFile(uintptr(fd), "pidfd")
	} else {
		return nil, fmt.Errorf("pidfd_open %d: %w", k.c.Pid(), err)
	}
	if err := k.c.poststart(ctx, k.spec); err != nil {
		return nil, err
	}
	os.Remove(filepath.Join(k.c.dir, "criu"))
	k.undo.Release()
	return k.c, nil
}

// restoration is a Restore on its way.
type restoration struct {
	creation
	o        RestoreOptions
	images   *os.File
	work     *os.File
	filter   []byte // the seccomp program, as the kernel has it
	open     []*os.File
	criu     int // its process
	root     unix.Stat_t
	verified bool
}

func (k *restoration) keepOpen(f *os.File) *os.File {
	k.open = append(k.open, f)
	return f
}

// openImages opens the images, and refuses those that could not have come of this
// configuration where CRIU would do harm with them, or could not be asked later.
func (k *restoration) openImages() error {
	f, err := criu.OpenImages(k.o.ImagePath)
	if err != nil {
		return err
	}
	k.images = k.keepOpen(f)
	if err := criu.CheckCgroups(f); err != nil {
		return err
	}
	p, err := filter(k.spec)
	if err != nil {
		return err
	}
	if len(p.Program) > 0 && !k.o.unverified {
		k.filter = unsafe.Slice((*byte)(unsafe.Pointer(&p.Program[0])), len(p.Program)*int(unsafe.Sizeof(p.Program[0])))
		return criu.CheckFilters(f, k.filter)
	}
	return nil
}

// labels asks for the labels of the configuration, whatever the images say.
func (k *restoration) labels(opts *rpc.CriuOpts) error {
	var f plan.Facts
	probeLabels(&f, k.spec.Process)
	profile := k.o.LSMProfile
	switch {
	case profile != "":
		if kind, label, ok := strings.Cut(profile, ":"); !ok || label == "" || kind != "apparmor" && kind != "selinux" {
			return classed.Errorf(errdefs.ErrInvalidArgument, "lsm-profile %q: it is apparmor:NAME or selinux:LABEL", profile)
		}
	case f.AppArmor:
		profile = "apparmor:" + k.spec.Process.ApparmorProfile
	case f.SELinux && k.spec.Process.SelinuxLabel != "":
		profile = "selinux:" + k.spec.Process.SelinuxLabel
	}
	if profile != "" {
		opts.LsmProfile = &profile
	}
	context := k.o.LSMMountContext
	if context == "" && k.spec.Linux.MountLabel != "" && selinux() {
		context = k.spec.Linux.MountLabel
	}
	if context != "" {
		opts.LsmMountContext = &context
	}
	return nil
}

// inherit lists what CRIU gets from outside: standard input and output, joined namespaces,
// and the host's side of mounts. All of it comes of the configuration; only the inodes of
// former pipes come of the images.
func (k *restoration) inherit(opts *rpc.CriuOpts) (files []*os.File, err error) {
	add := func(key string, f *os.File) {
		opts.InheritFd = append(opts.InheritFd, &rpc.InheritFd{Key: &key, Fd: new(int32(3 + len(files)))})
		files = append(files, f)
	}
	names, err := readDescriptors(k.images)
	if err != nil {
		return nil, err
	}
	if err := ownStdio(k.spec, k.spec.Process, k.o.Stdin, k.o.Stdout, k.o.Stderr); err != nil {
		return nil, err
	}
	given := map[string]bool{}
	for i, f := range []*os.File{k.o.Stdin, k.o.Stdout, k.o.Stderr} {
		if names[i] == "" || given[names[i]] {
			continue
		}
		given[names[i]] = true
		if f == nil {
			null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
			if err != nil {
				return nil, err
			}
			f = k.keepOpen(null)
		}
		add(names[i], f)
	}
	empty := slices.Contains(k.o.EmptyNamespaces, "network")
	for _, n := range k.spec.Linux.Namespaces {
		name := map[specs.LinuxNamespaceType]string{specs.NetworkNamespace: externalNetwork, specs.PIDNamespace: externalPID}[n.Type]
		if n.Path == "" || name == "" || empty && n.Type == specs.NetworkNamespace {
			continue
		}
		f, err := os.Open(n.Path)
		if err != nil {
			return nil, fmt.Errorf("%s namespace: %w", n.Type, err)
		}
		add(name, k.keepOpen(f))
	}
	opts.External = append(opts.External, "mnt["+externalNull+"]:"+os.DevNull)
	for _, h := range k.layout.Hierarchies {
		dir := k.c.state.Cgroups[""]
		if !h.V2 {
			dir = k.c.state.Cgroups[h.Controllers[0]]
		}
		if dir != "" {
			opts.External = append(opts.External, "mnt["+externalCgroup(h.Mount)+"]:"+dir)
		}
	}
	return files, nil
}

// converse runs CRIU, on a thread of its own with a mount table of its own: the host's
// shows nothing of the container.
func (k *restoration) converse(program string, opts *rpc.CriuOpts, files []*os.File) error {
	mounts, err := k.makeCopies()
	if err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return os.NewSyscallError("mount", err)
	}
	// CRIU makes mounts in its directories, so they have to be of this mount table.
	images, err := criu.Reopen(k.o.ImagePath, k.images)
	if err != nil {
		return err
	}
	defer images.Close()
	work, err := criu.Reopen(k.work.Name(), k.work)
	if err != nil {
		return err
	}
	defer work.Close()
	opts.ImagesDirFd, opts.WorkDirFd = new(int32(images.Fd())), new(int32(work.Fd()))
	if err := k.attach(mounts, opts); err != nil {
		return err
	}
	if err := joinShared(k.spec); err != nil {
		return err
	}
	talk, err := criu.Start(program, files)
	if err != nil {
		return err
	}
	defer talk.Close()
	k.criu = talk.Pid()
	if err := k.enter(opts); err != nil {
		return err
	}
	resp, err := talk.Do(k.ctx, &rpc.CriuReq{Type: new(rpc.CriuReqType_RESTORE), Opts: opts}, k.event)
	if err != nil {
		return err
	}
	if !k.verified || int(resp.GetRestore().GetPid()) != k.c.Pid() {
		return errors.New("CRIU did not let the processes be looked at before it resumed them")
	}
	return nil
}

// enter puts CRIU into the container's cgroups: what it makes is born there.
func (k *restoration) enter(opts *rpc.CriuOpts) error {
	if k.systemd != nil {
		if err := k.startUnit(k.criu); err != nil {
			return err
		}
	} else if err := k.cg.Add(k.criu); err != nil {
		return err
	}
	if err := k.cg.Apply(k.resources()); err != nil {
		return err
	}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", k.criu))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(raw)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		for _, name := range strings.Split(f[1], ",") {
			r := &rpc.CgroupRoot{Path: new(f[2])}
			if name != "" {
				r.Ctrl = new(strings.TrimPrefix(name, "name="))
			}
			opts.CgRoot = append(opts.CgRoot, r)
		}
	}
	return nil
}

// event is told by CRIU what it has come to.
func (k *restoration) event(e criu.Event) error {
	if e.File != nil {
		if e.Name != "orphan-pts-master" || k.c.Console != nil || !k.spec.Process.Terminal {
			e.File.Close()
		} else {
			k.c.Console = e.File
		}
	}
	if e.Pid > 0 && k.c.state.Pid == 0 {
		t, _, err := startTime(e.Pid)
		if err != nil {
			return err
		}
		k.c.state.Pid, k.c.state.StartTime = e.Pid, t
	}
	switch e.Name {
	case "setup-namespaces":
		return k.hooksOnHost()
	case "pre-resume":
		return k.beforeResume()
	}
	return nil
}

// hooksOnHost runs the hooks that prepare namespaces, as for a new container.
func (k *restoration) hooksOnHost() error {
	h := k.spec.Hooks
	if h == nil {
		return nil
	}
	st := k.c.specState(Created)
	for i := range h.Prestart { //nolint:staticcheck // deprecated, not gone
		if err := k.r.runHook(k.ctx, "prestart", i, h.Prestart[i], st, nil); err != nil { //nolint:staticcheck // deprecated, not gone
			return err
		}
	}
	for i := range h.CreateRuntime {
		if err := k.r.runHook(k.ctx, "createRuntime", i, h.CreateRuntime[i], st, nil); err != nil {
			return err
		}
	}
	return nil
}

// beforeResume is the last moment at which nothing of the images has run. CRIU goes on
// whatever it is answered, so processes that must not run are killed here.
func (k *restoration) beforeResume() (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, k.kill(k.ctx))
		}
	}()
	if k.c.state.Pid == 0 {
		return errors.New("CRIU has not told the pid")
	}
	if err := k.verify(); err != nil && !k.o.unverified {
		return classed.As(errdefs.ErrPermissionDenied, fmt.Errorf("the images do not fit the configuration: %w", err))
	}
	// CRIU may have written limits that the images had.
	if err := k.cg.Apply(k.resources()); err != nil {
		return err
	}
	if s := k.spec.Process.OOMScoreAdj; s != nil {
		if err := setOOMScore(k.c.Pid(), *s); err != nil {
			return err
		}
	}
	if k.o.Paused {
		if err := k.freeze(); err != nil {
			return err
		}
	}
	if err := k.c.writeState(); err != nil {
		return err
	}
	k.verified = true
	return nil
}

// freeze keeps the processes from running. CRIU has to run on, so it leaves.
func (k *restoration) freeze() error {
	for _, h := range k.layout.Hierarchies {
		if h.Own == "" {
			continue
		}
		file := filepath.Join(h.Mount, h.Own, "cgroup.procs")
		if err := rawfile.Put(file, strconv.Itoa(k.criu)); err != nil && h.V2 == (k.c.state.Cgroups["freezer"] == "") {
			return fmt.Errorf("move CRIU out of the container's cgroup: %w", err)
		}
	}
	return k.c.cgroup().Freeze()
}

// kill ends all restored processes, and CRIU with them.
func (k *restoration) kill(context.Context) error {
	var errs []error
	pid := k.c.Pid()
	if pid > 0 && alive(pid, k.c.state.StartTime) {
		for _, p := range append(descendants(pid), pid) {
			if err := unix.Kill(p, unix.SIGKILL); err != nil && err != unix.ESRCH {
				errs = append(errs, err)
			}
		}
	}
	if k.cg != nil {
		if err := k.cg.Kill(); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	if pid > 0 {
		// A child of ours: the caller never hears of it. One that is somebody else's is ECHILD.
		for {
			if _, err := unix.Wait4(pid, nil, 0, nil); err != unix.EINTR {
				break
			}
		}
	}
	return errors.Join(errs...)
}

// copies are mounts that are attached nowhere yet: the root file system, bottom first, and
// the bind mounts of the configuration. They are made in the host's mount namespace, so
// that they are in the same peer groups as those of a new container.
type copies struct {
	root  []*os.File
	binds map[int]*os.File // by the index in the configuration
}

func (k *restoration) makeCopies() (c copies, err error) {
	layers := k.o.Rootfs
	if len(layers) == 0 {
		layers = []specs.Mount{{Type: "bind", Source: k.c.state.Rootfs, Options: []string{"bind"}}}
	}
	for _, m := range layers {
		f, err := k.detached(m)
		if err != nil {
			return c, fmt.Errorf("root file system: %w", err)
		}
		c.root = append(c.root, f)
	}
	if p := k.spec.Linux.RootfsPropagation; strings.HasSuffix(p, "shared") {
		top := c.root[len(c.root)-1]
		for _, flag := range []uint64{unix.MS_PRIVATE, unix.MS_SHARED} {
			if err := unix.MountSetattr(int(top.Fd()), "", unix.AT_EMPTY_PATH, &unix.MountAttr{Propagation: flag}); err != nil {
				return c, fmt.Errorf("root file system: %w", os.NewSyscallError("mount_setattr", err))
			}
		}
	}
	c.binds = map[int]*os.File{}
	for i, m := range k.spec.Mounts {
		if !isBindMount(m) || remounts(m) {
			continue
		}
		m.Source = sourceOf(m, k.o.Bundle)
		if c.binds[i], err = k.detached(m); err != nil {
			return c, fmt.Errorf("mount %s: %w", m.Destination, err)
		}
	}
	return c, nil
}

// detached makes one mount, attached nowhere.
func (k *restoration) detached(m specs.Mount) (*os.File, error) {
	p, err := plan.ParseCopy(m, k.spec.Linux.RootfsPropagation)
	if err != nil {
		return nil, err
	}
	var f *os.File
	switch {
	case p.Bind:
		flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
		if p.Recursive {
			flags |= unix.AT_RECURSIVE
		}
		fd, err := unix.OpenTree(unix.AT_FDCWD, p.Source, flags)
		if err != nil {
			return nil, &os.PathError{Op: "open_tree", Path: p.Source, Err: err}
		}
		f = os.NewFile(uintptr(fd), p.Source)
	case m.Type == "overlay":
		if f, err = mountOverlay(p.Overlay); err != nil {
			return nil, err
		}
	default:
		return nil, classed.Errorf(errdefs.ErrNotImplemented, "restore mounts bind and overlay, not %s", m.Type)
	}
	k.keepOpen(f)
	for _, flag := range p.Propagation {
		at := uint(unix.AT_EMPTY_PATH)
		if flag&unix.MS_REC != 0 {
			at |= unix.AT_RECURSIVE
		}
		if err := unix.MountSetattr(int(f.Fd()), "", at, &unix.MountAttr{Propagation: flag &^ unix.MS_REC}); err != nil {
			return nil, os.NewSyscallError("mount_setattr", err)
		}
	}
	if p.Set|p.Clear != 0 {
		if err := unix.MountSetattr(int(f.Fd()), "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: p.Set, Attr_clr: p.Clear}); err != nil {
			return nil, os.NewSyscallError("mount_setattr", err)
		}
	}
	return f, nil
}

// attach shows the copies to CRIU, which takes paths, in this thread's mount table. Each
// is a mount of its own: CRIU takes the peer group of what it restores from it.
func (k *restoration) attach(c copies, opts *rpc.CriuOpts) error {
	base := filepath.Join(k.c.dir, "criu")
	if err := os.Mkdir(base, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", base, "tmpfs", 0, "mode=700"); err != nil {
		return os.NewSyscallError("mount", err)
	}
	move := func(f *os.File, to string) error {
		err := unix.MoveMount(int(f.Fd()), "", unix.AT_FDCWD, to, unix.MOVE_MOUNT_F_EMPTY_PATH)
		return os.NewSyscallError("move_mount", err)
	}
	dir := filepath.Join(base, "root")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for _, f := range c.root {
		if err := move(f, dir); err != nil {
			return fmt.Errorf("root file system: %w", err)
		}
	}
	opts.Root = &dir
	for i, f := range c.binds {
		name := externalMount(i)
		point := filepath.Join(base, name)
		st, err := f.Stat()
		if err != nil {
			return err
		}
		if st.IsDir() {
			err = os.Mkdir(point, 0o700)
		} else {
			err = os.WriteFile(point, nil, 0o600)
		}
		if err != nil {
			return err
		}
		if err := move(f, point); err != nil {
			return fmt.Errorf("mount %s: %w", k.spec.Mounts[i].Destination, err)
		}
		opts.External = append(opts.External, "mnt["+name+"]:"+point)
	}
	root, err := safepath.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := unix.Fstat(root.Fd(), &k.root); err != nil {
		return fmt.Errorf("root file system: %w", err)
	}
	if err := k.mountPoints(root); err != nil {
		return err
	}
	if k.spec.Root.Readonly {
		attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(root.Fd(), "", unix.AT_EMPTY_PATH, attr); err != nil {
			return fmt.Errorf("root file system: %w", os.NewSyscallError("mount_setattr", err))
		}
	}
	return nil
}

// mountPoints makes what is missing for mounts that lie directly in the root.
func (k *restoration) mountPoints(root *safepath.Root) error {
	var over []string
	for _, m := range k.spec.Mounts {
		dest := path.Clean("/" + m.Destination)
		if slices.ContainsFunc(over, func(o string) bool { return strings.HasPrefix(dest, o+"/") }) || remounts(m) {
			continue
		}
		over = append(over, dest)
		dir := true
		if isBindMount(m) {
			var st unix.Stat_t
			if err := unix.Stat(sourceOf(m, k.o.Bundle), &st); err != nil {
				return &os.PathError{Op: "stat", Path: sourceOf(m, k.o.Bundle), Err: err}
			}
			dir = st.Mode&unix.S_IFMT == unix.S_IFDIR
		}
		if err := makePoint(root, dest, dir); err != nil {
			return fmt.Errorf("mount point %s: %w", dest, err)
		}
	}
	return nil
}

func makePoint(root *safepath.Root, dest string, dir bool) error {
	name := dest
	if !dir {
		if f, err := root.Open(dest, unix.O_PATH, 0); err == nil {
			f.Close()
			return nil
		}
		name = path.Dir(dest)
	}
	f, err := root.MkdirAll(name, 0o755, nil)
	if err != nil {
		return err
	}
	defer f.Close()
	if dir {
		return nil
	}
	if err := unix.Mknodat(int(f.Fd()), path.Base(dest), unix.S_IFREG|0o755, 0); err != nil && err != unix.EEXIST {
		return &os.PathError{Op: "mknod", Path: dest, Err: err}
	}
	return nil
}
