// Package integration holds the tests that drive the real daemon as root: with
// the docker command line where there is one, and over HTTP.
//
// In flows nothing but this repository, out flow verdicts: the binaries are built for the tests, the
// image is made of busybox and a small Go program, and the registry is in-process. Each
// daemon has a root, a state folder, a bridge and a subnet of its own, and a census
// at its end tells what it left on the machine: which must be nothing.
package integration
