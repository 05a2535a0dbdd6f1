// Package events is the daemon's bus of what happens to objects, in containerd's form.
//
// In flow a topic ("/images/create") and a message, with the namespace of the context, or a
// whole envelope of somebody else (a shim); out flow envelopes, to everybody who subscribed
// before. All subscribers see all events in one order, that of the calls of Publish and
// Forward, and nobody waits for a subscriber: whoever falls behind by more than a fixed number is
// told so, and dropped. Nothing is kept for later.
package events

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
)

// maxBehind is how many events may wait for one subscriber.
const maxBehind = 1 << 16

// maxTopic bounds the length of a topic, in bytes.
const maxTopic = 1024

// Bus is the bus. Its zero value is ready; all methods may be called concurrently. It
// implements containerd's events.Publisher, events.Forwarder and events.Subscriber.
type Bus struct {
	mu   sync.Mutex
	subs map[*subscriber]struct{}
}

var (
	_ events.Publisher  = (*Bus)(nil)
	_ events.Forwarder  = (*Bus)(nil)
	_ events.Subscriber = (*Bus)(nil)
)

// subscriber has its own queue, and a goroutine that empties it. mu of the Bus guards it.
type subscriber struct {
	filter  filters.Filter
	queue   []*events.Envelope
	wake    chan struct{} // of one place
	dropped bool
}

// Publish tells an event now, in the namespace of ctx. event is a protobuf message, or one
// that was packed already (typeurl.Any).
func (b *Bus) Publish(ctx context.Context, topic string, event events.Event) error {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return fmt.Errorf("publish %q: %w", topic, err)
	}
	e := &events.Envelope{Timestamp: time.Now().UTC(), Namespace: ns, Topic: topic}
	switch event.(type) {
	case proto.Message, typeurl.Any:
	default:
		return fmt.Errorf("publish %q: %T is no message: %w", topic, event, errdefs.ErrInvalidArgument)
	}
	if e.Event, err = typeurl.MarshalAny(event); err != nil {
		return fmt.Errorf("publish %q: %w: %w", topic, err, errdefs.ErrInvalidArgument)
	}
	return b.Forward(ctx, e)
}

// Forward passes an envelope on as it is: errdefs.ErrInvalidArgument if it is not whole.
func (b *Bus) Forward(_ context.Context, e *events.Envelope) error {
	if err := valid(e); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for s := range b.subs {
		if s.dropped {
			continue
		}
		if len(s.queue) >= maxBehind {
			s.dropped, s.queue = true, nil
		} else {
			s.queue = append(s.queue, e)
		}
		s.ring()
	}
	return nil
}

func valid(e *events.Envelope) error {
	fail := func(format string, args ...any) error {
		return fmt.Errorf("event: %s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
	if e == nil {
		return fail("no envelope")
	}
	if err := identifiers.Validate(e.Namespace); err != nil {
		return fmt.Errorf("event: namespace: %w", err)
	}
	if len(e.Topic) > maxTopic {
		return fail("topic of %d bytes", len(e.Topic))
	}
	rest, ok := strings.CutPrefix(e.Topic, "/")
	if !ok || rest == "" {
		return fail("topic %q must begin with / and have a name", e.Topic)
	}
	for part := range strings.SplitSeq(rest, "/") {
		if err := identifiers.Validate(part); err != nil {
			return fmt.Errorf("event: topic %q: %w", e.Topic, err)
		}
	}
	if e.Timestamp.IsZero() {
		return fail("topic %q: no timestamp", e.Topic)
	}
	if e.Event == nil {
		return fail("topic %q: no event", e.Topic)
	}
	return nil
}

// ring never blocks.
func (s *subscriber) ring() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Subscribe gives all events from now on that match one of the filters (containerd's syntax
// with the fields namespace, topic and event.NAME; none: all), until ctx ends. Then errs is
// closed; before that it gets the one reason why the subscription ended early:
// errdefs.ErrInvalidArgument for a filter, errdefs.ErrUnavailable for a reader that fell behind.
func (b *Bus) Subscribe(ctx context.Context, fs ...string) (<-chan *events.Envelope, <-chan error) {
	ch, errs := make(chan *events.Envelope), make(chan error, 1)
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		errs <- fmt.Errorf("subscribe: %w", err)
		close(errs)
		return ch, errs
	}
	s := &subscriber{filter: filter, wake: make(chan struct{}, 1)}
	b.mu.Lock()
	if b.subs == nil {
		b.subs = map[*subscriber]struct{}{}
	}
	b.subs[s] = struct{}{}
	b.mu.Unlock()
	go func() {
		defer close(errs)
		defer func() {
			b.mu.Lock()
			delete(b.subs, s)
			b.mu.Unlock()
		}()
		if err := b.deliver(ctx, s, ch); err != nil {
			errs <- err
		}
	}()
	return ch, errs
}

func (b *Bus) deliver(ctx context.Context, s *subscriber, ch chan<- *events.Envelope) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		}
		b.mu.Lock()
		batch, dropped := s.queue, s.dropped
		s.queue = nil
		b.mu.Unlock()
		if dropped {
			return fmt.Errorf("subscribe: more than %d events wait to be read: %w", maxBehind, errdefs.ErrUnavailable)
		}
		for _, e := range batch {
			// Here and not by the publisher: it may take a decoding.
			if !s.filter.Match(e) {
				continue
			}
			select {
			case ch <- e:
			case <-ctx.Done():
				return nil
			}
		}
	}
}
