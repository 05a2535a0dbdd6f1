// Package store keeps what the engine must not lose: content-addressed blobs,
// metadata, leases and records, and removes what nothing needs any more.
//
// In flow blobs (hashed while they are written), image records, leases and other
// rooms' records; out flow the same, whole or not at all. A blob's bytes and its name
// have reached the disk before it can be found; an update of metadata has when the
// call returns. Garbage is what neither an image, a live lease, a root label nor a
// Source reaches.
//
// Everything below the root directory is described in docs/store.md.
package store

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// schemaVersion is of the metadata's layout; see docs/store.md for the upgrade rule.
const schemaVersion = 1

// Options of a store.
type Options struct {
	// Log gets what happens in the background; nil: slog.Default().
	Log *slog.Logger
	// GCDelay is how long ScheduleGC waits for more to come; 0: one second.
	GCDelay time.Duration
	// Events is told of what happens to objects; nil: nobody is.
	Events events.Publisher
	// NoBackgroundGC makes ScheduleGC do nothing: only GC collects.
	NoBackgroundGC bool
}

// Store is an open store. All methods may be called concurrently.
type Store struct {
	root string
	log  *slog.Logger
	db   *DB

	events events.Publisher

	blobs *blobs
	gc    collector
}

// Open opens the store below root, and makes it if there is none. Only one process
// may have it open: errdefs.ErrUnavailable. A store that a newer version wrote is
// errdefs.ErrFailedPrecondition, a damaged one errdefs.ErrDataLoss.
func Open(root string, o Options) (*Store, error) {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.GCDelay == 0 {
		o.GCDelay = time.Second
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, fmt.Errorf("open store: %w", classify(err))
	}
	db, err := openDB(filepath.Join(root, "meta.db"))
	if err != nil {
		return nil, err
	}
	if err := initSchema(db); err != nil {
		db.Close()
		return nil, fmt.Errorf("open store %s: %w", root, err)
	}
	s := &Store{root: root, log: o.Log, db: db, events: o.Events}
	if s.blobs, err = openBlobs(filepath.Join(root, "content")); err != nil {
		db.Close()
		return nil, fmt.Errorf("open store %s: %w", root, classify(err))
	}
	s.gc.init(s, o.GCDelay, o.NoBackgroundGC)
	return s, nil
}

// Close ends background work and closes the files. It waits for updates under way.
func (s *Store) Close() error {
	s.gc.stop()
	return s.db.Close()
}

// DB is the metadata file, for rooms that keep their own buckets in it (see Bucket).
func (s *Store) DB() *DB { return s.db }

// Log is the logger that the store was opened with.
func (s *Store) Log() *slog.Logger { return s.log }

// Root is the store's directory.
func (s *Store) Root() string { return s.root }

// Content is the blob store. Its Writer also implements content.Syncer.
func (s *Store) Content() content.Store { return (*contentStore)(s) }

// Images is the store of image records.
func (s *Store) Images() images.Store { return (*imageStore)(s) }

// Leases is the lease manager.
func (s *Store) Leases() leases.Manager { return (*leaseManager)(s) }

// Namespaces lists and labels namespaces. One comes to be with its first object.
func (s *Store) Namespaces() *Namespaces { return (*Namespaces)(s) }

// names of the fixed buckets and keys; see docs/store.md.
var (
	bucketMeta  = []byte("hako")
	keySchema   = []byte("schema")
	bucketRoot  = []byte("v1")
	bucketNS    = []byte("ns")
	bucketRecs  = []byte("records")
	keyNSLabels = []byte("labels")
)

const (
	sectionContent = "content"
	sectionImages  = "images"
	sectionLeases  = "leases"

	sectionContainers = "containers"
	sectionSandboxes  = "sandboxes"
)

