//go:build linux

package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/rawfile"
)

// Cgroup is one container's directory in every hierarchy of the machine. It is not
// safe for concurrent use.
type Cgroup struct {
	v1 map[string]string // controller ("memory", "name=systemd") to directory
	v2 string            // empty without a v2 hierarchy
	// fresh is set between New and the first Apply: there is nothing that a failed
	// Apply would have to restore, because the caller deletes the whole cgroup.
	fresh bool

	path   string // of New
	later  []laterDir
	made   []string // directories, parents first
	failed bool     // to complete it
}

// MissingError says that a controller which the resources ask for is not available
// to the cgroup. It is an errdefs.ErrFailedPrecondition.
type MissingError struct {
	Controller string // "memory"
	Asked      string // the field of the OCI specification, "memory.limit"
}

func (e *MissingError) Error() string {
	return fmt.Sprintf("%s needs the cgroup controller %q, which this machine does not have mounted or not enabled", e.Asked, e.Controller)
}

// Unwrap gives the error's class.
func (e *MissingError) Unwrap() error { return errdefs.ErrFailedPrecondition }

// New makes the cgroup at path, the cgroupsPath of the OCI specification, in all
// hierarchies. An absolute path counts from the top of what is mounted. A relative
// one counts from the cgroup of the calling process; on a v2 machine from the parent of
// that, because a v2 cgroup with processes cannot hand controllers down.
//
// A directory that exists already is taken if no process is in it. When New fails it
// has removed what it made.
func (l Layout) New(path string) (*Cgroup, error) {
	c, err := l.Begin(path)
	if err != nil {
		return nil, err
	}
	if err := c.Complete(); err != nil {
		return nil, errors.Join(err, c.Delete())
	}
	return c, nil
}

// Begin is New up to what a process needs to be born in: v2, and those hierarchies that can be
// done without. Complete makes the others, which are in Paths already.
func (l Layout) Begin(path string) (*Cgroup, error) { return l.BeginWith(path, "") }

// BeginWith is Begin where the caller has made the directory v2 already, see V2Dir; it may have a
// process.
func (l Layout) BeginWith(path, v2 string) (_ *Cgroup, err error) {
	if path == "" || strings.ContainsAny(path, "\x00\n") {
		return nil, fmt.Errorf("cgroup path %q: %w", path, errdefs.ErrInvalidArgument)
	}
	c := &Cgroup{v1: map[string]string{}, fresh: true, path: path}
	defer func() {
		if err != nil {
			removeMade(c.made)
		}
	}()
	for _, h := range l.Hierarchies {
		dir, err := l.dir(h, path)
		if err != nil {
			return nil, fmt.Errorf("make cgroup %s: %w", path, err)
		}
		named := !h.V2 && strings.HasPrefix(h.Controllers[0], "name=")
		if !h.V2 && !named {
			c.later = append(c.later, laterDir{h: h, dir: dir})
			for _, name := range h.Controllers {
				c.v1[name] = dir
			}
			continue
		}
		fresh, err := true, error(nil)
		if h.V2 && dir == v2 {
			c.made = append(c.made, dir)
		} else {
			fresh, err = h.make(dir, &c.made)
		}
		if err != nil {
			// Where no controller depends on it, a v2 hierarchy (or one of systemd's)
			// that is read-only or belongs to somebody else can be done without.
			spare := named || len(h.Controllers) == 0
			if spare && l.Mode != V2 && (errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS)) {
				continue
			}
			return nil, fmt.Errorf("make cgroup %s: %w", path, err)
		}
		c.fresh = c.fresh && fresh
		if h.V2 {
			// In hybrid mode a controller is enabled when it is first asked for: one that
			// is in use on v2 cannot be mounted as v1 any more, which the administrator
			// may want to do.
			if c.v2 = dir; l.Mode == V2 {
				if err := enable(dir, delegated...); err != nil {
					return nil, fmt.Errorf("make cgroup %s: %w", path, err)
				}
			}
			continue
		}
		for _, name := range h.Controllers {
			c.v1[name] = dir
		}
	}
	return c, nil
}

