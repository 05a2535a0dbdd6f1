// Package registry speaks the OCI distribution protocol (and Docker's v2, from which
// it comes) to the hosts that serve one repository.
//
// In flow a repository's name, credentials, and the certs.d folder that an
// administrator wrote (hosts.toml: mirrors, plain http, TLS, headers); out flow
// verified manifests and resumable streams of blobs. Everything that a host sends is
// hostile: documents are bounded, digests are checked, credentials reach no host that
// they were not given for, and never a log.
//
// Specification: OCI distribution-spec 1.1; token flow: distribution's auth/token.
package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	cref "github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
)

const (
	// MaxManifest bounds a manifest or index in bytes (distribution-spec, "Pushing Manifests").
	MaxManifest = 4 << 20
	maxError    = 64 << 10 // bytes of an error response that are looked at
	maxTags     = 100_000
	dockerHub   = "docker.io"
)

// Media types of Docker's own formats; OCI's are in image-spec.
const (
	DockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	DockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
)

var manifestTypes = strings.Join([]string{
	ocispec.MediaTypeImageIndex, DockerIndex, ocispec.MediaTypeImageManifest, DockerManifest,
}, ", ")

// Credentials are what one host asks for.
type Credentials struct {
	Username string
	Password string
	// IdentityToken is exchanged for access tokens instead of a password.
	IdentityToken string
	// RegistryToken is sent as it is, as bearer token.
	RegistryToken string
}

func (c Credentials) empty() bool { return c == Credentials{} }

// Options of New. The zero value works.
type Options struct {
	Dir       string        // certs.d: HOST/hosts.toml in containerd's format; "": none
	UserAgent string        // sent to registries
	Timeout   time.Duration // for an answer, and for progress within one; 0: 30 s
	Attempts  int           // per request, on network errors, 429 and 5xx; 0: 5
	Backoff   time.Duration // before the second attempt, doubled for each further; 0: 250 ms
	// DockerConfig is the folder of docker's config.json; "": $DOCKER_CONFIG or ~/.docker.
	DockerConfig string
	// AuthFile is such a file itself, under any name; it has to be there. "": DockerConfig counts.
	AuthFile string
	// Anonymous asks no config.json: hosts get what the client gave, or nothing.
	Anonymous bool
	// Ask gives the credentials of a host instead of docker's config.json, when it asks for
	// some; nil: config.json does.
	Ask func(host string) (Credentials, error)
	// PlainHTTP speaks http where hosts.toml does not say otherwise.
	PlainHTTP bool
	// Headers are sent with each request.
	Headers http.Header
	// Insecure accepts any certificate, and plain http from a host that does not speak TLS.
	Insecure bool
	// CertDir has certificates for all hosts (*.crt: authorities, NAME.cert with NAME.key: ours);
	// Dir is not looked at then. "": none.
	CertDir string
	// UploadDir is a folder for notes of uploads that are under way, by which another process goes
	// on with one when this process was killed; "": none. UploadMin is the size in bytes from
	// which a blob has a note; 0: 1 MiB.
	UploadDir string
	UploadMin int64
	// Uploads is shared by clients that send to the same repositories; nil: this client's own.
	Uploads *Uploads
	Log     *slog.Logger
}

// Client makes repositories. It is safe for concurrent use.
type Client struct {
	o     Options
	sweep sync.Once // of notes
}

