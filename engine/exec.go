package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/errtext"
	"github.com/hako-engine/hako/shim/client"
)

// The state machine of an exec, guarded by its container's lock:
//
//	created ── start ──► running ── exit ──► ended
//	   └────── start failed (126, 127) ───────▲
//
// It is forgotten some time after its end, when its container is removed, and when
// the daemon restarts.
type execState int

const (
	execCreated execState = iota
	execRunning
	execEnded
)

// execKept is how long an ended exec can still be inspected, as in Docker.
const execKept = 5 * time.Minute

// execLimit bounds the start of an exec: a stuck shim is reported, not waited for.
const execLimit = 30 * time.Second

// execution is one exec of a container.
type execution struct {
	id   string
	c    *container
	cfg  ExecConfig
	done chan struct{} // closed at the end

	// Guarded by c.mu:
	state   execState
	pid     int
	code    *int
	endedAt time.Time
}

// begin claims the start. The caller holds c.mu.
func (x *execution) begin() error {
	switch x.state {
	case execRunning:
		return conflictf("Error: Exec command %s is already running", x.id)
	case execEnded:
		return conflictf("Error: Exec command %s has already run", x.id)
	}
	x.state = execRunning
	return nil
}

// ended records the end once. The caller holds c.mu.
func (x *execution) ended(code int) bool {
	if x.state == execEnded || x.state == execCreated && code == exitUnknown {
		return false
	}
	x.state, x.code, x.pid, x.endedAt = execEnded, &code, 0, time.Now()
	close(x.done)
	return true
}

// execRegistry finds execs by id.
type execRegistry struct {
	mu   sync.Mutex
	byID map[string]*execution
}

func (r *execRegistry) add(x *execution) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.byID[x.id] = x
}

func (r *execRegistry) remove(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.byID, id)
}

// removeOf forgets the execs of a guest that is gone.
func (r *execRegistry) removeOf(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	maps.DeleteFunc(r.byID, func(_ string, x *execution) bool { return x.c.guest != nil && x.c.id == id })
}

func (r *execRegistry) get(id string) (*execution, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if x := r.byID[id]; x != nil {
		return x, nil
	}
	var found *execution
	if len(id) >= 4 {
		for k, x := range r.byID {
			if strings.HasPrefix(k, id) {
				if found != nil {
					return nil, invalidf("Multiple exec IDs found with provided prefix: %s", id)
				}
				found = x
			}
		}
	}
	if found == nil {
		return nil, notFoundf("No such exec instance: %s", id)
	}
	return found, nil
}

func (cfg ExecConfig) validate() error {
	if len(cfg.Cmd) == 0 || cfg.Cmd[0] == "" {
		return invalidf("No exec command specified")
	}
	for _, s := range slices.Concat(cfg.Cmd, cfg.Env, []string{cfg.WorkingDir, cfg.User}) {
		if strings.ContainsRune(s, 0) {
			return invalidf("exec argument %q holds a NUL byte", s)
		}
	}
	return nil
}

// CreateExec prepares a process in a running container. Nothing runs yet.
func (e *Engine) CreateExec(ctx context.Context, cfg ExecConfig) (string, error) {
	c, err := e.find(ctx, cfg.Container)
	if err != nil {
		return "", err
	}
	if err := cfg.validate(); err != nil {
		return "", err
	}
	if _, err := c.live("exec"); err != nil {
		return "", err
	}
	x := &execution{id: newID(), c: c, cfg: cfg, done: make(chan struct{})}
	var old []string
	c.mu.Lock()
	if c.gone {
		c.mu.Unlock()
		return "", notFoundf("No such container: %s", cfg.Container)
	}
	m := maps.Clone(c.execs) // whoever has the old one reads it without the lock
	for id, o := range c.execs {
		if o.state == execEnded && time.Since(o.endedAt) > execKept {
			old = append(old, id)
			delete(m, id)
		}
	}
	m[x.id] = x
	c.execs = m
	c.mu.Unlock()
	for _, id := range old {
		e.execs.remove(id)
	}
	e.execs.add(x)
	e.emit(c, "exec_create: "+strings.Join(cfg.Cmd, " "), "execID", x.id)
	return x.id, nil
}

// StartExec starts an exec that nobody watches.
func (e *Engine) StartExec(ctx context.Context, id string) error {
	_, err := e.startExec(ctx, id, false)
	return err
}

// AttachExec starts an exec with its streams. The end of the output is seen only after
// the exit code is known to Exec.
func (e *Engine) AttachExec(ctx context.Context, id string) (Attachment, error) {
	return e.startExec(ctx, id, true)
}

