package engine

import (
	"io"
	"net/netip"
	"time"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image"
	"github.com/hako-engine/hako/network"
)

// Mount kinds.
const (
	MountBind   = "bind"
	MountVolume = "volume"
	MountTmpfs  = "tmpfs"
	MountImage  = "image" // the files of an image, read-only
)

// Mount asks for one mount in a container.
type Mount struct {
	Kind        string   `json:"kind"`
	Source      string   `json:"source,omitempty"` // host path, or volume name ("": anonymous)
	Target      string   `json:"target"`           // absolute path in the container
	ReadOnly    bool     `json:"readOnly,omitempty"`
	Propagation string   `json:"propagation,omitempty"` // rprivate (default), shared, ...
	Options     []string `json:"options,omitempty"`     // further mount options ("z", "nocopy", "size=64m", ...)
	// CreateSource makes a missing bind source a directory, as docker run -v does.
	CreateSource     bool              `json:"createSource,omitempty"`
	NonRecursive     bool              `json:"nonRecursive,omitempty"`
	NoCopy           bool              `json:"noCopy,omitempty"`
	Subpath          string            `json:"subpath,omitempty"` // of a volume
	Driver           string            `json:"driver,omitempty"`  // of the volume
	DriverOpts       map[string]string `json:"driverOpts,omitempty"`
	Labels           map[string]string `json:"labels,omitempty"`
	FromImage        bool              `json:"fromImage,omitempty"` // by the image's VOLUME
	ReadOnlyNonRecur bool              `json:"readOnlyNonRecursive,omitempty"`
	// UIDs and GIDs map the owners of the files (idmapped mount); nil: as they are.
	UIDs []IDMap `json:"uids,omitempty"`
	GIDs []IDMap `json:"gids,omitempty"`
	// Relabel gives the source the SELinux label of a pod's files.
	Relabel bool `json:"relabel,omitempty"`
	// ImageID is the image that a mount of kind image shows, and Source how it was named.
	ImageID   string `json:"imageID,omitempty"`
	TmpfsSize int64  `json:"tmpfsSize,omitempty"` // bytes
	TmpfsMode uint32 `json:"tmpfsMode,omitempty"`
	// Shorthand tells that it was given in the form of docker's -v (HostConfig.Binds or Config.Volumes).
	Shorthand string `json:"shorthand,omitempty"`
	// Resolved is filled by the engine: the host path in use.
	Resolved string `json:"resolved,omitempty"`
}

// Device is a host device given to a container.
type Device struct {
	HostPath      string `json:"hostPath"`
	ContainerPath string `json:"containerPath"`
	Permissions   string `json:"permissions"` // of rwm
}

// Ulimit is one resource limit.
type Ulimit struct {
	Name string `json:"name"` // nofile, nproc, ...
	Soft int64  `json:"soft"` // -1: unlimited
	Hard int64  `json:"hard"`
}

// WeightDevice and ThrottleDevice limit one block device.
type WeightDevice struct {
	Path   string `json:"path"`
	Weight uint16 `json:"weight"`
}

// ThrottleDevice limits the rate (bytes or operations per second) of one block device.
type ThrottleDevice struct {
	Path string `json:"path"`
	Rate uint64 `json:"rate"`
}

