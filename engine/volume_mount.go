//go:build linux

package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A volume with mount options (type, device, o) is a file system that is mounted on its
// _data while somebody uses it: from the start of the first container to the exit of the
// last, or for the time of a copy. Who uses it is not stored: after a restart the running
// containers are taken up as its users, and a mount that nobody uses is taken away.
//
// What is mounted there is not ours. No folder is removed before the kernel's table says
// that nothing is mounted in it.

// volumeMount is what is known of the mount of one volume.
type volumeMount struct {
	turn  chan struct{}   // holds a token while somebody mounts, unmounts or removes
	users map[string]bool // guarded by turn
}

// mountOf gives a volume's mount to the caller alone, until release is called.
func (e *Engine) mountOf(ctx context.Context, name string) (m *volumeMount, release func(), err error) {
	for {
		e.volumes.mu.Lock()
		m = e.volumes.mounts[name]
		if m == nil {
			m = &volumeMount{turn: make(chan struct{}, 1), users: map[string]bool{}}
			e.volumes.mounts[name] = m
		}
		e.volumes.mu.Unlock()
		select {
		case m.turn <- struct{}{}:
		case <-ctx.Done(): // a server of files that does not answer holds up only its volume
			return nil, nil, fmt.Errorf("wait for the mount of volume %s: %w", name, context.Cause(ctx))
		}
		e.volumes.mu.Lock()
		same := e.volumes.mounts[name] == m
		e.volumes.mu.Unlock()
		if same {
			return m, func() { <-m.turn }, nil
		}
		<-m.turn // that volume was removed meanwhile
	}
}

// mountOptions gives a volume's options: nil for one that is just a folder.
func (e *Engine) mountOptions(name string) map[string]string {
	e.volumes.mu.Lock()
	defer e.volumes.mu.Unlock()
	return e.volumes.all[name].Options
}

// holdVolume has a volume mounted, if that is what it is, until dropVolume is called for
// the same user.
func (e *Engine) holdVolume(ctx context.Context, name, user string) error {
	opts := e.mountOptions(name)
	if len(opts) == 0 {
		return nil
	}
	m, release, err := e.mountOf(ctx, name)
	if err != nil {
		return err
	}
	defer release()
	at := e.volumePath(name)
	mounted, err := mountsIn(at)
	if err != nil {
		return err
	}
	if !slices.Contains(mounted, realPath(at)) {
		if err := mountVolume(ctx, opts, at); err != nil {
			return invalidf("error while mounting volume '%s': failed to mount local volume: %v", at, err)
		}
	}
	m.users[user] = true
	return nil
}

// dropVolume ends a use, and with the last one the mount.
func (e *Engine) dropVolume(ctx context.Context, name, user string) error {
	if len(e.mountOptions(name)) == 0 {
		return nil
	}
	m, release, err := e.mountOf(ctx, name)
	if err != nil {
		return err
	}
	defer release()
	delete(m.users, user)
	if len(m.users) > 0 {
		return nil
	}
	return unmountVolume(e.volumePath(name))
}

// holdVolumes is holdVolume for all volumes of a container.
func (e *Engine) holdVolumes(ctx context.Context, mounts []Mount, user string) (drop func(context.Context) error, err error) {
	var held []string
	drop = func(ctx context.Context) error {
		var errs []error
		for _, name := range held {
			errs = append(errs, e.dropVolume(ctx, name, user))
		}
		return errors.Join(errs...)
	}
	for _, m := range mounts {
		if m.Kind != MountVolume {
			continue
		}
		if err := e.holdVolume(ctx, m.Source, user); err != nil {
			return func(context.Context) error { return nil }, errors.Join(err, drop(ctx))
		}
		held = append(held, m.Source)
	}
	return drop, nil
}

// dropVolumes ends the use that a container made of its volumes while it ran.
func (e *Engine) dropVolumes(ctx context.Context, v Container) {
	for _, m := range v.Mounts {
		if m.Kind != MountVolume {
			continue
		}
		if err := e.dropVolume(ctx, m.Source, v.ID); err != nil {
			e.log.Error("unmount volume", "volume", m.Source, "container", v.ID, "error", err)
		}
	}
}

// keepVolumes enters a container that an earlier daemon started as a user of its volumes.
func (e *Engine) keepVolumes(v Container) {
	for _, m := range v.Mounts {
		if m.Kind != MountVolume || len(e.mountOptions(m.Source)) == 0 {
			continue
		}
		if vm, release, err := e.mountOf(e.ctx, m.Source); err == nil {
			vm.users[v.ID] = true
			release()
		}
	}
}

