// Package cni gives pods their network by CNI plugins, over libcni.
//
// In flow sandboxes with their namespaces and what Kubernetes tells of the pod, and the configuration that
// lies in a watched folder; plugins are executed; out flow addresses, and whether the network is ready.
//
// What a plugin may have done is written down before it runs, with the whole configuration: so that
// it can be undone when the call fails or is cancelled, when the daemon was killed in its middle, after the
// configuration changed or vanished, and after a reboot. One call at a time works on a sandbox; calls for different
// ones share nothing but what plugins lock themselves. A plugin that hangs is killed with its children and
// delays its own pod only.
package cni

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/utils"

	"github.com/hako-engine/hako/internal/durable"
	"github.com/hako-engine/hako/internal/keylock"
	"github.com/hako-engine/hako/internal/undo"
	"github.com/hako-engine/hako/network"
)

// IfName is the name of a pod's interface.
const IfName = "eth0"

// Options configure a Manager.
type Options struct {
	ConfDir string   // of configurations; it may be missing
	BinDirs []string // of plugins, searched in order
	Dir     string   // durable: what plugins did for whom, cached results
	// Limit is the longest that one execution of a plugin may take; 0: 2 minutes, what a kubelet waits.
	Limit time.Duration
	// Poll is how often the folder is looked at besides being watched, and how old a STATUS may be; 0: 10 s.
	Poll time.Duration
	Log  *slog.Logger
}

// Pod is one sandbox, as plugins are told of it.
type Pod struct {
	ID                   string // of the sandbox: letters, digits, _ . -
	Name, Namespace, UID string
	NetNS                string                // path of a namespace whose loopback is up
	Ports                []network.PortMapping // those without a host port are passed over
	DNS                  *DNS
	Annotations          map[string]string
	CgroupParent         string
	IPs                  []string // addresses that are asked for, with or without a prefix length
	MAC                  string   // address that is asked for
}

// Result is what a pod got.
type Result struct {
	IPs []netip.Addr // the primary one first: an IPv4 address if there is one
	MAC string
}

// Manager is the network of the pods. Its methods may be called side by side.
type Manager struct {
	confDir string
	binDirs []string
	dir     string
	poll    time.Duration
	log     *slog.Logger
	run     *runner
	cni     *libcni.CNIConfig
	records records
	tickets keylock.Locks // one operation at a time of a sandbox, as the specification wants
	gate    gate

	conf    atomic.Pointer[configuration]
	loading chan struct{} // held while the configuration is read
	health  atomic.Pointer[health]
	poke    chan struct{} // asks for a look at the configuration

	mu        sync.Mutex
	ranges    []netip.Prefix  // the node's
	inherited map[string]bool // sandboxes of an earlier daemon, until GC tells of them
	owed      map[string]bool // sandboxes whose attachment is to be undone

	cancel     context.CancelFunc
	background sync.WaitGroup
	sweeping   atomic.Bool // guards complaint
	complaint  string      // what retry logged last
}

// Open prepares the folder, sees to the end of plugins that an earlier daemon left running, and watches the configuration. GC
// has to be called once it is known which sandboxes still exist.
func Open(ctx context.Context, o Options) (*Manager, error) {
	m := &Manager{
		confDir: o.ConfDir, binDirs: o.BinDirs, dir: o.Dir, poll: cmp.Or(o.Poll, 10*time.Second), log: o.Log,
		run:     &runner{limit: cmp.Or(o.Limit, 2*time.Minute), log: o.Log, versions: map[string]binaryVersions{}},
		records: records{filepath.Join(o.Dir, "attachments")},
		loading: make(chan struct{}, 1), poke: make(chan struct{}, 1), inherited: map[string]bool{}, owed: map[string]bool{},
	}
	m.cni = libcni.NewCNIConfigWithCacheDir(o.BinDirs, o.Dir, m.run)
	if err := os.MkdirAll(m.records.dir, 0o700); err != nil {
		return nil, fmt.Errorf("open the network of pods: %w", err)
	}
	if err := m.records.sweep(); err != nil {
		return nil, fmt.Errorf("open the network of pods: %w", err)
	}
	ids, err := m.records.ids()
	if err != nil {
		return nil, fmt.Errorf("open the network of pods: %w", err)
	}
	cached, err := m.cni.GetCachedAttachments("")
	if err != nil {
		return nil, fmt.Errorf("open the network of pods: %w", err)
	}
	whole := map[string]bool{}
	for _, a := range cached {
		whole[a.ContainerID] = true
	}
	var torn []string
	for _, id := range ids {
		m.inherited[id] = true
		if !whole[id] {
			torn = append(torn, id)
		}
	}
	if n := endStrays(torn, time.Second); n > 0 {
		m.log.Warn("CNI plugins that an earlier daemon left running have ended", "processes", n)
	}
	if err := m.loadRanges(); err != nil {
		m.log.Warn("the ranges of this node are lost until they are set again", "error", err)
	}
	m.health.Store(&health{err: fmt.Errorf("the CNI configuration is being read: %w", errdefs.ErrUnavailable)})
	first := make(chan struct{})
	ctx, m.cancel = context.WithCancel(context.WithoutCancel(ctx))
	m.background.Go(func() { m.watch(ctx, first) })
	select {
	case <-first:
	case <-time.After(time.Second): // a plugin that hangs must not delay the daemon
	}
	return m, nil
}

