package store

import (
	"context"
	"encoding"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/durable"
)

// writeback is how many bytes of an ingest may be dirty before the kernel is asked
// to begin writing them: the sync at the commit then has little left to wait for.
const writeback = 8 << 20

const maxIngestRecord = 64 << 10

// ingestRecord is the file "ingest.json" beside an ingest's "data".
type ingestRecord struct {
	Namespace string        `json:"namespace"`
	Ref       string        `json:"ref"`
	Expected  digest.Digest `json:"expected,omitempty"`
	Total     int64         `json:"total,omitempty"`
	Started   time.Time     `json:"started"`
	Updated   time.Time     `json:"updated"`
	// After a power cut only the synced bytes can be relied on: Boot tells whether
	// there was one.
	Boot   string `json:"boot"`
	Synced int64  `json:"synced"`
}

func (r ingestRecord) status(offset int64) content.Status {
	return content.Status{Ref: r.Ref, Offset: offset, Total: r.Total, Expected: r.Expected, StartedAt: r.Started, UpdatedAt: r.Updated}
}

// Status is of an ingest that was begun: errdefs.ErrNotFound otherwise.
func (s *contentStore) Status(ctx context.Context, ref string) (content.Status, error) {
	ns, err := Namespace(ctx)
	if err != nil {
		return content.Status{}, err
	}
	st, err := s.status(ns, ingestName(ns, ref))
	return st, wrap(err, "ingest %q", ref)
}

func (s *contentStore) status(ns, name string) (content.Status, error) {
	r, size, err := s.blobs.readIngest(name)
	if err != nil {
		return content.Status{}, err
	}
	if r.Namespace != ns {
		return content.Status{}, errdefs.ErrNotFound
	}
	if st, err := os.Stat(filepath.Join(s.blobs.ingestDir(name), "data")); err == nil && st.ModTime().After(r.Updated) {
		r.Updated = st.ModTime().UTC()
	}
	return r.status(size), nil
}

// ListStatuses gives the ingests that match one of the filters (all, if there is
// none). A filter is containerd's syntax with the field "ref"; what cannot be read as
// that is a regular expression for the ref, as the interface has it.
func (s *contentStore) ListStatuses(ctx context.Context, fs ...string) ([]content.Status, error) {
	ns, err := Namespace(ctx)
	if err != nil {
		return nil, err
	}
	match, err := ingestFilter(fs)
	if err != nil {
		return nil, wrap(err, "list ingests")
	}
	names, err := s.blobs.ingests()
	if err != nil {
		return nil, wrap(err, "list ingests")
	}
	var list []content.Status
	for _, name := range names {
		st, err := s.status(ns, name)
		if err != nil {
			continue // of another namespace, or it ended meanwhile
		}
		if match(st.Ref) {
			list = append(list, st)
		}
	}
	return list, nil
}

func ingestFilter(fs []string) (func(ref string) bool, error) {
	if f, err := ParseFilters(fs); err == nil {
		return func(ref string) bool {
			return f.Match(filters.AdapterFunc(func(p []string) (string, bool) {
				return ref, len(p) == 1 && p[0] == "ref"
			}))
		}, nil
	}
	var res []*regexp.Regexp
	for _, f := range fs {
		re, err := regexp.Compile(f)
		if err != nil {
			return nil, fmt.Errorf("filter %q: %w: %w", f, err, errdefs.ErrInvalidArgument)
		}
		res = append(res, re)
	}
	return func(ref string) bool {
		return slices.ContainsFunc(res, func(re *regexp.Regexp) bool { return re.MatchString(ref) })
	}, nil
}

// Abort removes an ingest: errdefs.ErrUnavailable while it has a writer.
func (s *contentStore) Abort(ctx context.Context, ref string) error {
	ns, err := Namespace(ctx)
	if err != nil {
		return err
	}
	name := ingestName(ns, ref)
	if !s.blobs.acquire(name) {
		return fmt.Errorf("abort ingest %q: it has a writer: %w", ref, errdefs.ErrUnavailable)
	}
	defer s.blobs.release(name)
	if _, err := os.Lstat(s.blobs.ingestDir(name)); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("abort ingest %q: %w", ref, errdefs.ErrNotFound)
	}
	return wrap(errors.Join(s.blobs.removeIngest(name), (*Store)(s).unleaseIngest(ctx, ns, ref)), "abort ingest %q", ref)
}

