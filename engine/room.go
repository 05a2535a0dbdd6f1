package engine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	boxes "github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/hako-engine/hako/internal/durable"
	"github.com/hako-engine/hako/internal/undo"
	"github.com/hako-engine/hako/shim/client"
)

// A room is a sandbox that a client of containerd's API has a shim make. The shim keeps its state
// (containerd's sandbox service); the engine starts the shim, finds it again, and tells of the end.
//
//	          Create              Start           Stop, or it ended
//	(none) ──────────► created ──────────► ready ───────────────────► stopped
//	                      └────────────────────┴──── Shutdown, or the shim is gone ──► (none)
type shimRoom struct {
	shimTie
	meta roomMeta

	mu   sync.Mutex // guards all below; never held over a call to a shim
	shim TaskShim
	exit *boxes.ExitStatus
	done chan struct{} // closed with exit
}

// roomMeta is what is kept of a room in its bundle.
type roomMeta struct {
	Version int    `json:"version"`
	Runtime string `json:"runtime"`
	Program string `json:"program,omitempty"`
	Binary  string `json:"binary,omitempty"`
	// Dir is where hako's own shim keeps its socket: tasks may need it for longer than there is the sandbox.
	Dir string `json:"dir,omitempty"`
}

const (
	roomFolder   = "io.containerd.sandbox.controller.v1.shim"
	roomMetaFile = "hako-sandbox.json"
	// SandboxerShim and SandboxerPods are the names of those who look after sandboxes: shims, and the CRI.
	SandboxerShim = "shim"
	SandboxerPods = "podsandbox"
)

// SandboxController gives who looks after sandboxes: SandboxerShim ("" is the same) or SandboxerPods.
func (e *Engine) SandboxController(name string) (boxes.Controller, error) {
	switch name {
	case "", SandboxerShim:
		return (*roomController)(e), nil
	case SandboxerPods:
		return (*podController)(e), nil
	}
	return nil, notFoundf("there is no sandbox controller %q: not found", name)
}

// roomController is that of rooms.
type roomController Engine

func (r *roomController) engine() *Engine { return (*Engine)(r) }

func (e *Engine) newRoom(k taskKey, meta roomMeta) *shimRoom {
	b := &shimRoom{shimTie: newTie(k, "sandbox", filepath.Join(e.opt.State, roomFolder, k.namespace, k.id)), meta: meta, done: make(chan struct{})}
	b.shims = e.tieOptions(&b.shimTie, meta.Program, meta.Binary, nil)
	return b
}

// room finds a room with the connection to its shim.
func (e *Engine) room(ctx context.Context, id string) (*shimRoom, TaskShim, error) {
	k, err := keyOf(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	b := e.rooms.get(k)
	if b == nil {
		return nil, nil, notTied("sandbox", k)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.shim == nil {
		return b, nil, fmt.Errorf("the shim of sandbox %s does not answer: %w", id, errdefs.ErrUnavailable)
	}
	return b, b.shim, nil
}

func (r *roomController) Create(ctx context.Context, info boxes.Sandbox, opts ...boxes.CreateOpt) (err error) {
	e := r.engine()
	k, err := keyOf(ctx, info.ID)
	if err != nil {
		return err
	}
	var o boxes.CreateOptions
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return err
		}
	}
	meta := roomMeta{Version: 1, Runtime: info.Runtime.Name}
	if meta.Program, meta.Binary, err = e.taskRuntime(meta.Runtime); err != nil {
		return err
	}
	if meta.Program == "" {
		sum := sha256.Sum256(fmt.Appendf(nil, "sandbox\x00%s\x00%s\x00%d", k.namespace, k.id, time.Now().UnixNano()))
		meta.Dir = filepath.Join(e.opt.State, groupFolder, hex.EncodeToString(sum[:16]))
	}
	b := e.newRoom(k, meta)
	if b.shims.Options, _, err = taskOptions(meta.Program == "", meta.Runtime, info.Runtime.Options); err != nil {
		return err
	}
	b.ticket <- struct{}{} // whoever shuts it down waits until it is made, or gone
	defer b.release()
	if !e.rooms.add(b) {
		return fmt.Errorf("sandbox %s: %w", info.ID, errdefs.ErrAlreadyExists)
	}
	var u undo.Stack
	defer func() {
		if err != nil {
			err = fmt.Errorf("create sandbox %s: %w", info.ID, err)
		}
		err = errors.Join(err, u.Run(ctx))
	}()
	u.Add("sandbox", func(context.Context) error { e.rooms.remove(b); close(b.gone); return nil })
	u.Add("bundle", func(context.Context) error { return removeTaskBundle(b.bundle) })
	spec := []byte("{}")
	if info.Spec != nil && len(info.Spec.GetValue()) > 0 {
		spec = info.Spec.GetValue()
	}
	if err := makeRoomBundle(b, spec); err != nil {
		return err
	}
	shim, err := e.startRoomShim(ctx, b, &u)
	if err != nil {
		return fmt.Errorf("shim: %w", err)
	}
	b.mu.Lock()
	b.shim = shim
	b.mu.Unlock()
	u.Add("shim", func(ctx context.Context) error {
		defer shim.Close()
		if _, err := shim.ShutdownSandbox(ctx, &sandboxapi.ShutdownSandboxRequest{SandboxID: b.id}); err == nil {
			return nil
		}
		return e.endForeignShim(ctx, shim, b.shims)
	})
	_, err = shim.CreateSandbox(ctx, &sandboxapi.CreateSandboxRequest{
		SandboxID: b.id, BundlePath: b.bundle, Rootfs: mountMessages(o.Rootfs), Options: anyMessage(o.Options), NetnsPath: o.NetNSPath, Annotations: o.Annotations,
	})
	if err != nil {
		return err
	}
	u.Release()
	e.announce(b.namespace, "/sandboxes/create", &eventsapi.SandboxCreate{SandboxID: b.id})
	e.work.Go(func() { e.watchTied(b) })
	return nil
}

