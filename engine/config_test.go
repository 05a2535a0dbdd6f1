package engine

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"

	"github.com/hako-engine/hako/network"
)

func TestMerge(t *testing.T) {
	t.Parallel()
	img := dockerspec.DockerOCIImageConfig{}
	img.Entrypoint, img.Cmd = []string{"ep"}, []string{"c1", "c2"}
	img.Env = []string{"PATH=/x", "B=img", "C=img"}
	img.User, img.WorkingDir, img.StopSignal = "web", "/srv", "SIGQUIT"
	img.Labels = map[string]string{"a": "img", "b": "img", "containerd.io/restart.loguri": "binary:///bad", "io.kubernetes.cri.x": "bad", "com.docker.compose.project": "p"}
	img.ExposedPorts = map[string]struct{}{"80": {}, "53/udp": {}}
	img.Healthcheck = &dockerspec.HealthcheckConfig{Test: []string{"CMD", "ok"}, Retries: 9, Interval: time.Second}
	for _, c := range []struct {
		name string
		c    Config
		argv []string
	}{
		{"image alone", Config{}, []string{"ep", "c1", "c2"}},
		{"cmd", Config{Cmd: []string{"x"}}, []string{"ep", "x"}},
		{"entrypoint", Config{Entrypoint: []string{"y"}, EntrypointSet: true}, []string{"y"}},
		{"both", Config{Entrypoint: []string{"y"}, Cmd: []string{"x"}, EntrypointSet: true}, []string{"y", "x"}},
		{"reset entrypoint", Config{Entrypoint: []string{""}, Cmd: []string{"x"}, EntrypointSet: true}, []string{"x"}},
		{"empty entrypoint", Config{Entrypoint: []string{}, EntrypointSet: true}, []string{"c1", "c2"}},
	} {
		var v Container
		if err := merge(&v, c.c, img); err != nil {
			t.Errorf("%s: %v", c.name, err)
		} else if got := append([]string{v.Path}, v.Args...); !slices.Equal(got, c.argv) {
			t.Errorf("%s: %v, want %v", c.name, got, c.argv)
		}
	}
	var v Container
	err := merge(&v, Config{Env: []string{"B=own", "C", "D=new"}, Labels: map[string]string{"a": "own"}, ExposedPorts: []string{"8080/tcp"},
		Ports: []network.PortMapping{{ContainerPort: 443}}, Healthcheck: &Healthcheck{Retries: 2}}, img)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"PATH=/x", "B=own", "D=new"}; !slices.Equal(v.Env, want) {
		t.Errorf("env %v", v.Env)
	}
	if want := map[string]string{"a": "own", "b": "img", "com.docker.compose.project": "p"}; !maps.Equal(v.Labels, want) {
		t.Errorf("labels %v: those of the image must not reach reserved names", v.Labels)
	}
	if want := []string{"443/tcp", "53/udp", "80/tcp", "8080/tcp"}; !slices.Equal(v.ExposedPorts, want) {
		t.Errorf("ports %v", v.ExposedPorts)
	}
	if v.User != "web" || v.WorkingDir != "/srv" || v.StopSignal != "SIGQUIT" {
		t.Errorf("%+v", v)
	}
	if h := v.Healthcheck; h.Retries != 2 || h.Interval != time.Second || !slices.Equal(h.Test, []string{"CMD", "ok"}) {
		t.Errorf("health check %+v", h)
	}
	if err := merge(&v, Config{}, dockerspec.DockerOCIImageConfig{}); err == nil || err.Error() != "no command specified" {
		t.Errorf("no command: %v", err)
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	minus := int64(-2)
	for want, c := range map[string]Config{
		"can't create 'AutoRemove' container with restart policy":                                                  {AutoRemove: true, Restart: RestartPolicy{Name: "always"}},
		"invalid restart policy: unknown policy 'x'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'": {Restart: RestartPolicy{Name: "x"}},
		"invalid restart policy: maximum retry count can only be used with 'on-failure'":                           {Restart: RestartPolicy{Name: "always", MaxRetries: 1}},
		"Minimum memory limit allowed is 6MB":                                                                      {Resources: Resources{Memory: 4 << 20}},
		"Minimum memoryswap limit should be larger than memory limit, see usage":                                   {Resources: Resources{Memory: 16 << 20, MemorySwap: 8 << 20}},
		"You should always set the Memory limit when using Memoryswap limit, see usage":                            {Resources: Resources{MemorySwap: 8 << 20}},
		"Invalid value: -2, valid memory swappiness range is 0-100":                                                {Resources: Resources{MemorySwappiness: &minus}},
		"range of CPUs is from 0.01 to 4.00, as there are only 4 CPUs available":                                   {Resources: Resources{NanoCPUs: 5e9}},
		"Conflicting options: Nano CPUs and CPU Period cannot both be set":                                         {Resources: Resources{NanoCPUs: 1e9, CPUPeriod: 1000}},
		"Requested CPUs are not available - requested 9, available: 0-3":                                           {Resources: Resources{CpusetCPUs: "9"}},
		"Invalid value 1-2147483647 for cpuset cpus":                                                               {Resources: Resources{CpusetCPUs: "1-2147483647"}},
		"Range of blkio weight is from 10 to 1000":                                                                 {Resources: Resources{BlkioWeight: 5}},
		"invalid ulimit type: nope":                                                                                {Resources: Resources{Ulimits: []Ulimit{{"nope", 1, 1}}}},
		"ulimit soft limit must be less than or equal to hard limit: 2 > 1":                                        {Resources: Resources{Ulimits: []Ulimit{{"nofile", 2, 1}}}},
		"Invalid value 2000, range for oom score adj is [-1000, 1000]":                                             {OOMScoreAdj: 2000},
		"the working directory 'x' is invalid, it needs to be an absolute path":                                    {WorkingDir: "x"},
		"invalid IPC mode: x":                                                                              {IpcMode: "x"},
		"invalid PID mode: container:":                                                                     {PidMode: "container:"},
		"conflicting options: hostname and the network mode":                                               {NetworkMode: "container:a", Hostname: "h"},
		"conflicting options: port publishing and the container type network mode":                         {NetworkMode: "container:a", PublishAll: true},
		"conflicting options: hostname and the UTS mode":                                                   {UTSMode: "host", Hostname: "h"},
		"network-scoped alias is supported only for containers in user defined networks":                   {Endpoints: []EndpointSettings{{Network: "bridge", Aliases: []string{"a"}}}},
		"invalid endpoint settings:\nuser specified IP address is supported on user defined networks only": {Endpoints: []EndpointSettings{{IPv4: netip.AddrFrom4([4]byte{1, 2, 3, 4})}}},
		"logger: no log driver named 'syslog' is registered":                                               {Log: LogConfig{Driver: "syslog"}},
		"unknown log opt 'x' for json-file log driver":                                                     {Log: LogConfig{Options: map[string]string{"x": "y"}}},
		"cannot use max-file without max-size":                                                             {Log: LogConfig{Options: map[string]string{"max-file": "3"}}},
		"Invalid signal: SIGNOPE":                                                                          {StopSignal: "SIGNOPE"},
		`invalid exposed port: "0/tcp"`:                                                                    {ExposedPorts: []string{"0/tcp"}},
		`invalid --security-opt: "nope=1": known are apparmor, label, no-new-privileges, seccomp, systempaths, writable-cgroups`: {SecurityOpt: []string{"nope=1"}},
		`invalid --security-opt: "no-new-privileges:x": expected true or false`:                                                  {SecurityOpt: []string{"no-new-privileges:x"}},
		`invalid --security-opt: "systempaths=x": expected systempaths=unconfined`:                                               {SecurityOpt: []string{"systempaths=x"}},
		`invalid --security-opt: "apparmor=": expected unconfined or the name of a profile`:                                      {SecurityOpt: []string{"apparmor="}},
		`invalid --security-opt: "seccomp": expected unconfined, builtin or a profile`:                                           {SecurityOpt: []string{"seccomp"}},
		`invalid --security-opt: "label": expected label=disable or label=user:, role:, type:, level:, filetype:`:                {SecurityOpt: []string{"label"}},
		"--security-opt apparmor=mine: AppArmor is not enabled on the host":                                                      {SecurityOpt: []string{"apparmor=mine"}},
		"invalid seccomp profile: not JSON":                                                                                      {SecurityOpt: []string{"seccomp=/etc/profile.json"}},
		`sysctl "kernel.core_pattern" is not in a separate kernel namespace`:                                                     {Sysctls: map[string]string{"kernel.core_pattern": "|/x"}},
		`sysctl "kernel.shm_rmid_forced" is not allowed`:                                                                         {Sysctls: map[string]string{"kernel.shm_rmid_forced": "1\nkernel.core_pattern=|/x"}},
		`sysctl "net.ipv4.ip_forward" not allowed in host network namespace`:                                                     {NetworkMode: "host", Sysctls: map[string]string{"net.ipv4.ip_forward": "1"}},
		`sysctl "kernel.msgmax" not allowed in host ipc namespace`:                                                               {IpcMode: "host", Sysctls: map[string]string{"kernel.msgmax": "1"}},
		"unknown or invalid runtime name: nope":                                                                                  {Runtime: "nope"},
		"Interval in Healthcheck cannot be less than 1ms":                                                                        {Healthcheck: &Healthcheck{Interval: 1}},
		"invalid device permissions: q":                                                                                          {Resources: Resources{Devices: []Device{{HostPath: "/dev/null", Permissions: "q"}}}},
		`bad format for add-host: "x"`:                                                                                           {ExtraHosts: []string{"x"}},
		"SHM size can not be less than 0":                                                                                        {ShmSize: -1},
	} {
		err := c.validate(goldenHost(), nil)
		if err == nil || err.Error() != want || !errdefs.IsInvalidArgument(err) {
			t.Errorf("got %v\nwant %s", err, want)
		}
	}
	good := Config{IpcMode: "shareable", NetworkMode: "n", Restart: RestartPolicy{Name: "on-failure", MaxRetries: 3}, StopSignal: "15",
		Log: LogConfig{Driver: "json-file", Options: map[string]string{"max-size": "10m", "max-file": "3"}}, ExtraHosts: []string{"a:::1", "b:host-gateway"},
		Resources: Resources{CpusetCPUs: "0,2-3", Memory: 6 << 20}, Sysctls: map[string]string{"net/core/somaxconn": "5"}}
	if err := good.validate(goldenHost(), nil); err != nil {
		t.Error(err)
	}
	for _, m := range []Mount{
		{Kind: MountBind, Source: "/a"}, {Kind: MountBind, Source: "/a", Target: "x"}, {Kind: MountBind, Source: "/a", Target: "/x/.."},
		{Kind: MountBind, Source: "a", Target: "/x"}, {Kind: MountTmpfs, Source: "/a", Target: "/x"}, {Kind: "npipe", Target: "/x"},
		{Kind: MountBind, Source: "/a", Target: "/x", Propagation: "weird"}, {Kind: MountVolume, Target: "/x", Subpath: "s"},
	} {
		if err := validateMount(m); !errdefs.IsInvalidArgument(err) {
			t.Errorf("mount %+v: %v", m, err)
		}
	}
	for _, a := range []string{"org.systemd.property.ExecStart", "run.oci.handler", "io.katacontainers.config_path"} {
		if err := validateAnnotations(map[string]string{a: "x"}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("annotation %s: %v", a, err)
		}
	}
}

