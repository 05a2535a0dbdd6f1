//go:build linux && (amd64 || arm64)

// Package early starts, kills and deletes usual containers without the Go runtime, whose start
// and end are four fifths of what such a command takes; and begins the creation of usual ones,
// so that their first process makes namespaces while the Go runtime starts.
//
// In flow the arguments, environment and nothing else of a process that has just begun; out
// flows an exit with 0, what was begun (Begun), or nothing: whatever is not quite usual (a flag, a hook, a frozen or
// unknown container, an error) is left to the program that follows, which begins again. So
// there is one place that knows what an error is called. Nothing is changed before it is
// certain that the command can be done, but for delete, of which any part may be done twice, and
// create, which is taken back when it fails later (Begin.Discard).
//
// There is no heap, no goroutine and no panic here: code of this package neither allocates
// nor fails a check of bounds. TestNoHeap looks after the first.
package early

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Names in a container's directory.
const (
	StateFile  = "state.json"
	ConfigFile = "config.json"
	StartFifo  = "exec.fifo"
	ReportFifo = "report.fifo"
	NotifyDir  = ":notify" // behind that of the directory
)

// Failure is what a started container's loader has said instead of executing the program,
// with its container; zero if it has not.
var Failure struct {
	ID    string
	Word  int32
	Errno unix.Errno
}

// Limits in milliseconds: how long delete waits for the end of what it has killed, and for a
// cgroup that is busy.
const (
	killLimit = 10000
	busyLimit = 3000
)

// Run does the command whose argc, argv and environment begin at stack, and exits. If it
// returns the command is still to be done.
func Run(stack *uintptr) {
	var c command
	switch {
	case !c.parse(stack):
	case c.verb == "create" || c.verb == "run":
		c.begin(&Begun)
	case c.do():
		call(unix.SYS_EXIT_GROUP, 0, 0, 0, 0)
	}
}

type command struct {
	verb, root, id, log string
	bundle              string
	signal              uintptr
	force               bool

	dir   int // the container's, locked, or -1
	state state
}

// do tells whether the command is done.
func (c *command) do() (done bool) {
	c.dir = -1
	if e := call(unix.SYS_GETEUID, 0, 0, 0, 0); e != 0 || !c.open() {
		return false
	}
	if c.verb != "kill" && !c.lock() || !c.read() || !c.touchLog() {
		closeFD(c.dir)
		return false
	}
	switch c.verb {
	case "start":
		done = c.start()
	case "kill":
		done = c.kill()
	case "delete":
		done = c.delete()
	}
	closeFD(c.dir)
	return done
}

func (c *command) open() bool {
	var p path
	if !p.set(c.root, "/", c.id) {
		return false
	}
	c.dir = int(int32(call(unix.SYS_OPENAT, here, p.ptr(), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)))
	return c.dir >= 0
}

// lock is oci.Container.lock.
func (c *command) lock() bool {
	for {
		r := call(unix.SYS_FLOCK, uintptr(c.dir), unix.LOCK_EX, 0, 0)
		if r == 0 {
			break
		}
		if r != errno(unix.EINTR) {
			return false
		}
	}
	// Removed and made again while we waited?
	var p path
	return p.set(c.root, "/", c.id) && p.is(c.dir)
}

// touchLog makes the file for messages, as opening it does.
func (c *command) touchLog() bool {
	if c.log == "" {
		return true
	}
	var p path
	if !p.set(c.log) {
		return false
	}
	fd := int(int32(call(unix.SYS_OPENAT, here, p.ptr(), unix.O_CREAT|unix.O_WRONLY|unix.O_APPEND|unix.O_CLOEXEC, 0o644)))
	closeFD(fd)
	return fd >= 0
}

func (c *command) start() bool {
	if !c.alive() || !c.thawed() {
		return false
	}
	report := openAt(c.dir, ReportFifo, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC)
	start := openAt(c.dir, StartFifo, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC)
	one := byte(1)
	if report < 0 || start < 0 || call(unix.SYS_WRITE, uintptr(start), uintptr(unsafe.Pointer(&one)), 1, 0) != 1 {
		closeFD(report)
		closeFD(start)
		return false
	}
	// From here on it is started, well or ill.
	word := [2]int32{}
	for {
		wait(report, 1000)
		r := call(unix.SYS_READ, uintptr(report), uintptr(unsafe.Pointer(&word)), 8, 0)
		if r != errno(unix.EAGAIN) && r != errno(unix.EINTR) {
			if int(r) < 0 {
				word = [2]int32{-1, -int32(r)}
			}
			break
		}
	}
	closeFD(report)
	closeFD(start)
	removeAt(c.dir, ReportFifo)
	if r := removeAt(c.dir, StartFifo); r != 0 && word[0] == 0 {
		word = [2]int32{-1, -int32(r)}
	}
	if word[0] != 0 {
		Failure.ID, Failure.Word, Failure.Errno = c.id, word[0], unix.Errno(word[1])
		return false
	}
	return true
}

func (c *command) kill() bool {
	fd := c.process()
	done := fd >= 0 && c.thawed() && call(unix.SYS_PIDFD_SEND_SIGNAL, uintptr(fd), c.signal, 0, 0) == 0
	closeFD(fd)
	return done
}

// process opens a pidfd of the first process, or gives -1 if that has ended.
func (c *command) process() int {
	fd := int(int32(call(unix.SYS_PIDFD_OPEN, uintptr(c.state.pid), 0, 0, 0)))
	if fd >= 0 && !c.alive() {
		closeFD(fd)
		return -1
	}
	return fd
}

func (c *command) delete() bool {
	var p path
	if !p.set(c.root, "/", c.id, NotifyDir) || p.exists() {
		return false
	}
	if fd := c.process(); fd >= 0 {
		may := (c.force || removable(c.dir)) && c.thawed() && call(unix.SYS_PIDFD_SEND_SIGNAL, uintptr(fd), uintptr(unix.SIGKILL), 0, 0) == 0
		ended := may && wait(fd, killLimit)
		closeFD(fd)
		if !ended {
			return false
		}
	}
	for i := range c.state.cgroups {
		dir := c.state.cgroups[i].dir
		if dir == "" {
			break
		}
		if !p.set(dir) || !p.removeCgroup() {
			return false
		}
	}
	removeAt(c.dir, StateFile)
	removeAt(c.dir, StartFifo)
	removeAt(c.dir, ReportFifo)
	removeAt(c.dir, ConfigFile)
	return p.set(c.root, "/", c.id) && call(unix.SYS_UNLINKAT, here, p.ptr(), unix.AT_REMOVEDIR, 0) == 0
}

// removeCgroup removes a directory. That of a cgroup is busy for a moment after the end of its
// last process, and for good where there is another cgroup in it.
func (p *path) removeCgroup() bool {
	for pause, waited := int64(1), int64(0); ; pause = min(2*pause, 50) {
		r := call(unix.SYS_UNLINKAT, here, p.ptr(), unix.AT_REMOVEDIR, 0)
		if r == 0 || r == errno(unix.ENOENT) {
			return true
		}
		var st unix.Statx_t
		if r != errno(unix.EBUSY) || !statx(here, p.ptr(), 0, &st) || st.Nlink != 2 || waited > busyLimit {
			return false
		}
		wait(-1, pause)
		waited += pause
	}
}

// removable: the container waits for its start.
func removable(dir int) bool {
	fd := openAt(dir, StartFifo, unix.O_PATH|unix.O_CLOEXEC)
	closeFD(fd)
	return fd >= 0
}
