package wire

import "time"

// The definitions are those of containerd's api module: runtime/task/v3/shim.proto,
// runtime/bootstrap/v1/bootstrap.proto, types/*.proto, events/task.proto,
// services/ttrpc/events/v1/events.proto, types/runc/options/oci.proto.

// Any is google.protobuf.Any.
type Any struct {
	TypeURL string
	Value   []byte
}

func (m *Any) fields(c *coder) {
	c.string(1, &m.TypeURL)
	c.data(2, &m.Value)
}

type keyValue struct{ Key, Value string }

func (m *keyValue) fields(c *coder) {
	c.string(1, &m.Key)
	c.string(2, &m.Value)
}

// Empty is google.protobuf.Empty.
type Empty struct{}

func (*Empty) fields(*coder) {}

// Mount is containerd.types.Mount.
type Mount struct {
	Type, Source, Target string
	Options              []string
}

func (m *Mount) fields(c *coder) {
	c.string(1, &m.Type)
	c.string(2, &m.Source)
	c.string(3, &m.Target)
	c.strings(4, &m.Options)
}

// CreateTaskRequest asks for a container.
type CreateTaskRequest struct {
	ID, Bundle            string
	Rootfs                []Mount
	Terminal              bool
	Stdin, Stdout, Stderr string
	Checkpoint            string
	ParentCheckpoint      string
	Options               *Any
}

func (m *CreateTaskRequest) fields(c *coder) {
	c.string(1, &m.ID)
	c.string(2, &m.Bundle)
	repeated(c, 3, &m.Rootfs)
	c.bool(4, &m.Terminal)
	c.string(5, &m.Stdin)
	c.string(6, &m.Stdout)
	c.string(7, &m.Stderr)
	c.string(8, &m.Checkpoint)
	c.string(9, &m.ParentCheckpoint)
	optional(c, 10, &m.Options)
}

// PidResponse is the answer to Create and Start.
type PidResponse struct{ Pid uint32 }

func (m *PidResponse) fields(c *coder) { c.uint32(1, &m.Pid) }

// ProcessRequest names a process: it is the request of State, Start, Delete, Wait
// and, without ExecID, of Pids, Pause, Resume, Stats and Connect.
type ProcessRequest struct{ ID, ExecID string }

func (m *ProcessRequest) fields(c *coder) {
	c.string(1, &m.ID)
	c.string(2, &m.ExecID)
}

// DeleteResponse tells how a deleted process ended.
type DeleteResponse struct {
	Pid, ExitStatus uint32
	ExitedAt        time.Time
	OOMKilled       bool // hako's addition
}

func (m *DeleteResponse) fields(c *coder) {
	c.uint32(1, &m.Pid)
	c.uint32(2, &m.ExitStatus)
	c.time(3, &m.ExitedAt)
	c.bool(oomField, &m.OOMKilled)
}

// ExecProcessRequest adds a process; Spec holds the JSON of the OCI process.
type ExecProcessRequest struct {
	ID, ExecID            string
	Terminal              bool
	Stdin, Stdout, Stderr string
	Spec                  *Any
}

func (m *ExecProcessRequest) fields(c *coder) {
	c.string(1, &m.ID)
	c.string(2, &m.ExecID)
	c.bool(3, &m.Terminal)
	c.string(4, &m.Stdin)
	c.string(5, &m.Stdout)
	c.string(6, &m.Stderr)
	optional(c, 7, &m.Spec)
}

// ResizePtyRequest sets the size of a terminal, in characters.
type ResizePtyRequest struct {
	ID, ExecID    string
	Width, Height uint32
}

func (m *ResizePtyRequest) fields(c *coder) {
	c.string(1, &m.ID)
	c.string(2, &m.ExecID)
	c.uint32(3, &m.Width)
	c.uint32(4, &m.Height)
}

// Values of StateResponse.Status (containerd.v1.types.Status).
const (
	StatusUnknown = iota
	StatusCreated
	StatusRunning
	StatusStopped
	StatusPaused
	StatusPausing
)

