//go:build linux && (amd64 || arm64)

package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/rpc"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/ownthread"
	"github.com/hako-engine/hako/oci/criu"
	"github.com/hako-engine/hako/oci/internal/classed"
)

// CRIUOptions are common to checkpoint and restore. They are CRIU's, see criu(8).
type CRIUOptions struct {
	// ImagePath is the directory of the images. Checkpoint makes it if it is missing.
	ImagePath string
	// WorkPath is the directory for CRIU's logs and statistics. Empty: they are gone with
	// the call, but for what its error quotes.
	WorkPath string
	// ParentPath, relative to ImagePath, is an earlier dump that this one builds on.
	ParentPath string

	TCPEstablished  bool // keep connections
	TCPSkipInFlight bool // leave out those that are being made
	TCPClose        bool // restore them closed
	ExtUnixSk       bool // sockets that lead out of the container
	ShellJob        bool // the session belongs to somebody outside
	FileLocks       bool
	LinkRemap       bool // files that have been unlinked, by a link beside them
	LazyPages       bool // memory is fetched when it is touched
	AutoDedup       bool // drop from earlier dumps what a later one has

	// ManageCgroups says what CRIU does about cgroups below the container's own: "soft"
	// (or ""), "full", "strict", "ignore".
	ManageCgroups string
	// EmptyNamespaces come back without what was in them. Only "network" can.
	EmptyNamespaces []string
}

// CheckpointOptions says how to write a container to files.
type CheckpointOptions struct {
	CRIUOptions
	LeaveRunning bool
	// PreDump writes the memory only, and lets the container run: a later dump with
	// ParentPath takes less time.
	PreDump    bool
	PageServer string // ADDRESS:PORT of a `criu page-server` that takes the memory
	// Ready gets a zero byte when a lazy dump waits for its pages to be fetched.
	Ready *os.File
}

const (
	dumpLog         = "dump.log"
	restoreLog      = "restore.log"
	descriptorsFile = "descriptors.json" // of standard input and output, as runc writes it
	criuWork        = "criu.work"
	maxDescriptors  = 64 << 10
	criuLogLevel    = 4
	// defaultCRIUConfig is where administrators have it for runc.
	defaultCRIUConfig = "/etc/criu/runc.conf"
)

// noNewPrivsVersion is the first CRIU that keeps no_new_privs.
const noNewPrivsVersion = 31900

// AnnotationCRIUConfig names a file of options for CRIU, on the host; empty: none.
const AnnotationCRIUConfig = "org.criu.config"

// Names of what CRIU gets from outside. They are the same for every container: what a
// configuration says never becomes part of one.
const (
	externalNull    = "hako-null"
	externalNetwork = "hako-net"
	externalPID     = "hako-pid"
)

func externalMount(i int) string         { return "hako-mount-" + strconv.Itoa(i) }
func externalCgroup(point string) string { return "hako-cgroup-" + path.Base(point) }

// Checkpoint writes the container's processes to files. They end then, unless they are
// to go on; the container is stopped, and is the caller's to delete. It needs root and
// CRIU: errdefs.ErrNotImplemented without.
func (c *Container) Checkpoint(ctx context.Context, o CheckpointOptions) error {
	unlock, err := c.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := c.checkpoint(ctx, o); err != nil {
		return fmt.Errorf("checkpoint container %q: %w", c.ID(), err)
	}
	return nil
}

