package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	bootstrap "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/hako-engine/hako/internal/durable"
	"github.com/hako-engine/hako/internal/version"
	"github.com/hako-engine/hako/shim/wire"
)

const (
	// bootstrapFile tells in a bundle how its shim is reached; hako's own write wire.AddressFile.
	bootstrapFile = "bootstrap.json"
	// logFIFO is where shims that follow containerd's ways write their log.
	logFIFO = "log"
	// binaryPathFile names a bundle's shim, as with containerd.
	binaryPathFile = "shim-binary-path"
	// programLimit bounds how long a shim's start or delete may take.
	programLimit = 30 * time.Second
	// maxAnswer bounds what such a program may say.
	maxAnswer = 1 << 20
)

// Bootstrap is how a shim is reached. It is the content of bootstrap.json, in containerd's form.
type Bootstrap struct {
	Version  int    `json:"version"`  // of the task service: 2 or 3
	Address  string `json:"address"`  // "unix://PATH"
	Protocol string `json:"protocol"` // "ttrpc" or "grpc"
	// Mounts is what the shim says that it does itself; nil: it says nothing of it.
	Mounts *MountAbilities `json:"mounts,omitempty"`
}

// MountAbilities are mounts that a shim makes itself, as one that starts virtual machines may: nobody has to
// make them for it.
type MountAbilities struct {
	Types      []string `json:"types,omitempty"`      // "loop", "erofs", ...
	Transforms []string `json:"transforms,omitempty"` // "format", "mkfs", ...
}

// allowMounts is the annotation in which older shims tell their abilities: types, and transforms with a "/*" behind, separated by
// commas.
const allowMounts = "containerd.io/runtime-allow-mounts"

// MountsOf reads the abilities of older shims in what they tell of themselves; nil: they say nothing of it.
func MountsOf(info *types.RuntimeInfo) *MountAbilities {
	text, ok := info.GetAnnotations()[allowMounts]
	if !ok {
		return nil
	}
	a := &MountAbilities{}
	for word := range strings.SplitSeq(text, ",") {
		if transform, ok := strings.CutSuffix(word, "/*"); ok {
			a.Transforms = append(a.Transforms, transform)
		} else if word != "" {
			a.Types = append(a.Types, word)
		}
	}
	return a
}

// abilities finds them in a shim's answer. One that cannot be read says nothing.
func abilities(r *bootstrap.BootstrapResult) *MountAbilities {
	for _, x := range r.GetExtensions() {
		var m types.MountCapabilities
		if x.GetValue().MessageIs(&m) && x.GetValue().UnmarshalTo(&m) == nil {
			return &MountAbilities{Types: m.Types, Transforms: m.Transforms}
		}
	}
	return nil
}

// TaskOptions say how the shim of a task is started, and how it is cleaned up after.
type TaskOptions struct {
	// StartOptions are of every shim; Binary, Runtime and SystemdCgroup of hako's own alone.
	StartOptions
	// Program is the path of somebody else's shim; "": hako's own.
	Program string
	// Address is the daemon's gRPC socket, Daemon its program: shims are told both.
	Address, Daemon string
	// Options are the runtime's, in containerd's form; may be nil.
	Options *anypb.Any
	Log     *slog.Logger
}

// StartTask starts a shim for a bundle and connects to it.
func (m Manager) StartTask(ctx context.Context, o TaskOptions) (*Task, error) {
	if err := o.writeBinaryPath(); err != nil {
		return nil, fmt.Errorf("start shim of %s: %w", o.ID, err)
	}
	keep, err := o.openLog()
	if err != nil {
		return nil, fmt.Errorf("start shim of %s: %w", o.ID, err)
	}
	if o.Program == "" {
		defer keep.Close() // the shim has it from its birth
		s, err := m.Start(ctx, o.StartOptions)
		if err != nil {
			return nil, err
		}
		return s.Task(), nil
	}
	time.AfterFunc(programLimit, func() { keep.Close() })
	t, err := o.startProgram(ctx)
	if err != nil {
		return nil, fmt.Errorf("start shim %s of %s: %w", o.Program, o.ID, err)
	}
	return t, nil
}

