// Package ociexec drives any OCI runtime (runc, crun, runsc, hako-oci) by executing
// its command line, as containerd's and Docker's engines do.
//
// In flow bundles, root file systems and commands of the shim; out flow executions
// of the runtime's binary, and errors that carry what its JSON log says, with a class.
package ociexec

import (
	"bytes"
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

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/undo"
	"github.com/hako-engine/hako/shim"
	"github.com/hako-engine/hako/shim/wire"
)

// Cgroup is what the shim asks of the cgroup that a runtime made.
type Cgroup interface {
	// OOM sends for each kill for want of memory; closed when ctx ends.
	OOM(ctx context.Context) (<-chan struct{}, error)
	// OOMKilled asks whether there has been such a kill.
	OOMKilled() bool
	// Stats gives containerd's metrics message of the cgroup.
	Stats() (wire.Any, error)
}

// Runtime executes one binary.
type Runtime struct {
	Binary        string // path, or name to look up in PATH
	Root          string // --root
	SystemdCgroup bool
	// Cgroup opens the cgroup of a process. nil: no statistics and no OOM events.
	Cgroup func(pid int) (Cgroup, error)
}

// call is one execution.
type call struct {
	args  []string
	stdin io.Reader
	// files are stdin, stdout and stderr of the container, which inherits them; nil:
	// what the command prints is kept in stdout.
	files  []*os.File
	log    string // folder for the log file
	stdout []byte
}

// run executes the runtime and waits for it.
func (r *Runtime) run(ctx context.Context, c *call) error {
	// Ours alone while the command runs, whatever else runs in this bundle.
	f, err := os.CreateTemp(c.log, ".runtime-log.*")
	if err != nil {
		return err
	}
	logFile := f.Name()
	f.Close()
	defer os.Remove(logFile)

	args := []string{"--root", r.Root, "--log", logFile, "--log-format", "json"}
	if r.SystemdCgroup {
		args = append(args, "--systemd-cgroup")
	}
	cmd := exec.CommandContext(ctx, r.Binary, append(args, c.args...)...)
	cmd.Dir = c.log
	cmd.Stdin = c.stdin
	var out, errs bytes.Buffer
	if c.files == nil {
		cmd.Stdout, cmd.Stderr = &out, &errs
	} else {
		// Files are inherited as they are; nil is /dev/null.
		if c.files[0] != nil {
			cmd.Stdin = c.files[0]
		}
		if c.files[1] != nil {
			cmd.Stdout = c.files[1]
		}
		if c.files[2] != nil {
			cmd.Stderr = c.files[2]
		}
	}
	err = cmd.Run()
	c.stdout = out.Bytes()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s %s: %w", filepath.Base(r.Binary), c.args[0], ctx.Err())
	}
	text := lastError(logFile)
	if text == "" {
		text = strings.TrimSpace(errs.String())
	}
	if text == "" {
		text = err.Error()
	}
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("runtime %s: %w: %w", r.Binary, err, errdefs.ErrUnavailable)
	}
	return fmt.Errorf("%s %s: %s: %w", filepath.Base(r.Binary), c.args[0], text, classify(c.args[0], text))
}

// lastError is the message of the last error in a JSON log.
func lastError(path string) (text string) {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	dec := json.NewDecoder(io.LimitReader(f, 1<<20))
	for {
		var line struct{ Level, Msg string }
		if dec.Decode(&line) != nil {
			return text
		}
		if line.Level == "error" || line.Level == "fatal" {
			text = line.Msg
		}
	}
}