func (c *Container) checkpoint(ctx context.Context, o CheckpointOptions) error {
	if err := c.require("container not running", Running, Paused); err != nil {
		return err
	}
	s, err := c.readSpec()
	if err != nil {
		return err
	}
	opts, err := o.CRIUOptions.rpc(s)
	if err != nil {
		return err
	}
	if o.PageServer != "" {
		if opts.Ps, err = pageServer(o.PageServer); err != nil {
			return err
		}
	}
	if filepath.IsAbs(o.ParentPath) {
		return classed.Errorf(errdefs.ErrInvalidArgument, "parent-path %q: it must be relative to image-path", o.ParentPath)
	}
	program, err := findCRIU(ctx, s, o.CRIUOptions, o.PreDump)
	if err != nil {
		return err
	}
	view, err := viewMounts(c.Pid())
	if err != nil {
		return err
	}
	defer view.close()
	if opts.External, err = c.externals(s, view); err != nil {
		return err
	}
	descriptors, external := standardDescriptors(c.Pid(), view)
	opts.External = append(opts.External, external...)

	images, err := criu.MakeImages(o.ImagePath)
	if err != nil {
		return err
	}
	defer images.Close()
	work, done, err := c.workDir(o.WorkPath)
	if err != nil {
		return err
	}
	defer done()
	if o.ParentPath != "" {
		if err := criu.CheckParent(images, o.ParentPath); err != nil {
			return err
		}
		opts.ParentImg = new(o.ParentPath)
	}
	raw, err := json.Marshal(descriptors)
	if err != nil {
		return err
	}
	if err := criu.WriteFile(images, descriptorsFile, raw); err != nil {
		return err
	}
	opts.ImagesDirFd, opts.WorkDirFd, opts.LogFile = new(int32(images.Fd())), new(int32(work.Fd())), new(dumpLog)
	opts.Pid = new(int32(c.Pid()))
	opts.LeaveRunning = new(o.LeaveRunning || o.PreDump)
	opts.TrackMem = new(o.PreDump)
	if s.Process.Terminal {
		opts.OrphanPtsMaster = new(true)
	}
	if dir := c.freezerDir(); dir != "" {
		opts.FreezeCgroup = &dir
	}
	kind := rpc.CriuReqType_DUMP
	if o.PreDump {
		kind = rpc.CriuReqType_PRE_DUMP
	}
	ownthread.Run(func() {
		c.r.setTimerSlack()
		if err = joinShared(s); err != nil {
			return
		}
		var talk *criu.Conversation
		if talk, err = criu.Start(program, nil); err != nil {
			return
		}
		defer talk.Close()
		_, err = talk.Do(ctx, &rpc.CriuReq{Type: &kind, Opts: opts}, func(e criu.Event) error {
			if e.File != nil {
				e.File.Close()
			}
			if e.Name == "status-ready" && o.Ready != nil {
				_, err := o.Ready.Write([]byte{0})
				return err
			}
			return nil
		})
	})
	return explainCRIU(err, work, dumpLog, o.WorkPath)
}

// rpc checks the options, and gives them in CRIU's form.
func (o CRIUOptions) rpc(s *specs.Spec) (*rpc.CriuOpts, error) {
	if os.Geteuid() != 0 {
		return nil, classed.Errorf(errdefs.ErrNotImplemented, "only root can checkpoint and restore")
	}
	if o.ImagePath == "" {
		return nil, classed.Errorf(errdefs.ErrInvalidArgument, "no directory for images is given")
	}
	modes := map[string]rpc.CriuCgMode{
		"": rpc.CriuCgMode_SOFT, "soft": rpc.CriuCgMode_SOFT, "full": rpc.CriuCgMode_FULL, "strict": rpc.CriuCgMode_STRICT, "ignore": rpc.CriuCgMode_IGNORE,
	}
	mode, ok := modes[o.ManageCgroups]
	if !ok {
		return nil, classed.Errorf(errdefs.ErrInvalidArgument, "manage-cgroups-mode %q: it is soft, full, strict or ignore", o.ManageCgroups)
	}
	if err := canCheckpoint(s); err != nil {
		return nil, err
	}
	out := &rpc.CriuOpts{
		LogLevel: new(int32(criuLogLevel)), NotifyScripts: new(true),
		TcpEstablished: &o.TCPEstablished, TcpSkipInFlight: &o.TCPSkipInFlight, TcpClose: &o.TCPClose,
		ExtUnixSk: &o.ExtUnixSk, ShellJob: &o.ShellJob, FileLocks: &o.FileLocks, LinkRemap: &o.LinkRemap,
		LazyPages: &o.LazyPages, AutoDedup: &o.AutoDedup,
		ManageCgroups: new(true), ManageCgroupsMode: &mode,
	}
	for _, n := range o.EmptyNamespaces {
		if n != "network" {
			return nil, classed.Errorf(errdefs.ErrInvalidArgument, "empty namespace %q: only network is supported", n)
		}
		out.EmptyNs = new(uint32(unix.CLONE_NEWNET))
	}
	config, err := criuConfig(s.Annotations)
	if config != "" {
		out.ConfigFile = &config
	}
	return out, err
}