// startProgram is containerd's bootstrap: the program starts a shim, or finds that of the
// container's group, and says where it is.
func (o TaskOptions) startProgram(ctx context.Context) (*Task, error) {
	params := &bootstrap.BootstrapParams{
		InstanceID: o.ID, Namespace: o.Namespace, ContainerdVersion: version.Version,
		ContainerdTtrpcAddress: o.EventsAddress, ContainerdGrpcAddress: o.Address, ContainerdBinary: o.Daemon,
	}
	if o.Debug {
		params.LogLevel = bootstrap.LogLevel_LOG_LEVEL_DEBUG
	}
	if o.Options != nil {
		params.Extensions = []*bootstrap.Extension{{Value: o.Options}}
	}
	in, err := proto.Marshal(params)
	if err != nil {
		return nil, err
	}
	out, err := o.run(ctx, "start", in)
	if err != nil && ctx.Err() == nil {
		// Shims of containerd before 2.3 take the bare options, and stumble over anything else.
		var old []byte
		if o.Options != nil {
			if old, err = proto.Marshal(o.Options); err != nil {
				return nil, err
			}
		}
		if out, err = o.run(ctx, "start", old); err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	b, err := parseBootstrap(out)
	if err != nil {
		return nil, err
	}
	return o.JoinTask(ctx, b)
}

// JoinTask connects to a shim that is there already, on behalf of a bundle.
func (o TaskOptions) JoinTask(ctx context.Context, b Bootstrap) (*Task, error) {
	t, err := dialTask(ctx, b, o.Namespace)
	if err != nil {
		return nil, err
	}
	raw, err := json.Marshal(b)
	if err == nil {
		err = durable.WriteVolatile(filepath.Join(o.Bundle, bootstrapFile), raw, 0o600)
	}
	if err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

// ConnectTask finds the shim of a bundle again: errdefs.ErrNotFound if there is none any more.
func (o TaskOptions) ConnectTask(ctx context.Context) (*Task, error) {
	b, err := readBootstrap(o.Bundle)
	if err != nil {
		return nil, fmt.Errorf("shim of %s: %w", o.Bundle, err)
	}
	if _, err := os.Lstat(filepath.Join(o.Bundle, logFIFO)); err == nil {
		keep, err := o.openLog()
		if err != nil {
			return nil, err
		}
		time.AfterFunc(programLimit, func() { keep.Close() })
	}
	t, err := dialTask(ctx, b, o.Namespace)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("shim of %s: %w: %w", o.Bundle, err, errdefs.ErrNotFound)
	case err != nil:
		return nil, err
	}
	if err := t.check(ctx, o.ID); err != nil {
		if errdefs.IsUnavailable(err) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		} else if errdefs.IsNotFound(err) || errdefs.IsNotImplemented(err) {
			return t, nil // it answers, and that is all that is asked here
		}
		t.Close()
		return nil, err
	}
	return t, nil
}

// readBootstrap is errdefs.ErrNotFound if nobody has come to start a shim.
func readBootstrap(bundle string) (b Bootstrap, err error) {
	raw, err := os.ReadFile(filepath.Join(bundle, bootstrapFile))
	if err == nil {
		if err := json.Unmarshal(raw, &b); err != nil {
			return b, fmt.Errorf("%s: %w: %w", bootstrapFile, err, errdefs.ErrDataLoss)
		}
		return b, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return b, err
	}
	raw, err = os.ReadFile(filepath.Join(bundle, wire.AddressFile))
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(bytes.TrimSpace(raw)) == 0 {
		return b, fmt.Errorf("no address: %w", errdefs.ErrNotFound)
	}
	return Bootstrap{Version: 3, Address: string(bytes.TrimSpace(raw)), Protocol: "ttrpc"}, err
}

// parseBootstrap reads what a shim's start has printed: a BootstrapResult, or from older ones
// JSON or a plain address.
func parseBootstrap(out []byte) (Bootstrap, error) {
	var r bootstrap.BootstrapResult
	if err := proto.Unmarshal(out, &r); err != nil || r.Address == "" {
		r.Reset()
		text := strings.TrimSpace(string(out))
		if json.Unmarshal([]byte(text), &r) != nil || r.Version == 0 {
			r = bootstrap.BootstrapResult{Version: 2, Address: text}
		}
	}
	b := Bootstrap{Version: int(r.Version), Address: r.Address, Protocol: r.Protocol, Mounts: abilities(&r)}
	return b, b.valid()
}

