package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

// Labels that containerd's garbage collection goes by.
const (
	labelRoot        = "containerd.io/gc.root"
	labelExpire      = "containerd.io/gc.expire"
	labelFlat        = "containerd.io/gc.flat"
	labelRefContent  = "containerd.io/gc.ref.content"
	labelRefSnapshot = "containerd.io/gc.ref.snapshot."
	labelRefImage    = "containerd.io/gc.ref.image"
	labelBackRef     = "containerd.io/gc.bref." // and what follows "ref." above, or "container"
)

const (
	ingestGrace = 24 * time.Hour // an ingest without writer that was written to since stays
	sweepChunk  = 256            // objects removed in one transaction
)

// Node is an object that can be garbage, or refer to what then is none.
type Node struct {
	Type      string // "content", "images", "leases", "snapshots/NAME"
	Namespace string
	ID        string
}

// SnapshotNode is the node of a snapshot.
func SnapshotNode(snapshotter, ns, key string) Node {
	return Node{Type: resourceSnapshots + snapshotter, Namespace: ns, ID: key}
}

// ContainerNode is the node of a container's record.
func ContainerNode(ns, id string) Node {
	return Node{Type: resourceContainers, Namespace: ns, ID: id}
}

// ContentNode is the node of a blob.
func ContentNode(ns string, d digest.Digest) Node {
	return Node{Type: resourceContent, Namespace: ns, ID: d.String()}
}

// Source names what another room needs, e.g. the snapshots of containers.
type Source interface {
	// Roots calls add for each object that must stay. It runs beside everything else.
	// An object that is made later than the walk began is safe, so a room names an
	// object here before it makes it.
	Roots(ctx context.Context, add func(Node)) error
}

// Collector is a room whose objects are collected: the snapshot room.
type Collector interface {
	// Type of the room's nodes.
	Type() string
	// Nodes calls fn for every object.
	Nodes(tx *bolt.Tx, fn func(Object)) error
	// Node gives one object: errdefs.ErrNotFound.
	Node(tx *bolt.Tx, ns, id string) (Object, error)
	// Remove removes an object's metadata, and gives how many bytes it used. One that
	// others build upon is errdefs.ErrFailedPrecondition, and is tried again after them.
	Remove(tx *bolt.Tx, ns, id string) (int64, error)
	// Cleanup removes what Remove left on disk.
	Cleanup(ctx context.Context) error
}

// Object is a node with what the collection needs to know of it.
type Object struct {
	Node
	Labels map[string]string
	Refs   []Node // besides those that labels name
	Root   bool   // stays without anybody referring to it
	// Damaged tells that the object's record cannot be read, so that it is not known
	// what it refers to. Nothing of its namespace is collected then.
	Damaged bool
}

// GCStats tell what one collection did.
type GCStats struct {
	Content   int // blobs taken from namespaces
	Snapshots int
	Leases    int // that had expired
	Images    int // that had expired
	Ingests   int // abandoned for more than a day
	Orphans   int // blob files without metadata
	Bytes     int64
	Marked    int           // objects in use
	Mark      time.Duration // walking, which holds nobody up
	Total     time.Duration
}

// collector is the state of garbage collection.
type collector struct {
	s     *Store
	delay time.Duration

	run sync.Mutex // held by the collection under way

	mu         sync.Mutex
	sources    []Source
	collectors map[string]Collector
	after      []func(context.Context)
	marking    bool
	touched    map[Node]bool // since the walk began

	kick   chan struct{} // nil: no background collection
	cancel context.CancelFunc
	ended  chan struct{}
}