// Resources are a container's limits. Zero values mean no limit, or what the kernel gives.
type Resources struct {
	Memory            int64            `json:"memory,omitempty"`            // bytes
	MemoryReservation int64            `json:"memoryReservation,omitempty"` // bytes
	MemorySwap        int64            `json:"memorySwap,omitempty"`        // bytes, memory included; -1: unlimited
	MemorySwappiness  *int64           `json:"memorySwappiness,omitempty"`  // 0 to 100
	OOMKillDisable    *bool            `json:"oomKillDisable,omitempty"`
	NanoCPUs          int64            `json:"nanoCPUs,omitempty"` // 10^-9 CPUs
	CPUShares         int64            `json:"cpuShares,omitempty"`
	CPUPeriod         int64            `json:"cpuPeriod,omitempty"` // microseconds
	CPUQuota          int64            `json:"cpuQuota,omitempty"`  // microseconds
	CPURTPeriod       int64            `json:"cpuRTPeriod,omitempty"`
	CPURTRuntime      int64            `json:"cpuRTRuntime,omitempty"`
	CpusetCPUs        string           `json:"cpusetCPUs,omitempty"`
	CpusetMems        string           `json:"cpusetMems,omitempty"`
	PidsLimit         *int64           `json:"pidsLimit,omitempty"` // nil or <= 0: unlimited
	BlkioWeight       uint16           `json:"blkioWeight,omitempty"`
	BlkioWeightDevice []WeightDevice   `json:"blkioWeightDevice,omitempty"`
	ReadBps           []ThrottleDevice `json:"readBps,omitempty"`
	WriteBps          []ThrottleDevice `json:"writeBps,omitempty"`
	ReadIOps          []ThrottleDevice `json:"readIOps,omitempty"`
	WriteIOps         []ThrottleDevice `json:"writeIOps,omitempty"`
	CgroupParent      string           `json:"cgroupParent,omitempty"`
	Devices           []Device         `json:"devices,omitempty"`
	DeviceCgroupRules []string         `json:"deviceCgroupRules,omitempty"` // "c 42:* rmw"
	Ulimits           []Ulimit         `json:"ulimits,omitempty"`
	// Hugepages are limits by page size ("2MB"), in bytes.
	Hugepages map[string]uint64 `json:"hugepages,omitempty"`
	// Unified are files of cgroup v2 and what is written to them.
	Unified map[string]string `json:"unified,omitempty"`
}

// RestartPolicy tells what to do when a container ends.
type RestartPolicy struct {
	Name       string `json:"name"` // "" or no, always, on-failure, unless-stopped
	MaxRetries int    `json:"maxRetries,omitempty"`
}

// Healthcheck is a command that tells whether a container is healthy.
// Zero durations mean the default.
type Healthcheck struct {
	Test          []string      `json:"test,omitempty"` // {}: inherit, {NONE}, {CMD, ...}, {CMD-SHELL, ...}
	Interval      time.Duration `json:"interval,omitempty"`
	Timeout       time.Duration `json:"timeout,omitempty"`
	StartPeriod   time.Duration `json:"startPeriod,omitempty"`
	StartInterval time.Duration `json:"startInterval,omitempty"`
	Retries       int           `json:"retries,omitempty"`
}

// EndpointSettings asks for one network of a container.
type EndpointSettings struct {
	Network         string            `json:"network"` // name or id
	Aliases         []string          `json:"aliases,omitempty"`
	Links           []string          `json:"links,omitempty"`
	IPv4            netip.Addr        `json:"ipv4,omitzero"`
	IPv6            netip.Addr        `json:"ipv6,omitzero"`
	MAC             string            `json:"mac,omitempty"`
	DriverOpts      map[string]string `json:"driverOpts,omitempty"`
	GatewayPriority int               `json:"gatewayPriority,omitempty"`
}

// LogConfig chooses how output is kept.
type LogConfig struct {
	Driver  string            `json:"driver"` // json-file (default), none
	Options map[string]string `json:"options,omitempty"`
}

