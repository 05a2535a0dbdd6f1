package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

// Severity says how bad a finding is.
type Severity string

// The severities. Only notes leave a store clean.
const (
	Damage   Severity = "damage"   // something that is needed is missing or wrong
	Leftover Severity = "leftover" // something takes up space, and nothing needs it
	Note     Severity = "note"     // allowed, and worth knowing
)

// Finding is one thing that a check found. docs/check.md lists the problems of all rooms.
type Finding struct {
	Room      string   `json:"room"`    // "store", "image", "snapshot", "network", "engine"
	Problem   string   `json:"problem"` // for programs, e.g. "blob-missing"
	Severity  Severity `json:"severity"`
	Namespace string   `json:"namespace,omitempty"`
	Object    string   `json:"object"` // e.g. a digest, a key, a name
	Detail    string   `json:"detail"` // for people
	Repaired  string   `json:"repaired,omitempty"`
	Failed    string   `json:"failed,omitempty"` // why it was not repaired
}

// Key tells findings apart that several checks of the same store give.
func (f Finding) Key() string {
	return strings.Join([]string{f.Room, f.Problem, f.Namespace, f.Object}, "\x00")
}

// CheckOptions of a room's check.
type CheckOptions struct {
	// Deep reads everything: blobs are hashed, layers' files counted.
	Deep bool
	// Progress is told what is being looked at, of how many; it may be nil.
	Progress func(what string, done, total int64)
}

// Report calls Progress, if there is one.
func (o CheckOptions) Report(what string, done, total int64) {
	if o.Progress != nil {
		o.Progress(what, done, total)
	}
}

// Problems that Check finds.
const (
	ProblemPage      = "page-damaged" // of CheckPages
	ProblemRecord    = "record-damaged"
	ProblemMissing   = "blob-missing"
	ProblemSize      = "blob-size"
	ProblemDigest    = "blob-digest"
	ProblemOrphan    = "blob-orphan"
	ProblemStray     = "file-stray"
	ProblemIngest    = "ingest-damaged"
	ProblemReference = "reference-dangling"
)

const roomStore = "store"

// blobState is what the metadata says about a blob.
type blobState struct {
	namespaces []string
	size       int64
	conflict   bool // namespaces disagree about the size
}

// Check compares metadata and files. It changes nothing, and runs beside all other work:
// what looks wrong is looked at again when nobody can be about to change it.
func (s *Store) Check(ctx context.Context, o CheckOptions) ([]Finding, error) {
	var found []Finding
	blobs := map[digest.Digest]*blobState{}
	if err := s.db.View(ctx, func(tx *bolt.Tx) error {
		found = append(found[:0], s.checkRecords(tx, blobs)...)
		return nil
	}); err != nil {
		return nil, wrap(err, "check metadata")
	}
	order := make([]digest.Digest, 0, len(blobs))
	var total, done int64
	for d, b := range blobs {
		order = append(order, d)
		total += b.size
	}
	slices.Sort(order)
	for _, d := range order {
		if err := ctx.Err(); err != nil {
			return found, err
		}
		f, bad, err := s.checkBlob(ctx, d, blobs[d], o, done, total)
		if err != nil {
			return found, wrap(err, "check blob %s", d)
		}
		if bad {
			found = append(found, f)
		}
		done += blobs[d].size
	}
	files, err := s.checkFiles(ctx)
	if err != nil {
		return found, wrap(err, "check files")
	}
	ingests, err := s.checkIngests(ctx)
	return append(append(found, files...), ingests...), wrap(err, "check ingests")
}

