package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Records keeps the networks. ForEach gives every record as the JSON that Put made of it.
type Records interface {
	// Put writes or replaces a record. It is on the disk when this returns.
	Put(ctx context.Context, id string, v any) error
	// Delete removes one, durably; of a missing one it is no error.
	Delete(ctx context.Context, id string) error
	// ForEach visits all of them, in the order of their ids. It goes on after one that fn refuses, and gives the errors joined.
	ForEach(fn func(id string, raw []byte) error) error
}

// Options configure a Manager.
type Options struct {
	// Root is where networks are kept if Records is nil.
	Root string
	// State holds what does not outlive a reboot: namespaces and endpoints.
	State   string
	Records Records

	// BridgeName is the interface of the default network; default hako0.
	BridgeName string
	// BridgeSubnet is the default network's subnet, with the gateway as its address if that is not the first one.
	// Zero: 172.29.0.0/16, or the first free one of Pools if the host uses that.
	BridgeSubnet netip.Prefix
	// BridgeSubnet6 gives the default network IPv6. Zero: it has none.
	BridgeSubnet6 netip.Prefix
	// Pools are cut up for networks that name no subnet; default DefaultPools. An IPv6 pool is added if there is none.
	Pools []Pool
	// MTU of networks that name none; default 1500.
	MTU int
	// FirewallTable is the nftables table (family inet); default "hako", with "-" and the bridge's name if that is not hako0.
	FirewallTable string
	// ResolvConf is the host's; default /etc/resolv.conf.
	ResolvConf string
	// HealEvery is how often the host's state is looked at while there are endpoints; default 2 s.
	HealEvery time.Duration
	Log       *slog.Logger
}

const defaultBridge = "hako0"

// notInTableName is what nft(8) would want quotes for.
var notInTableName = regexp.MustCompile(`[^A-Za-z0-9_-]`)

// Manager owns the networks of one daemon. Nothing is made on the host before the
// first endpoint needs it. All methods may be called concurrently.
type Manager struct {
	o           Options
	log         *slog.Logger
	records     Records
	host        *netlink.Handle
	hostNS      *os.File
	netnsDir    string
	endpointDir string
	boot        string
	fw          *firewall
	ports       *ports
	upstream    upstream

	ctx        context.Context
	cancel     context.CancelFunc
	background sync.WaitGroup
	spare      chan *os.File // namespaces made ahead
	refilling  atomic.Bool

	creating sync.Mutex // one Create at a time: subnets are chosen against all others

	mu      sync.RWMutex // guards all below, and the maps and lists inside; never held over I/O
	nets    map[string]*netw
	boxes   map[string]*sandbox // by path
	healing bool
}

// netw is one network. Network itself never changes after it is in Manager.nets.
type netw struct {
	Network
	masq, isolated bool
	bindIP         netip.Addr // for published ports that name no host address

	up    sync.Mutex   // making and healing the bridge
	index atomic.Int32 // of the bridge; 0: not there

	// Guarded by Manager.mu:
	pools   []*pool // as Subnets
	eps     map[string]*endpoint
	names   map[string][]*endpoint // lower case DNS names
	leaving bool
}

// sandbox is one network namespace with its endpoints.
type sandbox struct {
	path string
	mu   sync.Mutex // changes inside the namespace, and the nameserver
	dns  *nameserver
	port uint16      // of the nameserver of an earlier daemon, if there was one
	eps  []*endpoint // guarded by Manager.mu
}

type endpoint struct {
	Endpoint
	hostname string
	priority int
	upstream []netip.Addr
	net      *netw
	box      *sandbox
	held     []*reservation // guarded by box.mu

	// Guarded by Manager.mu. First neither, then live when Connect is done, then leaving from Disconnect
	// until nothing is left, when it is closed.
	live    bool
	leaving chan struct{}
}

