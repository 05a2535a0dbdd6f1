package integration

import (
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
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// testImage is what every daemon of these tests is given first.
const testImage = "hako-test:latest"

// workDir holds the binaries and the image for the whole run.
var workDir string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		// Short, since the paths of sockets below it are bounded by 108 bytes.
		if workDir, err = os.MkdirTemp("", "hkt"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(workDir)
		code := m.Run()
		if sharedNode.n != nil {
			if err := sharedNode.n.end(); err != nil {
				fmt.Fprintln(os.Stderr, "the shared daemon's end:", err)
				code = 1
			}
		}
		return code
	}())
}

// binaries builds what the tests run, once.
var binaries = sync.OnceValue(func() error {
	for out, pkg := range map[string]string{
		"hakod": "../../cmd/hakod", "hako-shim": "../../cmd/hako-shim", "helper": "./testdata/helper",
		"grpcshim": "./testdata/grpcshim",
	} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(workDir, out), pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if b, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w\n%s", pkg, err, b)
		}
	}
	return nil
})

// hangLimit ends what hangs. Nothing is measured by it: an emulated machine on a busy one takes its time.
const hangLimit = 5 * time.Minute

// needs skips a test, by name, on a machine that lacks what it takes.
func needs(t *testing.T, commands ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("%s needs root", t.Name())
	}
	for _, c := range append(commands, "busybox") {
		if _, err := exec.LookPath(c); err != nil {
			t.Skipf("%s needs the command %s", t.Name(), c)
		}
	}
	if err := binaries(); err != nil {
		t.Fatal(err)
	}
}

var nodes atomic.Int32

// node is one daemon.
type node struct {
	dir, socket string
	bridge      string
	subnet      string
	flags       []string
	log         *os.File
	cmd         *exec.Cmd
	exited      chan error
	client      *http.Client
	before      census
}

var sharedNode struct {
	once sync.Once
	n    *node
	err  error
}

// shared gives the daemon that most tests use side by side. They name and remove what they make.
func shared(t *testing.T) *node {
	t.Helper()
	needs(t, "docker")
	return sharedWithout(t)
}

// sharedWithout is shared for tests that need no command line.
func sharedWithout(t *testing.T) *node {
	t.Helper()
	needs(t)
	sharedNode.once.Do(func() { sharedNode.n, sharedNode.err = newNode() })
	if sharedNode.err != nil {
		t.Fatal(sharedNode.err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(sharedNode.n.logTail())
		}
	})
	return sharedNode.n
}

// own gives a daemon for one test, which ends with it and must leave nothing behind.
func own(t *testing.T, flags ...string) *node {
	t.Helper()
	needs(t, "docker")
	n, err := newNode(flags...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(n.logTail())
		}
		if err := n.end(); err != nil {
			t.Errorf("the daemon's end: %v", err)
		}
	})
	return n
}

// freeSubnet gives the i-th daemon of this run one of the /24s of 10.200.0.0/13, which are apart from what engines choose by default:
// another one than all others have, also those of other runs on this machine.
func freeSubnet(i int) string {
	const runs, each = 32, 64
	used, _ := net.InterfaceAddrs()
	for run := range runs {
		k := (os.Getpid()+run)%runs*each + i%each
		_, subnet, _ := net.ParseCIDR(fmt.Sprintf("10.%d.%d.0/24", 200+k/256, k%256))
		if !slices.ContainsFunc(used, func(a net.Addr) bool { n, ok := a.(*net.IPNet); return ok && subnet.Contains(n.IP) }) {
			return subnet.String()
		}
	}
	panic("all subnets are used")
}

