package engine

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/image"
	"github.com/hako-engine/hako/network"
)

// breaker makes named steps of the fakes fail.
type breaker struct {
	mu   sync.Mutex
	fail map[string]error
	seen map[string]int
	meet map[string]func() // see at
}

func (b *breaker) step(name string) error {
	b.mu.Lock()
	if b.seen == nil {
		b.seen = map[string]int{}
	}
	b.seen[name]++
	f, err := b.meet[name], b.fail[name]
	delete(b.meet, name)
	b.mu.Unlock()
	if f != nil {
		f()
	}
	return err
}

// at runs f in the moment in which a step is reached next.
func (b *breaker) at(name string, f func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.meet == nil {
		b.meet = map[string]func(){}
	}
	b.meet[name] = f
}

func (b *breaker) breakStep(name string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fail = map[string]error{}
	if err != nil {
		b.fail[name] = err
	}
}

func (b *breaker) count(name string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.seen[name]
}

// memRecords are Records in memory.
type memRecords struct {
	*breaker
	mu   sync.Mutex
	kind string
	all  map[string][]byte
}

func (r *memRecords) Put(_ context.Context, id string, v any) error {
	if err := r.step(r.kind + ".put"); err != nil {
		return err
	}
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all[id] = raw
	return nil
}

func (r *memRecords) Get(_ context.Context, id string, v any) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	raw, ok := r.all[id]
	if !ok {
		return errdefs.ErrNotFound
	}
	return json.Unmarshal(raw, v)
}

func (r *memRecords) Delete(_ context.Context, id string) error {
	if err := r.step(r.kind + ".delete"); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.all, id)
	return nil
}

func (r *memRecords) ForEach(f func(string, []byte) error) error {
	r.mu.Lock()
	all := maps.Clone(r.all)
	r.mu.Unlock()
	var first error
	for _, id := range slices.Sorted(maps.Keys(all)) {
		if err := f(id, all[id]); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// damage writes over a record, or makes one, as a broken disk would.
func (r *memRecords) damage(id, with string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all[id] = []byte(with)
}

func (r *memRecords) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}

// fakeImages holds images by every name they have.
type fakeImages struct {
	*breaker
	mu   sync.Mutex
	imgs []image.Image
	cfg  dockerspec.DockerOCIImage
	// chains are the snapshots of images that have one, by their ids; pull makes one come from a registry.
	chains map[digest.Digest]string
	pull   func(ref string) (image.Image, error)
}

func (f *fakeImages) Get(_ context.Context, ref string, _ *ocispec.Platform) (image.Image, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, img := range f.imgs {
		if slices.Contains(img.Names, ref) || slices.Contains(img.Names, "docker.io/library/"+ref) ||
			slices.Contains(img.Names, "docker.io/library/"+ref+":latest") || ref != "" && strings.HasPrefix(img.ID.String(), ref) ||
			ref != "" && strings.HasPrefix(img.ID.Encoded(), ref) {
			return img, nil
		}
	}
	return image.Image{}, errdefs.ErrNotFound
}

func (f *fakeImages) List(context.Context) ([]image.Image, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.imgs), nil
}

func (f *fakeImages) Config(context.Context, image.Image) (dockerspec.DockerOCIImage, error) {
	return f.cfg, nil
}

func (f *fakeImages) Unpack(_ context.Context, img image.Image, _ string) (string, error) {
	return f.chains[img.ID], f.step("unpack")
}

func (f *fakeImages) Pull(_ context.Context, ref string, _ image.PullOptions) (image.Image, error) {
	if f.pull == nil {
		return image.Image{}, errdefs.ErrUnavailable
	}
	img, err := f.pull(ref)
	if err == nil {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.imgs = append(f.imgs, img)
	}
	return img, err
}
func (f *fakeImages) Push(context.Context, string, image.PushOptions) error { return nil }
func (f *fakeImages) Tag(context.Context, string, string) error             { return nil }

func (f *fakeImages) Untag(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.imgs {
		f.imgs[i].Names = slices.DeleteFunc(slices.Clone(f.imgs[i].Names), func(n string) bool { return n == name })
	}
	return nil
}

func (f *fakeImages) Delete(_ context.Context, img image.Image) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.imgs = slices.DeleteFunc(f.imgs, func(o image.Image) bool { return o.ID == img.ID })
	return nil, nil
}

