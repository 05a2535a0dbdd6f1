// Package engine holds the objects of a node and their state machines:
// containers, execs, images, volumes, networks and events. Every API is a view of
// these objects.
//
// In flow requests in the engine's own types from the front-ends (api/...), and
// exits and OOM events from the shims; out flow bundles and commands to the
// shims, records to the store, and events to the front-ends. Errors are of the
// classes of github.com/containerd/errdefs; the front-ends map them to their
// protocol's codes.
package engine