func (c *collector) init(s *Store, delay time.Duration, manual bool) {
	c.s, c.delay, c.collectors = s, delay, map[string]Collector{}
	if manual {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.kick, c.cancel, c.ended = make(chan struct{}, 1), cancel, make(chan struct{})
	go c.loop(ctx)
}

func (c *collector) stop() {
	if c.cancel != nil {
		c.cancel()
		<-c.ended
	}
}

func (c *collector) schedule() {
	select {
	case c.kick <- struct{}{}:
	default: // one is due already, or collecting is manual
	}
}

func (c *collector) loop(ctx context.Context) {
	defer close(c.ended)
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.kick:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(c.delay):
		}
		select { // what was deleted during the delay is covered
		case <-c.kick:
		default:
		}
		st, err := c.s.GC(ctx)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			c.s.log.Error("garbage collection", "error", err)
		case st.Bytes > 0 || st.Content+st.Snapshots+st.Leases > 0:
			c.s.log.Debug("garbage collected", "content", st.Content, "snapshots", st.Snapshots, "leases", st.Leases, "ingests", st.Ingests, "orphans", st.Orphans, "bytes", st.Bytes, "took", st.Total)
		}
	}
}

// AddSource registers a room that names roots.
func (s *Store) AddSource(src Source) {
	s.gc.mu.Lock()
	defer s.gc.mu.Unlock()
	s.gc.sources = append(s.gc.sources, src)
}

// AddCollector registers a room whose objects are collected.
func (s *Store) AddCollector(c Collector) {
	s.gc.mu.Lock()
	defer s.gc.mu.Unlock()
	s.gc.collectors[c.Type()] = c
}

// ScheduleGC has garbage collected in the background, soon. Deleting images, leases
// and blobs does so by itself.
func (s *Store) ScheduleGC() { s.gc.schedule() }

// Touch tells a collection under way that an object came into use: it and all that
// it refers to stay. It must be called within the transaction that puts it into use.
func (s *Store) Touch(n Node) {
	s.gc.mu.Lock()
	defer s.gc.mu.Unlock()
	if s.gc.marking {
		s.gc.touched[n] = true
	}
}

// GC removes what nothing needs. It first walks over a picture of the metadata as it
// was at one moment, beside all other work; what came into use since (see Touch) is
// then walked again within the short transactions that remove the rest.
func (s *Store) GC(ctx context.Context) (st GCStats, err error) {
	s.gc.run.Lock()
	defer s.gc.run.Unlock()
	start := time.Now()
	defer func() {
		st.Total = time.Since(start)
		err = wrap(err, "collect garbage")
	}()
	s.gc.begin()
	defer s.gc.end()
	// An update that ran before touches were noted must be in the picture.
	if err := s.db.barrier(ctx); err != nil {
		return st, err
	}
	dead, marked, err := s.mark(ctx, start)
	if err != nil {
		return st, err
	}
	st.Marked, st.Mark = marked, time.Since(start)
	if err := s.sweep(ctx, dead, &st); err != nil {
		return st, err
	}
	err = errors.Join(s.sweepFiles(ctx, start, &st), s.cleanup(ctx))
	s.gc.finish(ctx)
	return st, err
}

func (c *collector) begin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.marking, c.touched = true, map[Node]bool{}
}

func (c *collector) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.marking, c.touched = false, nil
}

func (c *collector) rooms() ([]Source, map[string]Collector) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := make(map[string]Collector, len(c.collectors))
	for k, v := range c.collectors {
		m[k] = v
	}
	return append([]Source(nil), c.sources...), m
}

// walk is what mark finds out.
type walk struct {
	at      time.Time
	cond    func(ns string, labels map[string]string) []Node // condRefs
	objects map[Node][]Node                                  // collectable ones, with their references
	back    map[Node][]Node                                  // what an object keeps because that refers back to it
	roots   []Node
	flat    []Node          // kept without what they refer to
	expired []Node          // leases
	damaged map[string]bool // namespaces in which not all references are known
}

func (w *walk) add(n Node) { w.roots = append(w.roots, n) }