func (f *fakeImages) Load(context.Context, io.Reader, image.LoadOptions) ([]image.Loaded, error) {
	return nil, nil
}
func (f *fakeImages) Save(context.Context, []string, image.SaveOptions, io.Writer) error { return nil }

func (f *fakeImages) Commit(context.Context, image.CommitOptions) (image.Image, error) {
	return image.Image{}, errdefs.ErrUnavailable
}
func (f *fakeImages) Import(context.Context, io.Reader, image.ImportOptions) (image.Image, error) {
	return image.Image{}, errdefs.ErrUnavailable
}

func (f *fakeImages) Login(context.Context, image.Auth) error { return nil }

// fakeNetworks gives addresses and remembers what is taken.
type fakeNetworks struct {
	// realNetns is a folder: namespaces are real ones, kept there. "": they are names only.
	realNetns string
	*breaker
	mu   sync.Mutex
	nets map[string]network.Network
	eps  map[string]map[string]network.Endpoint // network id → endpoint id
	ns   map[string]bool
	next int
}

func newFakeNetworks(b *breaker) *fakeNetworks {
	f := &fakeNetworks{breaker: b, nets: map[string]network.Network{}, eps: map[string]map[string]network.Endpoint{}, ns: map[string]bool{}}
	for name, driver := range map[string]string{"bridge": "bridge", "host": "host", "none": "null"} {
		f.nets[name] = network.Network{ID: "id-" + name, Name: name, Driver: driver, Predefined: true}
	}
	return f
}

func (f *fakeNetworks) find(ref string) (network.Network, error) {
	for _, n := range f.nets {
		if n.Name == ref || n.ID == ref {
			return n, nil
		}
	}
	return network.Network{}, errdefs.ErrNotFound
}

func (f *fakeNetworks) Create(_ context.Context, c network.Config) (network.Network, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.nets[c.Name]; ok {
		return network.Network{}, errdefs.ErrAlreadyExists
	}
	n := network.Network{ID: "id-" + c.Name, Name: c.Name, Driver: cmp.Or(c.Driver, "bridge")}
	f.nets[c.Name] = n
	return n, nil
}

func (f *fakeNetworks) Remove(_ context.Context, ref string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.find(ref)
	if err == nil {
		delete(f.nets, n.Name)
	}
	return err
}

func (f *fakeNetworks) Get(_ context.Context, ref string) (network.Network, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.find(ref)
}

func (f *fakeNetworks) List(context.Context) ([]network.Network, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Values(f.nets)), nil
}

func (f *fakeNetworks) KeepNetns(ctx context.Context, id, _ string) (string, error) {
	return f.NewNetns(ctx, id)
}

func (f *fakeNetworks) NewNetns(_ context.Context, id string) (string, error) {
	if err := f.step("netns"); err != nil {
		return "", err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	path := "/ns/" + id
	if f.realNetns != "" {
		path = filepath.Join(f.realNetns, id)
		if err := makeNetns(path); err != nil {
			return "", err
		}
	}
	f.ns[path] = true
	return path, nil
}

// makeNetns makes a network namespace that lives by its path.
func makeNetns(path string) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return pin("/proc/thread-self/ns/net", path)
	})
}

func (f *fakeNetworks) DeleteNetns(_ context.Context, path string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.ns, path)
	if f.realNetns != "" {
		return errors.Join(unix.Unmount(path, unix.MNT_DETACH), os.Remove(path))
	}
	return nil
}

func (f *fakeNetworks) Netns(context.Context) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Keys(f.ns)), nil
}

func (f *fakeNetworks) Connect(_ context.Context, c network.EndpointConfig) (network.Endpoint, error) {
	if err := f.step("connect"); err != nil {
		return network.Endpoint{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.find(c.Network)
	if err != nil {
		return network.Endpoint{}, err
	}
	if _, ok := f.eps[n.ID][c.ID]; ok {
		return network.Endpoint{}, errdefs.ErrAlreadyExists
	}
	f.next++
	ep := network.Endpoint{ID: c.ID, EndpointID: "ep-" + c.ID, NetworkID: n.ID, NetworkName: n.Name, Netns: c.Netns, Name: c.Name,
		IPv4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(f.next >> 8), byte(f.next)}), 16), Ports: c.Ports}
	if f.eps[n.ID] == nil {
		f.eps[n.ID] = map[string]network.Endpoint{}
	}
	f.eps[n.ID][c.ID] = ep
	return ep, nil
}

