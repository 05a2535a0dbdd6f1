//go:build linux

// Package plan compiles an OCI configuration into the list of system calls that
// make a container.
//
// In flow a validated specification and facts about the host that somebody else
// probed; out flows a Plan: steps for the parent and the program of the new process,
// each with a sentence for people, a system call, its arguments, and what to do with
// its result. Compiling is pure: the same input gives the same plan, nothing of the
// host is looked at. Package launch executes plans.
package plan

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Slot is a register of the machine that runs a plan. Parent and child share the
// numbering, and descriptors keep their numbers across the clone, so what a step of
// the parent stored is there for the steps of the child. Storing into a slot that
// holds a descriptor closes that descriptor.
type Slot int16

// Slots that the launcher fills before the first step runs.
const (
	NoSlot     Slot = -1
	SlotSync   Slot = iota - 1 // the child's end of a SOCK_SEQPACKET pair to the parent
	SlotReport                 // where the child writes how exec went
	SlotStart                  // read until somebody starts the container
	SlotStdin
	SlotStdout
	SlotStderr
	SlotLoader  // sealed memory file with the loader, see package launch
	SlotPidfd   // of the process whose namespaces are joined (exec)
	SlotConsole // a reserved descriptor number for the terminal that is handed to the parent
	SlotSelf    // /proc of the host, O_PATH
	firstFree
)

var fixedSlots = [...]string{"sync", "report", "start", "stdin", "stdout", "stderr", "loader", "pidfd", "console", "hostproc"}

// MaxSlots bounds what one plan may use.
const MaxSlots = 4096

// Op is what the machine does at a step.
type Op uint8

const (
	Call     Op = iota // make the system call
	Check              // compare a word of a buffer: (buffer word at Off & Mask) == Want
	Poke               // store Args[1] as a 64 bit word into the buffer or list Args[0] at Off
	Set                // Fill gets Args[0]
	Branch             // go to OnFail if Args[0] is not zero
	Fail               // fail with Errno
	Load               // Fill gets the 32 bit word of the buffer Args[0] at Off
	CloseAll           // close every descriptor above 2+Off but those in the slots of Args; no Args: in any slot
)

var opNames = [...]string{"call", "check", "poke", "set", "branch", "fail", "load", "close_range"}

// ArgKind tells the kinds of arguments apart.
type ArgKind uint8

const (
	ArgInt     ArgKind = iota // Int
	ArgString                 // pointer to Str, NUL terminated
	ArgSlot                   // the value in Slot
	ArgBytes                  // pointer to a copy of Bytes
	ArgBuffer                 // pointer to the scratch buffer number Int
	ArgStrings                // pointer to a NULL terminated array of pointers to Strs
	ArgFilter                 // pointer to a struct sock_fprog of Filter
	ArgMessage                // pointer to a struct msghdr that passes the descriptor number in Slot
	ArgReceive                // pointer to a struct msghdr that takes a byte, and control messages into the scratch buffer number Int
)

// Words is a sentence that is only put together when somebody reads it.
type Words struct {
	format string
	args   []any
}

// Say makes Words.
func Say(format string, args ...any) *Words { return &Words{format, args} }

func (w *Words) String() string {
	if w == nil {
		return ""
	}
	if len(w.args) == 0 {
		return w.format
	}
	return fmt.Sprintf(w.format, w.args...)
}

// Arg is one argument of a system call. A plan has a thousand, and is made within a
// fraction of a millisecond, so that they are small.
type Arg struct {
	Kind ArgKind
	Slot Slot
	Int  uint64
	Str  string // also the text of an ArgInt or ArgBytes for people
	more *argMore
}

// argMore is what few arguments have.
type argMore struct {
	bytes  []byte
	strs   []string
	filter []unix.SockFilter
	text   func() string // makes Str for people, where it takes work
}

// Strings is an argument of the kind ArgStrings.
func Strings(v []string) Arg { return Arg{Kind: ArgStrings, Slot: NoSlot, more: &argMore{strs: v}} }

// Bytes gives the bytes of an ArgBytes.
func (a *Arg) Bytes() []byte {
	if a.more == nil {
		return nil
	}
	return a.more.bytes
}

// Strs gives the strings of an ArgStrings.
func (a *Arg) Strs() []string {
	if a.more == nil {
		return nil
	}
	return a.more.strs
}

// Filter gives the filter of an ArgFilter.
func (a *Arg) Filter() []unix.SockFilter {
	if a.more == nil {
		return nil
	}
	return a.more.filter
}

// text gives the text for people of an ArgInt or ArgBytes, "" if it has none.
func (a *Arg) text() string {
	if a.more != nil && a.more.text != nil {
		return a.more.text()
	}
	return a.Str
}

// Step is one instruction of the machine. Its fields are in the order of their sizes:
// see Arg.
type Step struct {
	Do   *Words  // names action and object; "%e" at the end of Text stands for the errno
	Nr   uintptr // number of the system call on this architecture
	Name string  // its name
	Args []Arg
	Text string // replaces "Do: errno" in the error; "%e" at its end stands for the errno

	Accept []unix.Errno // these failures go to OnFail instead of ending the program
	OnOK   int          // index of the step after success
	OnFail int          // index of the step after an accepted failure or a failed Check
	Expect int64        // if not -1: the result must be this, else the step failed with EPROTO
	Mask   uint64       // Check
	Want   uint64       // Check
	Errno  unix.Errno   // Check, Fail: the failure
	labels [2]label     // OnOK and OnFail before they are resolved
	Off    uint32       // Check, Poke, Load: byte offset
	Fill   Slot         // where a non-negative result goes, NoSlot if nowhere
	From   OriginRef    // what asked for it
	Op     Op
	Class  ErrClass // class of the failure
	Any    bool     // every failure goes to OnFail
	Wide   bool     // Check: compare 64 bits
}

