//go:build linux

package plan

import (
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Facts is what compiling needs to know of the host. It is data: probing fills it,
// tests write it down.
type Facts struct {
	// Rootless: the runtime has no privileges on the host, so that the child does all
	// mounts itself, inside its user namespace.
	Rootless bool `json:"rootless"`
	AppArmor bool `json:"apparmor"`
	SELinux  bool `json:"selinux"`
	// LayerByLayer: overlay takes its layers one by one (Linux 6.7). Only looked at where
	// it matters, see LongOptions.
	LayerByLayer bool `json:"layerByLayer"`
	// ProcOfOthers: procfs of a PID namespace can be mounted from outside (Linux 6.17). Only
	// looked at where a PID namespace is joined.
	ProcOfOthers bool `json:"procOfOthers"`
	LastCap      int  `json:"lastCap"` // highest capability that the kernel knows
	// Lacks names the capabilities that the runtime has not got, so that it cannot give
	// them, but in a user namespace of the container.
	Lacks []string `json:"lacks,omitempty"`
	// Sources describes the sources of bind mounts by their absolute path.
	Sources map[string]Source `json:"sources,omitempty"`
	// Ignored are the signals which the runtime's process ignores.
	Ignored []int       `json:"ignoredSignals,omitempty"`
	Cgroup  CgroupFacts `json:"cgroup"`
	// Joined lists the types of namespaces of the target process that differ from the
	// runtime's own (exec).
	Joined []string `json:"joined,omitempty"`
	// Kernel is the release, "6.1.0-13-amd64". Only explanations look at it.
	Kernel string `json:"kernel,omitempty"`
}

// Source is what a path of the host is.
type Source struct {
	Exists bool `json:"exists"`
	Dir    bool `json:"dir"`
	Procfs bool `json:"procfs"` // on a proc file system
	// ParentOnly: the path means something else to the child, because it is the root
	// itself, which the child has covered, or leads through a process in procfs.
	ParentOnly bool `json:"parentOnly,omitempty"`
}

// CgroupFacts tells how the container sees its cgroups.
type CgroupFacts struct {
	V2          bool        `json:"v2"` // one unified hierarchy
	Hierarchies []Hierarchy `json:"hierarchies"`
}

// Hierarchy is one mounted cgroup hierarchy.
type Hierarchy struct {
	Name       string   `json:"name"`              // of the directory below /sys/fs/cgroup
	Mountpoint string   `json:"mountpoint"`        // on the host
	Dir        string   `json:"dir,omitempty"`     // the container's directory on the host
	Options    []string `json:"options,omitempty"` // mount options that select it (v1)
	V2         bool     `json:"v2"`
}

// Options is what the caller of the runtime asks for beside the configuration.
type Options struct {
	ID      string
	Bundle  string // absolute; relative sources are looked up here
	Root    []Mount
	NoPivot bool
	// NoNewKeyring keeps the caller's session keyring.
	NoNewKeyring bool
	// Hold makes the process wait for a start after it has been created.
	Hold     bool
	Preserve int
	// Doors names the hierarchies whose cgroup the child enters itself, by writing 0 into
	// a file that the launcher has opened.
	Doors []string
	// LateDoors: the launcher opens these files only after the clone, and hands them over with
	// the word that the child waits for before it enters.
	LateDoors bool
	// Filter is the compiled seccomp profile.
	Filter Filter
	Hooks  bool // prestart, createRuntime or createContainer hooks run in between
}

// Filter is a compiled seccomp profile.
type Filter struct {
	Program []unix.SockFilter
	Flags   uint32
	Notify  bool // a listener is to be handed to the parent
}

// Mount is a mount as in the specification.
type Mount struct {
	Type, Source string
	Options      []string
	// Maps of the ids, see option idmap; nil: those of the container's user namespace.
	UIDMappings, GIDMappings []specs.LinuxIDMapping
}
