package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/transfer"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/hako-engine/hako/image/registry"
)

// Remote is an image at a registry.
type Remote struct {
	Reference string
	// Ask gives the credentials for a host of the registry; nil: as for Pull without Auth.
	Ask       func(host string) (Auth, error)
	Headers   http.Header // sent with each request
	HostDir   string      // of hosts.toml; "": the service's
	PlainHTTP bool        // unless hosts.toml says otherwise
}

// Stored says which part of an image is stored, or taken from the store, and by which names
// (containerd's transfer.ImageStore). Unlike Docker's, its names are taken as they are, and one
// that points to another image forgets it.
type Stored struct {
	Name       string // "": none but the References
	Labels     map[string]string
	Platforms  []ocispec.Platform // of which the layers are wanted; none: all
	Metadata   bool               // the documents of other platforms are wanted as well
	Limit      int                // of manifests that match a platform; 0: none
	References []NameRule
	Unpacks    []transfer.UnpackConfiguration // an empty snapshotter means the default one
}

// NameRule gives images further names (containerd's transfer.ImageReference).
type NameRule struct {
	Name            string
	IsPrefix        bool // of names that an archive tells, or that get a digest
	AllowOverwrite  bool // names that do not begin with the prefix are taken too
	AddDigest       bool // as @DIGEST
	SkipNamedDigest bool // where the archive told a name
}

func (t Stored) selection() selection {
	return selection{match: selectPlatforms(t.Platforms), metadata: t.Metadata, limit: t.Limit}
}

// repository prepares access to where a transfer goes to or comes from.
func (s *Service) repository(r Remote) (*registry.Repository, reference.Named, error) {
	named, err := parseName(r.Reference)
	if err != nil {
		return nil, nil, err
	}
	o := s.o.Registry
	o.Dir, o.UserAgent, o.Log = s.o.RegistryDir, s.o.UserAgent, s.o.Log
	if r.HostDir != "" {
		o.Dir = r.HostDir
	}
	o.PlainHTTP, o.Headers = r.PlainHTTP, r.Headers
	if r.Ask != nil {
		o.Ask = func(host string) (registry.Credentials, error) {
			a, err := r.Ask(host)
			return a.credentials(), err
		}
	}
	repo, err := registry.New(o).Repository(reference.TrimNamed(named), registry.Credentials{})
	return repo, named, err
}

// TransferPull brings an image, or any other artifact, from a registry into the store.
func (s *Service) TransferPull(ctx context.Context, from Remote, to Stored, tell transfer.ProgressFunc) (err error) {
	ctx = namespaced(ctx)
	defer func() { err = wrapf(err, "pull %s", from.Reference) }()
	repo, named, err := s.repository(from)
	if err != nil {
		return err
	}
	t := newTransfer(to.Name, tell, "downloading")
	t.say("Resolving from " + from.Reference)
	desc, body, err := repo.Manifest(ctx, tagOrDigest(named))
	if err != nil {
		return err
	}
	if err := s.allow(ctx, named, desc, repo); err != nil {
		return err
	}
	// An image may not take names of repositories with stricter rules either.
	for _, img := range to.records(desc, nil) {
		if as, err := reference.ParseNormalizedNamed(img.Name); err == nil && as.Name() != named.Name() {
			if err := s.mayName(ctx, img.Name, desc); err != nil {
				return err
			}
		}
	}
	t.say("Pulling from " + from.Reference)
	t.part("fetching image content", to.Name, nil, desc, 0)
	ctx, l, err := s.newLease(ctx)
	if err != nil {
		return err
	}
	defer l.release()
	root, err := tree(ctx, desc, to.selection(), func(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
		if d.Digest == desc.Digest {
			return body, nil
		}
		return s.fetchDocument(ctx, repo, d)
	})
	if err != nil {
		return err
	}
	t.learn(root)
	p := newProgress(t.line)
	w := s.newWork(l, "", p)
	w.repo = repo
	err = s.pullTree(ctx, w, root, to)
	p.close(ctx)
	w.release()
	if err != nil {
		return err
	}
	if _, err := s.storeNames(ctx, to, root.desc, nil, t); err != nil {
		return err
	}
	t.say("Completed pull from " + from.Reference)
	return nil
}

