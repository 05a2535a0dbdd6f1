package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/hako-engine/hako/store"
)

// Problems that Check finds.
const (
	ProblemRecord = "record-damaged"
	ProblemParent = "parent-missing"
	ProblemIndex  = "index-wrong"
	ProblemShared = "directory-shared"
	ProblemLost   = "directory-missing"
	ProblemUsage  = "files-missing"
	ProblemImage  = "image-damaged"
	ProblemOrphan = "directory-orphan"
	ProblemStray  = "file-stray"
	ProblemMerged = "merged-damaged"
)

const room = "snapshot"

// settleTime is how long what is being made or removed may take to be whole.
const settleTime = 500 * time.Millisecond

// InspectMounts is where Inspect mounts EROFS images: apart from those of a daemon, which
// containers may still stand upon.
func InspectMounts(root string) string { return filepath.Join(root, "mounts") }

// Inspect opens a snapshotter without touching what a crash left, for Check to see it as
// it is: "overlayfs", "erofs" or "native".
func Inspect(name, root string, s *store.Store) (*Snapshotter, error) {
	var d driver
	switch name {
	case "overlayfs":
		d = overlay{options: layerOptions()}
	case "erofs":
		d = newImages(InspectMounts(root), ErofsOptions{})
	case "native":
		d = native{}
	default:
		return nil, fmt.Errorf("snapshotter %q: %w", name, errdefs.ErrNotFound)
	}
	return begin(name, root, s, d, func(sn *Snapshotter) error {
		last := uint64(0)
		entries, err := os.ReadDir(sn.dir())
		if err != nil {
			return err
		}
		for _, e := range entries {
			if id, err := strconv.ParseUint(strings.TrimPrefix(e.Name(), unbornPrefix), 10, 64); err == nil {
				last = max(last, id)
			}
		}
		return s.DB().View(context.Background(), func(tx *bolt.Tx) error {
			ids, _, err := sn.known(tx)
			for id := range ids {
				last = max(last, id)
			}
			sn.nextID.Store(last)
			return err
		})
	})
}

