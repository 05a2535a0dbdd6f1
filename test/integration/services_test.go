package integration

import (
	"context"
	"os/exec"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"
)

// TestContainerdServices calls each method of each service that containerd's API module has: none is missing.
func TestContainerdServices(t *testing.T) {
	t.Parallel()
	_, c := ownContainerd(t)
	out, err := exec.Command("go", "list", "github.com/containerd/containerd/api/services/...").Output()
	if err != nil {
		t.Fatal(err)
	}
	called := map[string]bool{}
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		pkg := string(f.Package())
		if !strings.HasPrefix(pkg, "containerd.services.") || strings.Contains(pkg, ".ttrpc.") {
			return true
		}
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for j := range s.Methods().Len() {
				called[strings.TrimPrefix(pkg, "containerd.services.")] = true
				m := s.Methods().Get(j)
				name := "/" + string(s.FullName()) + "/" + string(m.Name())
				err := callEmpty(c.shared(), c.Conn().(grpc.ClientConnInterface), name, m)
				if st := status.Convert(err); st.Code() == codes.Unimplemented && (strings.HasPrefix(st.Message(), "method ") || strings.HasPrefix(st.Message(), "unknown ")) {
					t.Errorf("%s: %v", name, err)
				}
			}
		}
		return true
	})
	for p := range strings.FieldsSeq(string(out)) {
		_, name, _ := strings.Cut(p, "/services/")
		if name = strings.ReplaceAll(name, "/", "."); !strings.HasPrefix(name, "ttrpc.") && !called[name] { // ttrpc is what shims call
			t.Errorf("the API has a service %s, which this test knows nothing of", name)
		}
	}
	if len(called) < 15 {
		t.Errorf("only %v", called)
	}
}

// callEmpty makes a call with a message that has no field set, and gives the first error. A stream that says
// nothing is there.
func callEmpty(cx context.Context, conn grpc.ClientConnInterface, name string, m protoreflect.MethodDescriptor) error {
	if !m.IsStreamingClient() && !m.IsStreamingServer() {
		return conn.Invoke(cx, name, dynamicpb.NewMessage(m.Input()), dynamicpb.NewMessage(m.Output()))
	}
	cx, cancel := context.WithTimeout(cx, 2*time.Second)
	defer cancel()
	s, err := conn.NewStream(cx, &grpc.StreamDesc{ServerStreams: m.IsStreamingServer(), ClientStreams: m.IsStreamingClient()}, name)
	if err != nil {
		return err
	}
	if err := s.SendMsg(dynamicpb.NewMessage(m.Input())); err != nil {
		return err
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	return s.RecvMsg(dynamicpb.NewMessage(m.Output()))
}