// initSchema makes a new file's schema, and checks that of an old one without
// writing to it.
func initSchema(db *DB) error {
	fresh := false
	err := db.View(context.Background(), func(tx *bolt.Tx) error {
		m := tx.Bucket(bucketMeta)
		if m == nil {
			if k, _ := tx.Cursor().First(); k != nil {
				return fmt.Errorf("metadata is not hako's: %w", errdefs.ErrDataLoss)
			}
			fresh = true
			return nil
		}
		v := m.Get(keySchema)
		if len(v) != 4 {
			return fmt.Errorf("metadata has no schema version: %w", errdefs.ErrDataLoss)
		}
		switch have := binary.BigEndian.Uint32(v); {
		case have > schemaVersion:
			return fmt.Errorf("metadata has schema version %d, this program knows versions up to %d: a newer hako wrote it: %w", have, schemaVersion, errdefs.ErrFailedPrecondition)
		case have < schemaVersion || tx.Bucket(bucketRoot) == nil:
			return fmt.Errorf("metadata of schema version %d is incomplete: %w", have, errdefs.ErrDataLoss)
		}
		return nil
	})
	if err != nil || !fresh {
		return err
	}
	return db.Update(context.Background(), func(tx *bolt.Tx) error {
		m, err := tx.CreateBucketIfNotExists(bucketMeta)
		if err != nil {
			return err
		}
		if _, err := tx.CreateBucketIfNotExists(bucketRoot); err != nil {
			return err
		}
		return m.Put(keySchema, binary.BigEndian.AppendUint32(nil, schemaVersion))
	})
}

// Bucket gives the bucket at a path below the schema's root bucket, or nil if there
// is none. Rooms keep to sections named after themselves.
func Bucket(tx *bolt.Tx, path ...string) *bolt.Bucket {
	b := tx.Bucket(bucketRoot)
	for _, p := range path {
		if b == nil {
			return nil
		}
		b = b.Bucket([]byte(p))
	}
	return b
}

// MakeBucket is Bucket that makes what is missing.
func MakeBucket(tx *bolt.Tx, path ...string) (*bolt.Bucket, error) {
	b, err := tx.CreateBucketIfNotExists(bucketRoot)
	for _, p := range path {
		if err != nil {
			return nil, err
		}
		if p == "" {
			return nil, fmt.Errorf("empty name: %w", errdefs.ErrInvalidArgument)
		}
		b, err = b.CreateBucketIfNotExists([]byte(p))
	}
	return b, err
}

// NamespaceBucket gives a section of a namespace, or nil. Sections of other rooms:
// "snapshots.NAME".
func NamespaceBucket(tx *bolt.Tx, ns, section string) *bolt.Bucket {
	return Bucket(tx, string(bucketNS), ns, section)
}

// MakeNamespaceBucket is NamespaceBucket that makes what is missing.
func MakeNamespaceBucket(tx *bolt.Tx, ns, section string) (*bolt.Bucket, error) {
	return MakeBucket(tx, string(bucketNS), ns, section)
}

// EachNamespace calls fn with the name of every namespace that has objects or labels.
func EachNamespace(tx *bolt.Tx, fn func(ns string) error) error {
	b := Bucket(tx, string(bucketNS))
	if b == nil {
		return nil
	}
	return b.ForEachBucket(func(k []byte) error { return fn(string(k)) })
}

// Coalescer lets callers that wait at the same time share one slow operation that
// covers all that was done before it began (an fsync, a syncfs).
type Coalescer struct {
	// Run does the work. It is set once, before the first Do.
	Run func() error

	mu      sync.Mutex
	running bool
	next    *flight // begins when the running one has ended
}

type flight struct {
	done chan struct{}
	err  error
}

// Do returns the result of a run that began after Do was called.
func (f *Coalescer) Do() error {
	f.mu.Lock()
	if f.next == nil {
		f.next = &flight{done: make(chan struct{})}
	}
	mine := f.next
	if !f.running {
		f.running = true
		go f.fly()
	}
	f.mu.Unlock()
	<-mine.done
	return mine.err
}

func (f *Coalescer) fly() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.next != nil {
		cur := f.next
		f.next = nil
		f.mu.Unlock()
		cur.err = f.Run()
		close(cur.done)
		f.mu.Lock()
	}
	f.running = false
}

// wrap adds what was being done to which object, and the class of a full disk.
func wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf(format+": %w", append(args, classify(err))...)
}
