package streaming

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// defaultIdle is the kubelet's default for --streaming-connection-idle-timeout.
	defaultIdle = 4 * time.Hour
	// defaultCreation is how long a client may take to open its streams.
	defaultCreation = 30 * time.Second
	// headerLimit bounds how long a client may take for its request.
	headerLimit = 10 * time.Second
	// maxHeader bounds a request, in bytes.
	maxHeader = 64 << 10
	// closeLimit bounds how long Close waits for calls of the Runtime to return.
	closeLimit = 5 * time.Second
)

// Size is that of a terminal, in characters.
type Size struct{ Width, Height uint16 }

// Streams are the client's ends of a process's streams. A nil one was not asked for.
type Streams struct {
	// Stdin ends with io.EOF when the client has closed it, and with another error
	// when the client has gone.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	TTY            bool
	// Resize gives the newest size of the client's terminal; it is never closed. nil: no terminal.
	Resize <-chan Size
}

// Conn is the client's side of a forwarded connection.
type Conn interface {
	io.ReadWriter
	// CloseWrite tells the client that no more comes; it may go on writing. It fails
	// where only both directions can be closed.
	CloseWrite() error
	// Reset breaks both directions off.
	Reset() error
}

// Runtime is what the server needs of an engine. The context of a call ends when its
// client has gone; the call returns soon after. Readers fail once it has returned.
type Runtime interface {
	// Exec runs a command until it ends and all its output was written, and gives its exit code.
	Exec(ctx context.Context, containerID string, cmd []string, s Streams) (code int, err error)
	// Attach connects to a running container until that ends.
	Attach(ctx context.Context, containerID string, s Streams) error
	// PortForward connects to a TCP port of the pod's loopback and copies both ways
	// until both have ended. An error is one of connecting, and is told to the client.
	PortForward(ctx context.Context, sandboxID string, port uint16, c Conn) error
}

// Options of a Server.
type Options struct {
	Runtime Runtime
	// Address to listen on, HOST:PORT; empty: 127.0.0.1:0. One that other machines can
	// reach needs TLS.
	Address string
	// TLS, if not nil, has the server's certificate.
	TLS *tls.Config
	// Idle closes connections without traffic; 0: 4 h.
	Idle time.Duration
	// Creation is how long a client may take to open its streams; 0: 30 s.
	Creation time.Duration
	Log      *slog.Logger // nil: discard
}

// Server gives URLs and serves them.
type Server struct {
	opt    Options
	log    *slog.Logger
	tokens *tokens
	http   *http.Server
	l      net.Listener
	base   string // scheme://host:port

	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	mu     sync.Mutex
	closed bool
	calls  sync.WaitGroup // connections that are served
}

// New listens; Serve answers. An address that other machines can reach and no TLS is
// errdefs.ErrInvalidArgument.
func New(o Options) (*Server, error) {
	if o.Address == "" {
		o.Address = "127.0.0.1:0"
	}
	if o.Idle == 0 {
		o.Idle = defaultIdle
	}
	if o.Creation == 0 {
		o.Creation = defaultCreation
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	addr, err := listenAddress(o.Address, o.TLS != nil)
	if err != nil {
		return nil, fmt.Errorf("streaming server: %w", err)
	}
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(addr))
	if err != nil {
		return nil, fmt.Errorf("streaming server: %w", err)
	}
	s := &Server{opt: o, log: o.Log, tokens: newTokens(), l: l}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	host := netip.MustParseAddrPort(l.Addr().String())
	if host.Addr().IsUnspecified() { // its client, the kubelet, is on this machine
		ip := netip.AddrFrom4([4]byte{127, 0, 0, 1})
		if addr.Addr().Is6() && !host.Addr().Is4() {
			ip = netip.IPv6Loopback()
		}
		host = netip.AddrPortFrom(ip, host.Port())
	}
	s.base = "http://" + host.String()
	if o.TLS != nil {
		cfg := o.TLS.Clone()
		cfg.NextProtos = []string{"http/1.1"} // HTTP/2 has no upgrade
		if cfg.MinVersion == 0 {
			cfg.MinVersion = tls.VersionTLS12
		}
		s.l = tls.NewListener(l, cfg)
		s.base = "https://" + host.String()
	}
	mux := http.NewServeMux()
	for kind, serve := range map[string]func(http.ResponseWriter, *http.Request, any) bool{
		"exec": s.serveExec, "attach": s.serveAttach, "portforward": s.servePortForward,
	} {
		handler := s.redeem(serve)
		mux.HandleFunc("GET /"+kind+"/{token}", handler)
		mux.HandleFunc("POST /"+kind+"/{token}", handler)
	}
	s.http = &http.Server{
		Handler: mux, ReadHeaderTimeout: headerLimit, IdleTimeout: headerLimit, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
	}
	return s, nil
}

// CheckAddress tells whether New would listen on an address, with or without TLS:
// errdefs.ErrInvalidArgument if not.
func CheckAddress(address string, hasTLS bool) error {
	_, err := listenAddress(address, hasTLS)
	return err
}

// listenAddress checks where the server would listen.
func listenAddress(s string, hasTLS bool) (netip.AddrPort, error) {
	if rest, ok := strings.CutPrefix(s, "localhost:"); ok {
		s = "127.0.0.1:" + rest
	}
	if strings.HasPrefix(s, ":") {
		s = "[::]" + s
	}
	addr, err := netip.ParseAddrPort(s)
	if err != nil {
		return addr, fmt.Errorf("address %q is not IP:PORT: %w", s, errdefs.ErrInvalidArgument)
	}
	if !hasTLS && !addr.Addr().IsLoopback() {
		return addr, fmt.Errorf("address %s can be reached by other machines, which needs a certificate: %w", s, errdefs.ErrInvalidArgument)
	}
	return addr, nil
}