// startRoomShim starts the shim of a room.
func (e *Engine) startRoomShim(ctx context.Context, b *shimRoom, u *undo.Stack) (TaskShim, error) {
	if b.meta.Dir == "" {
		return e.opt.TaskShims.StartTask(ctx, b.shims)
	}
	u.Add("folder", func(context.Context) error { return os.RemoveAll(b.meta.Dir) })
	if err := os.MkdirAll(b.meta.Dir, 0o700); err != nil {
		return nil, err
	}
	o := b.shims
	o.Bundle = b.meta.Dir
	first, err := e.opt.TaskShims.StartTask(ctx, o)
	if err != nil {
		return nil, err
	}
	defer first.Close()
	shim, err := e.opt.TaskShims.JoinTask(ctx, b.shims, first.Bootstrap())
	if err != nil {
		return nil, errors.Join(err, e.endForeignShim(ctx, first, o))
	}
	return shim, nil
}

// leaveRoom removes the folder of a sandbox's shim with the sandbox and the last of its tasks, whichever goes last.
func (e *Engine) leaveRoom(namespace, dir string) {
	if filepath.Dir(dir) != filepath.Join(e.opt.State, groupFolder) {
		return // somebody else's
	}
	for _, b := range e.rooms.in("") {
		if b.meta.Dir == dir {
			return
		}
	}
	for _, t := range e.tasks.in(namespace) {
		if t.meta.Foreign && t.shimDir() == dir {
			return
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		e.log.Error("remove the folder of a shim", "dir", dir, "namespace", namespace, "error", err)
	}
}

func anyMessage(a typeurl.Any) *anypb.Any {
	if a == nil {
		return nil
	}
	return typeurl.MarshalProto(a)
}

func makeRoomBundle(b *shimRoom, spec []byte) error {
	if err := removeTaskBundle(b.bundle); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(b.bundle), 0o711); err != nil {
		return err
	}
	if err := os.Mkdir(b.bundle, 0o700); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(b.bundle, "rootfs"), 0o711); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(b.bundle, "config.json"), spec, 0o600); err != nil {
		return err
	}
	raw, err := json.Marshal(b.meta)
	if err != nil {
		return err
	}
	return durable.WriteVolatile(filepath.Join(b.bundle, roomMetaFile), append(raw, '\n'), 0o600)
}

func (r *roomController) Start(ctx context.Context, id string) (boxes.ControllerInstance, error) {
	b, shim, err := r.engine().room(ctx, id)
	if err != nil {
		return boxes.ControllerInstance{}, err
	}
	resp, err := shim.StartSandbox(ctx, &sandboxapi.StartSandboxRequest{SandboxID: id})
	if err != nil {
		return boxes.ControllerInstance{}, fmt.Errorf("start sandbox %s: %w", id, err)
	}
	address, version := endpoint(shim)
	r.engine().announce(b.namespace, "/sandboxes/start", &eventsapi.SandboxStart{SandboxID: id})
	i := boxes.ControllerInstance{SandboxID: id, Pid: resp.Pid, CreatedAt: stamp(resp.CreatedAt), Address: address, Version: version}
	if resp.Spec != nil {
		i.Spec = resp.Spec
	}
	return i, nil
}

// endpoint is how others reach the task service of a shim.
func endpoint(shim TaskShim) (address string, version uint32) {
	b := shim.Bootstrap()
	return b.Protocol + "+" + b.Address, uint32(b.Version)
}

