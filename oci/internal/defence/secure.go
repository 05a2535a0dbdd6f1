//go:build !insecure

// Package defence names the defences of the runtime that no installed peer lacks, so that
// the battery of escapes (test/security) can show that its attacks work without them.
//
// Nothing flows in or out: in every normal build these are constants, and the compiler
// removes the other branch. Only a build with the tag "insecure" can take one of them out,
// the one that HAKO_INSECURE names; together with the tag that every binary of the Makefile
// has, that build does not compile.
package defence

// Each defence with the row of docs/security.md that needs it.
const (
	// SealedLoader: what a container can reach of the runtime cannot be written (A1).
	SealedLoader = true
	// LateFork: a process that enters a PID namespace is the loader already (A2).
	LateFork = true
	// CheckedCwd: descriptors of the caller are closed first, and the working directory is
	// opened without magic links and must lie inside the root (A3).
	CheckedCwd = true
	// OwnProc: nothing is mounted inside /proc, and sysctls are written to nothing but procfs (A4).
	OwnProc = true
	// InRoot: names of the container resolve inside its root (A5, A6).
	InRoot = true
)
