package engine

import (
	"net/netip"
	"sync"
	"time"
)

// NamespaceMode tells whose namespace something uses.
type NamespaceMode string

// Modes of namespaces: the pod's, the container's own, the host's, another container's.
const (
	NamespacePod       NamespaceMode = "pod"
	NamespaceContainer NamespaceMode = "container"
	NamespaceNode      NamespaceMode = "node"
	NamespaceTarget    NamespaceMode = "target"
)

// IDMap is one line of a user namespace's map.
type IDMap struct {
	Container uint32 `json:"container"`
	Host      uint32 `json:"host"`
	Size      uint32 `json:"size"`
}

// Userns asks for a user namespace of the pod.
type Userns struct {
	UIDs []IDMap `json:"uids"`
	GIDs []IDMap `json:"gids"`
}

// DNS is what a pod resolves with.
type DNS struct {
	Servers  []string `json:"servers,omitempty"`
	Searches []string `json:"searches,omitempty"`
	Options  []string `json:"options,omitempty"`
}

// SandboxConfig is everything that a client asks of a pod's sandbox. It is kept as it was
// asked. The four fields of its name are its identity.
type SandboxConfig struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
	UID       string `json:"uid"`
	Attempt   uint32 `json:"attempt,omitempty"`

	Hostname     string            `json:"hostname,omitempty"` // "": the host's
	LogDirectory string            `json:"logDirectory,omitempty"`
	DNS          *DNS              `json:"dns,omitempty"` // nil: as the host
	Ports        []PortMapping     `json:"ports,omitempty"`
	Labels       map[string]string `json:"labels,omitempty"`
	Annotations  map[string]string `json:"annotations,omitempty"`
	CgroupParent string            `json:"cgroupParent,omitempty"` // "": one of the engine's
	Sysctls      map[string]string `json:"sysctls,omitempty"`

	Network NamespaceMode `json:"network"` // pod, node
	PID     NamespaceMode `json:"pid"`     // pod, container, node
	IPC     NamespaceMode `json:"ipc"`     // pod, node
	Userns  *Userns       `json:"userns,omitempty"`

	Privileged bool       `json:"privileged,omitempty"` // containers in it may be
	Runtime    string     `json:"runtime,omitempty"`    // handler; "": hako's own
	Overhead   *Resources `json:"overhead,omitempty"`
	Resources  *Resources `json:"resources,omitempty"`
	SELinux    *SELinux   `json:"selinux,omitempty"` // of all containers that ask for nothing else
}

// Sandbox is a pod's sandbox as it is at one moment. It is a value.
type Sandbox struct {
	ID      string        `json:"id"`
	Created time.Time     `json:"created"`
	Config  SandboxConfig `json:"config"`

	State SandboxState `json:"-"`
	IPs   []netip.Addr `json:"-"` // the primary one first; none on the host's network
	NetNS string       `json:"-"` // path; "": the host's
	Pid   int          `json:"-"` // of the init, if the containers share a PID namespace
}

// PodMember is what a container of a pod is beyond a lone one. Config.Pod holds it.
type PodMember struct {
	Sandbox string `json:"sandbox"` // id
	Name    string `json:"name"`    // unique in the pod, with Attempt
	Attempt uint32 `json:"attempt,omitempty"`
	LogPath string `json:"logPath,omitempty"` // absolute; "": no log

	// The image as the client named it, before it asked for an id; handed back.
	UserImage        string            `json:"userImage,omitempty"`
	ImageAnnotations map[string]string `json:"imageAnnotations,omitempty"`

	RunAsUser     *int64  `json:"runAsUser,omitempty"`
	RunAsUserName string  `json:"runAsUserName,omitempty"` // goes before RunAsUser
	RunAsGroup    *int64  `json:"runAsGroup,omitempty"`
	Groups        []int64 `json:"groups,omitempty"`
	// StrictGroups leaves out the groups that the image's /etc/group gives to the user.
	StrictGroups bool `json:"strictGroups,omitempty"`

	PID       NamespaceMode `json:"pid"`                 // pod, container, node, target
	PIDTarget string        `json:"pidTarget,omitempty"` // id of a container

	AmbientCaps []string `json:"ambientCaps,omitempty"`
	CDIDevices  []string `json:"cdiDevices,omitempty"`
	// StopSignal is the one that the client asked for, Container.StopSignal the one in use.
	StopSignal string `json:"stopSignal,omitempty"`

	SELinux *SELinux `json:"selinux,omitempty"`

	// Restore is filled by the engine for a container that is made of a checkpoint.
	Restore *PodRestore `json:"restore,omitempty"`

	// User and the labels (SELinux; "" where that is off) are filled by the engine when the container is created.
	User         *PodUser `json:"user,omitempty"`
	ProcessLabel string   `json:"processLabel,omitempty"`
	FileLabel    string   `json:"fileLabel,omitempty"`
}

// PodContainer is a pod's container in a list.
type PodContainer struct {
	*PodContainerFace
	Status Status
}

// PodContainerFace is what a list shows of a pod's container and never changes: of one container all lists have the same one.
type PodContainerFace struct {
	ID, Sandbox, Name string
	Attempt           uint32
	Created           time.Time
	ImageID           string // sha256:...
	ImageName         string // as given
	// What the client named, as in PodMember.
	UserImage           string
	ImageAnnotations    map[string]string
	Labels, Annotations map[string]string

	encoding sync.Once
	encoded  []byte
	failed   error
}

// Encoded gives what encode makes of it, which is done once: for a door, whose clients ask for the list all the time.
func (f *PodContainerFace) Encoded(encode func(*PodContainerFace) ([]byte, error)) ([]byte, error) {
	f.encoding.Do(func() { f.encoded, f.failed = encode(f) })
	return f.encoded, f.failed
}

// Face is what a list shows of a pod's container.
func (v *Container) Face() *PodContainerFace {
	p := v.Config.Pod
	return &PodContainerFace{
		ID: v.ID, Sandbox: p.Sandbox, Name: p.Name, Attempt: p.Attempt, Created: v.Created, ImageID: v.ImageID, ImageName: v.ImageName,
		UserImage: p.UserImage, ImageAnnotations: p.ImageAnnotations, Labels: v.Config.Labels, Annotations: v.Config.Annotations,
	}
}

// PodUser is whom a container's process runs as.
type PodUser struct {
	UID    uint32   `json:"uid"`
	GID    uint32   `json:"gid"`
	Groups []uint32 `json:"groups,omitempty"` // the primary one first
	Home   string   `json:"home"`
}
