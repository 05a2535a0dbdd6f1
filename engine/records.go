package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/hako-engine/hako/store"
)

// Labels by which node agents tell what a container of the CRI is.
const (
	criKind          = "io.cri-containerd.kind"
	criKindContainer = "container"
	criKindSandbox   = "sandbox"
)

// specType names an OCI configuration in an Any.
const specType = "types.containerd.io/opencontainers/runtime-spec/1/Spec"

// ContainerStore are the records of all containers, as containerd's clients see them: those that
// they made, and in the namespace that all share also Docker's and the CRI's, and the sandboxes of pods.
func (e *Engine) ContainerStore() containers.Store { return &recordView{e.opt.ContainerRecords, e} }

// recordView shows the engine's containers beside the records of a store. Whoever made one decides what
// it is, so only its end can be asked for here.
type recordView struct {
	containers.Store
	e *Engine
}

func isShared(ctx context.Context) bool {
	ns, ok := namespaces.Namespace(ctx)
	return ok && ns == Namespace
}

func (r *recordView) Get(ctx context.Context, id string) (containers.Container, error) {
	if isShared(ctx) {
		if c := r.e.containers.exact(id); c != nil {
			return r.e.containerRecord(c), nil
		}
		if s := r.e.pods.exact(id); s != nil {
			return sandboxContainer(s.view()), nil
		}
	}
	return r.Store.Get(ctx, id)
}

func (r *recordView) List(ctx context.Context, fs ...string) ([]containers.Container, error) {
	return listBeside(ctx, fs, r.Store.List, store.AdaptContainer, func(add func(containers.Container)) {
		for _, c := range r.e.containers.all() {
			add(r.e.containerRecord(c))
		}
		for _, s := range r.e.pods.all() {
			add(sandboxContainer(s.view()))
		}
	})
}

// listBeside is the list of a store and, in the namespace that all share, what own adds and the filters let through.
func listBeside[T any](ctx context.Context, fs []string, stored func(context.Context, ...string) ([]T, error), adapt func(T) filters.Adaptor, own func(add func(T))) ([]T, error) {
	list, err := stored(ctx, fs...)
	if err != nil || !isShared(ctx) {
		return list, err
	}
	filter, err := store.ParseFilters(fs)
	if err != nil {
		return nil, err
	}
	own(func(o T) {
		if filter.Match(adapt(o)) {
			list = append(list, o)
		}
	})
	return list, nil
}

func (r *recordView) Create(ctx context.Context, c containers.Container) (containers.Container, error) {
	if isShared(ctx) {
		free, err := r.claim(c.ID, c.ID, c.Labels[nerdctlName])
		if err != nil {
			return containers.Container{}, err
		}
		defer free()
		if r.e.containers.exact(c.ID) != nil || r.e.pods.exact(c.ID) != nil {
			return containers.Container{}, fmt.Errorf("container %q: %w", c.ID, errdefs.ErrAlreadyExists)
		}
	}
	made, err := r.Store.Create(ctx, c)
	if err == nil && isShared(ctx) {
		r.e.emitGuest(made, "create")
	}
	return made, err
}

// claim keeps Docker from giving names to a container of its own until free is called, by which time a record has them.
// errdefs.ErrAlreadyExists: Docker has one of them, which would mean two containers then.
func (r *recordView) claim(id string, names ...string) (free func(), err error) {
	owner := "containerd:" + id // no container's id
	var held []string
	free = func() {
		for _, n := range held {
			r.e.containers.unreserve(n, owner)
		}
	}
	for _, n := range names {
		if n == "" {
			continue
		}
		if r.e.containers.reserve(n, owner) != nil {
			free()
			return nil, fmt.Errorf("container %q: Docker has one of the name %q: %w", id, n, errdefs.ErrAlreadyExists)
		}
		held = append(held, n)
	}
	return free, nil
}

