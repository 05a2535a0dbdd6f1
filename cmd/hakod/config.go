package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/pflag"

	"github.com/hako-engine/hako/api/cri/streaming"
	"github.com/hako-engine/hako/api/trace"
	"github.com/hako-engine/hako/engine"
	"github.com/hako-engine/hako/image/verify"
)

// config is all that can be set: each field is a key of the file and, but for the tables of
// plugins and rules, a flag of the same name (runtimes: --runtime). Where both are given, the flag counts.
type config struct {
	Root             string                 `toml:"root" comment:"Durable files: images, containers, volumes."`
	State            string                 `toml:"state" comment:"Files that are gone after a reboot: sockets, bundles."`
	DockerSocket     string                 `toml:"docker-socket" comment:"Unix socket of the Docker Engine API; \"\" turns it off. Default: docker.sock in the state folder."`
	ContainerdSocket string                 `toml:"containerd-socket" comment:"Unix socket of the containerd API, with the CRI on it; shims report to the same path with .ttrpc added. \"\" turns it off. Default: containerd.sock in the state folder."`
	CRISocket        string                 `toml:"cri-socket" comment:"Unix socket of the Kubernetes CRI; \"\" turns it off. Default: cri.sock in the state folder."`
	NRISocket        string                 `toml:"nri-socket" comment:"Unix socket for NRI plugins, which may change every container of a pod; \"\" turns NRI off."`
	NRIPluginDir     string                 `toml:"nri-plugin-dir" comment:"NRI plugins that are started with the daemon, NN-NAME; the folder may be missing."`
	NRIConfigDir     string                 `toml:"nri-plugin-config-dir" comment:"Their configurations, NN-NAME.conf or NAME.conf."`
	CDISpecDirs      string                 `toml:"cdi-spec-dirs" comment:"Folders with descriptions of devices (CDI), a list separated by colons; in the last ones are those that count."`
	NRITimeout       int                    `toml:"nri-timeout" comment:"Seconds that an NRI plugin may take over a request; then it is dropped."`
	MetricsAddress   string                 `toml:"metrics-address" comment:"IP:PORT for Prometheus, under /metrics; without an IP: this machine only. \"\" turns it off."`
	TraceEndpoint    string                 `toml:"trace-endpoint" comment:"OpenTelemetry collector (OTLP over gRPC) that gets a span of each CRI call, e.g. http://127.0.0.1:4317; \"\": none."`
	TraceRatio       float64                `toml:"trace-ratio" comment:"Part of the traces that begin here which are sent, 0 to 1; those of a caller that samples are."`
	DebugSocket      string                 `toml:"debug-socket" comment:"Unix socket with Go's profiles (net/http/pprof); \"\" turns it off."`
	SocketGroup      int                    `toml:"socket-group" comment:"Group id whose members may use the sockets: they are as powerful as root."`
	RegistryDir      string                 `toml:"registry-dir" comment:"Folder with HOST/hosts.toml: mirrors and certificates of registries."`
	PullTimeout      string                 `toml:"pull-progress-timeout" comment:"For how long a registry may send nothing before the request is made again, and given up in the end, e.g. 30s."`
	Network          string                 `toml:"network" comment:"Of the pods: cni, or builtin: the default network of the containers."`
	StreamAddress    string                 `toml:"stream-address" comment:"IP:PORT of the server for exec, attach and port-forward of the CRI; one that other machines can reach needs a certificate."`
	StreamCert       string                 `toml:"stream-cert" comment:"Certificate of that server, a PEM file."`
	StreamKey        string                 `toml:"stream-key" comment:"Key of the certificate, a PEM file."`
	CNIConfDir       string                 `toml:"cni-conf-dir" comment:"CNI configurations for pods; the first by name counts. The folder may be missing, and is watched."`
	CNIBinDir        string                 `toml:"cni-bin-dir" comment:"CNI plugins, a list separated by colons."`
	Restore          string                 `toml:"restore-checkpoints" comment:"What containers of pods may be restored from: none, archives (files on this machine that only root can write), or images, too. CRIU reads them as root: with images, whoever may name an image hands it what it reads."`
	Snapshotter      string                 `toml:"snapshotter" comment:"auto, erofs, overlayfs, or native: plain copies, for where overlayfs does not work. auto: erofs where the kernel has it (Linux 6.12) and the root was not begun with overlayfs."`
	ErofsMergeLayers int                    `toml:"erofs-merge-layers" comment:"From how many layers on the snapshotter erofs puts those of an image into one file system: containers look names up faster, and images do not share memory for the files of common layers. 0: where that was measured to pay; -1: never."`
	CgroupDriver     string                 `toml:"cgroup-driver" comment:"cgroupfs, or systemd: a scope for each container. Default: systemd where that is PID 1."`
	CgroupPath       string                 `toml:"cgroup-path" comment:"Cgroup that the daemon moves itself into, with the shims that it starts, e.g. /system/hakod; \"\": it stays where it was started."`
	LogLevel         string                 `toml:"log-level" comment:"debug, info, warn or error."`
	LogFormat        string                 `toml:"log-format" comment:"text or json."`
	BridgeName       string                 `toml:"bridge-name" comment:"Interface of the default network."`
	BridgeSubnet     string                 `toml:"bridge-subnet" comment:"Subnet of the default network, e.g. 10.88.0.0/24; \"\": chosen."`
	BridgeSubnet6    string                 `toml:"bridge-subnet6" comment:"IPv6 subnet of the default network; \"\": none."`
	MTU              int                    `toml:"mtu" comment:"Of new networks."`
	ShimBinary       string                 `toml:"shim-binary" comment:"Path of hako-shim; \"\": beside hakod."`
	RestartInterval  string                 `toml:"restart-interval" comment:"How often it is looked for containers of containerd's clients that are to be started again (labels containerd.io/restart.*), e.g. 10s."`
	InitBinary       string                 `toml:"init-binary" comment:"Static init for containers started with --init; \"\": hako's own."`
	ProxyPlugins     map[string]proxyPlugin `toml:"proxy_plugins" comment:"Snapshotters of other programs: [proxy_plugins.NAME] with type = \"snapshot\" and address = \"path of its gRPC socket\"."`
	Runtimes         map[string]string      `toml:"runtimes" comment:"Further OCI runtimes: name = \"path of the binary\"."`
	Verify           map[string]verify.Rule `toml:"verify" comment:"Signatures that images need before they are pulled, by registry or the beginning of a repository's name: [verify.\"registry.example.com/team\"] keys = [\"cosign.pub\"]."`
}

