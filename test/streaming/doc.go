// Package streaming holds the tests of the CRI's streams against the real engine, as
// root: all rooms are opened in the test's own process, as cmd/hakod does, so that what is
// left of an exec in the daemon (goroutines, descriptors) can be counted; the shim
// is the real one. The clients are those of Kubernetes.
//
// In flows nothing but this repository and the machine's busybox; out flow verdicts.
package streaming