// V2Dir gives the v2 directory that Begin makes for path, "" on a machine without v2.
func (l Layout) V2Dir(path string) string {
	for _, h := range l.Hierarchies {
		if h.V2 {
			dir, _ := l.dir(h, path)
			return dir
		}
	}
	return ""
}

// Later gives the directories that Complete makes.
func (c *Cgroup) Later() []string {
	dirs := make([]string, len(c.later))
	for i, l := range c.later {
		dirs[i] = l.dir
	}
	return dirs
}

// DoorFiles gives the files of Doors that a process writes to.
func (c *Cgroup) DoorFiles() []string {
	var files []string
	for _, dir := range c.dirs() {
		if dir != c.v2 {
			files = append(files, dir+"/tasks")
		}
	}
	return files
}

// Adopt tells which of Later the caller has made. Complete does the rest.
func (c *Cgroup) Adopt(made []bool) {
	for i := range c.later {
		if c.later[i].made = made[i]; made[i] {
			c.made = append(c.made, c.later[i].dir)
		}
	}
}

// laterDir is a directory that Complete is to make.
type laterDir struct {
	h    Hierarchy
	dir  string
	made bool
}

// Complete makes what Begin has left out. If it fails the cgroup is good for nothing but
// Delete, which then removes what the two have made, and nothing else.
func (c *Cgroup) Complete() error {
	for i, l := range c.later {
		var fresh bool
		var err error
		if l.made {
			fresh, err = true, l.h.inheritIn(l.dir, c.made)
		} else {
			fresh, err = l.h.make(l.dir, &c.made)
		}
		if err != nil {
			for _, l := range c.later[i:] {
				for _, name := range l.h.Controllers {
					delete(c.v1, name)
				}
			}
			maps.DeleteFunc(c.v1, func(_, dir string) bool { return !slices.Contains(c.made, dir) })
			if !slices.Contains(c.made, c.v2) {
				c.v2 = ""
			}
			c.failed = true
			return fmt.Errorf("make cgroup %s: %w", c.path, err)
		}
		c.fresh = c.fresh && fresh
	}
	c.later = nil
	return nil
}

// removeMade removes directories, the last made first.
func removeMade(made []string) {
	for _, dir := range slices.Backward(made) {
		_ = unix.Rmdir(dir)
	}
}

// Birthplace opens the v2 directory for a child to be born in (CLONE_INTO_CGROUP): -1 on a
// machine without v2. The caller closes it.
func (c *Cgroup) Birthplace() (int, error) {
	if c.v2 == "" {
		return -1, nil
	}
	fd, err := open(c.v2, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return -1, fmt.Errorf("open cgroup for entering: %w", err)
	}
	return fd, nil
}

// dir resolves a cgroupsPath in a hierarchy.
func (l Layout) dir(h Hierarchy, path string) (string, error) {
	clean := filepath.Clean("/" + path)
	if clean == "/" {
		return "", fmt.Errorf("the top of the hierarchy cannot be a container's: %w", errdefs.ErrInvalidArgument)
	}
	if filepath.IsAbs(path) {
		return h.Mount + clean, nil
	}
	own := h.Own
	if own == "" {
		return "", fmt.Errorf("this process is in no cgroup below %s, so a relative path has no place: %w", h.Mount, errdefs.ErrFailedPrecondition)
	}
	if l.Mode == V2 {
		own = filepath.Dir(own)
	}
	return filepath.Join(h.Mount, own, clean), nil
}

// make makes dir with its parents and prepares them for processes. fresh tells that
// dir was not there before. What it makes is added to made, parents first.
func (h Hierarchy) make(dir string, made *[]string) (fresh bool, err error) {
	var missing []string // leaf first
	for d := dir; ; d = filepath.Dir(d) {
		err := unix.Mkdir(d, 0o755)
		if err == nil {
			*made = append(*made, d)
			fresh = fresh || d == dir
			break
		}
		if errors.Is(err, unix.EEXIST) {
			break
		}
		if !errors.Is(err, unix.ENOENT) || len(d) <= len(h.Mount)+1 {
			return false, &fs.PathError{Op: "mkdir", Path: d, Err: err}
		}
		missing = append(missing, d)
	}
	for _, d := range slices.Backward(missing) {
		switch err := unix.Mkdir(d, 0o755); {
		case err == nil:
			*made = append(*made, d)
			fresh = fresh || d == dir
		case !errors.Is(err, unix.EEXIST): // somebody else made it meanwhile
			return false, &fs.PathError{Op: "mkdir", Path: d, Err: err}
		}
	}
	if !fresh {
		procs, err := readFile(dir + "/cgroup.procs")
		if err != nil {
			return false, err
		}
		if len(bytes.TrimSpace(procs)) > 0 {
			return false, fmt.Errorf("%s exists and holds processes: %w", dir, errdefs.ErrAlreadyExists)
		}
	}
	return fresh, h.inheritIn(dir, *made)
}

