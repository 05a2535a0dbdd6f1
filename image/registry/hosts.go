package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

const (
	dockerHubHost = "registry-1.docker.io"
	maxRedirects  = 10
	maxRetryAfter = 30 * time.Second
)

// hosts gives what serves a registry, as hosts.toml in the certs.d folder says
// (containerd's docs/hosts.md): mirrors first. A loopback address may speak plain http.
func (c *Client) hosts(domain string, given Credentials) ([]docker.RegistryHost, error) {
	g := &guard{plain: map[string]bool{}}
	o := config.HostOptions{
		Credentials: func(host string) (string, string, error) {
			cred, err := c.credentials(domain, host, given)
			if cred.IdentityToken != "" {
				return "", cred.IdentityToken, err
			}
			return cred.Username, cred.Password, err
		},
		UpdateClient: func(hc *http.Client) error {
			hc.CheckRedirect = checkRedirect
			if _, ok := hc.Transport.(*transport); !ok {
				if t, ok := hc.Transport.(*http.Transport); ok {
					t.ResponseHeaderTimeout = c.o.Timeout
					t.ForceAttemptHTTP2 = true
					t.ReadBufferSize = 64 << 10
					t.MaxIdleConnsPerHost = 8
				}
				hc.Transport = &transport{next: hc.Transport, o: &c.o, guard: g}
			}
			return nil
		},
	}
	if c.o.PlainHTTP {
		o.DefaultScheme = "http"
	}
	if c.o.Insecure {
		// With settings for TLS the library tries it first, and plain http after that.
		o.DefaultTLS, o.DefaultScheme = &tls.Config{InsecureSkipVerify: true}, "http" //nolint:gosec // this is what was asked for
	}
	if c.o.CertDir != "" {
		if _, err := os.ReadDir(c.o.CertDir); err != nil {
			return nil, fmt.Errorf("certificates: %w", err)
		}
		o.HostDir = func(string) (string, error) { return c.o.CertDir, nil }
	} else if c.o.Dir != "" {
		find := config.HostDirFromRoot(c.o.Dir)
		o.HostDir = func(host string) (string, error) {
			dir, err := find(host)
			if err != nil {
				return dir, err
			}
			return dir, checkHostsFile(filepath.Join(dir, "hosts.toml"))
		}
	}
	hosts, err := config.ConfigureHosts(quiet(context.Background()), o)(domain)
	if err != nil {
		return nil, err
	}
	for i := range hosts {
		h := &hosts[i]
		if h.Scheme == "http" || c.o.Insecure || docker.IsLocalhost(h.Host) {
			g.allow(h.Host)
		}
		if h.Client == nil {
			return nil, fmt.Errorf("host %s: no client: %w", h.Host, errdefs.ErrInternal)
		}
		if given.RegistryToken != "" && belongs(domain, h.Host) {
			h.Authorizer = bearer{h.Host, given.RegistryToken}
		}
	}
	return hosts, nil
}

// belongs says whether credentials for a registry are meant for a host.
func belongs(domain, host string) bool {
	return host == domain || domain == dockerHub && (host == dockerHubHost || host == "index.docker.io")
}

// checkHostsFile refuses what does not parse: the library would go on without the file,
// and so without the mirrors and authorities that it asks for.
func checkHostsFile(name string) error {
	b, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return validHosts(name, b)
}

