package client_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/shim/client"
	"github.com/hako-engine/hako/shim/log"
	"github.com/hako-engine/hako/shim/wire"
)

// helper is a daemon that is going to be killed: it starts a shim and a container,
// attaches to it, says so, and reads. Its arguments are the JSON of daemonJob.
func helper(args []string) {
	var job daemonJob
	if err := json.Unmarshal([]byte(args[0]), &job); err != nil {
		panic(err)
	}
	ctx := context.Background()
	must := func(err error) {
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	s, err := client.Manager{}.Start(ctx, job.Start)
	must(err)
	_, err = s.Create(ctx, job.Create)
	must(err)
	st, err := s.Attach(ctx, client.AttachOptions{ID: job.Create.ID, Stdout: true, Stderr: true, Stdin: true})
	must(err)
	_, err = s.Start(ctx, job.Create.ID, "")
	must(err)
	pid, err := s.Pid(ctx)
	must(err)
	fmt.Println(pid)
	for {
		if _, _, err := st.ReadFrame(); err != nil {
			must(err)
		}
	}
}

type daemonJob struct {
	Start  client.StartOptions
	Create client.CreateOptions
}

// daemon runs the helper and gives it with the pid of its shim.
func (e *env) daemon(io client.Stdio, command string) (*exec.Cmd, int) {
	e.t.Helper()
	e.spec.Process.Args = []string{"/bin/sh", "-c", command}
	e.spec.Process.Terminal = io.Terminal
	e.writeSpec()
	job, err := json.Marshal(daemonJob{e.opts, client.CreateOptions{ID: e.id, Bundle: e.bundle, Rootfs: e.rootfs, Stdio: io}})
	e.check(err)
	cmd := exec.Command(os.Args[0], "helper", string(job))
	out, err := cmd.StdoutPipe()
	e.check(err)
	e.check(cmd.Start())
	e.t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	e.check(err)
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		e.t.Fatalf("daemon says %s", line)
	}
	return cmd, pid
}

func (e *env) connect() {
	e.t.Helper()
	s, err := client.Manager{}.Connect(e.ctx, e.bundle)
	e.check(err)
	e.shim = s
}

// The daemon is killed while a container writes 10 MB/s: the container goes on, no
// line is lost, and its end is known afterwards.
func TestDaemonKilled(t *testing.T) {
	for _, r := range runtimes(t) {
		t.Run(name(r), func(t *testing.T) {
			t.Parallel()
			e := prepare(t, r)
			path := filepath.Join(e.bundle, "c.log")
			conf := client.LogConfig{Format: "json-file", Path: path, MaxSize: 4 << 20, MaxFiles: 100, Compress: true}
			// 20 times 1 MB in 10,000 lines, each followed by a pause of 0.1 s.
			cmd, pid := e.daemon(client.Stdio{OpenStdin: true, Log: conf}, `i=0
				while [ $i -lt 20 ]; do
					seq $((i*10000+1)) $((i*10000+10000)) | while read -r n; do echo "$n 0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789"; done
					i=$((i+1))
				done; exit 42`)
			time.Sleep(300 * time.Millisecond)
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			cmd.Wait()
			time.Sleep(300 * time.Millisecond)
			e.connect()
			t.Cleanup(func() { e.cleanup(pid) })
			st, err := e.shim.State(e.ctx, e.id, "")
			e.check(err)
			t.Logf("the daemon came back to a container that is %s", st.Status)
			if exit := e.wait(); exit.Status != 42 {
				t.Errorf("exit %+v", exit)
			}
			n := 0
			for entry, err := range log.Read(e.ctx, path, log.ReadOptions{Format: "json-file", Tail: -1}) {
				e.check(err)
				n++
				if got, _, _ := strings.Cut(string(entry.Line), " "); got != strconv.Itoa(n) {
					t.Fatalf("line %d is %q", n, entry.Line)
				}
			}
			if n != 200000 {
				t.Errorf("%d lines", n)
			}
		})
	}
}

