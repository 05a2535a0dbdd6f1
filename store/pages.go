package store

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/durable"
)

// The metadata file is read here without bbolt, which ends the process when it meets a
// page that is damaged: to say which one it is before bbolt is let near it, and to save
// what can still be read. The format is bbolt's version 2.

const (
	boltMagic   = 0xED0CDAED
	boltVersion = 2

	pageHeader  = 16
	elementSize = 16 // of a leaf and of a branch
	metaBody    = 64

	pageBranch = 0x01
	pageLeaf   = 0x02
	leafBucket = 0x01 // flag of an element whose value is a bucket

	maxPageTree = 64 // levels of pages, and of buckets
)

// pageDamage is a page that cannot be read.
type pageDamage struct {
	Page uint64
	Why  string
}

func (d pageDamage) String() string { return fmt.Sprintf("page %d %s", d.Page, d.Why) }

// pageReader walks over the pages of a metadata file.
type pageReader struct {
	f    io.ReaderAt
	size int64 // of a page
	high uint64
	root uint64

	seen   map[uint64]bool
	damage []pageDamage
	// item gets each key with its value, and each bucket (value nil), parents first. A key
	// that is not in the order of the others is not handed out.
	item func(path [][]byte, key, value []byte) error
}

// openPages gives a reader for each of the two meta pages that is valid, the newest first.
// The older one is the state before the last transaction, whose pages are all still there.
func openPages(f *os.File) ([]*pageReader, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	type version struct {
		r  *pageReader
		tx uint64
	}
	var found []version
	// The second meta page lies one page further; the first one, which tells how far that
	// is, may be damaged.
	at := []int64{0}
	for s := int64(1024); s <= 64<<10; s *= 2 {
		at = append(at, s)
	}
	for i, at := range at {
		b := make([]byte, pageHeader+metaBody)
		if _, err := f.ReadAt(b, at); err != nil {
			continue
		}
		m := b[pageHeader:]
		if binary.LittleEndian.Uint32(m) != boltMagic || binary.LittleEndian.Uint32(m[4:]) != boltVersion {
			continue
		}
		h := fnv.New64a()
		h.Write(m[:metaBody-8])
		if h.Sum64() != binary.LittleEndian.Uint64(m[metaBody-8:]) {
			continue
		}
		size := int64(binary.LittleEndian.Uint32(m[8:]))
		if size < 1024 || i > 0 && size != at {
			continue
		}
		r := &pageReader{f: f, size: size, seen: map[uint64]bool{}}
		r.root, r.high = binary.LittleEndian.Uint64(m[16:]), binary.LittleEndian.Uint64(m[40:])
		if have := uint64(st.Size() / size); have < r.high {
			r.bad(have, "and all that follow up to %d are missing: the file is too short", r.high-1)
		}
		found = append(found, version{r, binary.LittleEndian.Uint64(m[48:])})
	}
	slices.SortFunc(found, func(a, b version) int { return cmp.Compare(b.tx, a.tx) })
	readers := make([]*pageReader, len(found))
	for i, v := range found {
		readers[i] = v.r
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("no valid meta page: %w", errdefs.ErrDataLoss)
	}
	return readers, nil
}

func (r *pageReader) bad(id uint64, format string, args ...any) {
	r.damage = append(r.damage, pageDamage{id, fmt.Sprintf(format, args...)})
}

// walk reads all that can be reached. Its error is item's.
func (r *pageReader) walk() error { return r.page(r.root, nil, nil, nil, 0) }

// page reads a page and those below. The keys lie from low to before high (nil: no bound).
func (r *pageReader) page(id uint64, path [][]byte, low, high []byte, depth int) error {
	switch {
	case id < 2 || id >= r.high:
		r.bad(id, "is referred to and does not exist")
		return nil
	case r.seen[id]:
		r.bad(id, "is referred to twice")
		return nil
	case depth > maxPageTree:
		r.bad(id, "is nested too deep")
		return nil
	}
	r.seen[id] = true
	b := make([]byte, r.size)
	if _, err := r.f.ReadAt(b, int64(id)*r.size); err != nil {
		r.bad(id, "cannot be read: %v", err)
		return nil
	}
	if got := binary.LittleEndian.Uint64(b); got != id {
		r.bad(id, "says that it is page %d", got)
		return nil
	}
	over := binary.LittleEndian.Uint32(b[12:])
	if uint64(over) >= r.high-id {
		r.bad(id, "says that it has %d more pages", over)
		return nil
	}
	for i := uint64(1); i <= uint64(over); i++ {
		if r.seen[id+i] {
			r.bad(id+i, "is referred to twice")
			return nil
		}
		r.seen[id+i] = true
	}
	if over > 0 {
		b = make([]byte, r.size*(int64(over)+1))
		if _, err := r.f.ReadAt(b, int64(id)*r.size); err != nil {
			r.bad(id, "cannot be read: %v", err)
			return nil
		}
	}
	return r.elements(id, b, path, low, high, depth)
}

