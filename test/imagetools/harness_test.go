package imagetools

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var workDir string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if workDir, err = os.MkdirTemp("", "hki"); err != nil { // short: sockets are below it
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(workDir)
		return m.Run()
	}())
}

// programs builds what the tests run, once.
var programs = sync.OnceValue(func() error {
	cmd := exec.Command("go", "build", "-o", workDir+"/", "../../cmd/hako", "../../cmd/hakod", "../../cmd/hako-shim")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w\n%s", err, b)
	}
	return nil
})

// needs skips a test, by name, on a machine that lacks what it takes.
func needs(t *testing.T, commands ...string) {
	t.Helper()
	for _, c := range commands {
		if c == "root" {
			if os.Geteuid() != 0 {
				t.Skipf("%s needs root", t.Name())
			}
		} else if _, err := exec.LookPath(c); err != nil {
			t.Skipf("%s needs the command %s", t.Name(), c)
		}
	}
	if err := programs(); err != nil {
		t.Fatal(err)
	}
}

// user is somebody at a command line.
type user struct {
	t   *testing.T
	env []string
}

func newUser(t *testing.T) *user {
	t.Helper()
	return &user{t, append(os.Environ(), "DOCKER_CONFIG="+t.TempDir(), "HAKO_HOST=unix:///nowhere/docker.sock", "DOCKER_HOST=", "TMPDIR="+t.TempDir())}
}

// try runs a command.
func (u *user) try(stdin string, args ...string) (stdout, stderr string, err error) {
	u.t.Helper()
	if args[0] == "hako" {
		args[0] = filepath.Join(workDir, "hako")
	}
	cmd := exec.Command(args[0], args[1:]...)
	var out, errs bytes.Buffer
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = u.env, strings.NewReader(stdin), &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// run expects success.
func (u *user) run(args ...string) string {
	u.t.Helper()
	out, errs, err := u.try("", args...)
	if err != nil {
		u.t.Fatalf("%s: %v\n%s%s", strings.Join(args, " "), err, out, errs)
	}
	return strings.TrimSpace(out)
}

// fails expects failure, with a text in the message.
func (u *user) fails(want string, args ...string) {
	u.t.Helper()
	out, errs, err := u.try("", args...)
	if err == nil || !strings.Contains(errs, want) {
		u.t.Errorf("%s: %v\n%s%s\nwant %q", strings.Join(args, " "), err, out, errs, want)
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// start runs a program until the test ends. It gives it and the file of its log.
func start(t *testing.T, ready func() bool, name string, args ...string) (*os.Process, string) {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), "DOCKER_CONFIG="+t.TempDir())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if t.Failed() {
			b, _ := os.ReadFile(log.Name())
			t.Logf("%s:\n%s", filepath.Base(name), b)
		}
		log.Close()
	})
	for end := time.Now().Add(5 * time.Minute); !ready(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s does not come up", name)
		}
	}
	return cmd.Process, log.Name()
}

// registry runs Debian's docker-registry.
func registry(t *testing.T) string {
	t.Helper()
	addr, dir := freeAddress(t), t.TempDir()
	config := filepath.Join(dir, "config.yml")
	text := fmt.Sprintf("version: 0.1\nlog: {level: warn, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: %s}, delete: {enabled: true}}\nhttp: {addr: %s, secret: x}\n", dir, addr)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	start(t, func() bool {
		resp, err := http.Get("http://" + addr + "/v2/")
		if err == nil {
			resp.Body.Close()
		}
		return err == nil
	}, "docker-registry", "serve", config)
	return addr
}

// daemons are numbered, for names on the machine.
var daemons atomic.Int32

// hakod runs a daemon with further lines of configuration, and gives its Docker socket.
func hakod(t *testing.T, config string) string {
	t.Helper()
	host, _ := reloadable(t, config)
	return host
}

// reloadable is a hakod that can be given another configuration while it runs.
func reloadable(t *testing.T, config string) (host string, reload func(config string)) {
	t.Helper()
	dir, err := os.MkdirTemp(workDir, "d")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "run", "docker.sock")
	// No containers run: a bridge is never made.
	flags := []string{"--config", file, "--root", filepath.Join(dir, "lib"), "--state", filepath.Join(dir, "run"), "--bridge-name", fmt.Sprintf("hki%dx%d", os.Getpid()%100000, daemons.Add(1)), "--network", "builtin"}
	t.Cleanup(func() { // after the daemon's end: mounts of layers, too
		if out, err := exec.Command(filepath.Join(workDir, "hakod"), append(flags, "cleanup")...).CombinedOutput(); err != nil {
			t.Errorf("hakod cleanup: %v\n%s", err, out)
		}
	})
	daemon, log := start(t, func() bool {
		c, err := net.Dial("unix", sock) // it is there a moment before somebody listens
		if err == nil {
			c.Close()
		}
		return err == nil
	}, filepath.Join(workDir, "hakod"), flags...)
	reloads := func() int {
		b, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(b), "configuration reloaded")
	}
	return "unix://" + sock, func(config string) {
		t.Helper()
		before := reloads()
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := daemon.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(5 * time.Minute); reloads() == before; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("hakod does not reload its configuration")
			}
		}
	}
}

// layoutImage writes an image for two platforms as an OCI layout, with name v1, and gives the
// folder and the digest. size is of a layer that does not compress.
func layoutImage(t *testing.T, size int) (string, digest.Digest) {
	t.Helper()
	dir := t.TempDir()
	add := func(mt string, raw []byte) ocispec.Descriptor {
		d := digest.FromBytes(raw)
		if err := os.MkdirAll(filepath.Join(dir, "blobs/sha256"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "blobs/sha256", d.Encoded()), raw, 0o644); err != nil {
			t.Fatal(err)
		}
		return ocispec.Descriptor{MediaType: mt, Digest: d, Size: int64(len(raw))}
	}
	asJSON := func(v any) []byte {
		raw, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	noise := make([]byte, size)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, arch := range []string{"amd64", "arm64"} {
		m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
		var ids []digest.Digest
		for _, f := range [][2]string{{"data/noise", string(noise)}, {"etc/arch", arch}} {
			var plain, packed bytes.Buffer
			tw := tar.NewWriter(&plain)
			if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: f[0], Mode: 0o644, Size: int64(len(f[1]))}); err != nil {
				t.Fatal(err)
			}
			io.WriteString(tw, f[1])
			tw.Close()
			zw := gzip.NewWriter(&packed)
			zw.Write(plain.Bytes())
			zw.Close()
			ids = append(ids, digest.FromBytes(plain.Bytes()))
			m.Layers = append(m.Layers, add(ocispec.MediaTypeImageLayerGzip, packed.Bytes()))
		}
		m.Config = add(ocispec.MediaTypeImageConfig, asJSON(map[string]any{"os": "linux", "architecture": arch, "config": map[string]any{"Cmd": []string{"/run"}}, "rootfs": ocispec.RootFS{Type: "layers", DiffIDs: ids}}))
		d := add(m.MediaType, asJSON(m))
		d.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
		idx.Manifests = append(idx.Manifests, d)
	}
	top := add(idx.MediaType, asJSON(idx))
	top.Annotations = map[string]string{ocispec.AnnotationRefName: "v1"}
	for name, raw := range map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`), "index.json": asJSON(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{top}})} {
		if err := os.WriteFile(filepath.Join(dir, name), raw, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir, top.Digest
}
