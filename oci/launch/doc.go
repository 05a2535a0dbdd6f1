//go:build linux && (amd64 || arm64)

// Package launch executes plans.
//
// In flow a plan.Plan and the descriptors that its fixed slots stand for; out flows a
// process that has become the program of a container, or the step that failed. The
// parent's steps run in the calling goroutine. Then the process is cloned once, as
// os/exec does it: without CLONE_VM, between the hooks that the Go runtime has for
// forking, and the child runs the program in a loop that neither allocates, grows the
// stack, nor calls into the runtime. Everything that it touches, its stack too, has been laid
// out before the clone, in memory of its own: it has nothing of the Go heap.
//
// The program ends by executing the loader: a few hundred bytes of machine code in a
// sealed memory file. Only the loader executes the program of the container, so that
// no process in a container ever has the runtime's own binary as its /proc/self/exe
// (CVE-2019-5736), even if the program is a script whose interpreter is /proc/self/exe.
package launch