// Check compares records and directories. It changes nothing, and runs beside all other
// work: what looks wrong must look so twice.
func (sn *Snapshotter) Check(ctx context.Context, o store.CheckOptions) ([]store.Finding, error) {
	found, err := sn.check(ctx, o)
	if err != nil || len(found) == 0 {
		return found, wrap(err, "check snapshots")
	}
	select {
	case <-time.After(settleTime):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	first := map[string]bool{}
	for _, f := range found {
		first[f.Key()] = true
	}
	again, err := sn.check(ctx, o)
	found = found[:0]
	for _, f := range again {
		if first[f.Key()] {
			found = append(found, f)
		}
	}
	return found, wrap(err, "check snapshots")
}

func (sn *Snapshotter) finding(problem string, s store.Severity, ns, object, format string, args ...any) store.Finding {
	return store.Finding{Room: room, Problem: problem, Severity: s, Namespace: ns, Object: sn.name + " " + object, Detail: fmt.Sprintf(format, args...)}
}

// layerOf is a directory that a record names.
type layerOf struct {
	ns, key string
	r       record
}

func (sn *Snapshotter) check(ctx context.Context, o store.CheckOptions) (found []store.Finding, err error) {
	// Directories before records: one that is made meanwhile is in neither list.
	entries, err := os.ReadDir(sn.dir())
	if err != nil {
		return nil, err
	}
	sn.mu.Lock()
	passing := map[uint64]bool{} // being made or removed
	for id := range sn.fresh {
		passing[id] = true
	}
	for _, id := range sn.doomed {
		passing[id] = true
	}
	sn.mu.Unlock()
	byID := map[uint64]layerOf{}
	damaged := false
	err = sn.store.DB().View(ctx, func(tx *bolt.Tx) error {
		return store.EachNamespace(tx, func(ns string) error {
			s := sn.section(tx, ns)
			found = append(found, sn.checkIndex(s)...)
			return s.each(func(key string, r record, err error) error {
				if err != nil {
					damaged = true
					found = append(found, sn.finding(ProblemRecord, store.Damage, ns, key, "%v", err))
					return nil
				}
				if r.Parent != "" {
					p, err := s.get(r.Parent)
					if err == nil && p.kind() != snapshots.KindCommitted {
						err = errors.New("it is not committed")
					}
					if err != nil {
						found = append(found, sn.finding(ProblemParent, store.Damage, ns, key, "its parent %s: %v", r.Parent, err))
					}
				}
				if r.ID == 0 {
					return nil
				}
				if other, ok := byID[r.ID]; ok {
					found = append(found, sn.finding(ProblemShared, store.Damage, ns, key, "directory %d is also that of %q of namespace %s", r.ID, other.key, other.ns))
				}
				byID[r.ID] = layerOf{ns, key, r}
				return nil
			})
		})
	})
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		id, err := strconv.ParseUint(e.Name(), 10, 64)
		_, named := byID[id]
		if unborn, uerr := strconv.ParseUint(strings.TrimPrefix(e.Name(), unbornPrefix), 10, 64); err != nil && uerr == nil && passing[unborn] {
			continue
		}
		switch {
		case err != nil || !e.IsDir() || strconv.FormatUint(id, 10) != e.Name():
			found = append(found, sn.finding(ProblemStray, store.Leftover, "", e.Name(), "hako makes no file of this name in %s", sn.dir()))
		case !named && !passing[id] && !damaged:
			found = append(found, sn.finding(ProblemOrphan, store.Leftover, "", e.Name(), "no snapshot has the directory %s", sn.layer(id)))
		}
	}
	done := int64(0)
	for id, l := range byID {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		o.Report("looking at snapshots", done, int64(len(byID)))
		done++
		f, bad := sn.checkLayer(ctx, id, l, o)
		if !bad {
			f, bad = sn.checkMerged(ctx, id, l, o)
		}
		if bad {
			found = append(found, f)
		}
	}
	return found, nil
}

// checkLayer looks at a snapshot's directory.
func (sn *Snapshotter) checkLayer(ctx context.Context, id uint64, l layerOf, o store.CheckOptions) (store.Finding, bool) {
	dir := sn.layer(id)
	want := []string{dir.fs()}
	_, isOverlay := sn.driver.(overlay)
	_, isImage := sn.driver.(*images)
	if isImage && l.r.kind() == snapshots.KindCommitted {
		return sn.checkImage(dir.image(), l, o)
	}
	if (isOverlay || isImage) && l.r.kind() == snapshots.KindActive {
		want = append(want, dir.work())
	}
	for _, d := range want {
		st, err := os.Lstat(d)
		if err == nil && !st.IsDir() {
			err = errors.New("it is no directory")
		}
		if err != nil {
			return sn.finding(ProblemLost, store.Damage, l.ns, l.key, "its directory: %v", err), true
		}
	}
	// Only the files that a layer had when it was committed are known by number.
	if !o.Deep || l.r.kind() != snapshots.KindCommitted {
		return store.Finding{}, false
	}
	u, err := DiskUsage(ctx, dir.fs())
	switch {
	case ctx.Err() != nil:
	case err != nil:
		return sn.finding(ProblemUsage, store.Damage, l.ns, l.key, "its files cannot be read: %v", err), true
	case u.Inodes < l.r.Inodes:
		return sn.finding(ProblemUsage, store.Damage, l.ns, l.key, "it has %d files, had %d when it was committed", u.Inodes, l.r.Inodes), true
	case u.Size < l.r.Size-max(l.r.Size/4, 1<<20):
		return sn.finding(ProblemUsage, store.Damage, l.ns, l.key, "its files take %d bytes, took %d when it was committed", u.Size, l.r.Size), true
	}
	return store.Finding{}, false
}