// Open takes up the networks and the endpoints of an earlier daemon of the same State.
func Open(ctx context.Context, o Options) (_ *Manager, err error) {
	if o.BridgeName == "" {
		o.BridgeName = defaultBridge
	}
	if o.FirewallTable == "" {
		o.FirewallTable = "hako"
		if o.BridgeName != defaultBridge {
			o.FirewallTable += "-" + notInTableName.ReplaceAllString(o.BridgeName, "_")
		}
	}
	if o.MTU == 0 {
		o.MTU = 1500
	}
	if o.ResolvConf == "" {
		o.ResolvConf = "/etc/resolv.conf"
	}
	if o.HealEvery == 0 {
		o.HealEvery = 2 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	o.Pools = withDefaults(o.Pools, o.BridgeName)
	if !validIfName(o.BridgeName) {
		return nil, fmt.Errorf("open networks: bridge name %q is not possible", o.BridgeName)
	}
	m := &Manager{
		o: o, log: o.Log, records: o.Records, boot: bootID(),
		netnsDir: filepath.Join(o.State, "netns"), endpointDir: filepath.Join(o.State, "endpoints"),
		fw:    newFirewall(o.FirewallTable),
		spare: make(chan *os.File, spareNamespaces),
		nets:  map[string]*netw{}, boxes: map[string]*sandbox{},
	}
	m.ports = newPorts(m.mayUseRelay)
	m.ctx, m.cancel = context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		if err != nil {
			m.stop()
		}
	}()
	for _, d := range []string{m.netnsDir, m.endpointDir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("open networks: %w", err)
		}
	}
	if m.records == nil {
		if m.records, err = openFileRecords(filepath.Join(o.Root, "networks")); err != nil {
			return nil, fmt.Errorf("open networks: %w", err)
		}
	}
	// Not /proc/self, which is the main thread: another Manager of this process may have that
	// in a container's namespace at this moment.
	if m.hostNS, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return nil, fmt.Errorf("open networks: %w", err)
	}
	if m.host, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("open networks: netlink: %w", err)
	}
	states, err := m.loadEndpoints()
	if err != nil {
		return nil, fmt.Errorf("open networks: %w", err)
	}
	if err := m.loadNetworks(ctx, states); err != nil {
		return nil, fmt.Errorf("open networks: %w", err)
	}
	m.restore(ctx, states)
	return m, nil
}

// loadNetworks reads the records and adds the predefined networks.
func (m *Manager) loadNetworks(ctx context.Context, states []endpointState) error {
	err := m.records.ForEach(func(id string, raw []byte) error {
		var n Network
		if err := json.Unmarshal(raw, &n); err != nil {
			return err
		}
		if n.Predefined && n.Bridge != m.o.BridgeName {
			return nil // of a daemon that was configured otherwise
		}
		nw, err := newNetw(n)
		if err != nil {
			return err
		}
		m.nets[id] = nw
		return nil
	})
	if err != nil {
		m.log.Error("some networks cannot be read", "error", err)
	}
	return m.addPredefined(ctx, states)
}

// restore takes up the endpoints whose namespace lives, and removes the others.
func (m *Manager) restore(ctx context.Context, states []endpointState) {
	var dead []*endpoint
	for _, s := range states {
		e, err := m.readmit(s)
		if err != nil {
			m.log.Error("cannot take up an endpoint", "endpoint", s.Endpoint.ID, "network", s.Endpoint.NetworkName, "error", err)
			continue
		}
		if e.net.Driver == DriverBridge && (s.Unfinished || !isNamespace(e.Netns)) {
			dead = append(dead, e)
		}
	}
	for _, e := range dead {
		if err := m.disconnect(ctx, e); err != nil {
			m.log.Error("cannot remove a dead endpoint", "endpoint", e.ID, "error", err)
		}
	}
	for _, e := range m.liveEndpoints() {
		if e.net.Driver != DriverBridge {
			continue
		}
		m.reopen(e)
	}
	if len(m.liveEndpoints()) > 0 {
		// A daemon that was killed between two steps left a table that nobody else changed.
		if rebuilt, err := m.fw.heal(); err != nil {
			m.log.Error("cannot restore the firewall table", "table", m.fw.name, "error", err)
		} else if rebuilt {
			m.log.Info("the firewall table of the earlier daemon is brought up to date", "table", m.fw.name)
		}
		m.heal(ctx)
		m.mu.Lock()
		m.startHealing()
		m.mu.Unlock()
	}
}