// Close ends the watch. What pods have stays.
func (m *Manager) Close() error {
	m.cancel()
	m.background.Wait()
	return nil
}

// Setup attaches a pod to the network. On an error, or when ctx ends meanwhile, all that plugins did is undone.
// Errors: ErrUnavailable without a usable configuration, ErrAlreadyExists, ErrInvalidArgument, what plugins say.
func (m *Manager) Setup(ctx context.Context, p Pod) (_ Result, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("set up network of sandbox %s: %w", p.ID, classify(err))
		}
	}()
	args, err := cniArgs(p)
	if err != nil {
		return Result{}, err
	}
	release, err := m.tickets.Lock(ctx, p.ID)
	if err != nil {
		return Result{}, err
	}
	defer release()
	leave, err := m.gate.enter(ctx)
	if err != nil {
		return Result{}, err
	}
	defer leave()
	conf, err := m.current(ctx)
	if err != nil {
		return Result{}, err
	}
	caps, err := capabilities(p, m.podCIDR())
	if err != nil {
		return Result{}, err
	}
	if missing := unserved(conf.list, caps); len(missing) > 0 {
		m.log.Warn("no CNI plugin can do what the pod asks for", "pod", p.Namespace+"/"+p.Name, "network", conf.list.Name,
			"capabilities", strings.Join(missing, ", "))
	}
	if err := prepare(p.NetNS); err != nil {
		return Result{}, err
	}
	rec := record{Version: recordVersion, ID: p.ID, Network: conf.list.Name, CNIVersion: conf.list.CNIVersion, Config: conf.list.Bytes,
		NetNS: p.NetNS, IfName: IfName, Args: args, Capabilities: caps}
	synced, err := m.records.add(rec)
	if err != nil {
		return Result{}, err
	}
	var u undo.Stack
	defer func() {
		failed := u.Run(ctx)
		if failed != nil {
			m.owe(p.ID)
		}
		err = errors.Join(err, failed)
	}()
	u.Add("network", func(ctx context.Context) error { return m.detach(ctx, rec) })

	got, err := m.cni.AddNetworkList(ctx, conf.list, rec.runtimeConf())
	if serr := <-synced; err == nil {
		err = serr
	}
	if err != nil {
		m.ask() // a plugin that is not available says so in STATUS
		return Result{}, err
	}
	res, err := resultOf(got)
	if err != nil {
		return Result{}, err
	}
	if err := ctx.Err(); err != nil {
		return Result{}, context.Cause(ctx)
	}
	u.Release()
	return res, nil
}

// hold takes the ticket of a sandbox, whose id nobody has looked at yet.
func (m *Manager) hold(ctx context.Context, id string) (release func(), err error) {
	if e := utils.ValidateContainerID(id); e != nil {
		return nil, fmt.Errorf("%w: %w", e, errdefs.ErrInvalidArgument)
	}
	return m.tickets.Lock(ctx, id)
}

// Teardown detaches a pod. It is idempotent, asks neither for the configuration of now nor for the namespace, and
// may be tried again after an error.
func (m *Manager) Teardown(ctx context.Context, id string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("tear down network of sandbox %s: %w", id, classify(err))
		}
	}()
	release, err := m.hold(ctx, id)
	if err != nil {
		return err
	}
	defer release()
	leave, err := m.gate.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	rec, err := m.records.get(id)
	switch {
	case err == nil:
		return m.detach(ctx, rec)
	case errdefs.IsNotFound(err):
		return m.detachCached(ctx, id, false)
	case errdefs.IsDataLoss(err):
		m.log.Warn("undoing what CNI plugins did without its record", "error", err)
		return m.detachCached(ctx, id, true)
	}
	return err
}

// detach runs DEL and forgets the attachment.
func (m *Manager) detach(ctx context.Context, rec record) error {
	list, err := rec.list()
	if err != nil {
		return err
	}
	rt := rec.runtimeConf()
	rt.NetNS = alive(rt.NetNS)
	if err := m.cni.DelNetworkList(ctx, list, rt); err != nil {
		return err
	}
	m.settle(rec.ID)
	return m.records.remove(rec.ID)
}

