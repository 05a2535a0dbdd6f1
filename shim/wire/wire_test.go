package wire

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	bootstrap "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/runtime/sandbox/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	ttrpcevents "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/hako-engine/hako/shim/log"
)

// pairs are our messages and the generated ones, which have the same fields.
var pairs = []struct {
	ours      func() Message
	generated proto.Message
	// skip lists fields that we do not know, and ignore.
	skip string
}{
	{func() Message { return new(CreateTaskRequest) }, new(task.CreateTaskRequest), ""},
	{func() Message { return new(PidResponse) }, new(task.CreateTaskResponse), ""},
	{func() Message { return new(PidResponse) }, new(task.StartResponse), ""},
	{func() Message { return new(ProcessRequest) }, new(task.StateRequest), ""},
	{func() Message { return new(ProcessRequest) }, new(task.StartRequest), ""},
	{func() Message { return new(ProcessRequest) }, new(task.DeleteRequest), ""},
	{func() Message { return new(ProcessRequest) }, new(task.WaitRequest), ""},
	{func() Message { return new(ProcessRequest) }, new(task.PidsRequest), ""},
	{func() Message { return new(DeleteResponse) }, new(task.DeleteResponse), ""},
	{func() Message { return new(ExecProcessRequest) }, new(task.ExecProcessRequest), ""},
	{func() Message { return new(ResizePtyRequest) }, new(task.ResizePtyRequest), ""},
	{func() Message { return new(StateResponse) }, new(task.StateResponse), ""},
	{func() Message { return new(KillRequest) }, new(task.KillRequest), ""},
	{func() Message { return new(CloseIORequest) }, new(task.CloseIORequest), ""},
	{func() Message { return new(PidsResponse) }, new(task.PidsResponse), ""},
	{func() Message { return new(UpdateTaskRequest) }, new(task.UpdateTaskRequest), ""},
	{func() Message { return new(WaitResponse) }, new(task.WaitResponse), ""},
	{func() Message { return new(StatsResponse) }, new(task.StatsResponse), ""},
	{func() Message { return new(ConnectResponse) }, new(task.ConnectResponse), ""},
	{func() Message { return new(ShutdownRequest) }, new(task.ShutdownRequest), ""},
	{func() Message { return new(BootstrapParams) }, new(bootstrap.BootstrapParams), "extensions"},
	{func() Message { return new(BootstrapResult) }, new(bootstrap.BootstrapResult), "capabilities metadata extensions"},
	{func() Message { return new(RuntimeOptions) }, new(options.Options), "task_api_address task_api_version"},
	{func() Message { return new(CheckpointTaskRequest) }, new(task.CheckpointTaskRequest), ""},
	{func() Message { return new(CreateSandboxRequest) }, new(sandbox.CreateSandboxRequest), ""},
	{func() Message { return new(SandboxRequest) }, new(sandbox.StartSandboxRequest), ""},
	{func() Message { return new(StartSandboxResponse) }, new(sandbox.StartSandboxResponse), ""},
	{func() Message { return new(PlatformResponse) }, new(sandbox.PlatformResponse), ""},
	{func() Message { return new(StopSandboxRequest) }, new(sandbox.StopSandboxRequest), ""},
	{func() Message { return new(WaitSandboxResponse) }, new(sandbox.WaitSandboxResponse), ""},
	{func() Message { return new(SandboxStatusResponse) }, new(sandbox.SandboxStatusResponse), ""},
	{func() Message { return new(ProcessDetails) }, new(options.ProcessDetails), ""},
	{func() Message { return new(CheckpointOptions) }, new(options.CheckpointOptions), ""},
	{func() Message { return new(TaskCheckpointed) }, new(events.TaskCheckpointed), ""},
	{func() Message { return new(RuntimeInfo) }, new(types.RuntimeInfo), ""},
	{func() Message { return new(Envelope) }, new(types.Envelope), ""},
	{func() Message { return new(ForwardRequest) }, new(ttrpcevents.ForwardRequest), ""},
	{func() Message { return new(TaskCreate) }, new(events.TaskCreate), ""},
	{func() Message { return new(TaskStart) }, new(events.TaskStart), ""},
	{func() Message { return new(TaskDelete) }, new(events.TaskDelete), ""},
	{func() Message { return new(TaskExit) }, new(events.TaskExit), ""},
	{func() Message { return new(TaskOOM) }, new(events.TaskOOM), ""},
	{func() Message { return new(TaskExecAdded) }, new(events.TaskExecAdded), ""},
	{func() Message { return new(TaskExecStarted) }, new(events.TaskExecStarted), ""},
	{func() Message { return new(TaskPaused) }, new(events.TaskPaused), ""},
	{func() Message { return new(TaskResumed) }, new(events.TaskResumed), ""},
}

