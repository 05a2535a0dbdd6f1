package containerd_test

import (
	"context"
	"maps"
	"net"
	"runtime"
	"testing"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	ttrpcevents "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/images"
	timage "github.com/containerd/containerd/v2/core/transfer/image"
	tregistry "github.com/containerd/containerd/v2/core/transfer/registry"
	"github.com/containerd/platforms"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// listen waits until a subscription, which has no answer of its own, is there: until it gives the last of some events
// that are published for it, on the topic /probe.
func (r *rig) listen(t *testing.T, ch <-chan *events.Envelope, errs <-chan error) {
	t.Helper()
	publish := func(name string) {
		if err := r.EventService().Publish(r.ctx, "/probe", &apievents.ImageDelete{Name: name}); err != nil {
			t.Fatal(err)
		}
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for last := false; ; {
		select {
		case e := <-ch:
			v, err := typeurl.UnmarshalAny(e.Event)
			if err != nil {
				t.Fatal(err)
			}
			if v.(*apievents.ImageDelete).Name == "last" {
				return
			}
			if !last {
				last = true
				publish("last")
			}
		case err := <-errs:
			t.Fatal(err)
		case <-tick.C:
			if !last {
				publish("probe")
			}
		case <-time.After(5 * time.Minute):
			t.Fatal("no event")
		}
	}
}

func TestEvents(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	ch, errs := r.Subscribe(ctx, `namespace==test`)
	r.listen(t, ch, errs)
	host := newRegistry(t, map[string]v1.Image{"x:1": newImage(t, runtime.GOARCH, files{"a": "b"})})
	src, err := tregistry.NewOCIRegistry(r.ctx, host+"/x:1", tregistry.WithDefaultScheme("http"))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Transfer(r.ctx, src, timage.NewStore("i", timage.WithUnpack(platforms.DefaultSpec(), "overlayfs"))); err != nil {
		t.Fatal(err)
	}
	if err := r.ImageService().Delete(r.ctx, "i", images.SynchronousDelete()); err != nil {
		t.Fatal(err)
	}
	if err := r.EventService().Publish(r.ctx, "/mine/last", &apievents.ImageDelete{Name: "z"}); err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for seen["/mine/last"] == 0 {
		select {
		case e := <-ch:
			if e.Topic == "/mine/last" {
				if v, err := typeurl.UnmarshalAny(e.Event); err != nil || v.(*apievents.ImageDelete).Name != "z" {
					t.Errorf("%v, %v", v, err)
				}
			}
			seen[e.Topic]++
		case err := <-errs:
			t.Fatal(err)
		case <-time.After(5 * time.Minute):
			t.Fatalf("only %v", seen)
		}
	}
	want := map[string]int{"/content/create": 3, "/content/delete": 3, "/images/create": 1, "/images/delete": 1,
		"/snapshot/prepare": 1, "/snapshot/commit": 1, "/snapshot/remove": 1, "/mine/last": 1}
	if !maps.Equal(seen, want) {
		t.Errorf("%v", seen)
	}
}

// TestShimEvents: what a shim reports over ttrpc is seen by those who subscribed.
func TestShimEvents(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	l, err := net.Listen("unix", r.socket+".ttrpc")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- r.server.ServeTTRPC(l) }()
	conn, err := net.Dial("unix", r.socket+".ttrpc")
	if err != nil {
		t.Fatal(err)
	}
	c := ttrpc.NewClient(conn)
	defer c.Close()
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	ch, errs := r.Subscribe(ctx, `topic=="/tasks/exit"`, `topic=="/probe"`)
	r.listen(t, ch, errs)
	exit, err := typeurl.MarshalAnyToProto(&apievents.TaskExit{ContainerID: "c", ExitStatus: 3})
	if err != nil {
		t.Fatal(err)
	}
	shim := ttrpcevents.NewTTRPCEventsClient(c)
	at := time.Unix(1234, 5)
	_, err = shim.Forward(r.ctx, &ttrpcevents.ForwardRequest{Envelope: &types.Envelope{Timestamp: timestamppb.New(at), Namespace: "shims", Topic: "/tasks/exit", Event: exit}})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case e := <-ch:
		v, err := typeurl.UnmarshalAny(e.Event)
		if x, ok := v.(*apievents.TaskExit); !ok || err != nil || x.ExitStatus != 3 || e.Namespace != "shims" || !e.Timestamp.Equal(at) {
			t.Errorf("%+v, %v, %v", e, v, err)
		}
	case err := <-errs:
		t.Fatal(err)
	case <-time.After(5 * time.Minute):
		t.Fatal("no event")
	}
	// An envelope without a time is of now.
	if _, err := shim.Forward(r.ctx, &ttrpcevents.ForwardRequest{Envelope: &types.Envelope{Namespace: "shims", Topic: "/probe", Event: exit}}); err != nil {
		t.Error(err)
	}
	for _, bad := range []*ttrpcevents.ForwardRequest{{}, {Envelope: &types.Envelope{Topic: "x"}}} {
		if _, err := shim.Forward(r.ctx, bad); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: %v", bad, err)
		}
	}
	end, stop := context.WithTimeout(context.Background(), 5*time.Minute)
	defer stop()
	c.Close()
	r.server.Shutdown(end)
	if err := <-served; err != nil {
		t.Error(err)
	}
}
