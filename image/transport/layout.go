package transport

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/image/manifest"
)

const (
	// AnnotationName is what containerd and Docker name an image by in an index.json.
	AnnotationName = "io.containerd.image.name"

	dockerManifestFile = "manifest.json"
	maxIndex           = 16 << 20 // bytes of an index.json or manifest.json
)

// files is a read-only tree: a folder, or an archive.
type files interface {
	// open gives a regular file from an offset on, and its whole size.
	open(name string, offset int64) (io.ReadCloser, int64, error)
	Close() error
}

// folder is a tree that no symbolic link leads out of.
type folder struct{ *os.Root }

func openFolder(dir string) (folder, error) {
	r, err := os.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return folder{}, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return folder{r}, err
}

func (f folder) open(name string, offset int64) (io.ReadCloser, int64, error) {
	// Nonblocking: a FIFO in the place of a file would hang us.
	file, err := f.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fmt.Errorf("%s: %w", name, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, 0, err
	}
	st, err := file.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file: %w", name, errdefs.ErrInvalidArgument)
	}
	if err == nil && offset > 0 {
		_, err = file.Seek(offset, io.SeekStart)
	}
	if err != nil {
		file.Close()
		return nil, 0, err
	}
	return file, st.Size(), nil
}

// openBlob opens a blob from offset on. path is how its file is called; nothing is opened for what
// is no digest.
func openBlob(f files, r Ref, path func(digest.Digest) string, d ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	if err := manifest.ValidDigest(d.Digest); err != nil {
		return nil, err
	}
	rc, size, err := f.open(path(d.Digest), offset)
	if err != nil {
		return nil, fmt.Errorf("%s: blob %s: %w", r, d.Digest, err)
	}
	if size != d.Size {
		rc.Close()
		return nil, fmt.Errorf("%s: blob %s has %d bytes, not %d: %w", r, d.Digest, size, d.Size, errdefs.ErrDataLoss)
	}
	return rc, nil
}

// readSmall reads a whole file of at most limit bytes.
func readSmall(f files, name string, limit int64) ([]byte, error) {
	rc, size, err := f.open(name, 0)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	if size > limit {
		return nil, fmt.Errorf("%s is larger than %d bytes: %w", name, limit, errdefs.ErrResourceExhausted)
	}
	return io.ReadAll(io.LimitReader(rc, limit))
}

func blobPath(d digest.Digest) string {
	return path.Join(ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
}

// layoutSource is an image in an OCI layout.
type layoutSource struct {
	f     files
	ref   Ref
	index ocispec.Index
}

// OpenLayout gives an image of a layout's folder.
func OpenLayout(r Ref) (Source, error) {
	f, err := openFolder(r.Path)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", r, err)
	}
	s, err := newLayout(f, r)
	if err != nil {
		f.Close()
		return nil, err
	}
	return s, nil
}

func newLayout(f files, r Ref) (*layoutSource, error) {
	raw, err := readSmall(f, ocispec.ImageIndexFile, maxIndex)
	if err != nil {
		if errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("%s: not an OCI layout: it has no %s: %w", r, ocispec.ImageIndexFile, errdefs.ErrInvalidArgument)
		}
		return nil, fmt.Errorf("%s: %w", r, err)
	}
	idx, err := parseLayoutIndex(r.String(), raw)
	if err != nil {
		return nil, err
	}
	return &layoutSource{f: f, ref: r, index: idx}, nil
}

func parseLayoutIndex(what string, raw []byte) (idx ocispec.Index, err error) {
	if _, err := manifest.TopLevel(raw); err != nil {
		return idx, fmt.Errorf("%s: %s: %w: %w", what, ocispec.ImageIndexFile, err, errdefs.ErrInvalidArgument)
	}
	if err := json.Unmarshal(raw, &idx); err != nil {
		return idx, fmt.Errorf("%s: %s: %w: %w", what, ocispec.ImageIndexFile, err, errdefs.ErrInvalidArgument)
	}
	for _, d := range idx.Manifests {
		if err := manifest.ValidDescriptor(d); err != nil {
			return idx, fmt.Errorf("%s: %s: %w", what, ocispec.ImageIndexFile, err)
		}
	}
	return idx, nil
}

