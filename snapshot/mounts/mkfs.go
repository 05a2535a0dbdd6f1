package mounts

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/safepath"
)

const (
	mkfsOption = "X-containerd.mkfs."
	// mkfsLimit is how long the making of a file system may take.
	mkfsLimit = 5 * time.Minute
	// mkfsLargest is the largest image, in bytes.
	mkfsLargest = 16 << 40
)

var (
	mkfsKinds = []string{"ext2", "ext3", "ext4", "xfs"}
	uuidForm  = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)
)

// imageSpec asks for a file with an empty file system in it.
type imageSpec struct {
	size     int64 // bytes
	kind     string
	uuid     string   // "": of the program's choice
	leftOver []string // options that are not about it
}

func parseImage(options []string) (s imageSpec, err error) {
	s.kind = "ext4"
	for _, o := range options {
		opt, ok := strings.CutPrefix(o, mkfsOption)
		if !ok {
			s.leftOver = append(s.leftOver, o)
			continue
		}
		key, value, _ := strings.Cut(opt, "=")
		bad := func() (imageSpec, error) { return s, fmt.Errorf("option %q: %w", o, errdefs.ErrInvalidArgument) }
		switch key {
		case "size":
			if s.size, err = units.RAMInBytes(value); err != nil || s.size <= 0 || s.size > mkfsLargest {
				return bad()
			}
		case "fs":
			if s.kind = value; !slices.Contains(mkfsKinds, value) {
				return bad()
			}
		case "uuid":
			if s.uuid = value; !uuidForm.MatchString(value) {
				return bad()
			}
		default:
			return bad()
		}
	}
	if s.size == 0 {
		return s, fmt.Errorf("a file system without %ssize: %w", mkfsOption, errdefs.ErrInvalidArgument)
	}
	return s, nil
}

// mkfs makes the file that is the mount's source, with an empty file system in it. One that is
// there stays as it is: it may be in use, or was for long.
func mkfs(ctx context.Context, m *mount.Mount, active []mount.ActiveMount) error {
	spec, err := parseImage(m.Options)
	if err != nil {
		return err
	}
	m.Options = spec.leftOver
	if !filepath.IsAbs(m.Source) || strings.HasSuffix(m.Source, "/") {
		return fmt.Errorf("%q is not the path of a file: %w", m.Source, errdefs.ErrInvalidArgument)
	}
	at, inside := below(filepath.Clean(m.Source), active)
	root, err := safepath.OpenRoot(at)
	if err != nil {
		return err
	}
	defer root.Close()
	dir, name, err := root.OpenParent(inside)
	if err != nil {
		return fmt.Errorf("make a file system in %s: %w", m.Source, err)
	}
	defer dir.Close()
	var st unix.Stat_t
	switch err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); {
	case err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG:
		return nil
	case err == nil:
		return fmt.Errorf("%s is no regular file: %w", m.Source, errdefs.ErrInvalidArgument)
	case !errors.Is(err, fs.ErrNotExist):
		return &fs.PathError{Op: "stat", Path: m.Source, Err: err}
	}
	if err := spec.make(ctx, dir, name); err != nil {
		return fmt.Errorf("make a file system in %s: %w", m.Source, err)
	}
	return nil
}

// make gives the file its name when it is whole.
func (s imageSpec) make(ctx context.Context, dir *os.File, name string) error {
	fd, err := unix.Openat(int(dir.Fd()), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &fs.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if err := f.Truncate(s.size); err != nil {
		return err
	}
	args := []string{"-q"}
	if s.kind != "xfs" {
		args = append(args, "-F") // it is no device
	}
	if s.uuid != "" {
		args = append(args, map[bool][]string{true: {"-m", "uuid=" + s.uuid}, false: {"-U", s.uuid}}[s.kind == "xfs"]...)
	}
	ctx, cancel := context.WithTimeout(ctx, mkfsLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "mkfs."+s.kind, append(args, "/proc/self/fd/3")...)
	cmd.ExtraFiles = []*os.File{f}
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Run(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return fmt.Errorf("mkfs.%s is not installed: %w", s.kind, errdefs.ErrNotImplemented)
		}
		return fmt.Errorf("mkfs.%s: %w: %.500s", s.kind, err, bytes.TrimSpace(said.Bytes()))
	}
	if err := f.Sync(); err != nil {
		return err
	}
	err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), int(dir.Fd()), name, unix.AT_SYMLINK_FOLLOW)
	if err != nil && !errors.Is(err, fs.ErrExist) { // somebody else made it meanwhile
		return &fs.PathError{Op: "link", Path: name, Err: err}
	}
	readable, err := safepath.Reopen(dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer readable.Close()
	return readable.Sync()
}
