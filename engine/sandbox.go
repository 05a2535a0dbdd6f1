package engine

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/hako-engine/hako/shim/client"
)

// sandboxVersion is the version of the sandbox records on disk.
const sandboxVersion = 1

// sandboxRecord is what is kept of a sandbox over a reboot: what it was asked to be. What
// it has (addresses, namespaces) lies in the volatile folder.
type sandboxRecord struct {
	Version int           `json:"version"`
	ID      string        `json:"id"`
	Created time.Time     `json:"created"`
	Config  SandboxConfig `json:"config"`
	// SELinuxLevel is that of its containers, "" where SELinux is off.
	SELinuxLevel string `json:"selinuxLevel,omitempty"`
}

// sandbox is one pod's sandbox: namespaces, a network, a shim for its containers.
type sandbox struct {
	id  string
	rec sandboxRecord // never changes; Overhead and Resources are those of its beginning

	// ticket is held by the one operation that stops or removes the sandbox.
	ticket chan struct{}
	// starting is held while a shim is being started for the sandbox.
	starting chan struct{}
	meter    meter

	mu    sync.Mutex // guards all below; never held over I/O or a call to another room
	state SandboxState
	live  sandboxRun
	shim  Shim // nil: none yet, or it has ended
	// overhead and resources are those in force.
	overhead, resources *Resources
	// released tells that the network has been given back since the daemon started.
	released bool
	toldStop bool // the hooks were
}

// sandboxRun is what a sandbox has while it is ready. It is the content of run.json.
type sandboxRun struct {
	Version int `json:"version"`
	// Ready is set when somebody was told of the sandbox: one without it is undone by the next daemon.
	Ready bool `json:"ready"`
	// Stopping is set when a stop has begun: it is not ready, and somebody will stop it again.
	Stopping  bool          `json:"stopping,omitempty"`
	Record    sandboxRecord `json:"record"`
	NetNS     string        `json:"netns,omitempty"`
	Addresses PodAddresses  `json:"addresses,omitzero"`
	// CgroupMade: the cgroup that the client named was not there, and is removed with the sandbox.
	CgroupMade bool `json:"cgroupMade,omitempty"`
	// Init is the pid of the init of a shared PID namespace.
	Init int `json:"init,omitempty"`
}

func newSandbox(rec sandboxRecord) *sandbox {
	return &sandbox{id: rec.ID, rec: rec, overhead: rec.Config.Overhead, resources: rec.Config.Resources, ticket: make(chan struct{}, 1), starting: make(chan struct{}, 1)}
}

func (s *sandbox) acquire(ctx context.Context) error {
	select {
	case s.ticket <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *sandbox) release() { <-s.ticket }

// view is the sandbox as it is now.
func (s *sandbox) view() Sandbox {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.rec.Config
	c.Overhead, c.Resources = s.overhead, s.resources
	return Sandbox{
		ID: s.id, Created: s.rec.Created, Config: c, State: s.state,
		IPs: slices.Clone[[]netip.Addr](s.live.Addresses.IPs), NetNS: s.live.NetNS, Pid: s.live.Init,
	}
}

// key is the name that a sandbox holds: there is one of it at a time.
func (c SandboxConfig) key() string {
	return fmt.Sprintf("%s_%s_%s_%d", c.Name, c.Namespace, c.UID, c.Attempt)
}

// sandboxes finds sandboxes, and reserves their names.
type sandboxes struct {
	mu      sync.RWMutex
	byID    map[string]*sandbox
	names   map[string]string                // key → id
	members map[string]map[string]*container // sandbox → its containers
	undoing map[string]chan struct{}         // of those that nobody knows of, and that are being removed since the start: closed at the end of it
	flights flights[*sandbox]
	creates flights[*newMember]
	starts  flights[struct{}]
}

func newSandboxes() sandboxes {
	return sandboxes{byID: map[string]*sandbox{}, names: map[string]string{}, members: map[string]map[string]*container{}, undoing: map[string]chan struct{}{}}
}

// undo marks a sandbox as one that is being removed, until done is called.
func (r *sandboxes) undo(id string) (done func()) {
	gone := make(chan struct{})
	r.mu.Lock()
	defer r.mu.Unlock()
	r.undoing[id] = gone
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.undoing, id)
		close(gone)
	}
}