// Config is everything that a client asks of a container. It is kept as it was
// asked; what the engine made of it stands in Container.
type Config struct {
	Image      string   `json:"image"`
	Platform   string   `json:"platform,omitempty"` // os/arch[/variant]
	Hostname   string   `json:"hostname,omitempty"`
	Domainname string   `json:"domainname,omitempty"`
	User       string   `json:"user,omitempty"`
	GroupAdd   []string `json:"groupAdd,omitempty"`
	Env        []string `json:"env,omitempty"` // KEY=VALUE; "KEY" alone removes the image's
	Entrypoint []string `json:"entrypoint,omitempty"`
	// EntrypointSet tells a given empty entrypoint (which resets the image's) from none.
	EntrypointSet bool              `json:"entrypointSet,omitempty"`
	Cmd           []string          `json:"cmd,omitempty"`
	WorkingDir    string            `json:"workingDir,omitempty"`
	Labels        map[string]string `json:"labels,omitempty"`
	Annotations   map[string]string `json:"annotations,omitempty"`
	ExposedPorts  []string          `json:"exposedPorts,omitempty"` // "80/tcp"
	StopSignal    string            `json:"stopSignal,omitempty"`
	StopTimeout   *int              `json:"stopTimeout,omitempty"` // seconds; nil: 10; -1: no limit
	Healthcheck   *Healthcheck      `json:"healthcheck,omitempty"`
	Shell         []string          `json:"shell,omitempty"`

	TTY          bool    `json:"tty,omitempty"`
	OpenStdin    bool    `json:"openStdin,omitempty"`
	StdinOnce    bool    `json:"stdinOnce,omitempty"`
	AttachStdin  bool    `json:"attachStdin,omitempty"`
	AttachStdout bool    `json:"attachStdout,omitempty"`
	AttachStderr bool    `json:"attachStderr,omitempty"`
	ConsoleSize  [2]uint `json:"consoleSize,omitzero"` // rows, columns

	AutoRemove      bool          `json:"autoRemove,omitempty"`
	Restart         RestartPolicy `json:"restart,omitzero"`
	Log             LogConfig     `json:"log,omitzero"`
	ContainerIDFile string        `json:"containerIDFile,omitempty"`
	Runtime         string        `json:"runtime,omitempty"` // handler; "": hako's own
	Init            *bool         `json:"init,omitempty"`

	// Namespaces: "" (private, or Docker's default), "host", "none" (ipc, network),
	// "container:REF", "shareable" and "private" (ipc), or a network's name (network).
	NetworkMode  string `json:"networkMode,omitempty"`
	PidMode      string `json:"pidMode,omitempty"`
	IpcMode      string `json:"ipcMode,omitempty"`
	UTSMode      string `json:"utsMode,omitempty"`
	UsernsMode   string `json:"usernsMode,omitempty"`
	CgroupnsMode string `json:"cgroupnsMode,omitempty"`

	NetworkDisabled bool                  `json:"networkDisabled,omitempty"`
	Endpoints       []EndpointSettings    `json:"endpoints,omitempty"`
	Ports           []network.PortMapping `json:"ports,omitempty"`
	PublishAll      bool                  `json:"publishAll,omitempty"`
	MacAddress      string                `json:"macAddress,omitempty"`
	DNS             []netip.Addr          `json:"dns,omitempty"`
	DNSOptions      []string              `json:"dnsOptions,omitempty"`
	DNSSearch       []string              `json:"dnsSearch,omitempty"`
	ExtraHosts      []string              `json:"extraHosts,omitempty"` // name:address; host-gateway
	Links           []string              `json:"links,omitempty"`

	Privileged     bool              `json:"privileged,omitempty"`
	CapAdd         []string          `json:"capAdd,omitempty"`
	CapDrop        []string          `json:"capDrop,omitempty"`
	SecurityOpt    []string          `json:"securityOpt,omitempty"` // seccomp=JSON|unconfined, no-new-privileges, apparmor=, label=, systempaths=
	ReadonlyRootfs bool              `json:"readonlyRootfs,omitempty"`
	MaskedPaths    []string          `json:"maskedPaths"` // nil: the default; empty: none
	ReadonlyPaths  []string          `json:"readonlyPaths"`
	Sysctls        map[string]string `json:"sysctls,omitempty"`
	OOMScoreAdj    int               `json:"oomScoreAdj,omitempty"`
	ShmSize        int64             `json:"shmSize,omitempty"` // bytes; 0: 64 MiB
	Mounts         []Mount           `json:"mounts,omitempty"`
	VolumesFrom    []string          `json:"volumesFrom,omitempty"`
	StorageOpt     map[string]string `json:"storageOpt,omitempty"`
	Resources      Resources         `json:"resources,omitzero"`

	// Pod makes it a container of a pod; nil: a lone one.
	Pod *PodMember `json:"pod,omitempty"`
}