// New gives a client; nothing is read or connected yet.
func New(o Options) *Client {
	if o.Timeout == 0 {
		o.Timeout = 30 * time.Second
	}
	if o.Attempts == 0 {
		o.Attempts = 5
	}
	if o.Backoff == 0 {
		o.Backoff = 250 * time.Millisecond
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.UploadMin == 0 {
		o.UploadMin = noteMin
	}
	if o.Uploads == nil {
		o.Uploads = &Uploads{}
	}
	return &Client{o: o}
}

// Repository is one repository at its hosts: mirrors first, then the registry itself.
type Repository struct {
	c       *Client
	name    reference.Named
	domain  string
	path    string
	hosts   []docker.RegistryHost
	headers http.Header
	secret  bool // credentials were given by the client
}

// Repository prepares access to the repository of name. Given credentials are for the
// registry that the name belongs to, and for no other host; without them docker's
// config.json is asked for each host.
func (c *Client) Repository(name reference.Named, given Credentials) (*Repository, error) {
	r := &Repository{
		c: c, name: name, domain: reference.Domain(name), path: reference.Path(name),
		headers: http.Header{}, secret: !given.empty(),
	}
	for k, v := range c.o.Headers {
		r.headers[http.CanonicalHeaderKey(k)] = v
	}
	if c.o.UserAgent != "" {
		r.headers.Set("User-Agent", c.o.UserAgent)
	}
	hosts, err := c.hosts(r.domain, given)
	if err != nil {
		return nil, fmt.Errorf("registry %s: %w", r.domain, err)
	}
	r.hosts = hosts
	return r, nil
}

// Name is the repository's full name.
func (r *Repository) Name() reference.Named { return r.name }

// quiet keeps the library's own log lines away: they go to a logger of its own, and
// hold headers that hosts.toml may have filled with secrets.
func quiet(ctx context.Context) context.Context {
	l := logrus.New()
	l.Out = io.Discard
	l.Level = logrus.PanicLevel
	return log.WithLogger(ctx, logrus.NewEntry(l))
}

// Manifest fetches a manifest or index by tag or digest. The descriptor's digest is
// that of the bytes; its media type is what the registry said.
func (r *Repository) Manifest(ctx context.Context, tagOrDigest string) (ocispec.Descriptor, []byte, error) {
	caps := docker.HostCapabilityPull
	want, err := digest.Parse(tagOrDigest)
	if err != nil {
		want = ""
		caps |= docker.HostCapabilityResolve
	}
	var desc ocispec.Descriptor
	var body []byte
	err = r.each(ctx, caps, func(h docker.RegistryHost) error {
		resp, err := r.get(ctx, h, http.MethodGet, path.Join("manifests", tagOrDigest), nil, http.Header{"Accept": {manifestTypes}})
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return r.statusError(resp, h, tagOrDigest)
		}
		body, err = io.ReadAll(io.LimitReader(resp.Body, MaxManifest+1))
		if err != nil {
			return fmt.Errorf("read manifest %s of %s: %w: %w", tagOrDigest, r.name.Name(), err, errdefs.ErrUnavailable)
		}
		if len(body) > MaxManifest {
			return fmt.Errorf("manifest %s of %s is larger than %d bytes: %w", tagOrDigest, r.name.Name(), MaxManifest, errdefs.ErrResourceExhausted)
		}
		got := digest.FromBytes(body)
		if want != "" && want.Algorithm() != got.Algorithm() {
			if !want.Algorithm().Available() {
				return fmt.Errorf("digest algorithm %s: %w", want.Algorithm(), errdefs.ErrNotImplemented)
			}
			got = want.Algorithm().FromBytes(body)
		}
		if want != "" && got != want {
			return fmt.Errorf("manifest of %s has digest %s, not %s: %w", r.name.Name(), got, want, errdefs.ErrDataLoss)
		}
		if said := resp.Header.Get("Docker-Content-Digest"); want == "" && said != "" {
			d, err := digest.Parse(said)
			if err != nil {
				return fmt.Errorf("registry %s sent digest %s: %w", h.Host, strconv.Quote(clip(said, 80)), errdefs.ErrInvalidArgument)
			}
			if d.Algorithm() == got.Algorithm() && d != got {
				return fmt.Errorf("manifest %s of %s has digest %s, not %s as its registry says: %w", tagOrDigest, r.name.Name(), got, d, errdefs.ErrDataLoss)
			}
		}
		mt, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
		desc = ocispec.Descriptor{MediaType: strings.TrimSpace(mt), Digest: got, Size: int64(len(body))}
		return nil
	})
	return desc, body, err
}