// inheritIn is inheritCpuset in the hierarchy that needs it.
func (h Hierarchy) inheritIn(dir string, made []string) error {
	if h.V2 || !slices.Contains(h.Controllers, "cpuset") {
		return nil
	}
	return h.inheritCpuset(dir, made)
}

// inheritCpuset gives dir, and those of its parents that lack it, the CPUs and memory
// nodes of the directory above: an empty v1 cpuset takes no process. Those that have just
// been made are not asked.
func (h Hierarchy) inheritCpuset(dir string, made []string) error {
	for _, file := range []string{"/cpuset.cpus", "/cpuset.mems"} {
		var empty []string
		value := ""
		for d := dir; len(d) >= len(h.Mount); d = filepath.Dir(d) {
			if !slices.Contains(made, d) {
				var err error
				if value, err = readString(d + file); err != nil {
					return err
				}
				if value != "" {
					break
				}
			}
			empty = append(empty, d)
		}
		if value == "" {
			return fmt.Errorf("no cgroup above %s has anything in %s: %w", dir, file[1:], errdefs.ErrFailedPrecondition)
		}
		for _, d := range slices.Backward(empty) {
			if err := writeFile(d+file, value); err != nil {
				return err
			}
		}
	}
	return nil
}

// delegated are the v2 controllers that containers get. Others ("misc", "dmem") stay
// where the administrator put them.
var delegated = []string{"cpu", "cpuset", "io", "memory", "pids", "hugetlb", "rdma"}

// enable hands the controllers down to a v2 cgroup, from the top of the mount. One that
// cannot be is no error here: it may not be asked for. Apply refuses it by name if it is.
func enable(dir string, controllers ...string) error {
	var above []string // the nearest first
	for d := filepath.Dir(dir); exists(d + "/cgroup.subtree_control"); d = filepath.Dir(d) {
		above = append(above, d)
	}
	for _, d := range slices.Backward(above) {
		available, err := readString(d + "/cgroup.controllers")
		if err != nil {
			return err
		}
		if available == "" {
			return nil
		}
		enabled, err := readString(d + "/cgroup.subtree_control")
		if err != nil {
			return err
		}
		have := strings.Fields(enabled)
		var want []string
		for _, name := range strings.Fields(available) {
			if slices.Contains(controllers, name) && !slices.Contains(have, name) {
				want = append(want, "+"+name)
			}
		}
		if len(want) > 0 && writeFile(d+"/cgroup.subtree_control", strings.Join(want, " ")) != nil {
			// All or nothing is the kernel's rule for one write; one of them may be
			// held by a v1 hierarchy or refused for realtime processes.
			for _, w := range want {
				_ = writeFile(d+"/cgroup.subtree_control", w)
			}
		}
	}
	return nil
}

// Load gives the cgroup whose Paths were kept. The directories need not exist.
func (l Layout) Load(paths map[string]string) *Cgroup {
	c := &Cgroup{v1: maps.Clone(paths), v2: paths[""]}
	if c.v1 == nil {
		c.v1 = map[string]string{}
	}
	delete(c.v1, "")
	return c
}

// Paths gives the directory in each hierarchy: by controller for v1, by "" for v2.
func (c *Cgroup) Paths() map[string]string {
	m := maps.Clone(c.v1)
	if c.v2 != "" {
		m[""] = c.v2
	}
	return m
}