// elements reads what a page holds, which may lie inside a value.
func (r *pageReader) elements(id uint64, b []byte, path [][]byte, low, high []byte, depth int) error {
	flags := binary.LittleEndian.Uint16(b[8:])
	count := int(binary.LittleEndian.Uint16(b[10:]))
	if flags != pageBranch && flags != pageLeaf {
		r.bad(id, "has type %#x, neither branch nor leaf", flags)
		return nil
	}
	if pageHeader+count*elementSize > len(b) {
		r.bad(id, "says that it has %d elements", count)
		return nil
	}
	slice := func(at int, pos, n uint32) []byte {
		from := int64(at) + int64(pos)
		if from+int64(n) > int64(len(b)) {
			return nil
		}
		return b[from : from+int64(n) : from+int64(n)]
	}
	if flags == pageBranch {
		type child struct {
			key  []byte
			page uint64
		}
		children := make([]child, 0, count)
		for i := range count {
			at := pageHeader + i*elementSize
			key := slice(at, binary.LittleEndian.Uint32(b[at:]), binary.LittleEndian.Uint32(b[at+4:]))
			if key == nil {
				r.bad(id, "has a key that ends outside of it")
				continue
			}
			children = append(children, child{key, binary.LittleEndian.Uint64(b[at+8:])})
		}
		for i, c := range children {
			if i > 0 && bytes.Compare(children[i-1].key, c.key) >= 0 || low != nil && bytes.Compare(c.key, low) < 0 || high != nil && bytes.Compare(c.key, high) >= 0 {
				r.bad(id, "has keys out of order")
			}
			to := high
			if i+1 < len(children) {
				to = children[i+1].key
			}
			if err := r.page(c.page, path, c.key, to, depth+1); err != nil {
				return err
			}
		}
		return nil
	}
	last := low
	for i := range count {
		at := pageHeader + i*elementSize
		pos, ksize, vsize := binary.LittleEndian.Uint32(b[at+4:]), binary.LittleEndian.Uint32(b[at+8:]), binary.LittleEndian.Uint32(b[at+12:])
		key, value := slice(at, pos, ksize), slice(at, pos+ksize, vsize)
		if key == nil || value == nil {
			r.bad(id, "has an element that ends outside of it")
			continue
		}
		if c := bytes.Compare(key, last); last != nil && (c < 0 || c == 0 && i > 0) || high != nil && bytes.Compare(key, high) >= 0 {
			r.bad(id, "has keys out of order: %q", key)
			continue
		}
		last = key
		if binary.LittleEndian.Uint32(b[at:])&leafBucket == 0 {
			if r.item != nil {
				if err := r.item(path, key, value); err != nil {
					return err
				}
			}
			continue
		}
		if err := r.bucket(id, path, key, value, depth); err != nil {
			return err
		}
	}
	return nil
}

func (r *pageReader) bucket(id uint64, path [][]byte, key, value []byte, depth int) error {
	if len(value) < 16 || depth > maxPageTree {
		r.bad(id, "has a bucket of %d bytes", len(value))
		return nil
	}
	if r.item != nil {
		if err := r.item(path, key, nil); err != nil {
			return err
		}
	}
	below := append(append([][]byte{}, path...), key)
	if root := binary.LittleEndian.Uint64(value); root != 0 {
		return r.page(root, below, nil, nil, depth+1)
	}
	if len(value) < 16+pageHeader {
		r.bad(id, "has a bucket of %d bytes", len(value))
		return nil
	}
	return r.elements(id, value[16:], below, nil, nil, depth+1)
}

// CheckPages looks at the pages of the metadata of a store that no process has open:
// ErrUnavailable otherwise. What it finds keeps Open from opening it; Salvage mends it.
func CheckPages(root string) ([]Finding, error) {
	damage, err := checkPages(filepath.Join(root, "meta.db"))
	var found []Finding
	for _, d := range damage {
		found = append(found, Finding{Room: roomStore, Problem: ProblemPage, Severity: Damage, Object: fmt.Sprintf("meta.db page %d", d.Page), Detail: d.String()})
	}
	return found, wrap(err, "check metadata")
}

