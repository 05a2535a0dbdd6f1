package erofs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Magic is what statfs(2) tells of an EROFS file system.
const Magic = 0xe0f5e1e2

// Mount mounts the image in a file, and in those of its devices, read-only, and returns the root of the mount, which is
// attached nowhere. The kernel reads files themselves since Linux 6.12; before, an image without devices is
// mounted through a loop device, which goes away with the mount.
func Mount(image string, devices ...string) (*os.File, error) {
	f, err := mountSource(image, devices...)
	if (errors.Is(err, unix.ENOTBLK) || errors.Is(err, unix.EOPNOTSUPP)) && len(devices) == 0 {
		return MountLoop(image)
	}
	if err != nil {
		return nil, fmt.Errorf("mount EROFS image %s: %w", image, err)
	}
	return f, nil
}

func mountSource(source string, devices ...string) (*os.File, error) {
	made, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen: %w", err)
	}
	defer unix.Close(made)
	if err := unix.FsconfigSetString(made, "source", source); err != nil {
		return nil, fmt.Errorf("fsconfig source: %w", kernelSays(made, err))
	}
	for _, d := range devices {
		if err := unix.FsconfigSetString(made, "device", d); err != nil {
			return nil, fmt.Errorf("fsconfig device %s: %w", d, kernelSays(made, err))
		}
	}
	if err := unix.FsconfigSetFlag(made, "ro"); err != nil {
		return nil, fmt.Errorf("fsconfig ro: %w", kernelSays(made, err))
	}
	if err := unix.FsconfigCreate(made); err != nil {
		return nil, fmt.Errorf("fsconfig create: %w", kernelSays(made, err))
	}
	fd, err := unix.Fsmount(made, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("fsmount: %w", err)
	}
	return os.NewFile(uintptr(fd), source), nil
}

// MountLoop mounts an image without devices through a loop device that is cleared with its last use.
func MountLoop(image string, devices ...string) (*os.File, error) {
	if len(devices) > 0 {
		return nil, fmt.Errorf("mount EROFS image %s with devices: %w", image, errors.ErrUnsupported)
	}
	back, err := os.Open(image)
	if err != nil {
		return nil, err
	}
	defer back.Close()
	control, err := loopControl()
	if err != nil {
		return nil, fmt.Errorf("mount EROFS image %s: %w", image, err)
	}
	defer control.Close()
	for range 64 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("get a loop device: %w", err)
		}
		name := fmt.Sprintf("/dev/loop%d", n)
		dev, err := os.OpenFile(name, os.O_RDONLY, 0)
		if err != nil {
			return nil, fmt.Errorf("loop device: %w", err)
		}
		config := unix.LoopConfig{Fd: uint32(back.Fd()), Size: 0}
		config.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR
		copy(config.Info.File_name[:len(config.Info.File_name)-1], filepath.Base(image))
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &config)
		if errors.Is(err, unix.EBUSY) {
			dev.Close() // another was faster
			continue
		}
		if err != nil {
			dev.Close()
			return nil, fmt.Errorf("configure %s: %w", name, err)
		}
		m, err := mountSource(name)
		dev.Close()
		if err != nil {
			return nil, fmt.Errorf("mount EROFS image %s through %s: %w", image, name, err)
		}
		return m, nil
	}
	return nil, fmt.Errorf("mount EROFS image %s: no loop device is free", image)
}

// loopControl opens what gives out loop devices. Where the module is not loaded yet and nobody has made the node, it is made: opening it
// makes the kernel load the module.
func loopControl() (*os.File, error) {
	const name = "/dev/loop-control"
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	if err := unix.Mknod(name, unix.S_IFCHR|0o600, int(unix.Mkdev(10, 237))); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, &os.PathError{Op: "mknod", Path: name, Err: err}
	}
	return os.OpenFile(name, os.O_RDWR, 0)
}

// kernelSays adds the message that the kernel left in the file system context.
func kernelSays(fs int, err error) error {
	var buf [1024]byte
	n, rerr := unix.Read(fs, buf[:])
	if rerr != nil || n <= 0 {
		return err
	}
	return fmt.Errorf("%w (%s)", err, strings.TrimSpace(string(buf[:n])))
}

// Supported tries whether this kernel mounts an image that lies in dir, which must exist,
// and whether overlayfs stands on it, and tells why not.
func Supported(dir string) (err error) {
	tmp, err := os.MkdirTemp(dir, ".erofs-*")
	if err != nil {
		return fmt.Errorf("try EROFS: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	image := filepath.Join(tmp, "image")
	f, err := os.Create(image)
	if err != nil {
		return fmt.Errorf("try EROFS: %w", err)
	}
	defer f.Close()
	root := NewDir(0o755)
	root.Children["file"] = &Node{Mode: unix.S_IFREG | 0o644, Size: 4, Addr: DataStart}
	if _, err := f.WriteAt([]byte("data"), DataStart); err != nil {
		return fmt.Errorf("try EROFS: %w", err)
	}
	if _, _, err := Write(f, root, 2*DataStart); err != nil {
		return fmt.Errorf("try EROFS: %w", err)
	}
	m, err := Mount(image)
	if err != nil {
		return fmt.Errorf("try EROFS: %w", err)
	}
	defer m.Close()
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d/file", m.Fd()))
	if err == nil && string(b) != "data" {
		err = fmt.Errorf("a file has %q in it", b)
	}
	if err != nil {
		return fmt.Errorf("try EROFS: %w", err)
	}
	return nil
}