// detachCached runs DEL from the results that libcni keeps, for a sandbox whose record is lost. With guess, when there
// is none of these either, it is DEL with the configuration of now: plugins find by the id what is theirs.
func (m *Manager) detachCached(ctx context.Context, id string, guess bool) error {
	all, err := m.cni.GetCachedAttachments(id)
	if err != nil {
		return err
	}
	for _, a := range all {
		list, err := libcni.NetworkConfFromBytes(a.Config)
		if err != nil {
			return err
		}
		rt := &libcni.RuntimeConf{ContainerID: a.ContainerID, NetNS: alive(a.NetNS), IfName: a.IfName, Args: a.CniArgs, CapabilityArgs: a.CapabilityArgs}
		if err := m.cni.DelNetworkList(ctx, list, rt); err != nil {
			return err
		}
	}
	if guess && len(all) == 0 {
		conf, err := m.current(ctx)
		if err != nil {
			return err
		}
		rt := &libcni.RuntimeConf{ContainerID: id, IfName: IfName, Args: [][2]string{{"IgnoreUnknown", "1"}}}
		if err := m.cni.DelNetworkList(ctx, conf.list, rt); err != nil {
			return err
		}
	}
	m.settle(id)
	return m.records.remove(id)
}

// Check asks the plugins whether a pod's network is as they made it. Errors: ErrNotFound, ErrNotImplemented
// with a configuration older than version 0.4.0 of the specification, what plugins say.
func (m *Manager) Check(ctx context.Context, id string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("check network of sandbox %s: %w", id, classify(err))
		}
	}()
	release, err := m.hold(ctx, id)
	if err != nil {
		return err
	}
	defer release()
	rec, err := m.records.get(id)
	if err != nil {
		return err
	}
	list, err := rec.list()
	if err != nil {
		return err
	}
	err = m.cni.CheckNetworkList(ctx, list, rec.runtimeConf())
	if errors.Is(err, libcni.ErrorCheckNotSupp) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotImplemented)
	}
	return err
}

// SetPodCIDR keeps the ranges of this node. Plugins with the capability ipRanges are given them.
func (m *Manager) SetPodCIDR(_ context.Context, ranges []netip.Prefix) error {
	for _, r := range ranges {
		if !r.IsValid() {
			return fmt.Errorf("set the ranges of pods: %v is no range: %w", r, errdefs.ErrInvalidArgument)
		}
	}
	raw, err := json.Marshal(ranges)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(m.rangesFile(), raw, 0o600); err != nil {
		return fmt.Errorf("set the ranges of pods: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ranges = ranges
	return nil
}

func (m *Manager) rangesFile() string { return filepath.Join(m.dir, "podcidr.json") }

func (m *Manager) loadRanges() error {
	raw, err := os.ReadFile(m.rangesFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return json.Unmarshal(raw, &m.ranges)
}

func (m *Manager) podCIDR() []netip.Prefix {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ranges
}

// cniArgs is the CNI_ARGS that plugins of Kubernetes know.
func cniArgs(p Pod) ([][2]string, error) {
	if e := utils.ValidateContainerID(p.ID); e != nil {
		return nil, fmt.Errorf("%w: %w", e, errdefs.ErrInvalidArgument)
	}
	args := [][2]string{
		{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", p.Namespace}, {"K8S_POD_NAME", p.Name},
		{"K8S_POD_INFRA_CONTAINER_ID", p.ID}, {"K8S_POD_UID", p.UID},
	}
	for _, kv := range args {
		if strings.ContainsAny(kv[1], ";=\x00\n") {
			return nil, fmt.Errorf("%s: %q cannot be told to CNI plugins: %w", kv[0], kv[1], errdefs.ErrInvalidArgument)
		}
	}
	return args, nil
}

// resultOf takes the addresses of the pod's interface from what plugins made.
func resultOf(r types.Result) (Result, error) {
	full, err := types100.NewResultFromResult(r)
	if err != nil {
		return Result{}, fmt.Errorf("result of CNI plugins: %w", err)
	}
	var out Result
	for _, i := range full.Interfaces {
		if i != nil && i.Name == IfName && i.Sandbox != "" {
			out.MAC = i.Mac
		}
	}
	var v4, v6 []netip.Addr
	for _, ip := range full.IPs {
		if ip == nil {
			continue
		}
		if i := ip.Interface; i != nil && *i >= 0 && *i < len(full.Interfaces) && full.Interfaces[*i] != nil {
			if on := full.Interfaces[*i]; on.Sandbox == "" || on.Name != IfName {
				continue // the host's end, or another interface
			}
		}
		a, ok := netip.AddrFromSlice(ip.Address.IP)
		switch a = a.Unmap(); {
		case !ok:
		case a.Is4():
			v4 = append(v4, a)
		default:
			v6 = append(v6, a)
		}
	}
	// Kubernetes takes the first for the pod's address, and the first of the other family beside it.
	if out.IPs = append(v4, v6...); len(out.IPs) == 0 {
		return Result{}, fmt.Errorf("the CNI plugins gave %s no address: %w", IfName, errdefs.ErrFailedPrecondition)
	}
	return out, nil
}
