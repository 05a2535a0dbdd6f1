package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const maxReferrers = 10_000

// scoped asks token servers for more than pull.
func (r *Repository) scoped(ctx context.Context, actions string, others ...string) context.Context {
	ctx = docker.WithScope(quiet(ctx), "repository:"+r.path+":"+actions)
	for _, o := range others {
		ctx = docker.ContextWithAppendPullRepositoryScope(ctx, o)
	}
	return ctx
}

// pushHost is the first host that takes pushes.
func (r *Repository) pushHost() (docker.RegistryHost, error) {
	for _, h := range r.hosts {
		if h.Capabilities.Has(docker.HostCapabilityPush) {
			return h, nil
		}
	}
	return docker.RegistryHost{}, fmt.Errorf("no host of registry %s takes pushes: %w", r.domain, errdefs.ErrFailedPrecondition)
}

// pushDenied is the error of an answer that is no success to a push.
func (r *Repository) pushDenied(resp *http.Response, h docker.RegistryHost, what string) error {
	_, text := errorText(resp)
	if resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden {
		return r.noPush(text)
	}
	var class error = errdefs.ErrUnavailable
	switch {
	case resp.StatusCode == http.StatusNotFound:
		class = errdefs.ErrNotFound
	case resp.StatusCode == http.StatusMethodNotAllowed:
		class = errdefs.ErrNotImplemented
	case resp.StatusCode >= 400 && resp.StatusCode < 500 && resp.StatusCode != http.StatusTooManyRequests && resp.StatusCode != http.StatusRequestTimeout:
		class = errdefs.ErrInvalidArgument
	}
	return fmt.Errorf("%s: registry %s answered %s: %w: %w", what, h.Host, resp.Status, text, class)
}

func (r *Repository) noPush(cause error) error {
	var class error = errdefs.ErrPermissionDenied
	if !r.secret {
		class = errdefs.ErrUnauthenticated
	}
	return fmt.Errorf("access denied for %s, it may need other credentials ('hako login %s'): %w: %w", reference.FamiliarName(r.name), r.domain, cause, class)
}

func (r *Repository) pushAuthError(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errdefs.IsPermissionDenied(err) {
		return err
	}
	var network interface{ Timeout() bool }
	if errors.As(err, &network) && !strings.Contains(err.Error(), "unexpected status") {
		return fmt.Errorf("get access to %s: %w: %w", r.name.Name(), redact(err), errdefs.ErrUnavailable)
	}
	return r.noPush(errors.New("authentication failed: " + clip(redact(err).Error(), 300)))
}

// Head asks the host that takes pushes for a manifest by tag or digest, without fetching
// it: errdefs.ErrNotFound if it has none. The descriptor is what the host said, unchecked.
func (r *Repository) Head(ctx context.Context, tagOrDigest string) (ocispec.Descriptor, error) {
	h, err := r.pushHost()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	resp, err := r.request(r.scoped(ctx, "pull,push"), h, http.MethodHead, r.address(h, path.Join("manifests", tagOrDigest), nil), http.Header{"Accept": {manifestTypes}}, nil, r.pushAuthError)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return ocispec.Descriptor{}, r.pushDenied(resp, h, "look for "+tagOrDigest)
	}
	d, err := digest.Parse(resp.Header.Get("Docker-Content-Digest"))
	if err != nil {
		if d, err = digest.Parse(tagOrDigest); err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("registry %s does not say the digest of %s: %w", h.Host, tagOrDigest, errdefs.ErrUnavailable)
		}
	}
	mt, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	return ocispec.Descriptor{MediaType: mt, Digest: d, Size: resp.ContentLength}, nil
}

// HasBlob tells whether the host that takes pushes has a blob in this repository.
func (r *Repository) HasBlob(ctx context.Context, d digest.Digest) (bool, error) {
	h, err := r.pushHost()
	if err != nil {
		return false, err
	}
	resp, err := r.request(r.scoped(ctx, "pull,push"), h, http.MethodHead, r.address(h, "blobs/"+d.String(), nil), nil, nil, r.pushAuthError)
	if err != nil {
		return false, err
	}
	resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
		r.c.o.Uploads.has(h.Host, r.path, d)
		return true, nil
	case http.StatusNotFound:
		return false, nil
	}
	return false, r.pushDenied(resp, h, "look for blob "+d.String())
}

// Domain is the registry that the repository is in.
func (r *Repository) Domain() string { return r.domain }

// Open gives the bytes of a blob from an offset on. It may be called several times.
type Open func(ctx context.Context, offset int64) (io.ReadCloser, error)