func defaultConfig() config {
	return config{
		Root: "/var/lib/hako", State: "/run/hako", DockerSocket: unset, ContainerdSocket: unset, CRISocket: unset,
		RegistryDir: "/etc/hako/certs.d", PullTimeout: "30s", RestartInterval: "10s", Network: networkCNI, StreamAddress: "127.0.0.1:0", TraceRatio: 1, CNIConfDir: "/etc/cni/net.d", CNIBinDir: "/opt/cni/bin:/usr/lib/cni",
		NRIPluginDir: "/opt/nri/plugins", NRIConfigDir: "/etc/nri/conf.d", NRITimeout: 5,
		CDISpecDirs: "/etc/cdi:/var/run/cdi", Restore: engine.RestoreArchives,
		Snapshotter: autoSnapshotter, LogLevel: "info", LogFormat: "text", BridgeName: "hako0", MTU: 1500,
		ProxyPlugins: map[string]proxyPlugin{}, Runtimes: map[string]string{}, Verify: map[string]verify.Rule{},
	}
}

// proxyPlugin is a part of hako in another program, as in containerd's configuration.
type proxyPlugin struct {
	Type    string `toml:"type"`
	Address string `toml:"address"`
}

// What network may be.
const (
	networkCNI     = "cni"
	networkBuiltin = "builtin"
)

// unset stands for a socket in the state folder, wherever that is. It is no possible path.
const unset = "\x00"

const defaultConfigPath = "/etc/hako/config.toml"

// flags registers a flag for each field. help gives the text of a key.
func (c *config) flags(fs *pflag.FlagSet) {
	v := reflect.ValueOf(c).Elem()
	for i := range v.NumField() {
		f := v.Type().Field(i)
		name, help := f.Tag.Get("toml"), f.Tag.Get("comment")
		switch p := v.Field(i).Addr().Interface().(type) {
		case *string:
			if *p == unset { // the default is said below
				help, _, _ = strings.Cut(help, " Default:")
			}
			fs.StringVar(p, name, *p, help)
			if *p == unset {
				fs.Lookup(name).DefValue = strings.TrimSuffix(name, "-socket") + ".sock in the state folder"
			}
		case *int:
			fs.IntVar(p, name, *p, help)
		case *float64:
			fs.Float64Var(p, name, *p, help)
		case *map[string]string:
			fs.StringToStringVar(p, strings.TrimSuffix(name, "s"), *p, "A further OCI runtime, NAME=PATH; may be repeated.")
			fs.Lookup(strings.TrimSuffix(name, "s")).DefValue = "" // none, which pflag would say as []
		}
	}
}

// keys are the names that the file may hold.
func keys() []string { return tomlNames(reflect.TypeFor[config]()) }