// mark gives the objects that nothing reached, and how many were reached.
func (s *Store) mark(ctx context.Context, at time.Time) (dead []Node, marked int, err error) {
	sources, collectors := s.gc.rooms()
	w := &walk{at: at, objects: map[Node][]Node{}, back: map[Node][]Node{}, damaged: map[string]bool{}}
	err = s.db.View(ctx, func(tx *bolt.Tx) error {
		w.cond = func(ns string, labels map[string]string) []Node { return condRefs(tx, collectors, ns, labels, at) }
		err := EachNamespace(tx, func(ns string) error {
			s.markImages(tx, ns, at, w)
			s.markContent(tx, ns, w)
			s.markContainers(tx, ns, w)
			s.markSandboxes(tx, ns, w)
			s.markLeases(tx, ns, at, w)
			return ctx.Err()
		})
		if err != nil {
			return err
		}
		for _, c := range collectors {
			if err := c.Nodes(tx, w.object); err != nil {
				return fmt.Errorf("%s: %w", c.Type(), err)
			}
		}
		return nil
	})
	if err != nil {
		return nil, 0, err
	}
	for _, src := range sources {
		if err := src.Roots(ctx, w.add); err != nil {
			// Without its roots nothing can be told from garbage.
			return nil, 0, fmt.Errorf("ask for what is in use: %w", err)
		}
	}
	seen := map[Node]bool{}
	reach(w.roots, seen, func(n Node) []Node { return append(slices.Clip(w.objects[n]), w.back[n]...) })
	for _, n := range w.flat {
		seen[n] = true
	}
	garbage := referrersFirst(w.objects, seen)
	marked = len(w.objects) - len(garbage)
	if len(w.damaged) > 0 {
		garbage = slices.DeleteFunc(garbage, func(n Node) bool { return w.damaged[n.Namespace] })
	}
	return append(w.expired, garbage...), marked, nil
}

// object takes an object of another room into the walk.
func (w *walk) object(o Object) {
	if o.Damaged {
		w.damaged[o.Namespace] = true
		return
	}
	w.objects[o.Node] = append(o.refs(), w.cond(o.Namespace, o.Labels)...)
	for _, n := range backRefs(o.Namespace, o.Labels) {
		w.back[n] = append(w.back[n], o.Node)
	}
	if o.Root || o.Labels[labelRoot] != "" || unexpired(o.Labels, w.at) {
		w.add(o.Node)
	}
}

// damage notes a record that cannot be read, and so may refer to anything.
func (s *Store) damage(w *walk, ns, typ, id string, err error) {
	w.damaged[ns] = true
	s.log.Error("a damaged record stops the collection of its namespace", "namespace", ns, "type", typ, "id", id, "error", err)
}

// reach adds what can be reached from roots to seen.
func reach(roots []Node, seen map[Node]bool, refs func(Node) []Node) {
	for len(roots) > 0 {
		n := roots[len(roots)-1]
		roots = roots[:len(roots)-1]
		if seen[n] {
			continue
		}
		seen[n] = true
		roots = append(roots, refs(n)...)
	}
}

// referrersFirst gives the objects that were not seen, each before those it refers
// to: a snapshot must go before its parent.
func referrersFirst(objects map[Node][]Node, seen map[Node]bool) (order []Node) {
	type step struct {
		n    Node
		next int
	}
	var path []step
	for n := range objects {
		path = append(path, step{n: n})
		for len(path) > 0 {
			top := &path[len(path)-1]
			refs, ok := objects[top.n]
			if !ok || top.next == 0 && seen[top.n] {
				path = path[:len(path)-1]
				continue
			}
			seen[top.n] = true
			if top.next < len(refs) {
				top.next++
				path = append(path, step{n: refs[top.next-1]})
				continue
			}
			order = append(order, top.n)
			path = path[:len(path)-1]
		}
	}
	slices.Reverse(order)
	return order
}

// markImages adds the images and what they hold. One whose time is over is an object like others: it
// stays only as long as something refers to it.
func (s *Store) markImages(tx *bolt.Tx, ns string, at time.Time, w *walk) {
	s.imageTable().mark(tx, w, ns, func(id string, r imageRecord) {
		n := Node{Type: resourceImages, Namespace: ns, ID: id}
		if expired(r.Labels, at) {
			w.object(Object{Node: n, Labels: r.Labels, Refs: []Node{ContentNode(ns, r.Target.Digest)}})
			return
		}
		w.roots = append(append(append(w.roots, n), imageRefs(ns, r)...), w.cond(ns, r.Labels)...)
	})
}

func imageRefs(ns string, r imageRecord) []Node {
	return append(labelRefs(ns, r.Labels), ContentNode(ns, r.Target.Digest))
}

