package verify

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/tuf"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/hako-engine/hako/internal/version"
)

// trust gives the certificates and the keys of logs that count.
type trust interface {
	material(ctx context.Context) (root.TrustedMaterial, error)
}

// fileTrust is a trusted_root.json.
type fileTrust struct{ m root.TrustedMaterial }

func (f fileTrust) material(context.Context) (root.TrustedMaterial, error) { return f.m, nil }

const (
	trustedRootTarget = "trusted_root.json"
	mirrorAge         = 24 * time.Hour   // after which a mirror is asked again
	mirrorTimeout     = 30 * time.Second // for all that is fetched
)

// mirror is a repository of The Update Framework (its specification, 1.0) that keeps a
// trusted_root.json up to date. It is asked when a signature is to be checked, at most
// once in a day; while it does not answer, what it sent before counts until that expires.
type mirror struct {
	url, cache string
	root       []byte

	mu   sync.Mutex
	got  root.TrustedMaterial // nil: not yet
	when time.Time
}

func newMirror(address, rootFile, cache string) (*mirror, error) {
	if address == "" || rootFile == "" {
		return nil, fmt.Errorf("tuf-mirror is an address and needs tuf-root, a file root.json to trust it by: %w", errdefs.ErrInvalidArgument)
	}
	u, err := url.Parse(address)
	if err != nil {
		return nil, fmt.Errorf("tuf-mirror: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	ip, _ := netip.ParseAddr(u.Hostname())
	switch {
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
	case u.Scheme == "https" && u.Host != "", u.Scheme == "http" && (ip.IsLoopback() || u.Hostname() == "localhost"), u.Scheme == "file" && u.Host == "" && filepath.IsAbs(u.Path):
		raw, err := readFile(rootFile)
		if err != nil {
			return nil, fmt.Errorf("tuf-root: %w", err)
		}
		var doc metadata.Metadata[metadata.RootType]
		if _, err := doc.FromBytes(raw); err != nil {
			return nil, fmt.Errorf("tuf-root %s: %w: %w", rootFile, err, errdefs.ErrInvalidArgument)
		}
		return &mirror{url: strings.TrimSuffix(address, "/"), cache: cache, root: raw}, nil
	}
	return nil, fmt.Errorf("tuf-mirror %q: neither https://HOST[/PATH] nor file:///PATH: %w", address, errdefs.ErrInvalidArgument)
}

func (m *mirror) material(ctx context.Context) (root.TrustedMaterial, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.got != nil && time.Since(m.when) < mirrorAge {
		return m.got, nil
	}
	ctx, cancel := context.WithTimeout(ctx, mirrorTimeout)
	defer cancel()
	o := &tuf.Options{CacheValidity: 1, Root: m.root, CachePath: m.cache, RepositoryBaseURL: m.url, DisableLocalCache: m.cache == "", Fetcher: fetcher{ctx}}
	got, err := fetchRoot(o)
	if err != nil && m.cache != "" {
		o.ForceCache = true // what is here, as long as it is valid
		if old, oerr := fetchRoot(o); oerr == nil {
			got, err = old, nil
		}
	}
	if err != nil {
		return nil, fmt.Errorf("trusted root of %s: %w: %w", m.url, err, errdefs.ErrUnavailable)
	}
	m.got, m.when = got, time.Now()
	return got, nil
}

func fetchRoot(o *tuf.Options) (root.TrustedMaterial, error) {
	c, err := tuf.New(o)
	if err != nil {
		return nil, err
	}
	raw, err := c.GetTarget(trustedRootTarget)
	if err != nil {
		return nil, err
	}
	return root.NewTrustedRootFromJSON(raw)
}

// fetcher gets the files of a mirror.
type fetcher struct{ ctx context.Context }

// DownloadFile gives a file of at most so many bytes.
func (f fetcher) DownloadFile(address string, limit int64, _ time.Duration) ([]byte, error) {
	var body io.ReadCloser
	if path, ok := strings.CutPrefix(address, "file://"); ok {
		file, err := os.Open(path)
		if errors.Is(err, os.ErrNotExist) {
			return nil, &metadata.ErrDownloadHTTP{StatusCode: http.StatusNotFound, URL: address}
		}
		if err != nil {
			return nil, err
		}
		body = file
	} else {
		req, err := http.NewRequestWithContext(f.ctx, http.MethodGet, address, nil)
		if err != nil {
			return nil, err
		}
		req.Header.Set("User-Agent", "hako/"+version.Version)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return nil, err
		}
		if resp.StatusCode != http.StatusOK {
			resp.Body.Close()
			return nil, &metadata.ErrDownloadHTTP{StatusCode: resp.StatusCode, URL: address}
		}
		body = resp.Body
	}
	defer body.Close()
	raw, err := io.ReadAll(io.LimitReader(body, limit+1))
	if err == nil && int64(len(raw)) > limit {
		err = &metadata.ErrDownloadLengthMismatch{Msg: fmt.Sprintf("%s has more than %d bytes", address, limit)}
	}
	return raw, err
}