// dirs gives each directory once, v1 first, in a stable order.
func (c *Cgroup) dirs() []string {
	dirs := slices.Collect(maps.Values(c.v1))
	slices.Sort(dirs)
	dirs = slices.Compact(dirs)
	if c.v2 != "" {
		dirs = append(dirs, c.v2)
	}
	return dirs
}

// Exists tells whether any of the directories is there.
func (c *Cgroup) Exists() bool { return slices.ContainsFunc(c.dirs(), exists) }

// Add moves the process with all its threads into the cgroup, in all hierarchies.
//
// Each write waits for the whole machine's forks and exits to come to a rest
// (cgroup_threadgroup_rwsem). A single-threaded process that is just being made
// enters for next to nothing by [Cgroup.Doors] instead.
func (c *Cgroup) Add(pid int) error {
	if pid < 0 {
		return fmt.Errorf("add process %d to a cgroup: %w", pid, errdefs.ErrInvalidArgument)
	}
	text := strconv.Itoa(pid)
	for _, dir := range c.dirs() {
		if err := writeFile(dir+"/cgroup.procs", text); err != nil {
			switch {
			case errors.Is(err, unix.ESRCH):
				err = classed(err, errdefs.ErrNotFound)
			case gone(err):
				err = classed(fmt.Errorf("cgroup is gone: %w", err), errdefs.ErrNotFound)
			}
			return fmt.Errorf("add process %d: %w", pid, err)
		}
	}
	return nil
}

// Doors are the open ways into a cgroup. A child writes "0" into those of v1, and is
// put into v2 by clone3(2) (CLONE_INTO_CGROUP).
type Doors struct {
	V1 []Door
	V2 int // the directory, O_PATH; -1 on a machine without v2
}

// Door is the file "tasks" of one v1 directory, open for writing. A single-threaded
// process that writes "0" enters by itself, which spares the machine-wide lock that
// "cgroup.procs" takes.
type Door struct {
	Dir string
	FD  int
}

// FDs gives the descriptors of the v1 doors.
func (d *Doors) FDs() []int {
	fds := make([]int, len(d.V1))
	for i, v := range d.V1 {
		fds[i] = v.FD
	}
	return fds
}

// Close closes all of them.
func (d *Doors) Close() { rawfile.CloseAll(append(d.FDs(), d.V2)...) }

// Doors opens them. The caller closes them.
func (c *Cgroup) Doors() (*Doors, error) {
	dirs := c.dirs()
	d := &Doors{V1: make([]Door, 0, len(dirs)), V2: -1}
	for _, dir := range dirs {
		name, flags := dir+"/tasks", unix.O_WRONLY
		if dir == c.v2 {
			name, flags = dir, unix.O_PATH|unix.O_DIRECTORY
		}
		fd, err := open(name, flags)
		if gone(err) {
			err = classed(err, errdefs.ErrNotFound)
		}
		if err != nil {
			d.Close()
			return nil, fmt.Errorf("open cgroup for entering: %w", err)
		}
		if dir == c.v2 {
			d.V2 = fd
			continue
		}
		d.V1 = append(d.V1, Door{dir, fd})
	}
	return d, nil
}

// trees gives the directories whose union holds all processes: in hybrid mode a
// process may have been moved in one hierarchy only.
func (c *Cgroup) trees() []string {
	var t []string
	for _, name := range []string{"pids", "freezer", "devices", "memory", "cpu", "name=systemd"} {
		if dir, ok := c.v1[name]; ok {
			t = append(t, dir)
			break
		}
	}
	if c.v2 != "" {
		t = append(t, c.v2)
	}
	if len(t) == 0 {
		t = c.dirs()
	}
	return t
}

// Procs lists the processes in the cgroup itself, by ascending pid as this process
// sees them. A cgroup that is gone has none.
func (c *Cgroup) Procs() ([]int, error) { return c.procs(false) }

// AllProcs lists the processes in the cgroup and all cgroups below it.
func (c *Cgroup) AllProcs() ([]int, error) { return c.procs(true) }

