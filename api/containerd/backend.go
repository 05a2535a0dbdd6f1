package containerd

import (
	"context"
	"log/slog"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
)

// Options configure a Server. The stores, Bus and Version are needed.
type Options struct {
	Content            content.Store
	Images             images.Store
	Leases             leases.Manager
	Namespaces         Namespaces
	Snapshotters       map[string]snapshots.Snapshotter
	DefaultSnapshotter string // where neither a request nor the namespace names one
	Bus                Bus
	Differ             Differ    // nil: layers cannot be applied or made
	Transfer           Transfers // nil: no transfers
	Backend            Backend   // nil: no containers

	Version  string
	Revision string
	// UUID identifies this node; it stays the same.
	UUID string
	// Plugins are told by Introspection, besides the services of this package and the snapshotters.
	Plugins []Plugin
	// RuntimeInfo tells of a runtime; nil: errdefs.ErrNotImplemented.
	RuntimeInfo func(context.Context, *types.RuntimeRequest) (*types.RuntimeInfo, error)
	// Guests register further services on the same socket, and see to their errors themselves.
	Guests []func(grpc.ServiceRegistrar)
	Log    *slog.Logger // nil: discard
}

// Namespaces is containerd's store of namespaces, and what a field mask takes.
type Namespaces interface {
	namespaces.Store
	// Relabel replaces labels: all of them, or those that paths ("labels.KEY") name.
	Relabel(ctx context.Context, ns string, labels map[string]string, paths ...string) (map[string]string, error)
}

// Bus tells what happens.
type Bus interface {
	events.Publisher
	events.Forwarder
	events.Subscriber
}

// Differ applies and makes layers.
type Differ interface {
	diff.Applier
	diff.Comparer
}

// Backend is what the services of containers, tasks and sandboxes need of the engine.
type Backend any

// Plugin is a part of the daemon that clients look for by type and name.
type Plugin struct {
	Type, ID     string
	Requires     []string
	Exports      map[string]string
	Capabilities []string
}
