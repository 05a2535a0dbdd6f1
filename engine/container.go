package engine

import (
	"context"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/shim/client"
)

// recordVersion is the version of the container records on disk. A record of a
// newer version is left alone and its container not shown.
const recordVersion = 1

// record is what is kept of a container across restarts of the daemon and of the
// machine. It is the on-disk format: fields are only ever added.
type record struct {
	Version int `json:"version"`
	Container
	// StoppedByUser keeps unless-stopped containers stopped after a restart.
	StoppedByUser bool `json:"stoppedByUser,omitempty"`
	// Networks are those that it shall be on when it runs.
	Networks []EndpointSettings `json:"networks"`
	// Started tells that it ran at least once: only such ones are started by a policy.
	Started bool `json:"started,omitempty"`
	// ClientLabels are what clients of containerd noted, see isClientLabel.
	ClientLabels map[string]string `json:"clientLabels,omitempty"`
}

// container is one container of the engine.
type container struct {
	id      string
	created time.Time
	pod     bool // it is a pod's

	// ticket is held by the one operation that changes the container's run: start,
	// exit handling, pause, update, network connect, remove. Waiting for it ends
	// with the caller's context. Reading the container never needs it.
	ticket chan struct{}
	// checkpointing: one is being made.
	checkpointing atomic.Bool
	// saving is held while the record is being written, so that an older state never
	// overwrites a newer one.
	saving chan struct{}

	mu       sync.Mutex // guards all below; never held over I/O or a call to another room
	rec      record
	run      *run // nil: no process
	removing bool // a remove has claimed it
	restarts int  // clients' restarts that are stopping it: it is not removed by its own wish
	gone     bool // its record is deleted
	waiters  []waiter
	pending  []*pendingAttach
	execs    map[string]*execution
	// restartCancel ends the wait of a restarting container; nil if none waits.
	restartCancel context.CancelFunc
	failures      int               // restarts in a row, for the backoff
	lastPid       int               // of the last run, when it has ended
	face          *PodContainerFace // nil: no list has shown it yet

	// guest, if not nil, is whose container this is one of the moment of; never changed.
	guest *guest

	// What hooks were told of it last, nil if they were told nothing yet, how often its limits have changed, and whether the hooks
	// know of its end. Without hooks they are not used.
	spec     *specs.Spec
	limits   int
	toldStop bool
}

// run is one life of a container's process.
type run struct {
	bundle  string
	started time.Time
	// memory is the directory of its memory cgroup; "" for one without a limit.
	memory string
	// shim and pid change when the connection to a shim is made anew.
	shim atomicShim
	pid  atomic.Int64
	// exited is closed when the process has ended, done when the engine has
	// handled that: state, network, events.
	exited chan struct{}
	done   chan struct{}
	cancel context.CancelFunc // ends health checks
	killed atomic.Bool        // SIGKILL was sent, or is about to be
	// ending keeps the events of its end in order. What holds it waits for nothing.
	ending sync.Mutex
	meter  meter
}

// atomicShim holds the connection that is in use.
type atomicShim struct{ p atomic.Pointer[Shim] }

func (a *atomicShim) get() Shim  { return *a.p.Load() }
func (a *atomicShim) set(s Shim) { a.p.Store(&s) }

func newRun(shim Shim, bundle string, pid int, started time.Time) *run {
	r := &run{bundle: bundle, started: started, exited: make(chan struct{}), done: make(chan struct{})}
	r.shim.set(shim)
	r.pid.Store(int64(pid))
	return r
}

func newContainer(r record) *container {
	return &container{
		id: r.ID, created: r.Created, pod: r.Config.Pod != nil,
		ticket: make(chan struct{}, 1),
		saving: make(chan struct{}, 1),
		rec:    r,
		execs:  map[string]*execution{},
	}
}