func (s *Store) markContent(tx *bolt.Tx, ns string, w *walk) {
	b := NamespaceBucket(tx, ns, sectionContent)
	if b == nil {
		return
	}
	_ = b.ForEach(func(k, v []byte) error {
		n := Node{Type: resourceContent, Namespace: ns, ID: string(k)}
		var r blobRecord
		if err := decode(v, &r); err != nil {
			s.damage(w, ns, resourceContent, string(k), err)
			return nil
		}
		w.object(Object{Node: n, Labels: r.Labels})
		return nil
	})
}

// markLeases adds what live leases hold. What a lease with a damaged record holds is
// known all the same.
func (s *Store) markLeases(tx *bolt.Tx, ns string, at time.Time, w *walk) {
	all := NamespaceBucket(tx, ns, sectionLeases)
	if all == nil {
		return
	}
	_ = all.ForEachBucket(func(k []byte) error {
		b := all.Bucket(k)
		r, err := readLease(b)
		if err == nil && r.expired(at) {
			w.expired = append(w.expired, Node{Type: resourceLeases, Namespace: ns, ID: string(k)})
			return nil
		}
		for _, res := range leaseResources(b) {
			n := Node{Type: res.Type, Namespace: ns, ID: res.ID}
			if r.Labels[labelFlat] != "" {
				w.flat = append(w.flat, n)
			} else {
				w.add(n)
			}
		}
		return nil
	})
}

func (o Object) refs() []Node { return append(labelRefs(o.Namespace, o.Labels), o.Refs...) }

// labelRefs reads the references that labels name.
func labelRefs(ns string, labels map[string]string) (refs []Node) {
	for k, v := range labels {
		if v == "" {
			continue
		}
		if name, ok := strings.CutPrefix(k, labelRefSnapshot); ok {
			// What follows a slash only tells several references apart.
			name, _, _ = strings.Cut(name, "/")
			refs = append(refs, Node{Type: resourceSnapshots + name, Namespace: ns, ID: v})
			continue
		}
		if named(k, labelRefContent) {
			refs = append(refs, Node{Type: resourceContent, Namespace: ns, ID: v})
		} else if named(k, labelRefImage) {
			refs = append(refs, Node{Type: resourceImages, Namespace: ns, ID: v})
		}
	}
	return refs
}

// named says whether a label is of a kind; what follows a dot or a slash tells several apart.
func named(label, kind string) bool {
	rest, ok := strings.CutPrefix(label, kind)
	return ok && (rest == "" || rest[0] == '.' || rest[0] == '/')
}

// backRefs reads the objects that keep the one with these labels.
func backRefs(ns string, labels map[string]string) (keepers []Node) {
	for k, v := range labels {
		kind, ok := strings.CutPrefix(k, labelBackRef)
		if !ok || v == "" {
			continue
		}
		n := Node{Namespace: ns, ID: v}
		switch name, isSnapshot := strings.CutPrefix(kind, "snapshot."); {
		case isSnapshot:
			name, _, _ = strings.Cut(name, "/")
			n.Type = resourceSnapshots + name
		case named(kind, "content"):
			n.Type = resourceContent
		case named(kind, "image"):
			n.Type = resourceImages
		case named(kind, "container"):
			n.Type = resourceContainers
		default:
			continue
		}
		keepers = append(keepers, n)
	}
	return keepers
}

// keptBack tells whether one of the kept refers back to an object, which is kept then with
// all that it refers to.
func (s *Store) keptBack(tx *bolt.Tx, collectors map[string]Collector, n Node, kept map[Node]bool) bool {
	if len(kept) == 0 || !slices.ContainsFunc(backRefs(n.Namespace, s.liveLabels(tx, collectors, n)), func(k Node) bool { return kept[k] }) {
		return false
	}
	reach([]Node{n}, kept, func(n Node) []Node { return s.liveRefs(tx, collectors, n) })
	return true
}

func (s *Store) liveLabels(tx *bolt.Tx, collectors map[string]Collector, n Node) map[string]string {
	switch n.Type {
	case resourceContent:
		if r, err := readBlob(tx, n.Namespace, digest.Digest(n.ID)); err == nil {
			return r.Labels
		}
	case resourceImages:
		if r, err := readRecord[imageRecord](NamespaceBucket(tx, n.Namespace, sectionImages), n.ID); err == nil {
			return r.Labels
		}
	default:
		if c := collectors[n.Type]; c != nil {
			if o, err := c.Node(tx, n.Namespace, n.ID); err == nil {
				return o.Labels
			}
		}
	}
	return nil
}

