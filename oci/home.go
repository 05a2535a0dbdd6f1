//go:build linux && (amd64 || arm64)

package oci

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/longoverlay"
	"github.com/hako-engine/hako/internal/safepath"
	"github.com/hako-engine/hako/oci/plan"
)

// maxPasswd bounds what is read of a container's /etc/passwd.
const maxPasswd = 1 << 20

// withHome gives the environment with HOME in it, which callers of a runtime leave to it, or
// leave empty. root opens the container's root; it is that of an image, and never trusted.
func withHome(p *specs.Process, root func() (*os.File, error)) []string {
	if slices.ContainsFunc(p.Env, func(e string) bool { return strings.HasPrefix(e, "HOME=") && e != "HOME=" }) {
		return p.Env
	}
	env := slices.DeleteFunc(slices.Clone(p.Env), func(e string) bool { return e == "HOME=" })
	return append(env, "HOME="+home(root, p.User.UID))
}

// rootAt opens a directory as a root.
func rootAt(dir string) func() (*os.File, error) {
	return func() (*os.File, error) {
		return os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}
}

// mountedRoot opens the root that mounts are to make: as far as reading goes, before they
// are made.
func mountedRoot(mounts []specs.Mount, bundle string) (*os.File, error) {
	top := mounts[len(mounts)-1]
	if top.Type != "overlay" {
		if !filepath.IsAbs(top.Source) {
			top.Source = filepath.Join(bundle, top.Source)
		}
		return rootAt(top.Source)()
	}
	// Without the layer that is written to: only one mount may have that at a time. It is
	// read like the others.
	switch dirs := plan.Layers(top.Options); len(dirs) {
	case 0:
		return nil, os.ErrNotExist
	case 1:
		return rootAt(dirs[0])()
	default:
		return mountLayers(dirs)
	}
}

func mountLayers(dirs []string) (*os.File, error) {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsopen", err)
	}
	defer unix.Close(fs)
	for _, d := range dirs {
		if err = unix.FsconfigSetString(fs, "lowerdir+", d); err != nil {
			break
		}
	}
	if err == nil {
		err = unix.FsconfigCreate(fs)
	}
	if err == unix.EINVAL {
		// Before Linux 6.7 overlay does not know the option, and before 6.5 it says so only
		// when the file system is made.
		return longoverlay.Overlay{Lower: dirs}.Mount()
	}
	if err != nil {
		return nil, os.NewSyscallError("fsconfig", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsmount", err)
	}
	return os.NewFile(uintptr(fd), "layers"), nil
}

// home looks the user up in etc/passwd below root; "/" if it is not there.
func home(root func() (*os.File, error), uid uint32) string {
	const nowhere = "/"
	dir, err := root()
	if err != nil {
		return nowhere
	}
	r := safepath.NewRoot(dir)
	defer r.Close()
	raw, err := r.ReadFile("etc/passwd", maxPasswd)
	if err != nil {
		return nowhere
	}
	return homeIn(raw, uid)
}

// homeIn finds the home directory of a user in the text of a passwd(5).
func homeIn(passwd []byte, uid uint32) string {
	for line := range strings.Lines(string(passwd)) {
		f := strings.Split(strings.TrimRight(line, "\n"), ":")
		if len(f) < 6 || f[2] != strconv.FormatUint(uint64(uid), 10) {
			continue
		}
		if filepath.IsAbs(f[5]) && !strings.ContainsRune(f[5], 0) {
			return f[5]
		}
		break
	}
	return "/"
}

// procRoot is the root of a process as the host's /proc shows it.
func procRoot(pid int) string { return fmt.Sprintf("/proc/%d/root", pid) }