// names are those that an entry of an index.json goes by.
func names(d ocispec.Descriptor) []string {
	var out []string
	for _, k := range []string{AnnotationName, ocispec.AnnotationRefName} {
		if n := d.Annotations[k]; n != "" && !slices.Contains(out, n) {
			out = append(out, n)
		}
	}
	return out
}

// goesBy says whether an entry has a name, written as it is or in full.
func goesBy(d ocispec.Descriptor, tag string) bool {
	list := names(d)
	if slices.Contains(list, tag) {
		return true
	}
	n, err := reference.ParseNormalizedNamed(tag)
	return err == nil && slices.Contains(list, reference.TagNameOnly(n).String())
}

// find looks an entry up.
func (s *layoutSource) find(tag string, dig digest.Digest) (ocispec.Descriptor, error) {
	var found []ocispec.Descriptor
	var all []string
	for _, d := range s.index.Manifests {
		all = append(all, names(d)...)
		match := tag == "" && dig == "" && d.ArtifactType == "" || tag != "" && goesBy(d, tag) || dig != "" && d.Digest == dig
		if match && !slices.ContainsFunc(found, func(f ocispec.Descriptor) bool { return f.Digest == d.Digest }) {
			found = append(found, d)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) == 0 && dig != "":
		return ocispec.Descriptor{Digest: dig}, nil // something that an entry leads to
	case len(found) == 0 && tag == "":
		return ocispec.Descriptor{}, fmt.Errorf("%s holds no image: %w", s.ref, errdefs.ErrNotFound)
	case len(found) == 0:
		return ocispec.Descriptor{}, fmt.Errorf("%s: no image %q, there are: %s: %w", s.ref, tag, clipList(all), errdefs.ErrNotFound)
	}
	return ocispec.Descriptor{}, fmt.Errorf("%s holds %d images, name one of: %s: %w", s.ref, len(found), clipList(all), errdefs.ErrInvalidArgument)
}

func clipList(all []string) string {
	slices.Sort(all)
	all = slices.Compact(all)
	if len(all) == 0 {
		return "none with a name"
	}
	if len(all) > 20 {
		all = append(all[:20:20], "...")
	}
	for i, s := range all {
		if all[i] = fmt.Sprintf("%q", s); s == "..." {
			all[i] = s
		}
	}
	return strings.Join(all, ", ")
}

func (s *layoutSource) Top(ctx context.Context) (ocispec.Descriptor, []byte, error) {
	return s.get(ctx, s.ref.Tag, s.ref.Digest)
}

func (s *layoutSource) Tagged(ctx context.Context, tag string) (ocispec.Descriptor, []byte, error) {
	return s.get(ctx, tag, "")
}

func (s *layoutSource) get(ctx context.Context, tag string, dig digest.Digest) (ocispec.Descriptor, []byte, error) {
	d, err := s.find(tag, dig)
	if err != nil {
		return d, nil, err
	}
	raw, err := s.Document(ctx, d)
	if err != nil {
		return d, nil, err
	}
	doc, err := manifest.Parse(s.ref.String(), d.MediaType, raw)
	if err != nil {
		return d, nil, err
	}
	return ocispec.Descriptor{MediaType: doc.MediaType, Digest: d.Digest, Size: int64(len(raw))}, raw, nil
}

func (s *layoutSource) Document(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	if err := manifest.ValidDigest(d.Digest); err != nil {
		return nil, err
	}
	raw, err := readSmall(s.f, blobPath(d.Digest), manifest.MaxSize)
	if err != nil {
		return nil, fmt.Errorf("%s: manifest %s: %w", s.ref, d.Digest, err)
	}
	if got := d.Digest.Algorithm().FromBytes(raw); got != d.Digest {
		return nil, fmt.Errorf("%s: manifest %s has digest %s: %w", s.ref, d.Digest, got, errdefs.ErrDataLoss)
	}
	return raw, nil
}