func (b *Bootstrap) valid() error {
	if b.Protocol == "" {
		b.Protocol = "ttrpc"
	}
	switch {
	case b.Version < 2 || b.Version > 3:
		return fmt.Errorf("the shim speaks version %d of the task service, 2 and 3 are known: %w", b.Version, errdefs.ErrNotImplemented)
	case b.Protocol != "ttrpc" && b.Protocol != "grpc":
		return fmt.Errorf("the shim speaks %q, ttrpc and grpc are known: %w", b.Protocol, errdefs.ErrNotImplemented)
	}
	_, _, err := b.socket()
	return err
}

// socket gives what net.Dial wants.
func (b Bootstrap) socket() (network, address string, err error) {
	rest := strings.TrimPrefix(strings.TrimPrefix(b.Address, "ttrpc+"), "grpc+")
	path, ok := strings.CutPrefix(rest, "unix://")
	switch {
	case !ok && strings.Contains(rest, "://"):
		return "", "", fmt.Errorf("the shim's address %q is no unix socket: %w", b.Address, errdefs.ErrNotImplemented)
	case strings.HasPrefix(path, "@"), filepath.IsAbs(path):
		return "unix", path, nil
	}
	return "", "", fmt.Errorf("the shim's address %q is no absolute path: %w", b.Address, errdefs.ErrInvalidArgument)
}

func (b Bootstrap) dial(ctx context.Context) (net.Conn, error) {
	network, address, err := b.socket()
	if err != nil {
		return nil, err
	}
	if !strings.HasPrefix(address, "@") {
		return wire.Dial(address)
	}
	var d net.Dialer
	return d.DialContext(ctx, network, address)
}

func dialTask(ctx context.Context, b Bootstrap, namespace string) (*Task, error) {
	if err := b.valid(); err != nil {
		return nil, err
	}
	conn, err := b.dial(ctx)
	if err != nil {
		return nil, err
	}
	if b.Protocol == "ttrpc" {
		return newTask(wire.NewClient(conn, namespace), b), nil
	}
	conn.Close() // grpc wants to make its own, and that it can be made is known
	return newGRPCTask(b, namespace)
}

// newGRPCTask is newTask of a shim that speaks gRPC.
func newGRPCTask(b Bootstrap, namespace string) (*Task, error) {
	conn, err := grpc.NewClient("passthrough:///shim", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return b.dial(ctx) }))
	if err != nil {
		return nil, err
	}
	conn.Connect()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for seen := false; ; {
			switch s := conn.GetState(); {
			case s == connectivity.Ready:
				seen = true
			case s == connectivity.Shutdown, s == connectivity.TransientFailure, seen:
				return
			case s == connectivity.Idle:
				conn.Connect()
			}
			if !conn.WaitForStateChange(ctx, conn.GetState()) {
				return
			}
		}
	}()
	t := &Task{service: taskService(b.Version), done: done, bootstrap: b}
	t.close = func() error { cancel(); return conn.Close() }
	t.invoke = func(ctx context.Context, service, method string, req, resp proto.Message) error {
		ctx = metadata.AppendToOutgoingContext(ctx, namespaces.GRPCHeader, namespace)
		return errgrpc.ToNative(conn.Invoke(ctx, "/"+service+"/"+method, req, resp))
	}
	return t, nil
}

// run executes the shim's program in the bundle.
func (o TaskOptions) run(ctx context.Context, action string, in []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, programLimit)
	defer cancel()
	args := []string{"-namespace", o.Namespace, "-address", o.Address, "-publish-binary", o.Daemon, "-id", o.ID}
	if o.Debug {
		args = append(args, "-debug")
	}
	if action == "delete" {
		args = append(args, "-bundle", o.Bundle)
	}
	cmd := exec.CommandContext(ctx, o.Program, append(args, action)...)
	cmd.Dir = o.Bundle
	cmd.Env = append(os.Environ(), "GOMAXPROCS=2", "MAX_SHIM_VERSION=2",
		"TTRPC_ADDRESS="+o.EventsAddress, "GRPC_ADDRESS="+o.Address, "NAMESPACE="+o.Namespace)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = time.Second // the shim that it starts may hold on to the pipes
	out, errs := &limited{max: maxAnswer}, &limited{max: maxAnswer}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), out, errs
	err := cmd.Run()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	if err != nil {
		if text := strings.TrimSpace(errs.String() + " " + out.text()); text != "" {
			err = fmt.Errorf("%w: %s", err, text)
		}
		return nil, fmt.Errorf("%s %s: %w", filepath.Base(o.Program), action, err)
	}
	return out.Bytes(), nil
}

