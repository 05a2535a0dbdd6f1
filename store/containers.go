package store

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/types/known/anypb"
)

// containerStore implements containerd's containers.Store: what clients of its API say of
// their containers.
type containerStore Store

var _ containers.Store = (*containerStore)(nil)

// Containers is the store of container records.
func (s *Store) Containers() containers.Store { return (*containerStore)(s) }

// anyRecord is a message of any type, as it came.
type anyRecord struct {
	Type  string `json:"type"`
	Value []byte `json:"value,omitempty"`
}

type containerRecord struct {
	Labels         map[string]string     `json:"labels,omitempty"`
	Image          string                `json:"image,omitempty"`
	Runtime        string                `json:"runtime"`
	RuntimeOptions *anyRecord            `json:"runtimeOptions,omitempty"`
	Spec           *anyRecord            `json:"spec,omitempty"`
	Snapshotter    string                `json:"snapshotter,omitempty"`
	SnapshotKey    string                `json:"snapshotKey,omitempty"`
	Sandbox        string                `json:"sandbox,omitempty"`
	Extensions     map[string]*anyRecord `json:"extensions,omitempty"`
	Created        time.Time             `json:"created"`
	Updated        time.Time             `json:"updated"`
}

func recordAny(a typeurl.Any) *anyRecord {
	if a == nil || a.GetTypeUrl() == "" && len(a.GetValue()) == 0 {
		return nil
	}
	return &anyRecord{a.GetTypeUrl(), a.GetValue()}
}

func (r *anyRecord) any() typeurl.Any {
	if r == nil {
		return nil
	}
	return &anypb.Any{TypeUrl: r.Type, Value: r.Value}
}

func recordAnys(m map[string]typeurl.Any) map[string]*anyRecord {
	var out map[string]*anyRecord
	for k, v := range m {
		if r := recordAny(v); r != nil {
			if out == nil {
				out = map[string]*anyRecord{}
			}
			out[k] = r
		}
	}
	return out
}

func anys(m map[string]*anyRecord) map[string]typeurl.Any {
	var out map[string]typeurl.Any
	for k, v := range m {
		if v != nil {
			if out == nil {
				out = map[string]typeurl.Any{}
			}
			out[k] = v.any()
		}
	}
	return out
}

func recordContainer(c containers.Container) containerRecord {
	return containerRecord{
		Labels: c.Labels, Image: c.Image, Runtime: c.Runtime.Name, RuntimeOptions: recordAny(c.Runtime.Options), Spec: recordAny(c.Spec),
		Snapshotter: c.Snapshotter, SnapshotKey: c.SnapshotKey, Sandbox: c.SandboxID, Extensions: recordAnys(c.Extensions),
		Created: c.CreatedAt, Updated: c.UpdatedAt,
	}
}

func (r containerRecord) container(id string) containers.Container {
	return containers.Container{
		ID: id, Labels: r.Labels, Image: r.Image, Runtime: containers.RuntimeInfo{Name: r.Runtime, Options: r.RuntimeOptions.any()}, Spec: r.Spec.any(),
		Snapshotter: r.Snapshotter, SnapshotKey: r.SnapshotKey, SandboxID: r.Sandbox, Extensions: anys(r.Extensions),
		CreatedAt: r.Created, UpdatedAt: r.Updated,
	}
}

func (s *Store) containerTable() table[containerRecord, containers.Container] {
	return table[containerRecord, containers.Container]{s, sectionContainers, `container %q in namespace %q`, containerRecord.container, AdaptContainer}
}

func (s *containerStore) Get(ctx context.Context, id string) (containers.Container, error) {
	return (*Store)(s).containerTable().get(ctx, id)
}

func (s *containerStore) List(ctx context.Context, fs ...string) ([]containers.Container, error) {
	return (*Store)(s).containerTable().list(ctx, fs)
}

// AdaptContainer lets containerd's filters look at a container.
func AdaptContainer(c containers.Container) filters.Adaptor {
	return Adapt(c.Labels, func(p []string) string {
		switch p[0] {
		case "id":
			return c.ID
		case "runtime":
			return runtimeField(c.Runtime.Name, p)
		case "image":
			return c.Image
		case "snapshotter":
			return c.Snapshotter
		case "snapshotkey":
			return c.SnapshotKey
		case "sandbox":
			return c.SandboxID
		}
		return ""
	})
}

// runtimeField is the "runtime.name" part of a filter adaptor.
func runtimeField(name string, path []string) string {
	if len(path) > 1 && path[1] == "name" {
		return name
	}
	return ""
}

func (s *containerStore) Create(ctx context.Context, c containers.Container) (containers.Container, error) {
	ns, err := Namespace(ctx)
	if err != nil {
		return containers.Container{}, err
	}
	if err := validateContainer(c); err != nil {
		return containers.Container{}, wrap(err, "create container %q", c.ID)
	}
	c.Labels, c.Extensions = CloneLabels(c.Labels), maps.Clone(c.Extensions)
	err = s.db.Update(ctx, func(tx *bolt.Tx) error {
		b, err := MakeNamespaceBucket(tx, ns, sectionContainers)
		if err != nil {
			return err
		}
		if b.Get([]byte(c.ID)) != nil {
			return errdefs.ErrAlreadyExists
		}
		c.CreatedAt = now()
		c.UpdatedAt = c.CreatedAt
		return (*Store)(s).putContainer(b, ns, c)
	})
	if err != nil {
		return containers.Container{}, wrap(err, "container %q", c.ID)
	}
	(*Store)(s).Publish(ctx, "/containers/create", &apievents.ContainerCreate{
		ID: c.ID, Image: c.Image, Runtime: &apievents.ContainerCreate_Runtime{Name: c.Runtime.Name, Options: typeurl.MarshalProto(c.Runtime.Options)},
	})
	return c, nil
}