// liveRefs gives an object's references as they are now.
func (s *Store) liveRefs(tx *bolt.Tx, collectors map[string]Collector, n Node) []Node {
	return append(s.plainRefs(tx, collectors, n), condRefs(tx, collectors, n.Namespace, s.liveLabels(tx, collectors, n), time.Now())...)
}

// plainRefs are those without conditions.
func (s *Store) plainRefs(tx *bolt.Tx, collectors map[string]Collector, n Node) []Node {
	switch n.Type {
	case resourceContent:
		if r, err := readBlob(tx, n.Namespace, digest.Digest(n.ID)); err == nil {
			return labelRefs(n.Namespace, r.Labels)
		}
	case resourceImages:
		if r, err := readRecord[imageRecord](NamespaceBucket(tx, n.Namespace, sectionImages), n.ID); err == nil {
			return imageRefs(n.Namespace, r)
		}
	case resourceContainers:
		if r, err := readRecord[containerRecord](NamespaceBucket(tx, n.Namespace, sectionContainers), n.ID); err == nil {
			return containerRefs(n.Namespace, r)
		}
	default:
		if c := collectors[n.Type]; c != nil {
			if o, err := c.Node(tx, n.Namespace, n.ID); err == nil {
				return o.refs()
			}
		}
	}
	return nil
}