func (e *Engine) startExec(ctx context.Context, id string, attach bool) (Attachment, error) {
	x, err := e.execs.get(id)
	if err != nil {
		return nil, err
	}
	c := x.c
	r, err := c.live("exec")
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	err = x.begin()
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	a, err := e.runExec(ctx, x, r, attach)
	if err != nil {
		code, err := execError(err)
		c.mu.Lock()
		x.ended(code)
		c.mu.Unlock()
		return nil, err
	}
	return a, nil
}

// execError gives Docker's exit code and text for an exec that could not start.
func execError(err error) (int, error) {
	const cannot = "unable to start container process: "
	text := errtext.Plain(err)
	if _, after, ok := strings.Cut(text, cannot); ok { // what lies before names ids that mean nothing to a user
		text = after
	}
	text = "OCI runtime exec failed: exec failed: " + cannot + text
	lower := strings.ToLower(err.Error())
	switch {
	case errdefs.IsInvalidArgument(err):
		return exitNotRunnable, err
	case strings.Contains(lower, "executable file not found"), strings.Contains(lower, "no such file or directory"):
		return exitNotFound, invalidf("%s", text)
	}
	return exitNotRunnable, invalidf("%s", text)
}

// runExec starts the process. With attach its streams are connected before it begins.
func (e *Engine) runExec(ctx context.Context, x *execution, r *run, attach bool) (Attachment, error) {
	c := x.c
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), execLimit)
	defer cancel()
	proc, err := e.execProcess(x, r)
	if err != nil {
		return nil, err
	}
	err = r.shim.get().Exec(ctx, client.ExecOptions{ID: c.id, ExecID: x.id, Spec: proc,
		Stdio: client.Stdio{Terminal: x.cfg.TTY, OpenStdin: x.cfg.AttachStdin && attach, StdinOnce: x.cfg.AttachStdin}})
	if err != nil {
		return nil, err
	}
	drop := func() { // at the latest the shim forgets it with the container
		dctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killLimit)
		defer cancel()
		e.killExec(dctx, r, c.id, x.id)
		_, _ = r.shim.get().Delete(dctx, c.id, x.id)
	}
	a := &attachment{closed: make(chan struct{}), end: x.done, p: &pendingAttach{ready: make(chan struct{})}}
	if attach {
		s, err := r.shim.get().Attach(ctx, client.AttachOptions{ID: c.id, ExecID: x.id,
			Stdin: x.cfg.AttachStdin, Stdout: x.cfg.AttachStdout, Stderr: x.cfg.AttachStderr})
		if err != nil {
			drop()
			return nil, fmt.Errorf("attach: %w", err)
		}
		a.p.resolve(s)
	}
	pid, err := r.shim.get().Start(ctx, c.id, x.id)
	if err != nil {
		if attach {
			a.Close()
		}
		drop()
		return nil, err
	}
	c.mu.Lock()
	x.pid = pid
	c.mu.Unlock()
	e.emit(c, "exec_start: "+strings.Join(x.cfg.Cmd, " "), "execID", x.id)
	e.work.Go(func() {
		exit, err := r.shim.get().Wait(e.ctx, c.id, x.id)
		if err != nil {
			if e.ctx.Err() != nil {
				return
			}
			exit.Status = exitUnknown // the container ended, and the shim with it
		}
		c.mu.Lock()
		first := x.ended(int(exit.Status))
		c.mu.Unlock()
		if err == nil {
			dctx, cancel := context.WithTimeout(context.WithoutCancel(e.ctx), cleanupLimit)
			_, _ = r.shim.get().Delete(dctx, c.id, x.id)
			cancel()
		}
		if first {
			e.emit(c, "exec_die", "execID", x.id, "exitCode", strconv.Itoa(int(exit.Status)))
		}
	})
	return a, nil
}