// checkRecords reads all records of one picture of the metadata.
func (s *Store) checkRecords(tx *bolt.Tx, blobs map[digest.Digest]*blobState) (found []Finding) {
	damaged := func(ns, typ, id string, err error) {
		found = append(found, Finding{Room: roomStore, Problem: ProblemRecord, Severity: Damage, Namespace: ns, Object: typ + " " + id, Detail: err.Error()})
	}
	_ = EachNamespace(tx, func(ns string) error {
		if err := validNamespace(ns); err != nil {
			damaged(ns, "namespace", ns, err)
		}
		if _, err := namespaceLabels(tx, ns); err != nil {
			damaged(ns, "namespace", ns, err)
		}
		each(NamespaceBucket(tx, ns, sectionContent), func(k, v []byte) {
			d := digest.Digest(k)
			var r blobRecord
			err := decode(v, &r)
			if err == nil && r.Size < 0 {
				err = fmt.Errorf("size %d: %w", r.Size, errdefs.ErrDataLoss)
			}
			if err = errors.Join(err, validDigest(d)); err != nil {
				damaged(ns, resourceContent, string(k), err)
				return
			}
			b := blobs[d]
			if b == nil {
				b = &blobState{size: r.Size}
				blobs[d] = b
			}
			b.conflict = b.conflict || b.size != r.Size
			b.namespaces = append(b.namespaces, ns)
		})
		each(NamespaceBucket(tx, ns, sectionImages), func(k, v []byte) {
			var r imageRecord
			err := decode(v, &r)
			if err == nil {
				err = validDigest(r.Target.Digest)
			}
			if err != nil {
				damaged(ns, resourceImages, string(k), err)
			}
		})
		found = append(found, s.checkContainers(tx, ns)...)
		each(NamespaceBucket(tx, ns, sectionSandboxes), func(k, v []byte) {
			var r sandboxRecord
			if err := decode(v, &r); err != nil {
				damaged(ns, sectionSandboxes, string(k), err)
			}
		})
		found = append(found, s.checkLeases(tx, ns)...)
		return nil
	})
	if recs := Bucket(tx, string(bucketRecs)); recs != nil {
		_ = recs.ForEachBucket(func(kind []byte) error {
			each(recs.Bucket(kind), func(k, v []byte) {
				if !json.Valid(v) {
					damaged("", "record "+string(kind), string(k), fmt.Errorf("not JSON: %w", errdefs.ErrDataLoss))
				}
			})
			return nil
		})
	}
	return found
}

// each calls fn with the values of a bucket, which may be nil.
func each(b *bolt.Bucket, fn func(k, v []byte)) {
	if b == nil {
		return
	}
	_ = b.ForEach(func(k, v []byte) error {
		if v != nil {
			fn(k, v)
		}
		return nil
	})
}

// checkContainers looks at the records that clients of containerd's API keep. What they refer
// to is these clients' own business.
func (s *Store) checkContainers(tx *bolt.Tx, ns string) (found []Finding) {
	_, collectors := s.gc.rooms()
	each(NamespaceBucket(tx, ns, sectionContainers), func(k, v []byte) {
		var r containerRecord
		if err := decode(v, &r); err != nil {
			found = append(found, Finding{Room: roomStore, Problem: ProblemRecord, Severity: Damage, Namespace: ns, Object: sectionContainers + " " + string(k), Detail: err.Error()})
			return
		}
		c := collectors[resourceSnapshots+r.Snapshotter]
		if c == nil || r.SnapshotKey == "" {
			return
		}
		if _, err := c.Node(tx, ns, r.SnapshotKey); errdefs.IsNotFound(err) {
			found = append(found, Finding{
				Room: roomStore, Problem: ProblemReference, Severity: Note, Namespace: ns, Object: "container " + string(k),
				Detail: fmt.Sprintf("its snapshot %s of %s is not there", r.SnapshotKey, r.Snapshotter),
			})
		}
	})
	return found
}