// dropStrayMounts unmounts volumes that nobody uses: a daemon died between two steps.
func (e *Engine) dropStrayMounts(ctx context.Context) {
	e.volumes.mu.Lock()
	all := slices.Collect(maps.Keys(e.volumes.all))
	e.volumes.mu.Unlock()
	for _, name := range all {
		if err := e.dropVolume(ctx, name, ""); err != nil {
			e.log.Error("unmount volume", "volume", name, "error", err)
		}
	}
}

// UnmountVolumes unmounts all volumes of a root whose containers have ended.
func UnmountVolumes(root string) error {
	dir := filepath.Join(root, "volumes")
	list, err := mountsIn(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, at := range list {
		if filepath.Base(at) == "_data" && filepath.Dir(filepath.Dir(at)) == realPath(dir) {
			errs = append(errs, unmountVolume(at))
		}
	}
	return errors.Join(errs...)
}

// removeFiles removes the folder of a volume, if nothing is mounted in it.
func removeFiles(dir string) error {
	list, err := mountsIn(dir)
	if err == nil && len(list) > 0 {
		err = conflictf("%s is a mount point: what is mounted there is not removed", list[0])
	}
	if err != nil {
		return err
	}
	// The table of mounts is no single picture of them, so the folder itself is asked, too.
	var st unix.Statx_t
	err = unix.Statx(unix.AT_FDCWD, filepath.Join(dir, "_data"), unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st)
	if err == nil && st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		return conflictf("%s is a mount point: what is mounted there is not removed", filepath.Join(dir, "_data"))
	}
	// Nothing of it is followed: os.RemoveAll works with openat and does not cross links.
	return os.RemoveAll(dir)
}

// mountsIn gives the mount points at or below a folder, the innermost and last first.
func mountsIn(dir string) ([]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseMounts(string(b), realPath(dir)), nil
}

// parseMounts reads proc_pid_mountinfo(5).
func parseMounts(table, dir string) (list []string) {
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		at := unescapeMount(f[4])
		if at == dir || strings.HasPrefix(at, strings.TrimSuffix(dir, "/")+"/") {
			list = append(list, at)
		}
	}
	slices.Reverse(list)
	slices.SortStableFunc(list, func(a, b string) int { return strings.Count(b, "/") - strings.Count(a, "/") })
	return list
}

// unescapeMount resolves the octal escapes of the table: \040 is a space.
func unescapeMount(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// realPath is a path as the kernel's table shows it. The last element is a volume's own
// folder, or gone.
func realPath(p string) string {
	dir, err := filepath.EvalSymlinks(filepath.Dir(p))
	if err != nil {
		return filepath.Clean(p)
	}
	return filepath.Join(dir, filepath.Base(p))
}

// unmountVolume takes away what is mounted at a volume's folder. Lazily, as Docker does: a
// process that has a file open there keeps the file, not the folder.
func unmountVolume(at string) error {
	at = realPath(at)
	for range 64 { // mounts upon each other
		list, err := mountsIn(at)
		if err != nil {
			return err
		}
		if !slices.Contains(list, at) {
			return nil
		}
		if err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			return &os.PathError{Op: "umount", Path: at, Err: err}
		}
	}
	return fmt.Errorf("umount %s: it is still mounted", at)
}

// volumeFlags are the options of mount(8) that are flags of mount(2).
var volumeFlags = map[string]struct {
	clear bool
	flag  uintptr
}{
	"defaults": {}, "rw": {true, unix.MS_RDONLY}, "ro": {false, unix.MS_RDONLY},
	"suid": {true, unix.MS_NOSUID}, "nosuid": {false, unix.MS_NOSUID}, "dev": {true, unix.MS_NODEV}, "nodev": {false, unix.MS_NODEV},
	"exec": {true, unix.MS_NOEXEC}, "noexec": {false, unix.MS_NOEXEC}, "async": {true, unix.MS_SYNCHRONOUS}, "sync": {false, unix.MS_SYNCHRONOUS},
	"dirsync": {false, unix.MS_DIRSYNC}, "atime": {true, unix.MS_NOATIME}, "noatime": {false, unix.MS_NOATIME},
	"diratime": {true, unix.MS_NODIRATIME}, "nodiratime": {false, unix.MS_NODIRATIME}, "relatime": {false, unix.MS_RELATIME},
	"norelatime": {true, unix.MS_RELATIME}, "strictatime": {false, unix.MS_STRICTATIME}, "nostrictatime": {true, unix.MS_STRICTATIME},
	"mand": {false, unix.MS_MANDLOCK}, "nomand": {true, unix.MS_MANDLOCK},
	"bind": {false, unix.MS_BIND}, "rbind": {false, unix.MS_BIND | unix.MS_REC},
}