// Tags lists the tags of the repository.
func (r *Repository) Tags(ctx context.Context) (tags []string, err error) {
	err = r.each(ctx, docker.HostCapabilityPull|docker.HostCapabilityResolve, func(h docker.RegistryHost) error {
		tags = nil
		query := url.Values{"n": {"1000"}}
		for {
			resp, err := r.get(ctx, h, http.MethodGet, "tags/list", query, nil)
			if err != nil {
				return err
			}
			if resp.StatusCode != http.StatusOK {
				err := r.statusError(resp, h, "")
				resp.Body.Close()
				return err
			}
			var page struct {
				Tags []string `json:"tags"`
			}
			err = json.NewDecoder(io.LimitReader(resp.Body, MaxManifest)).Decode(&page)
			resp.Body.Close()
			if err != nil {
				return fmt.Errorf("tags of %s: %w: %w", r.name.Name(), err, errdefs.ErrInvalidArgument)
			}
			for _, t := range page.Tags {
				if _, err := reference.WithTag(reference.TrimNamed(r.name), t); err != nil {
					return fmt.Errorf("tags of %s: %q: %w", r.name.Name(), clip(t, 80), errdefs.ErrInvalidArgument)
				}
			}
			if tags = append(tags, page.Tags...); len(tags) > maxTags {
				return fmt.Errorf("%s has more than %d tags: %w", r.name.Name(), maxTags, errdefs.ErrResourceExhausted)
			}
			next := nextPage(resp.Header.Get("Link"))
			if next == "" || len(page.Tags) == 0 {
				return nil
			}
			query.Set("last", next)
		}
	})
	return tags, err
}

// nextPage takes the last tag of this page out of a Link header (distribution-spec,
// "Listing Tags"); the rest of the URL is ours to make.
func nextPage(link string) string {
	target, params, ok := strings.Cut(link, ">")
	if !ok || !strings.Contains(params, "next") {
		return ""
	}
	u, err := url.Parse(strings.TrimPrefix(strings.TrimSpace(target), "<"))
	if err != nil {
		return ""
	}
	return u.Query().Get("last")
}

// Pusher gives the pusher for a tag (or digest) of the repository.
func (r *Repository) Pusher(ctx context.Context, tagOrDigest string) (remotes.Pusher, docker.StatusTracker, error) {
	sep := ":"
	if _, err := digest.Parse(tagOrDigest); err == nil {
		sep = "@"
	}
	tracker := docker.NewInMemoryTracker()
	resolver := docker.NewResolver(docker.ResolverOptions{
		Hosts:   func(string) ([]docker.RegistryHost, error) { return r.hosts, nil },
		Headers: r.headers,
		Tracker: tracker,
	})
	p, err := resolver.Pusher(quiet(ctx), r.name.Name()+sep+tagOrDigest)
	return quietPusher{p}, tracker, err
}

// quietPusher keeps the library from logging.
type quietPusher struct{ remotes.Pusher }

func (q quietPusher) Push(ctx context.Context, desc ocispec.Descriptor) (content.Writer, error) {
	return q.Pusher.Push(quiet(ctx), desc)
}

// PushError gives an error of a push its class and Docker's words.
func (r *Repository) PushError(err error) error {
	if err == nil {
		return nil
	}
	familiar := reference.FamiliarName(r.name)
	switch {
	case errors.Is(err, docker.ErrInvalidAuthorization), strings.Contains(err.Error(), "401 Unauthorized"), strings.Contains(err.Error(), "403 Forbidden"):
		var class error = errdefs.ErrPermissionDenied
		if !r.secret {
			class = errdefs.ErrUnauthenticated
		}
		return fmt.Errorf("push access denied for %s, repository does not exist or may require 'docker login': %w: %w", familiar, err, class)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	}
	return fmt.Errorf("push to %s: %w", familiar, err)
}