func (r *recordView) Update(ctx context.Context, c containers.Container, fieldpaths ...string) (containers.Container, error) {
	if isShared(ctx) {
		if own := r.e.containers.exact(c.ID); own != nil {
			return r.relabel(ctx, own, c, fieldpaths)
		}
		if r.e.pods.exact(c.ID) != nil {
			return containers.Container{}, changedThere(c.ID)
		}
		free, err := r.claim(c.ID, c.Labels[nerdctlName])
		if err != nil {
			return containers.Container{}, err
		}
		defer free()
	}
	return r.Store.Update(ctx, c, fieldpaths...)
}

func changedThere(id string) error {
	return failedf("container %q was made by Docker or the CRI, and is changed there", id)
}

// isClientLabel is for labels by which clients of containerd keep notes on containers, whoever made these: nerdctl does whenever it
// stops or kills one. For Docker's containers and the CRI's they mean nothing, and are kept for who asks.
func isClientLabel(key string) bool {
	return key != nerdctlName && (strings.HasPrefix(key, "containerd.io/restart.") || strings.HasPrefix(key, "nerdctl/"))
}

// relabel is Update of a container of the engine's: of those labels alone.
func (r *recordView) relabel(ctx context.Context, c *container, want containers.Container, paths []string) (have containers.Container, err error) {
	if err := c.acquire(ctx); err != nil {
		return have, err
	}
	defer c.release()
	have = r.e.containerRecord(c)
	if len(paths) == 0 {
		if want.Image != have.Image || want.SnapshotKey != have.SnapshotKey || len(want.Extensions) > 0 || want.Spec == nil || !bytes.Equal(want.Spec.GetValue(), have.Spec.GetValue()) {
			return have, changedThere(c.id)
		}
		paths = []string{"labels"}
	}
	labels := have.Labels
	for _, p := range paths {
		var ok bool
		if labels, ok = store.UpdateLabels(labels, want.Labels, p); !ok {
			return have, changedThere(c.id)
		}
	}
	own, rest, before := map[string]string{}, store.CloneLabels(labels), store.CloneLabels(have.Labels)
	for k, v := range labels {
		if isClientLabel(k) {
			own[k] = v
		}
	}
	others := func(k, _ string) bool { return isClientLabel(k) }
	maps.DeleteFunc(rest, others)
	maps.DeleteFunc(before, others)
	if !maps.Equal(rest, before) {
		return have, changedThere(c.id)
	}
	if err := store.ValidateLabels(own); err != nil {
		return have, fmt.Errorf("update container %q: %w", c.id, err)
	}
	ctx = context.WithoutCancel(ctx) // the record and what is known here stay the same
	c.mu.Lock()
	old := c.rec.ClientLabels
	c.rec.ClientLabels = own
	c.mu.Unlock()
	if err := r.e.save(ctx, c); err != nil {
		c.mu.Lock()
		c.rec.ClientLabels = old
		c.mu.Unlock()
		return have, fmt.Errorf("update container %q: %w", c.id, err)
	}
	have = r.e.containerRecord(c)
	r.e.announce(Namespace, "/containers/update", &eventsapi.ContainerUpdate{ID: c.id, Image: have.Image, Labels: have.Labels, SnapshotKey: have.SnapshotKey})
	return have, nil
}

func (r *recordView) Delete(ctx context.Context, id string) error {
	if isShared(ctx) {
		if c := r.e.containers.exact(id); c != nil {
			if err := r.e.RemoveContainer(ctx, id, RemoveOptions{}); err != nil {
				if errdefs.IsConflict(err) {
					err = failedf("%v", err)
				}
				return err
			}
			return nil
		}
		if s := r.e.pods.exact(id); s != nil {
			if s.view().State == SandboxReady {
				return failedf("sandbox %q is ready: its pod has to be stopped first", id)
			}
			return r.e.RemoveSandbox(ctx, id)
		}
		rec, err := r.Store.Get(ctx, id)
		if err != nil {
			return err
		}
		if err := r.Store.Delete(ctx, id); err != nil {
			return err
		}
		r.e.emitGuest(rec, "destroy")
		return nil
	}
	return r.Store.Delete(ctx, id)
}