// fill sets every field of a generated message to something that is not zero.
func fill(m protoreflect.Message, skip string) {
	scalar := func(fd protoreflect.FieldDescriptor) protoreflect.Value {
		switch fd.Kind() {
		case protoreflect.StringKind:
			return protoreflect.ValueOfString("value of " + string(fd.Name()))
		case protoreflect.BytesKind:
			return protoreflect.ValueOfBytes([]byte{1, 0, 255})
		case protoreflect.BoolKind:
			return protoreflect.ValueOfBool(true)
		case protoreflect.EnumKind:
			return protoreflect.ValueOfEnum(3)
		case protoreflect.Uint32Kind:
			return protoreflect.ValueOfUint32(1 << 31)
		case protoreflect.Int32Kind:
			return protoreflect.ValueOfInt32(77)
		case protoreflect.Int64Kind:
			return protoreflect.ValueOfInt64(1 << 40)
		}
		panic("kind " + fd.Kind().String())
	}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		if strings.Contains(" "+skip+" ", " "+string(fd.Name())+" ") {
			continue
		}
		switch {
		case fd.IsMap():
			mp := m.Mutable(fd).Map()
			mp.Set(protoreflect.ValueOfString("key").MapKey(), protoreflect.ValueOfString("value"))
		case fd.IsList() && fd.Kind() == protoreflect.MessageKind:
			for range 2 {
				e := m.Mutable(fd).List().AppendMutable()
				fill(e.Message(), "")
			}
		case fd.IsList():
			m.Mutable(fd).List().Append(scalar(fd))
			m.Mutable(fd).List().Append(scalar(fd))
		case fd.Kind() == protoreflect.MessageKind:
			fill(m.Mutable(fd).Message(), "")
		default:
			m.Set(fd, scalar(fd))
		}
	}
}

// TestMessages decodes what the generated types encode, and the other way round.
func TestMessages(t *testing.T) {
	for _, p := range pairs {
		want := proto.Clone(p.generated)
		fill(want.ProtoReflect(), p.skip)
		data, err := proto.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		ours := p.ours()
		if err := Unmarshal(data, ours); err != nil {
			t.Errorf("%T: %v", ours, err)
			continue
		}
		v := reflect.ValueOf(ours).Elem()
		for i := range v.NumField() {
			if f := v.Type().Field(i); v.Field(i).IsZero() && f.Name != "OOMKilled" && !(f.Name == "ExecID" && p.generated.ProtoReflect().Descriptor().Fields().ByName("exec_id") == nil) {
				t.Errorf("%T.%s is zero", ours, f.Name)
			}
		}
		got := proto.Clone(p.generated)
		if err := proto.Unmarshal(Marshal(ours), got); err != nil || !proto.Equal(got, want) {
			t.Errorf("%T:\n got %v\nwant %v\n%v", ours, got, want, err)
		}
	}
}

func TestMessageNegativeInt32(t *testing.T) {
	want := &bootstrap.BootstrapParams{InstanceID: "x", LogLevel: bootstrap.LogLevel_LOG_LEVEL_DEBUG}
	data, _ := proto.Marshal(want)
	var p BootstrapParams
	if err := Unmarshal(data, &p); err != nil || p.LogLevel != -4 || !bytes.Equal(Marshal(&p), data) {
		t.Errorf("%+v, %v", p, err)
	}
}

func FuzzUnmarshal(f *testing.F) {
	for i, p := range pairs {
		m := proto.Clone(p.generated)
		fill(m.ProtoReflect(), "")
		data, _ := proto.Marshal(m)
		f.Add(uint(i), data)
	}
	f.Fuzz(func(t *testing.T, i uint, data []byte) {
		m := pairs[i%uint(len(pairs))].ours()
		if Unmarshal(data, m) != nil {
			return
		}
		again := reflect.New(reflect.TypeOf(m).Elem()).Interface().(Message)
		if err := Unmarshal(Marshal(m), again); err != nil {
			t.Fatalf("%+v does not decode: %v", m, err)
		}
	})
}

// loopback is a connected pair of unix sockets.
func loopback(t *testing.T) (client, server net.Conn) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	f, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = Dial(path); err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func testServices() Services {
	return Services{ServiceTaskV3: {
		"State": Handle(func(_ context.Context, r *ProcessRequest) (Message, error) {
			if r.ID == "" {
				return nil, errors.Join(errors.New("container \"x\""), errdefs.ErrNotFound)
			}
			return &StateResponse{ID: r.ID, ExecID: r.ExecID, Status: StatusRunning}, nil
		}),
		"Wait": Handle(func(ctx context.Context, r *ProcessRequest) (Message, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}),
	}}
}

