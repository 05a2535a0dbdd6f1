// Package nri lets plugins of the Node Resource Interface (github.com/containerd/nri) follow
// pods and their containers, adjust, update and evict them.
//
// In flow the engine's calls of its hooks, and what plugins ask for out of their own; out flow
// the plugins' adjustments in the engine's types, and errors with a class of errdefs. The
// package keeps nothing but its connections: what plugins made of a container is in the
// engine's record of it.
//
// A plugin has a time limit for each request. One that exceeds it, or dies, is dropped, and
// the request goes on without it, unless the plugin itself asked for another policy.
package nri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	nrilog "github.com/containerd/nri/pkg/log"
	"github.com/containerd/ttrpc"

	"github.com/hako-engine/hako/engine"
)

// Backend is what plugins reach of the engine, which documents each call.
type Backend interface {
	Hooked(ctx context.Context) ([]engine.Sandbox, []engine.HookContainer)
	UpdateHooked(ctx context.Context, updates []engine.ContainerUpdate) (failed []engine.ContainerUpdate, err error)
	Evict(ctx context.Context, id, reason string) error
}

// Options configure a Server.
type Options struct {
	Socket    string // unix socket that plugins connect to
	PluginDir string // plugins that the server starts: executables NN-NAME; may be missing
	ConfigDir string // their configurations: NN-NAME.conf or NAME.conf; may be missing
	// RequestLimit is how long a plugin may take over one request, RegisterLimit how long to
	// introduce itself. They are the process's: the library knows no others. 0: the defaults.
	RequestLimit  time.Duration
	RegisterLimit time.Duration
	Version       string
	Log           *slog.Logger // nil: discard
}

// Defaults of the time limits. The library's for requests, 2 s, is too short for a plugin that
// is shown a full node when it comes.
const (
	DefaultRequestLimit  = 5 * time.Second
	DefaultRegisterLimit = 5 * time.Second
)

// Server serves plugins. It is the engine's Hooks; until Start it has no plugins.
type Server struct {
	opt     Options
	log     *slog.Logger
	adapt   *adaptation.Adaptation
	backend atomic.Pointer[Backend]

	plugins counter

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	work   sync.WaitGroup
}

var _ engine.Hooks = (*Server)(nil)

// New makes a Server.
func New(o Options) (*Server, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.RequestLimit == 0 {
		o.RequestLimit = DefaultRequestLimit
	}
	if o.RegisterLimit == 0 {
		o.RegisterLimit = DefaultRegisterLimit
	}
	adaptation.SetPluginRequestTimeout(o.RequestLimit)
	adaptation.SetPluginRegistrationTimeout(o.RegisterLimit)
	s := &Server{opt: o, log: o.Log}
	s.plugins.n.Store(unknown)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	var err error
	s.adapt, err = adaptation.New("hako", o.Version, s.synchronize, s.unsolicited,
		adaptation.WithSocketPath(o.Socket), adaptation.WithPluginPath(o.PluginDir), adaptation.WithPluginConfigPath(o.ConfigDir),
		adaptation.WithMetrics(&s.plugins),
		adaptation.WithTTRPCOptions(
			[]ttrpc.ClientOpts{ttrpc.WithUnaryClientInterceptor(s.evictionsOfReply)},
			[]ttrpc.ServerOpt{ttrpc.WithUnaryServerInterceptor(s.evictionsOfRequest)}))
	if err != nil {
		return nil, fmt.Errorf("NRI: %w", err)
	}
	return s, nil
}

// Start starts the plugins of the plugin folder, and listens for others.
func (s *Server) Start(b Backend) error {
	if err := clearSocket(s.opt.Socket); err != nil {
		return err
	}
	s.backend.Store(&b)
	if err := s.adapt.Start(); err != nil {
		s.backend.Store(nil)
		return fmt.Errorf("NRI: %w", err)
	}
	// The library makes it as the umask says. Whoever may connect is as powerful as root.
	if err := os.Chmod(s.opt.Socket, 0o600); err != nil {
		s.Close()
		return fmt.Errorf("NRI: %w", err)
	}
	return nil
}

// Close ends the connections to plugins, and those that the server started.
func (s *Server) Close() {
	s.cancel()
	s.backend.Store(nil)
	s.adapt.Stop()
	s.work.Wait()
}

// clearSocket makes room for the socket: the library would remove whatever is there.
func clearSocket(path string) error {
	fi, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return os.MkdirAll(filepath.Dir(path), 0o711)
	case err != nil:
		return fmt.Errorf("NRI socket: %w", err)
	case fi.Mode().Type() != os.ModeSocket:
		return fmt.Errorf("NRI socket %s: there is a file that is no socket: %w", path, errdefs.ErrAlreadyExists)
	}
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return fmt.Errorf("NRI socket %s: another process listens on it: %w", path, errdefs.ErrAlreadyExists)
	}
	return nil
}

// Hold is engine.Hooks.
func (s *Server) Hold() (release func()) {
	b := s.adapt.BlockPluginSync()
	return b.Unblock
}

// Idle is engine.Hooks.
func (s *Server) Idle() bool { return s.plugins.n.Load() == 0 }

// unknown is the number of plugins before the library has told it. Of those that it starts itself it does not before the first request.
const unknown = -1