// StateResponse is the state of a process.
type StateResponse struct {
	ID, Bundle            string
	Pid                   uint32
	Status                int32
	Stdin, Stdout, Stderr string
	Terminal              bool
	ExitStatus            uint32
	ExitedAt              time.Time
	ExecID                string
	OOMKilled             bool // hako's addition
}

func (m *StateResponse) fields(c *coder) {
	c.string(1, &m.ID)
	c.string(2, &m.Bundle)
	c.uint32(3, &m.Pid)
	c.int32(4, &m.Status)
	c.string(5, &m.Stdin)
	c.string(6, &m.Stdout)
	c.string(7, &m.Stderr)
	c.bool(8, &m.Terminal)
	c.uint32(9, &m.ExitStatus)
	c.time(10, &m.ExitedAt)
	c.string(11, &m.ExecID)
	c.bool(oomField, &m.OOMKilled)
}

// KillRequest sends a signal.
type KillRequest struct {
	ID, ExecID string
	Signal     uint32
	All        bool
}

func (m *KillRequest) fields(c *coder) {
	c.string(1, &m.ID)
	c.string(2, &m.ExecID)
	c.uint32(3, &m.Signal)
	c.bool(4, &m.All)
}

// CloseIORequest ends a process's stdin.
type CloseIORequest struct {
	ID, ExecID string
	Stdin      bool
}

func (m *CloseIORequest) fields(c *coder) {
	c.string(1, &m.ID)
	c.string(2, &m.ExecID)
	c.bool(3, &m.Stdin)
}

// ProcessInfo is one process of a container.
type ProcessInfo struct {
	Pid  uint32
	Info *Any
}

func (m *ProcessInfo) fields(c *coder) {
	c.uint32(1, &m.Pid)
	optional(c, 2, &m.Info)
}

// ProcessDetails is containerd.runc.v1.ProcessDetails: it says in a ProcessInfo which added
// process one is.
type ProcessDetails struct{ ExecID string }

// ProcessDetailsURL names ProcessDetails in an Any.
const ProcessDetailsURL = "containerd.runc.v1.ProcessDetails"

func (m *ProcessDetails) fields(c *coder) { c.string(1, &m.ExecID) }

// PidsResponse lists the processes of a container.
type PidsResponse struct{ Processes []ProcessInfo }

func (m *PidsResponse) fields(c *coder) { repeated(c, 1, &m.Processes) }

// UpdateTaskRequest changes limits; Resources holds the JSON of OCI resources.
type UpdateTaskRequest struct {
	ID          string
	Resources   *Any
	Annotations map[string]string
}

func (m *UpdateTaskRequest) fields(c *coder) {
	c.string(1, &m.ID)
	optional(c, 2, &m.Resources)
	c.stringMap(3, &m.Annotations)
}

// WaitResponse tells how a process ended. OOMKilled is hako's addition.
type WaitResponse struct {
	ExitStatus uint32
	ExitedAt   time.Time
	OOMKilled  bool
}

// oomField is a field number of our own, far from those that containerd uses.
const oomField = 1000

func (m *WaitResponse) fields(c *coder) {
	c.uint32(1, &m.ExitStatus)
	c.time(2, &m.ExitedAt)
	c.bool(oomField, &m.OOMKilled)
}

// StatsResponse holds containerd's cgroup metrics.
type StatsResponse struct{ Stats *Any }

func (m *StatsResponse) fields(c *coder) { optional(c, 1, &m.Stats) }

// ConnectResponse says who serves a task.
type ConnectResponse struct {
	ShimPid, TaskPid uint32
	Version          string
}

func (m *ConnectResponse) fields(c *coder) {
	c.uint32(1, &m.ShimPid)
	c.uint32(2, &m.TaskPid)
	c.string(3, &m.Version)
}

// ShutdownRequest ends a shim that holds no container.
type ShutdownRequest struct {
	ID  string
	Now bool
}

func (m *ShutdownRequest) fields(c *coder) {
	c.string(1, &m.ID)
	c.bool(2, &m.Now)
}

// BootstrapParams is what containerd 2.3 and later writes to the stdin of `start`.
type BootstrapParams struct {
	InstanceID, Namespace string
	LogLevel              int32
	ContainerdVersion     string
	TTRPCAddress          string
	GRPCAddress           string
	Binary                string
	SocketDir             string
}