// acquire takes the container's ticket, or gives up with the context.
func (c *container) acquire(ctx context.Context) error {
	select {
	case c.ticket <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (c *container) release() { <-c.ticket }

// view is the container as it is now. Slices and maps in it are never changed in
// place, so that the copy stays as it is.
func (c *container) view() Container {
	c.mu.Lock()
	defer c.mu.Unlock()
	v := c.rec.Container
	if v.Attached = c.rec.Networks; v.Attached == nil {
		v.Attached = []EndpointSettings{}
	}
	v.ExecIDs = nil
	if len(c.execs) == 0 {
		return v
	}
	for _, id := range slices.Sorted(maps.Keys(c.execs)) {
		if c.execs[id].state != execEnded { // an ended one can be inspected, but is the container's no more
			v.ExecIDs = append(v.ExecIDs, id)
		}
	}
	return v
}

// entry is a pod's container in a list. Only one that others can see has one: a plugin may change what is being made.
func (c *container) entry() PodContainer {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.face == nil {
		c.face = c.rec.Face()
	}
	return PodContainer{c.face, c.rec.State.Status}
}

func (c *container) status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rec.State.Status
}

// live gives the present run, or an error if there is none.
func (c *container) live(op string) (*run, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.requireLocked(op); err != nil {
		return nil, err
	}
	if c.run == nil {
		return nil, conflictf("container %s is not running", c.id)
	}
	return c.run, nil
}

// save writes the record. It is idempotent, and the last state wins.
func (e *Engine) save(ctx context.Context, c *container) error {
	select {
	case c.saving <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-c.saving }()
	c.mu.Lock()
	rec, gone := c.rec, c.gone
	c.mu.Unlock()
	if gone {
		return nil
	}
	return e.opt.Containers.Put(ctx, c.id, &rec)
}

// saveLater writes the record without making the caller wait for the disk. What
// is lost when the machine dies before is derived again from the shim or from its
// absence.
func (e *Engine) saveLater(c *container) {
	e.background(func(ctx context.Context) {
		if err := e.save(ctx, c); err != nil {
			e.log.Error("save container", "container", c.id, "error", err)
		}
	})
}

// dir is the durable folder of a container: log, hosts, hostname, resolv.conf.
func (e *Engine) dir(id string) string { return filepath.Join(e.opt.Root, "containers", id) }

// bundle is the volatile folder of a container: config.json, the shim's socket.
func (e *Engine) bundle(id string) string { return filepath.Join(e.opt.State, "containers", id) }

// registry finds containers by id, name and prefix, and reserves names.
type registry struct {
	mu    sync.RWMutex
	byID  map[string]*container
	names map[string]string // name → id; a name is taken before its container exists
	// beingMade holds the containers that are being created (id → snapshotter): their
	// snapshots are roots for the garbage collector.
	beingMade map[string]string
	images    imageUse
}

// reserve takes a name for an id.
func (r *registry) reserve(name, id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if owner, taken := r.names[name]; taken && owner != id {
		return conflictf("Conflict. The container name %q is already in use by container %q. "+
			"You have to remove (or rename) that container to be able to reuse that name.", "/"+name, owner)
	}
	r.names[name] = id
	return nil
}

// unreserve gives a name back if the id holds it.
func (r *registry) unreserve(name, id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.names[name] == id {
		delete(r.names, name)
	}
}

func (r *registry) add(c *container) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.byID[c.id] = c
}

func (r *registry) remove(c *container, name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.byID, c.id)
	if r.names[name] == c.id {
		delete(r.names, name)
	}
}

// all gives the containers, in no order.
func (r *registry) all() []*container {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return slices.AppendSeq(make([]*container, 0, len(r.byID)), maps.Values(r.byID))
}

// get finds a container by id, name (with or without slash) or unique id prefix.
func (r *registry) get(ref string) (*container, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if c := r.byID[ref]; c != nil {
		return c, nil
	}
	if id, ok := r.names[strings.TrimPrefix(ref, "/")]; ok {
		if c := r.byID[id]; c != nil {
			return c, nil
		}
	}
	var found *container
	if ref != "" && len(ref) < 64 {
		for id, c := range r.byID {
			if strings.HasPrefix(id, ref) {
				if found != nil {
					return nil, invalidf("Multiple IDs found with provided prefix: %s", ref)
				}
				found = c
			}
		}
	}
	if found == nil {
		return nil, notFoundf("No such container: %s", ref)
	}
	return found, nil
}

// shimOptions tells how the shim of a container is started and found.
func (e *Engine) shimOptions(v Container) client.StartOptions {
	return client.StartOptions{
		Binary:        e.opt.ShimBinary,
		Namespace:     Namespace,
		ID:            v.ID,
		Bundle:        e.bundle(v.ID),
		Runtime:       e.runtimes()[v.Config.Runtime],
		SystemdCgroup: e.opt.CgroupDriver == "systemd",
	}
}