// A container ends while there is no daemon, and its shim is killed, too: the exit
// file has the status.
func TestShimKilledAfterExit(t *testing.T) {
	each(t, func(t *testing.T, e *env) {
		e.create(client.Stdio{}, "exit 9")
		pid, err := e.shim.Pid(e.ctx)
		e.check(err)
		e.begin()
		want := e.wait()
		e.check(unix.Kill(pid, unix.SIGKILL))
		<-e.shim.Gone()
		if _, err := (client.Manager{}).Connect(e.ctx, e.bundle); !errdefs.IsNotFound(err) {
			t.Errorf("connect to a dead shim: %v", err)
		}
		exit, err := client.Manager{}.Reap(e.ctx, e.opts)
		if err != nil || exit != want || exit.Status != 9 {
			t.Errorf("reap: %+v, %v, want %+v", exit, err, want)
		}
		if exit, err = (client.Manager{}).Reap(e.ctx, e.opts); err != nil || exit.Status != 9 {
			t.Errorf("reap again: %+v, %v", exit, err)
		}
	})
}

// The shim of a running container is killed: what is left of the container is, too.
func TestShimKilledWhileRunning(t *testing.T) {
	each(t, func(t *testing.T, e *env) {
		e.create(client.Stdio{}, "sleep 600 & sleep 6000")
		e.begin()
		st, err := e.shim.State(e.ctx, e.id, "")
		e.check(err)
		pid, err := e.shim.Pid(e.ctx)
		e.check(err)
		e.check(unix.Kill(pid, unix.SIGKILL))
		<-e.shim.Gone()
		if _, err := e.shim.State(e.ctx, e.id, ""); !errdefs.IsUnavailable(err) {
			t.Errorf("state: %v", err)
		}
		exit, err := client.Manager{}.Reap(e.ctx, e.opts)
		if err != nil || exit.Status != 137 {
			t.Errorf("reap: %+v, %v", exit, err)
		}
		if !eventually(func() bool { return dead(st.Pid) }) {
			t.Error("the container lives on")
		}
	})
}

// TestConnectWithoutAddress: the daemon was killed while it wrote the file. There is no shim, and who wants to
// clean up must get to know that.
func TestConnectWithoutAddress(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, wire.AddressFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := (client.Manager{}).Connect(t.Context(), dir); !errdefs.IsNotFound(err) {
		t.Errorf("connect with an empty address: %v", err)
	}
}

// TestReapAfterAReboot: there is no folder, and nothing to clean up.
func TestReapAfterAReboot(t *testing.T) {
	o := client.StartOptions{Binary: "/bin/true", ID: "gone", Bundle: filepath.Join(t.TempDir(), "gone")}
	if _, err := (client.Manager{}).Reap(t.Context(), o); !errdefs.IsNotFound(err) {
		t.Errorf("reap without a bundle: %v", err)
	}
}

// dead reports whether a process has ended (a zombie that init has yet to reap counts).
func dead(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(b), ") Z ")
}

func TestTerminal(t *testing.T) {
	each(t, func(t *testing.T, e *env) {
		conf, path := e.jsonLog()
		e.create(client.Stdio{Terminal: true, OpenStdin: true, Log: conf}, "stty size; read x; stty size; echo got $x; exit 3")
		st := e.attach(client.AttachOptions{Stdin: true, Stdout: true, Stderr: true})
		e.check(e.shim.Resize(e.ctx, e.id, "", 132, 43))
		e.begin()
		stream, p, err := st.ReadFrame()
		if stream != 1 || !strings.HasPrefix(string(p), "43 132") || err != nil {
			t.Errorf("stream %d: %q, %v", stream, p, err)
		}
		e.check(e.shim.Resize(e.ctx, e.id, "", 80, 24))
		_, err = io.WriteString(st, "hello\n")
		e.check(err)
		out, _, err := read(st)
		if !strings.Contains(out, "24 80\r\n") || !strings.HasSuffix(out, "got hello\r\n") || err != nil {
			t.Errorf("read %q, %v", out, err)
		}
		if exit := e.wait(); exit.Status != 3 {
			t.Errorf("exit %+v", exit)
		}
		b, _ := os.ReadFile(path)
		if !strings.Contains(string(b), `{"log":"got hello\r\n","stream":"stdout",`) {
			t.Errorf("log %s", b)
		}
	})
}

func TestOOM(t *testing.T) {
	each(t, func(t *testing.T, e *env) {
		limit := int64(16 << 20)
		e.spec.Linux.Resources = resources(limit)
		e.create(client.Stdio{}, "tail /dev/zero")
		e.begin()
		exit := e.wait()
		if exit.Status != 137 && exit.Status != 1 {
			t.Errorf("exit %+v", exit)
		}
		has := func() bool {
			for _, topic := range e.topics() {
				if topic == "oom" {
					return true
				}
			}
			return false
		}
		if !eventually(has) {
			t.Errorf("events %v", e.topics())
		}
		if exit.Status == 137 && !exit.OOMKilled {
			t.Errorf("exit %+v", exit)
		}
	})
}