// checkImage looks at a committed layer's file.
func (sn *Snapshotter) checkImage(name string, l layerOf, o store.CheckOptions) (store.Finding, bool) {
	st, err := os.Lstat(name)
	if err == nil && !st.Mode().IsRegular() {
		err = errors.New("it is no file")
	}
	if err != nil {
		return sn.finding(ProblemLost, store.Damage, l.ns, l.key, "its image: %v", err), true
	}
	if !o.Deep {
		return store.Finding{}, false
	}
	if err := verifyImage(name, l.r.Inodes); err != nil {
		return sn.finding(ProblemImage, store.Damage, l.ns, l.key, "its image: %v", err), true
	}
	return store.Finding{}, false
}

// checkMerged looks at what is kept beside a layer to save time.
func (sn *Snapshotter) checkMerged(ctx context.Context, id uint64, l layerOf, o store.CheckOptions) (store.Finding, bool) {
	if _, ok := sn.driver.(*images); !ok || !o.Deep || l.r.kind() != snapshots.KindCommitted {
		return store.Finding{}, false
	}
	var chain []layer
	err := sn.store.DB().View(ctx, func(tx *bolt.Tx) (err error) {
		chain, err = sn.chain(sn.section(tx, l.ns), l.key)
		return err
	})
	if err != nil || chain[0] != sn.layer(id) { // removed meanwhile, or damage that is found elsewhere
		return store.Finding{}, false
	}
	if err := verifyMerged(chain); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return sn.finding(ProblemMerged, store.Leftover, l.ns, l.key, "%v", err), true
	}
	return store.Finding{}, false
}

// checkIndex compares the list of children with the records' parents.
func (sn *Snapshotter) checkIndex(s section) (found []store.Finding) {
	if s.keys == nil || s.children == nil {
		return nil
	}
	_ = s.children.ForEach(func(k, _ []byte) error {
		parent, key, _ := strings.Cut(string(k), "\x00")
		r, err := s.get(key)
		if errdefs.IsNotFound(err) || err == nil && r.Parent != parent {
			found = append(found, sn.finding(ProblemIndex, store.Damage, s.ns, key, "it is noted as a child of %s, and is none", parent))
		}
		return nil
	})
	_ = s.each(func(key string, r record, err error) error {
		if err == nil && r.Parent != "" && s.children.Get(childKey(r.Parent, key)) == nil {
			found = append(found, sn.finding(ProblemIndex, store.Damage, s.ns, key, "its parent %s does not know of it", r.Parent))
		}
		return nil
	})
	return found
}

// Repair does away with what Check found, and tells how. The record of a committed
// snapshot whose files are lost goes: the image room unpacks its layer again, under the same key,
// and what builds upon it is whole again. inUse tells whether a container runs on a snapshot:
// its files stay. ErrUnavailable: nothing can be done here now.
func (sn *Snapshotter) Repair(ctx context.Context, f store.Finding, inUse func(store.Node) bool) (done string, err error) {
	defer func() { err = wrap(err, "repair snapshot %s", f.Object) }()
	key, ok := strings.CutPrefix(f.Object, sn.name+" ")
	if !ok || key == "" {
		return "", errdefs.ErrInvalidArgument
	}
	switch f.Problem {
	case ProblemStray:
		if key != filepath.Base(key) || key == ".." {
			return "", errdefs.ErrInvalidArgument
		}
		return "removed", os.RemoveAll(filepath.Join(sn.dir(), key))
	case ProblemOrphan:
		id, err := strconv.ParseUint(key, 10, 64)
		if err != nil {
			return "", errdefs.ErrInvalidArgument
		}
		named := false
		err = sn.store.DB().View(ctx, func(tx *bolt.Tx) error {
			ids, damaged, err := sn.known(tx)
			_, named = ids[id]
			named = named || damaged
			return err
		})
		if err != nil || named {
			return "", errors.Join(err, errdefs.ErrUnavailable)
		}
		sn.doom(id)
		return "removed", sn.removeDoomed()
	case ProblemMerged:
		var r record
		err := sn.store.DB().View(ctx, func(tx *bolt.Tx) (err error) {
			r, err = sn.section(tx, f.Namespace).get(key)
			return err
		})
		if err == nil {
			err = os.Remove(sn.layer(r.ID).merged())
		}
		return "removed: it is made again", err
	case ProblemIndex:
		return "put right", sn.rebuildIndex(ctx, f.Namespace)
	case ProblemRecord:
		err := sn.store.DB().Update(ctx, func(tx *bolt.Tx) error {
			s := sn.section(tx, f.Namespace)
			if _, err := s.get(key); !errdefs.IsDataLoss(err) {
				return nil
			}
			return s.keys.Delete([]byte(key))
		})
		return "dropped the record", errors.Join(err, sn.rebuildIndex(ctx, f.Namespace))
	case ProblemLost, ProblemUsage, ProblemImage:
		return sn.repairLayer(ctx, f, key, inUse)
	}
	return "", errdefs.ErrUnavailable
}

