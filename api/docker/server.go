package docker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"runtime/debug"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

const (
	headerTimeout = 30 * time.Second
	idleTimeout   = 5 * time.Minute
	// maxHeader leaves room for X-Registry-Config with credentials of many registries.
	maxHeader = 256 << 10
)

// Options configure a Server. Backend must be set.
type Options struct {
	Backend   Backend
	Version   string // of hako
	GitCommit string
	BuildTime string
	// Observe is told of each call that reached a route: its pattern, the status of the
	// answer, and how long it took, streams included. nil: nobody.
	Observe func(route string, status int, took time.Duration)
	Log     *slog.Logger // nil: discard
}

// Server is the API. It is an http.Handler.
type Server struct {
	opt    Options
	log    *slog.Logger
	mux    *http.ServeMux
	http   *http.Server
	ctx    context.Context // ends streams at Shutdown
	cancel context.CancelCauseFunc
}

// New makes a server.
func New(o Options) *Server {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{opt: o, log: o.Log, mux: http.NewServeMux()}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	s.http = &http.Server{
		Handler:           s,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return s.ctx },
	}
	s.routes()
	return s
}

// Serve answers requests on a unix socket until Shutdown. Whoever can connect can do
// all that root can, so a listener of another kind, which the kernel guards with no
// permissions, is refused: errdefs.ErrInvalidArgument.
func (s *Server) Serve(l net.Listener) error {
	if n := l.Addr().Network(); n != "unix" {
		return fmt.Errorf("serve the Docker API on %s %s: only unix sockets are supported, as TCP needs TLS with client certificates: %w", n, l.Addr(), errdefs.ErrInvalidArgument)
	}
	if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve the Docker API on %s: %w", l.Addr(), err)
	}
	return nil
}

// errShutdown ends the requests that the server does not wait for.
var errShutdown = fmt.Errorf("the daemon is shutting down: %w", errdefs.ErrUnavailable)

// Shutdown ends streams, lets requests under way finish until ctx ends, and closes.
func (s *Server) Shutdown(ctx context.Context) error {
	s.cancel(errShutdown)
	if err := s.http.Shutdown(ctx); err != nil {
		return errors.Join(err, s.http.Close())
	}
	return nil
}

// call is one request.
type call struct {
	*http.Request
	w       *response
	version version
	log     *slog.Logger
}

// handler answers a call, or gives an error before anything was answered.
type handler func(ctx context.Context, c *call) error

// handle registers a handler for a pattern of http.ServeMux.
func (s *Server) handle(pattern string, h handler) {
	s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		c := &call{Request: r, w: w.(*response), version: versionOf(r.Context()), log: s.log}
		if s.opt.Observe != nil {
			began := time.Now()
			defer func() { s.opt.Observe(pattern, c.w.status(), time.Since(began)) }()
		}
		if err := h(r.Context(), c); err != nil {
			c.fail(err)
		}
	})
}

type versionKey struct{}

func versionOf(ctx context.Context) version {
	v, _ := ctx.Value(versionKey{}).(version)
	return v
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	w := &response{ResponseWriter: rw}
	defer s.recovered(w, r)
	h := w.Header()
	h.Set("Server", "hako/"+s.opt.Version+" (linux)")
	h.Set("Api-Version", MaxVersion)
	h.Set("Ostype", "linux")
	h.Set("Docker-Experimental", "false")
	c := &call{Request: r, w: w, log: s.log}
	if err := guardBrowser(r); err != nil {
		c.fail(err)
		return
	}
	v, rest, err := cutVersion(r.URL.Path)
	if err != nil {
		c.fail(err)
		return
	}
	_, rawRest, _ := cutVersion(r.URL.EscapedPath())
	r = r.WithContext(context.WithValue(r.Context(), versionKey{}, v))
	if r.URL, err = routeURL(r.URL, rest, rawRest); err != nil {
		c.fail(err)
		return
	}
	if r.Method == http.MethodOptions {
		w.WriteHeader(http.StatusOK)
		return
	}
	if _, pattern := s.mux.Handler(r); pattern == "" {
		c.fail(errNoPage)
		return
	}
	s.mux.ServeHTTP(w, r)
}

var errNoPage = notFoundf("page not found")

// routeURL gives the URL that the routes see: without version, and with repeated
// slashes made one, since ids may be given with a leading slash. A path that http.ServeMux
// would answer with a redirect has no page: clients do not follow it.
func routeURL(u *url.URL, rest, rawRest string) (*url.URL, error) {
	squeeze := func(s string) string {
		for strings.Contains(s, "//") {
			s = strings.ReplaceAll(s, "//", "/")
		}
		return s
	}
	out := *u
	raw := squeeze(rawRest)
	plain, err := url.PathUnescape(raw)
	if err != nil || strings.ContainsRune(rest, 0) {
		return nil, invalidf("bad path %q", u.Path)
	}
	if clean := path.Clean(raw); clean != raw && clean+"/" != raw {
		return nil, errNoPage
	}
	out.Path, out.RawPath = plain, raw
	return &out, nil
}

// guardBrowser refuses what a web page can send but no Docker client does: a page
// that reaches the socket through a proxy or, on TCP, by rebinding its own name to a local
// address would otherwise act as root.
func guardBrowser(r *http.Request) error {
	if origin := r.Header.Get("Origin"); origin != "" && !sameLocalOrigin(origin, r.Host) {
		return &textError{"requests from web pages (Origin: " + origin + ") are not allowed", errdefs.ErrPermissionDenied}
	}
	addr, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if addr != nil && addr.Network() != "unix" && !localHost(r.Host) {
		return &textError{"requests for host " + r.Host + " are not allowed", errdefs.ErrPermissionDenied}
	}
	return nil
}

// sameLocalOrigin accepts the Origin that WebSocket libraries send on their own.
func sameLocalOrigin(origin, host string) bool {
	u, err := url.Parse(origin)
	return err == nil && u.Host == host && localHost(host)
}

// localHost tells whether a Host header names this machine in a way that DNS cannot forge.
func localHost(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if host == "localhost" {
		return true
	}
	_, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil
}

// recovered turns a panic of a handler into a 500. The daemon serves every container
// of the node and must not fall for one request.
func (s *Server) recovered(w *response, r *http.Request) {
	v := recover()
	if v == nil {
		return
	}
	if v == http.ErrAbortHandler {
		panic(v)
	}
	s.log.Error("panic in a handler", "method", r.Method, "path", r.URL.Path, "panic", v, "stack", string(debug.Stack()))
	if w.wrote {
		panic(http.ErrAbortHandler)
	}
	c := &call{Request: r, w: w, log: s.log}
	c.fail(fmt.Errorf("internal error while answering %s %s", r.Method, r.URL.Path))
}
