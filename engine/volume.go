package engine

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hako-engine/hako/internal/durable"
	"github.com/hako-engine/hako/internal/undo"
)

// The life of a volume: create → in use by any number of containers ⇄ unused → removed.
// "In use" is not stored: it is asked of the containers, whose mounts name volumes.
//
// A volume lives in ROOT/volumes/NAME/_data. The folder above _data is closed to
// everybody but root; _data itself belongs to the container's user.

// volumes are the named volumes of the node.
type volumes struct {
	whole bool       // all records could be read
	mu    sync.Mutex // guards the maps; never held over I/O
	all   map[string]Volume
	busy  map[string]int // creations of containers under way that use the volume
	// removing keeps a volume from being used while its files are being deleted.
	removing map[string]bool
	mounts   map[string]*volumeMount  // of those with mount options
	changing map[string]chan struct{} // names whose volume is being made; closed at the end
}

// maxVolumeName is the longest name: a folder's.
const maxVolumeName = 255

func (e *Engine) loadVolumes(ctx context.Context) error {
	e.volumes = volumes{all: map[string]Volume{}, busy: map[string]int{}, removing: map[string]bool{}, mounts: map[string]*volumeMount{}, changing: map[string]chan struct{}{}}
	err := e.opt.Volumes.ForEach(func(id string, raw []byte) error {
		var v Volume
		if err := json.Unmarshal(raw, &v); err != nil {
			return fmt.Errorf("volume %s: %w", id, err)
		}
		v.Mountpoint = e.volumePath(id)
		e.volumes.all[id] = v
		return nil
	})
	e.volumes.whole = err == nil
	if err != nil { // one bad record must not keep the node down
		e.log.Error("some volumes could not be read and are not shown", "error", err)
	}
	return nil
}

func (e *Engine) volumePath(name string) string {
	return filepath.Join(e.opt.Root, "volumes", name, "_data")
}

// CreateVolume makes a volume, or gives the one that already has the name.
func (e *Engine) CreateVolume(ctx context.Context, v Volume) (Volume, error) {
	out, made, err := e.createVolume(ctx, v)
	if made {
		e.emitFor("volume", "create", out.Name, "driver", out.Driver)
	}
	return out, err
}

func (e *Engine) createVolume(ctx context.Context, v Volume) (_ Volume, made bool, err error) {
	if v.Name == "" {
		v.Name = newID()
		v.Anonymous = true
	}
	if !validName.MatchString(v.Name) || len(v.Name) > maxVolumeName {
		return v, false, invalidf("create %s: %q includes invalid characters for a local volume name, only "+
			"\"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path", v.Name, v.Name)
	}
	if v.Driver == "" {
		v.Driver = "local"
	}
	if v.Driver != "local" {
		return v, false, notFoundf("create %s: error looking up volume plugin %s: plugin %q not found", v.Name, v.Driver, v.Driver)
	}
	if err := checkVolumeOptions(v.Name, v.Options); err != nil {
		return v, false, err
	}
	e.volumes.mu.Lock()
	have, exists := e.volumes.all[v.Name]
	removing := e.volumes.removing[v.Name]
	e.volumes.mu.Unlock()
	if removing {
		return v, false, conflictf("volume %s is being removed", v.Name)
	}
	if exists {
		return have, false, nil
	}

	unlock, err := e.volumes.lock(ctx, v.Name)
	if err != nil {
		return v, false, err
	}
	defer unlock()
	e.volumes.mu.Lock()
	have, exists = e.volumes.all[v.Name]
	e.volumes.mu.Unlock()
	if exists { // somebody else was faster
		return have, false, nil
	}

	v.Created = time.Now().UTC()
	v.Mountpoint = e.volumePath(v.Name)
	var u undo.Stack
	defer func() { err = errors.Join(err, u.Run(ctx)) }()
	// Made under the name of one that is being removed: what a crash leaves of it is
	// either renamed or deleted, as the record says. A folder that is there already is taken as it is.
	dir := filepath.Dir(v.Mountpoint)
	_, err = os.Lstat(dir)
	made = errors.Is(err, fs.ErrNotExist)
	at := dir
	if made {
		at = e.doomedPath(v.Name)
		if err := removeFiles(at); err != nil {
			return v, false, fmt.Errorf("create volume %s: %w", v.Name, err)
		}
		u.Add("volume folder", func(context.Context) error { return errors.Join(removeFiles(at), removeFiles(dir)) })
	}
	if err := makeVolumeFolder(filepath.Join(at, "_data")); err != nil {
		return v, false, fmt.Errorf("create volume %s: %w", v.Name, err)
	}
	u.Add("record", func(ctx context.Context) error { return e.opt.Volumes.Delete(ctx, v.Name) })
	if err := e.opt.Volumes.Put(ctx, v.Name, &v); err != nil {
		return v, false, fmt.Errorf("create volume %s: %w", v.Name, err)
	}
	if made {
		if err := os.Rename(at, dir); err != nil {
			return v, false, fmt.Errorf("create volume %s: %w", v.Name, err)
		}
	}
	e.volumes.mu.Lock()
	e.volumes.all[v.Name] = v
	e.volumes.mu.Unlock()
	u.Release()
	return v, true, nil
}