// volumePropagation are the options that take a call of their own.
var volumePropagation = map[string]uintptr{
	"private": unix.MS_PRIVATE, "rprivate": unix.MS_PRIVATE | unix.MS_REC, "slave": unix.MS_SLAVE, "rslave": unix.MS_SLAVE | unix.MS_REC,
	"shared": unix.MS_SHARED, "rshared": unix.MS_SHARED | unix.MS_REC, "unbindable": unix.MS_UNBINDABLE, "runbindable": unix.MS_UNBINDABLE | unix.MS_REC,
}

// volumeMountArgs are the arguments of mount(2) for a volume's options.
type volumeMountArgs struct {
	device, fsType string
	flags          uintptr
	propagation    []uintptr
	data           []string
}

func parseVolumeOptions(opts map[string]string) (a volumeMountArgs) {
	a.device, a.fsType = opts["device"], opts["type"]
	for o := range strings.SplitSeq(opts["o"], ",") {
		if f, ok := volumeFlags[o]; ok {
			if f.clear {
				a.flags &^= f.flag
			} else {
				a.flags |= f.flag
			}
		} else if p, ok := volumePropagation[o]; ok {
			a.propagation = append(a.propagation, p)
		} else if o != "" {
			a.data = append(a.data, o)
		}
	}
	return a
}

// checkVolumeOptions checks what needs no look at the host, in Docker's words.
func checkVolumeOptions(name string, opts map[string]string) error {
	for k, v := range opts {
		switch {
		case k == "size":
			return invalidf("create %s: quota size requested but no quota support", name)
		case k != "type" && k != "o" && k != "device":
			return invalidf("create %s: invalid option: %q", name, k)
		case strings.ContainsAny(v, "\x00\n"):
			return invalidf("create %s: invalid value of option %q", name, k)
		case len(v) > 4000: // mount(2) takes a page
			return invalidf("create %s: value of option %q is too long", name, k)
		}
	}
	if len(opts) == 0 {
		return nil
	}
	for _, k := range []string{"device", "type"} {
		if opts[k] == "" {
			return invalidf("create %s: missing required option: %q", name, k)
		}
	}
	if strings.Contains(","+opts["o"]+",", ",remount,") {
		return invalidf("create %s: mount option \"remount\" makes no volume", name)
	}
	return nil
}

// mountVolume mounts a volume on its folder.
func mountVolume(ctx context.Context, opts map[string]string, at string) error {
	a := parseVolumeOptions(opts)
	if err := resolveServer(ctx, &a); err != nil {
		return err
	}
	// The folder is reached by a descriptor: its own parent is closed to everybody else.
	dir, err := unix.Open(at, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: at, Err: err}
	}
	defer unix.Close(dir)
	target := fmt.Sprintf("/proc/self/fd/%d", dir)
	data := strings.Join(a.data, ",")
	fail := func(err error) error {
		with := ""
		if data != "" {
			with = ", data: " + data
		}
		return fmt.Errorf("mount %s:%s, flags: %#x%s: %w", a.device, at, a.flags, with, err)
	}
	if err := unix.Mount(a.device, target, a.fsType, a.flags, data); err != nil {
		return fail(err)
	}
	// From here on the descriptor is the folder below: what is mounted upon it is reached by
	// the path.
	more := a.propagation
	if a.flags&unix.MS_BIND != 0 && a.flags&^(unix.MS_BIND|unix.MS_REC) != 0 {
		more = append([]uintptr{a.flags | unix.MS_REMOUNT}, more...) // a bind ignores other flags at first
	}
	for _, flags := range more {
		if err := unix.Mount("", at, "", flags, ""); err != nil {
			return errors.Join(fail(err), unmountVolume(at))
		}
	}
	return nil
}

// resolveServer replaces the name of a server by its address: the kernel knows no names.
func resolveServer(ctx context.Context, a *volumeMountArgs) error {
	if !strings.HasPrefix(a.fsType, "nfs") && a.fsType != "cifs" {
		return nil
	}
	for i, o := range a.data {
		host, ok := strings.CutPrefix(o, "addr=")
		if !ok || net.ParseIP(host) != nil {
			continue
		}
		ips, err := net.DefaultResolver.LookupIPAddr(ctx, host)
		if err != nil {
			return fmt.Errorf("error resolving passed in network volume address: %w", err)
		}
		a.data[i] = "addr=" + ips[0].String()
	}
	return nil
}
