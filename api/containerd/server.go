package containerd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	mountsapi "github.com/containerd/containerd/api/services/mounts/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	streamingapi "github.com/containerd/containerd/api/services/streaming/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	transferapi "github.com/containerd/containerd/api/services/transfer/v1"
	ttrpcevents "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"
)

// maxMessage is the longest message either way: that of containerd, in bytes.
const maxMessage = 16 << 20

// Server serves the containerd API.
type Server struct {
	opt     Options
	log     *slog.Logger
	grpc    *grpc.Server
	ttrpc   *ttrpc.Server
	health  *health.Server
	streams streams
	stop    context.CancelFunc
	stopped context.Context // ends with Shutdown: for calls that would go on for ever
}

// New makes a Server. It starts nothing.
func New(o Options) (*Server, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Called == nil {
		o.Called = func() {}
	}
	s := &Server{opt: o, log: o.Log, health: health.NewServer()}
	s.stopped, s.stop = context.WithCancel(context.Background())
	s.grpc = grpc.NewServer(
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
		grpc.ChainUnaryInterceptor(s.unary), grpc.ChainStreamInterceptor(s.stream),
	)
	s.register(s.grpc)
	for _, guest := range o.Guests {
		guest(s.grpc)
	}
	var err error
	if s.ttrpc, err = ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(s.ttrpcUnary)); err != nil {
		return nil, fmt.Errorf("containerd API: %w", err)
	}
	ttrpcevents.RegisterTTRPCEventsService(s.ttrpc, ttrpcEvents{s})
	return s, nil
}

// register is the table of services.
func (s *Server) register(r grpc.ServiceRegistrar) {
	healthapi.RegisterHealthServer(r, s.health)
	versionapi.RegisterVersionServer(r, &versionService{Server: s})
	namespacesapi.RegisterNamespacesServer(r, &namespaceService{Server: s})
	introspectionapi.RegisterIntrospectionServer(r, &introspectionService{s: s})
	contentapi.RegisterContentServer(r, &contentService{Server: s})
	imagesapi.RegisterImagesServer(r, &imageService{Server: s})
	leasesapi.RegisterLeasesServer(r, &leaseService{Server: s})
	snapshotsapi.RegisterSnapshotsServer(r, &snapshotService{Server: s})
	eventsapi.RegisterEventsServer(r, &eventService{Server: s})
	diffapi.RegisterDiffServer(r, &diffService{Server: s})
	streamingapi.RegisterStreamingServer(r, &streamingService{Server: s})
	transferapi.RegisterTransferServer(r, &transferService{Server: s})
	if s.opt.Mounts != nil {
		mountsapi.RegisterMountsServer(r, &mountService{Server: s})
	}
	if s.opt.Backend != nil {
		containersapi.RegisterContainersServer(r, &containerService{Server: s})
		tasksapi.RegisterTasksServer(r, &taskService{Server: s})
		sandboxapi.RegisterStoreServer(r, &sandboxStoreService{Server: s})
		sandboxapi.RegisterControllerServer(r, &sandboxControllerService{Server: s})
	}
}

// Serve answers gRPC on l until Shutdown.
func (s *Server) Serve(l net.Listener) error {
	if err := s.grpc.Serve(l); err != nil {
		return fmt.Errorf("serve the containerd API: %w", err)
	}
	return nil
}

// ServeTTRPC answers the calls of shims on l until Shutdown.
func (s *Server) ServeTTRPC(l net.Listener) error {
	if err := s.ttrpc.Serve(context.Background(), l); err != nil && !errors.Is(err, ttrpc.ErrServerClosed) {
		return fmt.Errorf("serve the containerd API to shims: %w", err)
	}
	return nil
}

// untilShutdown ends a call that waits for something with the server.
func (s *Server) untilShutdown(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.stopped, cancel)
	return ctx, func() { stop(); cancel() }
}

// Shutdown lets calls under way end until ctx does, and ends the rest.
func (s *Server) Shutdown(ctx context.Context) {
	s.health.Shutdown()
	s.stop()
	done := make(chan struct{})
	go func() { s.grpc.GracefulStop(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
		s.grpc.Stop()
	}
	if s.ttrpc.Shutdown(ctx) != nil {
		_ = s.ttrpc.Close()
	}
}