func (m *BootstrapParams) fields(c *coder) {
	c.string(1, &m.InstanceID)
	c.string(2, &m.Namespace)
	c.int32(3, &m.LogLevel)
	c.string(4, &m.ContainerdVersion)
	c.string(5, &m.TTRPCAddress)
	c.string(6, &m.GRPCAddress)
	c.string(7, &m.Binary)
	c.string(9, &m.SocketDir)
}

// BootstrapResult is the answer to BootstrapParams on stdout.
type BootstrapResult struct {
	Version           int32
	Address, Protocol string
}

func (m *BootstrapResult) fields(c *coder) {
	c.int32(1, &m.Version)
	c.string(2, &m.Address)
	c.string(3, &m.Protocol)
}

// CheckpointTaskRequest writes a container to files in the folder Path.
type CheckpointTaskRequest struct {
	ID, Path string
	Options  *Any
}

func (m *CheckpointTaskRequest) fields(c *coder) {
	c.string(1, &m.ID)
	c.string(2, &m.Path)
	optional(c, 3, &m.Options)
}

// CheckpointOptions is containerd.runc.v1.CheckpointOptions.
type CheckpointOptions struct {
	// Exit: the container ends.
	Exit, OpenTCP, ExternalUnixSockets, Terminal, FileLocks bool
	EmptyNamespaces                                         []string
	CgroupsMode                                             string
	ImagePath, WorkPath, ParentPath                         string
}

// CheckpointOptionsURL names CheckpointOptions in an Any.
const CheckpointOptionsURL = "containerd.runc.v1.CheckpointOptions"

func (m *CheckpointOptions) fields(c *coder) {
	c.bool(1, &m.Exit)
	c.bool(2, &m.OpenTCP)
	c.bool(3, &m.ExternalUnixSockets)
	c.bool(4, &m.Terminal)
	c.bool(5, &m.FileLocks)
	c.strings(6, &m.EmptyNamespaces)
	c.string(7, &m.CgroupsMode)
	c.string(8, &m.ImagePath)
	c.string(9, &m.WorkPath)
	c.string(10, &m.ParentPath)
}

// RuntimeOptions is containerd.runc.v1.Options, the options of a task.
type RuntimeOptions struct {
	NoPivotRoot, NoNewKeyring   bool
	ShimCgroup                  string // of the shim itself
	IoUID, IoGID                uint32
	BinaryName, Root            string
	SystemdCgroup               bool
	CriuImagePath, CriuWorkPath string
}

// RuntimeOptionsURL names RuntimeOptions in an Any.
const RuntimeOptionsURL = "containerd.runc.v1.Options"

func (m *RuntimeOptions) fields(c *coder) {
	c.bool(1, &m.NoPivotRoot)
	c.bool(2, &m.NoNewKeyring)
	c.string(3, &m.ShimCgroup)
	c.uint32(4, &m.IoUID)
	c.uint32(5, &m.IoGID)
	c.string(6, &m.BinaryName)
	c.string(7, &m.Root)
	c.bool(9, &m.SystemdCgroup)
	c.string(10, &m.CriuImagePath)
	c.string(11, &m.CriuWorkPath)
}

// RuntimeVersion is part of RuntimeInfo.
type RuntimeVersion struct{ Version, Revision string }

func (m *RuntimeVersion) fields(c *coder) {
	c.string(1, &m.Version)
	c.string(2, &m.Revision)
}

// RuntimeInfo is the answer to `-info`.
type RuntimeInfo struct {
	Name        string
	Version     *RuntimeVersion
	Options     *Any
	Features    *Any
	Annotations map[string]string
}

func (m *RuntimeInfo) fields(c *coder) {
	c.string(1, &m.Name)
	optional(c, 2, &m.Version)
	optional(c, 3, &m.Options)
	optional(c, 4, &m.Features)
	c.stringMap(5, &m.Annotations)
}

// Envelope carries an event.
type Envelope struct {
	Timestamp        time.Time
	Namespace, Topic string
	Event            *Any
}