// Status of a container. See container_state.go for the machine.
type Status string

// States of a container, with Docker's names.
const (
	StatusCreated    Status = "created"
	StatusRunning    Status = "running"
	StatusPaused     Status = "paused"
	StatusRestarting Status = "restarting"
	StatusRemoving   Status = "removing"
	StatusExited     Status = "exited"
	StatusDead       Status = "dead"
)

// HealthResult is one run of a health check.
type HealthResult struct {
	Start    time.Time `json:"start"`
	End      time.Time `json:"end"`
	ExitCode int       `json:"exitCode"`
	Output   string    `json:"output"` // first 4096 bytes
}

// Health of a container that has a health check.
type Health struct {
	Status        string         `json:"status"` // starting, healthy, unhealthy
	FailingStreak int            `json:"failingStreak"`
	Log           []HealthResult `json:"log,omitempty"` // the last five
}

// State is what a container is doing.
type State struct {
	Status    Status `json:"status"`
	Pid       int    `json:"pid,omitempty"`
	ExitCode  int    `json:"exitCode"`
	OOMKilled bool   `json:"oomKilled,omitempty"`
	Error     string `json:"error,omitempty"` // why the last start failed
	// Lost tells that nobody saw the end: the machine was rebooted, or the exit could not be read.
	Lost       bool      `json:"lost,omitempty"`
	StartedAt  time.Time `json:"startedAt,omitzero"`
	FinishedAt time.Time `json:"finishedAt,omitzero"`
	Health     *Health   `json:"health,omitempty"`
}

// Container is one container as it is at one moment. It is a value: changing it changes nothing.
type Container struct {
	ID      string    `json:"id"`   // 64 hex digits
	Name    string    `json:"name"` // without slash
	Created time.Time `json:"created"`
	Config  Config    `json:"config"`

	ImageID   string `json:"imageID"`   // sha256:...
	ImageName string `json:"imageName"` // as given
	// Args, Env, User, WorkingDir, ... after the image's configuration was merged in.
	Path         string            `json:"path"`
	Args         []string          `json:"args"`
	Env          []string          `json:"env"`
	User         string            `json:"user"`
	WorkingDir   string            `json:"workingDir"`
	Hostname     string            `json:"hostname"`
	Labels       map[string]string `json:"labels"`
	ExposedPorts []string          `json:"exposedPorts,omitempty"`
	StopSignal   string            `json:"stopSignal"`
	Entrypoint   []string          `json:"entrypoint,omitempty"`
	Cmd          []string          `json:"cmd,omitempty"`
	Healthcheck  *Healthcheck      `json:"healthcheck,omitempty"`

	State        State              `json:"state"`
	RestartCount int                `json:"restartCount"`
	Mounts       []Mount            `json:"mounts,omitempty"` // with Resolved and volume names filled in
	Endpoints    []network.Endpoint `json:"endpoints,omitempty"`
	// Attached is what was asked for each network that the container is on, or will be
	// on when it runs: Config.Endpoints with later connects and disconnects. It is not nil.
	Attached     []EndpointSettings `json:"-"`
	SandboxKey   string             `json:"sandboxKey,omitempty"` // netns path
	ExecIDs      []string           `json:"execIDs,omitempty"`
	Snapshotter  string             `json:"snapshotter"`
	SnapshotKey  string             `json:"snapshotKey"`
	LogPath      string             `json:"logPath,omitempty"`
	HostnamePath string             `json:"hostnamePath,omitempty"`
	HostsPath    string             `json:"hostsPath,omitempty"`
	ResolvPath   string             `json:"resolvPath,omitempty"`
	// Adjustment is what plugins made of it; nil: nothing, or nobody was asked.
	Adjustment *Adjustment `json:"adjustment,omitempty"`
	// Guest tells that a client of containerd's API made it.
	Guest bool `json:"-"`
	// AppArmorProfile is what its processes are confined by; "": nothing, or what confines the daemon.
	AppArmorProfile string `json:"-"`
	SizeRw          *int64 `json:"-"` // only when asked for
	SizeRootFs      *int64 `json:"-"`
}