func newNode(flags ...string) (*node, error) {
	i := int(nodes.Add(1)) - 1
	n := &node{
		dir:    filepath.Join(workDir, fmt.Sprint("n", i)),
		bridge: fmt.Sprintf("hkt%dx%d", os.Getpid()%100000, i),
		subnet: freeSubnet(i),
		flags:  flags,
	}
	n.socket = filepath.Join(n.dir, "run", "docker.sock")
	n.client = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", n.socket)
	}}}
	if err := os.MkdirAll(filepath.Join(n.dir, "certs.d"), 0o700); err != nil {
		return nil, err
	}
	var err error
	if n.before, err = n.census(); err != nil {
		return nil, err
	}
	if n.log, err = os.Create(filepath.Join(n.dir, "log")); err != nil {
		return nil, err
	}
	if err := n.start(); err != nil {
		return nil, err
	}
	archive, err := imageArchive()
	if err != nil {
		return nil, errors.Join(err, n.end())
	}
	f, err := os.Open(archive)
	if err != nil {
		return nil, errors.Join(err, n.end())
	}
	defer f.Close()
	code, body, err := n.request("POST", "/images/load?quiet=1", f)
	if err != nil || code != 200 || !strings.Contains(body, "Loaded image") {
		return nil, errors.Join(fmt.Errorf("load the test image: %d %s %w", code, body, err), n.end())
	}
	return n, nil
}

