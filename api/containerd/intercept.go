package containerd

import (
	"context"
	"fmt"
	"runtime/debug"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ours tells whether a method belongs to this package, and not to a guest.
func ours(method string) bool {
	return strings.HasPrefix(method, "/containerd.") || strings.HasPrefix(method, "/grpc.health.")
}

// free are services and methods that need no namespace, as with containerd.
var free = []string{
	"/grpc.health.v1.Health/",
	"/containerd.services.version.v1.Version/",
	"/containerd.services.namespaces.v1.Namespaces/",
	"/containerd.services.introspection.v1.Introspection/",
	"/containerd.services.events.v1.Events/Forward",
	"/containerd.services.events.v1.Events/Subscribe",
}

// scope puts the namespace and the lease of a call's headers into its context.
func scope(ctx context.Context, method string) (context.Context, error) {
	if ns, ok := namespaces.Namespace(ctx); ok {
		ctx = namespaces.WithNamespace(ctx, ns)
	}
	for _, f := range free {
		if strings.HasPrefix(method, f) {
			return ctx, nil
		}
	}
	if _, err := namespaces.NamespaceRequired(ctx); err != nil {
		return ctx, err
	}
	if id, ok := leases.FromContext(ctx); ok && id != "" {
		ctx = leases.WithLease(ctx, id)
	}
	return ctx, nil
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	s.opt.Called()
	if !ours(info.FullMethod) {
		return next(ctx, req)
	}
	defer s.finish(ctx, info.FullMethod, time.Now(), &err)
	if ctx, err = scope(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	s.opt.Called()
	if !ours(info.FullMethod) {
		return next(srv, ss)
	}
	defer s.finish(ss.Context(), info.FullMethod, time.Now(), &err)
	ctx, err := scope(ss.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	return next(srv, &scoped{ss, ctx})
}

// scoped is a stream with another context.
type scoped struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *scoped) Context() context.Context { return s.ctx }

func (s *Server) ttrpcUnary(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, next ttrpc.Method) (resp any, err error) {
	defer s.finish(ctx, info.FullMethod, time.Now(), &err)
	return next(ctx, unmarshal)
}

// finish gives an error its code, and keeps one broken request from taking the node's daemon
// down. It never writes a request: it may hold credentials.
func (s *Server) finish(ctx context.Context, method string, start time.Time, err *error) {
	if r := recover(); r != nil {
		s.log.Error("a containerd call panicked", "method", method, "panic", r, "stack", string(debug.Stack()))
		*err = fmt.Errorf("%s failed inside: %v: %w", method, r, errdefs.ErrInternal)
	}
	*err = statusOf(ctx, *err)
	s.log.Debug("containerd call", "method", method, "took", time.Since(start), "error", *err)
}

// statusOf makes the answer of an error: the code of its class, and its whole text, of which
// clients find the class again. One that has a code already keeps it.
func statusOf(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(errgrpc.ToGRPC(err))
	if ok && st.Code() != codes.Unknown {
		return status.Error(st.Code(), st.Message())
	}
	if ctx.Err() != nil { // whatever broke, it broke because of that
		return status.Error(status.FromContextError(ctx.Err()).Code(), err.Error())
	}
	return status.Error(codes.Unknown, err.Error())
}

// invalidf is for requests that make no sense.
func invalidf(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}