// execProcess makes the OCI process of an exec: the container's, with what the client
// changed.
func (e *Engine) execProcess(x *execution, r *run) (*specs.Process, error) {
	if x.c.guest != nil {
		return e.guestProcess(x, r)
	}
	v := x.c.view()
	user := x.cfg.User
	if user == "" {
		user = v.User
	}
	acc, err := e.execAccount(x, r, user)
	if err != nil {
		return nil, err
	}
	sec, err := parseSecurity(v.Config.SecurityOpt)
	if err != nil {
		return nil, err
	}
	profile, err := sec.apparmorProfile(e.host, v.Config.Privileged)
	if err != nil {
		return nil, err
	}
	caps, err := capabilities(v.Config.Privileged || x.cfg.Privileged, v.Config.CapAdd, v.Config.CapDrop)
	if err != nil {
		return nil, err
	}
	cwd := x.cfg.WorkingDir
	if cwd == "" {
		cwd = v.WorkingDir
	}
	if cwd != "" && cwd[0] != '/' {
		return nil, invalidf("exec working directory %q is not an absolute path", cwd)
	}
	limits := rlimits(v.Config.Resources.Ulimits, e.host.FileLimit)
	ev := v
	ev.Config.TTY = x.cfg.TTY
	if v.Adjustment != nil || len(v.cdiNames()) > 0 {
		// What plugins and descriptions of devices made of the container's process holds for this one, too.
		started, err := e.ContainerSpec(e.ctx, v.ID)
		if err == nil && started.Process == nil {
			err = fmt.Errorf("configuration of container %s has no process: %w", v.ID, errdefs.ErrDataLoss)
		}
		if err != nil {
			return nil, err
		}
		limits, ev.Env = started.Process.Rlimits, started.Process.Env
		if x.cfg.User != "" {
			ev.Env = slices.DeleteFunc(ev.Env, func(kv string) bool { return strings.HasPrefix(kv, "HOME=") })
		}
	}
	ev.Env = mergeEnv(ev.Env, x.cfg.Env)
	p := &specs.Process{
		Terminal:        x.cfg.TTY,
		Args:            x.cfg.Cmd,
		Env:             processEnv(ev, v.Hostname, acc.Home),
		Cwd:             workingDir(cwd),
		User:            specs.User{UID: acc.UID, GID: acc.GID, AdditionalGids: acc.Groups},
		Capabilities:    capabilitySets(e.host.availableCaps(caps), acc.UID),
		NoNewPrivileges: sec.noNewPrivileges,
		ApparmorProfile: profile,
		Rlimits:         limits,
		OOMScoreAdj:     oomScoreAdj(v.Config, e.host),
	}
	if v.Config.Pod != nil {
		p.SelinuxLabel = v.Config.Pod.ProcessLabel
		if err := addAmbient(p.Capabilities, v.Config.Pod.AmbientCaps, caps, e.host); err != nil {
			return nil, err
		}
	}
	if x.cfg.TTY && x.cfg.ConsoleSize != [2]uint{} {
		p.ConsoleSize = &specs.Box{Height: x.cfg.ConsoleSize[0], Width: x.cfg.ConsoleSize[1]}
	}
	return p, nil
}

// ContainerSpec is the OCI configuration that a running container was started with. One that does not run has
// none: NotFound.
func (e *Engine) ContainerSpec(_ context.Context, id string) (*specs.Spec, error) {
	raw, err := os.ReadFile(filepath.Join(e.bundle(id), "config.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFoundf("container %s has no configuration: it does not run", id)
	} else if err != nil {
		return nil, fmt.Errorf("configuration of container %s: %w", id, err)
	}
	var s specs.Spec
	if err := json.Unmarshal(raw, &s); err != nil {
		return nil, fmt.Errorf("configuration of container %s: %w", id, errors.Join(err, errdefs.ErrDataLoss))
	}
	return &s, nil
}

// execAccount finds whom an exec runs as. In a pod that is whom the container does.
func (e *Engine) execAccount(x *execution, r *run, user string) (account, error) {
	v := x.c.view()
	if p := v.Config.Pod; p != nil && p.User != nil && x.cfg.User == "" {
		return account{UID: p.User.UID, GID: p.User.GID, Groups: p.User.Groups, Home: p.User.Home}, nil
	}
	root, err := openProcessRoot(int(r.pid.Load()))
	if err != nil {
		return account{}, err
	}
	defer root.Close()
	acs, err := readAccounts(root)
	if err != nil {
		return account{}, err
	}
	return acs.resolve(user, v.Config.GroupAdd)
}

// ResizeExec sets the size of an exec's terminal, in characters.
func (e *Engine) ResizeExec(ctx context.Context, id string, width, height uint32) error {
	x, err := e.execs.get(id)
	if err != nil {
		return err
	}
	r, err := x.c.live("use")
	if err != nil {
		return err
	}
	if err := r.shim.get().Resize(ctx, x.c.id, x.id, width, height); err != nil {
		return fmt.Errorf("resize terminal of exec %s: %w", id, err)
	}
	return nil
}

// Exec gives an exec as it is.
func (e *Engine) Exec(ctx context.Context, id string) (Exec, error) {
	x, err := e.execs.get(id)
	if err != nil {
		return Exec{}, err
	}
	x.c.mu.Lock()
	defer x.c.mu.Unlock()
	return Exec{
		ID: x.id, ContainerID: x.c.id, Config: x.cfg,
		Running: x.state == execRunning, Started: x.state != execCreated, ExitCode: x.code, Pid: x.pid,
	}, nil
}

// killExec ends an exec'd process.
func (e *Engine) killExec(ctx context.Context, r *run, id, execID string) {
	if err := r.shim.get().Kill(ctx, id, execID, int(unix.SIGKILL), false); err != nil && !errdefs.IsNotFound(err) {
		e.log.Debug("kill exec", "container", id, "exec", execID, "error", err)
	}
}
