package ociexec

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/safepath"
	"github.com/hako-engine/hako/shim"
)

// flags are the mount options that are flags (mount(8)); the others are data for
// the file system.
var flags = map[string]struct {
	clear bool
	flag  uintptr
}{
	"ro": {false, unix.MS_RDONLY}, "rw": {true, unix.MS_RDONLY},
	"nosuid": {false, unix.MS_NOSUID}, "suid": {true, unix.MS_NOSUID},
	"nodev": {false, unix.MS_NODEV}, "dev": {true, unix.MS_NODEV},
	"noexec": {false, unix.MS_NOEXEC}, "exec": {true, unix.MS_NOEXEC},
	"sync": {false, unix.MS_SYNCHRONOUS}, "async": {true, unix.MS_SYNCHRONOUS},
	"dirsync": {false, unix.MS_DIRSYNC},
	"noatime": {false, unix.MS_NOATIME}, "atime": {true, unix.MS_NOATIME},
	"nodiratime": {false, unix.MS_NODIRATIME}, "diratime": {true, unix.MS_NODIRATIME},
	"relatime": {false, unix.MS_RELATIME}, "norelatime": {true, unix.MS_RELATIME},
	"strictatime": {false, unix.MS_STRICTATIME},
	"bind":        {false, unix.MS_BIND}, "rbind": {false, unix.MS_BIND | unix.MS_REC},
	"defaults": {},
}

// mountAll mounts a root file system at a folder of the bundle, bottom first.
func mountAll(rootfs string, mounts []shim.Mount) error {
	if err := os.MkdirAll(rootfs, 0o711); err != nil {
		return err
	}
	for _, m := range mounts {
		if err := mountOne(rootfs, m); err != nil {
			return fmt.Errorf("mount %s %s on %s: %w", m.Type, m.Source, rootfs, err)
		}
	}
	return nil
}

func mountOne(rootfs string, m shim.Mount) error {
	target := rootfs
	if strings.Trim(m.Target, "/") != "" {
		// Inside the container's file system: by descriptor only.
		root, err := safepath.OpenRoot(rootfs)
		if err != nil {
			return err
		}
		defer root.Close()
		dir, err := root.Open(m.Target, unix.O_PATH, 0)
		if err != nil {
			return err
		}
		defer dir.Close()
		target = fmt.Sprintf("/proc/self/fd/%d", dir.Fd())
	}
	var fl uintptr
	var data []string
	for _, o := range m.Options {
		f, ok := flags[o]
		switch {
		case strings.HasPrefix(o, "uidmap=") || strings.HasPrefix(o, "gidmap="):
			return fmt.Errorf("option %s: ids are mapped for hako's own runtime only: %w", o, errdefs.ErrNotImplemented)
		case !ok:
			data = append(data, o)
		case f.clear:
			fl &^= f.flag
		default:
			fl |= f.flag
		}
	}
	typ := m.Type
	if typ == "bind" || fl&unix.MS_BIND != 0 {
		typ, fl = "", fl|unix.MS_BIND
	}
	if err := unix.Mount(m.Source, target, typ, fl, strings.Join(data, ",")); err != nil {
		return err
	}
	// A bind mount takes its flags only when it is remounted.
	if rest := fl &^ (unix.MS_BIND | unix.MS_REC); fl&unix.MS_BIND != 0 && rest != 0 {
		return unix.Mount("", target, "", rest|unix.MS_BIND|unix.MS_REMOUNT, "")
	}
	return nil
}

// unmountAll takes everything off a folder of the bundle.
func unmountAll(rootfs string) error {
	for {
		err := unix.Unmount(rootfs, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		switch {
		case err == nil:
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			return nil // nothing is mounted there
		default:
			return fmt.Errorf("unmount %s: %w", rootfs, err)
		}
	}
}
