// Package client is the engine's side of a shim: it starts one, connects to one
// again after a restart, and speaks the shim v2 protocol (ttrpc, task v3) and
// hako's attach protocol with it.
//
// In flow bundles, stdio configurations and commands; out flow pids, exit
// statuses, events and byte streams. It links neither the runtime nor the
// supervisor.
package client

import (
	"io"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Mount is one mount of a container's root file system, in the form of mount(8).
type Mount struct {
	Type    string
	Source  string
	Target  string // below the root; usually ""
	Options []string
}

// Stdio says where the streams of a process go. The zero value discards output and gives no stdin.
type Stdio struct {
	Terminal bool
	// OpenStdin gives the process a stdin that attach clients write to; otherwise it reads /dev/null.
	OpenStdin bool
	// StdinOnce closes stdin when the first attach client that wrote to it goes.
	StdinOnce bool
	Log       LogConfig
}

// LogConfig is the log file that the shim writes.
type LogConfig struct {
	Format   string // "" (none), "json-file", "cri"
	Path     string
	MaxSize  int64 // bytes before rotation; 0: never
	MaxFiles int   // rotated files kept, the current one included; 0 means 1
	Compress bool  // gzip rotated files
	// Attrs are added to each json-file record (Docker's labels/env log options).
	Attrs map[string]string
}

// StartOptions starts a shim.
type StartOptions struct {
	Binary    string // path of the shim; empty: hako-shim beside the running executable
	Namespace string
	ID        string // of the sandbox or lone container: names the shim
	Bundle    string // folder with config.json
	// Runtime is "" for hako's own, or the path of an OCI runtime's binary that the shim executes.
	Runtime       string
	SystemdCgroup bool
	// EventsAddress is the ttrpc socket that takes events (Events/Forward).
	EventsAddress string
	Debug         bool
}

// CreateOptions creates a container (or, with Connect, a task) in a shim.
type CreateOptions struct {
	ID     string
	Bundle string
	Rootfs []Mount
	Stdio  Stdio
	// Checkpoint is a folder that Checkpoint has written: the container runs on from there when it is started. "": it is a new one.
	Checkpoint string
}

// ExecOptions adds a process to a container.
type ExecOptions struct {
	ID     string // container
	ExecID string
	Spec   *specs.Process
	Stdio  Stdio
}

// Exit is how a process ended.
type Exit struct {
	Status    uint32 // exit code, or 128 + signal
	ExitedAt  time.Time
	OOMKilled bool
}

// Status of a process as its shim sees it.
type Status string

// States of a process.
const (
	StatusCreated Status = "created"
	StatusRunning Status = "running"
	StatusPaused  Status = "paused"
	StatusStopped Status = "stopped"
)

// State of one process.
type State struct {
	ID     string
	ExecID string
	Pid    int
	Status Status
	Exit   Exit // valid if Status is StatusStopped
}

// AttachOptions chooses streams.
type AttachOptions struct {
	ID     string
	ExecID string
	Stdin  bool
	Stdout bool
	Stderr bool
}

// Stream is a live attachment. Reads give frames; it ends with io.EOF when the
// process's output is drained. Closing it detaches and does not touch the process.
type Stream interface {
	// ReadFrame gives the next piece of output: stream 1 is stdout, 2 stderr. The slice is valid until the next call.
	ReadFrame() (stream int, p []byte, err error)
	// Write feeds stdin.
	io.Writer
	// CloseWrite ends stdin (the process reads EOF once, as with docker attach).
	CloseWrite() error
	io.Closer
}

// RunStream is the attachment to a process that was run: ReadFrame's io.EOF comes when it has ended.
type RunStream interface {
	Stream
	// ExitStatus is how the process ended, valid after io.EOF: its exit code, or 128 and the signal.
	ExitStatus() int
}
