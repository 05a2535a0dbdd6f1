package examples

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const top = "../.." // of the repository

var work string // folder with the binaries

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		// Short: the paths of sockets below it are bounded by 108 bytes.
		if work, err = os.MkdirTemp("", "hkx"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(work)
		if err := os.Setenv("PATH", work+":"+os.Getenv("PATH")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

// binaries are built once, as the Makefile does, but for the image in hako: the tests
// load it from a file, so that they do not depend on what was built before.
var binaries = sync.OnceValue(func() error {
	build := []string{"build", "-o", work + "/", "./cmd/hako", "./cmd/hakod", "./cmd/hako-shim", "./cmd/hako-oci"}
	image := []string{"run", "./demo/build", "-arch", runtime.GOARCH, "-o", filepath.Join(work, "demo.tar.gz")}
	for _, args := range [][]string{build, image} {
		cmd := exec.Command("go", args...)
		cmd.Dir = top
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go %v: %w\n%s", args, err, out)
		}
	}
	return nil
})

func built(t *testing.T) {
	t.Helper()
	if err := binaries(); err != nil {
		t.Fatal(err)
	}
}

// daemon starts a hakod that ends, with all that it made, with the test. It gives the
// address of its socket.
func daemon(t *testing.T) (host string) {
	t.Helper()
	dir, err := os.MkdirTemp(work, "d")
	if err != nil {
		t.Fatal(err)
	}
	pid := os.Getpid()
	flags := []string{
		"--config", os.DevNull, "--root", filepath.Join(dir, "lib"), "--state", filepath.Join(dir, "run"),
		"--containerd-socket", "", "--cri-socket", "", "--bridge-name", fmt.Sprintf("hkx%d", pid%1_000_000),
		"--bridge-subnet", fmt.Sprintf("10.199.%d.0/24", pid%250),
	}
	hakod := filepath.Join(work, "hakod")
	log := new(strings.Builder)
	cmd := exec.Command(hakod, flags...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Errorf("stop hakod: %v", err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("hakod: %v", err)
		}
		if out, err := exec.Command(hakod, append(flags, "cleanup")...).CombinedOutput(); err != nil {
			t.Errorf("hakod cleanup: %v\n%s", err, out)
		}
		if t.Failed() {
			t.Logf("hakod's log:\n%s", log)
		}
	})
	socket := filepath.Join(dir, "run", "docker.sock")
	for deadline := time.Now().Add(5 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			return "unix://" + socket
		} else if time.Now().After(deadline) {
			t.Fatalf("hakod does not listen: %v", err)
		}
	}
}

// run runs a program, the built ones first, and gives its output.
func run(t *testing.T, env []string, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.WaitDelay = time.Minute
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// freePort gives a TCP port of the loopback that nobody has at this moment.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// expected is what the output of each example holds. An example without an entry fails.
var expected = map[string][]string{
	"hello.sh":       {"hostname      hello", "memory 64 MiB", "pids 32", "cpu 0.50 CPUs", "exit code 7", "from the shell, through a container"},
	"web-and-db.sh":  {"web asked http://db:8080/, which said: Hello from ", "from another network: "},
	"image-tools.sh": {"== out of the daemon", "sha256:", "zstd\n", "Size: ", "docker-archive:"},
	"library.sh":     {"the plan has ", "made\n", "(hako-oci)", "now stopped\n", "left: 0\n"},
	"oci-bundle.sh":  {"open_tree(AT_FDCWD", `"status": "created"`, `"status": "stopped"`, "(hako-oci)"},
}

// needs lists commands that an example calls besides hako's.
var needs = map[string][]string{"web-and-db.sh": {"curl"}}

func TestExamples(t *testing.T) {
	scripts, err := filepath.Glob(filepath.Join(top, "examples", "*.sh"))
	if err != nil || len(scripts) != len(expected) {
		t.Fatalf("found %v, expected %d scripts (%v)", scripts, len(expected), err)
	}
	if os.Geteuid() != 0 {
		t.Skipf("%s needs root: it starts containers", t.Name())
	}
	built(t)
	host := daemon(t)
	env := []string{"HAKO_HOST=" + host}
	run(t, env, "hako", "load", "-q", "-i", filepath.Join(work, "demo.tar.gz"))
	for _, script := range scripts {
		name := filepath.Base(script)
		t.Run(name, func(t *testing.T) {
			for _, c := range needs[name] {
				if _, err := exec.LookPath(c); err != nil {
					t.Skipf("%s needs the command %s", t.Name(), c)
				}
			}
			out := run(t, append(env, "PORT="+freePort(t)), "bash", script)
			for _, want := range expected[name] {
				if !strings.Contains(out, want) {
					t.Errorf("%q is not in the output:\n%s", want, out)
				}
			}
			if len(expected[name]) == 0 {
				t.Error("nothing is expected of this example")
			}
		})
	}
	if left := run(t, env, "hako", "ps", "-aq"); left != "" {
		t.Errorf("containers are left: %s", left)
	}
	if nets := run(t, env, "hako", "network", "ls", "--format", "{{.Name}}"); strings.Contains(nets, "example-") {
		t.Errorf("networks are left: %s", nets)
	}
}
