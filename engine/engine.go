// Package engine holds the node's objects (containers, execs, images, volumes,
// networks, events) and their state machines, and takes them up again after a
// restart of the daemon.
//
// In flow requests in the engine's own types from the front-ends (api/docker,
// api/cri, api/containerd); out flow snapshots, bundles and commands to the rooms
// below, which the engine knows only by the small interfaces of deps.go. Every
// request takes a context; every error has a class of errdefs, and a text that
// Docker's users know where there is one. Values given out are copies.
//
// Guarantees: what was acknowledged survives kill -9 of the daemon; containers run
// on without the daemon; an operation that fails leaves nothing behind; a stuck
// container blocks only the requests that name it.
package engine

import (
	"context"
	"errors"
	"log/slog"

	"github.com/containerd/containerd/v2/core/snapshots"
)

// Namespace is the containerd namespace of the objects that Docker and CRI share.
const Namespace = "k8s.io"

// ErrNotModified marks a start of a running container or a stop of a stopped one:
// nothing was to be done. It is wrapped together with errdefs.ErrFailedPrecondition.
var ErrNotModified = errors.New("not modified")

// Options configures an Engine.
type Options struct {
	Root  string // durable: volumes, logs
	State string // gone after a reboot: bundles
	// Containers, Volumes and Settings hold the engine's records (store.Records).
	Containers Records
	Volumes    Records
	Settings   Records

	Images       Images
	Networks     Networks
	Shims        Shims
	Snapshotters map[string]snapshots.Snapshotter
	Snapshotter  string // name of the default one

	CgroupDriver string            // "cgroupfs" (default) or "systemd"
	ShimBinary   string            // empty: beside the executable
	Runtimes     map[string]string // further OCI runtimes: name → binary that the shim executes
	InitBinary   string            // static init for Config.Init; empty: asking for one is an error
	Version      string
	Labels       []string // of the daemon, shown by Info
	RegistryDir  string
	Log          *slog.Logger // nil: discard
}

// Engine owns the objects of one node.
type Engine struct {
	opt Options
	log *slog.Logger
}

// New opens the engine on its records and takes up what runs.
func New(ctx context.Context, o Options) (*Engine, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Engine{opt: o, log: o.Log}, nil
}

// Close lets go of everything that runs and leaves it running.
func (e *Engine) Close() error { return nil }
