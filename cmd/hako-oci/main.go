package main

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci"
)

func main() {
	r := &oci.Runtime{Root: "/run/hako-oci-test"}
	c, err := r.Run(context.Background(), os.Args[2], oci.CreateOptions{Bundle: ".", Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	var ws unix.WaitStatus
	unix.Wait4(c.Pid(), &ws, 0, nil)
	if err := c.Delete(context.Background(), true); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(ws.ExitStatus())
}
