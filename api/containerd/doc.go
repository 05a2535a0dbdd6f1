// Package containerd is the door for containerd's clients: it serves the gRPC services of
// github.com/containerd/containerd/api on a unix socket, and on a second one, in ttrpc, the one that
// shims report to.
//
// In flow requests of ctr, nerdctl, BuildKit and of everything that uses containerd's Go client; out
// flow calls of the stores (in containerd's own interfaces), of the engine and of the image room, and
// their answers and errors in the form of the protocol. It keeps no state but the streams that are
// open. Fields are read through getters, so that none has to be there.
//
// Files: server.go (listening, who serves what), intercept.go (namespace, lease, errors, panics),
// backend.go (what it needs of the rooms below), convert.go (types), and one for each service.
package containerd
