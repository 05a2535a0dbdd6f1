//go:build linux && (amd64 || arm64)

package security

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

var (
	daemonBinary = build("hakod", "../../cmd/hakod")
	shimBinary   = build("hako-shim", "../../cmd/hako-shim")
	probeBinary  = build("probe", "./testdata/probe")
)

// node is the daemon that the rows of the engine share.
type node struct {
	dir, socket, bridge, token string
	cmd                        *exec.Cmd
	log                        *os.File
	exited                     chan error
	client                     *http.Client
}

var daemon struct {
	once sync.Once
	n    *node
	err  error
}

func engineNode(t *testing.T) *node {
	t.Helper()
	needRoot(t)
	built(t, daemonBinary)
	built(t, shimBinary)
	daemon.once.Do(func() { daemon.n, daemon.err = startDaemon() })
	if daemon.err != nil {
		t.Fatal(daemon.err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			raw, _ := os.ReadFile(daemon.n.log.Name())
			t.Logf("hakod: %s", raw[max(0, len(raw)-2000):])
		}
	})
	return daemon.n
}

func startDaemon() (*node, error) {
	n := &node{dir: filepath.Join(workDir, "n"), bridge: fmt.Sprintf("hks%d", os.Getpid()%100000), token: fmt.Sprintf("secret-of-the-daemon-%d", os.Getpid())}
	n.socket = filepath.Join(n.dir, "run/docker.sock")
	if err := os.MkdirAll(n.dir, 0o755); err != nil {
		return nil, err
	}
	if err := os.Chmod(workDir, 0o755); err != nil { // the folders below must protect themselves
		return nil, err
	}
	n.client = &http.Client{Timeout: 5 * time.Minute, Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", n.socket)
	}}}
	var err error
	if n.log, err = os.Create(filepath.Join(n.dir, "log")); err != nil {
		return nil, err
	}
	n.cmd = exec.Command(filepath.Join(workDir, "bin/hakod"), "--config", os.DevNull, "--root", filepath.Join(n.dir, "lib"),
		"--state", filepath.Join(n.dir, "run"), "--docker-socket", n.socket, "--containerd-socket", "", "--network", "builtin", "--debug-socket", filepath.Join(n.dir, "run/debug.sock"),
		"--registry-dir", filepath.Join(n.dir, "certs.d"), "--bridge-name", n.bridge, "--bridge-subnet", fmt.Sprintf("10.199.%d.0/24", os.Getpid()%250), "--log-level", "debug")
	n.cmd.Env = append(os.Environ(), "HAKO_DAEMON_TOKEN="+n.token)
	n.cmd.Stdout, n.cmd.Stderr, n.cmd.SysProcAttr = n.log, n.log, &syscall.SysProcAttr{Setpgid: true}
	if err := n.cmd.Start(); err != nil {
		return nil, err
	}
	n.exited = make(chan error, 1)
	go func() { n.exited <- n.cmd.Wait() }()
	for deadline := time.Now().Add(5 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if code, _ := n.call("GET", "/_ping", nil); code == 200 {
			return n, nil
		}
		if time.Now().After(deadline) {
			raw, _ := os.ReadFile(n.log.Name())
			return n, fmt.Errorf("hakod does not answer:\n%s", raw)
		}
	}
}

func (n *node) stop() error {
	_, body := n.call("GET", "/containers/json?all=1", nil)
	var list []struct{ Id string }
	err := json.Unmarshal([]byte(body), &list)
	for _, c := range list {
		n.call("DELETE", "/containers/"+c.Id+"?force=1&v=1", nil)
	}
	n.client.CloseIdleConnections()
	err = errors.Join(err, n.cmd.Process.Signal(syscall.SIGTERM))
	select {
	case e := <-n.exited:
		err = errors.Join(err, e)
	case <-time.After(5 * time.Minute):
		err = errors.Join(err, errors.New("hakod does not end"), n.cmd.Process.Kill())
	}
	n.log.Close()
	_ = exec.Command("ip", "link", "del", n.bridge).Run()
	if out, e := exec.Command("nft", "list", "tables").Output(); e == nil {
		for line := range strings.Lines(string(out)) {
			if f := strings.Fields(line); len(f) == 3 && strings.HasSuffix(f[2], n.bridge) {
				_ = exec.Command("nft", "delete", "table", f[1], f[2]).Run()
			}
		}
	}
	return err
}

