//go:build linux && (amd64 || arm64)

package oci

import (
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/safepath"
	"github.com/hako-engine/hako/oci/internal/rawfile"
)

// mountEntry is one line of mountinfo (proc_pid_mountinfo(5)).
type mountEntry struct {
	id, parent int
	device     string // major:minor
	root       string // in the file system
	point      string // in the mount namespace
	fstype     string
}

// mountView is the mounts of a process, and its root to look names up in.
type mountView struct {
	pid    int
	root   *safepath.Root
	mounts []mountEntry
	byID   map[int]*mountEntry
}

// maxMountinfo bounds what is read of a process's mountinfo.
const maxMountinfo = 32 << 20

func viewMounts(pid int) (*mountView, error) {
	raw, err := rawfile.Read(fmt.Sprintf("/proc/%d/mountinfo", pid), 16<<10, maxMountinfo)
	if err != nil {
		return nil, err
	}
	v := &mountView{pid: pid, byID: map[int]*mountEntry{}}
	if v.mounts, err = parseMountinfo(string(raw)); err != nil {
		return nil, err
	}
	for i := range v.mounts {
		v.byID[v.mounts[i].id] = &v.mounts[i]
	}
	v.root, err = safepath.OpenRoot(procRoot(pid))
	return v, err
}

func (v *mountView) close() { v.root.Close() }

func parseMountinfo(text string) (out []mountEntry, err error) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		sep := 6
		for sep < len(f) && f[sep] != "-" {
			sep++
		}
		if sep+1 >= len(f) {
			return nil, fmt.Errorf("mountinfo: %.80q", line)
		}
		e := mountEntry{device: f[2], root: unescapeMount(f[3]), point: unescapeMount(f[4]), fstype: f[sep+1]}
		var err1, err2 error
		e.id, err1 = strconv.Atoi(f[0])
		e.parent, err2 = strconv.Atoi(f[1])
		if err1 != nil || err2 != nil {
			return nil, fmt.Errorf("mountinfo: %.80q", line)
		}
		out = append(out, e)
	}
	return out, nil
}

// unescapeMount undoes the octal escapes of mountinfo.
func unescapeMount(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// place is what a name in the container leads to.
type place struct {
	entry  *mountEntry // the mount that it lies on
	isRoot bool        // it is that mount's root
	stat   unix.Stat_t
	fs     unix.Statfs_t
}

// at looks a name up as a process of the container would, without leaving its root.
func (v *mountView) at(name string) (*place, error) {
	f, err := v.root.Open(name, unix.O_PATH, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p := new(place)
	if err := unix.Fstat(int(f.Fd()), &p.stat); err != nil {
		return nil, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if err := unix.Fstatfs(int(f.Fd()), &p.fs); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: name, Err: err}
	}
	var stx unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &stx); err != nil {
		return nil, &os.PathError{Op: "statx", Path: name, Err: err}
	}
	p.isRoot = stx.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
	p.entry = v.byID[int(stx.Mnt_id)]
	if p.entry == nil || stx.Mask&unix.STATX_MNT_ID == 0 {
		return nil, fmt.Errorf("%s: no mount of process %d", name, v.pid)
	}
	return p, nil
}

func isBindMount(m specs.Mount) bool { return m.Type == "bind" || isBind(m.Options) }

// remounts tells whether m only changes an earlier mount.
func remounts(m specs.Mount) bool {
	for _, o := range m.Options {
		if o == "remount" {
			return true
		}
	}
	return false
}

// sourceOf gives the host path of a bind mount.
func sourceOf(m specs.Mount, bundle string) string {
	if path.IsAbs(m.Source) {
		return path.Clean(m.Source)
	}
	return path.Join(bundle, m.Source)
}

// isNull tells whether st is the null device.
func isNull(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3)
}