// each tries one host after the other, and gives the error that says most.
func (r *Repository) each(ctx context.Context, caps docker.HostCapabilities, try func(docker.RegistryHost) error) error {
	var best error
	for _, h := range r.hosts {
		if !h.Capabilities.Has(caps) {
			continue
		}
		err := try(h)
		if err == nil || ctx.Err() != nil {
			return err
		}
		r.c.o.Log.Debug("registry host failed", "host", h.Host, "repository", r.path, "err", err)
		// The registry itself comes last, and its answer counts most, unless it cannot be reached.
		if best == nil || !errdefs.IsUnavailable(err) {
			best = err
		}
	}
	if best == nil {
		return fmt.Errorf("no host of registry %s can serve this: %w", r.domain, errdefs.ErrFailedPrecondition)
	}
	return best
}

// get sends one request to one host, answering its challenge.
func (r *Repository) get(ctx context.Context, h docker.RegistryHost, method, what string, query url.Values, header http.Header) (*http.Response, error) {
	spec := cref.Spec{Locator: r.name.Name()}
	ctx, err := docker.ContextWithRepositoryScope(quiet(ctx), spec, false)
	if err != nil {
		return nil, fmt.Errorf("repository %s: %w: %w", r.name.Name(), err, errdefs.ErrInvalidArgument)
	}
	return r.request(ctx, h, method, r.address(h, what, query), header, nil, r.authError)
}

// address of a part of the repository at a host.
func (r *Repository) address(h docker.RegistryHost, what string, query url.Values) string {
	u := url.URL{Scheme: h.Scheme, Host: h.Host, Path: path.Join("/", h.Path, r.path, what)}
	if strings.HasSuffix(what, "/") {
		u.Path += "/"
	}
	if h.Host != r.domain && (r.domain != dockerHub || h.Host != dockerHubHost) {
		q := url.Values{"ns": {r.domain}} // tells a mirror which registry is meant
		for k, v := range query {
			q[k] = v
		}
		query = q
	}
	u.RawQuery = query.Encode()
	return u.String()
}

// body opens what a request sends, anew for each attempt, and gives its length in bytes.
type body func() (io.ReadCloser, int64, error)

// request sends one request to one host, answering its challenge. denied makes an error of
// one that the host will not take. send may be nil.
func (r *Repository) request(ctx context.Context, h docker.RegistryHost, method, address string, header http.Header, send body, denied func(error) error) (*http.Response, error) {
	var tried []*http.Response
	for {
		req, err := http.NewRequestWithContext(ctx, method, address, nil)
		if err != nil {
			return nil, err
		}
		if send != nil {
			if req.Body, req.ContentLength, err = send(); err != nil {
				return nil, err
			}
			if req.ContentLength == 0 {
				req.Body.Close()
				req.Body = http.NoBody
			}
		}
		for _, from := range []http.Header{r.headers, h.Header, header} {
			for k, v := range from {
				req.Header[k] = v
			}
		}
		if h.Authorizer != nil {
			if err := h.Authorizer.Authorize(ctx, req); err != nil {
				if req.Body != nil {
					req.Body.Close()
				}
				return nil, denied(err)
			}
		}
		resp, err := h.Client.Do(req)
		if err != nil {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			return nil, fmt.Errorf("registry %s: %w: %w", h.Host, redact(err), errdefs.ErrUnavailable)
		}
		if resp.StatusCode != http.StatusUnauthorized || h.Authorizer == nil || len(tried) >= 2 {
			return resp, nil
		}
		tried = append(tried, resp)
		if err := h.Authorizer.AddResponses(ctx, tried); err != nil {
			if errdefs.IsNotImplemented(err) {
				return resp, nil
			}
			resp.Body.Close()
			return nil, denied(err)
		}
		_, _ = io.CopyN(io.Discard, resp.Body, maxError)
		resp.Body.Close()
	}
}