// criuConfig gives the file of options for CRIU. It is believed, so it has to be root's.
func criuConfig(annotations map[string]string) (string, error) {
	file, ok := annotations[AnnotationCRIUConfig]
	if !ok {
		file = defaultCRIUConfig
	}
	if file == "" {
		return "", nil
	}
	if !filepath.IsAbs(file) {
		return "", classed.Errorf(errdefs.ErrInvalidArgument, "annotation %s: %q is not an absolute path", AnnotationCRIUConfig, file)
	}
	var st unix.Stat_t
	err := unix.Lstat(file, &st)
	if !ok && err == unix.ENOENT {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("configuration of CRIU: %w", &os.PathError{Op: "lstat", Path: file, Err: err})
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Uid != 0 || st.Mode&0o022 != 0 {
		return "", classed.Errorf(errdefs.ErrInvalidArgument, "configuration of CRIU: %s is no plain file that only root can write", file)
	}
	return file, nil
}

// canCheckpoint refuses by name what CRIU cannot do, or not in the way that the
// configuration asks for.
func canCheckpoint(s *specs.Spec) error {
	refuse := func(format string, a ...any) error {
		return classed.As(errdefs.ErrNotImplemented, fmt.Errorf("a container with "+format+" can neither be checkpointed nor restored", a...))
	}
	var mount bool
	for _, n := range s.Linux.Namespaces {
		switch n.Type {
		case specs.MountNamespace:
			mount = n.Path == ""
		case specs.UserNamespace:
			// Its /dev holds device nodes that the host's root has made: CRIU restores files as
			// the namespace's root, who cannot.
			return refuse("a user namespace")
		case specs.CgroupNamespace, specs.TimeNamespace:
			if n.Path != "" {
				return refuse("a joined %s namespace", n.Type)
			}
		}
	}
	if !mount {
		return refuse("no mount namespace of its own")
	}
	if s.Process == nil {
		return refuse("no process")
	}
	points := map[string]bool{}
	for _, m := range s.Mounts {
		if point := path.Clean("/" + m.Destination); !remounts(m) {
			if points[point] {
				return refuse("two mounts in one place (%s)", point)
			}
			points[point] = true
		}
		// A bracket ends the name of a mount in CRIU's options: what follows would be taken
		// for the directory on the host to mount (CVE-2026-119101).
		if strings.ContainsFunc(m.Destination, func(r rune) bool { return r == ']' || r < ' ' }) {
			return refuse("a bracket or control character in the name of a mount (%q)", m.Destination)
		}
		if len(m.UIDMappings) > 0 || strings.Contains(","+strings.Join(m.Options, ",")+",", "idmap,") {
			return refuse("a mount with mapped ids (%s)", m.Destination)
		}
	}
	if s.Linux.Seccomp != nil && s.Linux.Seccomp.ListenerPath != "" {
		return refuse("a seccomp agent")
	}
	if s.Linux.IntelRdt != nil {
		return refuse("linux.intelRdt")
	}
	return nil
}

// findCRIU finds a CRIU that can do what is asked for.
func findCRIU(ctx context.Context, s *specs.Spec, o CRIUOptions, preDump bool) (string, error) {
	program, err := criu.Path()
	if err != nil {
		return "", err
	}
	version, err := criu.Version(ctx, program)
	if err != nil {
		return "", err
	}
	if s.Process.NoNewPrivileges && version < noNewPrivsVersion {
		// The images would lack it, and what is restored would not be what was stopped.
		return "", classed.Errorf(errdefs.ErrNotImplemented, "CRIU before 3.19 does not keep process.noNewPrivileges")
	}
	if !preDump && !o.LazyPages {
		return program, nil
	}
	track, lazy, err := criu.Features(ctx, program)
	switch {
	case err != nil:
		return "", err
	case preDump && !track:
		return "", classed.Errorf(errdefs.ErrNotImplemented, "CRIU or the kernel cannot track memory, as --pre-dump needs")
	case o.LazyPages && !lazy:
		return "", classed.Errorf(errdefs.ErrNotImplemented, "CRIU or the kernel cannot do lazy pages")
	}
	return program, nil
}

// workDir opens the directory for logs. Without one it is in the state directory for as
// long as the call lasts.
func (c *Container) workDir(given string) (*os.File, func(), error) {
	dir, clean := given, func() {}
	if dir == "" {
		dir = filepath.Join(c.dir, criuWork)
		clean = func() { os.RemoveAll(dir) }
	}
	f, err := criu.MakeImages(dir)
	if err != nil {
		clean()
		return nil, nil, fmt.Errorf("directory for work: %w", err)
	}
	return f, func() { f.Close(); clean() }, nil
}

// explainCRIU adds what CRIU's log says.
func explainCRIU(err error, work *os.File, log, given string) error {
	if err == nil {
		return nil
	}
	if text := criu.LogErrors(work, log); text != "" {
		err = fmt.Errorf("%w: %s", err, text)
	}
	if given != "" {
		err = fmt.Errorf("%w (log: %s)", err, filepath.Join(given, log))
	}
	return err
}

// pageServer parses ADDRESS:PORT, with an IPv6 address in brackets.
func pageServer(s string) (*rpc.CriuPageServerInfo, error) {
	i := strings.LastIndexByte(s, ':')
	if i > 0 {
		host := strings.TrimSuffix(strings.TrimPrefix(s[:i], "["), "]")
		if port, err := strconv.ParseUint(s[i+1:], 10, 16); err == nil && port > 0 && host != "" {
			return &rpc.CriuPageServerInfo{Address: &host, Port: new(int32(port))}, nil
		}
	}
	return nil, classed.Errorf(errdefs.ErrInvalidArgument, "page server %q: it is ADDRESS:PORT", s)
}

// freezerDir is where CRIU stops all processes at once.
func (c *Container) freezerDir() string {
	if dir := c.state.Cgroups["freezer"]; dir != "" {
		return dir
	}
	if CgroupV2() {
		return c.state.Cgroups[""]
	}
	return ""
}

// externals lists what belongs to the world outside: mounts of the host's files, and
// namespaces that the container has joined.
func (c *Container) externals(s *specs.Spec, v *mountView) (out []string, err error) {
	claimed := map[int]bool{}
	add := func(e *mountEntry, name string) error {
		if strings.ContainsFunc(e.point, func(r rune) bool { return r == ']' || r < ' ' }) {
			return classed.Errorf(errdefs.ErrNotImplemented, "mount %q: CRIU has no way to name it", e.point)
		}
		if !claimed[e.id] {
			claimed[e.id] = true
			out = append(out, "mnt["+e.point+"]:"+name)
		}
		return nil
	}
	for i, m := range s.Mounts {
		if !isBindMount(m) || remounts(m) {
			continue
		}
		p, err := v.at(m.Destination)
		if err != nil {
			return nil, fmt.Errorf("mount %s: %w", m.Destination, err)
		}
		if !p.isRoot {
			return nil, classed.Errorf(errdefs.ErrFailedPrecondition, "mount %s: it is not there any more", m.Destination)
		}
		if err := add(p.entry, externalMount(i)); err != nil {
			return nil, err
		}
	}
	for _, name := range s.Linux.MaskedPaths {
		if p, err := v.at(name); err == nil && p.isRoot && isNull(&p.stat) {
			if err := add(p.entry, externalNull); err != nil {
				return nil, err
			}
		}
	}
	for i := range v.mounts {
		e := &v.mounts[i]
		if e.fstype == "cgroup" || e.fstype == "cgroup2" && !CgroupV2() {
			if err := add(e, externalCgroup(e.point)); err != nil {
				return nil, err
			}
		}
	}
	for i := range v.mounts {
		// What lies below a recursive bind mount came along with it.
		e := &v.mounts[i]
		if !claimed[e.id] && claimed[e.parent] && e.fstype != "cgroup" && !c.named(s, e) {
			return nil, classed.Errorf(errdefs.ErrNotImplemented, "mount %s: it lies below %s, and the configuration does not name it", e.point, v.byID[e.parent].point)
		}
	}
	for _, n := range s.Linux.Namespaces {
		name := map[specs.LinuxNamespaceType]string{specs.NetworkNamespace: externalNetwork, specs.PIDNamespace: externalPID}[n.Type]
		if n.Path == "" || name == "" {
			continue
		}
		file := namespaceFile(string(n.Type))
		var st unix.Stat_t
		if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/%s", c.Pid(), file), &st); err != nil {
			return nil, fmt.Errorf("%s namespace: %w", n.Type, err)
		}
		out = append(out, fmt.Sprintf("%s[%d]:%s", file, st.Ino, name))
	}
	return out, nil
}

