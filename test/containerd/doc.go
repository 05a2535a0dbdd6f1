// Package containerd runs the clients that were written for containerd against hakod: ctr,
// nerdctl, BuildKit's containerd worker, and containerd's own client tests. In flow these
// programs, which this repository does not hold (each script says what it needs); out flow the points
// of the scripts, each a subtest.
package containerd