func (f *fakeNetworks) Disconnect(_ context.Context, ref, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.find(ref)
	if err != nil {
		return nil
	}
	delete(f.eps[n.ID], id)
	return nil
}

func (f *fakeNetworks) Endpoints(_ context.Context, ref string) ([]network.Endpoint, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.find(ref)
	if err != nil {
		return nil, err
	}
	return slices.Collect(maps.Values(f.eps[n.ID])), nil
}

func (f *fakeNetworks) Rename(context.Context, string, string, string) error { return nil }

func (f *fakeNetworks) HostGateway(context.Context) (netip.Addr, error) {
	return netip.AddrFrom4([4]byte{10, 0, 0, 1}), nil
}

// taken counts endpoints and namespaces.
func (f *fakeNetworks) taken() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := len(f.ns)
	for _, m := range f.eps {
		n += len(m)
	}
	return n
}

// fakeSnapshots are directories.
type fakeSnapshots struct {
	snapshots.Snapshotter // what is not overridden is not called
	*breaker
	root string
	mu   sync.Mutex
	keys map[string]bool
	info map[string]snapshots.Info // of those in keys that have labels
}

func (f *fakeSnapshots) Walk(ctx context.Context, fn snapshots.WalkFunc, _ ...string) error {
	f.mu.Lock()
	infos := slices.Collect(maps.Values(f.info))
	f.mu.Unlock()
	for _, i := range infos {
		if err := fn(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

func (f *fakeSnapshots) Prepare(_ context.Context, key, _ string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	if err := f.step("prepare"); err != nil {
		return nil, err
	}
	dir := filepath.Join(f.root, key)
	if err := os.MkdirAll(filepath.Join(dir, "etc"), 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "etc/passwd"), []byte("root:x:0:0::/root:/bin/sh\nweb:x:33:34::/var/www:/bin/sh\n"), 0o644); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.keys[key] = true
	info := snapshots.Info{Name: key, Kind: snapshots.KindActive}
	for _, o := range opts {
		if err := o(&info); err != nil {
			return nil, err
		}
	}
	f.info[key] = info
	return f.mounts(key), nil
}

func (f *fakeSnapshots) mounts(key string) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: filepath.Join(f.root, key), Options: []string{"rbind", "rw"}}}
}

func (f *fakeSnapshots) Mounts(_ context.Context, key string) ([]mount.Mount, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.keys[key] {
		return nil, errdefs.ErrNotFound
	}
	return f.mounts(key), nil
}

func (f *fakeSnapshots) Remove(_ context.Context, key string) error {
	if err := f.step("snapshot.remove"); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.keys[key] {
		return errdefs.ErrNotFound
	}
	delete(f.keys, key)
	delete(f.info, key)
	return os.RemoveAll(filepath.Join(f.root, key))
}

func (f *fakeSnapshots) Stat(_ context.Context, key string) (snapshots.Info, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.keys[key] {
		return snapshots.Info{}, errdefs.ErrNotFound
	}
	return snapshots.Info{Name: key, Kind: snapshots.KindActive}, nil
}

func (f *fakeSnapshots) Usage(context.Context, string) (snapshots.Usage, error) {
	return snapshots.Usage{Size: 1000}, nil
}

func (f *fakeSnapshots) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.keys)
}

// node is a machine: what survives the daemon.
type node struct {
	t testing.TB
	breaker
	root, state string
	containers  *memRecords
	volumes     *memRecords
	settings    *memRecords
	sandboxes   *memRecords
	images      *fakeImages
	nets        *fakeNetworks
	pods        PodNetwork // nil: the engine's own
	shims       *fakeShims
	snaps       *fakeSnapshots
	files       snapshots.Snapshotter // with files, in place of snaps; may be nil
	restorable  string                // Options.RestoreCheckpoints
	hooks       Hooks
	cdiDir      string
	hierarchies []string // mount points of cgroups
	e           *Engine
}

const testImage = "docker.io/library/test:latest"