// checkLeases looks at leases, and at what they hold. To hold what is not there is allowed:
// a client may have deleted it.
func (s *Store) checkLeases(tx *bolt.Tx, ns string) (found []Finding) {
	all := NamespaceBucket(tx, ns, sectionLeases)
	if all == nil {
		return nil
	}
	_, collectors := s.gc.rooms()
	_ = all.ForEachBucket(func(k []byte) error {
		b := all.Bucket(k)
		if _, err := readLease(b); err != nil {
			found = append(found, Finding{Room: roomStore, Problem: ProblemRecord, Severity: Damage, Namespace: ns, Object: resourceLeases + " " + string(k), Detail: err.Error()})
		}
		for _, r := range leaseResources(b) {
			there := true
			switch r.Type {
			case resourceContent:
				_, err := readBlob(tx, ns, digest.Digest(r.ID))
				there = !errdefs.IsNotFound(err)
			case resourceImages:
				_, err := readRecord[imageRecord](NamespaceBucket(tx, ns, sectionImages), r.ID)
				there = !errdefs.IsNotFound(err)
			case resourceIngests:
				_, err := os.Lstat(s.blobs.ingestDir(ingestName(ns, r.ID)))
				there = err == nil
			default:
				if c := collectors[r.Type]; c != nil {
					_, err := c.Node(tx, ns, r.ID)
					there = !errdefs.IsNotFound(err)
				}
			}
			if !there {
				found = append(found, Finding{
					Room: roomStore, Problem: ProblemReference, Severity: Note, Namespace: ns, Object: fmt.Sprintf("lease %s: %s %s", k, r.Type, r.ID),
					Detail: "the lease holds what is not there",
				})
			}
		}
		return nil
	})
	return found
}

// checkBlob compares one blob's file with what the metadata says.
func (s *Store) checkBlob(ctx context.Context, d digest.Digest, b *blobState, o CheckOptions, done, total int64) (Finding, bool, error) {
	f := Finding{Room: roomStore, Severity: Damage, Namespace: strings.Join(b.namespaces, " "), Object: d.String()}
	problem, detail, err := s.blobProblem(ctx, d, b, o, done, total)
	if err != nil || problem == "" {
		return f, false, err
	}
	// Again, when nobody is about to remove it, nor to give it its name.
	l := s.blobs.lock(d)
	l.Lock()
	defer l.Unlock()
	named := false
	if err := s.db.View(ctx, func(tx *bolt.Tx) error { named = blobNamed(tx, d); return nil }); err != nil || !named {
		return f, false, err
	}
	if problem != ProblemDigest { // the file of a name never changes, but it may have come or gone
		problem, detail, err = s.blobProblem(ctx, d, b, CheckOptions{}, 0, 0)
	}
	f.Problem, f.Detail = problem, detail
	return f, problem != "", err
}

func (s *Store) blobProblem(ctx context.Context, d digest.Digest, b *blobState, o CheckOptions, done, total int64) (problem, detail string, err error) {
	st, err := os.Lstat(s.blobs.path(d))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return ProblemMissing, "its file is missing", nil
	case err != nil:
		return "", "", err
	case !st.Mode().IsRegular():
		return ProblemSize, "it is not a regular file", nil
	case st.Size() != b.size || b.conflict:
		return ProblemSize, fmt.Sprintf("its file has %d bytes instead of %d", st.Size(), b.size), nil
	case !o.Deep:
		return "", "", nil
	}
	file, err := os.Open(s.blobs.path(d))
	if errors.Is(err, fs.ErrNotExist) {
		return ProblemMissing, "its file is missing", nil
	}
	if err != nil {
		return "", "", err
	}
	defer file.Close()
	v := d.Verifier()
	buf := make([]byte, 1<<20)
	for {
		n, err := file.Read(buf)
		_, _ = v.Write(buf[:n])
		done += int64(n)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return ProblemDigest, fmt.Sprintf("its file cannot be read: %v", err), nil
		}
		if err := ctx.Err(); err != nil {
			return "", "", err
		}
		o.Report("hashing blobs", done, total)
	}
	if !v.Verified() {
		return ProblemDigest, "its bytes have another digest", nil
	}
	return "", "", nil
}

