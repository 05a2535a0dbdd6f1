// Package mounts makes mounts ahead for who cannot make them all itself (containerd's mount manager).
//
// In flow lists of mounts in which later ones refer to earlier ones ("format/overlay" with
// "lowerdir={{ mount 0 }}"), want directories ("mkdir/...") or file systems ("mkfs/..."), or are loop devices; out flow the mounts that are left
// for the system to make. What was made lies in a folder of the daemon's, under a name in a
// namespace, until it is taken back; it outlives the daemon, but not a reboot.
//
// Mounts are root's own words, but the file systems behind them may be an image's: what lies
// below a mount point is not reached through links in it.
package mounts

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/durable"
	"github.com/hako-engine/hako/store"
)

const (
	infoFile    = "activation.json"
	infoVersion = 1
	maxMounts   = 1000
	maxName     = 1024 // bytes
)

// Options of New.
type Options struct {
	// Dir is the folder of the mounts; it is made. Only root may enter it.
	Dir string
	// LeaseGone tells that a lease is not there any more: what was made under it is taken back
	// then. nil: leases are not looked at.
	LeaseGone func(ctx context.Context, id string) bool
	// KeeperGone tells that an object is not there any more: mounts whose labels (gc.bref.*) name objects are
	// taken back when the last of these is gone. nil: these labels are not looked at.
	KeeperGone func(ctx context.Context, n store.Node) bool
	Log        *slog.Logger // nil: discard
}

// Manager implements containerd's mount.Manager. All methods may be called concurrently.
type Manager struct {
	o Options

	mu sync.Mutex // one at a time mounts
}

var _ mount.Manager = (*Manager)(nil)

// activation is the file that says what is there.
type activation struct {
	Version   int                 `json:"version"`
	Namespace string              `json:"namespace"`
	Name      string              `json:"name"`
	Lease     string              `json:"lease,omitempty"`
	Active    []mount.ActiveMount `json:"active"`
	System    []mount.Mount       `json:"system"`
	Labels    map[string]string   `json:"labels,omitempty"`
}

// made tells that just these mounts are there.
func (a activation) made(ms []mount.Mount) bool {
	return slices.EqualFunc(a.Active, ms, func(x mount.ActiveMount, y mount.Mount) bool {
		return x.Type == y.Type && x.Source == y.Source && x.Target == y.Target && slices.Equal(x.Options, y.Options)
	})
}

func (a activation) info() mount.ActivationInfo {
	return mount.ActivationInfo{Name: a.Name, Active: a.Active, System: a.System, Labels: a.Labels}
}

// New opens the folder. What a daemon that was killed left half made is taken back.
func New(o Options) (*Manager, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open mounts: %w", err)
	}
	m := &Manager{o: o}
	entries, err := os.ReadDir(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("open mounts: %w", err)
	}
	for _, e := range entries {
		dir := filepath.Join(o.Dir, e.Name())
		if _, err := read(dir); err != nil {
			if err := drop(dir); err != nil {
				o.Log.Warn("mounts that were half made stay", "dir", dir, "error", err)
			}
		}
	}
	return m, nil
}

// Purge takes all mounts below a Manager's folder back.
func Purge(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range entries {
		errs = append(errs, drop(filepath.Join(dir, e.Name())))
	}
	return errors.Join(errs...)
}

// dir is that of a name, which may be any text.
func (m *Manager) dir(ns, name string) string {
	h := sha256.Sum256([]byte(ns + "\x00" + name))
	return filepath.Join(m.o.Dir, hex.EncodeToString(h[:16]))
}