func (r *roomController) Platform(ctx context.Context, id string) (ocispec.Platform, error) {
	_, shim, err := r.engine().room(ctx, id)
	if err != nil {
		return ocispec.Platform{}, err
	}
	resp, err := shim.Platform(ctx, &sandboxapi.PlatformRequest{SandboxID: id})
	if err != nil {
		return ocispec.Platform{}, fmt.Errorf("platform of sandbox %s: %w", id, err)
	}
	p := resp.GetPlatform()
	return ocispec.Platform{OS: p.GetOS(), Architecture: p.GetArchitecture(), Variant: p.GetVariant()}, nil
}

func (r *roomController) Stop(ctx context.Context, id string, opts ...boxes.StopOpt) error {
	var o boxes.StopOptions
	for _, opt := range opts {
		opt(&o)
	}
	_, shim, err := r.engine().room(ctx, id)
	if err != nil {
		return err
	}
	req := &sandboxapi.StopSandboxRequest{SandboxID: id}
	if o.Timeout != nil {
		req.TimeoutSecs = uint32((*o.Timeout + time.Second - 1) / time.Second)
	}
	if _, err := shim.StopSandbox(ctx, req); err != nil {
		return fmt.Errorf("stop sandbox %s: %w", id, err)
	}
	return nil
}

func (r *roomController) Wait(ctx context.Context, id string) (x boxes.ExitStatus, err error) {
	e := r.engine()
	b, _, err := e.room(ctx, id)
	if b == nil {
		return x, err
	}
	select {
	case <-b.done:
		b.mu.Lock()
		defer b.mu.Unlock()
		return *b.exit, nil
	case <-ctx.Done():
		return x, context.Cause(ctx)
	case <-e.stopping:
		return x, errClosed
	}
}

func (r *roomController) Status(ctx context.Context, id string, verbose bool) (s boxes.ControllerStatus, err error) {
	_, shim, err := r.engine().room(ctx, id)
	if err != nil {
		return s, err
	}
	resp, err := shim.SandboxStatus(ctx, &sandboxapi.SandboxStatusRequest{SandboxID: id, Verbose: verbose})
	if err != nil {
		return s, fmt.Errorf("status of sandbox %s: %w", id, err)
	}
	s = boxes.ControllerStatus{SandboxID: id, Pid: resp.Pid, State: resp.State, Info: resp.Info, CreatedAt: stamp(resp.CreatedAt), ExitedAt: stamp(resp.ExitedAt)}
	if resp.Extra != nil {
		s.Extra = resp.Extra
	}
	s.Address, s.Version = endpoint(shim)
	return s, nil
}

// Shutdown ends a sandbox with all that runs in it. Tasks are stopped then, and there until their client deletes them, as is the
// shim if it is hako's own. A sandbox that is not there is no error.
func (r *roomController) Shutdown(ctx context.Context, id string) error {
	e := r.engine()
	b, _, err := e.room(ctx, id)
	if b == nil {
		if errdefs.IsNotFound(err) {
			return nil
		}
		return err
	}
	if err := b.acquire(ctx); errdefs.IsNotFound(err) {
		return nil
	} else if err != nil {
		return err
	}
	defer b.release()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupLimit)
	defer cancel()
	shim := b.connection()
	if shim == nil { // it is tried again to reach it, and it is forgotten if it is gone
		return fmt.Errorf("the shim of sandbox %s does not answer: %w", id, errdefs.ErrUnavailable)
	}
	_, err = shim.ShutdownSandbox(ctx, &sandboxapi.ShutdownSandboxRequest{SandboxID: id})
	if errdefs.IsUnavailable(err) {
		// It has ended before its answer came, or died, or does not answer.
		next, gone := e.opt.TaskShims.ConnectTask(ctx, b.shims)
		switch {
		case gone == nil:
			next.Close()
		case errdefs.IsNotFound(gone):
			if _, rerr := e.opt.TaskShims.ReapTask(ctx, b.shims); rerr != nil {
				e.log.Debug("clean up after the shim of a sandbox", "sandbox", b.id, "error", rerr)
			}
			err = nil
		}
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("shut down sandbox %s: %w", id, err)
	}
	e.roomOver(b, boxes.ExitStatus{ExitedAt: time.Now().UTC()})
	e.forgetRoom(b)
	return nil
}

func (r *roomController) Metrics(ctx context.Context, id string) (*types.Metric, error) {
	_, shim, err := r.engine().room(ctx, id)
	if err != nil {
		return nil, err
	}
	resp, err := shim.SandboxMetrics(ctx, &sandboxapi.SandboxMetricsRequest{SandboxID: id})
	if err != nil {
		return nil, fmt.Errorf("metrics of sandbox %s: %w", id, err)
	}
	return resp.GetMetrics(), nil
}

