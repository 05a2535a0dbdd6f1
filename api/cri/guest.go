package cri

import (
	"context"

	"google.golang.org/grpc"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Register serves the CRI on another API's gRPC server as well, as containerd does. Its calls go
// through the interceptors of s, and not through those of the other's unary calls.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	g := guest{r, s}
	api.RegisterRuntimeServiceServer(g, &runtimeService{Server: s})
	api.RegisterImageServiceServer(g, &imageService{Server: s})
}

// guest registers services with the interceptors of s around each handler.
type guest struct {
	grpc.ServiceRegistrar
	s *Server
}

func (g guest) RegisterService(desc *grpc.ServiceDesc, impl any) {
	own := *desc
	own.Methods, own.Streams = nil, nil
	for _, m := range desc.Methods {
		handler := m.Handler
		m.Handler = func(srv any, ctx context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			return handler(srv, ctx, dec, g.unary)
		}
		own.Methods = append(own.Methods, m)
	}
	for _, st := range desc.Streams {
		info := &grpc.StreamServerInfo{
			FullMethod: "/" + desc.ServiceName + "/" + st.StreamName, IsClientStream: st.ClientStreams, IsServerStream: st.ServerStreams,
		}
		handler := st.Handler
		st.Handler = func(srv any, ss grpc.ServerStream) error { return g.stream(srv, ss, info, handler) }
		own.Streams = append(own.Streams, st)
	}
	g.ServiceRegistrar.RegisterService(&own, impl)
}

// unary is the chain of the server's own interceptors.
func (g guest) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	chain := append(append([]grpc.UnaryServerInterceptor{}, g.s.opt.Unary...), g.s.unary)
	for i := len(chain) - 1; i >= 0; i-- {
		intercept, inner := chain[i], next
		next = func(ctx context.Context, req any) (any, error) { return intercept(ctx, req, info, inner) }
	}
	return next(ctx, req)
}

func (g guest) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	chain := append(append([]grpc.StreamServerInterceptor{}, g.s.opt.Stream...), g.s.stream)
	for i := len(chain) - 1; i >= 0; i-- {
		intercept, inner := chain[i], next
		next = func(srv any, ss grpc.ServerStream) error { return intercept(srv, ss, info, inner) }
	}
	return next(srv, ss)
}