func (m *Envelope) fields(c *coder) {
	c.time(1, &m.Timestamp)
	c.string(2, &m.Namespace)
	c.string(3, &m.Topic)
	optional(c, 4, &m.Event)
}

// ForwardRequest is the request of Events/Forward.
type ForwardRequest struct{ Envelope *Envelope }

func (m *ForwardRequest) fields(c *coder) { optional(c, 1, &m.Envelope) }

// Events of a task; the type URL in an Any is "containerd.events." and the name.
type (
	// TaskIO tells where the streams of a task go.
	TaskIO struct {
		Stdin, Stdout, Stderr string
		Terminal              bool
	}
	// TaskCreate is published when a container was created.
	TaskCreate struct {
		ContainerID, Bundle string
		Rootfs              []Mount
		IO                  *TaskIO
		Checkpoint          string
		Pid                 uint32
	}
	// TaskStart is published when its process was started.
	TaskStart struct {
		ContainerID string
		Pid         uint32
	}
	// TaskDelete is published when a task was deleted.
	TaskDelete struct {
		ContainerID     string
		Pid, ExitStatus uint32
		ExitedAt        time.Time
		ID              string
	}
	// TaskExit is published when a process ended; ID is the exec's, or the container's.
	TaskExit struct {
		ContainerID, ID string
		Pid, ExitStatus uint32
		ExitedAt        time.Time
	}
	// TaskOOM is published when the kernel killed a process for want of memory.
	TaskOOM struct{ ContainerID string }
	// TaskExecAdded is published when a process was added.
	TaskExecAdded struct{ ContainerID, ExecID string }
	// TaskExecStarted is published when it was started.
	TaskExecStarted struct {
		ContainerID, ExecID string
		Pid                 uint32
	}
	// TaskPaused is published when a container was frozen.
	TaskPaused struct{ ContainerID string }
	// TaskResumed is published when it was thawed.
	TaskResumed struct{ ContainerID string }
	// TaskCheckpointed is published when a container was written to files, in Checkpoint.
	TaskCheckpointed struct{ ContainerID, Checkpoint string }
)

func (m *TaskIO) fields(c *coder) {
	c.string(1, &m.Stdin)
	c.string(2, &m.Stdout)
	c.string(3, &m.Stderr)
	c.bool(4, &m.Terminal)
}

func (m *TaskCreate) fields(c *coder) {
	c.string(1, &m.ContainerID)
	c.string(2, &m.Bundle)
	repeated(c, 3, &m.Rootfs)
	optional(c, 4, &m.IO)
	c.string(5, &m.Checkpoint)
	c.uint32(6, &m.Pid)
}

func (m *TaskCheckpointed) fields(c *coder) {
	c.string(1, &m.ContainerID)
	c.string(2, &m.Checkpoint)
}

func (m *TaskStart) fields(c *coder) {
	c.string(1, &m.ContainerID)
	c.uint32(2, &m.Pid)
}

func (m *TaskDelete) fields(c *coder) {
	c.string(1, &m.ContainerID)
	c.uint32(2, &m.Pid)
	c.uint32(3, &m.ExitStatus)
	c.time(4, &m.ExitedAt)
	c.string(5, &m.ID)
}

func (m *TaskExit) fields(c *coder) {
	c.string(1, &m.ContainerID)
	c.string(2, &m.ID)
	c.uint32(3, &m.Pid)
	c.uint32(4, &m.ExitStatus)
	c.time(5, &m.ExitedAt)
}

func (m *TaskOOM) fields(c *coder) { c.string(1, &m.ContainerID) }

func (m *TaskExecAdded) fields(c *coder) {
	c.string(1, &m.ContainerID)
	c.string(2, &m.ExecID)
}

func (m *TaskExecStarted) fields(c *coder) {
	c.string(1, &m.ContainerID)
	c.string(2, &m.ExecID)
	c.uint32(3, &m.Pid)
}

func (m *TaskPaused) fields(c *coder)  { c.string(1, &m.ContainerID) }
func (m *TaskResumed) fields(c *coder) { c.string(1, &m.ContainerID) }