// named tells whether the configuration itself has the mount.
func (c *Container) named(s *specs.Spec, e *mountEntry) bool {
	for _, m := range s.Mounts {
		if path.Clean("/"+m.Destination) == e.point {
			return true
		}
	}
	return false
}

// joinShared enters those namespaces that the container shares with others and that CRIU
// cannot be given: it takes what it is in itself for none of the container's.
func joinShared(s *specs.Spec) error {
	for _, n := range s.Linux.Namespaces {
		if n.Path == "" || n.Type != specs.UTSNamespace && n.Type != specs.IPCNamespace {
			continue
		}
		f, err := os.Open(n.Path)
		if err != nil {
			return fmt.Errorf("%s namespace: %w", n.Type, err)
		}
		err = unix.Setns(int(f.Fd()), map[specs.LinuxNamespaceType]int{specs.UTSNamespace: unix.CLONE_NEWUTS, specs.IPCNamespace: unix.CLONE_NEWIPC}[n.Type])
		f.Close()
		if err != nil {
			return fmt.Errorf("join %s namespace %s: %w", n.Type, n.Path, err)
		}
	}
	return nil
}

// inheritable tells whether name is what may be handed in for standard input or output: a
// pipe by its inode, or a file from outside by mount and inode. Nothing else that images
// say is taken.
func inheritable(name string) bool {
	if in, ok := strings.CutPrefix(name, "pipe:["); ok {
		in, ok = strings.CutSuffix(in, "]")
		_, err := strconv.ParseUint(in, 10, 64)
		return ok && err == nil
	}
	in, ok := strings.CutPrefix(name, "file[")
	in, ok2 := strings.CutSuffix(in, "]")
	id, inode, ok3 := strings.Cut(in, ":")
	_, err := strconv.ParseUint(id, 16, 32)
	_, err2 := strconv.ParseUint(inode, 16, 64)
	return ok && ok2 && ok3 && err == nil && err2 == nil
}