// makeVolumeFolder makes a volume's folder, if there is none, which only root can list, and in it
// that of the files. The folder of all volumes (0710) lets nobody else in.
func makeVolumeFolder(data string) error {
	if err := os.Mkdir(filepath.Dir(data), 0o701); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := os.Mkdir(data, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	} else if err == nil {
		if err := os.Chmod(data, 0o755); err != nil {
			return err
		}
	}
	return os.Chmod(filepath.Dir(data), 0o701)
}

// lock waits until nobody else makes or removes the volume of a name.
func (v *volumes) lock(ctx context.Context, name string) (unlock func(), err error) {
	for {
		v.mu.Lock()
		busy := v.changing[name]
		if busy == nil {
			mine := make(chan struct{})
			v.changing[name] = mine
			v.mu.Unlock()
			return func() {
				v.mu.Lock()
				delete(v.changing, name)
				v.mu.Unlock()
				close(mine)
			}, nil
		}
		v.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// useVolume keeps a volume from being removed until done is called.
func (e *Engine) useVolume(name string) (done func(), err error) {
	e.volumes.mu.Lock()
	defer e.volumes.mu.Unlock()
	if e.volumes.removing[name] {
		return nil, conflictf("volume %s is being removed", name)
	}
	e.volumes.busy[name]++
	return func() {
		e.volumes.mu.Lock()
		defer e.volumes.mu.Unlock()
		if e.volumes.busy[name]--; e.volumes.busy[name] <= 0 {
			delete(e.volumes.busy, name)
		}
	}, nil
}

// volumeUsers gives the containers that mount each volume.
func (e *Engine) volumeUsers() map[string][]string {
	users := map[string][]string{}
	for _, c := range e.containers.all() {
		v := c.view()
		for _, m := range v.Mounts {
			if m.Kind == MountVolume {
				users[m.Source] = append(users[m.Source], v.ID)
			}
		}
	}
	return users
}

// Volumes lists volumes by name. Filters: dangling, driver, label, name.
func (e *Engine) Volumes(ctx context.Context, f Filters) ([]Volume, error) {
	if err := f.check("dangling", "driver", "label", "label!", "name"); err != nil {
		return nil, err
	}
	dangling, asked, err := f.bool("dangling")
	if err != nil {
		return nil, err
	}
	users := e.volumeUsers()
	e.volumes.mu.Lock()
	defer e.volumes.mu.Unlock()
	out := []Volume{}
	for _, v := range e.volumes.all {
		v.RefCount = len(users[v.Name])
		v.Size = -1
		if asked && dangling != (v.RefCount == 0) || !f.labels(v.Labels) ||
			!f.any("driver", func(d string) bool { return d == v.Driver }) ||
			!f.any("name", func(n string) bool { return matchName(v.Name, n) }) {
			continue
		}
		out = append(out, v)
	}
	slices.SortFunc(out, func(a, b Volume) int { return cmp.Compare(a.Name, b.Name) })
	return out, nil
}

// Volume gives one volume by its exact name.
func (e *Engine) Volume(ctx context.Context, name string) (Volume, error) {
	users := e.volumeUsers()
	e.volumes.mu.Lock()
	defer e.volumes.mu.Unlock()
	v, ok := e.volumes.all[name]
	if !ok {
		return Volume{}, notFoundf("get %s: no such volume", name)
	}
	v.RefCount, v.Size = len(users[name]), -1
	return v, nil
}

// RemoveVolume deletes a volume that no container uses. With force, a volume that
// does not exist is no error.
func (e *Engine) RemoveVolume(ctx context.Context, name string, force bool) error {
	err := e.removeVolume(ctx, name)
	if force && err != nil {
		if _, gone := e.Volume(ctx, name); gone != nil {
			return nil
		}
	}
	return err
}

func (e *Engine) removeVolume(ctx context.Context, name string) error {
	// First the mark, then the question: a container that is created in between sees
	// the mark, one that was created before is seen.
	e.volumes.mu.Lock()
	_, ok := e.volumes.all[name]
	busy := e.volumes.busy[name] > 0
	removing := e.volumes.removing[name]
	if ok && !busy && !removing {
		e.volumes.removing[name] = true
	}
	e.volumes.mu.Unlock()
	switch {
	case !ok:
		return notFoundf("get %s: no such volume", name)
	case removing:
		return conflictf("remove %s: volume is already being removed", name)
	case busy:
		return conflictf("remove %s: volume is in use", name)
	}
	defer func() {
		e.volumes.mu.Lock()
		defer e.volumes.mu.Unlock()
		delete(e.volumes.removing, name)
	}()
	if users := e.volumeUsers()[name]; len(users) > 0 {
		return conflictf("remove %s: volume is in use - %v", name, users)
	}
	mount, release, err := e.mountOf(ctx, name)
	if err != nil {
		return err
	}
	defer release()
	if len(mount.users) > 0 {
		return conflictf("remove %s: volume is in use", name)
	}
	if len(e.mountOptions(name)) > 0 {
		if err := unmountVolume(e.volumePath(name)); err != nil {
			return fmt.Errorf("remove volume %s: %w", name, err)
		}
	}
	if list, err := mountsIn(filepath.Dir(e.volumePath(name))); err != nil {
		return fmt.Errorf("remove volume %s: %w", name, err)
	} else if len(list) > 0 {
		return conflictf("remove %s: %s is a mount point", name, list[0])
	}
	// The folder gets another name first: after a crash it is either renamed back or
	// deleted, as the record says, and a new volume of this name starts empty.
	dir, doomed := filepath.Dir(e.volumePath(name)), e.doomedPath(name)
	unlock, err := e.volumes.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	if err := os.Rename(dir, doomed); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	// A power cut must not bring the old name back to a volume that has no record.
	if err := durable.SyncDir(filepath.Dir(dir)); err != nil {
		return errors.Join(fmt.Errorf("remove volume %s: %w", name, err), os.Rename(doomed, dir))
	}
	if err := e.opt.Volumes.Delete(ctx, name); err != nil {
		return errors.Join(fmt.Errorf("remove volume %s: %w", name, err), os.Rename(doomed, dir))
	}
	e.volumes.mu.Lock()
	delete(e.volumes.all, name)
	delete(e.volumes.mounts, name)
	e.volumes.mu.Unlock()
	if err := removeFiles(doomed); err != nil {
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	e.emitFor("volume", "destroy", name, "driver", "local")
	return nil
}

// doomedPrefix marks the folder of a volume whose removal is under way. No volume's
// name can begin like that.
const doomedPrefix = ".removing-"

func (e *Engine) doomedPath(name string) string {
	return filepath.Join(e.opt.Root, "volumes", doomedPrefix+name)
}

// healVolumes makes the folders anew that a power cut took before they reached the disk: nothing
// that was to last was in them.
func (e *Engine) healVolumes() {
	e.volumes.mu.Lock()
	names := slices.Collect(maps.Keys(e.volumes.all))
	e.volumes.mu.Unlock()
	for _, name := range names {
		data := e.volumePath(name)
		if _, err := os.Lstat(data); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		err := makeVolumeFolder(data)
		e.log.Warn("made a volume's lost folder anew", "volume", name, "error", err)
	}
}

// finishVolumeRemovals ends the removals that a crash cut short.
func (e *Engine) finishVolumeRemovals() {
	for _, f := range folders(filepath.Join(e.opt.Root, "volumes")) {
		name, ok := strings.CutPrefix(f, doomedPrefix)
		if !ok {
			continue
		}
		e.volumes.mu.Lock()
		_, exists := e.volumes.all[name]
		e.volumes.mu.Unlock()
		var err error
		if exists {
			err = os.Rename(e.doomedPath(name), filepath.Dir(e.volumePath(name)))
		} else {
			err = removeFiles(e.doomedPath(name))
		}
		if err != nil {
			e.log.Error("finish removal of volume", "volume", name, "error", err)
		}
	}
}

// PruneVolumes removes unused volumes: anonymous ones, or all with the filter all=true.
func (e *Engine) PruneVolumes(ctx context.Context, f Filters) (Pruned, error) {
	if err := f.check("all", "label", "label!"); err != nil {
		return Pruned{}, err
	}
	all, _, err := f.bool("all")
	if err != nil {
		return Pruned{}, err
	}
	list, err := e.Volumes(ctx, Filters{"label": f["label"], "label!": f["label!"]})
	if err != nil {
		return Pruned{}, err
	}
	p := Pruned{IDs: []string{}}
	for _, v := range list {
		if v.RefCount > 0 || !all && !v.Anonymous {
			continue
		}
		var size int64
		if len(v.Options) == 0 { // else it is somebody else's
			size, _ = treeSize(v.Mountpoint)
		}
		if err := e.removeVolume(ctx, v.Name); err != nil {
			if ctx.Err() != nil {
				return p, err
			}
			continue // in use by now
		}
		p.IDs = append(p.IDs, v.Name)
		p.Reclaimed += size
	}
	e.emitFor("volume", "prune", "", "reclaimed", fmt.Sprint(p.Reclaimed))
	return p, nil
}