// undone lists the sandboxes that are being removed. A channel is closed when its sandbox is no longer.
func (r *sandboxes) undone() map[string]chan struct{} {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return maps.Clone(r.undoing)
}

// reserve takes a name for an id.
func (r *sandboxes) reserve(key, id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if owner, taken := r.names[key]; taken && owner != id {
		return failedf("failed to reserve sandbox name %q: it is reserved for %q", key, owner)
	}
	r.names[key] = id
	return nil
}

func (r *sandboxes) unreserve(key, id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.names[key] == id {
		delete(r.names, key)
	}
}

func (r *sandboxes) add(s *sandbox) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.byID[s.id] = s
	r.names[s.rec.Config.key()] = s.id
}

func (r *sandboxes) remove(s *sandbox) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.byID, s.id)
	delete(r.members, s.id)
	if key := s.rec.Config.key(); r.names[key] == s.id {
		delete(r.names, key)
	}
}

// join and leave keep the list of a sandbox's containers.
func (r *sandboxes) join(id string, c *container) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.members[id] == nil {
		r.members[id] = map[string]*container{}
	}
	r.members[id][c.id] = c
}

func (r *sandboxes) leave(id string, c *container) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.members[id], c.id)
	if len(r.members[id]) == 0 {
		delete(r.members, id)
	}
}

// containers are those of a sandbox, in no order.
func (r *sandboxes) containers(id string) []*container {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return slices.Collect(maps.Values(r.members[id]))
}

func (r *sandboxes) all() []*sandbox {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return slices.Collect(maps.Values(r.byID))
}

// get finds a sandbox by id or unique prefix.
func (r *sandboxes) get(ref string) (*sandbox, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if s := r.byID[ref]; s != nil {
		return s, nil
	}
	var found *sandbox
	if ref != "" && len(ref) < 64 {
		for id, s := range r.byID {
			if strings.HasPrefix(id, ref) {
				if found != nil {
					return nil, invalidf("more than one sandbox has the prefix %s", ref)
				}
				found = s
			}
		}
	}
	if found == nil {
		return nil, notFoundf("sandbox %q not found", ref)
	}
	return found, nil
}

// Sandbox gives one sandbox by id or unique prefix.
func (e *Engine) Sandbox(_ context.Context, ref string) (Sandbox, error) {
	s, err := e.pods.get(ref)
	if err != nil {
		return Sandbox{}, err
	}
	return s.view(), nil
}

// Sandboxes lists the sandboxes, the newest first.
func (e *Engine) Sandboxes(context.Context) []Sandbox {
	all := e.pods.all()
	out := make([]Sandbox, len(all))
	for i, s := range all {
		out[i] = s.view()
	}
	slices.SortFunc(out, func(a, b Sandbox) int {
		return cmp.Or(b.Created.Compare(a.Created), strings.Compare(a.ID, b.ID))
	})
	return out
}

// SandboxContainers lists the containers of a sandbox, the oldest first.
func (e *Engine) SandboxContainers(_ context.Context, id string) []Container {
	members := e.pods.containers(id)
	slices.SortFunc(members, func(a, b *container) int { return byAge(b, a) })
	return views(members)
}

// PodContainers lists the containers of all pods, the newest first.
func (e *Engine) PodContainers(context.Context) []PodContainer {
	members := slices.DeleteFunc(e.containers.all(), func(c *container) bool { return !c.pod })
	slices.SortFunc(members, byAge)
	out := make([]PodContainer, len(members))
	for i, c := range members {
		out[i] = c.entry()
	}
	return out
}

// byAge puts the newest first.
func byAge(a, b *container) int {
	return cmp.Or(b.created.Compare(a.created), strings.Compare(a.id, b.id))
}

func views(list []*container) []Container {
	out := make([]Container, len(list))
	for i, c := range list {
		out[i] = c.view()
	}
	return out
}

// PodFeatures tells what pods can have on this node.
func (e *Engine) PodFeatures(context.Context) PodFeatures {
	return PodFeatures{
		CgroupDriver: e.opt.CgroupDriver, Root: e.opt.Root,
		RecursiveReadOnly: e.host.kernelAtLeast(5, 12), UserNamespaces: e.host.kernelAtLeast(6, 15),
	}
}