// checkFiles looks for files that no metadata names, and for what is no blob at all.
func (s *Store) checkFiles(ctx context.Context) (found []Finding, err error) {
	stray := func(path string) {
		rel, _ := filepath.Rel(s.root, path)
		found = append(found, Finding{Room: roomStore, Problem: ProblemStray, Severity: Leftover, Object: rel, Detail: "hako makes no file of this name here"})
	}
	known := map[string]bool{}
	for _, a := range algorithms {
		known[a.String()] = true
	}
	top, err := os.ReadDir(s.blobs.dir)
	if err != nil {
		return nil, err
	}
	for _, e := range top {
		if e.Name() != "blobs" && e.Name() != "ingest" {
			stray(filepath.Join(s.blobs.dir, e.Name()))
		}
	}
	algs, err := os.ReadDir(filepath.Join(s.blobs.dir, "blobs"))
	if err != nil {
		return nil, err
	}
	for _, alg := range algs {
		dir := filepath.Join(s.blobs.dir, "blobs", alg.Name())
		if !known[alg.Name()] || !alg.IsDir() {
			stray(dir)
			continue
		}
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			d := digest.NewDigestFromEncoded(digest.Algorithm(alg.Name()), e.Name())
			if d.Validate() != nil {
				stray(filepath.Join(dir, e.Name()))
				continue
			}
			orphan, size, err := s.orphan(ctx, d)
			if err != nil {
				return nil, err
			}
			if orphan {
				found = append(found, Finding{Room: roomStore, Problem: ProblemOrphan, Severity: Leftover, Object: d.String(), Detail: fmt.Sprintf("no namespace has this blob of %d bytes", size)})
			}
		}
	}
	return found, nil
}

// orphan tells whether a blob's file is there and no namespace has it, when nobody is about
// to change that.
func (s *Store) orphan(ctx context.Context, d digest.Digest) (orphan bool, size int64, err error) {
	named := func() (n bool, err error) {
		err = s.db.View(ctx, func(tx *bolt.Tx) error { n = blobNamed(tx, d); return nil })
		return n, err
	}
	if n, err := named(); n || err != nil {
		return false, 0, err
	}
	l := s.blobs.lock(d)
	l.Lock()
	defer l.Unlock()
	if n, err := named(); n || err != nil {
		return false, 0, err
	}
	st, err := os.Lstat(s.blobs.path(d))
	if errors.Is(err, fs.ErrNotExist) {
		return false, 0, nil
	}
	if err != nil {
		return false, 0, err
	}
	return true, st.Size(), nil
}

// checkIngests looks for ingests that cannot be taken up. One that is being made has a
// writer.
func (s *Store) checkIngests(context.Context) (found []Finding, err error) {
	names, err := s.blobs.ingests()
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if !s.blobs.acquire(name) {
			continue
		}
		_, _, err := s.blobs.readIngest(name)
		_, gone := os.Lstat(s.blobs.ingestDir(name))
		s.blobs.release(name)
		if err != nil && gone == nil {
			found = append(found, Finding{Room: roomStore, Problem: ProblemIngest, Severity: Leftover, Object: name, Detail: fmt.Sprintf("a download that cannot be taken up: %v", err)})
		}
	}
	return found, nil
}

// Repair does away with what Check found, and tells how. The bytes of a damaged blob go
// at once, so that a pull can bring them back; that a namespace has it stays, because only
// the image room knows where to get it. ErrUnavailable: nothing can be done here now.
func (s *Store) Repair(ctx context.Context, f Finding, _ func(Node) bool) (done string, err error) {
	defer func() { err = wrap(err, "repair %s", f.Object) }()
	switch f.Problem {
	case ProblemRecord:
		return s.dropRecord(ctx, f)
	case ProblemSize, ProblemDigest:
		d := digest.Digest(f.Object)
		if err := validDigest(d); err != nil {
			return "", err
		}
		l := s.blobs.lock(d)
		l.Lock()
		defer l.Unlock()
		if err := os.RemoveAll(s.blobs.path(d)); err != nil {
			return "", err
		}
		return "removed its bytes", nil
	case ProblemMissing:
		return "dropped: nothing refers to it", s.DropMissing(ctx, digest.Digest(f.Object))
	case ProblemOrphan:
		_, err := s.removeUnnamed(ctx, digest.Digest(f.Object))
		return "removed", err
	case ProblemStray:
		if !filepath.IsLocal(f.Object) {
			return "", errdefs.ErrInvalidArgument
		}
		return "removed", os.RemoveAll(filepath.Join(s.root, f.Object))
	case ProblemIngest:
		if !s.blobs.acquire(f.Object) {
			return "", errdefs.ErrUnavailable
		}
		defer s.blobs.release(f.Object)
		return "removed", s.blobs.removeIngest(f.Object)
	}
	return "", errdefs.ErrUnavailable
}