// ErrClass says whose fault a failed step is.
type ErrClass uint8

const (
	ClassSystem  ErrClass = iota // the kernel or the host refused
	ClassInvalid                 // the configuration asks for something impossible
	ClassNoExec                  // the program of the container cannot be executed
)

type label int32

// Namespace is a namespace that the container gets.
type Namespace struct {
	Type string // as in the specification: pid, network, mount, ipc, uts, user, cgroup, time
	Flag uint64 // CLONE_NEW...
	Path string // "" for a new one
}

// Plan is everything that is needed to start one process in a container.
type Plan struct {
	Host    []Step // made by the parent before the clone
	Program []Step // made by the child
	Slots   []string
	Buffers int // scratch buffers of BufferSize bytes

	CloneFlags uint64 // namespace flags for the clone
	// Refork: a step clones once more, to be inside a joined PID namespace. LoaderForks:
	// the loader does, and then starts the session and takes the terminal.
	Refork, LoaderForks bool
	// Waits: with LoaderForks and without Hold, the loader says that it is there and waits
	// for the parent's answer, as for a start: the parent can only then write down, or set,
	// what takes the process's id.
	Waits bool

	// OwnNet: the program makes the network namespace, which is not in CloneFlags.
	OwnNet bool
	// Made are those steps of the program that a child which is made ahead has behind it: it leads
	// a session, has the network namespace with its loopback device up, and its id maps are
	// written before it begins.
	Made []Span

	// Console tells where the master of the terminal is: in a slot of the parent, or
	// sent over the sync socket by the child. Terminal is false if there is none.
	Terminal    bool
	ConsoleSlot Slot
	ConsoleSent bool

	// What the parent does while the child waits, in this order; each is zero if it
	// is not needed.
	IDMaps       bool // write the maps of the new user namespace
	NewTime      bool // a time namespace with offsets, made by the parent's thread
	OOMScoreAdj  *int
	HooksInSetup bool // run prestart, createRuntime and createContainer hooks
	// LimitsLate: the parent lets the child into its cgroup first and sets the limits then, while
	// the child goes on. The child waits for them before it becomes the container's process.
	LimitsLate bool

	// Hold: the loader says MsgReady, and waits for a start. What fails later goes to
	// SlotReport.
	Hold bool
	// Filter is loaded as the very last thing before the program of the container is
	// executed (with no_new_privs); empty if there is none or it is a step.
	Filter   Filter
	Preserve int // descriptors 3, 4... that are handed on
	Rlimits  []Rlimit
	// NeedsProc: SlotSelf is used.
	NeedsProc bool
	RootSlot  Slot // the root file system, a detached mount made by the parent

	// Overlays are mounted by the parent before its steps: old kernels take them in no
	// other way than mount(2).
	Overlays []Overlay

	// UserNamespaces are made by the parent before its steps.
	UserNamespaces []UserNamespace

	// Affinity is a mask of the CPUs on which the process is born; nil: any.
	Affinity []byte

	// Scheduler is a struct sched_attr that the parent sets with LoaderForks, because not
	// every policy survives the fork; nil: none. See Waits.
	Scheduler     []byte
	SchedulerName string // its policy

	// CopyUps are directories of the image that the parent copies into detached
	// tmpfs mounts before the clone.
	CopyUps []CopyUp

	Warnings []string
	origins  []Origin
	at       OriginRef // of the steps that are being made
}

// Span is the steps from From on, up to To.
type Span struct{ From, To int }

// Overlay asks for an overlay, as a detached mount in Slot. Names and options are in the
// form of mount(2).
type Overlay struct {
	Slot        Slot
	Lower       []string // the topmost first
	Upper, Work string
	Options     []string
	Attr        uint64 // MOUNT_ATTR_
}

// CopyUp asks to fill the tmpfs in Slot with what the image has at Dest.
type CopyUp struct {
	Dest string
	Slot Slot
}

// Rlimit is a resource limit that the parent raises if the child could not.
type Rlimit struct {
	Resource   int
	Soft, Hard uint64
}

// BufferSize is the size of a scratch buffer in bytes: a struct stat or statfs fits.
const BufferSize = 256

// Words that the child sends over the sync socket instead of a step index.
const (
	MsgMaps     = -1  // ready for the maps of the user namespace
	MsgMounted  = -2  // mounts are made, hooks may run
	MsgReady    = -3  // everything is done but start and exec
	MsgPid      = -4  // the second word is the pid of the process (after a second clone)
	MsgExec     = -5  // exec failed: errno
	MsgConsole  = -6  // the terminal comes with it
	MsgFilter   = -7  // loading the seccomp filter failed: errno
	MsgClone    = -8  // the second clone failed: errno
	MsgHold     = -9  // waiting for start failed: errno
	MsgListener = -11 // the second word is the number of a seccomp listener
	MsgSession  = -10 // starting the session or taking the terminal failed: errno
)
