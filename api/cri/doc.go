// Package cri is the door for Kubernetes: it serves runtime.v1.RuntimeService and
// runtime.v1.ImageService of the Container Runtime Interface on a unix socket.
//
// In flow requests of the kubelet and of crictl; out flow calls of the engine, and its
// answers and errors in the form of the protocol. It keeps no state, reads every field
// through getters, so that none has to be there, and changes no text of an error.
//
// Files: server.go (gRPC), sandbox.go, container.go, exec.go, image.go, status.go, events.go
// (the calls), convert_*.go (types), errors.go (codes), backend.go (what it needs of the engine).
package cri
