package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/store"
)

// Finding is one thing that a check found: see docs/check.md.
type Finding = store.Finding

// Problems of the engine's records.
const (
	ProblemContainer       = "container-damaged"
	ProblemContainerLayer  = "container-snapshot-missing"
	ProblemContainerFolder = "container-folder-missing"
	ProblemContainerImage  = "container-image-missing"
	ProblemContainerName   = "container-name-taken"
	ProblemContainerVolume = "container-volume-missing"
	ProblemContainerPod    = "container-pod-missing"
	ProblemSandbox         = "sandbox-damaged"
	ProblemVolume          = "volume-damaged"
	ProblemVolumeFolder    = "volume-folder-missing"
	ProblemStrayContainer  = "container-folder-stray"
	ProblemStrayVolume     = "volume-folder-stray"
	ProblemStrayBundle     = "bundle-stray"
)

const roomEngine = "engine"

// InUse tells whether a container that runs needs an object.
type InUse = func(store.Node) bool

// Checked is a room that can be checked and repaired.
type Checked interface {
	// Check looks for what is wrong, and changes nothing. An error means that it could not look.
	Check(ctx context.Context, o store.CheckOptions) ([]Finding, error)
	// Repair does away with a finding and tells how. errdefs.ErrUnavailable: it can do
	// nothing about it, or not yet.
	Repair(ctx context.Context, f Finding, inUse InUse) (string, error)
}

// Garbage is the collector, which must not run beside a repair.
type Garbage interface {
	// GC collects once.
	GC(ctx context.Context) (store.GCStats, error)
	// HoldGC keeps collections from running until release is called; it waits for one under way.
	HoldGC() (release func())
}

// CheckOptions of a check of the whole system.
type CheckOptions struct {
	Deep, Repair bool
	Progress     func(what string, done, total int64)
}

// CheckReport is what a check came to.
type CheckReport struct {
	// Findings are what is there now; with Repair also what was repaired.
	Findings []Finding `json:"findings"`
	// Collected is how many bytes of garbage were removed before the check.
	Collected int64         `json:"collected,omitempty"`
	Deep      bool          `json:"deep"`
	Took      time.Duration `json:"took"` // nanoseconds
}

// Clean tells that nothing but notes is left.
func (r CheckReport) Clean() bool { return len(r.left()) == 0 }

// left are the findings which a repair did not do away with.
func (r CheckReport) left() (left []Finding) {
	for _, f := range r.Findings {
		if f.Severity != store.Note && f.Repaired == "" {
			left = append(left, f)
		}
	}
	return left
}

// repairPasses is how often a repair goes through the rooms: what one has dropped, another
// may have to follow.
const repairPasses = 4

// CheckRooms checks rooms, the lowest first. With o.Repair it mends what it finds, again
// and again until nothing changes, and then checks once more. garbage may be nil: then nobody
// collects.
func CheckRooms(ctx context.Context, rooms []Checked, garbage Garbage, inUse InUse, o CheckOptions) (r CheckReport, err error) {
	began := time.Now()
	defer func() { r.Took = time.Since(began) }()
	r.Deep = o.Deep
	if garbage != nil {
		st, err := garbage.GC(ctx)
		if err != nil {
			return r, fmt.Errorf("before the check: %w", err)
		}
		r.Collected = st.Bytes
		if o.Repair {
			defer garbage.HoldGC()()
		}
	}
	var repaired []Finding
	for pass := 0; ; pass++ {
		found, byRoom, err := checkAll(ctx, rooms, store.CheckOptions{Deep: o.Deep, Progress: o.Progress})
		if err != nil {
			return r, err
		}
		r.Findings = append(append([]Finding{}, repaired...), found...)
		if !o.Repair || pass == repairPasses {
			return r, nil
		}
		changed := false
		for i := range r.Findings[len(repaired):] {
			f := &r.Findings[len(repaired)+i]
			if f.Severity == store.Note {
				continue
			}
			done, err := byRoom[i].Repair(ctx, *f, inUse)
			switch {
			case err == nil:
				f.Repaired, changed = done, true
			case errors.Is(err, context.Canceled):
				return r, err
			default:
				f.Failed = err.Error()
			}
		}
		if !changed {
			return r, nil
		}
		for _, f := range r.Findings[len(repaired):] {
			if f.Repaired != "" {
				repaired = append(repaired, f)
			}
		}
	}
}

