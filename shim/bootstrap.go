package shim

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/durable"
	"github.com/hako-engine/hako/shim/wire"
)

// listenFD is where a served shim finds its listening socket.
const listenFD = 3

// maxParams bounds what containerd may write to stdin.
const maxParams = 1 << 20

// Command is how a shim was called: containerd's flags (shim v2 protocol).
type Command struct {
	Namespace string
	Address   string // containerd's gRPC socket
	ID        string
	Bundle    string // the working directory if empty
	Debug     bool
	Socket    string // of a shim that serves: the path of its listener
	// Events is the ttrpc socket for events.
	Events string
	// SocketDir is where `start` puts its sockets.
	SocketDir string
	Runtime   func(RuntimeConfig) (Runtime, error)
	Defaults  RuntimeConfig
}

// defaultSocketDir is a short path: the address of a socket holds 107 bytes.
const defaultSocketDir = "/run/containerd/s"

// Start is containerd's `start`: it finds the shim of the container's group or makes
// one, and writes its address to out in the form that the caller understands:
// containerd from 2.3 on sends a BootstrapParams message and takes a
// BootstrapResult, all others take a plain address.
func Start(c Command, in io.Reader, out io.Writer) error {
	data, err := io.ReadAll(io.LimitReader(in, maxParams))
	if err != nil {
		return fmt.Errorf("read stdin: %w", err)
	}
	params := c.applyParams(data)
	address, err := c.findOrStart()
	if err != nil {
		return err
	}
	if err := durable.WriteVolatile(wire.AddressFile, []byte(address), 0o600); err != nil {
		return err
	}
	if params {
		_, err = out.Write(wire.Marshal(&wire.BootstrapResult{Version: 3, Address: address, Protocol: "ttrpc"}))
	} else {
		_, err = io.WriteString(out, address)
	}
	return err
}

// applyParams takes what stdin says. Older callers write nothing, or the runtime's
// options (an Any, whose first field is a type and not our id).
func (c *Command) applyParams(data []byte) bool {
	var p wire.BootstrapParams
	if len(data) == 0 || wire.Unmarshal(data, &p) != nil || p.InstanceID == "" || c.ID != "" && p.InstanceID != c.ID {
		return false
	}
	c.ID = p.InstanceID
	set := func(to *string, v string) {
		if v != "" {
			*to = v
		}
	}
	set(&c.Namespace, p.Namespace)
	set(&c.Address, p.GRPCAddress)
	set(&c.Events, p.TTRPCAddress)
	set(&c.SocketDir, p.SocketDir)
	c.Debug = c.Debug || p.LogLevel < 0
	return true
}

// findOrStart gives the address of a live shim for the bundle in the working directory.
func (c *Command) findOrStart() (string, error) {
	spec, err := readSpec(".")
	if err != nil {
		return "", err
	}
	dir := c.SocketDir
	if dir == "" {
		dir = defaultSocketDir
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return "", err
	}
	// One `start` at a time: two containers of a pod must not make two shims.
	lock, err := os.Open(dir)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", os.NewSyscallError("flock", err)
	}
	// Not a cryptographic hash: root alone chooses what goes in, and those link much.
	name := fnv.New128a()
	io.WriteString(name, strings.Join([]string{c.Address, c.Namespace, spec.group(c.ID)}, "\x00"))
	path := filepath.Join(dir, hex.EncodeToString(name.Sum(nil)))
	address := "unix://" + path
	if reserve(path) == nil {
		return address, nil
	}
	l, err := wire.Listen(path)
	if err != nil {
		return "", err
	}
	defer l.Close()
	cwd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer null.Close()
	// containerd reads the shim's log from a FIFO in the bundle.
	complain := null
	if f, err := os.OpenFile("log", os.O_RDWR|syscall.O_NONBLOCK, 0); err == nil {
		defer f.Close()
		complain = f
	}
	args := []string{os.Args[0], "-namespace", c.Namespace, "-address", c.Address, "-id", c.ID, "-bundle", cwd, "-events", c.Events, "-socket", path}
	if c.Debug {
		args = append(args, "-debug")
	}
	p, err := os.StartProcess(self, append(args, "serve"), &os.ProcAttr{
		Dir: cwd, Env: os.Environ(),
		Files: []*os.File{null, null, complain, l},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		os.Remove(path)
		return "", fmt.Errorf("start shim: %w", err)
	}
	return address, p.Release()
}

