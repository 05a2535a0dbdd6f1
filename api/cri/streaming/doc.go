// Package streaming serves the byte streams of the Kubernetes CRI: exec, attach and
// port-forward.
//
// In flow requests that the CRI's RPCs have checked (Server.Exec, Attach, PortForward);
// each gets a URL with a token that works once and for a minute. Behind that URL the
// server speaks what Kubernetes' clients speak, over SPDY/3.1 or WebSocket. Out flow
// calls of a Runtime, with the streams as readers and writers; EngineRuntime makes one
// of an engine.
//
// What is asked for (command, terminal, container) stays in the server: the URL holds
// nothing but the token. A client that leaves ends the context of its call, and nothing
// of it stays. What a client may make the server hold is bounded: tokens, streams,
// bytes on their way to a process that does not read, headers.
//
// The wire formats are those of k8s.io/cri-streaming, which kubelets, kubectl and crictl
// know. That module's server is not used: it answers v5.channel.k8s.io and the
// port-forward tunnel with 403, tokens have 48 bits, a call goes on after its client has
// left, and a client can make the SPDY library under it hold gigabytes. Of
// that library only the parser of control frames is used here.
package streaming