// Address is where the server listens.
func (s *Server) Address() net.Addr { return s.l.Addr() }

// Serve answers until Close.
func (s *Server) Serve() error {
	if err := s.http.Serve(s.l); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("streaming server: %w", err)
	}
	return nil
}

// Close ends all streams and waits for their calls to return.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.tokens.clear()
	err := errors.Join(s.http.Close(), ignoreClosed(s.l.Close()))
	done := make(chan struct{})
	go func() { s.calls.Wait(); close(done) }()
	select {
	case <-done:
		return err
	case <-time.After(closeLimit):
		return errors.Join(err, fmt.Errorf("streaming server: calls did not end in %v", closeLimit))
	}
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// begin counts a connection; false after Close.
func (s *Server) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.calls.Add(1)
	return true
}

// RemoteOptions are what an exec or attach asks for.
type RemoteOptions struct {
	ContainerID string
	Cmd         []string // of an exec

	Stdin, Stdout, Stderr bool
	TTY                   bool
}

func (o RemoteOptions) check() error {
	switch {
	case o.ContainerID == "":
		return fmt.Errorf("no container id: %w", errdefs.ErrInvalidArgument)
	case o.TTY && o.Stderr:
		return fmt.Errorf("a terminal has no separate stderr: tty and stderr cannot both be asked for: %w", errdefs.ErrInvalidArgument)
	case !o.Stdin && !o.Stdout && !o.Stderr:
		return fmt.Errorf("none of stdin, stdout and stderr is asked for: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

type (
	execRequest        struct{ RemoteOptions }
	attachRequest      struct{ RemoteOptions }
	portForwardRequest struct {
		sandboxID string
		ports     []uint16
	}
)

// Exec gives the URL of an exec. Errors are errdefs.ErrInvalidArgument, and
// ErrResourceExhausted when too many URLs wait for their clients. Whether the container
// runs is the caller's to check.
func (s *Server) Exec(o RemoteOptions) (url string, err error) {
	if err := o.check(); err != nil {
		return "", fmt.Errorf("exec: %w", err)
	}
	if len(o.Cmd) == 0 || o.Cmd[0] == "" {
		return "", fmt.Errorf("exec in container %s: no command: %w", o.ContainerID, errdefs.ErrInvalidArgument)
	}
	o.Cmd = slices.Clone(o.Cmd)
	return s.url("exec", execRequest{o})
}

// Attach gives the URL of an attach, as Exec does.
func (s *Server) Attach(o RemoteOptions) (url string, err error) {
	if err := o.check(); err != nil {
		return "", fmt.Errorf("attach: %w", err)
	}
	return s.url("attach", attachRequest{o})
}

// PortForward gives the URL under which connections to a pod are forwarded. ports are
// needed for old WebSocket clients only; others name them for each connection.
func (s *Server) PortForward(sandboxID string, ports []int32) (url string, err error) {
	if sandboxID == "" {
		return "", fmt.Errorf("forward ports: no pod sandbox id: %w", errdefs.ErrInvalidArgument)
	}
	r := portForwardRequest{sandboxID: sandboxID}
	for _, p := range ports {
		if p < 1 || p > 65535 {
			return "", fmt.Errorf("forward ports of pod sandbox %s: %d is no port: %w", sandboxID, p, errdefs.ErrInvalidArgument)
		}
		r.ports = append(r.ports, uint16(p))
	}
	return s.url("portforward", r)
}

func (s *Server) url(kind string, request any) (string, error) {
	token, err := s.tokens.put(request)
	if err != nil {
		return "", fmt.Errorf("%s: %w", kind, err)
	}
	return s.base + "/" + kind + "/" + token, nil
}

// redeem exchanges the token for its request. serve tells whether the token was for it.
func (s *Server) redeem(serve func(http.ResponseWriter, *http.Request, any) bool) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !s.begin() {
			http.Error(w, "the server is shutting down", http.StatusServiceUnavailable)
			return
		}
		defer s.calls.Done()
		request, ok := s.tokens.take(r.PathValue("token"))
		if !ok || !serve(w, r, request) {
			http.NotFound(w, r)
		}
	}
}

func (s *Server) serveExec(w http.ResponseWriter, r *http.Request, request any) bool {
	req, ok := request.(execRequest)
	if ok {
		s.serveRemote(w, r, req.RemoteOptions, func(ctx context.Context, st Streams) (int, error) {
			code, err := s.opt.Runtime.Exec(ctx, req.ContainerID, req.Cmd, st)
			if err != nil {
				err = fmt.Errorf("error executing command in container: %w", err)
			}
			return code, err
		})
	}
	return ok
}

func (s *Server) serveAttach(w http.ResponseWriter, r *http.Request, request any) bool {
	req, ok := request.(attachRequest)
	if ok {
		s.serveRemote(w, r, req.RemoteOptions, func(ctx context.Context, st Streams) (int, error) {
			err := s.opt.Runtime.Attach(ctx, req.ContainerID, st)
			if err != nil {
				err = fmt.Errorf("error attaching to container: %w", err)
			}
			return 0, err
		})
	}
	return ok
}

func (s *Server) servePortForward(w http.ResponseWriter, r *http.Request, request any) bool {
	req, ok := request.(portForwardRequest)
	if ok {
		s.forward(w, r, req)
	}
	return ok
}