// call makes a request; code 0 is a transport error. A body that is no reader is sent as JSON.
func (n *node) call(method, path string, body any, header ...string) (int, string) {
	var r io.Reader
	switch b := body.(type) {
	case nil:
	case io.Reader:
		r = b
	default:
		raw, err := json.Marshal(b)
		if err != nil {
			return 0, err.Error()
		}
		r = bytes.NewReader(raw)
		header = append(header, "Content-Type", "application/json")
	}
	req, err := http.NewRequest(method, "http://docker/v1.50"+path, r)
	if err != nil {
		return 0, err.Error()
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := n.client.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	raw, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	return resp.StatusCode, string(raw)
}

type object = map[string]any

// create makes a container and gives its id; code says what was answered.
func (n *node) create(t *testing.T, config object) (id string, code int, body string) {
	t.Helper()
	code, body = n.call("POST", "/containers/create", config)
	if code != 201 {
		return "", code, body
	}
	var c struct{ Id string }
	must(t, json.Unmarshal([]byte(body), &c))
	t.Cleanup(func() { n.call("DELETE", "/containers/"+c.Id+"?force=1&v=1", nil) })
	return c.Id, code, body
}

// start makes and starts a container.
func (n *node) start(t *testing.T, config object) (id string, err error) {
	t.Helper()
	id, code, body := n.create(t, config)
	if id == "" {
		return "", fmt.Errorf("create: %d %s", code, body)
	}
	if code, body := n.call("POST", "/containers/"+id+"/start", nil); code != 204 {
		return id, fmt.Errorf("start: %d %s", code, body)
	}
	return id, nil
}

// run runs a script in a container of an image to its end, and gives what it printed.
func (n *node) run(t *testing.T, config object) (out string, err error) {
	t.Helper()
	config["Tty"] = true // a log without frames
	id, err := n.start(t, config)
	if err != nil {
		return "", err
	}
	if code, body := n.call("POST", "/containers/"+id+"/wait", nil); code != 200 {
		return "", fmt.Errorf("wait: %d %s", code, body)
	}
	_, out = n.call("GET", "/containers/"+id+"/logs?stdout=1&stderr=1", nil)
	n.call("DELETE", "/containers/"+id+"?force=1&v=1", nil)
	return strings.ReplaceAll(out, "\r", ""), nil
}

func script(image, text string, more ...object) object {
	c := object{"Image": image, "Cmd": []string{"sh", "-c", text}}
	for _, m := range more {
		for k, v := range m {
			c[k] = v
		}
	}
	return c
}

// entry is a member of a layer.
type entry struct {
	name, content, link string
	typ                 byte
	mode                int64
	size                int64 // instead of content: so many zeros
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func archive(entries ...entry) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range entries {
		h := &tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.content)) + f.size, Typeflag: f.typ, Linkname: f.link, Format: tar.FormatPAX}
		if h.Typeflag == 0 {
			switch {
			case f.link != "":
				h.Typeflag = tar.TypeSymlink
			case strings.HasSuffix(f.name, "/"):
				h.Typeflag = tar.TypeDir
			default:
				h.Typeflag = tar.TypeReg
			}
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if h.Typeflag == tar.TypeChar {
			h.Devmajor, h.Devminor = 1, 3
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := io.WriteString(w, f.content); err != nil {
			return nil, err
		}
		if _, err := io.CopyN(w, zeros{}, f.size); err != nil {
			return nil, err
		}
	}
	return buf.Bytes(), w.Close()
}

// base is busybox as the entries of a layer.
func base(t *testing.T) []entry {
	t.Helper()
	path, err := exec.LookPath("busybox")
	must(t, err)
	busybox, err := os.ReadFile(path)
	must(t, err)
	out := []entry{
		{name: "bin/"}, {name: "proc/"}, {name: "sys/"}, {name: "dev/"}, {name: "etc/"}, {name: "tmp/", mode: 0o1777},
		{name: "bin/busybox", content: string(busybox)},
		{name: "etc/passwd", content: "root:x:0:0::/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n1000:x:0:0::/:/bin/sh\n", mode: 0o644},
		{name: "etc/group", content: "root:x:0:\nuser:x:1000:\nextra:x:2000:user\n", mode: 0o644},
	}
	for _, a := range append(applets, "ip", "ps", "ping", "nslookup", "env", "find", "nc", "wget", "mv", "rm", "chmod", "chown", "echo", "ln") {
		out = append(out, entry{name: "bin/" + a, link: "busybox"})
	}
	return out
}

// load gives the daemon an image of layers, and its name.
func (n *node) load(t *testing.T, change func(*v1.Config), layers ...[]entry) (ref string, err error) {
	t.Helper()
	img := empty.Image
	for _, l := range layers {
		raw, err := archive(l...)
		must(t, err)
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil })
		must(t, err)
		img, err = mutate.AppendLayers(img, layer)
		must(t, err)
	}
	cf, err := img.ConfigFile()
	must(t, err)
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture, cf.Config.Env = "linux", runtime.GOARCH, []string{"PATH=/bin"}
	if change != nil {
		change(&cf.Config)
	}
	img, err = mutate.ConfigFile(img, cf)
	must(t, err)
	ref = fmt.Sprintf("hksec%d:latest", counter.Add(1))
	tag, err := name.NewTag(ref)
	must(t, err)
	var buf bytes.Buffer
	must(t, tarball.Write(tag, img, &buf))
	code, body := n.call("POST", "/images/load?quiet=1", &buf)
	if code != 200 || !strings.Contains(body, "Loaded image") {
		return "", fmt.Errorf("load: %d %s", code, body)
	}
	t.Cleanup(func() { n.call("DELETE", "/images/"+ref+"?force=1", nil) })
	return ref, nil
}

// plain is an image of busybox.
func (n *node) plain(t *testing.T) string {
	t.Helper()
	ref, err := n.load(t, nil, base(t))
	must(t, err)
	return ref
}