// classify gives the class of a runtime's message. The words are runc's and crun's,
// which others repeat because engines look for them.
func classify(command, text string) error {
	text = strings.ToLower(text)
	has := func(words ...string) bool {
		for _, w := range words {
			if strings.Contains(text, w) {
				return true
			}
		}
		return false
	}
	switch {
	case has("already exists"):
		return errdefs.ErrAlreadyExists
	case command == "kill" && has("process already finished", "not running", "no such process", "does not exist", "not found"),
		command != "create" && has("container does not exist", "does not exist"):
		return errdefs.ErrNotFound
	case (command == "create" || command == "start" || command == "exec") &&
		has("executable file not found", "no such file or directory", "permission denied", "operation not permitted", "is a directory"):
		return errdefs.ErrUnknown // of the program, see shim.Runtime
	case has("executable file not found", "no such file or directory"):
		return errdefs.ErrNotFound
	case has("permission denied", "operation not permitted", "is a directory"):
		return errdefs.ErrPermissionDenied
	case has("not running", "not paused", "stopped container", "paused container", "already running", "not stopped", "cannot start"):
		return errdefs.ErrFailedPrecondition
	case has("not implemented", "unknown command", "not supported"):
		return errdefs.ErrNotImplemented
	}
	return errdefs.ErrUnknown
}

// Create implements shim.Runtime.
func (r *Runtime) Create(ctx context.Context, id string, o shim.CreateOptions) (_ shim.Container, err error) {
	if o.Restore != nil {
		// Their command lines know no restored container that waits to be started.
		return nil, fmt.Errorf("restore a checkpoint with %s: %w", filepath.Base(r.Binary), errdefs.ErrNotImplemented)
	}
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run(ctx))
		}
	}()
	if err := os.MkdirAll(r.Root, 0o711); err != nil {
		return nil, err
	}
	if len(o.Rootfs) > 0 {
		rootfs := filepath.Join(o.Bundle, "rootfs")
		u.Add("mount root file system", func(context.Context) error { return unmountAll(rootfs) })
		if err := mountAll(rootfs, o.Rootfs); err != nil {
			return nil, err
		}
	}
	c := &container{r: r, id: id, bundle: o.Bundle}
	args := []string{"create", "--bundle", o.Bundle}
	if o.NoPivot {
		args = append(args, "--no-pivot")
	}
	if o.NoNewKeyring {
		args = append(args, "--no-new-keyring")
	}
	// A runtime that fails half way may leave its state.
	u.Add("create container", func(ctx context.Context) error { return r.delete(ctx, id, o.Bundle) })
	// The name is containerd's: wrappers of runtimes look there.
	pidFile := filepath.Join(o.Bundle, "init.pid")
	defer os.Remove(pidFile)
	c.init, err = r.launch(ctx, o.Bundle, pidFile, args, []string{id}, o.Terminal, []*os.File{o.Stdin, o.Stdout, o.Stderr})
	if err != nil {
		return nil, err
	}
	if r.Cgroup != nil {
		// Without it the container works, but is not measured.
		c.cgroup, _ = r.Cgroup(c.init.Pid)
	}
	u.Release()
	return c, nil
}

// launch runs a command that leaves a process behind, and gives that. The command writes pidFile.
func (r *Runtime) launch(ctx context.Context, bundle, pidFile string, args, operands []string, terminal bool, files []*os.File) (p shim.Process, err error) {
	args = append(args, "--pid-file", pidFile)
	var console *consoleSocket
	if terminal {
		if console, err = newConsoleSocket(); err != nil {
			return p, err
		}
		defer console.close()
		args = append(args, "--console-socket", console.path)
		files = []*os.File{nil, nil, nil}
	}
	if err := r.run(ctx, &call{args: append(args, operands...), files: files, log: bundle}); err != nil {
		return p, err
	}
	b, err := os.ReadFile(pidFile)
	if err != nil {
		return p, err
	}
	if p.Pid, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil || p.Pid <= 0 {
		return p, fmt.Errorf("runtime's pid file holds %.20q", b)
	}
	if console != nil {
		p.Console, err = console.receive()
	}
	return p, err
}

