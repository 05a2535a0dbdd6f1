//go:build linux && (amd64 || arm64)

package early

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/launch"
)

// Begun is what Run has made of a container that is to be created: its directory with the
// configuration, its v2 cgroup, and its first process, which makes namespaces while the Go
// runtime starts. The creation takes it over, or it is taken back (Discard).
var Begun Begin

// Begin is the beginning of a creation.
type Begin struct {
	Root, ID, Bundle string // as they were given
	Config           []byte // of the bundle, and what is in the directory
	Cgroup           string // the directory of the v2 cgroup, which was not there before; "" for none
	Process          launch.Early
	there            bool
}

// There tells whether there is one that was neither taken over nor taken back.
func (b *Begin) There() bool { return b.there }

// Take is for whoever takes it over.
func (b *Begin) Take() { b.there = false }

// Discard takes it back.
func (b *Begin) Discard() {
	if b.there {
		b.Take()
		b.Leave()
		_ = os.RemoveAll(b.Root + "/" + b.ID)
	}
}

// Leave ends the process and removes the cgroup, which turn out to be of no use.
func (b *Begin) Leave() {
	b.Process.Kill()
	if b.Cgroup != "" {
		_ = unix.Rmdir(b.Cgroup)
	}
	b.Cgroup = ""
}

// configRoom is what a configuration of usual size fits into.
var configRoom [128 << 10]byte

// cgroupRoom is the name of the cgroup.
var cgroupRoom path

// begin begins a creation, or does nothing: where it does not understand the configuration, or
// something is in the way, there is somebody later who knows what to say.
func (c *command) begin(b *Begin) {
	for fd := uintptr(0); fd < 3; fd++ {
		if int(call(unix.SYS_FCNTL, fd, unix.F_GETFD, 0, 0)) < 0 {
			return // what is opened next would take its place
		}
	}
	if call(unix.SYS_GETEUID, 0, 0, 0, 0) != 0 {
		return
	}
	var p path
	if !p.set(c.bundle, "/", ConfigFile) {
		return
	}
	// Nothing else than a file is waited for, see spec.Read.
	fd := int(int32(call(unix.SYS_OPENAT, here, p.ptr(), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)))
	if fd < 0 {
		return
	}
	n := -1
	if isFile(fd) {
		n = readAll(fd, configRoom[:])
	}
	closeFD(fd)
	if n <= 0 || n == len(configRoom) {
		return
	}
	b.Root, b.ID, b.Bundle, b.Config = c.root, c.id, c.bundle, configRoom[:n]
	s := wish{cgroup: c.id}
	if !s.parse(b.Config) || !b.findCgroup(s.cgroup) || !p.set(c.root, "/", c.id) {
		return
	}
	if call(unix.SYS_MKDIRAT, here, p.ptr(), 0o711, 0) != 0 {
		return
	}
	if b.fill(&p, s.flags) {
		b.there = true
		return
	}
	if p.set(c.root, "/", c.id, "/", ConfigFile) {
		call(unix.SYS_UNLINKAT, here, p.ptr(), 0, 0)
	}
	if p.set(c.root, "/", c.id) {
		call(unix.SYS_UNLINKAT, here, p.ptr(), unix.AT_REMOVEDIR, 0)
	}
}

// isFile tells whether a descriptor is one of a regular file.
func isFile(fd int) bool {
	var st unix.Statx_t
	empty := byte(0)
	_, _, e := syscall.RawSyscall6(unix.SYS_STATX, uintptr(fd), uintptr(unsafe.Pointer(&empty)), unix.AT_EMPTY_PATH, unix.STATX_TYPE, uintptr(unsafe.Pointer(&st)), 0)
	return e == 0 && st.Mode&unix.S_IFMT == unix.S_IFREG
}

// fill makes what is in the directory, and what the directory stands for.
func (b *Begin) fill(p *path, flags uint64) bool {
	if !p.set(b.Root, "/", b.ID, "/", ConfigFile) {
		return false
	}
	fd := call(unix.SYS_OPENAT, here, p.ptr(), unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if int(fd) < 0 {
		return false
	}
	n := call(unix.SYS_WRITE, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b.Config))), uintptr(len(b.Config)), 0)
	closeFD(int(fd))
	if n != uintptr(len(b.Config)) {
		return false
	}
	cgroup := -1
	if b.Cgroup != "" {
		if call(unix.SYS_MKDIRAT, here, cgroupRoom.ptr(), 0o755, 0) != 0 {
			return false
		}
		cgroup = int(int32(call(unix.SYS_OPENAT, here, cgroupRoom.ptr(), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)))
	}
	ok := (cgroup >= 0 || b.Cgroup == "") && b.Process.Hatch(flags, cgroup)
	closeFD(cgroup)
	if !ok && b.Cgroup != "" {
		call(unix.SYS_UNLINKAT, here, cgroupRoom.ptr(), unix.AT_REMOVEDIR, 0)
	}
	return ok
}

// findCgroup says where the v2 cgroup is to be, if the machine has v2 in one of the two usual
// places.
func (b *Begin) findCgroup(name string) bool {
	mount := "/sys/fs/cgroup"
	unified := isCgroup2(mount)
	if !unified {
		if mount = "/sys/fs/cgroup/unified"; !isCgroup2(mount) {
			return true
		}
	}
	own := ""
	if name[0] == '/' {
		name = name[1:]
	} else {
		var buf [4096]byte
		var p path
		p.set("/proc/self/cgroup")
		n := p.read(buf[:])
		if n <= 0 || n == len(buf) {
			return false
		}
		if own = ownCgroup(text(buf[:n])); own == "" {
			return false
		}
		if unified {
			// See cgroup.Layout.New.
			i := len(own) - 1
			for i > 0 && own[i] != '/' {
				i--
			}
			own = own[:i]
		}
		if own == "/" {
			own = ""
		}
	}
	if !plainPath(name) || own != "" && !plainPath(own[1:]) || !cgroupRoom.set(mount, own, "/", name) {
		return false
	}
	b.Cgroup = text(cgroupRoom.b[:cgroupRoom.n])
	return true
}

func isCgroup2(dir string) bool {
	var p path
	var st syscall.Statfs_t
	return p.set(dir) && call(unix.SYS_STATFS, p.ptr(), uintptr(unsafe.Pointer(&st)), 0, 0) == 0 && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// ownCgroup gives the v2 line of /proc/self/cgroup.
func ownCgroup(s string) string {
	for i := 0; i < len(s); i++ {
		if (i == 0 || s[i-1] == '\n') && begins(s[i:], "0::/") {
			s = s[i+3:]
			for j := 0; j < len(s); j++ {
				if s[j] == '\n' {
					return s[:j]
				}
			}
		}
	}
	return ""
}

// plainPath: a relative path of usual characters that is clean.
func plainPath(s string) bool {
	start := true
	for i := 0; i < len(s); i++ {
		switch b := s[i]; {
		case b == '/' || b == '.':
			if start {
				return false
			}
		case b >= 'a' && b <= 'z', b >= 'A' && b <= 'Z', b >= '0' && b <= '9', b == '_', b == '+', b == '-', b == ':', b == '@':
		default:
			return false
		}
		start = s[i] == '/'
	}
	return !start
}