// exact finds a container by its whole id.
func (r *registry) exact(id string) *container {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.byID[id]
}

func (r *sandboxes) exact(id string) *sandbox {
	for _, s := range r.all() {
		if s.id == id {
			return s
		}
	}
	return nil
}

// containerRecord is a container of the engine's in containerd's terms.
func (e *Engine) containerRecord(c *container) containers.Container {
	v := c.view()
	out := containers.Container{
		ID: v.ID, Labels: maps.Clone(v.Labels), Image: v.ImageName, Runtime: containers.RuntimeInfo{Name: RuntimeHako},
		Snapshotter: v.Snapshotter, SnapshotKey: v.SnapshotKey, CreatedAt: v.Created, UpdatedAt: v.Created, Spec: e.specOf(v),
	}
	if v.Config.Runtime != "" && v.Config.Runtime != "hako" {
		out.Runtime.Name = v.Config.Runtime
	}
	if out.Labels == nil {
		out.Labels = map[string]string{}
	}
	c.mu.Lock()
	maps.Copy(out.Labels, c.rec.ClientLabels)
	c.mu.Unlock()
	if p := v.Config.Pod; p != nil {
		out.SandboxID, out.Image = p.Sandbox, p.UserImage
		out.Labels[criKind] = criKindContainer
	} else {
		out.Labels[nerdctlName] = v.Name // by which nerdctl finds it
	}
	return out
}

// specOf is the OCI configuration of a container: what it runs with, or else what is known before.
func (e *Engine) specOf(v Container) typeurl.Any {
	raw, err := os.ReadFile(filepath.Join(e.bundle(v.ID), "config.json"))
	if err != nil || !json.Valid(raw) {
		s := specs.Spec{
			Version: "1.0.2", Hostname: v.Hostname, Annotations: v.Config.Annotations, Root: &specs.Root{Path: "rootfs", Readonly: v.Config.ReadonlyRootfs},
			Process: &specs.Process{Terminal: v.Config.TTY, Args: append([]string{v.Path}, v.Args...), Env: v.Env, Cwd: workingDir(v.WorkingDir)},
			Linux:   &specs.Linux{},
		}
		if raw, err = json.Marshal(s); err != nil {
			raw = []byte("{}")
		}
	}
	return &anypb.Any{TypeUrl: specType, Value: annotated(raw)}
}

// annotated adds to an OCI configuration what nerdctl wants to know before it removes a container: which networks it has to take
// down. None is its own.
func annotated(raw []byte) []byte {
	var spec map[string]json.RawMessage
	if json.Unmarshal(raw, &spec) != nil {
		return raw
	}
	annotations := map[string]string{}
	if a, ok := spec["annotations"]; ok && json.Unmarshal(a, &annotations) != nil || annotations == nil || annotations[nerdctlNetworks] != "" {
		return raw
	}
	annotations[nerdctlNetworks] = `["none"]`
	a, err := json.Marshal(annotations)
	if err == nil {
		spec["annotations"] = a
		a, err = json.Marshal(spec)
	}
	if err != nil {
		return raw
	}
	return a
}

// sandboxContainer is a pod's sandbox in containerd's terms.
func sandboxContainer(s Sandbox) containers.Container {
	labels := maps.Clone(s.Config.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	labels[criKind] = criKindSandbox
	raw, err := json.Marshal(specs.Spec{Version: "1.0.2", Hostname: s.Config.Hostname, Annotations: s.Config.Annotations, Linux: &specs.Linux{}})
	if err != nil {
		raw = []byte("{}")
	}
	return containers.Container{
		ID: s.ID, Labels: labels, Runtime: containers.RuntimeInfo{Name: RuntimeHako}, CreatedAt: s.Created, UpdatedAt: s.Created,
		Spec: &anypb.Any{TypeUrl: specType, Value: raw}, SandboxID: s.ID,
	}
}