// Filters are Docker's: field → values. A container must match one value of each field.
type Filters map[string][]string

// ListOptions selects containers.
type ListOptions struct {
	All     bool // not only running ones
	Limit   int  // the newest; 0: all
	Size    bool
	Filters Filters
}

// StopOptions ends a container.
type StopOptions struct {
	Signal  string // "": the container's
	Timeout *int   // seconds; nil: the container's; -1: no limit
}

// RemoveOptions removes a container.
type RemoveOptions struct {
	Force   bool // kill it first
	Volumes bool // anonymous volumes too
}

// WaitCondition is what WaitContainer waits for.
type WaitCondition string

// Conditions of Docker's wait.
const (
	WaitNotRunning WaitCondition = "not-running"
	WaitNextExit   WaitCondition = "next-exit"
	WaitRemoved    WaitCondition = "removed"
)

// WaitResult is the end of a wait.
type WaitResult struct {
	ExitCode int
	Err      error
}

// LogOptions selects lines of a container's log.
type LogOptions struct {
	Stdout, Stderr bool
	Follow         bool
	Since, Until   time.Time // zero: no limit
	Tail           int       // -1: all
	Details        bool
}

// LogEntry is one line (with its newline, if it had one) or part of a long one.
type LogEntry struct {
	Stream  int // 1 stdout, 2 stderr
	Time    time.Time
	Line    []byte
	Partial bool
	Attrs   map[string]string
}

// AttachOptions connects to a container's streams.
type AttachOptions struct {
	Stdin, Stdout, Stderr bool
	Stream                bool // live output
	Logs                  bool // what was logged until now first
}

// ExecConfig asks for a process in a running container.
type ExecConfig struct {
	Container    string
	Cmd          []string
	User         string
	Env          []string
	WorkingDir   string
	Privileged   bool
	TTY          bool
	AttachStdin  bool
	AttachStdout bool
	AttachStderr bool
	ConsoleSize  [2]uint
	DetachKeys   string
}

// Exec is one exec as it is.
type Exec struct {
	ID          string
	ContainerID string
	Config      ExecConfig
	Running     bool
	Started     bool
	ExitCode    *int
	Pid         int
}

// Stats of a container at one moment, in the units of the kernel's files (bytes, nanoseconds).
type Stats struct {
	Read        time.Time
	CPUTotal    uint64 // ns
	CPUUser     uint64
	CPUKernel   uint64
	PerCPU      []uint64
	SystemCPU   uint64 // ns, of the host
	OnlineCPUs  int
	Periods     uint64
	Throttled   uint64
	ThrottledNS uint64
	MemUsage    uint64 // bytes
	MemMax      uint64 // high-water mark
	MemLimit    uint64
	MemFailcnt  uint64
	MemStats    map[string]uint64 // memory.stat
	Pids        uint64
	PidsLimit   uint64
	Networks    map[string]NetStats // by interface
	Blkio       []BlkioEntry        // service bytes and operations by device and op
}

// NetStats counts one interface.
type NetStats struct {
	RxBytes, RxPackets, RxErrors, RxDropped uint64
	TxBytes, TxPackets, TxErrors, TxDropped uint64
}

// BlkioEntry is one counter of a block device.
type BlkioEntry struct {
	Major, Minor uint64
	Op           string // Read, Write, ...
	Bytes        uint64
	Ops          uint64
}

// Change is one path that differs from the image. Kind: 0 modified, 1 added, 2 deleted (Docker's).
type Change struct {
	Path string
	Kind int
}

