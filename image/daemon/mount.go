package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/hako-engine/hako/image/manifest"
	"github.com/hako-engine/hako/image/transport"
	"github.com/hako-engine/hako/internal/erofs"
	"github.com/hako-engine/hako/internal/longoverlay"
)

// Labels of the views that mounts are made of. They say what is mounted where, also after
// the program that mounted it is gone.
const (
	labelDir   = "io.hako.mount.dir"
	labelImage = "io.hako.mount.image"
	labelID    = "io.hako.mount.id" // the kernel's, of the mount
	labelRoot  = "containerd.io/gc.root"

	viewPrefix = "hako-mount-"
)

// snapshotters in the order in which an image is looked for.
var snapshotters = []string{"overlayfs", "erofs", "native"}

// Mount is a folder where an image is mounted.
type Mount struct{ Image, Dir string }

func viewKey(dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return viewPrefix + hex.EncodeToString(sum[:10])
}

// Mount mounts an image's files at an empty folder, read-only. dir is absolute.
func (d *Daemon) Mount(ctx context.Context, name reference.Named, dir string) (err error) {
	conn, err := d.Conn()
	if err != nil {
		return fmt.Errorf("mounting goes through the daemon's containerd socket: %w", err)
	}
	fd, err := emptyDir(dir)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	chain, err := d.chain(ctx, name)
	if err != nil {
		return err
	}
	c := snapshotsapi.NewSnapshotsClient(conn)
	sn := ""
	for _, n := range snapshotters {
		if _, err := c.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: n, Key: chain}); err == nil {
			sn = n
			break
		} else if err = errgrpc.ToNative(err); !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) && !errdefs.IsFailedPrecondition(err) {
			return err
		}
	}
	if sn == "" {
		return fmt.Errorf("%s is here, but not unpacked: run 'hako pull %s': %w", reference.FamiliarString(name), reference.FamiliarString(name), errdefs.ErrFailedPrecondition)
	}
	key := viewKey(dir)
	res, err := c.View(ctx, &snapshotsapi.ViewSnapshotRequest{Snapshotter: sn, Key: key, Parent: chain, Labels: map[string]string{
		labelDir: dir, labelImage: name.String(), labelRoot: time.Now().UTC().Format(time.RFC3339)}})
	if err != nil {
		if err = errgrpc.ToNative(err); errdefs.IsAlreadyExists(err) {
			return fmt.Errorf("an image was mounted at %s: unmount it first (also after a restart of the machine): %w", dir, errdefs.ErrAlreadyExists)
		}
		return err
	}
	defer func() {
		if err != nil {
			_, rerr := c.Remove(context.WithoutCancel(ctx), &snapshotsapi.RemoveSnapshotRequest{Snapshotter: sn, Key: key})
			err = errors.Join(err, errgrpc.ToNative(rerr))
		}
	}()
	m, err := detached(res.GetMounts())
	if err != nil {
		return fmt.Errorf("mount %s: %w", reference.FamiliarString(name), err)
	}
	defer m.Close()
	id, err := mountID(int(m.Fd()))
	if err != nil {
		return err
	}
	if _, err := c.Update(ctx, &snapshotsapi.UpdateSnapshotRequest{Snapshotter: sn, Info: &snapshotsapi.Info{Name: key, Labels: map[string]string{labelID: strconv.FormatUint(id, 10)}}, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"labels." + labelID}}}); err != nil {
		return errgrpc.ToNative(err)
	}
	if err := unix.MoveMount(int(m.Fd()), "", fd, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "move_mount", Path: dir, Err: err}
	}
	return nil
}

// emptyDir opens a folder that something can be mounted at, and not a link to one.
func emptyDir(dir string) (int, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("fcntl", err)
	}
	f := os.NewFile(uintptr(dup), dir)
	defer f.Close()
	if _, err := f.Readdirnames(1); !errors.Is(err, io.EOF) {
		unix.Close(fd)
		if err == nil {
			err = fmt.Errorf("%s is not empty, and the image would hide what is in it; name an empty folder: %w", dir, errdefs.ErrFailedPrecondition)
		}
		return -1, err
	}
	return fd, nil
}