// checkAll gives the findings of all rooms, and for each the room that can repair it.
func checkAll(ctx context.Context, rooms []Checked, o store.CheckOptions) (found []Finding, by []Checked, err error) {
	seen := map[string]bool{}
	first := map[string]Checked{} // a room may find what belongs to another
	for _, room := range rooms {
		fs, err := room.Check(ctx, o)
		if err != nil {
			return nil, nil, err
		}
		for _, f := range fs {
			if first[f.Room] == nil {
				first[f.Room] = room
			}
			if !seen[f.Key()] {
				seen[f.Key()] = true
				found, by = append(found, f), append(by, room)
			}
		}
	}
	for i, f := range found {
		if f.Room == "store" && len(rooms) > 0 {
			by[i] = rooms[0] // the store is the lowest
		}
	}
	return found, by, nil
}

// Check checks the whole system beside its work.
func (e *Engine) Check(ctx context.Context, o CheckOptions) (CheckReport, error) {
	if e.opt.Garbage == nil {
		return CheckReport{}, notImplementedf("this engine was opened without rooms to check")
	}
	records := e.recordCheck()
	records.making = func(id string) bool {
		e.containers.mu.RLock()
		defer e.containers.mu.RUnlock()
		_, making := e.containers.beingMade[id]
		_, known := e.containers.byID[id]
		return making || known
	}
	records.online = true
	return CheckRooms(ctx, append(append([]Checked{}, e.opt.Checked...), records), e.opt.Garbage, records.InUse, o)
}

func (e *Engine) recordCheck() *RecordCheck {
	return &RecordCheck{
		Root: e.opt.Root, State: e.opt.State, Containers: e.opt.Containers, Sandboxes: e.opt.Sandboxes, Volumes: e.opt.Volumes,
		Images: e.opt.Images, Snapshotters: e.opt.Snapshotters,
	}
}

// RecordCheck checks the engine's records. It needs no engine: they are read as they lie
// in the store.
type RecordCheck struct {
	Root, State                    string
	Containers, Sandboxes, Volumes Records
	Images                         Images
	Snapshotters                   map[string]snapshots.Snapshotter

	online bool
	making func(id string) bool // nil: nothing is being made
}

