package cri

import (
	"context"
	"time"

	"google.golang.org/grpc"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hako-engine/hako/engine"
)

// eventTypes are the events of containers and sandboxes that the API has.
var eventTypes = map[string]api.ContainerEventType{
	"container/create":               api.ContainerEventType_CONTAINER_CREATED_EVENT,
	"container/start":                api.ContainerEventType_CONTAINER_STARTED_EVENT,
	"container/die":                  api.ContainerEventType_CONTAINER_STOPPED_EVENT,
	"container/destroy":              api.ContainerEventType_CONTAINER_DELETED_EVENT,
	engine.EventSandbox + "/create":  api.ContainerEventType_CONTAINER_CREATED_EVENT,
	engine.EventSandbox + "/start":   api.ContainerEventType_CONTAINER_STARTED_EVENT,
	engine.EventSandbox + "/stop":    api.ContainerEventType_CONTAINER_STOPPED_EVENT,
	engine.EventSandbox + "/destroy": api.ContainerEventType_CONTAINER_DELETED_EVENT,
}

// GetContainerEvents tells what happens from now on. Each event comes with the sandbox and
// the statuses of all its containers, as they are when it is told.
func (s *runtimeService) GetContainerEvents(_ *api.GetEventsRequest, to grpc.ServerStreamingServer[api.ContainerEventResponse]) error {
	ctx := to.Context()
	events, err := s.opt.Backend.Events(ctx, time.Time{}, time.Time{}, engine.Filters{"type": {"container", engine.EventSandbox}})
	if err != nil {
		return err
	}
	if err := to.SendHeader(nil); err != nil { // the client knows that it misses nothing from here on
		return err
	}
	for ev := range events {
		kind, known := eventTypes[ev.Type+"/"+ev.Action]
		sandbox := ev.ID
		if ev.Type == "container" {
			sandbox = ev.Attributes[engine.AttrSandbox]
		}
		if !known || sandbox == "" {
			continue
		}
		if err := to.Send(s.event(ctx, ev, kind, sandbox)); err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (s *Server) event(ctx context.Context, ev engine.Event, kind api.ContainerEventType, sandbox string) *api.ContainerEventResponse {
	w := &api.ContainerEventResponse{ContainerId: ev.ID, ContainerEventType: kind, CreatedAt: ev.Time.UnixNano()}
	sb, err := s.opt.Backend.Sandbox(ctx, sandbox)
	if err != nil {
		// It has been removed meanwhile; what is known of it is who it was.
		w.PodSandboxStatus = &api.PodSandboxStatus{
			Id: sandbox, State: api.PodSandboxState_SANDBOX_NOTREADY,
			Metadata: &api.PodSandboxMetadata{
				Name: ev.Attributes[engine.AttrPodName], Namespace: ev.Attributes[engine.AttrPodNamespace], Uid: ev.Attributes[engine.AttrPodUID],
			},
		}
		return w
	}
	w.PodSandboxStatus = sandboxStatus(sb)
	for _, v := range s.opt.Backend.SandboxContainers(ctx, sb.ID) {
		w.ContainersStatuses = append(w.ContainersStatuses, s.containerStatus(ctx, &v))
	}
	return w
}
