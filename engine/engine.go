// Package engine holds the node's objects (containers, pods' sandboxes, tasks, execs, images,
// volumes, networks, events) and their state machines, and takes them up again after a
// restart of the daemon.
//
// In flow requests in the engine's own types from the doors (api/docker, api/cri,
// api/containerd), and what plugins want (api/nri); out flow snapshots, bundles and
// commands to the rooms below, which the engine knows only by the small interfaces of
// deps.go. Every request takes a context; every error has a class of errdefs, and a text that
// Docker's users know where there is one. Values given out are copies.
//
// Guarantees: what was acknowledged survives kill -9 of the daemon; containers run
// on without the daemon; an operation that fails leaves nothing behind; a stuck
// container blocks only the requests that name it.
package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/events"
	sandboxstore "github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
)

// Namespace is the containerd namespace of the objects that Docker and CRI share.
const Namespace = "k8s.io"

// ErrNotModified marks a start of a running container or a stop of a stopped one.
// It is errdefs.ErrNotModified.
var ErrNotModified = errdefs.ErrNotModified

// Options configures an Engine.
type Options struct {
	Root  string // durable: volumes, logs
	State string // gone after a reboot: bundles
	// Containers, Volumes and Settings hold the engine's records (store.Records).
	Containers Records
	Volumes    Records
	Settings   Records
	Sandboxes  Records
	// ContainerRecords are the containers of containerd's clients (store.Store.Containers), Content
	// the blobs that checkpoints go to.
	ContainerRecords containers.Store
	Content          content.Store
	// ContainerNamespaces lists the namespaces that those containers may be in; nil: no task is restarted.
	ContainerNamespaces func(context.Context) ([]string, error)
	// RestartInterval is how often it is looked for tasks to restart; 0: 10 s.
	RestartInterval time.Duration
	// SandboxRecords are the sandboxes of containerd's clients (store.Store.Sandboxes).
	SandboxRecords sandboxstore.Store
	// Publisher is told of what containerd's clients want to hear of; may be nil.
	Publisher events.Publisher
	// GRPCAddress and TTRPCAddress are the daemon's sockets for containerd's clients and shims.
	GRPCAddress, TTRPCAddress string

	Images   Images
	Networks Networks
	// PodNetwork joins pods to their network; nil: the built-in bridge.
	PodNetwork PodNetwork
	// Hooks is told of pods and their containers; nil: nobody is.
	Hooks        Hooks
	Shims        Shims
	TaskShims    TaskShims
	Snapshotters map[string]snapshots.Snapshotter
	Snapshotter  string // name of the default one

	CgroupDriver string            // "cgroupfs" (default) or "systemd"
	ShimBinary   string            // empty: beside the executable
	Runtimes     map[string]string // further OCI runtimes: name → binary that the shim executes; see SetRuntimes
	// RestoreCheckpoints says what containers of pods may be restored from: RestoreNone, RestoreArchives (or ""), RestoreImages.
	RestoreCheckpoints string
	CDISpecDirs        []string // folders of device descriptions, the last ones go first; empty: /etc/cdi, /var/run/cdi
	InitBinary         string   // static init for Config.Init; empty: asking for one is an error
	Version            string
	Labels             []string // of the daemon, shown by Info
	RegistryDir        string
	// Checked are the rooms below that Check looks at, the store first; Garbage is the collector.
	Checked []Checked
	Garbage Garbage
	Pulled  func(Pull) // is told of each pull that has ended; may be nil
	probe   func() (hostFacts, error)
	Log     *slog.Logger // nil: discard
}

// Engine owns the objects of one node.
type Engine struct {
	opt  Options
	log  *slog.Logger
	host hostFacts
	id   string // of the node, kept in Settings

	containers registry
	tasks      tasks
	rooms      tiedIndex[*shimRoom]
	pods       sandboxes
	told       told
	volumes    volumes
	execs      execRegistry
	events     bus
	apparmor   *apparmor
	accounts   accountCache
	patience   *patience // of the start

	runtimesNow atomic.Pointer[map[string]string] // see SetRuntimes

	stopping chan struct{} // closed by Interrupt
	stopOnce sync.Once

	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc
	work   sync.WaitGroup
}

// errClosed ends what waits inside the engine when the daemon stops.
var errClosed = fmt.Errorf("the daemon is shutting down: %w", errdefs.ErrUnavailable)