func (s *containerStore) Update(ctx context.Context, c containers.Container, fieldpaths ...string) (out containers.Container, err error) {
	ns, err := Namespace(ctx)
	if err != nil {
		return out, err
	}
	if c.ID == "" {
		return out, fmt.Errorf("update container: id is missing: %w", errdefs.ErrInvalidArgument)
	}
	err = s.db.Update(ctx, func(tx *bolt.Tx) error {
		b := NamespaceBucket(tx, ns, sectionContainers)
		r, err := readRecord[containerRecord](b, c.ID)
		if err != nil {
			return err
		}
		out = r.container(c.ID)
		paths := fieldpaths
		if len(paths) == 0 {
			switch {
			case c.Snapshotter != out.Snapshotter:
				return fmt.Errorf("the snapshotter cannot be changed: %w", errdefs.ErrInvalidArgument)
			case c.Runtime.Name != out.Runtime.Name:
				return fmt.Errorf("the runtime cannot be changed: %w", errdefs.ErrInvalidArgument)
			}
			paths = []string{"labels", "spec", "extensions", "image", "snapshotkey"}
		}
		for _, p := range paths {
			if err := updateContainerField(&out, c, p); err != nil {
				return err
			}
		}
		if err := validateContainer(out); err != nil {
			return err
		}
		out.UpdatedAt = now()
		return (*Store)(s).putContainer(b, ns, out)
	})
	if err != nil {
		return containers.Container{}, wrap(err, "update container %q", c.ID)
	}
	(*Store)(s).Publish(ctx, "/containers/update", &apievents.ContainerUpdate{ID: out.ID, Image: out.Image, Labels: out.Labels, SnapshotKey: out.SnapshotKey})
	s.gc.schedule() // of the snapshot that it had
	return out, nil
}

func updateContainerField(have *containers.Container, want containers.Container, path string) error {
	if updateMaps(&have.Labels, &have.Extensions, want.Labels, want.Extensions, path) {
		return nil
	}
	switch path {
	case "spec":
		have.Spec = want.Spec
	case "image":
		have.Image = want.Image
	case "snapshotkey":
		have.SnapshotKey = want.SnapshotKey
	default:
		return fmt.Errorf("field %q cannot be updated: %w", path, errdefs.ErrInvalidArgument)
	}
	return nil
}

// updateMaps applies the part of a field mask that containers and sandboxes share: their labels and extensions. It tells whether path
// is one of these.
func updateMaps(labels *map[string]string, extensions *map[string]typeurl.Any, wantLabels map[string]string, wantExtensions map[string]typeurl.Any, path string) (ok bool) {
	if *labels, ok = UpdateLabels(*labels, wantLabels, path); ok {
		return true
	}
	*extensions, ok = updateExtensions(*extensions, wantExtensions, path)
	return ok
}

// updateExtensions is UpdateLabels of "extensions" and "extensions.KEY".
func updateExtensions(have, want map[string]typeurl.Any, path string) (_ map[string]typeurl.Any, ok bool) {
	if path == "extensions" {
		return maps.Clone(want), true
	}
	key, ok := strings.CutPrefix(path, "extensions.")
	if !ok {
		return have, false
	}
	out := maps.Clone(have)
	if v := want[key]; v != nil {
		if out == nil {
			out = map[string]typeurl.Any{}
		}
		out[key] = v
	} else {
		delete(out, key)
	}
	return out, true
}

func (s *containerStore) Delete(ctx context.Context, id string) error {
	if err := (*Store)(s).containerTable().delete(ctx, id, nil); err != nil {
		return err
	}
	(*Store)(s).Publish(ctx, "/containers/delete", &apievents.ContainerDelete{ID: id})
	s.gc.schedule()
	return nil
}

// putContainer also tells a collection under way that the container is there.
func (s *Store) putContainer(b *bolt.Bucket, ns string, c containers.Container) error {
	s.Touch(Node{Type: resourceContainers, Namespace: ns, ID: c.ID})
	return writeRecord(b, c.ID, recordContainer(c))
}

func validateContainer(c containers.Container) error {
	if err := identifiers.Validate(c.ID); err != nil {
		return fmt.Errorf("id: %w", err)
	}
	if err := validateMaps(c.Labels, c.Extensions); err != nil {
		return err
	}
	switch {
	case c.Runtime.Name == "":
		return fmt.Errorf("the runtime's name is missing: %w", errdefs.ErrInvalidArgument)
	case c.SnapshotKey != "" && c.Snapshotter == "":
		return fmt.Errorf("a snapshot without a snapshotter: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

func validateMaps(labels map[string]string, extensions map[string]typeurl.Any) error {
	if _, nameless := extensions[""]; nameless {
		return fmt.Errorf("an extension has no name: %w", errdefs.ErrInvalidArgument)
	}
	return ValidateLabels(labels)
}

// markContainers adds what containers hold.
func (s *Store) markContainers(tx *bolt.Tx, ns string, w *walk) {
	s.containerTable().mark(tx, w, ns, func(id string, r containerRecord) {
		w.roots = append(append(w.roots, Node{Type: resourceContainers, Namespace: ns, ID: id}), containerRefs(ns, r)...)
	})
}

func containerRefs(ns string, r containerRecord) []Node {
	refs := labelRefs(ns, r.Labels)
	if r.SnapshotKey != "" && r.Snapshotter != "" {
		refs = append(refs, SnapshotNode(r.Snapshotter, ns, r.SnapshotKey))
	}
	return refs
}
