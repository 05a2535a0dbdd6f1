//go:build ignore

// The program of library.sh: a container through the Go library, without a command line and
// without a daemon. As root.
//
//	library DIR ID ROOTFS COMMAND [ARG...]
//
// DIR is where the library keeps its state.
package main

import (
	"context"
	"fmt"
	"log"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci"
	"github.com/hako-engine/hako/oci/spec"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) < 5 {
		log.Fatal("usage: library DIR ID ROOTFS COMMAND [ARG...]")
	}
	if err := live(os.Args[1], os.Args[2], os.Args[3], os.Args[4:]); err != nil {
		log.Fatal(err)
	}
}

// live makes a container and sees it through its life.
func live(dir, id, rootfs string, command []string) error {
	ctx := context.Background()
	s := spec.Default(oci.CgroupV2())
	s.Root.Path = rootfs // or CreateOptions.Rootfs, mounts that the host never sees
	s.Process.Terminal, s.Process.Args = false, command

	rt := &oci.Runtime{Root: dir, Log: slog.Default()}
	// What it is going to be, step by step. This needs no privileges.
	plan, err := rt.Plan(id, oci.CreateOptions{Bundle: dir, Spec: s}, nil)
	if err != nil {
		return err
	}
	fmt.Println("the plan has", len(plan.Parts), "actions and needs Linux", plan.Needs)

	// Whatever fails: Create leaves nothing behind.
	c, err := rt.Create(ctx, id, oci.CreateOptions{Bundle: dir, Spec: s, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr})
	if err != nil {
		return err
	}
	defer c.PidFD.Close()
	fmt.Println("made")
	if err := c.Start(ctx); err != nil {
		return err
	}
	// The process is a child of this one, which waits for it: by its pid, or as here by its
	// descriptor, which also poll(2) takes.
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PIDFD, int(c.PidFD.Fd()), &info, unix.WEXITED, nil); err != nil {
		return err
	}
	status, err := c.Status()
	if err != nil {
		return err
	}
	fmt.Println("now", status)

	// Any process finds it again.
	again, err := rt.Load(id)
	if err != nil {
		return err
	}
	if err := again.Delete(ctx, false); err != nil {
		return err
	}
	left, err := rt.List()
	fmt.Println("left:", len(left))
	return err
}