func (r *Runtime) delete(ctx context.Context, id, bundle string) error {
	err := r.run(ctx, &call{args: []string{"delete", "--force", id}, log: bundle})
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// Remove implements shim.Runtime.
func (r *Runtime) Remove(ctx context.Context, id, bundle string) error {
	err := r.delete(ctx, id, bundle)
	return errors.Join(err, unmountAll(filepath.Join(bundle, "rootfs")))
}

type container struct {
	r          *Runtime
	id, bundle string
	init       shim.Process
	cgroup     Cgroup // nil: unknown
}

func (c *container) Init() shim.Process { return c.init }

func (c *container) command(ctx context.Context, args ...string) error {
	return c.r.run(ctx, &call{args: append(args, c.id), log: c.bundle})
}

func (c *container) Start(ctx context.Context) error  { return c.command(ctx, "start") }
func (c *container) Pause(ctx context.Context) error  { return c.command(ctx, "pause") }
func (c *container) Resume(ctx context.Context) error { return c.command(ctx, "resume") }

// Checkpoint implements shim.Container.
func (c *container) Checkpoint(ctx context.Context, o shim.CheckpointOptions) error {
	args := []string{"checkpoint", "--image-path", o.ImagePath}
	if o.WorkPath != "" {
		args = append(args, "--work-path", o.WorkPath)
	}
	if o.ParentPath != "" {
		args = append(args, "--parent-path", o.ParentPath)
	}
	for name, on := range map[string]bool{
		"--leave-running": !o.Exit, "--tcp-established": o.OpenTCP, "--ext-unix-sk": o.ExternalUnixSockets,
		"--shell-job": o.Terminal, "--file-locks": o.FileLocks,
	} {
		if on {
			args = append(args, name)
		}
	}
	for _, n := range o.EmptyNamespaces {
		args = append(args, "--empty-ns", n)
	}
	if o.CgroupsMode != "" {
		args = append(args, "--manage-cgroups-mode", o.CgroupsMode)
	}
	return c.command(ctx, args...)
}

func (c *container) Exec(ctx context.Context, o shim.ExecOptions) (p shim.Process, err error) {
	f, err := os.CreateTemp(c.bundle, ".process.*")
	if err != nil {
		return p, err
	}
	defer os.Remove(f.Name())
	err = json.NewEncoder(f).Encode(o.Process)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return p, err
	}
	dir, err := os.MkdirTemp(c.bundle, ".launch.*")
	if err != nil {
		return p, err
	}
	defer os.RemoveAll(dir)
	return c.r.launch(ctx, c.bundle, filepath.Join(dir, "pid"), []string{"exec", "--detach", "--process", f.Name()}, []string{c.id},
		o.Process.Terminal, []*os.File{o.Stdin, o.Stdout, o.Stderr})
}

func (c *container) Kill(ctx context.Context, sig unix.Signal, all bool) error {
	args := []string{"kill"}
	if all {
		args = append(args, "--all")
	}
	return c.r.run(ctx, &call{args: append(args, c.id, strconv.Itoa(int(sig))), log: c.bundle})
}

func (c *container) Update(ctx context.Context, res *specs.LinuxResources) error {
	b, err := json.Marshal(res)
	if err != nil {
		return err
	}
	return c.r.run(ctx, &call{args: []string{"update", "--resources", "-", c.id}, stdin: bytes.NewReader(b), log: c.bundle})
}

func (c *container) Pids(ctx context.Context) (pids []int, err error) {
	k := &call{args: []string{"ps", "--format", "json", c.id}, log: c.bundle}
	if err := c.r.run(ctx, k); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(k.stdout, &pids); err != nil {
		return nil, fmt.Errorf("decode the runtime's process list: %w", err)
	}
	return pids, nil
}

func (c *container) Stats(context.Context) (wire.Any, error) {
	if c.cgroup == nil {
		return wire.Any{}, fmt.Errorf("statistics: %w", errdefs.ErrNotImplemented)
	}
	return c.cgroup.Stats()
}

func (c *container) OOM(ctx context.Context) (<-chan struct{}, error) {
	if c.cgroup == nil {
		ch := make(chan struct{})
		close(ch)
		return ch, nil
	}
	return c.cgroup.OOM(ctx)
}

func (c *container) OOMKilled() bool { return c.cgroup != nil && c.cgroup.OOMKilled() }

func (c *container) Delete(ctx context.Context) error { return c.r.Remove(ctx, c.id, c.bundle) }
