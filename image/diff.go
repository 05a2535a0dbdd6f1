package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/image/unpack"
	"github.com/hako-engine/hako/internal/ctxio"
	"github.com/hako-engine/hako/snapshot"
)

var (
	_ diff.Applier  = (*Service)(nil)
	_ diff.Comparer = (*Service)(nil)
)

// layerCompression gives the compression that a layer's media type names.
func layerCompression(mediaType string) (unpack.Compression, error) {
	switch mediaType {
	case ocispec.MediaTypeImageLayer, images.MediaTypeDockerSchema2Layer, images.MediaTypeDockerSchema2LayerForeign,
		"application/vnd.oci.image.layer.nondistributable.v1.tar":
		return unpack.None, nil
	case "", ocispec.MediaTypeImageLayerGzip, images.MediaTypeDockerSchema2LayerGzip, images.MediaTypeDockerSchema2LayerForeignGzip,
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip":
		return unpack.Gzip, nil
	case ocispec.MediaTypeImageLayerZstd, images.MediaTypeDockerSchema2LayerZstd,
		"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd":
		return unpack.Zstd, nil
	}
	return "", fmt.Errorf("layer of type %q: %w", mediaType, errdefs.ErrNotImplemented)
}

// Apply unpacks a layer of the store onto mounts, and gives the descriptor of its plain form,
// whose digest is its diff id. Names in the layer are only resolved below the mounts' root.
func (s *Service) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (_ ocispec.Descriptor, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("apply layer %s: %w", desc.Digest, err)
		}
	}()
	var o diff.ApplyConfig
	for _, opt := range opts {
		if err := opt(ctx, desc, &o); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	if _, err := layerCompression(desc.MediaType); err != nil && !isErofs(desc.MediaType) {
		return ocispec.Descriptor{}, err
	}
	ra, err := s.o.Content.ReaderAt(ctx, desc)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer ra.Close()
	root, mode, err := layerRoot(mounts)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer root.Close()
	var diffID digest.Digest
	var size int64
	plain := ocispec.MediaTypeImageLayer
	if isErofs(desc.MediaType) {
		plain = erofsLayer
		diffID, size, err = s.applyErofs(ctx, root, ra, ra.Size(), desc, mode)
	} else {
		in := ctxio.Reader(ctx, io.NewSectionReader(ra, 0, ra.Size()), o.Progress)
		diffID, size, err = s.applyStream(ctx, root, in, mode)
	}
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if o.SyncFs {
		if err := unix.Syncfs(int(root.Fd())); err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("sync: %w", err)
		}
	}
	return ocispec.Descriptor{MediaType: plain, Digest: diffID, Size: size}, nil
}

