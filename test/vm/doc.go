// Package vm tests what most machines of developers lack: one unified cgroup hierarchy,
// AppArmor, a root file system whose mounts are shared, a kernel of 2022. Its scripts boot
// a virtual machine that has them all: image.sh makes it, run.sh runs a command in it,
// suite.sh runs tests of any package.
//
// In flow the runtime's packages and this machine; out flow verdicts. The tests run
// outside of the VM too, as far as the machine at hand goes.
package vm