func (r *roomController) Update(ctx context.Context, id string, s boxes.Sandbox, fields ...string) error {
	_, shim, err := r.engine().room(ctx, id)
	if err != nil {
		return err
	}
	ext := map[string]*anypb.Any{}
	for k, v := range s.Extensions {
		ext[k] = anyMessage(v)
	}
	_, err = shim.UpdateSandbox(ctx, &sandboxapi.UpdateSandboxRequest{SandboxID: id, Fields: fields, Sandbox: &types.Sandbox{
		SandboxID: s.ID, Runtime: &types.Sandbox_Runtime{Name: s.Runtime.Name, Options: anyMessage(s.Runtime.Options)}, Spec: anyMessage(s.Spec),
		Labels: s.Labels, Extensions: ext, Sandboxer: s.Sandboxer,
	}})
	if errdefs.IsNotImplemented(err) {
		return nil // a shim need not know of it
	}
	return err
}

func (b *shimRoom) tie() *shimTie { return &b.shimTie }

func (b *shimRoom) connection() TaskShim {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.shim
}

func (b *shimRoom) follow(e *Engine, shim TaskShim) (done bool) {
	resp, err := shim.WaitSandbox(e.ctx, &sandboxapi.WaitSandboxRequest{SandboxID: b.id})
	if err == nil {
		e.roomOver(b, boxes.ExitStatus{ExitStatus: resp.ExitStatus, ExitedAt: stamp(resp.ExitedAt)})
	}
	return err == nil || errdefs.IsNotImplemented(err)
}

func (b *shimRoom) reconnected(_ context.Context, _ *Engine, shim TaskShim) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.shim = shim
	return nil
}

func (b *shimRoom) lost(e *Engine) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.ctx), cleanupLimit)
	defer cancel()
	if _, err := e.opt.TaskShims.ReapTask(ctx, b.shims); err != nil {
		e.log.Debug("clean up after the shim of a sandbox", "sandbox", b.id, "error", err)
	}
	e.roomOver(b, boxes.ExitStatus{ExitStatus: 128 + uint32(unix.SIGKILL), ExitedAt: time.Now().UTC()})
	e.forgetRoom(b)
}

// roomOver records the end of a room once, and tells it.
func (e *Engine) roomOver(b *shimRoom, x boxes.ExitStatus) {
	b.mu.Lock()
	if b.exit != nil {
		b.mu.Unlock()
		return
	}
	b.exit = &x
	close(b.done)
	b.mu.Unlock()
	e.announce(b.namespace, "/sandboxes/exit", &eventsapi.SandboxExit{SandboxID: b.id, ExitStatus: x.ExitStatus, ExitedAt: timestamppb.New(x.ExitedAt)})
}

// forgetRoom is the end of a room. The caller holds the ticket.
func (e *Engine) forgetRoom(b *shimRoom) {
	e.removeBundle(&b.shimTie)
	e.rooms.remove(b)
	close(b.gone)
	if shim := b.connection(); shim != nil {
		shim.Close()
	}
	e.leaveRoom(b.namespace, b.meta.Dir)
}

// restoreRooms takes up the rooms of an earlier daemon: those whose shim is gone are forgotten.
func (e *Engine) restoreRooms(ctx context.Context) {
	e.eachBundle(filepath.Join(e.opt.State, roomFolder), func(k taskKey) {
		b := e.newRoom(k, roomMeta{})
		var meta roomMeta
		raw, err := os.ReadFile(filepath.Join(b.bundle, roomMetaFile))
		if err == nil {
			err = json.Unmarshal(raw, &meta)
		}
		if errors.Is(err, os.ErrNotExist) { // its creation had hardly begun
			e.removeBundle(&b.shimTie)
			return
		}
		if err != nil || meta.Version > 1 {
			e.log.Error("the bundle of a sandbox cannot be read and is left alone", "sandbox", k.id, "namespace", k.namespace, "error", err)
			return
		}
		b = e.newRoom(k, meta)
		cctx, cancel := context.WithTimeout(ctx, e.patience.left())
		defer cancel()
		if shim, err := e.opt.TaskShims.ConnectTask(cctx, b.shims); err == nil {
			b.shim = shim
		} // else it is tried again, and forgotten if it is gone
		e.rooms.add(b)
		e.work.Go(func() { e.watchTied(b) })
	})
}

// endForeignShim ends a shim that could not do what it was started for.
func (e *Engine) endForeignShim(ctx context.Context, shim TaskShim, o client.TaskOptions) error {
	_, _ = shim.Shutdown(ctx, &taskapi.ShutdownRequest{ID: o.ID})
	if _, err := e.opt.TaskShims.ReapTask(ctx, o); err != nil && !errdefs.IsNotFound(err) {
		e.log.Debug("clean up after a shim", "id", o.ID, "error", err)
	}
	return nil
}