func (c *Cgroup) procs(below bool) ([]int, error) {
	var pids []int
	for _, dir := range c.trees() {
		var err error
		if below {
			err = walk(dir, 0, func(d string) (e error) { pids, e = appendProcs(pids, d); return e })
		} else {
			pids, err = appendProcs(pids, dir)
		}
		if err != nil {
			return nil, fmt.Errorf("list processes of cgroup: %w", err)
		}
	}
	slices.Sort(pids)
	return slices.Compact(pids), nil
}

func appendProcs(pids []int, dir string) ([]int, error) {
	b, err := readFile(dir + "/cgroup.procs")
	if gone(err) {
		return pids, nil
	}
	if errors.Is(err, unix.EOPNOTSUPP) { // a threaded v2 cgroup: its domain lists them
		return pids, nil
	}
	if err != nil {
		return pids, err
	}
	return parsePids(pids, b), nil
}

// parsePids adds the numbers of a cgroup.procs file. 0 stands for a process that is
// outside of our PID namespace, and cannot be used.
func parsePids(pids []int, b []byte) []int {
	for line := range bytes.FieldsSeq(b) {
		if n, err := strconv.Atoi(string(line)); err == nil && n > 0 {
			pids = append(pids, n)
		}
	}
	return pids
}

// maxDepth bounds recursion into the cgroups that a container makes below its own. No
// path is longer.
const maxDepth = unix.PathMax / 2

// walk calls visit for dir and then for all directories below it.
func walk(dir string, depth int, visit func(string) error) error {
	if err := visit(dir); err != nil {
		return err
	}
	if depth >= maxDepth {
		return fmt.Errorf("%s: more than %d levels: %w", dir, maxDepth, errdefs.ErrOutOfRange)
	}
	names, err := subdirs(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := walk(dir+"/"+name, depth+1, visit); err != nil {
			return err
		}
	}
	return nil
}

// subdirs lists the directories in dir. A dir that is gone has none.
func subdirs(dir string) ([]string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		if gone(err) {
			return nil, nil
		}
		return nil, &fs.PathError{Op: "lstat", Path: dir, Err: err}
	}
	if st.Nlink == 2 { // the cgroup file systems count subdirectories here
		return nil, nil
	}
	fd, err := open(dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if gone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), dir)
	defer f.Close()
	entries, err := f.ReadDir(-1)
	if err != nil && !gone(err) {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// deleteFor bounds how long Delete waits for exiting processes to leave.
const deleteFor = 3 * time.Second

// Delete removes the cgroup, and those below it, in all hierarchies. It waits a little
// for processes that are exiting; if some stay, the error is
// errdefs.ErrFailedPrecondition and names them. What is gone already is no error. The
// directories above are left, even if New made them: other containers may be about
// to use them.
func (c *Cgroup) Delete() error {
	deadline := time.Now().Add(deleteFor)
	var errs []error
	for _, dir := range c.dirs() {
		if err := remove(dir, deadline); err != nil {
			errs = append(errs, err)
		}
	}
	if c.failed {
		removeMade(c.made)
	}
	return errors.Join(errs...)
}

func remove(dir string, deadline time.Time) error {
	for pause := 100 * time.Microsecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := removeTree(dir, 0)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("delete cgroup: %w", err)
		}
		if time.Now().After(deadline) {
			var pids []int
			_ = walk(dir, 0, func(d string) (e error) { pids, e = appendProcs(pids, d); return e })
			return classed(fmt.Errorf("delete cgroup: %w (processes %v)", err, pids[:min(len(pids), 16)]), errdefs.ErrFailedPrecondition)
		}
		time.Sleep(pause)
	}
}

func removeTree(dir string, depth int) error {
	err := unix.Rmdir(dir)
	if err == nil || gone(err) {
		return nil
	}
	// rmdir(2) of a cgroup with children says EBUSY, that of a plain directory ENOTEMPTY.
	if depth < maxDepth && (errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENOTEMPTY)) {
		names, serr := subdirs(dir)
		if serr != nil {
			return serr
		}
		if len(names) > 0 {
			for _, name := range names {
				if err := removeTree(dir+"/"+name, depth+1); err != nil {
					return err
				}
			}
			if err = unix.Rmdir(dir); err == nil || gone(err) {
				return nil
			}
		}
	}
	return &fs.PathError{Op: "rmdir", Path: dir, Err: err}
}