// Activate makes what the system could not, and gives what is left. errdefs.ErrNotImplemented: there
// is nothing to do, the mounts can be used as they are; ErrAlreadyExists: the name is taken.
func (m *Manager) Activate(ctx context.Context, name string, ms []mount.Mount, opts ...mount.ActivateOpt) (_ mount.ActivationInfo, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("activate mounts %q: %w", name, err)
		}
	}()
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return mount.ActivationInfo{}, err
	}
	if name == "" || len(name) > maxName || len(ms) == 0 || len(ms) > maxMounts {
		return mount.ActivationInfo{}, fmt.Errorf("a name of 1 to %d bytes and 1 to %d mounts are needed: %w", maxName, maxMounts, errdefs.ErrInvalidArgument)
	}
	var o mount.ActivateOptions
	for _, opt := range opts {
		opt(&o)
	}
	if err := store.ValidateLabels(o.Labels); err != nil {
		return mount.ActivationInfo{}, err
	}
	made := firstSystem(ms, o)
	if made < 0 {
		return mount.ActivationInfo{}, fmt.Errorf("the system can make these mounts: %w", errdefs.ErrNotImplemented)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sweep(ctx)
	dir := m.dir(ns, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			// A client whose own mount has gone, and that asks for the same again, has it.
			if a, rerr := read(dir); rerr == nil && o.Temporary && a.made(ms) {
				return a.info(), nil
			}
			err = errdefs.ErrAlreadyExists
		}
		return mount.ActivationInfo{}, err
	}
	a := activation{Version: infoVersion, Namespace: ns, Name: name, Labels: o.Labels}
	a.Lease, _ = leases.FromContext(ctx)
	defer func() {
		if err != nil {
			err = errors.Join(err, drop(dir))
		}
	}()
	for i, one := range ms {
		if one, err = transform(ctx, one, a.Active); err != nil {
			return mount.ActivationInfo{}, fmt.Errorf("mount %d: %w", i, err)
		}
		if i >= made {
			a.System = append(a.System, one)
			continue
		}
		active, err := mountAt(one, filepath.Join(dir, fmt.Sprint(i)))
		if err != nil {
			return mount.ActivationInfo{}, fmt.Errorf("mount %d (%s): %w", i, one.Type, err)
		}
		a.Active = append(a.Active, active)
	}
	if len(a.System) == 0 {
		last := a.Active[len(a.Active)-1]
		access := "rw"
		if last.ReadOnly() {
			access = "ro"
		}
		a.System = []mount.Mount{{Type: "bind", Source: last.MountPoint, Options: []string{"rbind", access}}}
	}
	raw, err := json.Marshal(a)
	if err != nil {
		return mount.ActivationInfo{}, err
	}
	if err := durable.WriteVolatile(filepath.Join(dir, infoFile), raw, 0o600); err != nil {
		return mount.ActivationInfo{}, err
	}
	return a.info(), nil
}

// firstSystem is how many of the mounts have to be made here: all for temporary use, else
// those that a later one refers to; -1: none.
func firstSystem(ms []mount.Mount, o mount.ActivateOptions) int {
	if o.Temporary {
		return len(ms)
	}
	made := -1
	for i, m := range ms {
		kinds := strings.Split(m.Type, "/")
		base := kinds[len(kinds)-1]
		switch {
		case base == typeLoop && !slices.Contains(o.AllowMountTypes, typeLoop):
			made = i + 1
		case len(kinds) > 1 && !slices.Contains(o.AllowTransforms, kinds[0]):
			made = i
		}
	}
	return made
}

// mountAt makes one mount.
func mountAt(m mount.Mount, point string) (mount.ActiveMount, error) {
	now := time.Now().UTC()
	a := mount.ActiveMount{Mount: m, MountedAt: &now, MountPoint: point}
	if m.Type == typeLoop {
		device, err := mount.AttachLoopDevice(m.Source)
		if err != nil {
			return a, err
		}
		// The name is how it is found again.
		if err := os.Symlink(device, point); err != nil {
			return a, errors.Join(err, mount.DetachLoopDevice(device))
		}
		a.MountPoint, a.MountData = device, map[string]string{"device": device}
		return a, nil
	}
	if err := os.Mkdir(point, 0o700); err != nil {
		return a, err
	}
	if m.Target != "" {
		return a, fmt.Errorf("target %q: %w", m.Target, errdefs.ErrNotImplemented)
	}
	return a, m.Mount(point)
}

// drop takes back what is in a folder, the last first.
func drop(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	slices.SortFunc(entries, func(a, b os.DirEntry) int { // by number
		if len(a.Name()) != len(b.Name()) {
			return len(b.Name()) - len(a.Name())
		}
		return strings.Compare(b.Name(), a.Name())
	})
	for _, e := range entries {
		p := filepath.Join(dir, e.Name())
		switch {
		case e.Type()&fs.ModeSymlink != 0:
			device, err := os.Readlink(p)
			if err == nil {
				err = mount.DetachLoopDevice(device)
			}
			if err != nil && !errors.Is(err, unix.ENXIO) && !errors.Is(err, fs.ErrNotExist) { // it is free
				return err
			}
		case e.IsDir():
			if err := mount.UnmountAll(p, unix.UMOUNT_NOFOLLOW); err != nil {
				return fmt.Errorf("unmount %s: %w", p, err)
			}
		}
		// Never what is below it: it is empty, or still mounted.
		if err := os.Remove(p); err != nil {
			return err
		}
	}
	return os.Remove(dir)
}

func read(dir string) (a activation, err error) {
	raw, err := os.ReadFile(filepath.Join(dir, infoFile))
	if err != nil {
		return a, err
	}
	if err := json.Unmarshal(raw, &a); err != nil {
		return a, err
	}
	if a.Version != infoVersion {
		return a, fmt.Errorf("version %d: %w", a.Version, errdefs.ErrFailedPrecondition)
	}
	return a, nil
}