// unleaseIngest takes an ingest that is no more from the lease of ctx. In the usual case, when that does not hold it,
// nothing is written.
func (s *Store) unleaseIngest(ctx context.Context, ns, ref string) error {
	id, ok := leaseOf(ctx)
	if !ok {
		return nil
	}
	held := false
	err := s.db.View(ctx, func(tx *bolt.Tx) error {
		held = leaseHolds(tx, ns, id, resourceIngests, ref)
		return nil
	})
	if err != nil || !held {
		return err
	}
	return s.db.Update(ctx, func(tx *bolt.Tx) error { return UnleaseResource(ctx, tx, resourceIngests, ref) })
}

// Writer begins an ingest or takes one up again. It has one writer at a time:
// errdefs.ErrUnavailable. If the namespace has the expected digest already, that is
// errdefs.ErrAlreadyExists (and the lease of ctx holds it from now on); if another
// namespace has it, the writer begins with all of its bytes there.
func (s *contentStore) Writer(ctx context.Context, opts ...content.WriterOpt) (_ content.Writer, err error) {
	ns, err := Namespace(ctx)
	if err != nil {
		return nil, err
	}
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, wrap(err, "open ingest")
		}
	}
	defer func() { err = wrap(err, "open ingest %q", o.Ref) }()
	if o.Ref == "" || len(o.Ref) > maxKey {
		return nil, fmt.Errorf("a ref of 1 to %d bytes is needed: %w", maxKey, errdefs.ErrInvalidArgument)
	}
	name := ingestName(ns, o.Ref)
	if !s.blobs.acquire(name) {
		return nil, fmt.Errorf("it has a writer: %w", errdefs.ErrUnavailable)
	}
	defer func() {
		if err != nil {
			s.blobs.release(name)
		}
	}()
	w := &writer{s: (*Store)(s), ns: ns, name: name, alg: digest.SHA256, kind: o.Desc.MediaType}
	w.rec = ingestRecord{Namespace: ns, Ref: o.Ref, Expected: o.Desc.Digest, Total: o.Desc.Size, Boot: bootID()}
	if d := o.Desc.Digest; d != "" {
		if err := validDigest(d); err != nil {
			return nil, err
		}
		w.alg = d.Algorithm()
		shared, err := s.existing(ctx, ns, d)
		if errdefs.IsAlreadyExists(err) {
			// What an earlier writer left of it is of no more use.
			if r, _, rerr := s.blobs.readIngest(name); rerr == nil && r.Expected == d {
				err = errors.Join(err, s.blobs.removeIngest(name), (*Store)(s).unleaseIngest(ctx, ns, o.Ref))
			}
		}
		if err != nil {
			return nil, err
		}
		if shared != nil {
			w.rec.Started = now()
			w.rec.Updated = w.rec.Started
			if w.rec.Total == 0 {
				w.rec.Total = shared.Size
			}
			w.shared, w.offset = true, shared.Size
			return w, nil
		}
	}
	return w, w.open()
}