func TestSignals(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]int{"9": 9, "KILL": 9, "SIGKILL": 9, "sigterm": 15, "RTMIN": 34, "SIGRTMIN+3": 37, "RTMAX-1": 63, "64": 64} {
		if got, err := parseSignal(s); err != nil || got != want {
			t.Errorf("%s: %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "0", "65", "-1", "SIGNOPE", "RTMIN+99", "RTMAX+1"} {
		if _, err := parseSignal(s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestAccounts(t *testing.T) {
	t.Parallel()
	a := accounts{
		passwd: []byte("root:x:0:0:r:/root:/bin/sh\nweb:x:33:34::/var/www:/bin/sh\n1000:x:0:0::/evil:/bin/sh\nbroken\nbig:x:4294967296:0::/:\nneg:x:-1:0::/:\n#c:x:5:5\n"),
		group:  []byte("root:x:0:\nextra:x:50:web,root\nmore:x:51:web\n1001:x:0:\n"),
	}
	for _, c := range []struct {
		user string
		add  []string
		want account
		err  string
	}{
		{user: "", want: account{0, 0, []uint32{0, 50}, "/root"}},
		{user: "web", want: account{33, 34, []uint32{34, 50, 51}, "/var/www"}},
		{user: "33", want: account{33, 34, []uint32{34, 50, 51}, "/var/www"}},
		{user: "web:more", want: account{33, 51, []uint32{51}, "/var/www"}},
		{user: "web:", want: account{33, 34, []uint32{34, 50, 51}, "/var/www"}},
		{user: "1000", want: account{1000, 0, []uint32{0}, "/"}}, // and not root, as the line of that name says
		{user: "1000:1001", want: account{1000, 1001, []uint32{1001}, "/"}},
		{user: "web", add: []string{"extra", "777"}, want: account{33, 34, []uint32{34, 50, 51, 777}, "/var/www"}},
		{user: "nobody", err: "unable to find user nobody: no matching entries in passwd file"},
		{user: "web:none", err: "unable to find group none: no matching entries in group file"},
		{user: "4294967296", err: `unable to find user 4294967296: invalid user id: "4294967296" is out of range`},
		{user: "18446744073709551616", err: `unable to find user 18446744073709551616: invalid user id: "18446744073709551616" is out of range`},
		{user: "-1", err: `unable to find user -1: invalid user id: "-1" is out of range`},
		{user: "0x0", err: `unable to find user 0x0: invalid user id: "0x0" is not a decimal number`},
		{user: "1000:4294967296", err: `unable to find group 4294967296: invalid group id: "4294967296" is out of range`},
		{user: "big", err: "unable to find user big: no matching entries in passwd file"},
	} {
		got, err := a.resolve(c.user, c.add)
		if c.err != "" {
			if err == nil || err.Error() != c.err {
				t.Errorf("%q: %v, want %s", c.user, err, c.err)
			}
			continue
		}
		if err != nil || got.UID != c.want.UID || got.GID != c.want.GID || !slices.Equal(got.Groups, c.want.Groups) || got.Home != c.want.Home {
			t.Errorf("%q: %+v, %v, want %+v", c.user, got, err, c.want)
		}
	}
	long := accounts{passwd: []byte("a" + strings.Repeat("b", accountLineLimit))}
	if _, err := long.resolve("web", nil); err == nil {
		t.Error("an endless line was taken")
	}
}

func FuzzAccounts(f *testing.F) {
	f.Add([]byte("root:x:0:0:r:/root:/bin/sh\n"), []byte("g:x:1:root\n"), "root:g")
	f.Fuzz(func(t *testing.T, passwd, group []byte, user string) {
		acc, err := accounts{passwd, group}.resolve(user, nil)
		if err == nil && strings.ContainsAny(acc.Home, "\n\r\x00") {
			t.Errorf("home %q", acc.Home)
		}
	})
}

func TestNetFiles(t *testing.T) {
	t.Parallel()
	const loopback = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\n" +
		"ff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
	ep := network.Endpoint{IPv4: netip.MustParsePrefix("10.1.2.3/24")}
	got := string(hostsFile(hostsInput{hostname: "box", domain: "dom", endpoints: []network.Endpoint{ep},
		extra: []string{"a:1.1.1.1", "six:::1", "gw:host-gateway"}, gateway: netip.MustParseAddr("10.1.2.1"),
		links: []network.HostEntry{{Addr: netip.MustParseAddr("10.1.2.9"), Names: []string{"db", "pg"}}}}))
	want := loopback + "1.1.1.1\ta\n::1\tsix\n10.1.2.1\tgw\n10.1.2.9\tdb pg\n10.1.2.3\tbox.dom box\n"
	if got != want {
		t.Errorf("hosts:\n%s\nwant\n%s", got, want)
	}
	got = string(hostsFile(hostsInput{hostname: "web.site.org", endpoints: []network.Endpoint{ep}, noIPv6: true}))
	if want := "127.0.0.1\tlocalhost\n10.1.2.3\tweb.site.org web\n"; got != want {
		t.Errorf("hosts without IPv6:\n%s\nwant\n%s", got, want)
	}
	got = string(hostsFile(hostsInput{hostname: "h", base: []byte("1.2.3.4 base\n\n"), extra: []string{"a:1.1.1.1"}}))
	if want := "1.2.3.4 base\n1.1.1.1\ta\n"; got != want {
		t.Errorf("host network: %q", got)
	}
	host := []byte("nameserver 9.9.9.9\nsearch host.dom\noptions edns0\n")
	for _, c := range []struct {
		c    Config
		eps  []network.Endpoint
		want string
	}{
		{Config{}, nil, "nameserver 9.9.9.9\nsearch host.dom\noptions edns0\n"},
		{Config{DNS: []netip.Addr{netip.MustParseAddr("1.1.1.1")}, DNSSearch: []string{"."}}, nil, "nameserver 1.1.1.1\noptions edns0\n"},
		{Config{}, []network.Endpoint{{Nameservers: []netip.Addr{network.EmbeddedDNS}}}, "nameserver 127.0.0.11\nsearch host.dom\noptions edns0 ndots:0\n"},
	} {
		if got := string(containerResolvConf(host, c.c, c.eps)); got != c.want {
			t.Errorf("resolv.conf:\n%s\nwant\n%s", got, c.want)
		}
	}
}

func TestFilters(t *testing.T) {
	t.Parallel()
	now := time.Unix(1000, 0)
	for s, want := range map[string]time.Time{"10s": time.Unix(990, 0), "500": time.Unix(500, 0), "500.5": time.Unix(500, 5e8), "2020-01-01T00:00:00Z": time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)} {
		if got, err := parseTime(s, now); err != nil || !got.Equal(want) {
			t.Errorf("%s: %v, %v", s, got, err)
		}
	}
	if _, err := parseTime("nonsense", now); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	f := Filters{"label": {"a=b", "c"}, "label!": {"d"}}
	if !f.labels(map[string]string{"a": "b", "c": "x"}) || f.labels(map[string]string{"a": "b"}) || f.labels(map[string]string{"a": "b", "c": "", "d": ""}) {
		t.Error("labels")
	}
	for _, s := range []string{"1k", "1K", "1kb", "1KiB"} {
		if n, err := parseSize(s); err != nil || n != 1024 {
			t.Errorf("%s: %d %v", s, n, err)
		}
	}
	for _, s := range []string{"", "x", "-1", "1e99g", "NaN"} {
		if n, err := parseSize(s); err == nil {
			t.Errorf("%s: %d", s, n)
		}
	}
}

func TestMergeResources(t *testing.T) {
	t.Parallel()
	old := Resources{Memory: 1, NanoCPUs: 5, CPUShares: 7}
	got := mergeResources(old, Resources{CPUQuota: 1000, Memory: 2})
	if got.Memory != 2 || got.NanoCPUs != 0 || got.CPUQuota != 1000 || got.CPUShares != 7 {
		t.Errorf("%+v", got)
	}
}