// PutBlob sends a blob. If mount names another repository of the same registry that has it, or
// one is known from earlier uploads, the registry is asked to take it from there first. An upload that breaks is taken up
// where the registry says that it is, and begun anew where it does not say; one that an
// earlier process left is taken up, too (Options.UploadDir). tell hears of the bytes that
// were sent and may be nil.
//
// mounted says that nothing was sent.
func (r *Repository) PutBlob(ctx context.Context, desc ocispec.Descriptor, mount string, open Open, tell func(int64)) (mounted bool, err error) {
	h, err := r.pushHost()
	if err != nil {
		return false, err
	}
	if tell == nil {
		tell = func(int64) {}
	}
	if mount == "" {
		mount = r.c.o.Uploads.place(h.Host, r.path, desc.Digest)
	}
	defer func() {
		if err == nil {
			r.c.o.Uploads.has(h.Host, r.path, desc.Digest)
		}
	}()
	u := &uploading{r: r, h: h, desc: desc, open: open, tell: tell}
	r.c.sweep.Do(r.c.sweepNotes)
	u.note = u.openNote()
	defer func() { u.note.close(err == nil || u.location == "") }()
	if u.location = u.note.location(u.key(), u.plain()); u.location != "" {
		u.earlier = true
		u.resume(ctx)
	}
	for attempt := 1; ; attempt++ {
		var took bool
		err = nil
		if u.location == "" {
			if took, err = u.begin(ctx, mount); took {
				return true, nil
			}
		}
		if err == nil {
			if err = u.send(ctx); err == nil {
				return false, nil
			}
		}
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		if u.earlier && !errdefs.IsUnavailable(err) && u.location != "" {
			// What the earlier process sent may have been the fault.
			u.abandon()
			u.earlier, attempt = false, 0
			continue
		}
		if attempt >= r.c.o.Attempts || !errdefs.IsUnavailable(err) {
			if u.note == nil || !errdefs.IsUnavailable(err) {
				u.abandon()
			}
			return false, fmt.Errorf("send blob %s: %w", desc.Digest, err)
		}
		r.c.o.Log.Debug("upload failed, trying again", "digest", desc.Digest, "attempt", attempt, "err", err)
		select {
		case <-time.After(delay(r.c.o.Backoff, attempt)):
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
		u.resume(ctx)
	}
}

// uploading is one blob on its way (distribution-spec, "Pushing blobs").
type uploading struct {
	r        *Repository
	h        docker.RegistryHost
	desc     ocispec.Descriptor
	open     Open
	tell     func(int64)
	location string // where the upload goes on; "": not begun
	off      int64  // that the registry has
	note     *note
	earlier  bool // another process began it
}

// begin opens an upload, or mounts the blob.
func (u *uploading) begin(ctx context.Context, mount string) (mounted bool, err error) {
	query := url.Values{}
	var others []string
	if mount != "" {
		query.Set("mount", u.desc.Digest.String())
		query.Set("from", mount)
		others = append(others, mount)
	}
	address := u.r.address(u.h, "blobs/uploads/", query)
	resp, err := u.r.request(u.r.scoped(ctx, "pull,push", others...), u.h, http.MethodPost, address, nil, nothing, u.r.pushAuthError)
	if err != nil {
		if mount != "" && (errdefs.IsPermissionDenied(err) || errdefs.IsUnauthorized(err)) {
			return u.begin(ctx, "") // a token server that gives nothing where it does not give all
		}
		return false, err
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusCreated && mount != "":
		return true, nil
	case resp.StatusCode == http.StatusAccepted:
		u.off, u.earlier = 0, false
		return false, u.follow(resp)
	case mount != "" && (resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden || resp.StatusCode == http.StatusNotFound):
		// Not allowed to read there: that is no reason not to send it.
		return u.begin(ctx, "")
	}
	return false, u.r.pushDenied(resp, u.h, "begin upload")
}

func nothing() (io.ReadCloser, int64, error) { return http.NoBody, 0, nil }

// follow takes over where an upload goes on. It may be at another host, which then gets
// no credentials, and never less protected than the registry itself.
func (u *uploading) follow(resp *http.Response) error {
	loc, err := resp.Location()
	if err != nil {
		return fmt.Errorf("registry %s does not say where the upload goes on: %w", u.h.Host, errdefs.ErrUnavailable)
	}
	if loc.Scheme != "http" && loc.Scheme != "https" || loc.User != nil || loc.Host == "" ||
		resp.Request.URL.Scheme == "https" && loc.Scheme != "https" {
		return fmt.Errorf("registry %s wants the upload at %s: %w", u.h.Host, clip(loc.Redacted(), 100), errdefs.ErrPermissionDenied)
	}
	u.location = loc.String()
	u.note.keep(u.key(), u.location)
	return nil
}

// host gives what to talk to a location with.
func (u *uploading) host(location string) docker.RegistryHost {
	h := u.h
	if loc, err := url.Parse(location); err != nil || loc.Host != h.Host {
		h.Authorizer, h.Header = nil, nil
	}
	return h
}

// send sends what the registry does not have yet, and ends the upload.
func (u *uploading) send(ctx context.Context) error {
	scope := u.r.scoped(ctx, "pull,push")
	if u.off < u.desc.Size {
		header := http.Header{"Content-Type": {"application/octet-stream"}}
		if u.off > 0 {
			header.Set("Content-Range", fmt.Sprintf("%d-%d", u.off, u.desc.Size-1))
		}
		var failed error
		resp, err := u.r.request(scope, u.host(u.location), http.MethodPatch, u.location, header, func() (io.ReadCloser, int64, error) {
			rc, err := u.open(ctx, u.off)
			if err != nil {
				failed = err
				return nil, 0, err
			}
			return &told{ReadCloser: rc, n: u.off, tell: u.tell, failed: &failed}, u.desc.Size - u.off, nil
		}, u.r.pushAuthError)
		if failed != nil {
			if err == nil {
				resp.Body.Close()
			}
			return fmt.Errorf("read it: %w", failed) // of the source: no reason to send again
		}
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusAccepted {
			return u.r.pushDenied(resp, u.h, "send")
		}
		if err := u.follow(resp); err != nil {
			return err
		}
		u.off = u.desc.Size
	}
	loc, err := url.Parse(u.location)
	if err != nil {
		return err
	}
	q := loc.Query()
	q.Set("digest", u.desc.Digest.String())
	loc.RawQuery = q.Encode()
	resp, err := u.r.request(scope, u.host(u.location), http.MethodPut, loc.String(), http.Header{"Content-Type": {"application/octet-stream"}}, nothing, u.r.pushAuthError)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated && resp.StatusCode != http.StatusNoContent && resp.StatusCode != http.StatusOK {
		return u.r.pushDenied(resp, u.h, "finish upload")
	}
	return nil
}

// resume asks how far the upload came; if the registry does not know, it begins anew.
func (u *uploading) resume(ctx context.Context) {
	location := u.location
	u.location = ""
	if location == "" {
		return
	}
	resp, err := u.r.request(u.r.scoped(ctx, "pull,push"), u.host(location), http.MethodGet, location, nil, nil, u.r.pushAuthError)
	if err != nil {
		return
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent && resp.StatusCode != http.StatusAccepted {
		return
	}
	_, last, _ := strings.Cut(resp.Header.Get("Range"), "-") // Range: 0-LAST
	n, err := strconv.ParseInt(last, 10, 64)
	if err != nil || n < 0 || n+1 > u.desc.Size {
		return
	}
	u.location = location
	if u.follow(resp) != nil {
		u.location = location
	}
	if u.off = n + 1; n == 0 {
		u.off = 0 // "0-0" is what registries say of nothing, too
	}
}

// abandon tells the registry that it may forget the upload.
func (u *uploading) abandon() {
	location := u.location
	if u.location = ""; location == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if resp, err := u.r.request(u.r.scoped(ctx, "pull,push"), u.host(location), http.MethodDelete, location, nil, nil, u.r.pushAuthError); err == nil {
		resp.Body.Close()
	}
}

// told counts what is read, and keeps the error of reading apart from those of the network.
type told struct {
	io.ReadCloser
	n      int64
	tell   func(int64)
	failed *error
}

func (t *told) Read(p []byte) (int, error) {
	n, err := t.ReadCloser.Read(p)
	t.n += int64(n)
	t.tell(t.n)
	if err != nil && !errors.Is(err, io.EOF) {
		*t.failed = err
	}
	return n, err
}

// PutManifest stores a manifest or index under a tag or its digest. subjectKnown says
// that the registry keeps the list of referrers itself (distribution-spec, "Pushing
// Manifests with Subject").
func (r *Repository) PutManifest(ctx context.Context, desc ocispec.Descriptor, raw []byte, tagOrDigest string) (subjectKnown bool, err error) {
	h, err := r.pushHost()
	if err != nil {
		return false, err
	}
	for attempt := 1; ; attempt++ {
		resp, rerr := r.request(r.scoped(ctx, "pull,push"), h, http.MethodPut, r.address(h, path.Join("manifests", tagOrDigest), nil), http.Header{"Content-Type": {desc.MediaType}},
			func() (io.ReadCloser, int64, error) {
				return io.NopCloser(bytes.NewReader(raw)), int64(len(raw)), nil
			}, r.pushAuthError)
		if err = rerr; err == nil {
			if resp.StatusCode == http.StatusCreated || resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusAccepted {
				said := resp.Header.Get("Docker-Content-Digest")
				resp.Body.Close()
				if d, perr := digest.Parse(said); perr == nil && d.Algorithm() == desc.Digest.Algorithm() && d != desc.Digest {
					return false, fmt.Errorf("registry %s stored manifest %s as %s: %w", h.Host, desc.Digest, d, errdefs.ErrDataLoss)
				}
				return resp.Header.Get("OCI-Subject") != "", nil
			}
			err = r.pushDenied(resp, h, "store manifest "+tagOrDigest)
			resp.Body.Close()
		}
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		if attempt >= r.c.o.Attempts || !errdefs.IsUnavailable(err) {
			return false, err
		}
		select {
		case <-time.After(delay(r.c.o.Backoff, attempt)):
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
}

// Delete removes a manifest by its digest.
func (r *Repository) Delete(ctx context.Context, d digest.Digest) error {
	h, err := r.pushHost()
	if err != nil {
		return err
	}
	resp, err := r.request(r.scoped(ctx, "delete,pull"), h, http.MethodDelete, r.address(h, "manifests/"+d.String(), nil), nil, nil, r.pushAuthError)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusAccepted, http.StatusOK, http.StatusNoContent:
		return nil
	case http.StatusMethodNotAllowed, http.StatusBadRequest, http.StatusNotImplemented:
		return fmt.Errorf("registry %s does not delete: %w", h.Host, errdefs.ErrNotImplemented)
	}
	return r.pushDenied(resp, h, "delete "+d.String())
}

// ReferrersTag is where lists of referrers are kept in registries without an API for
// them (distribution-spec, "Referrers Tag Schema").
func ReferrersTag(d digest.Digest) string {
	return strings.Replace(d.String(), ":", "-", 1)
}

// Referrers lists the manifests that have a subject of this digest, of all types or
// one, by the registry's API or the tag that stands in for it.
func (r *Repository) Referrers(ctx context.Context, d digest.Digest, artifactType string) ([]ocispec.Descriptor, error) {
	var raw []byte
	err := r.each(ctx, docker.HostCapabilityPull, func(h docker.RegistryHost) error {
		resp, err := r.get(ctx, h, http.MethodGet, "referrers/"+d.String(), nil, http.Header{"Accept": {ocispec.MediaTypeImageIndex}})
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		mt, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
		if resp.StatusCode != http.StatusOK || mt != ocispec.MediaTypeImageIndex {
			if resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden {
				return r.denied(errors.New(resp.Status))
			}
			return errdefs.ErrNotFound
		}
		if raw, err = io.ReadAll(io.LimitReader(resp.Body, MaxManifest+1)); err != nil {
			return fmt.Errorf("referrers of %s: %w: %w", d, err, errdefs.ErrUnavailable)
		}
		return nil
	})
	if errdefs.IsNotFound(err) {
		if _, raw, err = r.Manifest(ctx, ReferrersTag(d)); errdefs.IsNotFound(err) {
			return nil, nil
		}
	}
	if err != nil {
		return nil, err
	}
	var idx ocispec.Index
	if err := json.Unmarshal(raw, &idx); err != nil || len(raw) > MaxManifest {
		return nil, fmt.Errorf("referrers of %s: not an index: %w", d, errdefs.ErrInvalidArgument)
	}
	if len(idx.Manifests) > maxReferrers {
		return nil, fmt.Errorf("referrers of %s: more than %d: %w", d, maxReferrers, errdefs.ErrResourceExhausted)
	}
	var out []ocispec.Descriptor
	for _, m := range idx.Manifests {
		if m.Digest.Validate() != nil || m.Size < 0 {
			return nil, fmt.Errorf("referrers of %s: bad descriptor: %w", d, errdefs.ErrInvalidArgument)
		}
		if artifactType == "" || m.ArtifactType == artifactType {
			out = append(out, m)
		}
	}
	return out, nil
}

// AddReferrer enters a manifest into the tag that stands in for the API of referrers. Who
// does that at the same time may win: the specification has no lock.
func (r *Repository) AddReferrer(ctx context.Context, subject digest.Digest, d ocispec.Descriptor) error {
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	_, raw, err := r.Manifest(ctx, ReferrersTag(subject))
	if err == nil {
		err = json.Unmarshal(raw, &idx)
	} else if errdefs.IsNotFound(err) {
		err = nil
	}
	if err != nil {
		return fmt.Errorf("referrers of %s: %w", subject, err)
	}
	for _, m := range idx.Manifests {
		if m.Digest == d.Digest {
			return nil
		}
	}
	idx.Manifests = append(idx.Manifests, d)
	if raw, err = json.Marshal(idx); err != nil {
		return err
	}
	_, err = r.PutManifest(ctx, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromBytes(raw), Size: int64(len(raw))}, raw, ReferrersTag(subject))
	return err
}