// pullTree fetches everything, and unpacks what is asked for while it arrives.
func (s *Service) pullTree(ctx context.Context, w *work, root *part, to Stored) error {
	blobs := root.allBlobs()
	isLayer := map[digest.Digest]bool{}
	_ = root.each(func(p *part) error {
		if p.doc.IsImage() {
			for _, l := range p.doc.Manifest.Layers {
				isLayer[l.Digest] = true
			}
		}
		return nil
	})
	var small, layers []ocispec.Descriptor
	for _, b := range blobs {
		if isLayer[b.Digest] {
			layers = append(layers, b)
		} else {
			small = append(small, b)
		}
	}
	// The configs say how to unpack.
	if err := s.fetchAll(ctx, w, small); err != nil {
		return err
	}
	done, err := s.unpackTree(ctx, w, root, to.Unpacks)
	if err != nil {
		return err
	}
	layers = slices.DeleteFunc(layers, func(d ocispec.Descriptor) bool { return done[d.Digest] })
	if err := s.fetchAll(ctx, w, layers); err != nil {
		return err
	}
	return s.putTree(ctx, w, root)
}

// putTree stores the documents.
func (s *Service) putTree(ctx context.Context, w *work, root *part) error {
	return root.each(func(p *part) error {
		err := w.put(ctx, p.desc, p.doc.Raw, p.labels())
		w.p.line(Progress{ID: short(p.desc.Digest), Action: "Download complete"})
		return err
	})
}

// fetchAll brings blobs into the store, side by side.
func (s *Service) fetchAll(ctx context.Context, w *work, blobs []ocispec.Descriptor) error {
	ns, _ := namespaces.Namespace(ctx)
	eg, ctx := errgroup.WithContext(ctx)
	eg.SetLimit(s.o.Downloads)
	for _, b := range blobs {
		eg.Go(func() error {
			unlock, err := s.blobs.Lock(ctx, ns+"\x00"+b.Digest.String())
			if err != nil {
				return err
			}
			defer unlock()
			f := &layerFlight{w: w, l: layer{desc: b}, id: short(b.Digest), tell: w.p.line}
			stored, err := f.stored(ctx)
			if err != nil {
				return fmt.Errorf("blob %s: %w", b.Digest, err)
			}
			if stored {
				f.say("Already exists", 0, 0)
				return nil
			}
			return wrapf(f.fetch(ctx), "blob %s", b.Digest)
		})
	}
	return eg.Wait()
}

// unpackTree makes snapshots of what a tree has for the platforms, and fetches the layers that
// are not here: done are those. A platform that the image is not for is passed over.
func (s *Service) unpackTree(ctx context.Context, w *work, root *part, unpacks []transfer.UnpackConfiguration) (done map[digest.Digest]bool, _ error) {
	done = map[digest.Digest]bool{}
	for _, u := range unpacks {
		found, c, err := s.imageOf(ctx, root, platforms.Only(platforms.Normalize(u.Platform)))
		if errors.Is(err, errNoImage) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if _, err := parseDocument("manifest "+found.desc.Digest.String(), found.desc.MediaType, found.doc.Raw); err != nil {
			return nil, err
		}
		name, _, err := s.snapshotter(u.Snapshotter)
		if err != nil {
			return nil, err
		}
		one := s.newWork(w.l, name, w.p)
		one.repo = w.repo
		err = one.unpack(ctx, found.doc.Manifest.Layers, c)
		if n := len(c.chain); err == nil && n > 0 {
			err = one.label(ctx, found.doc.Manifest.Config.Digest, map[string]string{labelSnapshot + name: c.chain[n-1].String()})
		}
		one.release()
		if err != nil {
			return nil, err
		}
		for _, d := range found.doc.Manifest.Layers {
			done[d.Digest] = true
		}
	}
	return done, nil
}

// TransferPush sends an image of the store to a registry.
func (s *Service) TransferPush(ctx context.Context, from Stored, to Remote, tell transfer.ProgressFunc) (err error) {
	ctx = namespaced(ctx)
	defer func() { err = wrapf(err, "push %s", to.Reference) }()
	repo, named, err := s.repository(to)
	if err != nil {
		return err
	}
	img, err := s.o.Images.Get(ctx, from.Name)
	if err != nil {
		return err
	}
	t := newTransfer(img.Name, tell, "uploading")
	t.say("Pushing to " + to.Reference)
	t.part("pushing content", img.Name, nil, img.Target, 0)
	root, err := tree(ctx, img.Target, from.selection(), s.readStored)
	if err != nil {
		return err
	}
	t.learn(root)
	p := newProgress(t.line)
	defer p.close(ctx)
	eg, egCtx := errgroup.WithContext(ctx)
	eg.SetLimit(uploads)
	for _, b := range root.allBlobs() {
		eg.Go(func() error { return s.pushBlob(egCtx, repo, b, p) })
	}
	if err := eg.Wait(); err != nil {
		return err
	}
	err = root.each(func(d *part) error {
		at := d.desc.Digest.String()
		if d == root {
			at = tagOrDigest(named)
		}
		done, err := repo.Turn(ctx, d.desc.Digest)
		if err != nil {
			return err
		}
		defer done()
		if _, err := repo.PutManifest(ctx, d.desc, d.doc.Raw, at); err != nil {
			return err
		}
		p.line(Progress{ID: short(d.desc.Digest), Action: "Pushed"})
		return nil
	})
	if err != nil {
		return err
	}
	p.close(ctx)
	t.part("pushed content", img.Name, nil, img.Target, img.Target.Size)
	t.say("Completed push to " + to.Reference)
	return nil
}