// all lists what is there. m.mu is held.
func (m *Manager) all() (list []activation) {
	entries, err := os.ReadDir(m.o.Dir)
	if err != nil {
		return nil
	}
	for _, e := range entries {
		if a, err := read(filepath.Join(m.o.Dir, e.Name())); err == nil {
			list = append(list, a)
		}
	}
	return list
}

// sweep takes back what nobody keeps any more. m.mu is held.
func (m *Manager) sweep(ctx context.Context) {
	for _, a := range m.all() {
		if !m.over(namespaces.WithNamespace(ctx, a.Namespace), a) {
			continue
		}
		if err := drop(m.dir(a.Namespace, a.Name)); err != nil {
			m.o.Log.Warn("mounts that nobody keeps stay", "namespace", a.Namespace, "name", a.Name, "error", err)
		}
	}
}

// over tells that neither the lease nor an object that kept the mounts is there any more. Where none ever
// did, they are their maker's to take back.
func (m *Manager) over(ctx context.Context, a activation) bool {
	var keepers []store.Node
	if m.o.KeeperGone != nil {
		keepers = store.BackRefs(a.Namespace, a.Labels)
	}
	leased := a.Lease != "" && m.o.LeaseGone != nil
	if !leased && len(keepers) == 0 || leased && !m.o.LeaseGone(ctx, a.Lease) {
		return false
	}
	return !slices.ContainsFunc(keepers, func(n store.Node) bool { return !m.o.KeeperGone(ctx, n) })
}

// Sweep takes back what nobody keeps any more. It belongs behind a garbage collection.
func (m *Manager) Sweep(ctx context.Context) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sweep(ctx)
}

// Deactivate takes mounts back: errdefs.ErrNotFound if there are none of that name.
func (m *Manager) Deactivate(ctx context.Context, name string) error {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	err = drop(m.dir(ns, name))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = errdefs.ErrNotFound
	case errors.Is(err, unix.EBUSY):
		err = fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("deactivate mounts %q: %w", name, err)
	}
	return nil
}

// Info tells what was made under a name.
func (m *Manager) Info(ctx context.Context, name string) (mount.ActivationInfo, error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return mount.ActivationInfo{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sweep(ctx)
	a, err := read(m.dir(ns, name))
	if errors.Is(err, fs.ErrNotExist) {
		err = errdefs.ErrNotFound
	}
	if err != nil {
		return mount.ActivationInfo{}, fmt.Errorf("mounts %q: %w", name, err)
	}
	return a.info(), nil
}

// Update changes labels: all of them, or those that fieldpaths name.
func (m *Manager) Update(ctx context.Context, info mount.ActivationInfo, fieldpaths ...string) (mount.ActivationInfo, error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return mount.ActivationInfo{}, err
	}
	if len(fieldpaths) == 0 {
		fieldpaths = []string{"labels"}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	dir := m.dir(ns, info.Name)
	a, err := read(dir)
	if errors.Is(err, fs.ErrNotExist) {
		err = errdefs.ErrNotFound
	}
	for _, p := range fieldpaths {
		if err != nil {
			break
		}
		l, ok := store.UpdateLabels(a.Labels, info.Labels, p)
		if !ok {
			err = fmt.Errorf("field %q cannot be updated: %w", p, errdefs.ErrInvalidArgument)
		}
		a.Labels = l
	}
	if err == nil {
		err = store.ValidateLabels(a.Labels)
	}
	if err == nil {
		var raw []byte
		if raw, err = json.Marshal(a); err == nil {
			err = durable.WriteVolatile(filepath.Join(dir, infoFile), raw, 0o600)
		}
	}
	if err != nil {
		return mount.ActivationInfo{}, fmt.Errorf("update mounts %q: %w", info.Name, err)
	}
	return a.info(), nil
}

// List gives what was made in the namespace and matches a filter, in the order of names.
func (m *Manager) List(ctx context.Context, fs ...string) ([]mount.ActivationInfo, error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, err
	}
	filter, err := store.ParseFilters(fs)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sweep(ctx)
	var list []mount.ActivationInfo
	for _, a := range m.all() {
		if a.Namespace == ns && filter.Match(adapt(a)) {
			list = append(list, a.info())
		}
	}
	slices.SortFunc(list, func(a, b mount.ActivationInfo) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

func adapt(a activation) filters.Adaptor {
	return store.Adapt(maps.Clone(a.Labels), func(p []string) string {
		if p[0] == "name" {
			return a.Name
		}
		return ""
	})
}
