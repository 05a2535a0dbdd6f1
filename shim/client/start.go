package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/internal/durable"
	"github.com/hako-engine/hako/shim/pidfd"
	"github.com/hako-engine/hako/shim/wire"
)

// connectTimeout bounds how long a shim may take to answer its first call.
const connectTimeout = 10 * time.Second

// Manager starts shims and finds them again. Its zero value is ready to use.
type Manager struct{}

// Start starts a shim for a bundle. The shim outlives the caller: it has a session
// of its own, and finds its listening socket (BUNDLE/shim.sock, mode 0600) as file
// descriptor 3, so it can be called at once. What it has to complain of is in
// BUNDLE/shim.log.
func (Manager) Start(ctx context.Context, o StartOptions) (*Shim, error) {
	if o.ID == "" || !filepath.IsAbs(o.Bundle) {
		return nil, fmt.Errorf("start shim %q with bundle %q: %w", o.ID, o.Bundle, errdefs.ErrInvalidArgument)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s, err := start(o)
	if err != nil {
		return nil, fmt.Errorf("start shim %s: %w", o.ID, err)
	}
	return s, nil
}

func start(o StartOptions) (*Shim, error) {
	binary, err := o.Program()
	if err != nil {
		return nil, err
	}
	path := filepath.Join(o.Bundle, wire.SocketFile)
	l, err := wire.Listen(path)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	// A daemon that wants to read it at once has made a FIFO, which holds up nobody (see TaskOptions.openLog).
	logFile, err := os.OpenFile(filepath.Join(o.Bundle, logFIFO), os.O_RDWR|syscall.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		logFile, err = os.OpenFile(filepath.Join(o.Bundle, wire.LogFile), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	}
	if err != nil {
		return nil, err
	}
	defer logFile.Close()
	// Whole, or not there: who finds it connects to it, also when this process is killed now.
	if err := durable.WriteVolatile(filepath.Join(o.Bundle, wire.AddressFile), []byte("unix://"+path), 0o600); err != nil {
		return nil, err
	}
	p, err := os.StartProcess(binary, append(append([]string{binary}, o.flags()...), "-socket", path, "serve"), &os.ProcAttr{
		Dir:   o.Bundle,
		Env:   append(os.Environ(), "GOMAXPROCS=2"),
		Files: []*os.File{null, null, logFile, l},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		os.Remove(path)
		return nil, err
	}
	reap(p)
	conn, err := wire.Dial(path)
	if err != nil {
		p.Kill()
		return nil, err
	}
	return newShim(conn, path), nil
}

// reap waits for a child, without a thread of its own.
func reap(p *os.Process) {
	fd, err := pidfd.Open(p.Pid)
	go func() {
		if err == nil {
			fd.Wait()
			fd.Close()
		}
		p.Wait()
	}()
}

// Program is the path of the shim that is started.
func (o StartOptions) Program() (string, error) {
	if o.Binary != "" {
		return o.Binary, nil
	}
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	return filepath.Join(filepath.Dir(self), "hako-shim"), nil
}

func (o StartOptions) flags() []string {
	args := []string{"-namespace", o.Namespace, "-id", o.ID, "-bundle", o.Bundle}
	if o.EventsAddress != "" {
		args = append(args, "-events", o.EventsAddress)
	}
	if o.Runtime != "" {
		args = append(args, "-runtime", o.Runtime)
	}
	if o.SystemdCgroup {
		args = append(args, "-systemd-cgroup")
	}
	if o.Debug {
		args = append(args, "-debug")
	}
	return args
}

// Connect finds the shim of a bundle again: errdefs.ErrNotFound if there is none any
// more.
func (Manager) Connect(ctx context.Context, bundle string) (*Shim, error) {
	b, err := os.ReadFile(filepath.Join(bundle, wire.AddressFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("shim of %s: %w", bundle, errdefs.ErrNotFound)
	} else if err != nil {
		return nil, fmt.Errorf("connect to shim: %w", err)
	}
	path := strings.TrimPrefix(strings.TrimSpace(string(b)), "unix://")
	if path == "" { // it was being written when its writer died, and no shim was started yet
		return nil, fmt.Errorf("shim of %s: no address: %w", bundle, errdefs.ErrNotFound)
	}
	conn, err := wire.Dial(path)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("shim of %s: %w: %w", bundle, err, errdefs.ErrNotFound)
	case err != nil:
		return nil, err
	}
	s := newShim(conn, path)
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	// A process that is dying may still hold the socket.
	if err := s.call(ctx, "Connect", &wire.ProcessRequest{}, nil); err != nil {
		s.Close()
		if errdefs.IsUnavailable(err) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		}
		return nil, fmt.Errorf("connect to shim of %s: %w", bundle, err)
	}
	return s, nil
}

// Reap cleans up after a shim that is gone: it kills and deletes what is left of the
// container of o.Bundle, and gives how that ended: from the exit file, or else as
// killed by SIGKILL (137) now. ErrNotFound: there is no bundle, and so nothing that its shim
// could have left; after a reboot it is like that.
func (Manager) Reap(ctx context.Context, o StartOptions) (Exit, error) {
	binary, err := o.Program()
	if err != nil {
		return Exit{}, err
	}
	if _, err := os.Lstat(o.Bundle); errors.Is(err, fs.ErrNotExist) {
		return Exit{}, fmt.Errorf("clean up after shim %s: no bundle: %w", o.ID, errdefs.ErrNotFound)
	}
	cmd := exec.CommandContext(ctx, binary, append(o.flags(), "delete")...)
	cmd.Dir = o.Bundle
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		if text := strings.TrimSpace(errs.String()); text != "" {
			err = fmt.Errorf("%w: %s", err, text)
		}
		return Exit{}, fmt.Errorf("clean up after shim %s: %w", o.ID, err)
	}
	var r wire.DeleteResponse
	if err := wire.Unmarshal(out.Bytes(), &r); err != nil {
		return Exit{}, fmt.Errorf("clean up after shim %s: %w", o.ID, err)
	}
	os.Remove(filepath.Join(o.Bundle, wire.SocketFile))
	os.Remove(filepath.Join(o.Bundle, wire.AddressFile))
	return Exit{Status: r.ExitStatus, ExitedAt: r.ExitedAt, OOMKilled: r.OOMKilled}, nil
}

func newShim(conn net.Conn, path string) *Shim {
	return &Shim{rpc: wire.NewClient(conn, ""), path: path}
}