// readStored reads a document of the store.
func (s *Service) readStored(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	return readBlob(ctx, s.o.Content, d)
}

// pushBlob sends one blob unless the registry has it, or can take it from another repository.
func (s *Service) pushBlob(ctx context.Context, repo *registry.Repository, b ocispec.Descriptor, p *progress) error {
	id := short(b.Digest)
	done, err := repo.Turn(ctx, b.Digest)
	if err != nil {
		return err
	}
	defer done()
	// Asked first: what the registry has need not be here, as of platforms that were not pulled.
	has, err := repo.HasBlob(ctx, b.Digest)
	if err != nil {
		return err
	}
	if has {
		p.line(Progress{ID: id, Action: "Layer already exists"})
		return nil
	}
	info, err := s.o.Content.Info(ctx, b.Digest)
	if err != nil {
		return err
	}
	domain := (&url.URL{Host: repo.Domain()}).Hostname()
	mount, _, _ := strings.Cut(info.Labels[labelDistribution+domain], ",")
	if mount == reference.Path(repo.Name()) {
		mount = ""
	}
	open := func(ctx context.Context, offset int64) (io.ReadCloser, error) {
		ra, err := s.o.Content.ReaderAt(ctx, b)
		if err != nil {
			return nil, err
		}
		return &section{io.NewSectionReader(ra, offset, max(ra.Size()-offset, 0)), ra}, nil
	}
	p.line(Progress{ID: id, Action: "Pushing", Total: info.Size})
	_, err = repo.PutBlob(ctx, ocispec.Descriptor{MediaType: b.MediaType, Digest: b.Digest, Size: info.Size}, mount, open, func(n int64) {
		p.line(Progress{ID: id, Action: "Pushing", Current: n, Total: info.Size})
	})
	if err != nil {
		return err
	}
	p.line(Progress{ID: id, Action: "Pushed"})
	w := &work{s: s, repo: repo}
	labels := map[string]string{}
	w.source(labels)
	return w.label(ctx, b.Digest, labels)
}

// section is a part of a blob that closes the blob.
type section struct {
	io.Reader
	io.Closer
}

// TransferTag gives the target of one name to others.
func (s *Service) TransferTag(ctx context.Context, from, to Stored, tell transfer.ProgressFunc) error {
	ctx = namespaced(ctx)
	img, err := s.o.Images.Get(ctx, from.Name)
	if err != nil {
		return err
	}
	if err := s.mayStore(ctx, to, img.Target, nil); err != nil {
		return wrapf(err, "tag %s", from.Name)
	}
	_, err = s.storeNames(ctx, to, img.Target, nil, newTransfer("", tell, ""))
	return err
}

// mayStore asks whether a target may have the names that storeNames would give it.
func (s *Service) mayStore(ctx context.Context, to Stored, target ocispec.Descriptor, told map[string]string) error {
	for _, img := range to.records(target, told) {
		if err := s.mayName(ctx, img.Name, target); err != nil {
			return err
		}
	}
	return nil
}

// storeNames makes the records of a target. errdefs.ErrNotFound if there are none.
func (s *Service) storeNames(ctx context.Context, to Stored, target ocispec.Descriptor, told map[string]string, t *transferred) ([]images.Image, error) {
	list := to.records(target, told)
	if len(list) == 0 {
		return nil, fmt.Errorf("no image name found: %w", errdefs.ErrNotFound)
	}
	for i := range list {
		err := s.naming(ctx, func() (err error) { list[i], err = s.overwrite(ctx, list[i]); return err })
		if err != nil {
			return nil, err
		}
		t.part("saved", list[i].Name, nil, target, 0)
	}
	return list, nil
}