// reopen gives an endpoint back what lived in the earlier daemon: ports and DNS.
func (m *Manager) reopen(e *endpoint) {
	e.box.mu.Lock()
	defer e.box.mu.Unlock()
	for _, p := range e.Ports {
		r, err := m.ports.restore(p, e.target(p))
		if r != nil {
			e.held = append(e.held, r)
		}
		if err != nil {
			m.log.Warn("another program has a published port; trying again later", "endpoint", e.ID, "port", p.HostPort, "protocol", p.Proto, "error", err)
		}
	}
	m.fw.expect(e.net.ID, e.net.firewall(), e.EndpointID, e.firewallPorts())
	if err := m.startDNS(e); err != nil {
		m.log.Error("cannot serve names", "endpoint", e.ID, "network", e.NetworkName, "error", err)
	}
}

func (m *Manager) liveEndpoints() []*endpoint {
	m.mu.RLock()
	defer m.mu.RUnlock()
	var out []*endpoint
	for _, n := range m.nets {
		for _, e := range n.eps {
			if e.live {
				out = append(out, e)
			}
		}
	}
	return out
}

// Close ends the daemon's part and leaves endpoints running. Bridges and rules that no
// endpoint needs are removed from the host; they come back when one does.
func (m *Manager) Close() error {
	m.stop()
	var errs []error
	used := false
	for _, n := range m.list() {
		m.mu.RLock()
		empty := len(n.eps) == 0
		m.mu.RUnlock()
		if n.Driver != DriverBridge {
			continue
		}
		if used = used || !empty; empty {
			errs = append(errs, m.takeDown(n))
		}
	}
	if !used {
		errs = append(errs, m.fw.clear())
	}
	for _, b := range m.boxes {
		if b.dns != nil {
			b.dns.close()
		}
	}
	for _, e := range m.liveEndpoints() {
		for _, r := range e.held {
			m.ports.release(r)
		}
	}
	if m.host != nil {
		m.host.Close()
	}
	m.hostNS.Close()
	return errors.Join(errs...)
}

// stop ends what runs in the background.
func (m *Manager) stop() {
	m.cancel()
	m.background.Wait()
	for {
		select {
		case ns := <-m.spare:
			ns.Close()
			continue
		default:
		}
		return
	}
}

// Purge removes everything from the host: endpoints, namespaces, bridges, rules, and the
// networks that users made. It is for tests and for removing hako.
func (m *Manager) Purge(ctx context.Context) error {
	var errs []error
	for _, e := range m.liveEndpoints() {
		errs = append(errs, m.disconnect(ctx, e))
	}
	errs = append(errs, m.Settle(ctx))
	entries, err := os.ReadDir(m.netnsDir)
	errs = append(errs, err)
	for _, f := range entries {
		errs = append(errs, m.DeleteNetns(ctx, filepath.Join(m.netnsDir, f.Name())))
	}
	for _, n := range m.list() {
		if !n.Predefined {
			errs = append(errs, m.Remove(ctx, n.ID))
		} else if n.Driver == DriverBridge {
			errs = append(errs, m.takeDown(n))
		}
	}
	return errors.Join(append(errs, m.fw.clear())...)
}

// mayUseRelay keeps containers of internal networks from ports of other networks, as the firewall does.
func (m *Manager) mayUseRelay(client netip.Addr) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, n := range m.nets {
		if !n.Internal {
			continue
		}
		if client.Zone() == n.Bridge {
			return false
		}
		for _, p := range n.pools {
			if p.prefix.Contains(client.Unmap().WithZone("")) {
				return false
			}
		}
	}
	return true
}