// redact takes the query out of an error of net/http: redirects to blob stores carry
// signatures there.
func redact(err error) error {
	var ue *url.Error
	if !errors.As(err, &ue) {
		return err
	}
	if u, perr := url.Parse(ue.URL); perr == nil && u.RawQuery != "" {
		u.RawQuery = "..."
		return &url.Error{Op: ue.Op, URL: u.Redacted(), Err: ue.Err}
	}
	return err
}

func (r *Repository) authError(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errdefs.IsPermissionDenied(err) {
		return err
	}
	var network interface{ Timeout() bool }
	if errors.As(err, &network) && !strings.Contains(err.Error(), "unexpected status") {
		return fmt.Errorf("get access to %s: %w: %w", r.name.Name(), redact(err), errdefs.ErrUnavailable)
	}
	return r.denied(errors.New("authentication failed: " + clip(redact(err).Error(), 300)))
}

// denied is the answer to who may not pull, in Docker's words.
func (r *Repository) denied(cause error) error {
	var class error = errdefs.ErrNotFound // a registry does not say whether a private repository exists
	if r.secret {
		class = errdefs.ErrUnauthenticated
	}
	return fmt.Errorf("pull access denied for %s, repository does not exist or may require 'docker login': %w: %w", reference.FamiliarName(r.name), cause, class)
}

// statusError turns an answer that is no success into an error.
func (r *Repository) statusError(resp *http.Response, h docker.RegistryHost, tagOrDigest string) error {
	code, text := errorText(resp)
	familiar := reference.FamiliarName(r.name)
	switch resp.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return r.denied(text)
	case http.StatusNotFound:
		switch {
		case code == "NAME_UNKNOWN" && r.domain == dockerHub:
			return r.denied(text)
		case tagOrDigest == "":
			return fmt.Errorf("repository %s not found: %w: %w", familiar, text, errdefs.ErrNotFound)
		}
		sep := ":"
		if strings.Contains(tagOrDigest, ":") {
			sep = "@"
		}
		return fmt.Errorf("manifest for %s%s%s not found: %w: %w", familiar, sep, tagOrDigest, text, errdefs.ErrNotFound)
	case http.StatusTooManyRequests:
		return fmt.Errorf("registry %s: toomanyrequests: %w: %w", h.Host, text, errdefs.ErrUnavailable)
	}
	return fmt.Errorf("registry %s answered %s: %w: %w", h.Host, resp.Status, text, errdefs.ErrUnavailable)
}

// errorText reads the error document of a registry (distribution-spec, "Error Codes").
func errorText(resp *http.Response) (code string, text error) {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxError))
	var doc struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
	}
	if json.Unmarshal(body, &doc) == nil && len(doc.Errors) > 0 {
		e := doc.Errors[0]
		word := strings.ToLower(strings.ReplaceAll(clip(e.Code, 40), "_", " "))
		if e.Message == "" {
			return e.Code, errors.New(word)
		}
		return e.Code, fmt.Errorf("%s: %s", word, clip(e.Message, 256))
	}
	if resp.StatusCode == http.StatusNotFound {
		return "", errors.New("manifest unknown")
	}
	if body = bytes.TrimSpace(body); len(body) > 0 && len(body) < 256 {
		return "", errors.New(clip(string(body), 256))
	}
	return "", errors.New(strings.ToLower(http.StatusText(resp.StatusCode)))
}

// clip makes text of a stranger fit for a message: short, and without control characters.
func clip(s string, n int) string {
	if len(s) > n {
		s = strings.ToValidUTF8(s[:n], "") + "..."
	}
	return strings.Map(func(c rune) rune {
		if unicode.IsControl(c) {
			return ' '
		}
		return c
	}, s)
}
