// Package shim is the supervisor of a pod's containers, or of one lone container:
// it starts them through a Runtime, owns their streams, reaps every process, keeps
// exit statuses and tells of events.
//
// In flow calls of containerd's shim v2 protocol, attach connections and the
// output of processes; out flow calls to the runtime, log records, exit files and
// events. Nothing of it depends on the daemon: a daemon that dies and comes back
// finds everything as it is (docs/shim.md).
package shim

import (
	"context"
	"os"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/shim/wire"
)

// Mount is one mount of a root file system.
type Mount = wire.Mount

// RuntimeConfig says which runtime to use and how.
type RuntimeConfig struct {
	// Binary is the path or name of an OCI runtime to execute; empty: hako's own.
	Binary string `json:"binary,omitempty"`
	// Root is the folder of the runtime's state.
	Root          string `json:"root"`
	SystemdCgroup bool   `json:"systemdCgroup,omitempty"`
}

// Runtime makes containers. An error about the program that was to be run has no class, whatever its text
// says: the classes are of containers and processes. Its methods may start child processes if they wait for
// them before they return; only the pids that they give are left to the shim,
// which is a child subreaper.
type Runtime interface {
	// Create makes a container whose process waits to be started.
	Create(ctx context.Context, id string, o CreateOptions) (Container, error)
	// Remove kills and deletes what is left of a container of an earlier shim. That
	// nothing is left is no error.
	Remove(ctx context.Context, id, bundle string) error
}

// CreateOptions describes a container: its bundle holds config.json.
type CreateOptions struct {
	Bundle                string
	Rootfs                []Mount  // bottom first; empty: what the bundle says
	Stdin, Stdout, Stderr *os.File // nil: /dev/null. Unused with a terminal
	Terminal              bool
	NoPivot, NoNewKeyring bool
	// Restore, if not nil, says where the processes are read from; they run on when the
	// container is started.
	Restore *Restore
}

// Restore describes what Checkpoint has written. The caller of the shim has named it: it
// is never taken from a bundle or an image.
type Restore struct {
	ImagePath string
	WorkPath  string // for logs; may be empty
}

// CheckpointOptions say how to write a container to files.
type CheckpointOptions struct {
	ImagePath                                               string
	WorkPath                                                string // for logs; may be empty
	ParentPath                                              string // an earlier dump, relative to ImagePath; may be empty
	Exit, OpenTCP, ExternalUnixSockets, Terminal, FileLocks bool
	EmptyNamespaces                                         []string
	CgroupsMode                                             string
}

// ExecOptions describes a process to add.
type ExecOptions struct {
	Process               *specs.Process
	Stdin, Stdout, Stderr *os.File
}

// Process is a process that a runtime has started as a child of the shim, or of
// something that left it to the subreaper.
type Process struct {
	Pid     int
	Console *os.File // pty master; nil without terminal
}

// Container is one created container.
type Container interface {
	// Init is the first process. Its pid stays when it has ended.
	Init() Process
	// Start lets the first process run the program.
	Start(ctx context.Context) error
	// Exec runs a further process, in the container's namespaces and cgroups.
	Exec(ctx context.Context, o ExecOptions) (Process, error)
	// Kill signals the first process, or all of them.
	Kill(ctx context.Context, sig unix.Signal, all bool) error
	// Pause freezes all processes, and returns when they stand still.
	Pause(ctx context.Context) error
	// Resume thaws them.
	Resume(ctx context.Context) error
	// Update changes limits; what r leaves out stays.
	Update(ctx context.Context, r *specs.LinuxResources) error
	// Checkpoint writes the processes to files. They end if the options say so.
	Checkpoint(ctx context.Context, o CheckpointOptions) error
	// Pids lists all processes by their numbers on the host.
	Pids(ctx context.Context) ([]int, error)
	// Stats gives containerd's metrics message of the cgroup.
	Stats(ctx context.Context) (wire.Any, error)
	// OOM tells of each time that the kernel killed a process for want of memory; the
	// channel is closed when ctx ends or the cgroup is gone.
	OOM(ctx context.Context) (<-chan struct{}, error)
	// OOMKilled asks whether that has happened.
	OOMKilled() bool
	// Delete releases a container whose first process has ended.
	Delete(ctx context.Context) error
}