func validHosts(name string, b []byte) error {
	var doc struct {
		Server string         `toml:"server"`
		Host   map[string]any `toml:"host"`
	}
	if err := toml.Unmarshal(b, &doc); err != nil {
		return fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// bearer sends one token to one host.
type bearer struct{ host, token string }

func (b bearer) Authorize(_ context.Context, req *http.Request) error {
	if req.URL.Host == b.host {
		req.Header.Set("Authorization", "Bearer "+b.token)
	}
	return nil
}

func (b bearer) AddResponses(context.Context, []*http.Response) error {
	return errdefs.ErrNotImplemented
}

// checkRedirect lets nothing private through to another origin. net/http by itself
// would keep Authorization for another port or subdomain, and all other headers.
func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= maxRedirects {
		return errors.New("stopped after 10 redirects")
	}
	from := via[0]
	// (On loopback, https may only have been tried before plain http.)
	if from.URL.Scheme == "https" && req.URL.Scheme != "https" && !docker.IsLocalhost(from.URL.Host) {
		return fmt.Errorf("redirect from https to %s: %w", req.URL.Scheme, errdefs.ErrPermissionDenied)
	}
	if req.URL.Host == from.URL.Host && req.URL.Scheme == from.URL.Scheme {
		return nil
	}
	kept := http.Header{}
	for _, k := range []string{"Accept", "Accept-Encoding", "Range", "User-Agent", "Content-Type", "Traceparent"} {
		if v, ok := req.Header[k]; ok {
			kept[k] = v
		}
	}
	req.Header = kept
	return nil
}

// guard keeps credentials off the wire in the clear, but for hosts that are
// configured for plain http or are on this machine.
type guard struct {
	mu    sync.Mutex
	plain map[string]bool
}

func (g *guard) allow(host string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.plain[host] = true
}

func (g *guard) check(req *http.Request) error {
	if req.URL.Scheme != "http" {
		return nil
	}
	form := strings.HasPrefix(req.Header.Get("Content-Type"), "application/x-www-form-urlencoded")
	if req.Header.Get("Authorization") == "" && !form {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.plain[req.URL.Host] || docker.IsLocalhost(req.URL.Host) {
		return nil
	}
	return fmt.Errorf("credentials for %s would be sent over plain http: %w", req.URL.Host, errdefs.ErrPermissionDenied)
}

// transport tries again what may succeed later: network errors, 429 and 5xx, of
// requests that have no effect.
type transport struct {
	next  http.RoundTripper
	o     *Options
	guard *guard
}

func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := t.guard.check(req); err != nil {
		return nil, err
	}
	for attempt := 1; ; attempt++ {
		resp, err := t.next.RoundTrip(req)
		last := attempt >= t.o.Attempts || req.Method != http.MethodGet && req.Method != http.MethodHead || req.Body != nil && req.Body != http.NoBody
		if last || req.Context().Err() != nil {
			return resp, err
		}
		wait := delay(t.o.Backoff, attempt)
		switch {
		case err != nil:
			if !transient(err) {
				return nil, err
			}
			t.o.Log.Debug("registry request failed, trying again", "host", req.URL.Host, "attempt", attempt, "err", redact(err))
		case resp.StatusCode == http.StatusTooManyRequests, resp.StatusCode == http.StatusRequestTimeout,
			resp.StatusCode >= 500 && resp.StatusCode != http.StatusNotImplemented && resp.StatusCode != http.StatusHTTPVersionNotSupported:
			if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s >= 0 {
				asked := time.Duration(s) * time.Second
				if s > int(maxRetryAfter/time.Second) {
					return resp, nil
				}
				wait = max(wait, asked)
			}
			_, _ = io.CopyN(io.Discard, resp.Body, maxError)
			resp.Body.Close()
			t.o.Log.Debug("registry is busy, trying again", "host", req.URL.Host, "attempt", attempt, "status", resp.StatusCode)
		default:
			return resp, nil
		}
		select {
		case <-time.After(wait):
		case <-req.Context().Done():
			return nil, context.Cause(req.Context())
		}
	}
}

// delay is the time to wait after an attempt: doubled each time, and spread so that many
// clients do not come back at once.
func delay(base time.Duration, attempt int) time.Duration {
	d := base << min(attempt-1, 6)
	return d/2 + rand.N(d/2+1)
}

// transient says whether an error of the network may be gone the next time.
func transient(err error) bool {
	var (
		record tls.RecordHeaderError
		cert   *tls.CertificateVerificationError
		host   x509.HostnameError
		alert  tls.AlertError
		dns    *net.DNSError
		netErr net.Error
	)
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return false
	case errors.As(err, &record), errors.As(err, &cert), errors.As(err, &host), errors.As(err, &alert):
		return false
	case errors.As(err, &dns):
		return !dns.IsNotFound
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF),
		errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EPIPE):
		return true
	case errors.As(err, &netErr):
		return netErr.Timeout()
	}
	return strings.Contains(err.Error(), "http2: server sent GOAWAY") || strings.Contains(err.Error(), "server closed idle connection")
}