// tomlNames are the names of a structure's fields in the file.
func tomlNames(t reflect.Type) []string {
	out := make([]string, t.NumField())
	for i := range out {
		out[i], _, _ = strings.Cut(t.Field(i).Tag.Get("toml"), ",")
	}
	return out
}

// load reads a file over c. Only one that nobody named may be missing.
func (c *config) load(path string, named bool) error {
	raw, err := os.ReadFile(path)
	switch {
	case !errors.Is(err, fs.ErrNotExist):
	case !named:
		return nil
	default:
		return fmt.Errorf("read configuration: %w: make it with hakod config default, or name no file for the defaults", err)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read configuration: %w (hakod config default prints one; without a file its values count)", err)
	}
	if err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	d := toml.NewDecoder(bytes.NewReader(raw)).DisallowUnknownFields()
	err = d.Decode(c)
	var strict *toml.StrictMissingError
	var derr *toml.DecodeError
	switch {
	case errors.As(err, &strict):
		var msgs []string
		for _, e := range strict.Errors {
			row, _ := e.Position()
			key := strings.Join(e.Key(), ".")
			msgs = append(msgs, fmt.Sprintf("%s:%d: unknown key %q, did you mean %q?", path, row, key, nearestKey(reflect.TypeFor[config](), e.Key())))
		}
		return errors.New(strings.Join(msgs, "\n"))
	case errors.As(err, &derr):
		row, col := derr.Position()
		return fmt.Errorf("%s:%d:%d: %w", path, row, col, derr)
	case err != nil:
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// complete fills in what depends on other values, and checks all.
func (c *config) complete() error {
	for _, d := range []struct {
		key  string
		path *string
	}{{"root", &c.Root}, {"state", &c.State}} {
		abs, err := filepath.Abs(*d.path)
		if err != nil || *d.path == "" {
			return fmt.Errorf("%s: %q is not a folder", d.key, *d.path)
		}
		*d.path = abs
	}
	if c.Root == c.State {
		return fmt.Errorf("root and state are the same folder, %s: give each its own", c.Root)
	}
	for name, p := range map[string]*string{"docker": &c.DockerSocket, "containerd": &c.ContainerdSocket, "cri": &c.CRISocket, "debug": &c.DebugSocket, "nri": &c.NRISocket} {
		switch {
		case *p == unset:
			*p = filepath.Join(c.State, name+".sock")
		case *p != "" && !filepath.IsAbs(*p):
			abs, err := filepath.Abs(*p)
			if err != nil {
				return err
			}
			*p = abs
		}
	}
	if c.NRISocket != "" && c.CRISocket == "" {
		return errors.New("nri-socket: NRI plugins follow the pods of the CRI, which cri-socket turns off")
	}
	if c.NRITimeout < 1 || c.NRITimeout > 60 {
		return fmt.Errorf("nri-timeout: %d is not between 1 and 60 seconds", c.NRITimeout)
	}
	if err := c.completeObservers(); err != nil {
		return err
	}
	if (c.StreamCert == "") != (c.StreamKey == "") {
		return errors.New("stream-cert and stream-key: one is of no use without the other")
	}
	if err := streaming.CheckAddress(c.StreamAddress, c.StreamCert != ""); err != nil {
		return fmt.Errorf("stream-address: %w", err)
	}
	oneOf := func(key, value string, allowed ...string) error {
		if slices.Contains(allowed, value) {
			return nil
		}
		named := slices.DeleteFunc(allowed, func(s string) bool { return s == "" }) // "" is the default
		return fmt.Errorf("%s: %q is not one of %s", key, value, strings.Join(named, ", "))
	}
	for _, err := range []error{
		oneOf("restore-checkpoints", c.Restore, engine.RestoreNone, engine.RestoreArchives, engine.RestoreImages),
		oneOf("network", c.Network, networkCNI, networkBuiltin),
		oneOf("snapshotter", c.Snapshotter, append(slices.Sorted(maps.Keys(c.ProxyPlugins)), autoSnapshotter, "erofs", "overlayfs", "native")...),
		checkProxyPlugins(c.ProxyPlugins),
		oneOf("cgroup-driver", c.CgroupDriver, "", "cgroupfs", "systemd"),
		checkCgroupPath(c.CgroupPath),
		oneOf("log-level", c.LogLevel, "debug", "info", "warn", "error"),
		oneOf("log-format", c.LogFormat, "text", "json"),
	} {
		if err != nil {
			return err
		}
	}
	if d, err := time.ParseDuration(c.PullTimeout); err != nil || d <= 0 {
		return fmt.Errorf("pull-progress-timeout: %q is not a duration such as 30s or 2m", c.PullTimeout)
	}
	if c.ErofsMergeLayers < -1 {
		return fmt.Errorf("erofs-merge-layers: %d is not -1, 0 or a number of layers", c.ErofsMergeLayers)
	}
	if d, err := time.ParseDuration(c.RestartInterval); err != nil || d <= 0 {
		return fmt.Errorf("restart-interval: %q is not a duration such as 10s or 1m", c.RestartInterval)
	}
	if c.CgroupDriver == "" {
		c.CgroupDriver = cgroupDriver("/")
	}
	for key, s := range map[string]string{"bridge-subnet": c.BridgeSubnet, "bridge-subnet6": c.BridgeSubnet6} {
		if s == "" {
			continue
		}
		if _, err := netip.ParsePrefix(s); err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
	}
	for _, dir := range filepath.SplitList(c.CDISpecDirs) {
		if !filepath.IsAbs(dir) {
			return fmt.Errorf("cdi-spec-dirs: %q is not an absolute path", dir)
		}
	}
	if _, err := verify.NewPolicy(c.Verify, ""); err != nil {
		return err
	}
	for name, bin := range c.Runtimes {
		if !filepath.IsAbs(bin) {
			return fmt.Errorf("runtimes: %s: %q is not an absolute path", name, bin)
		}
	}
	return nil
}

// cgroupDriver gives the default of the machine whose files are below root. Where systemd
// rules the cgroups, what makes some beside it is at its mercy.
func cgroupDriver(root string) string {
	// The folder is systemd's own word for "I am PID 1" (sd_booted(3)), but a container may
	// have been given the host's /run.
	comm, err := os.ReadFile(filepath.Join(root, "proc/1/comm"))
	if _, serr := os.Lstat(filepath.Join(root, "run/systemd/system")); serr == nil && err == nil && strings.TrimSpace(string(comm)) == "systemd" {
		return "systemd"
	}
	return "cgroupfs"
}

// completeObservers checks where metrics and traces go.
func (c *config) completeObservers() error {
	if c.MetricsAddress != "" {
		if strings.HasPrefix(c.MetricsAddress, ":") {
			c.MetricsAddress = "127.0.0.1" + c.MetricsAddress
		}
		if _, err := netip.ParseAddrPort(c.MetricsAddress); err != nil {
			return fmt.Errorf("metrics-address: %q is not IP:PORT", c.MetricsAddress)
		}
	}
	if c.TraceEndpoint != "" {
		if err := trace.CheckEndpoint(c.TraceEndpoint); err != nil {
			return fmt.Errorf("trace-endpoint: %w", err)
		}
	}
	if !(c.TraceRatio >= 0 && c.TraceRatio <= 1) { // nor NaN
		return fmt.Errorf("trace-ratio: %v is not between 0 and 1", c.TraceRatio)
	}
	return nil
}

// write prints the configuration as a file with comments.
func (c config) write() ([]byte, error) {
	var b bytes.Buffer
	for _, p := range []*string{&c.DockerSocket, &c.ContainerdSocket, &c.CRISocket} {
		if *p == unset {
			*p = ""
		}
	}
	if err := toml.NewEncoder(&b).Encode(c); err != nil {
		return nil, err
	}
	// An empty socket would turn it off: the default is shown as what it is.
	lines := strings.SplitAfter(b.String(), "\n")
	for i, l := range lines {
		for _, s := range []string{"docker", "containerd", "cri"} {
			if strings.HasPrefix(l, s+"-socket = ") {
				lines[i] = fmt.Sprintf("# %s-socket = '%s'\n", s, filepath.Join(c.State, s+".sock"))
			}
		}
	}
	return []byte(strings.Join(lines, "")), nil
}

// nearestKey gives the known key that is nearest to one of the file, of which the parts may be names of tables.
func nearestKey(t reflect.Type, key []string) string {
	for t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	if t.Kind() == reflect.Map && len(key) > 1 {
		return key[0] + "." + nearestKey(t.Elem(), key[1:])
	}
	if t.Kind() != reflect.Struct {
		return strings.Join(key, ".")
	}
	known := tomlNames(t)
	if i := slices.Index(known, key[0]); i >= 0 && len(key) > 1 {
		return key[0] + "." + nearestKey(t.Field(i).Type, key[1:])
	}
	return nearest(key[0], known)
}

// nearest gives the known name with the smallest edit distance.
func nearest(s string, known []string) string {
	best, dist := "", 1<<30
	for _, k := range known {
		if d := distance(s, k); d < dist {
			best, dist = k, d
		}
	}
	return best
}

// distance is Levenshtein's.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		prev := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			prev, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, prev+cost)
		}
	}
	return row[len(b)]
}
