package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
)

// Login asks a registry, not its mirrors, whether it takes credentials. address is what
// docker login calls the registry: a host, or a URL; "" is Docker Hub.
//
// Errors: errdefs.ErrUnauthenticated in Docker's words, ErrUnavailable.
func (c *Client) Login(ctx context.Context, address string, given Credentials) error {
	domain, err := loginDomain(address)
	if err != nil {
		return err
	}
	if given.empty() {
		return fmt.Errorf("login to %s: no credentials were given: %w", domain, errdefs.ErrInvalidArgument)
	}
	r := &Repository{c: c, domain: domain, headers: http.Header{}, secret: true}
	if c.o.UserAgent != "" {
		r.headers.Set("User-Agent", c.o.UserAgent)
	}
	hosts, err := c.hosts(domain, given)
	if err != nil {
		return fmt.Errorf("registry %s: %w", domain, err)
	}
	for _, h := range hosts {
		if belongs(domain, h.Host) {
			return r.login(ctx, h)
		}
	}
	return fmt.Errorf("registry %s has no host of its own: %w", domain, errdefs.ErrFailedPrecondition)
}

// login fetches the base of the API (distribution-spec, "Determining Support").
func (r *Repository) login(ctx context.Context, h docker.RegistryHost) error {
	base := url.URL{Scheme: h.Scheme, Host: h.Host, Path: path.Join("/", h.Path) + "/"}
	resp, err := r.request(quiet(ctx), h, http.MethodGet, base.String(), nil, nil, func(err error) error {
		var network interface{ Timeout() bool }
		switch {
		case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded), errdefs.IsPermissionDenied(err):
			return err
		case errors.As(err, &network) && !strings.Contains(err.Error(), "unexpected status"):
			return fmt.Errorf("get access to %s: %w: %w", r.domain, redact(err), errdefs.ErrUnavailable)
		}
		return fmt.Errorf("Get %q: unauthorized: incorrect username or password: %w", base.String(), errdefs.ErrUnauthenticated) //nolint:staticcheck // Docker's words
	})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
		return nil
	case http.StatusUnauthorized, http.StatusForbidden:
		return fmt.Errorf("login attempt to %s failed with status: %s: %w", base.String(), resp.Status, errdefs.ErrUnauthenticated)
	}
	_, text := errorText(resp)
	return fmt.Errorf("login attempt to %s failed with status: %s: %w: %w", base.String(), resp.Status, text, errdefs.ErrUnavailable)
}

// loginDomain gives the registry that an address means.
func loginDomain(address string) (string, error) {
	host := address
	if _, rest, ok := strings.Cut(address, "://"); ok {
		host = rest
	}
	host, _, _ = strings.Cut(host, "/")
	switch host {
	case "", "index.docker.io", dockerHubHost, dockerHub:
		if address == "" || host != "" {
			return dockerHub, nil
		}
	}
	if u, err := url.Parse("https://" + host); err != nil || u.Host != host || host == "" || strings.ContainsAny(host, " \\@") {
		return "", fmt.Errorf("%q is not the address of a registry: %w", clip(address, 200), errdefs.ErrInvalidArgument)
	}
	return host, nil
}