// chain gives the name of the snapshot with all layers of an image for this machine.
func (d *Daemon) chain(ctx context.Context, name reference.Named) (string, error) {
	s, err := d.store(ctx)
	if err != nil {
		return "", err
	}
	src := transport.OpenStore(s, name)
	desc, raw, err := src.Top(ctx)
	if err != nil {
		return "", err
	}
	doc, err := manifest.Parse(name.String(), desc.MediaType, raw)
	for depth := 0; err == nil && doc.Index != nil; depth++ {
		list := manifest.Candidates(doc.Index, platforms.Default())
		if len(list) == 0 || depth > 4 {
			return "", fmt.Errorf("%s: no image for this machine: %w", reference.FamiliarString(name), errdefs.ErrNotFound)
		}
		if raw, err = src.Document(ctx, list[0]); err == nil {
			doc, err = manifest.Parse(name.String(), list[0].MediaType, raw)
		}
	}
	if err != nil {
		return "", err
	}
	config, err := transport.ReadBlob(ctx, src, doc.Manifest.Config, manifest.MaxSize)
	if err != nil {
		return "", err
	}
	var img ocispec.Image
	if err := json.Unmarshal(config, &img); err != nil {
		return "", fmt.Errorf("config of %s: %w: %w", reference.FamiliarString(name), err, errdefs.ErrInvalidArgument)
	}
	if len(img.RootFS.DiffIDs) == 0 {
		return "", fmt.Errorf("%s has no layers: %w", reference.FamiliarString(name), errdefs.ErrFailedPrecondition)
	}
	return identity.ChainID(img.RootFS.DiffIDs).String(), nil
}

// protect is what a mount of strangers' files gets.
const protect = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV

// detached mounts what a snapshotter gave for a view, attached nowhere, read-only, without
// set-user-ID bits and devices.
func detached(mounts []*types.Mount) (*os.File, error) {
	if len(mounts) != 1 {
		return nil, fmt.Errorf("the snapshotter wants %d mounts: %w", len(mounts), errdefs.ErrNotImplemented)
	}
	m := mounts[0]
	var f *os.File
	var err error
	switch m.GetType() {
	case "bind":
		f, err = clone(m.GetSource())
	case "overlay":
		f, err = overlay(m.GetOptions())
	case "erofs":
		f, err = erofs.Mount(m.GetSource())
	default:
		err = fmt.Errorf("mounts of type %q: %w", m.GetType(), errdefs.ErrNotImplemented)
	}
	if err != nil {
		return nil, err
	}
	if err := unix.MountSetattr(int(f.Fd()), "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: protect}); err != nil {
		f.Close()
		return nil, os.NewSyscallError("mount_setattr", err)
	}
	return f, nil
}

func clone(dir string) (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, &os.PathError{Op: "open_tree", Path: dir, Err: err}
	}
	return os.NewFile(uintptr(fd), dir), nil
}

// overlay mounts layers without an upper one.
func overlay(options []string) (*os.File, error) {
	var lower, other []string
	for _, o := range options {
		key, value, _ := strings.Cut(o, "=")
		switch key {
		case "lowerdir":
			lower = strings.Split(value, ":")
		case "upperdir", "workdir":
			return nil, fmt.Errorf("a view with %s: %w", key, errdefs.ErrInvalidArgument)
		case "ro", "rw":
		case "index", "userxattr", "metacopy", "redirect_dir", "xino":
			other = append(other, o)
		default:
			return nil, fmt.Errorf("option %q of overlay: %w", o, errdefs.ErrNotImplemented)
		}
	}
	if !longoverlay.LayerByLayer() {
		return longoverlay.Overlay{Lower: lower, Options: other, Attr: protect}.Mount()
	}
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsopen", err)
	}
	defer unix.Close(fs)
	set := func(key, value string) {
		if err == nil && value == "" && key != "source" {
			if err = unix.FsconfigSetFlag(fs, key); err != nil {
				err = fmt.Errorf("overlay option %s: %w", key, err)
			}
		} else if err == nil {
			if err = unix.FsconfigSetString(fs, key, value); err != nil {
				err = fmt.Errorf("overlay option %s=%s: %w", key, value, err)
			}
		}
	}
	set("source", "hako-image")
	for _, l := range lower {
		set("lowerdir+", l)
	}
	for _, o := range other {
		key, value, _ := strings.Cut(o, "=")
		set(key, value)
	}
	if err != nil {
		return nil, err
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("overlay: %w", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, protect)
	if err != nil {
		return nil, os.NewSyscallError("fsmount", err)
	}
	return os.NewFile(uintptr(fd), "overlay"), nil
}