// TestServerWithForeignClient calls our server with the generated client.
func TestServerWithForeignClient(t *testing.T) {
	conn, server := loopback(t)
	go testServices().Serve(t.Context(), server, bufio.NewReader(server))
	c := ttrpc.NewClient(conn)
	defer c.Close()
	svc := task.NewTTRPCTaskClient(c)
	resp, err := svc.State(t.Context(), &task.StateRequest{ID: "a", ExecID: "b"})
	if err != nil || resp.ID != "a" || resp.ExecID != "b" || resp.Status != StatusRunning {
		t.Errorf("%v, %v", resp, err)
	}
	if _, err = svc.State(t.Context(), &task.StateRequest{}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("error %v", err)
	}
	if _, err = svc.Checkpoint(t.Context(), &task.CheckpointTaskRequest{}); !errdefs.IsNotImplemented(errgrpc.ToNative(err)) {
		t.Errorf("error %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err = svc.Wait(ctx, &task.WaitRequest{}); err == nil {
		t.Error("wait without end")
	}
}

type foreign struct {
	got chan *ttrpcevents.ForwardRequest
}

func (f foreign) Forward(_ context.Context, r *ttrpcevents.ForwardRequest) (*emptypb.Empty, error) {
	f.got <- r
	if r.Envelope.Topic == "bad" {
		return nil, errgrpc.ToGRPCf(errdefs.ErrFailedPrecondition, "no such topic")
	}
	return &emptypb.Empty{}, nil
}

// TestClientWithForeignServer calls a generated server with our client.
func TestClientWithForeignServer(t *testing.T) {
	s, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	f := foreign{make(chan *ttrpcevents.ForwardRequest, 2)}
	ttrpcevents.RegisterTTRPCEventsService(s, f)
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(context.Background(), l)
	defer s.Close()
	conn, err := Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	c := NewClient(conn, "ns")
	defer c.Close()
	now := time.Now().UTC()
	send := func(topic string) error {
		return c.Call(t.Context(), ServiceEvents, "Forward", &ForwardRequest{&Envelope{
			Timestamp: now, Namespace: "ns", Topic: topic,
			Event: &Any{"containerd.events.TaskOOM", Marshal(&TaskOOM{"x"})},
		}}, nil)
	}
	if err := send("/tasks/oom"); err != nil {
		t.Error(err)
	}
	got := <-f.got
	ev, err := got.Envelope.Event.UnmarshalNew()
	if err != nil || ev.(*events.TaskOOM).ContainerID != "x" || !got.Envelope.Timestamp.AsTime().Equal(now) {
		t.Errorf("%v, %v", got, err)
	}
	err = send("bad")
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "no such topic") {
		t.Errorf("error %v", err)
	}
}

func TestClientSideBySide(t *testing.T) {
	conn, server := loopback(t)
	go testServices().Serve(t.Context(), server, bufio.NewReader(server))
	c := NewClient(conn, "")
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			var st StateResponse
			if err := c.Call(t.Context(), ServiceTaskV3, "State", &ProcessRequest{ID: "a"}, &st); err != nil || st.ID != "a" {
				t.Errorf("%+v, %v", st, err)
			}
		})
	}
	wg.Wait()
	ctx, cancel := context.WithCancel(t.Context())
	waiting := make(chan error, 1)
	go func() { waiting <- c.Call(ctx, ServiceTaskV3, "Wait", &ProcessRequest{ID: "a"}, nil) }()
	cancel()
	if err := <-waiting; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled call: %v", err)
	}
	go func() { waiting <- c.Call(t.Context(), ServiceTaskV3, "Wait", &ProcessRequest{ID: "a"}, nil) }()
	time.Sleep(10 * time.Millisecond)
	server.Close()
	if err := <-waiting; !errdefs.IsUnavailable(err) {
		t.Errorf("call on a lost connection: %v", err)
	}
	<-c.Done()
	if err := c.Call(t.Context(), ServiceTaskV3, "State", &ProcessRequest{}, nil); !errdefs.IsUnavailable(err) {
		t.Errorf("call after: %v", err)
	}
	c.Close()
}

func TestFrameLimit(t *testing.T) {
	conn, server := loopback(t)
	done := make(chan error, 1)
	go func() { done <- testServices().Serve(t.Context(), server, bufio.NewReader(server)) }()
	conn.Write([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 1, 0})
	if err := <-done; !errdefs.IsResourceExhausted(err) {
		t.Errorf("frame of 4 GiB: %v", err)
	}
}