func (sn *Snapshotter) repairLayer(ctx context.Context, f store.Finding, key string, inUse func(store.Node) bool) (string, error) {
	if inUse(store.SnapshotNode(sn.name, f.Namespace, key)) {
		return "", fmt.Errorf("a container runs on it: %w", errdefs.ErrFailedPrecondition)
	}
	var r record
	var parents []layer
	err := sn.store.DB().Update(ctx, func(tx *bolt.Tx) (err error) {
		s := sn.section(tx, f.Namespace)
		if r, err = s.get(key); err != nil {
			return err
		}
		if r.kind() != snapshots.KindCommitted {
			parents, err = sn.chain(s, r.Parent)
			return err
		}
		if r.Parent != "" {
			if err := s.children.Delete(childKey(r.Parent, key)); err != nil {
				return err
			}
		}
		return s.keys.Delete([]byte(key)) // the children keep its name
	})
	if err != nil {
		return "", err
	}
	if r.kind() == snapshots.KindCommitted {
		sn.doom(r.ID)
		return "dropped, to be unpacked anew", nil
	}
	// What was written is lost; what lies below it is not.
	l := sn.layer(r.ID)
	if _, err := os.Lstat(l.fs()); err == nil { // only work is missing
		return "made its work directory anew", mkdirAgain(l.work())
	}
	if err := os.RemoveAll(string(l)); err != nil {
		return "", err
	}
	below, release, err := sn.driver.lower(parents)
	if err != nil {
		return "", err
	}
	defer release()
	return "made anew, as its parent is: what was written to it is lost", sn.build(ctx, r.ID, below)
}

func mkdirAgain(dir string) error {
	if err := mkdir(dir, 0o711); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// rebuildIndex writes the list of children anew.
func (sn *Snapshotter) rebuildIndex(ctx context.Context, ns string) error {
	return sn.store.DB().Update(ctx, func(tx *bolt.Tx) error {
		s, err := sn.makeSection(tx, ns)
		if err != nil {
			return err
		}
		var wrong [][]byte
		_ = s.children.ForEach(func(k, _ []byte) error {
			parent, key, _ := strings.Cut(string(k), "\x00")
			if r, err := s.get(key); errdefs.IsNotFound(err) || err == nil && r.Parent != parent {
				wrong = append(wrong, append([]byte{}, k...))
			}
			return nil
		})
		for _, k := range wrong {
			if err := s.children.Delete(k); err != nil {
				return err
			}
		}
		return s.each(func(key string, r record, err error) error {
			if err != nil || r.Parent == "" {
				return nil
			}
			return s.children.Put(childKey(r.Parent, key), []byte{})
		})
	})
}