// NetworkReady tells why pods cannot get a network now; nil if they can.
func (e *Engine) NetworkReady(context.Context) error { return e.opt.PodNetwork.Ready() }

// SetPodCIDR tells the network of the pods the ranges that the cluster gave to this node.
func (e *Engine) SetPodCIDR(ctx context.Context, ranges []netip.Prefix) error {
	return e.opt.PodNetwork.SetPodCIDR(ctx, ranges)
}

// sandboxDir is the volatile folder of a sandbox: namespaces, shm, the shim's socket.
func (e *Engine) sandboxDir(id string) string { return filepath.Join(e.opt.State, "sandboxes", id) }

// podCgroup is the cgroup that a sandbox's containers lie in.
func (e *Engine) podCgroup(id string, c SandboxConfig) string {
	if c.CgroupParent != "" {
		return c.CgroupParent
	}
	return "/hako/pod" + id
}

// sandboxShim tells how the shim of a sandbox is started and found.
func (e *Engine) sandboxShim(s *sandbox) client.StartOptions {
	return client.StartOptions{
		Binary:        e.opt.ShimBinary,
		Namespace:     Namespace,
		ID:            s.id,
		Bundle:        e.sandboxDir(s.id),
		Runtime:       e.runtimes()[s.rec.Config.Runtime],
		SystemdCgroup: e.opt.CgroupDriver == "systemd",
	}
}

// emitSandbox publishes an event of a sandbox, to containerd's clients as containerd does.
func (e *Engine) emitSandbox(s *sandbox, action string) {
	switch action {
	case "create":
		e.announce(Namespace, "/containers/create", &eventsapi.ContainerCreate{ID: s.id, Runtime: &eventsapi.ContainerCreate_Runtime{Name: RuntimeHako}})
		e.announce(Namespace, "/sandboxes/create", &eventsapi.SandboxCreate{SandboxID: s.id})
	case "start":
		e.announce(Namespace, "/sandboxes/start", &eventsapi.SandboxStart{SandboxID: s.id})
	case "stop":
		e.announce(Namespace, "/sandboxes/exit", &eventsapi.SandboxExit{SandboxID: s.id, ExitedAt: timestamppb.Now()})
	case "destroy":
		e.announce(Namespace, "/containers/delete", &eventsapi.ContainerDelete{ID: s.id})
	}
	e.events.publish(Event{Type: EventSandbox, Action: action, ID: s.id, Attributes: s.names()})
}

// names says in events whose sandbox it is.
func (s *sandbox) names() map[string]string {
	c := &s.rec.Config
	return map[string]string{AttrPodName: c.Name, AttrPodNamespace: c.Namespace, AttrPodUID: c.UID}
}

// EventSandbox is the type of the events of sandboxes: create, start, stop, destroy. Docker
// has none of it.
const EventSandbox = "sandbox"

// Attributes of the events of sandboxes and of their containers; AttrSandbox is of the latter only.
const (
	AttrSandbox      = "io.hako.sandbox"
	AttrPodName      = "io.hako.pod.name"
	AttrPodNamespace = "io.hako.pod.namespace"
	AttrPodUID       = "io.hako.pod.uid"
)

// UpdateSandboxResources notes the limits that the kubelet gave to a pod's cgroup, which is the
// kubelet's own. nil leaves what was.
func (e *Engine) UpdateSandboxResources(ctx context.Context, ref string, overhead, resources *Resources) error {
	s, err := e.pods.get(ref)
	if err != nil {
		return err
	}
	if err := s.acquire(ctx); err != nil {
		return fmt.Errorf("update sandbox %s: %w", ref, err)
	}
	defer s.release()
	if s.removed() { // the record must not come back
		return notFoundf("sandbox %q not found", ref)
	}
	if err := e.tellResize(ctx, s, overhead, resources); err != nil {
		return err
	}
	rec := s.rec
	s.mu.Lock()
	if overhead != nil {
		s.overhead = overhead
	}
	if resources != nil {
		s.resources = resources
	}
	rec.Config.Overhead, rec.Config.Resources = s.overhead, s.resources
	s.mu.Unlock()
	if err := e.opt.Sandboxes.Put(ctx, s.id, &rec); err != nil {
		return fmt.Errorf("update sandbox %s: %w", s.id, err)
	}
	e.tellResized(ctx, s)
	return nil
}