// PathStat describes a path in a container.
type PathStat struct {
	Name       string
	Size       int64
	Mode       uint32 // as Go's fs.FileMode
	Mtime      time.Time
	LinkTarget string
}

// Top is the process table of a container.
type Top struct {
	Titles    []string
	Processes [][]string
}

// Volume is a named piece of durable storage.
type Volume struct {
	Name       string            `json:"name"`
	Driver     string            `json:"driver"` // local
	Mountpoint string            `json:"mountpoint"`
	Options    map[string]string `json:"options,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	Created    time.Time         `json:"created"`
	Anonymous  bool              `json:"anonymous,omitempty"`
	RefCount   int               `json:"-"`
	Size       int64             `json:"-"` // -1: not measured
}

// Event tells that an object changed. Types and actions are Docker's.
type Event struct {
	Type       string // container, image, network, volume, daemon
	Action     string // create, start, die, ...; "exec_create: cmd"
	ID         string
	Attributes map[string]string
	Time       time.Time
}

// Pruned is what a prune removed.
type Pruned struct {
	IDs       []string
	Reclaimed int64 // bytes
}

// Attachment is a live connection to a container's or exec's streams. Frames end
// with io.EOF when output is drained.
type Attachment interface {
	// ReadFrame gives the next output, of stdout (1) or stderr (2; with a terminal all is 1). p is valid until the next call.
	ReadFrame() (stream int, p []byte, err error)
	io.Writer
	// CloseWrite ends the input.
	CloseWrite() error
	io.Closer
}

// Info describes the node.
type Info struct {
	ID                 string
	Name               string
	Root               string
	Snapshotter        string
	CgroupDriver       string
	CgroupVersion      int
	KernelVersion      string
	OperatingSystem    string
	OSVersion          string
	Architecture       string
	NCPU               int
	MemTotal           int64
	Containers         int
	Running            int
	Paused             int
	Stopped            int
	Images             int
	Runtimes           map[string]string // handler → binary; "hako": ""
	SecurityOptions    []string
	Warnings           []string
	LiveRestore        bool
	MemoryLimit        bool
	SwapLimit          bool
	CPUCfs             bool
	PidsLimit          bool
	CPUSet             bool
	IPv4Forwarding     bool
	Version            string
	Labels             []string
	InsecureRegistries []string
}

// PodFeatures is what pods can have on this node.
type PodFeatures struct {
	CgroupDriver      string // cgroupfs, systemd
	Root              string // of the daemon's durable files
	RecursiveReadOnly bool   // mount_setattr(2), Linux 5.12
	UserNamespaces    bool   // overlays of mapped layers, Linux 6.15
}

// PutOptions of PutArchive.
type PutOptions struct {
	NoOverwriteDirNonDir bool // refuse to replace a directory by a file and the reverse
	CopyUIDGID           bool // everything belongs to the container's user; otherwise the archive's owners are kept
}

// ImageSummary is an image in a list.
type ImageSummary struct {
	image.Image
	Containers int   // that use it
	SharedSize int64 // bytes shared with other images; -1: not measured
}

// ImageDetail is an image with its configuration.
type ImageDetail struct {
	image.Image
	Config dockerspec.DockerOCIImage
}

// RemovedImage is one step of an image's removal: exactly one field is set.
type RemovedImage struct {
	Untagged string // a name that was removed, in short form
	Deleted  string // an image id or layer digest
}

// ImageHistory is one step of an image's making, the newest first.
type ImageHistory struct {
	ID        string // image id of the newest; "<missing>" for others
	Created   time.Time
	CreatedBy string
	Comment   string
	Size      int64 // bytes
	Tags      []string
}

// DiskUsage is what the objects take on disk. Sizes in bytes.
type DiskUsage struct {
	LayersSize int64
	Images     []ImageSummary
	Containers []Container // with SizeRw and SizeRootFs
	Volumes    []Volume    // with Size and RefCount
}