// removeDeadSocket removes the socket of a bundle's shim, unless a shim listens on it.
func removeDeadSocket(bundle string) {
	b, err := os.ReadFile(filepath.Join(bundle, wire.AddressFile))
	if err != nil {
		return
	}
	path := strings.TrimPrefix(string(b), "unix://")
	conn, err := wire.Dial(path)
	if err == nil {
		conn.Close()
	} else if errors.Is(err, syscall.ECONNREFUSED) {
		os.Remove(path)
	}
}

// reserve asks a live shim to stay for a container that is going to be created: its
// last one may be on its way out.
func reserve(path string) error {
	conn, err := wire.Dial(path)
	if err != nil {
		return err
	}
	c := wire.NewClient(conn, "")
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return c.Call(ctx, wire.ServiceHako, "Reserve", &wire.Empty{}, nil)
}

// Listener is the socket that the shim was started with.
func Listener() (net.Listener, error) {
	f := os.NewFile(listenFD, "listener")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("file descriptor %d is no listening socket: %w", listenFD, err)
	}
	return l, nil
}

// Stderr writes to standard error, and rather loses what it is given than wait: under
// containerd that is a FIFO, which nobody may be reading.
type Stderr struct{}

// Write implements io.Writer.
func (Stderr) Write(p []byte) (int, error) {
	_, _ = syscall.Write(2, p)
	return len(p), nil
}

// RaiseOOMScore lets the kernel prefer the shim to the daemon that started it when it has to
// kill something, as containerd's shims do. Without always, that is so for a protected daemon alone: then
// the shim is never preferred to a container, whose score is 0 unless somebody asked for another.
func RaiseOOMScore(always bool) {
	const path = "/proc/self/oom_score_adj"
	b, err := os.ReadFile(path)
	if err != nil {
		return
	}
	if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && (n < 0 || always && n < 1000) {
		_ = os.WriteFile(path, strconv.AppendInt(nil, int64(n+1), 10), 0)
	}
}

// SettleFileLimit makes the soft limit of open files the hard one. Go has raised it
// already, to one less, and a process that is not started by package os inherits
// that: containers shall see a limit that somebody has chosen.
func SettleFileLimit() {
	var l syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l) == nil && l.Cur+1 == l.Max {
		l.Cur = l.Max
		_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l)
	}
}

// Cleanup is containerd's `delete`: the shim of a bundle is gone, so whatever is left
// of the container is killed and deleted. How it ended is written to out.
func Cleanup(ctx context.Context, c Command, out io.Writer) error {
	bundle := c.Bundle
	if bundle == "" {
		cwd, err := os.Getwd()
		if err != nil {
			return err
		}
		bundle = cwd
	}
	task, err := readTask(bundle)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		// It never came to a container.
		task = Task{ID: c.ID, Runtime: c.Defaults}
		task.Runtime.Root = filepath.Join(bundle, stateDir)
	case err != nil:
		return err
	}
	id := task.ID
	rt, err := c.Runtime(task.Runtime)
	if err != nil {
		return err
	}
	if err := rt.Remove(ctx, id, bundle); err != nil {
		return fmt.Errorf("delete container %s: %w", id, err)
	}
	resp := wire.DeleteResponse{Pid: uint32(task.Pid), ExitStatus: 128 + uint32(syscall.SIGKILL), ExitedAt: time.Now().UTC()}
	if e, err := ReadExit(bundle); err == nil {
		resp = wire.DeleteResponse{Pid: uint32(e.Pid), ExitStatus: e.Status, ExitedAt: e.ExitedAt, OOMKilled: e.OOMKilled}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	os.Remove(filepath.Join(bundle, wire.TaskFile))
	removeDeadSocket(bundle)
	_, err = io.Copy(out, bytes.NewReader(wire.Marshal(&resp)))
	return err
}