func TestErrorClasses(t *testing.T) {
	for _, c := range classes {
		err := toStatus(errors.Join(errors.New("text"), c.class)).error()
		if c.class == errdefs.ErrConflict || c.class == errdefs.ErrNotModified {
			c.class = errdefs.ErrFailedPrecondition // containerd's mapping, too
		}
		if !errors.Is(err, c.class) || !strings.HasPrefix(err.Error(), "text") {
			t.Errorf("%v became %v", c.class, err)
		}
	}
	if err := toStatus(io.EOF).error(); !errors.Is(err, errdefs.ErrUnknown) {
		t.Error(err)
	}
	if toStatus(nil).error() != nil || (&status{}).error() != nil {
		t.Error("no error became one")
	}
}

func TestStdioURI(t *testing.T) {
	for _, s := range []Stdio{
		{},
		{OpenStdin: true},
		{OpenStdin: true, StdinOnce: true, Log: log.Config{
			Format: "json-file", Path: "/var/a b/%41?x#y.log", MaxSize: 10, MaxFiles: 3, Compress: true,
			Attrs: map[string]string{"k&1": "v=2", "": "ü"},
		}},
	} {
		u, err := url.Parse(s.String())
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseStdio(u)
		if err != nil || u.Scheme != Scheme || !reflect.DeepEqual(got, s) {
			t.Errorf("%s: got %+v, want %+v, %v", u, got, s, err)
		}
	}
	for _, bad := range []string{"hako:///x?nosuch=1", "hako:///x?max-size=x", "hako:///x?max-files=1e3"} {
		u, _ := url.Parse(bad)
		if _, err := ParseStdio(u); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func FuzzParseStdio(f *testing.F) {
	f.Add("hako:///var/x.log?format=json-file&max-size=10&max-files=3&compress=1&attr.k=v&stdin=1&once=1")
	f.Fuzz(func(t *testing.T, uri string) {
		u, err := url.Parse(uri)
		if err != nil {
			return
		}
		s, err := ParseStdio(u)
		if err != nil {
			return
		}
		again, err := url.Parse(s.String())
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseStdio(again)
		if s.Log.Path = "/" + strings.TrimLeft(s.Log.Path, "/"); s.Log.Format == "" {
			s.Log.Path = got.Log.Path
		}
		if err != nil || !reflect.DeepEqual(got, s) {
			t.Fatalf("%q: %+v, then %+v, %v", uri, s, got, err)
		}
	})
}

func FuzzAttachFrames(f *testing.F) {
	f.Add([]byte("{\"version\":1}\n\x00\x00\x00\x00\x01x"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bufio.NewReader(bytes.NewReader(data))
		var req AttachRequest
		if ReadLine(r, &req) != nil {
			return
		}
		buf := make([]byte, MaxFrame)
		for {
			if _, p, err := ReadFrame(r, buf); err != nil {
				return
			} else if len(p) > len(data) {
				t.Fatalf("a payload of %d bytes out of %d", len(p), len(data))
			}
		}
	})
}

func TestAttachFrames(t *testing.T) {
	a, b := loopback(t)
	payload := bytes.Repeat([]byte("x"), MaxFrame)
	go func() {
		WriteLine(a, AttachRequest{Version: 1, ID: "c", Stdin: true})
		WriteFrame(a, FrameStdin, payload)
		WriteFrame(a, FrameCloseStdin, nil)
		a.Write([]byte{0, 0xff, 0xff, 0xff, 0xff})
	}()
	r := bufio.NewReader(b)
	var req AttachRequest
	if err := ReadLine(r, &req); err != nil || req.ID != "c" || !req.Stdin {
		t.Errorf("%+v, %v", req, err)
	}
	buf := make([]byte, MaxFrame)
	if typ, p, err := ReadFrame(r, buf); typ != FrameStdin || !bytes.Equal(p, payload) || err != nil {
		t.Errorf("frame %d of %d bytes, %v", typ, len(p), err)
	}
	if typ, p, err := ReadFrame(r, buf); typ != FrameCloseStdin || len(p) != 0 || err != nil {
		t.Errorf("frame %d of %d bytes, %v", typ, len(p), err)
	}
	if _, _, err := ReadFrame(r, buf); err == nil {
		t.Error("frame of 4 GiB")
	}
	if err := ReadLine(bufio.NewReader(strings.NewReader(strings.Repeat("x", 10000))), &req); err == nil {
		t.Error("endless line")
	}
}

func TestLongSocketPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 40))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	for range 2 { // the second time a dead socket lies there
		f, err := Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("mode %v, %v", st.Mode(), err)
		}
		c, err := Dial(path)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		f.Close()
	}
	if _, err := Dial(path); err == nil {
		t.Error("connected to a dead socket")
	}
}