// standardDescriptors describes standard input, output and error, so that restore can
// replace them, and gives those that CRIU has to be told of.
func standardDescriptors(pid int, v *mountView) (out [3]string, external []string) {
	for i := range out {
		name := fmt.Sprintf("/proc/%d/fd/%d", pid, i)
		target, err := os.Readlink(name)
		if err != nil {
			continue
		}
		out[i] = target
		if !strings.HasPrefix(target, "/") {
			continue
		}
		var st unix.Stat_t
		id, ok := mountOf(fmt.Sprintf("/proc/%d/fdinfo/%d", pid, i))
		if !ok || v.byID[id] != nil || unix.Stat(name, &st) != nil {
			continue
		}
		out[i] = fmt.Sprintf("file[%x:%x]", id, st.Ino)
		external = append(external, out[i])
	}
	return out, external
}

// mountOf reads the mount id of a descriptor.
func mountOf(fdinfo string) (int, bool) {
	raw, err := os.ReadFile(fdinfo)
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(raw)) {
		if v, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			id, err := strconv.Atoi(strings.TrimSpace(v))
			return id, err == nil
		}
	}
	return 0, false
}

// readDescriptors gives the names of standard input, output and error in the images.
func readDescriptors(images *os.File) (out [3]string, err error) {
	raw, err := criu.ReadFile(images, descriptorsFile, maxDescriptors)
	if errors.Is(err, os.ErrNotExist) {
		return out, nil
	}
	if err != nil {
		return out, err
	}
	var list []string
	if err := json.Unmarshal(raw, &list); err != nil || len(list) > len(out) {
		return out, classed.Errorf(errdefs.ErrInvalidArgument, "%s: not the names of three descriptors", descriptorsFile)
	}
	for i, name := range list {
		if inheritable(name) {
			out[i] = name
		}
	}
	return out, nil
}