func newNode(t testing.TB) *node {
	t.Helper()
	n := &node{t: t, root: t.TempDir(), state: t.TempDir(), cdiDir: t.TempDir()}
	rec := func(kind string) *memRecords {
		return &memRecords{breaker: &n.breaker, kind: kind, all: map[string][]byte{}}
	}
	n.containers, n.volumes, n.settings, n.sandboxes = rec("containers"), rec("volumes"), rec("settings"), rec("sandboxes")
	n.images = &fakeImages{breaker: &n.breaker, imgs: []image.Image{{ID: digest.FromString("test"), Names: []string{testImage}}}}
	n.images.cfg.Config.Cmd = []string{"sleep"}
	n.images.cfg.Config.Env = []string{"PATH=/bin", "A=image"}
	n.nets = newFakeNetworks(&n.breaker)
	n.shims = &fakeShims{breaker: &n.breaker, live: map[string]*fakeShim{}, hang: map[string]bool{}}
	n.snaps = &fakeSnapshots{breaker: &n.breaker, root: t.TempDir(), keys: map[string]bool{}, info: map[string]snapshots.Info{}}
	n.boot()
	t.Cleanup(func() {
		if err := n.e.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// boot starts a daemon on the node.
func (n *node) boot() {
	n.t.Helper()
	snaps := n.files
	if snaps == nil {
		snaps = n.snaps
	}
	e, err := New(context.Background(), Options{
		Root: n.root, State: n.state, Containers: n.containers, Volumes: n.volumes, Settings: n.settings, Sandboxes: n.sandboxes,
		Images: n.images, Networks: n.nets, PodNetwork: n.pods, Shims: n.shims,
		Snapshotters: map[string]snapshots.Snapshotter{"fake": snaps}, Snapshotter: "fake", RestoreCheckpoints: n.restorable,
		Hooks: n.hooks, CDISpecDirs: []string{n.cdiDir}, probe: n.probe,
	})
	if err != nil {
		n.t.Fatal(err)
	}
	n.e = e
}

// probe gives the facts of the host, but for its cgroups: nothing is made of the machine's own.
func (n *node) probe() (hostFacts, error) {
	f, err := probeHost()
	f.Hierarchies = n.hierarchies
	return f, err
}

// crash ends the daemon without a word, and boots another one.
func (n *node) crash() {
	n.t.Helper()
	n.e.cancel(errClosed)
	n.e.work.Wait()
	n.boot()
}

func (n *node) create(name string, c Config) string {
	n.t.Helper()
	if c.Image == "" {
		c.Image = "test"
	}
	id, _, err := n.e.CreateContainer(context.Background(), name, c)
	if err != nil {
		n.t.Fatal(err)
	}
	return id
}

func (n *node) run(name string, c Config) string {
	n.t.Helper()
	id := n.create(name, c)
	if err := n.e.StartContainer(context.Background(), id); err != nil {
		n.t.Fatal(err)
	}
	return id
}

func (n *node) state_(id string) State {
	n.t.Helper()
	v, err := n.e.Container(context.Background(), id)
	if err != nil {
		n.t.Fatal(err)
	}
	return v.State
}

func (n *node) wait(id string, cond WaitCondition) int {
	n.t.Helper()
	ch, err := n.e.WaitContainer(context.Background(), id, cond)
	if err != nil {
		n.t.Fatal(err)
	}
	select {
	case r := <-ch:
		return r.ExitCode
	case <-time.After(5 * time.Minute):
		n.t.Fatalf("container %s: waited in vain for %s", id, cond)
		return 0
	}
}

// eventually waits for a condition.
func (n *node) eventually(what string, ok func() bool) {
	n.t.Helper()
	for end := time.Now().Add(5 * time.Minute); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	n.t.Fatalf("waited in vain for: %s", what)
}

// reachContext tells when something begins to wait that can be ended by it.
type reachContext struct {
	context.Context
	once    sync.Once
	reached chan struct{}
}

func newReachContext(ctx context.Context) *reachContext {
	return &reachContext{Context: ctx, reached: make(chan struct{})}
}

func (c *reachContext) Done() <-chan struct{} {
	c.once.Do(func() { close(c.reached) })
	return c.Context.Done()
}

// clean asserts that nothing of any container is left.
func (n *node) clean() {
	n.t.Helper()
	n.eventually("nothing is left", func() bool {
		return n.nets.taken() == 0 && n.shims.count() == 0 && n.snaps.count() == 0 &&
			len(folders(filepath.Join(n.root, "containers"))) == 0 && len(folders(filepath.Join(n.state, "containers"))) == 0
	})
	if left := n.containers.count(); left != 0 {
		n.t.Errorf("%d records are left", left)
	}
}