func (s *layoutSource) Blob(_ context.Context, d ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	return openBlob(s.f, s.ref, blobPath, d, offset)
}

// Referrers are entries of the index.json with that subject, and those under the tag that
// registries without an API for them have.
func (s *layoutSource) Referrers(ctx context.Context, d digest.Digest) ([]ocispec.Descriptor, error) {
	var out []ocispec.Descriptor
	add := func(e ocispec.Descriptor) {
		if !slices.ContainsFunc(out, func(o ocispec.Descriptor) bool { return o.Digest == e.Digest }) {
			out = append(out, e)
		}
	}
	for _, e := range s.index.Manifests {
		if len(names(e)) > 0 {
			continue
		}
		raw, err := s.Document(ctx, e)
		if err != nil {
			return nil, err
		}
		doc, err := manifest.Parse(s.ref.String(), e.MediaType, raw)
		if err != nil {
			return nil, err
		}
		if sub := doc.Subject(); sub != nil && sub.Digest == d {
			add(ocispec.Descriptor{MediaType: doc.MediaType, Digest: e.Digest, Size: int64(len(raw)), ArtifactType: doc.ArtifactType(), Annotations: doc.Annotations()})
		}
	}
	_, raw, err := s.Tagged(ctx, strings.Replace(d.String(), ":", "-", 1))
	if errdefs.IsNotFound(err) {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	doc, err := manifest.Parse(s.ref.String(), "", raw)
	if err != nil || doc.Index == nil {
		return out, err
	}
	for _, e := range doc.Index.Manifests {
		add(e)
	}
	return out, nil
}

func (s *layoutSource) Close() error { return s.f.Close() }

// layoutDestination is a layout that an image goes to.
type layoutDestination struct {
	root *os.Root
	ref  Ref

	mu    sync.Mutex
	added []ocispec.Descriptor // entries for the index.json
}

// CreateLayout makes a layout, or adds to one that is there.
func CreateLayout(r Ref) (Destination, error) {
	if r.Digest != "" {
		return nil, fmt.Errorf("%s: a digest names no destination: %w", r, errdefs.ErrInvalidArgument)
	}
	if err := os.MkdirAll(r.Path, 0o755); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(r.Path)
	if err != nil {
		return nil, err
	}
	t := &layoutDestination{root: root, ref: r}
	if err := t.prepare(); err != nil {
		root.Close()
		return nil, fmt.Errorf("%s: %w", r, err)
	}
	return t, nil
}

func (t *layoutDestination) prepare() error {
	raw, err := readSmall(folder{t.root}, ocispec.ImageLayoutFile, 4096)
	switch {
	case errdefs.IsNotFound(err):
		entries, err := fs.ReadDir(t.root.FS(), ".")
		if err != nil {
			return err
		}
		for _, e := range entries {
			// Of an attempt that was interrupted, or of one beside us.
			if name := e.Name(); name != ocispec.ImageBlobsDir && !strings.HasPrefix(name, ocispec.ImageLayoutFile) && !strings.HasPrefix(name, ocispec.ImageIndexFile) {
				return fmt.Errorf("the folder is not empty, and is no OCI layout: %w", errdefs.ErrFailedPrecondition)
			}
		}
	case err != nil:
		return err
	default:
		var v ocispec.ImageLayout
		if json.Unmarshal(raw, &v) != nil || v.Version != ocispec.ImageLayoutVersion {
			return fmt.Errorf("layout of version %q: %w", v.Version, errdefs.ErrNotImplemented)
		}
	}
	return t.root.MkdirAll(path.Join(ocispec.ImageBlobsDir, "sha256"), 0o755)
}

// Complete is never sure: a layout may have lost what its documents name.
func (t *layoutDestination) Complete(context.Context, ocispec.Descriptor) bool { return false }

func (t *layoutDestination) Current(context.Context) (digest.Digest, error) {
	s, err := newLayout(folder{t.root}, t.ref)
	if err != nil {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	d, err := s.find(t.ref.Tag, "")
	return d.Digest, err
}

func (t *layoutDestination) Put(ctx context.Context, d ocispec.Descriptor, from Source, tell func(int64)) (Outcome, error) {
	if err := manifest.ValidDigest(d.Digest); err != nil {
		return Sent, err
	}
	name := blobPath(d.Digest)
	if st, err := t.root.Lstat(name); err == nil && st.Mode().IsRegular() && st.Size() == d.Size {
		return Present, nil
	}
	if d.Digest.Algorithm() != digest.SHA256 {
		if err := t.root.MkdirAll(path.Dir(name), 0o755); err != nil {
			return Sent, err
		}
	}
	return Sent, putFile(ctx, t.root, name, d, from, tell)
}

// putFile writes a blob as a file, which appears when it is whole and its digest right. What
// an interrupted attempt wrote is hashed, and gone on with.
func putFile(ctx context.Context, root *os.Root, name string, d ocispec.Descriptor, from Source, tell func(int64)) error {
	partial := name + ".partial"
	if st, err := root.Lstat(partial); err == nil && !st.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file: %w", partial, errdefs.ErrFailedPrecondition)
	}
	f, err := root.OpenFile(partial, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", partial, err)
	}
	// Another process may have finished it while we waited for the lock.
	if st, err := root.Lstat(name); err == nil && st.Mode().IsRegular() && st.Size() == d.Size {
		return nil
	}
	hash := d.Digest.Algorithm().Hash()
	off, err := io.Copy(hash, f)
	if err != nil {
		return err
	}
	again := off > 0
	if off > d.Size {
		off = 0
		hash.Reset()
		if err := f.Truncate(0); err != nil {
			return err
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
	}
	err = func() error {
		rc, err := from.Blob(ctx, d, off)
		if err != nil {
			return err
		}
		defer rc.Close()
		n, err := copyTold(io.MultiWriter(f, hash), io.LimitReader(rc, d.Size-off+1), off, tell)
		if err != nil {
			return err
		}
		if off+n != d.Size {
			return fmt.Errorf("blob %s has %d bytes or more, not %d: %w", d.Digest, off+n, d.Size, errdefs.ErrDataLoss)
		}
		if got := digest.NewDigest(d.Digest.Algorithm(), hash); got != d.Digest {
			return fmt.Errorf("blob %s has digest %s: %w", d.Digest, got, errdefs.ErrDataLoss)
		}
		return nil
	}()
	if errdefs.IsDataLoss(err) {
		if rerr := root.Remove(partial); rerr != nil {
			return errors.Join(err, rerr)
		}
		if again { // what was left may have been the damaged part
			f.Close()
			return putFile(ctx, root, name, d, from, tell)
		}
	}
	if err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return root.Rename(partial, name)
}

// copyTold copies and tells how far it came.
func copyTold(w io.Writer, r io.Reader, off int64, tell func(int64)) (n int64, err error) {
	buf := make([]byte, 256<<10)
	for {
		k, rerr := r.Read(buf)
		if k > 0 {
			if _, err := w.Write(buf[:k]); err != nil {
				return n, err
			}
			if n += int64(k); tell != nil {
				tell(off + n)
			}
		}
		if rerr == io.EOF {
			return n, nil
		}
		if rerr != nil {
			return n, rerr
		}
	}
}

func (t *layoutDestination) write(d ocispec.Descriptor, raw []byte) error {
	if err := manifest.ValidDigest(d.Digest); err != nil {
		return err
	}
	if err := t.root.MkdirAll(path.Join(ocispec.ImageBlobsDir, d.Digest.Algorithm().String()), 0o755); err != nil {
		return err
	}
	return replace(t.root, blobPath(d.Digest), raw)
}

// replace writes a small file so that it is old or new, never half.
func replace(root *os.Root, name string, raw []byte) error {
	tmp := name + ".new"
	if err := root.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(raw)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = root.Rename(tmp, name)
	}
	return err
}

func (t *layoutDestination) PutDocument(_ context.Context, d ocispec.Descriptor, raw []byte) error {
	return t.write(d, raw)
}

func (t *layoutDestination) PutTagged(_ context.Context, tag string, d ocispec.Descriptor, raw []byte) error {
	return t.add(d, raw, tag)
}

func (t *layoutDestination) PutTop(_ context.Context, d ocispec.Descriptor, raw []byte) error {
	return t.add(d, raw, t.ref.Tag)
}

func (t *layoutDestination) add(d ocispec.Descriptor, raw []byte, tag string) error {
	if err := t.write(d, raw); err != nil {
		return err
	}
	e := entry(d, tag)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.added = append(t.added, e)
	return nil
}

// entry makes an entry of an index.json.
func entry(d ocispec.Descriptor, tag string) ocispec.Descriptor {
	e := ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
	if tag == "" {
		return e
	}
	e.Annotations = map[string]string{ocispec.AnnotationRefName: tag}
	if n, err := reference.ParseNormalizedNamed(tag); err == nil && strings.ContainsAny(tag, "/:") {
		e.Annotations[AnnotationName] = reference.TagNameOnly(n).String()
	}
	return e
}

func (t *layoutDestination) AddReferrer(_ context.Context, _ digest.Digest, d ocispec.Descriptor) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.added = append(t.added, ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size, ArtifactType: d.ArtifactType, Annotations: without(d.Annotations)})
	return nil
}

