package events_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	core "github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"

	"github.com/hako-engine/hako/internal/events"
)

func next(t *testing.T, ch <-chan *core.Envelope, errs <-chan error) *core.Envelope {
	t.Helper()
	select {
	case e := <-ch:
		return e
	case err := <-errs:
		t.Fatalf("subscription ended: %v", err)
	case <-time.After(5 * time.Minute):
		t.Fatal("no event")
	}
	return nil
}

func TestSubscribersSeeOneOrder(t *testing.T) {
	t.Parallel()
	var bus events.Bus
	ctx, cancel := context.WithCancel(namespaces.WithNamespace(context.Background(), "a"))
	defer cancel()
	type sub struct {
		ch   <-chan *core.Envelope
		errs <-chan error
	}
	subs := make([]sub, 3)
	for i := range subs {
		subs[i].ch, subs[i].errs = bus.Subscribe(ctx)
	}
	var wg sync.WaitGroup
	for p := range 4 {
		wg.Go(func() {
			for i := range 100 {
				if err := bus.Publish(ctx, "/images/create", &apievents.ImageCreate{Name: fmt.Sprintf("%d-%d", p, i)}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for range 400 {
		want := next(t, subs[0].ch, subs[0].errs)
		for _, s := range subs[1:] {
			if got := next(t, s.ch, s.errs); got != want {
				t.Fatalf("order differs: %v, %v", got, want)
			}
		}
	}
}

func TestFilters(t *testing.T) {
	t.Parallel()
	var bus events.Bus
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ch, errs := bus.Subscribe(ctx, `topic=="/images/delete"`, `namespace==b,event.name==x`)
	publish := func(ns, topic string, e any) {
		t.Helper()
		if err := bus.Publish(namespaces.WithNamespace(ctx, ns), topic, e); err != nil {
			t.Fatal(err)
		}
	}
	publish("a", "/images/create", &apievents.ImageCreate{Name: "x"})
	publish("b", "/images/create", &apievents.ImageCreate{Name: "y"})
	publish("b", "/images/create", &apievents.ImageCreate{Name: "x"})
	publish("a", "/images/delete", &apievents.ImageDelete{Name: "z"})
	if e := next(t, ch, errs); e.Topic != "/images/create" || e.Namespace != "b" {
		t.Errorf("first: %+v", e)
	}
	e := next(t, ch, errs)
	v, err := typeurl.UnmarshalAny(e.Event)
	if d, ok := v.(*apievents.ImageDelete); err != nil || !ok || d.Name != "z" {
		t.Errorf("second: %+v %v", v, err)
	}
	if _, errs := bus.Subscribe(ctx, `topic==`); !errdefs.IsInvalidArgument(<-errs) {
		t.Error("a broken filter was taken")
	}
}

func TestNobodyWaitsForASlowSubscriber(t *testing.T) {
	t.Parallel()
	var bus events.Bus
	ctx, cancel := context.WithCancel(namespaces.WithNamespace(context.Background(), "a"))
	defer cancel()
	ch, errs := bus.Subscribe(ctx)
	for range 1<<16 + 1<<16 + 2 { // one batch may be in the hands of the deliverer
		if err := bus.Publish(ctx, "/images/delete", &apievents.ImageDelete{}); err != nil {
			t.Fatal(err)
		}
	}
	for {
		select {
		case <-ch:
			continue
		case err := <-errs:
			if !errdefs.IsUnavailable(err) {
				t.Errorf("ended with %v", err)
			}
		case <-time.After(5 * time.Minute):
			t.Error("it was not told")
		}
		break
	}
}

func TestEndOfSubscription(t *testing.T) {
	t.Parallel()
	var bus events.Bus
	ctx, cancel := context.WithCancel(namespaces.WithNamespace(context.Background(), "a"))
	_, errs := bus.Subscribe(ctx)
	cancel()
	if err, ok := <-errs; ok {
		t.Errorf("ended with %v", err)
	}
}

func TestWrongEvents(t *testing.T) {
	t.Parallel()
	var bus events.Bus
	ctx := namespaces.WithNamespace(context.Background(), "a")
	for _, topic := range []string{"", "/", "images", "/images/", "//x", "/a b"} {
		if err := bus.Publish(ctx, topic, &apievents.ImageDelete{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("topic %q: %v", topic, err)
		}
	}
	if err := bus.Publish(context.Background(), "/x", &apievents.ImageDelete{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without a namespace: %v", err)
	}
	if err := bus.Publish(ctx, "/x", func() {}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("not a message: %v", err)
	}
	for _, e := range []*core.Envelope{nil, {}, {Topic: "/x", Namespace: "a"}, {Topic: "/x", Namespace: "a", Timestamp: time.Now()}} {
		if err := bus.Forward(ctx, e); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", e, err)
		}
	}
}
