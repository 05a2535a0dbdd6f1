//go:build linux

// Package ownthread runs code on a thread of its own, which may enter namespaces that the
// rest of the process is to stay out of. In flow a function; out flows nothing.
package ownthread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Run runs f on a thread that ends afterwards, with its namespaces and its working
// directory. The process's first thread is not one: it cannot end, and /proc/self shows
// what it sees.
func Run(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// While it is locked here, nobody else runs on it.
			Run(f)
			runtime.UnlockOSThread()
			return
		}
		f() // and never unlock
	}()
	<-done
}