// without drops annotations that would name the entry.
func without(m map[string]string) map[string]string {
	var out map[string]string
	for k, v := range m {
		if k != AnnotationName && k != ocispec.AnnotationRefName {
			if out == nil {
				out = map[string]string{}
			}
			out[k] = v
		}
	}
	return out
}

// Commit enters what was put into the index.json. Several processes may do that at once.
func (t *layoutDestination) Commit(context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	lock, err := t.root.OpenFile(ocispec.ImageBlobsDir, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", t.ref, err)
	}
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	raw, err := readSmall(folder{t.root}, ocispec.ImageIndexFile, maxIndex)
	if err == nil {
		if idx, err = parseLayoutIndex(t.ref.String(), raw); err != nil {
			return err
		}
	} else if !errdefs.IsNotFound(err) {
		return err
	}
	merge(&idx, t.added)
	if raw, err = json.Marshal(idx); err != nil {
		return err
	}
	if err := replace(t.root, ocispec.ImageLayoutFile, []byte(`{"imageLayoutVersion":"`+ocispec.ImageLayoutVersion+`"}`)); err != nil {
		return err
	}
	if err := replace(t.root, ocispec.ImageIndexFile, raw); err != nil {
		return err
	}
	for _, dir := range []string{path.Join(ocispec.ImageBlobsDir, "sha256"), "."} {
		if err := syncDir(t.root, dir); err != nil {
			return err
		}
	}
	return nil
}

func syncDir(root *os.Root, dir string) error {
	f, err := root.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// merge enters entries: one name, one entry.
func merge(idx *ocispec.Index, added []ocispec.Descriptor) {
	for _, e := range added {
		idx.Manifests = slices.DeleteFunc(idx.Manifests, func(d ocispec.Descriptor) bool {
			if len(names(e)) == 0 {
				return len(names(d)) == 0 && d.Digest == e.Digest
			}
			if n := e.Annotations[AnnotationName]; n != "" {
				return d.Annotations[AnnotationName] == n
			}
			return d.Annotations[AnnotationName] == "" && d.Annotations[ocispec.AnnotationRefName] == e.Annotations[ocispec.AnnotationRefName]
		})
		idx.Manifests = append(idx.Manifests, e)
	}
	if idx.Manifests == nil {
		idx.Manifests = []ocispec.Descriptor{}
	}
}

func (t *layoutDestination) Close() error { return t.root.Close() }