// DropMissing takes a blob whose bytes are gone from all namespaces, unless an image
// refers to it: ErrFailedPrecondition.
func (s *Store) DropMissing(ctx context.Context, d digest.Digest) error {
	l := s.blobs.lock(d)
	l.Lock()
	defer l.Unlock()
	if _, err := os.Lstat(s.blobs.path(d)); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("content %s: its bytes are there: %w", d, errdefs.ErrFailedPrecondition)
	}
	_, collectors := s.gc.rooms()
	err := s.db.Update(ctx, func(tx *bolt.Tx) error {
		return EachNamespace(tx, func(ns string) error {
			b := NamespaceBucket(tx, ns, sectionContent)
			if b == nil || b.Get([]byte(d)) == nil {
				return nil
			}
			w := &walk{damaged: map[string]bool{}}
			s.markImages(tx, ns, time.Time{}, w) // whatever is expired may still be in use
			seen := map[Node]bool{}
			reach(w.roots, seen, func(n Node) []Node { return s.liveRefs(tx, collectors, n) })
			if seen[ContentNode(ns, d)] {
				return fmt.Errorf("an image refers to it: %w", errdefs.ErrFailedPrecondition)
			}
			return b.Delete([]byte(d))
		})
	})
	return wrap(err, "content %s", d)
}

// dropRecord removes a record that cannot be read, if that is still so.
func (s *Store) dropRecord(ctx context.Context, f Finding) (string, error) {
	typ, id, ok := strings.Cut(f.Object, " ")
	if !ok {
		return "", errdefs.ErrInvalidArgument
	}
	size := int64(-1)
	if typ == resourceContent {
		size = s.verifiedSize(digest.Digest(id))
	}
	err := s.db.Update(ctx, func(tx *bolt.Tx) error {
		again := s.checkRecords(tx, map[digest.Digest]*blobState{})
		if !slices.ContainsFunc(again, func(g Finding) bool { return g.Key() == f.Key() }) {
			return nil
		}
		switch typ {
		case "namespace":
			b := Bucket(tx, string(bucketNS), f.Namespace)
			if b == nil || validNamespace(f.Namespace) != nil {
				return fmt.Errorf("its name is damaged: %w", errdefs.ErrUnavailable)
			}
			return b.Delete(keyNSLabels)
		case resourceContent:
			if size >= 0 {
				t := now()
				return s.putBlob(tx, f.Namespace, digest.Digest(id), blobRecord{Size: size, Created: t, Updated: t})
			}
			return NamespaceBucket(tx, f.Namespace, typ).Delete([]byte(id))
		case resourceImages, sectionContainers, sectionSandboxes:
			return NamespaceBucket(tx, f.Namespace, typ).Delete([]byte(id))
		case resourceLeases:
			// What it holds is known all the same; it is kept for a while, as for a new lease.
			raw, err := encode(leaseRecord{Created: now(), Labels: map[string]string{labelExpire: now().Add(ingestGrace).Format(time.RFC3339)}})
			if err != nil {
				return err
			}
			return NamespaceBucket(tx, f.Namespace, sectionLeases).Bucket([]byte(id)).Put(keyLeaseInfo, raw)
		case "record":
			kind, id, _ := strings.Cut(id, " ")
			return Bucket(tx, string(bucketRecs), kind).Delete([]byte(id))
		}
		return errdefs.ErrInvalidArgument
	})
	switch {
	case typ == resourceLeases:
		return "made anew, to expire in a day", err
	case size >= 0:
		return "made anew, without its labels", err
	}
	return "dropped", err
}

// verifiedSize gives the size of a blob's file, or -1 if it does not hold that blob.
func (s *Store) verifiedSize(d digest.Digest) int64 {
	if validDigest(d) != nil {
		return -1
	}
	f, err := os.Open(s.blobs.path(d))
	if err != nil {
		return -1
	}
	defer f.Close()
	v := d.Verifier()
	n, err := io.Copy(v, f)
	if err != nil || !v.Verified() {
		return -1
	}
	return n
}

// HoldGC keeps garbage from being collected until release is called: a repair makes objects
// whose references come later.
func (s *Store) HoldGC() (release func()) {
	s.gc.run.Lock()
	return s.gc.run.Unlock
}
