package snapshot

import (
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// idmapping is how ids in a snapshot stand for ids of the host, in the form of the labels:
// CONTAINER:HOST:SIZE[,...].
type idmapping struct{ uids, gids string }

// mappingOf reads the labels that a client asks for mapped ids with; nil: it does not.
func mappingOf(labels map[string]string) (*idmapping, error) {
	m := idmapping{labels[snapshots.LabelSnapshotUIDMapping], labels[snapshots.LabelSnapshotGIDMapping]}
	if m == (idmapping{}) {
		return nil, nil
	}
	for label, text := range map[string]string{snapshots.LabelSnapshotUIDMapping: m.uids, snapshots.LabelSnapshotGIDMapping: m.gids} {
		if _, err := ParseIDMap(text); err != nil {
			return nil, fmt.Errorf("label %s=%q: %w", label, text, err)
		}
	}
	return &m, nil
}

// IDMap is a range of ids and what they are on the host.
type IDMap struct{ Container, Host, Size uint32 }

// ParseIDMap reads CONTAINER:HOST:SIZE[,...], the form of labels and mount options.
func ParseIDMap(text string) ([]IDMap, error) {
	var out []IDMap
	for r := range strings.SplitSeq(text, ",") {
		var n [3]uint32
		parts := strings.Split(r, ":")
		if len(parts) != len(n) {
			return nil, fmt.Errorf("id map %q: want CONTAINER:HOST:SIZE: %w", r, errdefs.ErrInvalidArgument)
		}
		for i, p := range parts {
			v, err := strconv.ParseUint(p, 10, 32)
			if err != nil {
				return nil, fmt.Errorf("id map %q: %w: %w", r, err, errdefs.ErrInvalidArgument)
			}
			n[i] = uint32(v)
		}
		if n[2] == 0 || n[0] > math.MaxUint32-n[2] || n[1] > math.MaxUint32-n[2] {
			return nil, fmt.Errorf("id map %q: no range of ids: %w", r, errdefs.ErrInvalidArgument)
		}
		out = append(out, IDMap{n[0], n[1], n[2]})
	}
	return out, nil
}

// hostID is what an id is on the host.
func hostID(text string, id uint32) (uint32, error) {
	list, err := ParseIDMap(text)
	if err != nil {
		return 0, err
	}
	for _, m := range list {
		if id >= m.Container && id-m.Container < m.Size {
			return m.Host + id - m.Container, nil
		}
	}
	return 0, fmt.Errorf("id %d is not in the map %s: %w", id, text, errdefs.ErrInvalidArgument)
}

// own gives the top layer's root directory to whom it belongs by the map: it is the one layer
// that is not mapped.
func (m *idmapping) own(l layer) error {
	var st unix.Stat_t
	if err := unix.Lstat(l.fs(), &st); err != nil {
		return &os.PathError{Op: "lstat", Path: l.fs(), Err: err}
	}
	uid, err := hostID(m.uids, st.Uid)
	if err != nil {
		return err
	}
	gid, err := hostID(m.gids, st.Gid)
	if err != nil {
		return err
	}
	if err := os.Lchown(l.fs(), int(uid), int(gid)); err != nil {
		return err
	}
	// After chown, which clears bits of the mode.
	if err := unix.Chmod(l.fs(), st.Mode&0o7777); err != nil {
		return &os.PathError{Op: "chmod", Path: l.fs(), Err: err}
	}
	return nil
}

// mapMounts asks whoever mounts for mapped lower layers, in containerd's words.
func mapMounts(ms []mount.Mount, labels map[string]string) []mount.Mount {
	m, err := mappingOf(labels)
	if m == nil || err != nil {
		return ms
	}
	for i := range ms {
		ms[i].Options = append(ms[i].Options, "uidmap="+m.uids, "gidmap="+m.gids)
	}
	return ms
}

// mapsLayers tells whether overlay takes layers whose ids are mapped: detached mounts, as
// descriptors (Linux 6.15).
func mapsLayers(dir string) bool {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return false
	}
	defer unix.Close(fs)
	fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return unix.FsconfigSetFd(fs, "lowerdir+", fd) == nil
}
