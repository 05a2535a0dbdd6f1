package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci"
	"github.com/hako-engine/hako/oci/launch"
	"github.com/hako-engine/hako/shim"
	"github.com/hako-engine/hako/shim/wire"
)

// native is hako's own runtime, used as a library.
type native struct{ r *oci.Runtime }

func (n native) Create(ctx context.Context, id string, o shim.CreateOptions) (shim.Container, error) {
	opts := oci.CreateOptions{
		Bundle: o.Bundle, Stdin: o.Stdin, Stdout: o.Stdout, Stderr: o.Stderr,
		NoPivot: o.NoPivot, NoNewKeyring: o.NoNewKeyring,
	}
	var err error
	for _, m := range o.Rootfs {
		root := specs.Mount{Destination: m.Target, Type: m.Type, Source: m.Source}
		if err := mapped(&root, m.Options); err != nil {
			return nil, err
		}
		opts.Rootfs = append(opts.Rootfs, root)
	}
	var c *oci.Container
	if o.Restore == nil {
		c, err = n.r.Create(ctx, id, opts)
	} else {
		c, err = n.r.Restore(ctx, id, oci.RestoreOptions{
			CreateOptions: opts, Paused: true,
			CRIUOptions: oci.CRIUOptions{ImagePath: o.Restore.ImagePath, WorkPath: o.Restore.WorkPath, TCPEstablished: true, ExtUnixSk: true, ShellJob: true, FileLocks: true},
		})
	}
	if err != nil {
		return nil, notRun(err)
	}
	if c.PidFD != nil {
		c.PidFD.Close() // the shim has one of its own
	}
	return nativeContainer{c, o.Restore != nil}, nil
}

// mapped takes the maps of ids out of containerd's options (uidmap and gidmap, each a list of
// INSIDE:OUTSIDE:SIZE): they are no options of a file system, but of the mounts of its layers.
func mapped(m *specs.Mount, options []string) error {
	for _, o := range options {
		key, list, _ := strings.Cut(o, "=")
		var into *[]specs.LinuxIDMapping
		switch key {
		case "uidmap":
			into = &m.UIDMappings
		case "gidmap":
			into = &m.GIDMappings
		default:
			m.Options = append(m.Options, o)
			continue
		}
		for entry := range strings.SplitSeq(list, ",") {
			var n [3]uint32
			parts := strings.Split(entry, ":")
			for i := range n {
				v, err := uint64(0), error(nil)
				if len(parts) == len(n) {
					v, err = strconv.ParseUint(parts[i], 10, 32)
				}
				if len(parts) != len(n) || err != nil {
					return fmt.Errorf("root file system: option %q: %w", o, errdefs.ErrInvalidArgument)
				}
				n[i] = uint32(v)
			}
			*into = append(*into, specs.LinuxIDMapping{ContainerID: n[0], HostID: n[1], Size: n[2]})
		}
	}
	return nil
}

func (n native) Remove(ctx context.Context, id, _ string) error {
	c, err := n.r.Load(id)
	if errdefs.IsNotFound(err) {
		return nil
	} else if err != nil {
		return err
	}
	err = c.Delete(ctx, true)
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

type nativeContainer struct {
	c *oci.Container
	// restored: it is frozen until it is started.
	restored bool
}

func (n nativeContainer) Init() shim.Process {
	return shim.Process{Pid: n.c.Pid(), Console: n.c.Console}
}

func (n nativeContainer) Start(ctx context.Context) error {
	if n.restored {
		return n.c.Resume(ctx)
	}
	return notRun(n.c.Start(ctx))
}

// notRun takes the class from the error of a step on the way to the program: whoever calls a shim would take a missing
// program for a missing container, task or process.
func notRun(err error) error {
	var step *launch.StepError
	if errors.As(err, &step) && !errdefs.IsInvalidArgument(err) {
		return errors.New(err.Error())
	}
	return err
}

func (n nativeContainer) Checkpoint(ctx context.Context, o shim.CheckpointOptions) error {
	return n.c.Checkpoint(ctx, oci.CheckpointOptions{
		CRIUOptions: oci.CRIUOptions{
			ImagePath: o.ImagePath, WorkPath: o.WorkPath, ParentPath: o.ParentPath, TCPEstablished: o.OpenTCP, ExtUnixSk: o.ExternalUnixSockets,
			ShellJob: o.Terminal, FileLocks: o.FileLocks, EmptyNamespaces: o.EmptyNamespaces, ManageCgroups: o.CgroupsMode,
		},
		LeaveRunning: !o.Exit,
	})
}

func (n nativeContainer) Exec(ctx context.Context, o shim.ExecOptions) (shim.Process, error) {
	p, err := n.c.Exec(ctx, oci.ExecOptions{Process: o.Process, Stdin: o.Stdin, Stdout: o.Stdout, Stderr: o.Stderr})
	if err != nil {
		return shim.Process{}, notRun(err)
	}
	if p.PidFD != nil {
		p.PidFD.Close()
	}
	return shim.Process{Pid: p.Pid, Console: p.Console}, nil
}

func (n nativeContainer) Kill(ctx context.Context, sig unix.Signal, all bool) error {
	if all {
		return n.c.KillAll(ctx, sig)
	}
	return n.c.Kill(ctx, sig)
}

func (n nativeContainer) Pause(ctx context.Context) error  { return n.c.Pause(ctx) }
func (n nativeContainer) Resume(ctx context.Context) error { return n.c.Resume(ctx) }

func (n nativeContainer) Update(ctx context.Context, r *specs.LinuxResources) error {
	return n.c.Update(ctx, r)
}

func (n nativeContainer) Pids(context.Context) ([]int, error) { return n.c.Processes() }

func (n nativeContainer) Stats(context.Context) (wire.Any, error) {
	st, err := n.c.Stats()
	if err != nil {
		return wire.Any{}, err
	}
	return metrics(st), nil
}

func (n nativeContainer) OOM(ctx context.Context) (<-chan struct{}, error) {
	if len(n.c.CgroupPaths()) == 0 {
		ch := make(chan struct{})
		close(ch)
		return ch, nil
	}
	return n.c.NotifyOOM(ctx)
}

func (n nativeContainer) OOMKilled() bool { return oomKilled(n.c.CgroupPaths()) }

func (n nativeContainer) Delete(ctx context.Context) error {
	err := n.c.Delete(ctx, false)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