// sweep removes the metadata of the dead, and the files of blobs.
func (s *Store) sweep(ctx context.Context, dead []Node, st *GCStats) error {
	_, collectors := s.gc.rooms()
	for len(dead) > 0 {
		chunk := dead[:min(sweepChunk, len(dead))]
		dead = dead[len(chunk):]
		var got swept
		err := s.db.Update(ctx, func(tx *bolt.Tx) error {
			got = swept{}
			kept := s.keptSince(tx, collectors)
			for _, n := range chunk {
				if kept[n] || s.keptBack(tx, collectors, n, kept) {
					continue
				}
				if err := s.sweepNode(tx, collectors, n, &got); err != nil {
					return fmt.Errorf("%s %q of namespace %s: %w", n.Type, n.ID, n.Namespace, err)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		st.Leases += got.leases
		st.Images += got.images
		st.Snapshots += got.snapshots
		st.Content += len(got.blobs)
		st.Bytes += got.bytes
		s.publishSwept(ctx, got.removed)
		for _, d := range got.blobs {
			n, err := s.removeUnnamed(ctx, d)
			if err != nil {
				return err
			}
			st.Bytes += n
		}
	}
	return nil
}

// swept is what one transaction removed.
type swept struct {
	leases, snapshots int
	images            int
	bytes             int64
	blobs             []digest.Digest
	removed           []Node // blobs, images and snapshots
}

func (s *Store) sweepNode(tx *bolt.Tx, collectors map[string]Collector, n Node, got *swept) error {
	switch n.Type {
	case resourceContent:
		b := NamespaceBucket(tx, n.Namespace, sectionContent)
		if b == nil || b.Get([]byte(n.ID)) == nil {
			return nil
		}
		got.blobs = append(got.blobs, digest.Digest(n.ID))
		got.removed = append(got.removed, n)
		return b.Delete([]byte(n.ID))
	case resourceImages:
		b := NamespaceBucket(tx, n.Namespace, sectionImages)
		r, err := readRecord[imageRecord](b, n.ID)
		if errdefs.IsNotFound(err) || err == nil && !expired(r.Labels, time.Now()) {
			return nil
		}
		if err != nil {
			return err
		}
		got.images++
		got.removed = append(got.removed, n)
		return b.Delete([]byte(n.ID))
	case resourceLeases:
		b := NamespaceBucket(tx, n.Namespace, sectionLeases)
		if b == nil || b.Bucket([]byte(n.ID)) == nil {
			return nil
		}
		if r, err := readLease(b.Bucket([]byte(n.ID))); err != nil || !r.expired(time.Now()) {
			return nil // another one was made of that name
		}
		got.leases++
		return b.DeleteBucket([]byte(n.ID))
	}
	c := collectors[n.Type]
	if c == nil {
		return nil
	}
	size, err := c.Remove(tx, n.Namespace, n.ID)
	switch {
	case errdefs.IsNotFound(err), errdefs.IsFailedPrecondition(err): // gone, or others build upon it now
		return nil
	case err != nil:
		return err
	}
	got.snapshots++
	got.removed = append(got.removed, n)
	got.bytes += size
	return nil
}

// keptSince walks from what came into use since the collection began.
func (s *Store) keptSince(tx *bolt.Tx, collectors map[string]Collector) map[Node]bool {
	s.gc.mu.Lock()
	touched := make([]Node, 0, len(s.gc.touched))
	for n := range s.gc.touched {
		touched = append(touched, n)
	}
	s.gc.mu.Unlock()
	kept := map[Node]bool{}
	reach(touched, kept, func(n Node) []Node { return s.liveRefs(tx, collectors, n) })
	return kept
}

// sweepFiles removes blob files that no namespace has, and abandoned ingests.
func (s *Store) sweepFiles(ctx context.Context, at time.Time, st *GCStats) error {
	for _, a := range algorithms {
		entries, err := os.ReadDir(s.blobs.algDir(a))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		var unnamed []digest.Digest
		err = s.db.View(ctx, func(tx *bolt.Tx) error {
			for _, e := range entries {
				d := digest.NewDigestFromEncoded(a, e.Name())
				if d.Validate() == nil && !blobNamed(tx, d) {
					unnamed = append(unnamed, d)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, d := range unnamed {
			n, err := s.removeUnnamed(ctx, d)
			if err != nil {
				return err
			}
			if n > 0 {
				st.Orphans++
				st.Bytes += n
			}
		}
	}
	return s.sweepIngests(ctx, at, st)
}

func (s *Store) sweepIngests(ctx context.Context, at time.Time, st *GCStats) error {
	names, err := s.blobs.ingests()
	if err != nil {
		return err
	}
	for _, name := range names {
		if !s.blobs.acquire(name) {
			continue
		}
		n, err := s.sweepIngest(ctx, name, at)
		s.blobs.release(name)
		if err != nil {
			return err
		}
		if n >= 0 {
			st.Ingests++
			st.Bytes += n
		}
	}
	return nil
}

// sweepIngest removes an ingest that is old and not leased, and gives its bytes; -1
// if it stays.
func (s *Store) sweepIngest(ctx context.Context, name string, at time.Time) (int64, error) {
	dir := s.blobs.ingestDir(name)
	last := time.Time{}
	for _, p := range []string{dir, filepath.Join(dir, "data")} {
		if info, err := os.Lstat(p); err == nil && info.ModTime().After(last) {
			last = info.ModTime()
		}
	}
	r, size, err := s.blobs.readIngest(name)
	if err == nil && at.Sub(last) < ingestGrace {
		return -1, nil
	}
	// One that cannot be taken up is what a crash left at its beginning or its end.
	if err == nil {
		held := false
		err = s.db.View(ctx, func(tx *bolt.Tx) error {
			held = ingestLeased(tx, r.Namespace, r.Ref, at)
			return nil
		})
		if err != nil || held {
			return -1, err
		}
	}
	return size, s.blobs.removeIngest(name)
}

func ingestLeased(tx *bolt.Tx, ns, ref string, at time.Time) (held bool) {
	all := NamespaceBucket(tx, ns, sectionLeases)
	if all == nil {
		return false
	}
	_ = all.ForEachBucket(func(k []byte) error {
		r, err := readLease(all.Bucket(k))
		if (err != nil || !r.expired(at)) && leaseHolds(tx, ns, string(k), resourceIngests, ref) {
			held = true
		}
		return nil
	})
	return held
}

func (s *Store) cleanup(ctx context.Context) error {
	_, collectors := s.gc.rooms()
	var errs []error
	for _, c := range collectors {
		errs = append(errs, c.Cleanup(ctx))
	}
	return errors.Join(errs...)
}
