package cri

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/experimental"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hako-engine/hako/api/cri/streaming"
	"github.com/hako-engine/hako/internal/errtext"
)

// maxMessage is the longest message either way: the kubelet's own limit, in bytes.
const maxMessage = 16 << 20

// Options configure a Server.
type Options struct {
	Backend  Backend
	Streams  *streaming.Server // gives the URLs of exec, attach and port-forward
	Version  string
	StateDir string            // of the daemon, told by Status
	Handlers func() []string   // gives the runtime handlers besides the default one; nil: none
	Config   map[string]string // told by Status, when it is asked for details
	// Unary and Stream see each call before anything else, with the code of its answer.
	Unary  []grpc.UnaryServerInterceptor
	Stream []grpc.StreamServerInterceptor
	Log    *slog.Logger // nil: discard
}

// Server serves the CRI.
type Server struct {
	opt  Options
	log  *slog.Logger
	grpc *grpc.Server
}

// runtimeService and imageService are the two services. A call that a newer API has
// answers Unimplemented, which clients know.
type (
	runtimeService struct {
		api.UnimplementedRuntimeServiceServer
		*Server
	}
	imageService struct {
		api.UnimplementedImageServiceServer
		*Server
	}
)

// bufferSizes are those in which messages are sent and received, in bytes. Without those between 32 KiB and 1 MiB a list of
// a hundred containers would take a buffer of 1 MiB, a fifth of the daemon's heap.
var bufferSizes = []int{256, 4 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20}

// New makes a Server.
func New(o Options) *Server {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{opt: o, log: o.Log}
	pool := mem.NewTieredBufferPool(bufferSizes...)
	s.grpc = grpc.NewServer(
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage), experimental.BufferPool(pool), grpc.ForceServerCodecV2(newCodec(pool)),
		grpc.ChainUnaryInterceptor(append(slices.Clip(o.Unary), s.unary)...),
		grpc.ChainStreamInterceptor(append(slices.Clip(o.Stream), s.stream)...),
	)
	api.RegisterRuntimeServiceServer(s.grpc, &runtimeService{Server: s})
	api.RegisterImageServiceServer(s.grpc, &imageService{Server: s})
	return s
}

// Serve answers on l until Shutdown.
func (s *Server) Serve(l net.Listener) error {
	if err := s.grpc.Serve(l); err != nil {
		return fmt.Errorf("serve the CRI: %w", err)
	}
	return nil
}

// Shutdown lets calls under way end until ctx does, and ends the rest.
func (s *Server) Shutdown(ctx context.Context) {
	done := make(chan struct{})
	go func() { s.grpc.GracefulStop(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
		s.grpc.Stop()
	}
}

// unary gives errors their code, and writes a log.
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	start := time.Now()
	defer func() {
		if r := recover(); r != nil {
			err = s.recovered(info.FullMethod, r)
		}
		s.logCall(info.FullMethod, start, err)
	}()
	resp, err = next(ctx, req)
	if err != nil && ctx.Err() != nil {
		// Whatever broke, it broke because of that.
		return nil, status.Error(status.FromContextError(ctx.Err()).Code(), errtext.Plain(err))
	}
	return resp, statusOf(err)
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	start := time.Now()
	defer func() {
		if r := recover(); r != nil {
			err = s.recovered(info.FullMethod, r)
		}
		s.logCall(info.FullMethod, start, err)
	}()
	return statusOf(next(srv, ss))
}

// recovered keeps one broken request from taking the node's daemon down.
func (s *Server) recovered(method string, r any) error {
	s.log.Error("a CRI call panicked", "method", method, "panic", r, "stack", string(debug.Stack()))
	return status.Errorf(codes.Internal, "%s failed inside: %v", method, r)
}

// logCall never writes a request: it may hold credentials.
func (s *Server) logCall(method string, start time.Time, err error) {
	if err != nil {
		s.log.Info("CRI call failed", "method", method, "took", time.Since(start), "error", err)
		return
	}
	s.log.Debug("CRI call", "method", method, "took", time.Since(start))
}