// Check compares the engine's records with each other, with snapshots and with folders.
// What looks wrong must look so twice: it may have been under way.
func (c *RecordCheck) Check(ctx context.Context, o store.CheckOptions) ([]Finding, error) {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	o.Report("reading records", 0, 1)
	first, err := c.check(ctx)
	if err != nil || len(first) == 0 || !c.online {
		return first, err
	}
	select {
	case <-time.After(500 * time.Millisecond):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	again, err := c.check(ctx)
	keys := map[string]bool{}
	for _, f := range first {
		keys[f.Key()] = true
	}
	var found []Finding
	for _, f := range again {
		if keys[f.Key()] {
			found = append(found, f)
		}
	}
	return found, err
}

// checkState is one reading of the records.
type checkState struct {
	c          *RecordCheck
	found      []Finding
	containers map[string]record
	sandboxes  map[string]bool
	volumes    map[string]bool
}

func (s *checkState) add(problem string, sev store.Severity, object, format string, args ...any) {
	s.found = append(s.found, Finding{Room: roomEngine, Problem: problem, Severity: sev, Namespace: Namespace, Object: object, Detail: fmt.Sprintf(format, args...)})
}

func (c *RecordCheck) check(ctx context.Context) ([]Finding, error) {
	s := &checkState{c: c, containers: map[string]record{}, sandboxes: map[string]bool{}, volumes: map[string]bool{}}
	// A folder that is there before its record is looked for cannot have been made later.
	folderLists := map[string][]string{}
	for name, dir := range map[string]string{"containers": filepath.Join(c.Root, "containers"), "volumes": filepath.Join(c.Root, "volumes"), "bundles": filepath.Join(c.State, "containers")} {
		folderLists[name] = folders(dir)
	}
	// ForEach joins the errors of single records; each was noted by the function.
	_ = c.Sandboxes.ForEach(func(id string, raw []byte) error {
		var r struct {
			Version int `json:"version"`
		}
		if err := json.Unmarshal(raw, &r); err != nil {
			s.add(ProblemSandbox, store.Damage, id, "%v", err)
		}
		s.sandboxes[id] = true
		return nil
	})
	_ = c.Volumes.ForEach(func(id string, raw []byte) error {
		var v Volume
		if err := json.Unmarshal(raw, &v); err != nil || v.Name != id {
			s.add(ProblemVolume, store.Damage, id, "its record cannot be read (%v)", err)
			return nil
		}
		s.volumes[id] = true
		return nil
	})
	names := map[string]string{}
	_ = c.Containers.ForEach(func(id string, raw []byte) error {
		r, err := parseRecord(id, raw)
		if err != nil {
			s.add(ProblemContainer, store.Damage, id, "%v", err)
			s.containers[id] = record{}
			return nil
		}
		if other, taken := names[r.Name]; taken {
			s.add(ProblemContainerName, store.Note, id, "its name %s is also that of %s", r.Name, other)
		}
		names[r.Name] = id
		s.containers[id] = r
		return nil
	})
	for id, r := range s.containers {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if r.ID != "" {
			s.container(ctx, id, r)
		}
	}
	for name := range s.volumes {
		if err := c.volumeFolder(name); err != nil {
			s.add(ProblemVolumeFolder, store.Damage, name, "its folder: %v", err)
		}
	}
	s.folders(folderLists)
	return s.found, nil
}

func (s *checkState) container(ctx context.Context, id string, r record) {
	for _, key := range append(imageKeys(r.ID, r.Config), r.SnapshotKey) {
		sn := s.c.Snapshotters[r.Snapshotter]
		if sn == nil {
			s.add(ProblemContainerLayer, store.Note, id, "%s: its snapshotter %s is not configured", r.Name, r.Snapshotter)
			continue
		}
		if _, err := sn.Stat(ctx, key); errdefs.IsNotFound(err) {
			s.add(ProblemContainerLayer, store.Damage, id, "%s: its snapshot %s of %s is missing", r.Name, key, r.Snapshotter)
		}
	}
	if st, err := os.Stat(filepath.Join(s.c.Root, "containers", id)); err != nil || !st.IsDir() {
		s.add(ProblemContainerFolder, store.Damage, id, "%s: its folder: %v", r.Name, err)
	}
	for _, m := range r.Mounts {
		if m.Kind == MountVolume && !s.volumes[m.Source] {
			s.add(ProblemContainerVolume, store.Damage, id, "%s: its volume %s is missing", r.Name, m.Source)
		}
	}
	if p := r.Config.Pod; p != nil && !s.sandboxes[p.Sandbox] {
		s.add(ProblemContainerPod, store.Damage, id, "%s: its sandbox %s is missing", r.Name, p.Sandbox)
	}
	if _, err := s.c.Images.Get(ctx, r.ImageID, nil); errdefs.IsNotFound(err) {
		s.add(ProblemContainerImage, store.Note, id, "%s: its image %s is not here any more", r.Name, r.ImageID)
	}
}

func (s *checkState) folders(lists map[string][]string) {
	making := func(id string) bool { return s.c.making != nil && s.c.making(id) }
	for _, id := range lists["containers"] {
		if _, ok := s.containers[id]; !ok && !making(id) {
			s.add(ProblemStrayContainer, store.Leftover, id, "no container has the folder %s", filepath.Join(s.c.Root, "containers", id))
		}
	}
	for _, id := range lists["bundles"] {
		if _, ok := s.containers[id]; !ok && !making(id) {
			s.add(ProblemStrayBundle, store.Leftover, id, "no container has the bundle %s", filepath.Join(s.c.State, "containers", id))
		}
	}
	for _, name := range lists["volumes"] {
		// A removal that is under way, or was cut short: as long as there is a record the next start takes it back.
		of, _ := strings.CutPrefix(name, doomedPrefix)
		if !s.volumes[of] && !s.c.hasRecord(s.c.Volumes, of) {
			s.add(ProblemStrayVolume, store.Leftover, name, "no volume has the folder %s", filepath.Join(s.c.Root, "volumes", name))
		}
	}
}

// volumeFolder looks for the folder of a volume that had a record. Its removal, which renames the folder and then
// deletes the record, may be under way.
func (c *RecordCheck) volumeFolder(name string) error {
	look := func() error {
		st, err := os.Stat(filepath.Join(c.Root, "volumes", name, "_data"))
		if err == nil && !st.IsDir() {
			err = errors.New("it is no folder")
		}
		return err
	}
	err := look()
	if err == nil {
		return nil
	}
	// In this order: what has the other name no more has no record either, or its own name again.
	if _, err := os.Lstat(filepath.Join(c.Root, "volumes", doomedPrefix+name)); err == nil {
		return nil
	}
	if !c.hasRecord(c.Volumes, name) {
		return nil
	}
	return look()
}

func (c *RecordCheck) hasRecord(r Records, id string) bool {
	var v any
	return !errdefs.IsNotFound(r.Get(context.Background(), id, &v))
}

// running tells whether a container may have processes: its bundle is there from the
// start to the recorded exit.
func (c *RecordCheck) running(id string) bool {
	_, err := os.Lstat(filepath.Join(c.State, "containers", id, "config.json"))
	return err == nil
}

// InUse tells whether a container needs an image, or one that runs a snapshot.
func (c *RecordCheck) InUse(n store.Node) (used bool) {
	ctx := namespaces.WithNamespace(context.Background(), Namespace)
	if n.Namespace != Namespace {
		return true // nothing is known of the containers of other namespaces
	}
	if tasks, err := os.ReadDir(filepath.Join(c.State, taskFolder, Namespace)); n.Type != "images" && (len(tasks) > 0 || err != nil && !errors.Is(err, fs.ErrNotExist)) {
		return true // nor of what tasks have mounted
	}
	_ = c.Containers.ForEach(func(id string, raw []byte) error {
		r, err := parseRecord(id, raw)
		if err != nil {
			used = used || c.running(id)
			return nil
		}
		if n.Type == "images" {
			img, err := c.Images.Get(ctx, n.ID, nil)
			used = used || r.ImageName == n.ID || err == nil && img.ID.String() == r.ImageID || c.running(id) && err != nil
			return nil
		}
		sn := c.Snapshotters[r.Snapshotter]
		if !c.running(id) || sn == nil || n.Type != "snapshots/"+r.Snapshotter {
			return nil
		}
		for key := r.SnapshotKey; key != ""; {
			if key == n.ID {
				used = true
				return nil
			}
			info, err := sn.Stat(ctx, key)
			if err != nil {
				used = true // it cannot be told
				return nil
			}
			key = info.Parent
		}
		return nil
	})
	return used
}

// Repair mends what Check found. What a container that runs needs stays.
func (c *RecordCheck) Repair(ctx context.Context, f Finding, _ InUse) (done string, err error) {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	defer func() {
		if err != nil {
			err = fmt.Errorf("repair %s: %w", f.Object, err)
		}
	}()
	if f.Object == "" || f.Object != filepath.Base(f.Object) || strings.HasPrefix(f.Object, "..") {
		return "", errdefs.ErrInvalidArgument
	}
	switch f.Problem {
	case ProblemContainer, ProblemSandbox, ProblemVolume:
		if c.running(f.Object) {
			return "", fmt.Errorf("it runs: %w", errdefs.ErrFailedPrecondition)
		}
		r := map[string]Records{ProblemContainer: c.Containers, ProblemSandbox: c.Sandboxes, ProblemVolume: c.Volumes}[f.Problem]
		if f.Problem == ProblemVolume {
			// Its files are worth more than what the record said.
			v := Volume{Name: f.Object, Driver: "local", Created: time.Now().UTC()}
			return "made anew, without labels and options", r.Put(ctx, f.Object, &v)
		}
		return "dropped the record", r.Delete(ctx, f.Object)
	case ProblemContainerLayer:
		return c.repairLayer(ctx, f.Object)
	case ProblemContainerFolder:
		return "made the folder anew", mkdir(filepath.Join(c.Root, "containers", f.Object), 0o710)
	case ProblemVolumeFolder:
		return "made the folder anew: it is empty", makeVolumeFolder(filepath.Join(c.Root, "volumes", f.Object, "_data"))
	case ProblemContainerVolume:
		return c.repairVolumes(ctx, f.Object)
	case ProblemStrayContainer:
		if c.running(f.Object) {
			return "", fmt.Errorf("it runs: %w", errdefs.ErrFailedPrecondition)
		}
		return "removed", os.RemoveAll(filepath.Join(c.Root, "containers", f.Object))
	case ProblemStrayVolume:
		if strings.HasPrefix(f.Object, doomedPrefix) {
			return "removed", removeFiles(filepath.Join(c.Root, "volumes", f.Object))
		}
		// Somebody's files: they get a volume.
		v := Volume{Name: f.Object, Driver: "local", Created: time.Now().UTC()}
		return "made a volume of it", errors.Join(makeVolumeFolder(filepath.Join(c.Root, "volumes", f.Object, "_data")), c.Volumes.Put(ctx, f.Object, &v))
	}
	return "", errdefs.ErrUnavailable
}

// repairLayer gives a container an empty layer in place of the one that was lost.
func (c *RecordCheck) repairLayer(ctx context.Context, id string) (string, error) {
	var raw json.RawMessage
	if err := c.Containers.Get(ctx, id, &raw); err != nil {
		return "", err
	}
	r, err := parseRecord(id, raw)
	if err != nil {
		return "", err
	}
	sn := c.Snapshotters[r.Snapshotter]
	if sn == nil || c.running(id) || r.Config.Pod != nil {
		return "", fmt.Errorf("remove the container: %w", errdefs.ErrFailedPrecondition)
	}
	img, err := c.Images.Get(ctx, r.ImageID, nil)
	if err != nil {
		return "", err
	}
	chain, err := c.Images.Unpack(ctx, img, r.Snapshotter)
	if err != nil {
		return "", err
	}
	mounts, err := sn.Prepare(ctx, r.SnapshotKey, chain, ownedBy(id))
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return "", err
	}
	return "made anew, as its image is: what was written to it is lost", markRoot(mounts)
}

// repairVolumes makes empty volumes for those that a container lacks.
func (c *RecordCheck) repairVolumes(ctx context.Context, id string) (string, error) {
	var raw json.RawMessage
	if err := c.Containers.Get(ctx, id, &raw); err != nil {
		return "", err
	}
	r, err := parseRecord(id, raw)
	if err != nil {
		return "", err
	}
	for _, m := range r.Mounts {
		if m.Kind != MountVolume || c.hasRecord(c.Volumes, m.Source) || !validName.MatchString(m.Source) {
			continue
		}
		v := Volume{Name: m.Source, Driver: "local", Created: time.Now().UTC()}
		if err := errors.Join(makeVolumeFolder(filepath.Join(c.Root, "volumes", v.Name, "_data")), c.Volumes.Put(ctx, v.Name, &v)); err != nil {
			return "", err
		}
	}
	return "made the volume anew: it is empty", nil
}