// RuntimeInfo asks the program of a shim what it is and can do, for the options of a task (nil: none). The
// arguments come before containerd's own.
func (Manager) RuntimeInfo(ctx context.Context, program string, options *anypb.Any, args ...string) (*types.RuntimeInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, programLimit)
	defer cancel()
	in, err := proto.Marshal(options)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, program, append(args, "-info")...)
	cmd.WaitDelay = time.Second
	out, errs := &limited{max: maxAnswer}, &limited{max: maxAnswer}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), out, errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s -info: %w: %s", filepath.Base(program), err, strings.TrimSpace(errs.text()))
	}
	var info types.RuntimeInfo
	if err := proto.Unmarshal(out.Bytes(), &info); err != nil {
		return nil, fmt.Errorf("%s -info: %w", filepath.Base(program), err)
	}
	return &info, nil
}

// limited keeps the beginning of what is written.
type limited struct {
	bytes.Buffer
	max int
}

func (l *limited) Write(p []byte) (int, error) {
	if room := l.max - l.Len(); room > 0 {
		l.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// text is the content if it can be shown.
func (l *limited) text() string {
	if strings.ContainsFunc(l.String(), func(r rune) bool { return r < ' ' && r != '\n' && r != '\t' || r == 0xfffd }) {
		return ""
	}
	return l.String()
}

// ReapTask cleans up after a shim that is gone or does not do as it is told: it kills and deletes
// what is left of the container, and gives how that ended. errdefs.ErrNotFound: there is no bundle.
func (m Manager) ReapTask(ctx context.Context, o TaskOptions) (*task.DeleteResponse, error) {
	if o.Program == "" {
		exit, err := m.Reap(ctx, o.StartOptions)
		if err != nil {
			return nil, err
		}
		return &task.DeleteResponse{ExitStatus: exit.Status, ExitedAt: timestamp(exit.ExitedAt)}, nil
	}
	if _, err := os.Lstat(o.Bundle); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("clean up after shim %s: no bundle: %w", o.ID, errdefs.ErrNotFound)
	}
	out, err := o.run(ctx, "delete", nil)
	if err != nil {
		return nil, fmt.Errorf("clean up after shim %s: %w", o.ID, err)
	}
	r := new(task.DeleteResponse)
	if err := proto.Unmarshal(out, r); err != nil {
		return nil, fmt.Errorf("clean up after shim %s: %w", o.ID, err)
	}
	return r, nil
}

func (o TaskOptions) writeBinaryPath() error {
	path := o.Program
	if path == "" {
		var err error
		if path, err = o.StartOptions.Program(); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(o.Bundle, binaryPathFile), []byte(path), 0o600)
}

// openLog makes the FIFO that a shim writes its log to, and reads it: one that nobody reads
// would keep the shim from starting. Reading ends with the last writer, but not before keep was closed.
func (o TaskOptions) openLog() (keep io.Closer, err error) {
	path := filepath.Join(o.Bundle, logFIFO)
	if err := unix.Mkfifo(path, 0o600); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, &os.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	writer, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		writer.Close()
		return nil, err
	}
	go func() {
		defer f.Close()
		r := bufio.NewReaderSize(f, 4<<10)
		for {
			line, _, err := r.ReadLine()
			if err != nil {
				if !errors.Is(err, io.EOF) && o.Log != nil {
					o.Log.Debug("log of a shim", "id", o.ID, "error", err)
				}
				return
			}
			if o.Log != nil {
				level := slog.LevelInfo
				if bytes.Contains(line, []byte("level=info")) || bytes.Contains(line, []byte("level=debug")) {
					level = slog.LevelDebug
				}
				o.Log.Log(context.Background(), level, "shim", "namespace", o.Namespace, "id", o.ID, "says", string(line))
			}
		}
	}()
	return writer, nil
}