// layerRoot opens where a layer goes. An overlay without lower layers is what clients make of an empty
// snapshot that is put upon its parents later (snapshots.RebaseCap): then deletions must stay
// visible as overlayfs's markers.
func layerRoot(mounts []mount.Mount) (*os.File, unpack.Mode, error) {
	if len(mounts) == 1 && mounts[0].Type == "overlay" {
		upper, alone := "", true
		for _, o := range mounts[0].Options {
			if v, ok := strings.CutPrefix(o, "upperdir="); ok {
				upper = v
			}
			alone = alone && !strings.HasPrefix(o, "lowerdir")
		}
		if alone && upper != "" {
			f, err := os.OpenFile(upper, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
			return f, unpack.Diff, err
		}
	}
	m, err := snapshot.MountAny(mounts)
	if err != nil {
		return nil, 0, err
	}
	defer m.Close()
	// Through the mount's own descriptor (O_PATH) neither owner nor mode of the root could be set.
	fd, err := unix.Openat(int(m.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("open root: %w", err)
	}
	return os.NewFile(uintptr(fd), "root"), unpack.Merged, nil
}

// applyStream decompresses, hashes and unpacks side by side.
func (s *Service) applyStream(ctx context.Context, root *os.File, in io.Reader, mode unpack.Mode) (digest.Digest, int64, error) {
	dec, err := unpack.NewDecoder(in, s.o.Limits)
	if err != nil {
		return "", 0, err
	}
	defer dec.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	plain, out := newChunkPipe()
	sum := digest.SHA256.Hash()
	size, decoded := int64(0), make(chan error, 1)
	go func() {
		n, err := inflate(ctx, dec, out, sum)
		size = n
		out.close(err)
		decoded <- err
	}()
	_, err = unpack.Apply(ctx, root, plain, unpack.Options{Mode: mode, Limits: s.o.Limits, Writeback: true})
	plain.Close()
	if err != nil {
		cancel(err)
	}
	if derr := <-decoded; err == nil {
		err = derr
	}
	if errors.Is(err, unpack.ErrNeedsParent) {
		err = fmt.Errorf("%w, it cannot be applied without its parent: %w", err, errdefs.ErrFailedPrecondition)
	}
	return digest.NewDigest(digest.SHA256, sum), size, err
}

func inflate(ctx context.Context, dec io.Reader, out *chunkWriter, sum hash.Hash) (total int64, _ error) {
	for {
		c := newChunk()
		n, err := readChunk(dec, c.buf[:])
		c.n = n
		total += int64(n)
		sum.Write(c.buf[:n])
		if n == 0 {
			c.free()
		} else if werr := out.send(ctx, c); werr != nil {
			return total, werr
		}
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// Compare makes a layer of what the upper file system has other than the lower one, and
// stores it with the digest of its plain form in a label.
func (s *Service) Compare(ctx context.Context, lower, upper []mount.Mount, opts ...diff.Opt) (_ ocispec.Descriptor, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("make layer: %w", err)
		}
	}()
	var o diff.Config
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	if o.MediaType == "" {
		o.MediaType = ocispec.MediaTypeImageLayerGzip
	}
	compression, err := layerCompression(o.MediaType)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	changes, root, err := snapshot.Between(ctx, lower, upper)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer root.Close()
	d, diffID, err := s.storeStream(ctx, o, compression, func(w io.Writer) error {
		return WriteLayer(ctx, root, changes, w, LayerOptions{Epoch: o.SourceDateEpoch})
	})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	info, err := s.o.Content.Info(ctx, d.Digest)
	if err == nil && info.Labels[labelUncompressed] != diffID.String() { // it was there, and nobody knew this
		info.Labels = map[string]string{labelUncompressed: diffID.String()}
		_, err = s.o.Content.Update(ctx, info, "labels."+labelUncompressed)
	}
	return d, err
}

// storeStream compresses and stores what write gives.
func (s *Service) storeStream(ctx context.Context, o diff.Config, c unpack.Compression, write func(io.Writer) error) (d ocispec.Descriptor, diffID digest.Digest, err error) {
	own := o.Reference == ""
	if own {
		o.Reference = "diff-" + rand.Text()
	}
	cw, err := content.OpenWriter(ctx, s.o.Content, content.WithRef(o.Reference), content.WithDescriptor(ocispec.Descriptor{MediaType: o.MediaType}))
	if err != nil {
		return d, "", err
	}
	done := false
	defer func() {
		cw.Close()
		if !done && own {
			if err := s.o.Content.Abort(context.WithoutCancel(ctx), o.Reference); err != nil && !errdefs.IsNotFound(err) {
				s.o.Log.Warn("unfinished blob stays", "ref", o.Reference, "err", err)
			}
		}
	}()
	if err := cw.Truncate(0); err != nil { // what an earlier try left is not the beginning of this one
		return d, "", err
	}
	z, err := compressor(cw, c)
	if err != nil {
		return d, "", err
	}
	sum := digest.SHA256.Digester()
	err = write(io.MultiWriter(z, sum.Hash()))
	if err = errors.Join(err, z.Close()); err != nil {
		return d, "", err
	}
	st, err := cw.Status()
	if err != nil {
		return d, "", err
	}
	d, diffID = ocispec.Descriptor{MediaType: o.MediaType, Digest: cw.Digest(), Size: st.Offset}, sum.Digest()
	labels := map[string]string{labelUncompressed: diffID.String()}
	maps.Copy(labels, o.Labels)
	err = cw.Commit(ctx, d.Size, d.Digest, content.WithLabels(labels))
	if done = err == nil || errdefs.IsAlreadyExists(err); !done {
		return d, "", err
	}
	return d, diffID, nil
}

func compressor(w io.Writer, c unpack.Compression) (io.WriteCloser, error) {
	switch c {
	case unpack.Gzip:
		return gzip.NewWriter(w), nil
	case unpack.Zstd:
		return zstd.NewWriter(w)
	}
	return nopCloser{w}, nil
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }
