package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/hako-engine/hako/image/registry"
)

const (
	uploads        = 3 // blobs side by side
	uploadAttempts = 3
)

// Push sends an image to the registry that its name belongs to: blobs that are there
// are skipped, those that another repository of the registry has are mounted. Without
// a platform an index goes whole if all that it lists is here, else the one image of it
// that is here goes alone.
//
// Errors: errdefs.ErrNotFound, ErrUnauthenticated or ErrPermissionDenied, ErrUnavailable.
func (s *Service) Push(ctx context.Context, ref string, o PushOptions) error {
	ctx = namespaced(ctx)
	named, err := parseName(ref)
	if err != nil {
		return err
	}
	if isDigested(named) {
		return fmt.Errorf("cannot push a digest reference: %s: %w", ref, errdefs.ErrInvalidArgument)
	}
	familiar := reference.FamiliarString(named)
	r, err := s.o.Images.Get(ctx, named.String())
	if err != nil {
		if errdefs.IsNotFound(err) {
			return fmt.Errorf("an image does not exist locally with the tag: %s: %w", reference.FamiliarName(named), errdefs.ErrNotFound)
		}
		return err
	}
	one, blobs, err := s.savedImage(ctx, r, o.Platform)
	if err != nil {
		return fmt.Errorf("push %s: %w", familiar, err)
	}
	repo, err := s.registry.Repository(reference.TrimNamed(named), o.Auth.credentials())
	if err != nil {
		return err
	}
	p := newProgress(o.Progress)
	defer p.close(ctx)
	p.line(Progress{Message: fmt.Sprintf("The push refers to repository [%s]", reference.TrimNamed(named))})
	u := &upload{s: s, repo: repo, named: named, p: p}
	if u.pusher, u.tracker, err = repo.Pusher(ctx, tagOrDigest(named)); err != nil {
		return repo.PushError(err)
	}
	if err := u.all(ctx, blobs, one.top); err != nil {
		return err
	}
	p.line(Progress{Message: fmt.Sprintf("%s: digest: %s size: %d", tagOrDigest(named), one.top.Digest, one.top.Size)})
	return nil
}

// upload is one push.
type upload struct {
	s       *Service
	repo    *registry.Repository
	named   reference.Named
	pusher  remotes.Pusher
	tracker docker.StatusTracker
	p       *progress
}

// all sends layers and configs, then the documents that refer to them, the top one last
// and by its tag.
func (u *upload) all(ctx context.Context, blobs []ocispec.Descriptor, top ocispec.Descriptor) error {
	eg, egCtx := errgroup.WithContext(ctx)
	eg.SetLimit(uploads)
	for _, b := range blobs {
		if isManifestType(b.MediaType) {
			continue
		}
		if isLayerType(b.MediaType) {
			u.p.line(Progress{ID: short(b.Digest), Action: "Preparing"})
		}
		eg.Go(func() error { return u.retried(egCtx, b, u.pusher) })
	}
	if err := eg.Wait(); err != nil {
		return err
	}
	for _, b := range blobs {
		if !isManifestType(b.MediaType) || b.Digest == top.Digest {
			continue
		}
		// A child goes by its digest: the tag belongs to the top.
		pusher, _, err := u.repo.Pusher(ctx, b.Digest.String())
		if err != nil {
			return u.repo.PushError(err)
		}
		if err := u.retried(ctx, b, pusher); err != nil {
			return err
		}
	}
	return u.retried(ctx, top, u.pusher)
}

func isLayerType(mt string) bool {
	return strings.Contains(mt, "layer") || strings.Contains(mt, "rootfs")
}

// retried sends one blob, again if the network failed.
func (u *upload) retried(ctx context.Context, b ocispec.Descriptor, pusher remotes.Pusher) error {
	for attempt := 1; ; attempt++ {
		err := u.blob(ctx, b, pusher)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case attempt == uploadAttempts || !worthRetry(err):
			return u.repo.PushError(fmt.Errorf("blob %s: %w", b.Digest, err))
		}
		u.s.o.Log.Debug("upload failed, trying again", "digest", b.Digest, "attempt", attempt, "err", err)
		select {
		case <-time.After(time.Duration(attempt) * 300 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// worthRetry says whether an upload may succeed the next time.
func worthRetry(err error) bool {
	if errors.Is(err, docker.ErrInvalidAuthorization) || errdefs.IsNotFound(err) || errdefs.IsPermissionDenied(err) || errdefs.IsInvalidArgument(err) {
		return false
	}
	text := err.Error()
	for _, status := range []string{"400 ", "401 ", "403 ", "404 ", "405 ", "413 "} {
		if strings.Contains(text, status) {
			return false
		}
	}
	return true
}

// blob sends one blob unless the registry has it or can take it from another repository.
func (u *upload) blob(ctx context.Context, b ocispec.Descriptor, pusher remotes.Pusher) error {
	id := short(b.Digest)
	isLayer := isLayerType(b.MediaType)
	say := func(action string, cur, total int64) {
		if isLayer {
			u.p.line(Progress{ID: id, Action: action, Current: cur, Total: total})
		}
	}
	info, err := u.s.o.Content.Info(ctx, b.Digest)
	if err != nil {
		return err
	}
	desc := ocispec.Descriptor{MediaType: b.MediaType, Digest: b.Digest, Size: b.Size, Annotations: map[string]string{}}
	for k, v := range info.Labels {
		if strings.HasPrefix(k, labelDistribution) {
			desc.Annotations[k] = v
		}
	}
	done, err := u.repo.Turn(ctx, b.Digest)
	if err != nil {
		return err
	}
	defer done()
	cw, err := pusher.Push(ctx, desc)
	if errdefs.IsAlreadyExists(err) {
		say("Layer already exists", 0, 0)
		st, serr := u.tracker.GetStatus(remotes.MakeRefKey(ctx, desc))
		if serr == nil && st.MountedFrom != "" {
			say("Mounted from "+strings.TrimPrefix(st.MountedFrom, reference.Domain(u.named)+"/"), 0, 0)
		}
		return u.source(ctx, b)
	}
	if err != nil {
		return err
	}
	defer cw.Close()
	ra, err := u.s.o.Content.ReaderAt(ctx, b)
	if err != nil {
		return err
	}
	defer ra.Close()
	src := &counted{r: io.NewSectionReader(ra, 0, ra.Size()), tell: func(n int64) { say("Pushing", n, b.Size) }}
	if err := content.Copy(ctx, cw, src, b.Size, b.Digest); err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	say("Pushed", 0, 0)
	return u.source(ctx, b)
}

// source notes that the registry has the blob in this repository now.
func (u *upload) source(ctx context.Context, b ocispec.Descriptor) error {
	w := &work{s: u.s, repo: u.repo}
	labels := map[string]string{}
	w.source(labels)
	return w.label(ctx, b.Digest, labels)
}

// counted tells how much was read. It can be read again from any place, which the
// library does after a challenge.
type counted struct {
	r    io.ReadSeeker
	n    int64
	tell func(int64)
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	c.tell(c.n)
	return n, err
}

func (c *counted) Seek(offset int64, whence int) (int64, error) {
	n, err := c.r.Seek(offset, whence)
	c.n = n
	return n, err
}