// New opens the engine on its records and takes up what runs. It returns when
// every container has a known state; containers whose shim does not answer in time
// are taken up in the background.
func New(ctx context.Context, o Options) (*Engine, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.CgroupDriver == "" {
		o.CgroupDriver = "cgroupfs"
	}
	if len(o.CDISpecDirs) == 0 {
		o.CDISpecDirs = []string{"/etc/cdi", "/var/run/cdi"}
	}
	if o.PodNetwork == nil {
		o.PodNetwork = bridgePods{o.Networks}
	}
	e := &Engine{opt: o, log: o.Log, stopping: make(chan struct{}), pods: newSandboxes()}
	e.runtimesNow.Store(&o.Runtimes)
	e.ctx, e.cancel = context.WithCancelCause(context.Background())
	e.ctx = namespaces.WithNamespace(e.ctx, Namespace)
	e.containers = registry{
		byID: map[string]*container{}, names: map[string]string{},
		beingMade: map[string]string{},
	}
	e.tasks = tasks{tiedIndex: tiedIndex[*task]{all: map[taskKey]*task{}}}
	e.rooms = tiedIndex[*shimRoom]{all: map[taskKey]*shimRoom{}}
	e.execs = execRegistry{byID: map[string]*execution{}}
	// 0711: names below can be reached by containers in user namespaces, not listed.
	for dir, mode := range map[string]os.FileMode{
		filepath.Join(o.Root, "containers"):  0o710,
		filepath.Join(o.Root, "volumes"):     0o710,
		filepath.Join(o.State, "containers"): 0o710,
		filepath.Join(o.State, "sandboxes"):  0o711,
	} {
		if err := mkdir(dir, mode); err != nil {
			return nil, fmt.Errorf("open engine: %w", err)
		}
	}
	var err error
	if o.probe == nil {
		o.probe = probeHost
	}
	if e.host, err = o.probe(); err != nil {
		return nil, fmt.Errorf("open engine: %w", err)
	}
	e.host.CgroupDriver = o.CgroupDriver
	e.apparmor = &apparmor{parser: apparmorParser(), profiles: "/sys/kernel/security/apparmor/profiles"}
	switch {
	case e.host.AppArmorProfile != "":
		e.background(func(ctx context.Context) { // ahead of the first container
			if err := e.apparmor.ensure(ctx); err != nil {
				e.log.Error("containers cannot start", "error", err)
			}
		})
	case e.host.AppArmor:
		e.log.Warn("AppArmor is enabled, but does not confine containers", "why", e.host.AppArmorWhy)
	}
	if err := e.loadID(ctx); err != nil {
		return nil, fmt.Errorf("open engine: %w", err)
	}
	if err := e.loadVolumes(ctx); err != nil {
		return nil, fmt.Errorf("open engine: %w", err)
	}
	if err := e.restore(e.ns(ctx)); err != nil {
		return nil, fmt.Errorf("open engine: %w", err)
	}
	if o.TaskShims != nil {
		e.restoreTasks(e.ctx)
		e.restoreRooms(e.ctx)
		if e.opt.ContainerNamespaces != nil {
			e.work.Go(func() { e.monitorTasks(e.ctx) })
		}
	}
	e.takeHooked()
	return e, nil
}

// Interrupt ends what waits for containers to stop, with ErrUnavailable: the daemon is
// about to close, and they run on. It may be called more than once.
func (e *Engine) Interrupt() { e.stopOnce.Do(func() { close(e.stopping) }) }

// Close lets go of everything that runs and leaves it running. It waits for
// what is being written.
func (e *Engine) Close() error {
	e.Interrupt()
	e.cancel(errClosed)
	e.events.close()
	for _, c := range e.containers.all() {
		c.mu.Lock()
		r := c.run
		c.mu.Unlock()
		if r != nil {
			r.shim.get().Close()
		}
	}
	for _, s := range e.pods.all() {
		s.mu.Lock()
		shim := s.shim
		s.mu.Unlock()
		if shim != nil {
			shim.Close()
		}
	}
	for _, b := range e.rooms.in("") {
		if shim := b.connection(); shim != nil {
			shim.Close()
		}
	}
	for _, t := range e.tasks.in("") {
		t.mu.Lock()
		shim, docker := t.shim, t.docker
		t.mu.Unlock()
		if shim != nil {
			shim.Close()
		}
		if docker != nil {
			docker.Close()
		}
	}
	done := make(chan struct{})
	go func() { e.work.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-time.After(10 * time.Second):
		return errors.New("close engine: background work did not end in 10 s")
	}
}

// background runs f beside the request. Its context ends with the engine's only
// after Close; what writes records is short.
func (e *Engine) background(f func(context.Context)) {
	e.work.Go(func() { f(context.WithoutCancel(e.ctx)) })
}

// ns adds the containerd namespace that the engine's objects live in.
func (e *Engine) ns(ctx context.Context) context.Context {
	if _, ok := namespaces.Namespace(ctx); ok {
		return ctx
	}
	return namespaces.WithNamespace(ctx, Namespace)
}

// loadID reads the node's id, and makes one at the first start, and in place of one that cannot be read: nothing
// depends on its being the same.
func (e *Engine) loadID(ctx context.Context) error {
	var s struct {
		ID string `json:"id"`
	}
	err := e.opt.Settings.Get(ctx, "node", &s)
	switch {
	case err == nil && s.ID != "":
		e.id = s.ID
		return nil
	case errdefs.IsDataLoss(err):
		e.log.Error("the node's id cannot be read, and is made anew", "error", err)
	case err != nil && !errdefs.IsNotFound(err):
		return fmt.Errorf("read the node's id: %w", err)
	}
	id := newID()
	s.ID = fmt.Sprintf("%s-%s-%s-%s-%s", id[:8], id[8:12], id[12:16], id[16:20], id[20:32])
	if err := e.opt.Settings.Put(ctx, "node", &s); err != nil {
		return fmt.Errorf("write the node's id: %w", err)
	}
	e.id = s.ID
	return nil
}

// mkdir makes a directory of the engine with exactly this mode, whatever the umask.
func mkdir(dir string, mode os.FileMode) error {
	if err := os.MkdirAll(dir, mode); err != nil {
		return err
	}
	return os.Chmod(dir, mode)
}