func TestBadRequests(t *testing.T) {
	each(t, func(t *testing.T, e *env) {
		e.spec.Process.Args = []string{"/nosuch"}
		e.writeSpec()
		// A missing command is noticed at create by runc, and at start by others.
		_, err := e.shim.Create(e.ctx, client.CreateOptions{ID: e.id, Bundle: e.bundle, Rootfs: e.rootfs})
		if err == nil {
			_, err = e.shim.Start(e.ctx, e.id, "")
			if _, derr := e.shim.Delete(e.ctx, e.id, ""); derr != nil {
				t.Errorf("delete: %v", derr)
			}
		}
		if err == nil || errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "/nosuch") { // the container is there
			t.Errorf("missing command: %v", err)
		}
		os.WriteFile(filepath.Join(e.bundle, "config.json"), []byte("{"), 0o600)
		if _, err := e.shim.Create(e.ctx, client.CreateOptions{ID: e.id, Bundle: e.bundle}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("bad bundle: %v", err)
		}
		if _, err := e.shim.Create(e.ctx, client.CreateOptions{ID: e.id, Bundle: "/nosuch"}); !errdefs.IsNotFound(err) {
			t.Errorf("no bundle: %v", err)
		}
		if _, err := e.shim.Attach(e.ctx, client.AttachOptions{ID: "nosuch"}); !errdefs.IsNotFound(err) {
			t.Errorf("attach to nothing: %v", err)
		}
		if _, err := (client.Manager{}).Start(e.ctx, client.StartOptions{Binary: "/nosuch", ID: "x", Bundle: e.t.TempDir()}); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("missing shim: %v", err)
		}
	})
}

// Two containers of a pod share a shim; each has its own state in its own bundle.
func TestPod(t *testing.T) {
	each(t, func(t *testing.T, e *env) {
		e.create(client.Stdio{}, "sleep 600")
		e.begin()
		second := e.t.TempDir()
		s := spec(e.id + "-b")
		s.Process.Args = []string{"/bin/sh", "-c", "exit 4"}
		b, _ := json.Marshal(s)
		os.WriteFile(filepath.Join(second, "config.json"), b, 0o600)
		_, err := e.shim.Create(e.ctx, client.CreateOptions{ID: e.id + "-b", Bundle: second, Rootfs: e.rootfs})
		e.check(err)
		defer func() {
			if t.Failed() {
				e.shim.Kill(e.ctx, e.id+"-b", "", 9, true)
				e.shim.Wait(e.ctx, e.id+"-b", "")
				e.shim.Delete(e.ctx, e.id+"-b", "")
			}
		}()
		_, err = e.shim.Start(e.ctx, e.id+"-b", "")
		e.check(err)
		exit, err := e.shim.Wait(e.ctx, e.id+"-b", "")
		if err != nil || exit.Status != 4 {
			t.Errorf("exit %+v, %v", exit, err)
		}
		// Its bundle leads to the shim, too.
		again, err := client.Manager{}.Connect(e.ctx, second)
		e.check(err)
		defer again.Close()
		if _, err := again.Delete(e.ctx, e.id+"-b", ""); err != nil {
			t.Error(err)
		}
		if st, err := e.shim.State(e.ctx, e.id, ""); err != nil || st.Status != client.StatusRunning {
			t.Errorf("first container: %+v, %v", st, err)
		}
	})
}

func TestManyInstantExits(t *testing.T) {
	each(t, func(t *testing.T, e *env) {
		for i := range 10 {
			e.create(client.Stdio{}, "exit "+strconv.Itoa(i))
			e.begin()
			if exit := e.wait(); exit.Status != uint32(i) {
				t.Errorf("exit %+v, want %d", exit, i)
			}
			e.delete()
		}
		if !eventually(func() bool { return len(e.topics()) == 40 }) {
			t.Fatalf("%d events", len(e.topics()))
		}
		for i, topic := range e.topics() {
			if want := []string{"create", "start", "exit", "delete"}[i%4]; topic != want {
				t.Fatalf("event %d is %s, not %s", i, topic, want)
			}
		}
	})
}
