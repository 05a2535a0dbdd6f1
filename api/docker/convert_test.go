package docker

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	wire "github.com/moby/moby/api/types/network"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/engine"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// golden compares a value, as indented JSON, with a file of testdata.
func golden(t *testing.T, file string, v any) {
	t.Helper()
	got, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	file = filepath.Join("testdata", file)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs (run with -update and review the change). Got:\n%s", file, got)
	}
}

func decodeCreate(t *testing.T, body string) *createRequest {
	t.Helper()
	var req createRequest
	if err := decodeJSON(strings.NewReader(body), &req); err != nil {
		t.Fatal(err)
	}
	return &req
}

// TestCreateGolden converts requests as clients send them to the engine's
// configuration, and that back to what inspect tells of it.
func TestCreateGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/create/*.json")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		if strings.Contains(filepath.Base(file), ".golden.") {
			continue
		}
		body, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		c, warnings, err := configFrom(decodeCreate(t, string(body)))
		if err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		name := strings.TrimSuffix(filepath.Base(file), ".json")
		golden(t, "create/"+name+".golden.json", struct {
			Config   engine.Config
			Warnings []string
			Inspect  *container.HostConfig
		}{c, warnings, hostConfigOf(&c)})
	}
}

func TestCreateRefusals(t *testing.T) {
	host := func(s string) string { return `{"Image":"x","HostConfig":{` + s + `}}` }
	mount := func(s string) string { return host(`"Mounts":[` + s + `]`) }
	for _, tt := range []struct {
		body, want string
		class      error
	}{
		{`{}`, "no image specified", errdefs.ErrInvalidArgument},
		{`{"Image":"x","MacAddress":"zz"}`, `invalid MAC address "zz"`, errdefs.ErrInvalidArgument},
		{`{"Image":"x","Volumes":{"rel":{}}}`, "mount path must be absolute", errdefs.ErrInvalidArgument},
		{`{"Image":"x","Volumes":{"/":{}}}`, "destination can't be '/'", errdefs.ErrInvalidArgument},
		{host(`"Binds":["/a:/b:rw,ro"]`), "invalid mode: rw,ro", errdefs.ErrInvalidArgument},
		{host(`"Binds":["/a:/b:weird"]`), "invalid mode: weird", errdefs.ErrInvalidArgument},
		{host(`"Binds":["/a:/b:ro:x"]`), "invalid volume specification: '/a:/b:ro:x'", errdefs.ErrInvalidArgument},
		{host(`"Binds":["/a:/"]`), "destination can't be '/'", errdefs.ErrInvalidArgument},
		{host(`"Binds":["/a:/x/.."]`), "destination can't be '/'", errdefs.ErrInvalidArgument},
		{host(`"Binds":["a/b:/c"]`), "includes invalid characters for a local volume name", errdefs.ErrInvalidArgument},
		{host(`"Binds":["vol:/c:shared"]`), "invalid mode: shared", errdefs.ErrInvalidArgument},
		{host(`"Binds":["/a:/c:nocopy"]`), "invalid mode: nocopy", errdefs.ErrInvalidArgument},
		{host(`"Binds":[":/c"]`), "invalid volume specification", errdefs.ErrInvalidArgument},
		{host(`"Binds":[""]`), "invalid volume specification", errdefs.ErrInvalidArgument},
		{host(`"Binds":["/a:/b","/c:/b/"]`), "Duplicate mount point: /b", errdefs.ErrInvalidArgument},
		{host(`"Tmpfs":{"x":""}`), "mount path must be absolute", errdefs.ErrInvalidArgument},
		{mount(`{"Type":"bind","Target":"/x"}`), `invalid mount config for type "bind": field Source must not be empty`, errdefs.ErrInvalidArgument},
		{mount(`{"Type":"bind","Source":"/x"}`), `field Target must not be empty`, errdefs.ErrInvalidArgument},
		{mount(`{"Type":"bind","Source":"rel","Target":"/x"}`), `mount path must be absolute`, errdefs.ErrInvalidArgument},
		{mount(`{"Type":"bind","Source":"/a","Target":"/x","BindOptions":{"Propagation":"odd"}}`), `invalid propagation mode: odd`, errdefs.ErrInvalidArgument},
		{mount(`{"Type":"bind","Source":"/a","Target":"/x","VolumeOptions":{}}`), `field VolumeOptions must not be specified`, errdefs.ErrInvalidArgument},
		{mount(`{"Type":"bind","Source":"/a","Target":"/x","BindOptions":{"ReadOnlyForceRecursive":true}}`), `must be read-only`, errdefs.ErrInvalidArgument},
		{mount(`{"Type":"volume","Source":"../x","Target":"/x"}`), `includes invalid characters`, errdefs.ErrInvalidArgument},
		{mount(`{"Type":"volume","Source":"vv","Target":"/x","VolumeOptions":{"Subpath":"../../etc"}}`), `subpath must be a relative path`, errdefs.ErrInvalidArgument},
		{mount(`{"Type":"volume","Target":"/x","VolumeOptions":{"Subpath":"a"}}`), `must not set Subpath when using anonymous volumes`, errdefs.ErrInvalidArgument},
		{mount(`{"Type":"tmpfs","Source":"/x","Target":"/x"}`), `field Source must not be specified`, errdefs.ErrInvalidArgument},
		{mount(`{"Type":"tmpfs","Target":"/x","TmpfsOptions":{"SizeBytes":-1}}`), `size must not be negative`, errdefs.ErrInvalidArgument},
		{mount(`{"Type":"npipe","Source":"/x","Target":"/x"}`), `mount type unknown`, errdefs.ErrInvalidArgument},
		{mount(`{"Type":"image","Source":"x","Target":"/x"}`), `not in this version`, errdefs.ErrNotImplemented},
		{host(`"PortBindings":{"80/tcp":[{"HostPort":"x"}]}`), `invalid port specification: "x"`, errdefs.ErrInvalidArgument},
		{host(`"PortBindings":{"80/tcp":[{"HostPort":"70000"}]}`), `invalid port specification`, errdefs.ErrInvalidArgument},
		{host(`"PortBindings":{"80/tcp":[{"HostPort":"9-8"}]}`), `invalid port specification`, errdefs.ErrInvalidArgument},
		{host(`"PortBindings":{"80/icmp":[{"HostPort":"1"}]}`), `unknown protocol`, errdefs.ErrInvalidArgument},
		{host(`"Isolation":"hyperv"`), `invalid isolation`, errdefs.ErrInvalidArgument},
		{host(`"DeviceRequests":[{"Capabilities":[["gpu"]]}]`), `could not select device driver "" with capabilities: [[gpu]]`, errdefs.ErrInvalidArgument},
		{host(`"Cgroup":"container:x"`), `not in this version`, errdefs.ErrNotImplemented},
		{host(`"Umask":18`), `not in this version`, errdefs.ErrNotImplemented},
		{host(`"Devices":[{}]`), `PathOnHost must not be empty`, errdefs.ErrInvalidArgument},
		{host(`"Ulimits":[{"Hard":1}]`), `a name is missing`, errdefs.ErrInvalidArgument},
		{`{"Image":"x","HostConfig":{"NetworkMode":"host"},"NetworkingConfig":{"EndpointsConfig":{"a":{}}}}`, `cannot attach both`, errdefs.ErrInvalidArgument},
		{`{"Image":"x","NetworkingConfig":{"EndpointsConfig":{"bridge":{"IPAMConfig":{"IPv4Address":"fd00::1"}}}}}`, `invalid IPv4 address`, errdefs.ErrInvalidArgument},
		{`{"Image":"x","NetworkingConfig":{"EndpointsConfig":{"bridge":{"IPAMConfig":{"LinkLocalIPs":["169.254.1.1"]}}}}}`, `link-local`, errdefs.ErrNotImplemented},
	} {
		_, _, err := configFrom(decodeCreate(t, tt.body))
		if err == nil || !strings.Contains(err.Error(), tt.want) || !errors.Is(err, tt.class) {
			t.Errorf("%s: %v, want %q of class %v", tt.body, err, tt.want, tt.class)
		}
	}
}

func TestBinds(t *testing.T) {
	for in, want := range map[string]engine.Mount{
		"/a:/b":                {Kind: "bind", Source: "/a", Target: "/b", CreateSource: true},
		"/a/../c/:/b/":         {Kind: "bind", Source: "/c", Target: "/b", CreateSource: true},
		"/a:/b:ro,z,private":   {Kind: "bind", Source: "/a", Target: "/b", CreateSource: true, ReadOnly: true, Propagation: "private", Options: []string{"z"}},
		"/a:/b:cached":         {Kind: "bind", Source: "/a", Target: "/b", CreateSource: true},
		"vol:/b:ro":            {Kind: "volume", Source: "vol", Target: "/b", ReadOnly: true, Driver: "d"},
		"v0l_.-x:/b:nocopy,rw": {Kind: "volume", Source: "v0l_.-x", Target: "/b", NoCopy: true, Driver: "d"},
		"/b":                   {Kind: "volume", Target: "/b", Driver: "d"},
		"/b:ro":                {Kind: "volume", Target: "/b", ReadOnly: true, Driver: "d"},
	} {
		want.Shorthand = "bind:" + in
		got, err := parseBind(in, "d")
		if err != nil {
			t.Errorf("%s: %v", in, err)
			continue
		}
		a, _ := json.Marshal(got)
		b, _ := json.Marshal(want)
		if !bytes.Equal(a, b) {
			t.Errorf("%s: %s, want %s", in, a, b)
		}
	}
}

// sampleContainer is one with everything set that inspect shows.
func sampleContainer(t *testing.T) engine.Container {
	t.Helper()
	body, err := os.ReadFile("testdata/create/cli.json")
	if err != nil {
		t.Fatal(err)
	}
	config, _, err := configFrom(decodeCreate(t, string(body)))
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)
	size, rootfs := int64(10), int64(20)
	mounts := append([]engine.Mount(nil), config.Mounts...)
	for i := range mounts {
		mounts[i].Resolved = "/var/lib/hako/x" + mounts[i].Target
		if mounts[i].Kind == engine.MountVolume && mounts[i].Source == "" {
			mounts[i].Source = "5f1d"
		}
	}
	mounts = append(mounts, engine.Mount{Kind: engine.MountVolume, Source: "6a2e", Target: "/from-image", FromImage: true, Resolved: "/v/6a2e"})
	return engine.Container{
		ID: strings.Repeat("ab", 32), Name: "web", Created: at, Config: config,
		ImageID: "sha256:" + strings.Repeat("cd", 32), ImageName: "alpine:3",
		Path: "sh", Args: []string{"-c", "echo hi"}, Env: []string{"PATH=/bin", "A=b"}, User: "1000:1000", WorkingDir: "/w",
		Hostname: "h", Labels: map[string]string{"l": "v", "from": "image"}, ExposedPorts: []string{"53/udp", "80/tcp", "9000/tcp"},
		StopSignal: "SIGINT", Cmd: []string{"sh", "-c", "echo hi"}, Healthcheck: config.Healthcheck,
		State: engine.State{
			Status: engine.StatusPaused, Pid: 42, StartedAt: at.Add(time.Second),
			Health: &engine.Health{Status: "unhealthy", FailingStreak: 3, Log: []engine.HealthResult{{Start: at, End: at.Add(1), ExitCode: 1, Output: "no"}}},
		},
		RestartCount: 2, Mounts: mounts, Attached: config.Endpoints,
		Endpoints: []engine.Endpoint{{
			ID: "x", EndpointID: "e1", NetworkID: "n1", NetworkName: "front", MAC: "02:42:0a:01:02:03",
			IPv4: netip.MustParsePrefix("10.1.2.3/24"), IPv6: netip.MustParsePrefix("fd00::5/64"),
			Gateway4: netip.MustParseAddr("10.1.2.1"), Gateway6: netip.MustParseAddr("fd00::1"), DNSNames: []string{"web", "abab"},
			Ports: []engine.PortMapping{
				{Proto: "tcp", ContainerPort: 80, HostPort: 8080},
				{Proto: "tcp", ContainerPort: 80, HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 8001},
				{Proto: "udp", ContainerPort: 53, HostIP: netip.MustParseAddr("::1"), HostPort: 49153},
			},
		}},
		SandboxKey: "/run/netns/x", ExecIDs: []string{"e1"}, Snapshotter: "overlayfs", SnapshotKey: "x",
		LogPath: "/l", HostnamePath: "/hn", HostsPath: "/h", ResolvPath: "/r", SizeRw: &size, SizeRootFs: &rootfs,
	}
}

func TestInspectGolden(t *testing.T) {
	ctr := sampleContainer(t)
	golden(t, "inspect.golden.json", version{1, 52}.inspect(inspectOf(&ctr)))

	// An address on the default bridge is shown once more at the top for old clients.
	ctr.Config.NetworkMode, ctr.Attached, ctr.Endpoints[0].NetworkName = "", nil, "bridge"
	b, err := json.Marshal(version{1, 50}.inspect(inspectOf(&ctr)))
	if err != nil {
		t.Fatal(err)
	}
	var old struct {
		ID              string `json:"Id"`
		NetworkSettings struct {
			Bridge, IPAddress, MacAddress, Gateway, SandboxKey string
			IPPrefixLen                                        int
			Ports                                              wire.PortMap
			Networks                                           map[string]any
		}
	}
	if err := json.Unmarshal(b, &old); err != nil {
		t.Fatal(err)
	}
	n := old.NetworkSettings
	if old.ID != ctr.ID || n.IPAddress != "10.1.2.3" || n.IPPrefixLen != 24 || n.MacAddress != "02:42:0a:01:02:03" || n.Gateway != "10.1.2.1" ||
		n.SandboxKey != "/run/netns/x" || len(n.Ports) != 3 || n.Networks["bridge"] == nil {
		t.Errorf("%+v", old)
	}
	if b, _ := json.Marshal(version{1, 52}.inspect(inspectOf(&ctr))); bytes.Contains(b, []byte(`"IPPrefixLen":24,"IPv6Gateway":"fd00::1","MacAddress"`)) {
		t.Errorf("1.52 has the address at the top: %s", b)
	}
}

func TestListGolden(t *testing.T) {
	ctr := sampleContainer(t)
	golden(t, "list.golden.json", summaryOf(&ctr, ctr.State.StartedAt.Add(5*time.Minute)))
}

func TestEmptyContainer(t *testing.T) {
	ctr := engine.Container{ID: "x", State: engine.State{Status: engine.StatusCreated}, Config: engine.Config{NetworkMode: "container:y"}}
	b, err := json.Marshal(inspectOf(&ctr))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"StartedAt":"0001-01-01T00:00:00Z"`, `"Args":[]`, `"Mounts":[]`, `"Networks":{}`, `"Ports":{}`, `"Labels":{}`, `"Runtime":"hako"`} {
		if !bytes.Contains(b, []byte(want)) {
			t.Errorf("%s lacks %s", b, want)
		}
	}
}

func TestStatusText(t *testing.T) {
	now := time.Date(2026, 1, 1, 1, 0, 0, 0, time.UTC)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	for want, s := range map[string]engine.State{
		"Created":                        {Status: "created"},
		"Up 5 minutes":                   {Status: "running", StartedAt: ago(5 * time.Minute)},
		"Up 5 minutes (healthy)":         {Status: "running", StartedAt: ago(5 * time.Minute), Health: &engine.Health{Status: "healthy"}},
		"Up 1 second (health: starting)": {Status: "running", StartedAt: ago(time.Second), Health: &engine.Health{Status: "starting"}},
		"Up 2 hours (Paused)":            {Status: "paused", StartedAt: ago(2 * time.Hour)},
		"Exited (137) 3 seconds ago":     {Status: "exited", ExitCode: 137, FinishedAt: ago(3 * time.Second)},
		"Restarting (1) 4 seconds ago":   {Status: "restarting", ExitCode: 1, FinishedAt: ago(4 * time.Second)},
		"Removal In Progress":            {Status: "removing"},
		"Dead":                           {Status: "dead"},
		"Exited (0)":                     {Status: "exited"},
	} {
		if got := statusText(&s, now); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	if got := commandLine("sh", []string{"-c", "echo hi"}); got != "sh -c 'echo hi'" {
		t.Error(got)
	}
}

func TestNetworkFrom(t *testing.T) {
	var req wire.CreateRequest
	body := `{"Name":"n","CheckDuplicate":true,"EnableIPv6":true,"Internal":true,"IPAM":{"Driver":"default","Options":{},"Config":[
	 {"Subnet":"10.5.0.0/16","IPRange":"10.5.1.0/24","Gateway":"10.5.0.1","AuxiliaryAddresses":{"router":"10.5.0.9"}},{"Subnet":"fd01::/64"}]},
	 "Options":{"com.docker.network.bridge.name":"br9"},"Labels":{"a":"b"}}`
	if err := decodeJSON(strings.NewReader(body), &req); err != nil {
		t.Fatal(err)
	}
	c, err := networkFrom(&req)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "network.golden.json", struct {
		Config engine.NetworkConfig
		Back   wire.Network
	}{c, networkOf(&engine.Network{ID: "id", Name: c.Name, Driver: c.Driver, EnableIPv4: c.EnableIPv4, EnableIPv6: c.EnableIPv6, Internal: c.Internal, Subnets: c.Subnets, Options: c.Options, Labels: c.Labels})})

	for body, want := range map[string]error{
		`{}`:                                    errdefs.ErrInvalidArgument,
		`{"Name":"n","ConfigOnly":true}`:        errdefs.ErrNotImplemented,
		`{"Name":"n","Driver":"overlay"}`:       errdefs.ErrUnavailable,
		`{"Name":"n","Ingress":true}`:           errdefs.ErrUnavailable,
		`{"Name":"n","IPAM":{"Driver":"dhcp"}}`: errdefs.ErrInvalidArgument,
		`{"Name":"n","IPAM":{"Config":[{"Gateway":"10.0.0.1"}]}}`:                                        errdefs.ErrInvalidArgument,
		`{"Name":"n","IPAM":{"Config":[{"Subnet":"10.0.0.1/24"}]}}`:                                      errdefs.ErrInvalidArgument,
		`{"Name":"n","IPAM":{"Config":[{"Subnet":"10.0.0.0/24","Gateway":"10.0.1.1"}]}}`:                 errdefs.ErrInvalidArgument,
		`{"Name":"n","IPAM":{"Config":[{"Subnet":"10.0.0.0/24","IPRange":"10.0.0.0/16"}]}}`:              errdefs.ErrInvalidArgument,
		`{"Name":"n","IPAM":{"Config":[{"Subnet":"10.0.0.0/24","AuxiliaryAddresses":{"a":"1.1.1.1"}}]}}`: errdefs.ErrInvalidArgument,
	} {
		var req wire.CreateRequest
		if err := decodeJSON(strings.NewReader(body), &req); err != nil {
			t.Fatal(err)
		}
		if _, err := networkFrom(&req); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", body, err, want)
		}
	}
}

func TestImageShapes(t *testing.T) {
	created := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	d := engine.ImageDetail{Image: engine.ImageRecord{
		ID: "sha256:aa", Names: []string{"docker.io/library/alpine:3", "localhost:5000/x/y:1"}, Digests: []string{"docker.io/library/alpine@sha256:" + strings.Repeat("0", 64)},
		Target: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: "sha256:bb", Size: 3}, Size: 99, Created: created, Updated: created,
	}}
	d.Config.Created, d.Config.Author, d.Config.Architecture, d.Config.OS = &created, "me", "amd64", "linux"
	d.Config.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{"sha256:cc"}}
	d.Config.History = []ocispec.History{{Comment: "last"}}
	d.Config.Config.Cmd = []string{"sh"}
	golden(t, "image.golden.json", version{1, 52}.image(imageInspectOf(&d, "overlayfs")))

	f := &fake{images: map[string]engine.ImageDetail{"a/b:1": d}, node: engine.Info{Snapshotter: "overlayfs"}}
	n := serve(t, f)
	for v, want := range map[string][2]bool{"1.40": {true, false}, "1.46": {false, false}, "1.48": {false, true}, "1.50": {false, true}} {
		got := n.expect(200, "GET", "/v"+v+"/images/json", "")
		if has := [2]bool{strings.Contains(got, `"VirtualSize":99`), strings.Contains(got, `"Descriptor":`)}; has != want {
			t.Errorf("%s: %s", v, got)
		}
		got = n.expect(200, "GET", "/v"+v+"/images/a/b:1/json", "")
		if has := [2]bool{strings.Contains(got, `"VirtualSize":99`), strings.Contains(got, `"Descriptor":`)}; has != want {
			t.Errorf("%s: %s", v, got)
		}
		if !strings.Contains(got, `"RepoTags":["alpine:3","localhost:5000/x/y:1"]`) {
			t.Errorf("%s: %s", v, got)
		}
	}
	n.expect(404, "GET", "/images/nope/json", "")
	n.expect(201, "POST", "/images/a/b:1/tag?repo=x/y&tag=2", "")
	if f.tagged != [2]string{"a/b:1", "docker.io/x/y:2"} {
		t.Error(f.tagged)
	}
	n.expect(400, "POST", "/images/a/b:1/tag?repo=X&tag=2", "")
	n.expect(400, "POST", "/images/a/b:1/tag?repo=x&tag=!", "")
}

func TestInfoVersionAndDiskUsage(t *testing.T) {
	f := &fake{node: engine.Info{
		Name: "n", Snapshotter: "overlayfs", CgroupVersion: 1, CgroupDriver: "cgroupfs", Runtimes: map[string]string{"hako": "", "runc": "/usr/bin/runc"},
		SecurityOptions: []string{"name=seccomp,profile=builtin"}, InsecureRegistries: []string{"localhost:5000"}, Version: "0.1.0", NCPU: 2, MemoryLimit: true,
	}}
	ctr := sampleContainer(t)
	f.usage = engine.DiskUsage{
		LayersSize: 7, Containers: []engine.Container{ctr},
		Images:  []engine.ImageSummary{{Image: engine.ImageRecord{ID: "sha256:aa", Size: 5}}},
		Volumes: []engine.Volume{{Name: "v", Size: 4, RefCount: 1}, {Name: "w", Size: 6}},
	}
	n := serve(t, f)
	got := n.expect(200, "GET", "/info", "")
	for _, want := range []string{`"CgroupVersion":"1"`, `"DefaultRuntime":"hako"`, `"runc":{"path":"/usr/bin/runc"}`, `"LocalNodeState":"inactive"`, `"localhost:5000":{`, `"OomKillDisable":true`} {
		if !strings.Contains(got, want) {
			t.Errorf("info lacks %s: %s", want, got)
		}
	}
	got = n.expect(200, "GET", "/version", "")
	for _, want := range []string{`"Version":"0.1.0"`, `"ApiVersion":"` + MaxVersion, `"MinAPIVersion":"` + MinVersion, `"GitCommit":"abc"`} {
		if !strings.Contains(got, want) {
			t.Errorf("version lacks %s: %s", want, got)
		}
	}
	got = n.expect(200, "GET", "/v1.50/system/df", "")
	for _, want := range []string{`"LayersSize":7`, `"UsageData":{"RefCount":1,"Size":4}`, `"BuildCache":[]`, `"BuilderSize":0`} {
		if !strings.Contains(got, want) {
			t.Errorf("df lacks %s: %s", want, got)
		}
	}
	got = n.expect(200, "GET", "/v1.52/system/df?type=volume", "")
	for _, want := range []string{`"VolumeUsage":{"ActiveCount":1`, `"Reclaimable":6`, `"TotalSize":10`, `"Containers":null`} {
		if !strings.Contains(got, want) {
			t.Errorf("df lacks %s: %s", want, got)
		}
	}
	n.expect(400, "GET", "/system/df?type=dust", "")
	n.expect(400, "POST", "/auth", `{"serveraddress":"r.example.com"}`)
	if got := n.expect(200, "POST", "/auth", `{"username":"u","password":"right","serveraddress":"r.example.com"}`); !strings.Contains(got, `"Status":"Login Succeeded"`) {
		t.Error(got)
	}
	if got := n.expect(401, "POST", "/auth", `{"username":"u","password":"wrong"}`); !strings.Contains(got, "incorrect username or password") {
		t.Error(got)
	}
	n.expect(400, "POST", "/commit", "")
	n.expect(400, "POST", "/commit?container=c&repo=UPPER", "")
	n.expect(400, "POST", "/commit?container=c&tag=x", "")
	got = n.expect(201, "POST", "/commit?container=c&repo=me/app&tag=v1&author=me&comment=why&pause=0&changes=CMD+x&changes=ENV+a=b", `{"Env":["A=1"],"Hostname":"x"}`)
	if c := f.committed; !strings.Contains(got, `"Id":"sha256:c"`) || c == nil || c.Name != "docker.io/me/app:v1" || c.Author != "me" || c.Comment != "why" || c.Pause || len(c.Changes) != 2 || c.Config == nil || c.Config.Env[0] != "A=1" {
		t.Errorf("%s %+v", got, c)
	}
	n.expect(201, "POST", "/commit?container=c", "")
	if c := f.committed; c.Name != "" || !c.Pause || c.Config != nil {
		t.Errorf("%+v", c)
	}
	n.expect(501, "POST", "/images/create?fromSrc=http://x/y.tar", "")
	n.expect(200, "POST", "/v1.41/volumes/prune", "")
	if f.volumeFilter["all"] == nil {
		t.Error("an old client's prune spares named volumes")
	}
	n.expect(200, "POST", "/v1.42/volumes/prune", "")
	if f.volumeFilter["all"] != nil {
		t.Error("a new client's prune takes named volumes")
	}
	n.expect(400, "POST", "/volumes/create", `{"Name":"../x"}`)
	n.expect(200, "POST", "/networks/n/connect", `{"Container":"c","EndpointConfig":{"Aliases":["a"],"IPAMConfig":{"IPv4Address":"10.0.0.9"}}}`)
	if f.connected.Aliases[0] != "a" || f.connected.IPv4.String() != "10.0.0.9" || f.connected.Network != "n" {
		t.Errorf("%+v", f.connected)
	}
	n.expect(400, "POST", "/networks/n/connect", `{}`)
}

func FuzzCreateBody(f *testing.F) {
	files, err := filepath.Glob("testdata/create/*.json")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"Image":"x","HostConfig":{"Binds":["a:b:c"],"Mounts":[{"Type":"tmpfs","Target":"/"}]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var req createRequest
		if decodeJSON(bytes.NewReader(b), &req) != nil {
			return
		}
		c, _, err := configFrom(&req)
		if err != nil {
			if statusOf(err) >= 500 && !errdefs.IsNotImplemented(err) {
				t.Errorf("status %d for %v", statusOf(err), err)
			}
			return
		}
		ctr := engine.Container{ID: "x", Config: c, Mounts: c.Mounts}
		if _, err := json.Marshal(inspectOf(&ctr)); err != nil {
			t.Errorf("inspect: %v", err)
		}
		summaryOf(&ctr, time.Time{})
	})
}

func FuzzFilters(f *testing.F) {
	f.Add(`{"label":["a=b"]}`)
	f.Add(`{"label":{"a":true,"b":false}}`)
	f.Fuzz(func(t *testing.T, s string) {
		got, err := parseFilters(s)
		if err != nil && statusOf(err) != 400 {
			t.Errorf("status %d for %v", statusOf(err), err)
		}
		for k, v := range got {
			if len(v) == 0 {
				t.Errorf("field %q without values", k)
			}
		}
		if _, _, err := cutVersion(s); err != nil && statusOf(err) != 400 {
			t.Error(err)
		}
		if _, err := parseMoment(s); err == nil && len(s) > 100 {
			t.Errorf("%q is a time", s)
		}
	})
}
