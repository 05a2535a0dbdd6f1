package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func writeConfig(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestUnknownNames(t *testing.T) {
	t.Parallel()
	path := writeConfig(t, "log-level = 'debug'\nbridge-subnett = '10.0.0.0/24'\n")
	err := run([]string{"config", "check", path}, &bytes.Buffer{})
	if err == nil || !strings.Contains(err.Error(), path+`:2: unknown key "bridge-subnett", did you mean "bridge-subnet"?`) {
		t.Errorf("unknown key: %v", err)
	}
	for text, want := range map[string]string{
		"[verify.'r.example/team']\nkeyz = ['/k']":                          `unknown key "verify.r.example/team.keyz", did you mean "verify.r.example/team.keys"?`,
		"[[verify.'*'.identities]]\nissuer = 'x'\nsubjekt = 'y'":            `did you mean "verify.*.identities.subject"?`,
		"[proxy_plugins.stargz]\ntype = 'snapshot'\nadress = '/run/s.sock'": `did you mean "proxy_plugins.stargz.address"?`,
		"[runtime]\nrunc = '/usr/sbin/runc'":                                `did you mean "runtimes"?`,
	} {
		if err := run([]string{"config", "check", writeConfig(t, text)}, &bytes.Buffer{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
	err = run([]string{"--loglevel", "debug"}, &bytes.Buffer{})
	if !errors.Is(err, errUsage) || !strings.Contains(err.Error(), "did you mean --log-level?") {
		t.Errorf("unknown flag: %v", err)
	}
	if err := run([]string{"conf"}, &bytes.Buffer{}); !errors.Is(err, errUsage) {
		t.Errorf("unknown command: %v", err)
	}
}

func TestBadValues(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"snapshotter = 'zfs'":                `snapshotter: "zfs" is not one of auto, erofs, overlayfs, native`,
		"log-level = 'loud'":                 `log-level: "loud" is not one of debug, info, warn, error`,
		"bridge-subnet = 'x'":                "bridge-subnet: ",
		"cgroup-driver = 'x'":                `cgroup-driver: "x" is not one of cgroupfs, systemd`,
		"cgroup-path = 'x'":                  `cgroup-path: "x" is not an absolute path`,
		"cgroup-path = '/'":                  `cgroup-path: "/" is not an absolute path`,
		"cgroup-path = '/hako/'":             "cgroup-path: /hako/ is the parent of the containers",
		"mtu = 'x'":                          "cannot decode TOML string",
		"root = ''":                          `root: "" is not a folder`,
		"root = '/a'\nstate = '/a'":          "root and state are the same folder, /a",
		"metrics-address = 'x:9'":            `metrics-address: "x:9" is not IP:PORT`,
		"stream-address = ':9'":              "stream-address: address [::]:9 can be reached by other machines, which needs a certificate",
		"trace-endpoint = '1.2.3.4'":         `trace-endpoint: "1.2.3.4" is not http://HOST:PORT or https://HOST:PORT`,
		"trace-ratio = 2.0":                  "trace-ratio: 2 is not between 0 and 1",
		"nri-timeout = 0":                    "nri-timeout: 0 is not between 1 and 60 seconds",
		"cdi-spec-dirs = 'etc/cdi'":          `cdi-spec-dirs: "etc/cdi" is not an absolute path`,
		"nri-socket = '/n'\ncri-socket = ''": "nri-socket: NRI plugins follow the pods of the CRI, which cri-socket turns off",
		"[runtimes]\nrunc = 'runc'":          `runtimes: runc: "runc" is not an absolute path`,
		"this is not TOML at all = =":        "config.toml:1:",
		"pull-progress-timeout = '5'":        `pull-progress-timeout: "5" is not a duration`,
		"pull-progress-timeout = '-1s'":      `pull-progress-timeout: "-1s" is not a duration`,
	} {
		err := run([]string{"config", "check", writeConfig(t, text)}, &bytes.Buffer{})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
}

// TestMissingFile: a file that somebody names is there, or what they wanted of it would be lost without a word.
func TestMissingFile(t *testing.T) {
	t.Parallel()
	none := filepath.Join(t.TempDir(), "none")
	for _, args := range [][]string{
		{"config", "check", none}, {"--config", none, "config", "check"}, {"--config", none}, {"--config", none, "check"}, {"--config=" + none, "cleanup"},
	} {
		if err := run(args, &bytes.Buffer{}); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "make it with hakod config default") {
			t.Errorf("%v: %v", args, err)
		}
	}
	c, err := settings(none, false, nil)
	if want := defaultConfig(); err != nil || c.Root != want.Root {
		t.Errorf("the default file is missing: %+v, %v", c, err)
	}
}

func TestDefaultConfig(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	if err := run([]string{"config", "default"}, &out); err != nil {
		t.Fatal(err)
	}
	for _, k := range keys() {
		if !strings.Contains(out.String(), k) {
			t.Errorf("key %s is not shown", k)
		}
	}
	path := writeConfig(t, out.String())
	c, want := defaultConfig(), defaultConfig()
	if err := c.load(path, true); err != nil {
		t.Fatal(err)
	}
	if c.Root != want.Root || c.DockerSocket != unset || c.MTU != want.MTU {
		t.Errorf("the default file changes something: %+v", c)
	}
	if err := c.complete(); err != nil || c.DockerSocket != "/run/hako/docker.sock" {
		t.Errorf("%+v %v", c, err)
	}
	c = defaultConfig()
	if err := c.load(writeConfig(t, "docker-socket = ''\nstate = '/s'"), true); err != nil {
		t.Fatal(err)
	}
	if err := c.complete(); err != nil || c.DockerSocket != "" || c.CRISocket != "/s/cri.sock" {
		t.Errorf("a socket that is turned off: %+v %v", c, err)
	}
}

func TestHelpAndVersion(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"--help"}, {"help"}, {"version"}, {"--version"}} {
		var out bytes.Buffer
		if err := run(args, &out); err != nil || out.Len() == 0 {
			t.Errorf("%v: %v", args, err)
		}
		if args[0] == "--help" {
			for _, k := range keys() {
				if !slices.Contains([]string{"runtimes", "verify", "proxy_plugins"}, k) && !strings.Contains(out.String(), "--"+k+" ") {
					t.Errorf("flag --%s is not in the help", k)
				}
			}
		}
	}
}

func TestLock(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("TestLock needs root: the lock of a bridge lies in /run")
	}
	bridge := fmt.Sprintf("hkl%d", os.Getpid()%100000)
	cfg := config{Root: filepath.Join(t.TempDir(), "root"), State: filepath.Join(t.TempDir(), "state"), BridgeName: bridge}
	unlock, err := lock(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock(cfg); err == nil || !strings.Contains(err.Error(), "another daemon (process ") {
		t.Errorf("second daemon: %v", err)
	}
	other := config{Root: filepath.Join(t.TempDir(), "root"), State: filepath.Join(t.TempDir(), "state"), BridgeName: bridge}
	if _, err := lock(other); err == nil || !strings.Contains(err.Error(), "uses the bridge "+bridge) {
		t.Errorf("second daemon with the same bridge: %v", err)
	}
	other.BridgeName += "x"
	if unlock, err := lock(other); err != nil {
		t.Errorf("another daemon: %v", err)
	} else {
		unlock()
	}
	for dir, want := range map[string]os.FileMode{cfg.Root: 0o710, cfg.State: 0o711} {
		if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != want {
			t.Errorf("%s: %v %v", dir, fi, err)
		}
	}
	unlock()
	unlock, err = lock(cfg)
	if err != nil {
		t.Fatalf("after the first one ended: %v", err)
	}
	unlock()
	// A child of a daemon that was killed holds the lock a moment longer.
	for range 100 {
		if unlock, err = lock(cfg); err != nil {
			t.Fatal(err)
		}
		began, let := time.Now(), make(chan time.Time, 1)
		time.AfterFunc(lockWait/4, func() { unlock(); let <- time.Now() })
		again, err := lock(cfg)
		late := (<-let).Sub(began) > lockWait/2 // a busy machine: that proves nothing
		if err == nil {
			again()
			break
		}
		if !late {
			t.Fatalf("a lock on its way out: %v", err)
		}
	}
	if name, _ := bridgeLock(bridge); name != "" {
		if _, err := os.Stat(name); err == nil {
			t.Errorf("%s is left", name)
		}
	}
	// A link in the lock's place is not followed.
	target := filepath.Join(t.TempDir(), "target")
	path := filepath.Join(cfg.Root, "lock")
	if err := errors.Join(os.Remove(path), os.Symlink(target, path)); err != nil {
		t.Fatal(err)
	}
	if _, err := lock(cfg); err == nil {
		t.Error("the lock file is a link, and was followed")
	}
	if _, err := os.Stat(target); err == nil {
		t.Error("the target of a link was made")
	}
}

// Where systemd is PID 1, it makes the cgroups, unless the administrator says otherwise.
func TestCgroupDriver(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		comm   string
		booted bool
		want   string
	}{
		"systemd":             {comm: "systemd\n", booted: true, want: "systemd"},
		"another init":        {comm: "init\n", want: "cgroupfs"},
		"the host's /run":     {comm: "sh\n", booted: true, want: "cgroupfs"},
		"systemd of an image": {comm: "systemd\n", want: "cgroupfs"},
	} {
		root := t.TempDir()
		if err := os.MkdirAll(filepath.Join(root, "proc/1"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, "proc/1/comm"), []byte(tt.comm), 0o644); err != nil {
			t.Fatal(err)
		}
		if tt.booted {
			if err := os.MkdirAll(filepath.Join(root, "run/systemd/system"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if got := cgroupDriver(root); got != tt.want {
			t.Errorf("%s: %s, want %s", name, got, tt.want)
		}
	}
	for _, driver := range []string{"cgroupfs", "systemd"} {
		c := defaultConfig()
		c.CgroupDriver = driver
		if err := c.complete(); err != nil || c.CgroupDriver != driver {
			t.Errorf("--cgroup-driver %s: %s, %v", driver, c.CgroupDriver, err)
		}
	}
}
