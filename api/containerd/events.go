package containerd

import (
	"context"
	"time"

	api "github.com/containerd/containerd/api/services/events/v1"
	ttrpcapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/events"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
)

type eventService struct {
	api.UnimplementedEventsServer
	*Server
}

func (s *eventService) Publish(ctx context.Context, req *api.PublishRequest) (*emptypb.Empty, error) {
	if req.GetEvent() == nil {
		return nil, invalidf("publish %q: no event", req.GetTopic())
	}
	if err := s.opt.Bus.Publish(ctx, req.GetTopic(), req.GetEvent()); err != nil {
		return nil, err
	}
	return empty(), nil
}

func (s *eventService) Forward(ctx context.Context, req *api.ForwardRequest) (*emptypb.Empty, error) {
	if err := s.forward(ctx, req.GetEnvelope()); err != nil {
		return nil, err
	}
	return empty(), nil
}

func (s *eventService) Subscribe(req *api.SubscribeRequest, out api.Events_SubscribeServer) error {
	ctx, cancel := context.WithCancel(out.Context())
	defer cancel()
	ch, errs := s.opt.Bus.Subscribe(ctx, req.GetFilters()...)
	for {
		select {
		case e := <-ch:
			if err := out.Send(envelopeOf(e)); err != nil {
				return err
			}
		case err := <-errs:
			return err
		case <-s.stopped.Done():
			return nil
		}
	}
}

// ttrpcEvents is what shims call.
type ttrpcEvents struct{ s *Server }

func (t ttrpcEvents) Forward(ctx context.Context, req *ttrpcapi.ForwardRequest) (*emptypb.Empty, error) {
	if err := t.s.forward(ctx, req.GetEnvelope()); err != nil {
		return nil, err
	}
	return empty(), nil
}

func (s *Server) forward(ctx context.Context, e *types.Envelope) error {
	at := time.Now().UTC()
	if e.GetTimestamp() != nil {
		at = timeOf(e.GetTimestamp())
	}
	in := &events.Envelope{Timestamp: at, Namespace: e.GetNamespace(), Topic: e.GetTopic()}
	if e.GetEvent() != nil {
		in.Event = e.GetEvent()
	}
	return s.opt.Bus.Forward(ctx, in)
}

func envelopeOf(e *events.Envelope) *types.Envelope {
	return &types.Envelope{
		Timestamp: stampOf(e.Timestamp), Namespace: e.Namespace, Topic: e.Topic,
		Event: &anypb.Any{TypeUrl: e.Event.GetTypeUrl(), Value: e.Event.GetValue()},
	}
}
