package containerd_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"
)

// texts are what the string fields of a request are filled with; "\x01" stands for a request
// without any field.
var texts = []string{"\x01", "", "a", "overlayfs", "../../etc/passwd", "sha256:zz", "sha256:" + strings.Repeat("a", 64), "a\nb", strings.Repeat("x", 70_000), "labels.x", "labels", "[", `x==`}

// fill sets all fields of a message, down to a depth.
func fill(m protoreflect.Message, text string, depth int) {
	if text == "\x01" || depth == 0 {
		return
	}
	scalar := func(fd protoreflect.FieldDescriptor) protoreflect.Value {
		switch fd.Kind() {
		case protoreflect.StringKind:
			return protoreflect.ValueOfString(text)
		case protoreflect.BytesKind:
			return protoreflect.ValueOfBytes([]byte(text))
		case protoreflect.BoolKind:
			return protoreflect.ValueOfBool(true)
		case protoreflect.Int64Kind:
			return protoreflect.ValueOfInt64(-5)
		case protoreflect.Int32Kind:
			return protoreflect.ValueOfInt32(-5)
		case protoreflect.Uint32Kind:
			return protoreflect.ValueOfUint32(1 << 31)
		case protoreflect.Uint64Kind:
			return protoreflect.ValueOfUint64(1 << 63)
		case protoreflect.EnumKind:
			return protoreflect.ValueOfEnum(99)
		}
		return fd.Default()
	}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		switch {
		case fd.IsMap():
			mp := m.Mutable(fd).Map()
			v := mp.NewValue()
			if fd.MapValue().Message() == nil {
				v = scalar(fd.MapValue())
			}
			mp.Set(scalar(fd.MapKey()).MapKey(), v)
		case fd.IsList():
			l := m.Mutable(fd).List()
			if fd.Message() != nil {
				v := l.NewElement()
				fill(v.Message(), text, depth-1)
				l.Append(v)
			} else {
				l.Append(scalar(fd))
			}
		case fd.Message() != nil:
			fill(m.Mutable(fd).Message(), text, depth-1)
		default:
			m.Set(fd, scalar(fd))
		}
	}
}

// TestHostileRequests calls every method with requests that lack everything, or make no sense:
// none may break the daemon, and none be answered as if it had.
func TestHostileRequests(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	conn := r.Conn().(grpc.ClientConnInterface)
	methods := 0
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			sd := f.Services().Get(i)
			if !strings.HasPrefix(string(sd.FullName()), "containerd.services.") {
				continue
			}
			for k := range sd.Methods().Len() {
				md := sd.Methods().Get(k)
				for _, text := range texts {
					req := dynamicpb.NewMessage(md.Input())
					fill(req, text, 4)
					if proto.Size(req) > 4<<20 {
						continue
					}
					err := call(r.ctx, conn, "/"+string(sd.FullName())+"/"+string(md.Name()), md, req)
					if c := status.Code(err); c == codes.Internal || c == codes.Unknown && err != nil {
						t.Errorf("%s with %.20q: %v", md.FullName(), text, err)
					}
					methods++
				}
			}
		}
		return true
	})
	if methods < 50*len(texts) {
		t.Errorf("only %d calls", methods)
	}
	if _, err := r.Version(r.ctx); err != nil {
		t.Error(err)
	}
}

// call makes one call, and reads its answer to the end, or for a moment.
func call(ctx context.Context, conn grpc.ClientConnInterface, method string, md protoreflect.MethodDescriptor, req proto.Message) error {
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, "hostile"), 2*time.Second)
	defer cancel()
	if !md.IsStreamingClient() && !md.IsStreamingServer() {
		return conn.Invoke(ctx, method, req, dynamicpb.NewMessage(md.Output()))
	}
	if strings.HasSuffix(method, "/Subscribe") || strings.HasSuffix(method, "/Stream") {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, 20*time.Millisecond)
		defer stop()
	}
	st, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
	if err != nil {
		return err
	}
	// The server may have ended the stream by then: its answer tells.
	if err := st.SendMsg(req); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	_ = st.CloseSend()
	for {
		if err := st.RecvMsg(dynamicpb.NewMessage(md.Output())); err != nil {
			if _, ok := status.FromError(err); ok {
				return err
			}
			return nil
		}
	}
}