// existing looks for a digest: errdefs.ErrAlreadyExists if the namespace has it; a
// record if another one does.
func (s *contentStore) existing(ctx context.Context, ns string, d digest.Digest) (*blobRecord, error) {
	var mine, other *blobRecord
	err := s.db.View(ctx, func(tx *bolt.Tx) error {
		return EachNamespace(tx, func(n string) error {
			r, err := readBlob(tx, n, d)
			if err != nil {
				return nil
			}
			if n == ns {
				mine = &r
				return nil
			}
			other = &r
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	if mine != nil {
		err := (*Store)(s).leaseExisting(ctx, ns, d)
		if size, serr := s.blobs.size(d); err == nil && (errors.Is(serr, fs.ErrNotExist) || serr == nil && size != mine.Size) {
			return nil, nil // its bytes are welcome
		}
		if err == nil {
			return nil, fmt.Errorf("content %s: %w", d, errdefs.ErrAlreadyExists)
		}
		if !errors.Is(err, errGone) {
			return nil, err
		}
	}
	if other != nil {
		// The metadata of a file that somebody took away must not keep it from coming back.
		if size, err := s.blobs.size(d); err != nil || size != other.Size {
			return nil, nil
		}
	}
	return other, nil
}

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// ingests lists the directories below ingest/.
func (b *blobs) ingests() ([]string, error) {
	d, err := os.Open(filepath.Join(b.dir, "ingest"))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

// readIngest gives an ingest's record and how many bytes are there. A damaged or
// half-made one is not found: it is begun anew.
func (b *blobs) readIngest(name string) (r ingestRecord, size int64, err error) {
	dir := b.ingestDir(name)
	raw, err := os.ReadFile(filepath.Join(dir, "ingest.json"))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = errdefs.ErrNotFound
		}
		return r, 0, err
	}
	if r, err = parseIngest(raw); err != nil {
		return r, 0, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	st, err := os.Lstat(filepath.Join(dir, "data"))
	if err != nil || !st.Mode().IsRegular() || ingestName(r.Namespace, r.Ref) != name {
		return r, 0, errdefs.ErrNotFound
	}
	return r, st.Size(), nil
}

func parseIngest(raw []byte) (r ingestRecord, err error) {
	if len(raw) > maxIngestRecord {
		return r, fmt.Errorf("ingest record of %d bytes: %w", len(raw), errdefs.ErrDataLoss)
	}
	if err := decode(raw, &r); err != nil {
		return r, err
	}
	if r.Ref == "" || r.Total < 0 || r.Synced < 0 {
		return r, fmt.Errorf("ingest record: %w", errdefs.ErrDataLoss)
	}
	return r, nil
}

// writer is one ingest. Its methods may be called concurrently, but make little sense so.
type writer struct {
	s    *Store
	ns   string
	name string

	mu     sync.Mutex
	rec    ingestRecord
	f      *os.File
	alg    digest.Algorithm
	hash   hash.Hash
	offset int64
	dirty  int64  // bytes since writing back was begun
	kind   string // media type, if its client said it
	shared bool   // the bytes are those of the expected blob, in another namespace; no file yet
	closed bool
}

// open makes the ingest's directory or takes it up.
func (w *writer) open() error {
	b := w.s.blobs
	dir := b.ingestDir(w.name)
	w.hash = w.alg.Hash()
	old, size, err := b.readIngest(w.name)
	switch {
	case err == nil && (old.Expected == "" || w.rec.Expected == "" || old.Expected == w.rec.Expected):
		if old.Boot != w.rec.Boot {
			size = min(size, old.Synced)
		}
		w.rec.Started, w.rec.Updated, w.rec.Synced = old.Started, old.Updated, min(old.Synced, size)
		if w.rec.Total == 0 {
			w.rec.Total = old.Total
		}
		if w.rec.Expected == "" {
			w.rec.Expected = old.Expected
		}
		if w.f, err = os.OpenFile(filepath.Join(dir, "data"), os.O_RDWR, 0); err != nil {
			return err
		}
		if err := w.rehash(size); err != nil {
			w.f.Close()
			return err
		}
		return nil
	case err != nil && !errdefs.IsNotFound(err):
		return err
	}
	if err := b.removeIngest(w.name); err != nil {
		return err
	}
	w.rec.Started = now()
	w.rec.Updated, w.rec.Synced = w.rec.Started, 0
	if err := w.create(); err != nil {
		return errors.Join(err, b.removeIngest(w.name))
	}
	return nil
}

// create makes an empty ingest. The record comes last: without it there is none.
func (w *writer) create() (err error) {
	dir := w.s.blobs.ingestDir(w.name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if w.f, err = os.OpenFile(filepath.Join(dir, "data"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return err
	}
	if err := w.save(); err != nil {
		w.f.Close()
		return err
	}
	return nil
}

func (w *writer) save() error {
	raw, err := encode(w.rec)
	if err != nil {
		return err
	}
	return durable.WriteVolatile(filepath.Join(w.s.blobs.ingestDir(w.name), "ingest.json"), raw, 0o600)
}

// rehash cuts the data to size and brings the hash to its end, from the state that
// an earlier writer of this process left if that fits.
func (w *writer) rehash(size int64) error {
	if err := w.f.Truncate(size); err != nil {
		return err
	}
	w.hash.Reset()
	w.offset = 0
	if h := w.s.blobs.takeHash(w.name); len(h.state) > 0 && h.offset <= size {
		if u, ok := w.hash.(encoding.BinaryUnmarshaler); ok {
			if u.UnmarshalBinary(h.state) == nil {
				w.offset = h.offset
			} else {
				w.hash.Reset()
			}
		}
	}
	n, err := io.Copy(w.hash, io.NewSectionReader(w.f, w.offset, size-w.offset))
	if err != nil {
		return err
	}
	if w.offset += n; w.offset != size {
		return io.ErrUnexpectedEOF
	}
	_, err = w.f.Seek(size, io.SeekStart)
	return err
}

// unshare makes the shared bytes a file of this ingest's own.
func (w *writer) unshare(size int64) error {
	w.hash = w.alg.Hash()
	if err := w.s.blobs.removeIngest(w.name); err != nil {
		return err
	}
	if err := w.create(); err != nil {
		return errors.Join(err, w.s.blobs.removeIngest(w.name))
	}
	src, err := os.Open(w.s.blobs.path(w.rec.Expected))
	if err != nil {
		return err
	}
	defer src.Close()
	if _, err := io.CopyN(w.f, src, size); err != nil {
		return err
	}
	w.shared = false
	return w.rehash(size)
}

func (w *writer) Write(p []byte) (n int, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.usable(); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if w.shared {
		if err := w.unshare(w.offset); err != nil {
			return 0, wrap(err, "write ingest %q", w.rec.Ref)
		}
	}
	n, err = w.f.Write(p)
	w.hash.Write(p[:n])
	w.offset += int64(n)
	w.dirty += int64(n)
	w.rec.Updated = now()
	if w.dirty >= writeback {
		// A hint: if it fails, the sync at the end reports it.
		_ = unix.SyncFileRange(int(w.f.Fd()), w.offset-w.dirty, w.dirty, unix.SYNC_FILE_RANGE_WRITE)
		w.dirty = 0
	}
	return n, wrap(err, "write ingest %q", w.rec.Ref)
}

func (w *writer) usable() error {
	if w.closed {
		return fmt.Errorf("ingest %q: writer is closed: %w", w.rec.Ref, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func (w *writer) Digest() digest.Digest {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.digest()
}

func (w *writer) digest() digest.Digest {
	if w.shared {
		return w.rec.Expected
	}
	if w.hash == nil {
		return ""
	}
	return digest.NewDigest(w.alg, w.hash)
}

func (w *writer) Status() (content.Status, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rec.status(w.offset), nil
}

// Truncate cuts the ingest to size.
func (w *writer) Truncate(size int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.usable(); err != nil {
		return err
	}
	if size < 0 || size > w.offset {
		return fmt.Errorf("truncate ingest %q to %d of %d bytes: %w", w.rec.Ref, size, w.offset, errdefs.ErrInvalidArgument)
	}
	if w.shared {
		return wrap(w.unshare(size), "truncate ingest %q", w.rec.Ref)
	}
	w.rec.Synced = min(w.rec.Synced, size)
	w.rec.Updated = now()
	w.dirty = 0
	return wrap(w.rehash(size), "truncate ingest %q", w.rec.Ref)
}

// Sync makes what was written so far survive a power cut.
func (w *writer) Sync() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.usable(); err != nil {
		return err
	}
	return wrap(w.sync(), "sync ingest %q", w.rec.Ref)
}

func (w *writer) sync() error {
	if w.shared {
		return nil
	}
	if err := w.f.Sync(); err != nil {
		return err
	}
	w.rec.Synced, w.dirty = w.offset, 0
	return w.save()
}

// Close leaves an uncommitted ingest to be taken up again.
func (w *writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil
	}
	var err error
	if !w.shared && w.offset > 0 {
		if err = w.sync(); err == nil {
			w.rememberHash()
		}
	} else if !w.shared {
		err = w.save()
	}
	return wrap(errors.Join(err, w.end()), "close ingest %q", w.rec.Ref)
}

func (w *writer) rememberHash() {
	if m, ok := w.hash.(encoding.BinaryMarshaler); ok {
		if state, err := m.MarshalBinary(); err == nil {
			w.s.blobs.keepHash(w.name, hashState{w.offset, state})
		}
	}
}

// end closes the file and lets the next writer in.
func (w *writer) end() (err error) {
	w.closed = true
	if w.f != nil {
		err = w.f.Close()
	}
	w.s.blobs.release(w.name)
	return err
}

// Commit checks size (if not 0) and digest (if not ""), makes the blob durable and
// gives the namespace, and the lease of ctx, the blob. On a mismatch
// (errdefs.ErrFailedPrecondition) the ingest stays, to be truncated and written
// anew. On errdefs.ErrAlreadyExists it is removed. The writer is closed in any case.
func (w *writer) Commit(ctx context.Context, size int64, expected digest.Digest, opts ...content.Opt) (err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.usable(); err != nil {
		return err
	}
	done := false // the ingest is of no more use
	defer func() {
		if !done && !w.shared {
			w.rememberHash()
			err = errors.Join(err, w.save())
		}
		if done && !w.shared {
			err = errors.Join(err, w.s.blobs.removeIngest(w.name))
		}
		err = wrap(errors.Join(err, w.end()), "commit ingest %q", w.rec.Ref)
	}()
	var info content.Info
	for _, opt := range opts {
		if err := opt(&info); err != nil {
			return err
		}
	}
	if err := ValidateLabels(info.Labels); err != nil {
		return err
	}
	if size != 0 && size != w.offset {
		return fmt.Errorf("it has %d bytes, expected were %d: %w", w.offset, size, errdefs.ErrFailedPrecondition)
	}
	d := w.digest()
	if expected != "" && expected.Algorithm() != d.Algorithm() && expected.Validate() == nil {
		if d, err = w.digestBy(expected.Algorithm()); err != nil {
			return err
		}
	}
	if expected != "" && expected != d {
		return fmt.Errorf("it has digest %s, expected was %s: %w", d, expected, errdefs.ErrFailedPrecondition)
	}
	err = w.publish(ctx, d, info.Labels)
	done = err == nil || errdefs.IsAlreadyExists(err)
	return err
}

// digestBy hashes anew with another algorithm than the one foreseen.
func (w *writer) digestBy(a digest.Algorithm) (digest.Digest, error) {
	path := filepath.Join(w.s.blobs.ingestDir(w.name), "data")
	if w.shared {
		path = w.s.blobs.path(w.rec.Expected)
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return a.FromReader(f)
}

func (w *writer) publish(ctx context.Context, d digest.Digest, labels map[string]string) error {
	b := w.s.blobs
	l := b.lock(d)
	l.RLock()
	defer l.RUnlock()
	mine := false
	err := w.s.db.View(ctx, func(tx *bolt.Tx) error {
		_, err := readBlob(tx, w.ns, d)
		mine = err == nil
		return nil
	})
	if err != nil {
		return err
	}
	have, err := b.size(d)
	there := err == nil && have == w.offset
	if !there {
		if w.shared {
			return fmt.Errorf("content %s was removed meanwhile: %w", d, errdefs.ErrUnavailable)
		}
		if err := b.step("sync file"); err != nil {
			return err
		}
		if err := w.f.Sync(); err != nil {
			return err
		}
		if err := b.publish(filepath.Join(b.ingestDir(w.name), "data"), d); err != nil {
			return err
		}
	} else if !mine {
		// Another writer may have given it its name a moment ago, and not be done.
		if err := b.syncs[d.Algorithm()].Do(); err != nil {
			return err
		}
	}
	if mine {
		err := w.s.leaseExisting(ctx, w.ns, d)
		if err == nil {
			return errors.Join(fmt.Errorf("content %s: %w", d, errdefs.ErrAlreadyExists), w.s.unleaseIngest(ctx, w.ns, w.rec.Ref))
		}
		// What was there may be collected until the lease holds it. The file stays, for the
		// lock is held, and gets its name anew.
		if !errors.Is(err, errGone) {
			return err
		}
	}
	if err := b.step("commit metadata"); err != nil {
		return err
	}
	had := false // another writer came first
	err = w.s.db.Update(ctx, func(tx *bolt.Tx) (err error) {
		if had, err = w.s.addBlob(ctx, tx, w.ns, d, w.offset, labels); err != nil {
			return err
		}
		return UnleaseResource(ctx, tx, resourceIngests, w.rec.Ref)
	})
	if err == nil && had {
		err = errdefs.ErrAlreadyExists
	}
	if err != nil {
		return wrap(err, "content %s", d)
	}
	w.s.Publish(ctx, "/content/create", &apievents.ContentCreate{Digest: d.String(), Size: w.offset, MediaType: w.kind})
	return nil
}