// mountID gives the kernel's number of the mount that a descriptor is in.
func mountID(fd int) (uint64, error) {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return 0, os.NewSyscallError("statx", err)
	}
	return st.Mnt_id, nil
}

// Unmount takes back what Mount did at a folder. What else is mounted there stays.
func (d *Daemon) Unmount(ctx context.Context, dir string) error {
	conn, err := d.Conn()
	if err != nil {
		return fmt.Errorf("mounting goes through the daemon's containerd socket: %w", err)
	}
	c := snapshotsapi.NewSnapshotsClient(conn)
	key := viewKey(dir)
	for _, sn := range snapshotters {
		res, err := c.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: sn, Key: key})
		if err != nil {
			if err = errgrpc.ToNative(err); errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) || errdefs.IsFailedPrecondition(err) {
				continue
			}
			return err
		}
		labels := res.GetInfo().GetLabels()
		if labels[labelDir] != dir {
			return fmt.Errorf("%s: the daemon's record says %s: %w", dir, labels[labelDir], errdefs.ErrFailedPrecondition)
		}
		if err := detach(dir, labels[labelID]); err != nil {
			return err
		}
		_, err = c.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: sn, Key: key})
		return errgrpc.ToNative(err)
	}
	return fmt.Errorf("no image is mounted at %s; 'hako image mount' lists those that are: %w", dir, errdefs.ErrNotFound)
}

// detach unmounts a folder if the mount is the one with the number.
func detach(dir, id string) error {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil // gone, with what was mounted there
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	var st unix.Statx_t
	err = unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st)
	unix.Close(fd)
	if err != nil {
		return os.NewSyscallError("statx", err)
	}
	root := st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
	switch {
	case !root:
		return nil // not mounted any more, after a restart of the machine
	case strconv.FormatUint(st.Mnt_id, 10) != id:
		return fmt.Errorf("something else is mounted at %s: %w", dir, errdefs.ErrFailedPrecondition)
	}
	if err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW); err != nil {
		return &os.PathError{Op: "umount", Path: dir, Err: err}
	}
	return nil
}

// Mounts lists what is mounted.
func (d *Daemon) Mounts(ctx context.Context) ([]Mount, error) {
	conn, err := d.Conn()
	if err != nil {
		return nil, fmt.Errorf("mounting goes through the daemon's containerd socket: %w", err)
	}
	var out []Mount
	for _, sn := range snapshotters {
		stream, err := snapshotsapi.NewSnapshotsClient(conn).List(ctx, &snapshotsapi.ListSnapshotsRequest{Snapshotter: sn, Filters: []string{`labels."` + labelDir + `"`}})
		for err == nil {
			var res *snapshotsapi.ListSnapshotsResponse
			if res, err = stream.Recv(); err != nil {
				break
			}
			for _, i := range res.GetInfo() {
				if dir := i.GetLabels()[labelDir]; dir != "" && strings.HasPrefix(i.GetName(), viewPrefix) {
					out = append(out, Mount{i.GetLabels()[labelImage], dir})
				}
			}
		}
		if err != nil && !errors.Is(err, io.EOF) {
			if err = errgrpc.ToNative(err); !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) && !errdefs.IsFailedPrecondition(err) {
				return nil, err
			}
		}
	}
	return out, nil
}
