package engine

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
)

// maxCheckpoint bounds what one checkpoint unpacks to, in bytes.
const maxCheckpoint = 1 << 40

// CheckpointTask writes the processes of a task to the content store: CRIU's images as a tar, and
// the OCI configuration. o are containerd.runc.v1.CheckpointOptions, or nil. If they name a folder, the
// images go there and nothing into the store.
func (e *Engine) CheckpointTask(ctx context.Context, id string, o typeurl.Any) (_ []ocispec.Descriptor, err error) {
	k, err := keyOf(ctx, id)
	if err != nil {
		return nil, err
	}
	opts := &options.CheckpointOptions{}
	if o != nil && strings.HasSuffix(o.GetTypeUrl(), "containerd.runc.v1.CheckpointOptions") {
		if err := proto.Unmarshal(o.GetValue(), opts); err != nil {
			return nil, invalidf("options of the checkpoint: %v", err)
		}
	}
	dir := opts.ImagePath
	if dir == "" {
		if dir, err = os.MkdirTemp(e.opt.State, "checkpoint-"); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	}
	err = e.onTask(ctx, id, "checkpoint", func(s TaskShim) error {
		_, err := s.Checkpoint(ctx, &taskapi.CheckpointTaskRequest{ID: id, Path: dir, Options: typeurl.MarshalProto(o)})
		return err
	})
	if err != nil {
		return nil, err
	}
	if opts.ImagePath != "" {
		return nil, nil
	}
	criu, err := e.storeFolder(ctx, "checkpoint-"+k.namespace+"-"+id+"-"+newID()[:12], images.MediaTypeContainerd1Checkpoint, dir)
	if err != nil {
		return nil, fmt.Errorf("keep the checkpoint of task %s: %w", id, err)
	}
	rec, err := e.ContainerStore().Get(ctx, id)
	if err != nil {
		return nil, err
	}
	raw, err := proto.Marshal(typeurl.MarshalProto(rec.Spec))
	if err != nil {
		return nil, err
	}
	config := ocispec.Descriptor{MediaType: images.MediaTypeContainerd1CheckpointConfig, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	if err := content.WriteBlob(ctx, e.opt.Content, "checkpoint-config-"+config.Digest.String(), bytes.NewReader(raw), config); err != nil {
		return nil, fmt.Errorf("keep the configuration of task %s: %w", id, err)
	}
	return []ocispec.Descriptor{criu, config}, nil
}

// storeFolder keeps the files of a folder as a tar.
func (e *Engine) storeFolder(ctx context.Context, ref, mediaType, dir string) (d ocispec.Descriptor, err error) {
	w, err := e.opt.Content.Writer(ctx, content.WithRef(ref), content.WithDescriptor(ocispec.Descriptor{MediaType: mediaType}))
	if err != nil {
		return d, err
	}
	stored := false
	defer func() {
		w.Close()
		if stored {
			return
		}
		if aerr := e.opt.Content.Abort(context.WithoutCancel(ctx), ref); aerr != nil && !errdefs.IsNotFound(aerr) {
			e.log.Warn("half a checkpoint stays", "ref", ref, "error", aerr)
		}
	}()
	size := &countingWriter{w: w}
	tw := tar.NewWriter(size)
	err = filepath.WalkDir(dir, func(name string, f fs.DirEntry, err error) error {
		if err != nil || name == dir {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		return packFile(tw, dir, name, f)
	})
	if err = errors.Join(err, tw.Close()); err != nil {
		return d, err
	}
	d = ocispec.Descriptor{MediaType: mediaType, Digest: w.Digest(), Size: size.n}
	err = w.Commit(ctx, size.n, d.Digest)
	if stored = err == nil || errdefs.IsAlreadyExists(err); !stored {
		return d, err
	}
	return d, nil
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// unpackCheckpoint lays the files of a checkpoint into a new folder, which is the caller's.
func (e *Engine) unpackCheckpoint(ctx context.Context, t *task, d ocispec.Descriptor) (dir string, err error) {
	if d.MediaType != images.MediaTypeContainerd1Checkpoint {
		return "", invalidf("%q is no type of a checkpoint", d.MediaType)
	}
	ra, err := e.opt.Content.ReaderAt(ctx, d)
	if err != nil {
		return "", err
	}
	defer ra.Close()
	if dir, err = os.MkdirTemp(t.bundle, "checkpoint-"); err != nil {
		return "", err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", err
	}
	defer root.Close()
	room, err := freeSpace(dir)
	if err != nil {
		return "", err
	}
	room = min(room, maxCheckpoint)
	tr := tar.NewReader(content.NewReader(ra))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return dir, nil
		}
		if err != nil {
			return "", invalidf("the checkpoint is no tar: %v", err)
		}
		name := filepath.Clean(h.Name)
		switch {
		case name == ".":
		case h.Typeflag == tar.TypeDir:
			err = root.MkdirAll(name, 0o700)
		case h.Typeflag == tar.TypeReg:
			if room -= h.Size; room < 0 { // of the file, which may have holes
				return "", &classed{text: "there is no room for the files of the checkpoint", class: errdefs.ErrResourceExhausted}
			}
			err = unpackFile(ctx, root, name, tr)
		} // CRIU needs nothing else
		if err != nil {
			return "", err
		}
	}
}

func unpackFile(ctx context.Context, root *os.Root, name string, r io.Reader) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := root.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}
