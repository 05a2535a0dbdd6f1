package store

import (
	"context"
	"strings"

	apievents "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/namespaces"
)

// Publish tells whoever the store was opened for (Options.Events) what happened to an object,
// in the namespace of ctx. It is called when that is durable, and cannot fail: what has
// happened is not taken back because nobody could be told.
func (s *Store) Publish(ctx context.Context, topic string, event events.Event) {
	if s.events == nil {
		return
	}
	if err := s.events.Publish(ctx, topic, event); err != nil {
		s.log.Warn("an event is lost", "topic", topic, "error", err)
	}
}

// publishSwept tells what the garbage collection removed.
func (s *Store) publishSwept(ctx context.Context, removed []Node) {
	for _, n := range removed {
		ctx := namespaces.WithNamespace(ctx, n.Namespace)
		switch name, isSnapshot := strings.CutPrefix(n.Type, resourceSnapshots); {
		case isSnapshot:
			s.Publish(ctx, "/snapshot/remove", &apievents.SnapshotRemove{Key: n.ID, Snapshotter: name})
		case n.Type == resourceContent:
			s.Publish(ctx, "/content/delete", &apievents.ContentDelete{Digest: n.ID})
		case n.Type == resourceImages:
			s.Publish(ctx, "/images/delete", &apievents.ImageDelete{Name: n.ID})
		}
	}
}