// start runs the daemon and waits until it answers.
func (n *node) start() error {
	args := append([]string{
		"--config", os.DevNull, "--root", filepath.Join(n.dir, "lib"), "--state", filepath.Join(n.dir, "run"),
		"--docker-socket", n.socket, "--containerd-socket", "", "--registry-dir", filepath.Join(n.dir, "certs.d"),
		"--bridge-name", n.bridge, "--bridge-subnet", n.subnet, "--log-level", "debug",
	}, append([]string{"--network", "builtin"}, n.flags...)...)
	if s := os.Getenv("HAKO_TEST_SNAPSHOTTER"); s != "" {
		args = append(args, "--snapshotter", s)
	}
	n.cmd = exec.Command(filepath.Join(workDir, "hakod"), args...)
	n.cmd.Stdout, n.cmd.Stderr = n.log, n.log
	// Signals of a terminal are for the tests, which stop the daemon themselves.
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := n.cmd.Start(); err != nil {
		return err
	}
	n.exited = make(chan error, 1)
	go func(cmd *exec.Cmd, exited chan error) { exited <- cmd.Wait() }(n.cmd, n.exited)
	deadline := time.Now().Add(hangLimit)
	for {
		code, _, err := n.request("GET", "/_ping", nil)
		if err == nil && code == 200 {
			return nil
		}
		select {
		case err := <-n.exited:
			n.cmd = nil
			return fmt.Errorf("hakod ended at its start: %w\n%s", err, n.logTail())
		default:
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("hakod does not answer: %w\n%s", err, n.logTail())
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// signal sends the daemon a signal and waits for its end.
func (n *node) signal(sig syscall.Signal) error {
	if n.cmd == nil {
		return nil
	}
	n.client.CloseIdleConnections()
	if err := n.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case err := <-n.exited:
		n.cmd = nil
		if sig == syscall.SIGKILL {
			return nil
		}
		return err
	case <-time.After(hangLimit):
		return fmt.Errorf("hakod goes on after %v\n%s", sig, n.logTail())
	}
}

// end removes every object, stops the daemon and reports what is left on the machine.
func (n *node) end() error {
	var errs []error
	if n.cmd != nil {
		errs = append(errs, n.removePods(), n.removeAll(), n.signal(syscall.SIGTERM))
	}
	errs = append(errs, n.expectCensus(n.before))
	n.sweep()
	n.log.Close()
	errs = append(errs, os.RemoveAll(n.dir))
	return errors.Join(errs...)
}

func (n *node) removeAll() error {
	_, body, err := n.request("GET", "/containers/json?all=1", nil)
	if err != nil {
		return err
	}
	var list []struct{ Id string }
	if err := json.Unmarshal([]byte(body), &list); err != nil {
		return fmt.Errorf("%w: %s", err, body)
	}
	for _, c := range list {
		if code, body, err := n.request("DELETE", "/containers/"+c.Id+"?force=1&v=1", nil); err != nil || code != 204 {
			return fmt.Errorf("remove %s: %d %s %w", c.Id, code, body, err)
		}
	}
	return nil
}

// logTail gives the end of the daemon's log.
func (n *node) logTail() string {
	b, err := os.ReadFile(n.log.Name())
	if err != nil {
		return err.Error()
	}
	const limit = 3 << 10
	if len(b) > limit {
		b = b[len(b)-limit:]
	}
	return "hakod's log:\n" + string(b)
}

// request speaks HTTP to the daemon.
func (n *node) request(method, path string, body io.Reader, header ...string) (int, string, error) {
	req, err := http.NewRequest(method, "http://docker/v1.50"+path, body)
	if err != nil {
		return 0, "", err
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := n.client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// result is the end of a command line.
type result struct {
	args        []string
	out, stderr string
	code        int
}

func (r result) String() string {
	return fmt.Sprintf("docker %s: exit %d\nstdout: %s\nstderr: %s", strings.Join(r.args, " "), r.code, clip(r.out), clip(r.stderr))
}

func clip(s string) string {
	if len(s) > 2000 {
		return s[:1000] + "…" + s[len(s)-1000:]
	}
	return s
}

const commandTimeout = hangLimit

// command makes a command line for this daemon.
func (n *node) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Env = append(os.Environ(), "DOCKER_HOST=unix://"+n.socket, "DOCKER_CONFIG="+n.dir, "DOCKER_CLI_HINTS=false")
	cmd.WaitDelay = time.Minute
	return cmd
}

func (n *node) run(stdin io.Reader, args ...string) result {
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	cmd := n.command(ctx, args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errs
	err := cmd.Run()
	r := result{args: args, out: out.String(), stderr: errs.String(), code: -1}
	if cmd.ProcessState != nil {
		r.code = cmd.ProcessState.ExitCode()
	}
	if ctx.Err() != nil {
		r.stderr += "\n[it hung]"
	} else if err != nil && r.code < 0 {
		r.stderr += "\n[" + err.Error() + "]"
	}
	return r
}

// docker runs a command line that must end well, and gives its output without the last newline.
func (n *node) docker(t *testing.T, args ...string) string {
	t.Helper()
	r := n.run(nil, args...)
	if r.code != 0 {
		t.Fatal(r)
	}
	return strings.TrimSuffix(r.out, "\n")
}

// expect runs a command line and checks its exit code and that its output holds a text.
func (n *node) expect(t *testing.T, code int, text string, args ...string) result {
	t.Helper()
	r := n.run(nil, args...)
	if r.code != code || !strings.Contains(r.out+r.stderr, text) {
		t.Errorf("want exit %d and %q:\n%v", code, text, r)
	}
	return r
}

// name gives a container's name for a test and removes the container at its end.
func (n *node) name(t *testing.T, suffix string) string {
	t.Helper()
	name := strings.NewReplacer("/", "-", "#", "-").Replace(t.Name()) + suffix
	t.Cleanup(func() {
		if code, body, err := n.request("DELETE", "/containers/"+name+"?force=1&v=1", nil); err != nil || code != 204 && code != 404 && code != 409 {
			t.Errorf("remove %s: %d %s %v", name, code, body, err)
		}
	})
	return name
}

// eventually waits for a condition that another process brings about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(hangLimit)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for: %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// awaitEnd waits until a container has ended, whether the daemon runs or not: its shim has written that down, or the
// daemon has, and then removes what the shim wrote.
func (n *node) awaitEnd(t *testing.T, id string) {
	t.Helper()
	bundle := filepath.Join(n.dir, "run", "containers", id)
	eventually(t, "the end of container "+id, func() bool {
		if _, err := os.Lstat(bundle); errors.Is(err, os.ErrNotExist) {
			return true
		}
		_, err := os.Lstat(filepath.Join(bundle, "exit.json"))
		return err == nil
	})
}

// killProcess ends a process of this test's daemon.
func killProcess(t *testing.T, pid string) {
	t.Helper()
	if err := exec.Command("kill", "-KILL", pid).Run(); err != nil {
		t.Fatal(err)
	}
}

// snapshotter gives the name of the one that the daemon chose.
func (n *node) snapshotter(t *testing.T) string {
	t.Helper()
	name := n.docker(t, "info", "-f", "{{.Driver}}")
	if name != "erofs" && name != "overlayfs" && name != os.Getenv("HAKO_TEST_SNAPSHOTTER") {
		t.Errorf("snapshotter %q", name)
	}
	return name
}
