package cri

import (
	"context"
	"net"
	"path/filepath"
	"slices"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hako-engine/hako/engine"
)

// TestGuest: on another API's server calls go through the CRI's own interceptors, and errors
// get the CRI's codes.
func TestGuest(t *testing.T) {
	t.Parallel()
	var seen []string
	f := &fake{events: make(chan engine.Event)}
	close(f.events)
	s := New(Options{Backend: f, Version: "1.2.3", Unary: []grpc.UnaryServerInterceptor{
		func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			seen = append(seen, info.FullMethod)
			return next(ctx, req)
		},
	}, Stream: []grpc.StreamServerInterceptor{
		func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			seen = append(seen, info.FullMethod)
			return next(srv, ss)
		},
	}})
	host := grpc.NewServer(grpc.UnaryInterceptor(func(context.Context, any, *grpc.UnaryServerInfo, grpc.UnaryHandler) (any, error) {
		t.Error("the host's interceptor saw a call")
		return nil, nil
	}))
	s.Register(host)
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- host.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		host.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	c := api.NewRuntimeServiceClient(conn)
	if v, err := c.Version(t.Context(), &api.VersionRequest{}); err != nil || v.RuntimeVersion != "1.2.3" {
		t.Errorf("%v, %v", v, err)
	}
	if _, err := c.PodSandboxStatus(t.Context(), &api.PodSandboxStatusRequest{PodSandboxId: "x"}); status.Code(err) != codes.NotFound {
		t.Errorf("unknown pod: %v", err)
	}
	st, err := c.GetContainerEvents(t.Context(), &api.GetEventsRequest{})
	if err == nil {
		_, err = st.Recv()
	}
	if status.Code(err) == codes.Internal {
		t.Error(err)
	}
	for _, m := range []string{"Version", "PodSandboxStatus", "GetContainerEvents"} {
		if !slices.Contains(seen, "/runtime.v1.RuntimeService/"+m) {
			t.Errorf("%s went past the interceptors: %v", m, seen)
		}
	}
}