// counter is told by the library how many plugins there are: when one was added, before the synchronization is over, and after each request.
type counter struct{ n atomic.Int64 }

// UpdatePluginCount is adaptation.Metrics, as the others are, which are of no interest.
func (c *counter) UpdatePluginCount(count int) { c.n.Store(int64(count)) }

func (*counter) RecordPluginInvocation(string, string, error)                               {}
func (*counter) RecordPluginLatency(string, string, time.Duration)                          {}
func (*counter) RecordPluginAdjustments(string, string, *api.ContainerAdjustment, int, int) {}

// synchronize brings a new plugin up to date. The library holds off all events meanwhile.
func (s *Server) synchronize(ctx context.Context, tell adaptation.SyncCB) error {
	b := s.backend.Load()
	if b == nil {
		return fmt.Errorf("the engine is not open: %w", errdefs.ErrUnavailable)
	}
	pods, members := (*b).Hooked(ctx)
	wirePods, wireMembers := make([]*api.PodSandbox, len(pods)), make([]*api.Container, len(members))
	for i, p := range pods {
		wirePods[i] = wireSandbox(p)
	}
	for i, c := range members {
		wireMembers[i] = wireContainer(c)
	}
	wire, err := tell(ctx, wirePods, wireMembers)
	if err != nil {
		return err
	}
	updates, err := updatesOf(wire)
	if err != nil {
		return err
	}
	if len(updates) > 0 {
		// Afterwards: a container that is busy would hold off everything else.
		s.work.Go(func() { _, _ = (*b).UpdateHooked(s.ctx, updates) }) // it logs what failed
	}
	return nil
}

// unsolicited does what a plugin asks for out of its own.
func (s *Server) unsolicited(ctx context.Context, wire []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) {
	b := s.backend.Load()
	if b == nil {
		return wire, fmt.Errorf("the engine is not open: %w", errdefs.ErrUnavailable)
	}
	updates, err := updatesOf(wire)
	if err != nil {
		return wire, err
	}
	failed, err := (*b).UpdateHooked(ctx, updates)
	var out []*api.ContainerUpdate
	for _, u := range failed {
		for _, w := range wire {
			if w.GetContainerId() == u.ID {
				out = append(out, w)
			}
		}
	}
	return out, err
}

// evictionsOfReply finds the evictions in a plugin's replies, which the library passes over.
func (s *Server) evictionsOfReply(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, invoke ttrpc.Invoker) error {
	if err := invoke(ctx, req, resp); err != nil {
		return err
	}
	var reply interface {
		GetEvict() []*api.ContainerEviction
	}
	switch req.Method {
	case "CreateContainer":
		m := &api.CreateContainerResponse{}
		if m.UnmarshalVT(resp.Payload) != nil {
			return nil // the library will say it
		}
		reply = m
	case "UpdateContainer":
		m := &api.UpdateContainerResponse{}
		if m.UnmarshalVT(resp.Payload) != nil {
			return nil
		}
		reply = m
	default:
		return nil
	}
	s.evict(reply.GetEvict())
	return nil
}

// evictionsOfRequest finds those in what plugins ask for out of their own.
func (s *Server) evictionsOfRequest(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, next ttrpc.Method) (any, error) {
	var asked *api.UpdateContainersRequest
	resp, err := next(ctx, func(m any) error {
		err := unmarshal(m)
		asked, _ = m.(*api.UpdateContainersRequest)
		return err
	})
	s.evict(asked.GetEvict())
	return resp, err
}

// evict stops containers beside the request, which may be about one of them.
func (s *Server) evict(list []*api.ContainerEviction) {
	b := s.backend.Load()
	if b == nil || len(list) == 0 {
		return
	}
	for _, e := range list {
		s.work.Go(func() {
			if err := (*b).Evict(s.ctx, e.GetContainerId(), e.GetReason()); err != nil {
				s.log.Warn("evict a container as a plugin asks", "container", e.GetContainerId(), "error", err)
			}
		})
	}
}

// LogTo says where the library writes, which the whole process shares. It is called once,
// before New.
func LogTo(l *slog.Logger) { nrilog.Set(logger{l}) }

// logger writes the library's messages.
type logger struct{ l *slog.Logger }

func (l logger) write(ctx context.Context, level slog.Level, format string, args []any) {
	if ctx == nil {
		ctx = context.Background()
	}
	if l.l.Enabled(ctx, level) {
		l.l.Log(ctx, level, "NRI: "+fmt.Sprintf(format, args...))
	}
}

func (l logger) Debugf(ctx context.Context, format string, args ...any) {
	l.write(ctx, slog.LevelDebug, format, args)
}

// Infof is for debugging: the library tells every connection with five lines.
func (l logger) Infof(ctx context.Context, format string, args ...any) {
	l.write(ctx, slog.LevelDebug, format, args)
}

func (l logger) Warnf(ctx context.Context, format string, args ...any) {
	l.write(ctx, slog.LevelWarn, format, args)
}

// Errorf gives a word of its own to what the library takes for an error and is none: that it
// was built without WebAssembly.
func (l logger) Errorf(ctx context.Context, format string, args ...any) {
	level := slog.LevelError
	if strings.Contains(format, "WASM support") {
		level = slog.LevelDebug
	}
	l.write(ctx, level, format, args)
}