// checkPages gives the damaged pages of a metadata file that nobody writes to.
func checkPages(path string) ([]pageDamage, error) {
	f, err := lockedMetadata(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || st.Size() == 0 {
		return nil, err // bbolt fills it
	}
	versions, err := openPages(f)
	if err != nil {
		return []pageDamage{{0, "and page 1 hold no valid meta record"}}, nil
	}
	r := versions[0]
	if len(r.damage) > 0 {
		return r.damage, nil
	}
	err = r.walk()
	return r.damage, err
}

// lockedMetadata opens the file when no other process has it, as bbolt would.
func lockedMetadata(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(openTimeout); ; time.Sleep(20 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				err = bolterrors.ErrTimeout
			}
			return nil, err
		}
	}
}

// Salvage writes the metadata of a store that no process has open anew from all that can
// be read of it, and keeps the damaged file beside it. It tells what it did, or "" if
// no page is damaged. What was on a damaged page is lost: Check tells what that leaves.
func Salvage(root string) (done string, err error) {
	path := filepath.Join(root, "meta.db")
	defer func() { err = wrap(err, "salvage %s", path) }()
	f, err := lockedMetadata(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	versions, err := openPages(f)
	if err != nil {
		return "", err
	}
	fresh := path + ".salvaged"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	db, err := bolt.Open(fresh, 0o600, &bolt.Options{NoFreelistSync: true, FreelistType: bolt.FreelistMapType})
	if err != nil {
		return "", err
	}
	defer os.Remove(fresh)
	records := 0
	err = db.Update(func(tx *bolt.Tx) error {
		for _, r := range versions {
			r.item = func(path [][]byte, key, value []byte) error {
				saved, err := saveItem(tx, path, key, value)
				if saved {
					records++
				}
				return err
			}
			if err := r.walk(); err != nil {
				return err
			}
			if len(versions[0].damage) == 0 {
				return nil
			}
			// What the newest version lost may be there as the last one had it.
		}
		if Bucket(tx) == nil || tx.Bucket(bucketMeta) == nil {
			return fmt.Errorf("nothing can be read of it: %w", errdefs.ErrDataLoss)
		}
		return nil
	})
	if err = errors.Join(err, db.Close()); err != nil {
		return "", err
	}
	if len(versions[0].damage) == 0 {
		return "", nil
	}
	kept := fmt.Sprintf("%s.damaged-%s", path, time.Now().UTC().Format("20060102T150405.000"))
	// A copy by link: there is a file of the name at any moment.
	if err := os.Link(path, kept); err != nil {
		return "", err
	}
	if err := os.Rename(fresh, path); err != nil {
		return "", err
	}
	if err := durable.SyncDir(root); err != nil {
		return "", err
	}
	return fmt.Sprintf("saved %d records into a new file; the damaged one is %s", records, filepath.Base(kept)), nil
}

// saveItem puts a record, or with a nil value a bucket, where there is none yet.
func saveItem(tx *bolt.Tx, path [][]byte, key, value []byte) (saved bool, err error) {
	if len(path) == 0 {
		if value != nil {
			return false, nil // bbolt keeps only buckets there
		}
		_, err := tx.CreateBucketIfNotExists(key)
		return false, skipInvalid(err)
	}
	b := tx.Bucket(path[0])
	for _, p := range path[1:] {
		if b != nil {
			b = b.Bucket(p)
		}
	}
	switch {
	case b == nil:
		return false, nil
	case value == nil:
		_, err := b.CreateBucketIfNotExists(key)
		return false, skipInvalid(err)
	case b.Get(key) != nil:
		return false, nil
	}
	err = b.Put(bytes.Clone(key), bytes.Clone(value))
	return err == nil, skipInvalid(err)
}

// skipInvalid passes over names that bbolt does not take: they are damaged.
func skipInvalid(err error) error {
	if errors.Is(err, bolterrors.ErrKeyRequired) || errors.Is(err, bolterrors.ErrKeyTooLarge) || errors.Is(err, bolterrors.ErrBucketNameRequired) || errors.Is(err, bolterrors.ErrIncompatibleValue) {
		return nil
	}
	return err
}
