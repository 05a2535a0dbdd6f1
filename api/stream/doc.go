// Package stream holds the byte streams that the API front-ends share: the
// multiplexed output format of the Docker Engine API, connections taken over from
// an HTTP server, detach keys, and the pump between such a connection and a
// process.
//
// In flow requests whose connection is to be taken over, and the frames of a
// process; out flow bytes on the connection. The package knows no containers: a
// process is the small Process interface. Bytes from clients are bounded by the
// reader's buffer and never interpreted, but for the detach keys.
package stream