// records are those of a target: with told, by the names that an archive's annotations
// give it, else by name.
func (t Stored) records(target ocispec.Descriptor, told map[string]string) (list []images.Image) {
	extra := maps.Clone(t.Labels)
	if t.Name != "" {
		// They live as long as the main name does.
		if extra == nil {
			extra = map[string]string{}
		}
		extra["containerd.io/gc.bref.image"] = t.Name
		extra["containerd.io/gc.expire"] = time.Now().Format(time.RFC3339)
	}
	add := func(name string, labels map[string]string) {
		list = append(list, images.Image{Name: name, Target: target, Labels: labels})
	}
	byDigest := func(r NameRule) { add(r.Name+"@"+target.Digest.String(), extra) }
	if told == nil && t.Name != "" {
		add(t.Name, t.Labels)
	}
	for _, r := range t.References {
		switch {
		case told == nil && r.AddDigest:
			byDigest(r)
		case told == nil && !r.IsPrefix:
			add(r.Name, extra)
		case told == nil, !r.IsPrefix:
		default:
			name := r.nameOf(told)
			if name != "" {
				add(name, extra)
			}
			if r.AddDigest && (name == "" || !r.SkipNamedDigest) {
				byDigest(r)
			}
		}
	}
	return list
}

// overwrite makes a record, or lets the one of its name point elsewhere.
func (s *Service) overwrite(ctx context.Context, img images.Image) (images.Image, error) {
	for {
		out, err := s.o.Images.Create(ctx, img)
		if !errdefs.IsAlreadyExists(err) {
			return out, err
		}
		out, err = s.o.Images.Update(ctx, img)
		if !errdefs.IsNotFound(err) { // removed meanwhile
			return out, err
		}
	}
}

// nameOf gives the name that annotations tell: a whole one, or a tag of the prefix.
func (r NameRule) nameOf(annotations map[string]string) string {
	if n := annotations[annotationName]; n != "" {
		if r.AllowOverwrite || r.covers(n) {
			return n
		}
		return ""
	}
	n := annotations[ocispec.AnnotationRefName]
	switch {
	case n == "":
		return ""
	case !strings.ContainsAny(n, "/:@"):
		return r.Name + ":" + n
	case r.AllowOverwrite || r.covers(n):
		return n
	}
	return ""
}

// covers says whether a name is one of the prefix's repository, or of one below it.
func (r NameRule) covers(name string) bool {
	rest, ok := strings.CutPrefix(name, r.Name)
	return ok && rest != "" && strings.ContainsAny(rest[:1], "/:@")
}

// transferred turns steps into those that containerd's clients show.
type transferred struct {
	root    string
	moving  string // the word for bytes under way
	tell    transfer.ProgressFunc
	mu      sync.Mutex
	byShort map[string]knownPart
}

type knownPart struct {
	name    string
	parents []string
	desc    ocispec.Descriptor
}

func newTransfer(root string, tell transfer.ProgressFunc, moving string) *transferred {
	if tell == nil {
		tell = func(transfer.Progress) {}
	}
	return &transferred{root: root, tell: tell, moving: moving, byShort: map[string]knownPart{}}
}

func (t *transferred) say(event string) { t.tell(transfer.Progress{Event: event}) }

func (t *transferred) part(event, name string, parents []string, d ocispec.Descriptor, done int64) {
	t.tell(transfer.Progress{Event: event, Name: name, Parents: parents, Progress: done, Total: d.Size, Desc: &d})
}

// learn takes in the names of a tree's parts.
func (t *transferred) learn(root *part) {
	add := func(d ocispec.Descriptor, kind, parent string) string {
		name := kind + "-" + d.Digest.String()
		k, known := t.byShort[short(d.Digest)]
		if !known {
			k = knownPart{name: name, desc: d}
			t.part("waiting", name, []string{parent}, d, 0)
		}
		k.parents = append(k.parents, parent)
		t.byShort[short(d.Digest)] = k
		return name
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	var visit func(p *part, parent string)
	visit = func(p *part, parent string) {
		kind := "manifest"
		if p.doc.Index != nil {
			kind = "index"
		}
		name := add(p.desc, kind, parent)
		for _, c := range p.children {
			visit(c, name)
		}
		for i, b := range p.blobs {
			kind := "layer"
			if p.doc.Manifest != nil && i == 0 {
				kind = "config"
			}
			add(b, kind, name)
		}
	}
	visit(root, t.root)
}

// line is for progress.
func (t *transferred) line(v Progress) {
	t.mu.Lock()
	k, ok := t.byShort[v.ID]
	t.mu.Unlock()
	if !ok {
		return
	}
	switch {
	case v.Action == "Downloading" || v.Action == "Pushing":
		t.part(t.moving, k.name, k.parents, k.desc, v.Current)
	case v.Action == "Extracting":
		t.part("extracting", k.name, k.parents, k.desc, v.Current)
	case v.Action == "Already exists" || v.Action == "Layer already exists":
		t.part("already exists", k.name, k.parents, k.desc, k.desc.Size)
	case v.Action == "Pull complete":
		t.part("extracted", k.name, k.parents, k.desc, k.desc.Size)
	case v.Action == "Download complete" || v.Action == "Pushed":
		t.part("complete", k.name, k.parents, k.desc, k.desc.Size)
	}
}

func wrapf(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), err)
}
