package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"
)

const (
	maxStdout = 1 << 20 // of a plugin; a result is a few KiB
	maxStderr = 4 << 10 // what is kept of it for errors

	// versionLimit is how long a plugin may take to tell its versions.
	versionLimit = 5 * time.Second

	// grace is how long a plugin may go on when its caller gave up. One that is killed in the middle leaves what no DEL
	// finds: an IPAM plugin, for example, a lease with no owner in it.
	grace = 2 * time.Second

	// strayLimit is how long output is waited for that a plugin's children hold open after its end.
	strayLimit = 500 * time.Millisecond
)

// errStuck is the cause when a plugin was ended because it took too long.
var errStuck = errors.New("the plugin did not end in time and was killed")

// runner executes plugins. It is the invoke.Exec of libcni.
type runner struct {
	limit time.Duration // of one execution
	log   *slog.Logger
	version.PluginDecoder

	mu       sync.Mutex
	versions map[string]binaryVersions // by path
}

var _ invoke.Exec = (*runner)(nil)

// binaryVersions are the versions of the specification that a file said it speaks.
type binaryVersions struct {
	file     fileID
	versions []string // none: it cannot tell
}

// fileID changes when a file is replaced or written.
type fileID struct {
	dev, ino    uint64
	size, mtime int64
}

func idOf(st os.FileInfo) fileID {
	id := fileID{size: st.Size(), mtime: st.ModTime().UnixNano()}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		id.dev, id.ino = uint64(sys.Dev), sys.Ino
	}
	return id
}

// FindInPath finds the executable of a plugin: errdefs.ErrNotFound, with the folders that were searched.
func (r *runner) FindInPath(plugin string, dirs []string) (string, error) {
	if plugin == "" || plugin == "." || plugin == ".." || strings.ContainsRune(plugin, filepath.Separator) {
		return "", fmt.Errorf("%q is no name of a CNI plugin: %w", plugin, errdefs.ErrInvalidArgument)
	}
	for _, d := range dirs {
		path := filepath.Join(d, plugin)
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() && st.Mode().Perm()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("CNI plugin %q is not in %s: %w", plugin, strings.Join(dirs, ":"), errdefs.ErrNotFound)
}

// ExecPlugin runs a plugin in a process group of its own, which is killed as a whole a moment after ctx ended, or when the
// time limit is over. What it prints is read up to a bound. The error of a plugin that failed is, or wraps, a *types.Error.
func (r *runner) ExecPlugin(caller context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	if caller.Err() != nil {
		return nil, context.Cause(caller)
	}
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(caller), r.limit, errStuck)
	defer cancel()
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	stop := context.AfterFunc(caller, func() {
		select {
		case <-time.After(grace):
			giveUp(context.Cause(caller))
		case <-ctx.Done():
		}
	})
	defer stop()
	environ = environment(environ)
	started := time.Now()
	var out *capture
	var errout *capture
	var err error
	// A program that is being replaced, or that another thread of ours holds open while it forks, is busy for moments.
	for wait := 5 * time.Millisecond; ; wait *= 2 {
		out, errout = &capture{max: maxStdout, fail: true}, &capture{max: maxStderr}
		cmd := exec.CommandContext(ctx, path)
		cmd.Env, cmd.Dir = environ, "/"
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), out, errout
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.Cancel = func() error {
			if err := unix.Kill(-cmd.Process.Pid, unix.SIGKILL); err != unix.ESRCH {
				return err
			}
			return os.ErrProcessDone
		}
		cmd.WaitDelay = strayLimit
		if err = cmd.Run(); !errors.Is(err, unix.ETXTBSY) || wait > time.Second {
			break
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
			continue
		}
		break
	}
	r.log.Debug("CNI plugin", "plugin", path, "command", variable(environ, "CNI_COMMAND"), "container", variable(environ, "CNI_CONTAINERID"),
		"duration", time.Since(started), "error", err, "stderr", errout.buf.String())
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay) && ctx.Err() == nil:
		return out.buf.Bytes(), nil
	case ctx.Err() != nil:
		cause := context.Cause(ctx)
		if errors.Is(cause, errStuck) {
			cause = fmt.Errorf("%w (limit %v)%s: %w", cause, r.limit, said(errout), context.DeadlineExceeded)
		}
		return nil, cause
	case out.over:
		return nil, fmt.Errorf("the plugin printed more than %d bytes: %w", maxStdout, errdefs.ErrOutOfRange)
	}
	if len(out.buf.Bytes()) > 0 {
		var failure types.Error
		if json.Unmarshal(out.buf.Bytes(), &failure) == nil && (failure.Msg != "" || failure.Code != 0) {
			return nil, &failure
		}
		return nil, &types.Error{Msg: fmt.Sprintf("%v, and its output is no CNI error: %q%s", err, shorten(out.buf.String()), said(errout))}
	}
	return nil, &types.Error{Msg: fmt.Sprintf("%v%s", err, said(errout))}
}

// said is what a plugin wrote to its standard error, for an error message.
func said(c *capture) string {
	if s := strings.TrimSpace(c.buf.String()); s != "" {
		return fmt.Sprintf(" (stderr: %q)", shorten(s))
	}
	return ""
}

func shorten(s string) string {
	if len(s) > 512 {
		return s[:512] + "…"
	}
	return s
}

// capture keeps the first bytes of a stream.
type capture struct {
	buf  bytes.Buffer
	max  int
	fail bool // on more than max, instead of dropping it
	over bool
}

func (c *capture) Write(p []byte) (int, error) {
	room := c.max - c.buf.Len()
	if len(p) <= room {
		return c.buf.Write(p)
	}
	c.over = true
	c.buf.Write(p[:room])
	if c.fail {
		return room, errdefs.ErrOutOfRange
	}
	return len(p), nil
}

// environment is the daemon's, without what is meant for the daemon alone.
func environment(environ []string) []string {
	var out []string
	path := false
	for _, kv := range environ {
		k, _, _ := strings.Cut(kv, "=")
		switch {
		case k == "NOTIFY_SOCKET", strings.HasPrefix(k, "LISTEN_"), strings.HasPrefix(k, "WATCHDOG_"):
			continue
		case k == "PATH":
			path = true
		}
		out = append(out, kv)
	}
	if !path { // plugins look for iptables there
		out = append(out, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	}
	slices.Sort(out)
	return out
}

func variable(environ []string, name string) string {
	for _, kv := range environ {
		if k, v, _ := strings.Cut(kv, "="); k == name {
			return v
		}
	}
	return ""
}

// supported asks a plugin for the versions of the specification that it speaks, once for each file that it is.
// A plugin that cannot tell is trusted: the result is empty.
func (r *runner) supported(ctx context.Context, path string) ([]string, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	file := idOf(st)
	r.mu.Lock()
	known, ok := r.versions[path]
	r.mu.Unlock()
	if ok && known.file == file {
		return known.versions, nil
	}
	limited, cancel := context.WithTimeoutCause(ctx, min(r.limit, versionLimit), errStuck)
	defer cancel()
	known = binaryVersions{file: file}
	info, err := invoke.GetVersionInfo(limited, path, r)
	switch {
	case err == nil:
		known.versions = info.SupportedVersions()
	case ctx.Err() != nil:
		return nil, fmt.Errorf("ask CNI plugin %s for its versions: %w", path, err)
	default: // also one that hangs: each pod would wait for it again
		r.log.Warn("a CNI plugin does not tell its versions", "plugin", path, "error", err)
	}
	r.mu.Lock()
	r.versions[path] = known
	r.mu.Unlock()
	return known.versions, nil
}

// exhausted are words, in lower case, with which plugins say that no address is left: the specification has no code for it.
var exhausted = []string{
	"no ip addresses available", // host-local
	"could not allocate ip in range",
	"range is full",
}

// classify gives an error of libcni a class, if it has none: what plugins say is in the codes of the specification.
func classify(err error) error {
	if err == nil || errdefs.Resolve(err) != errdefs.ErrUnknown {
		return err
	}
	var class error = errdefs.ErrUnknown
	var e *types.Error
	if errors.As(err, &e) {
		switch e.Code {
		case types.ErrTryAgainLater, types.ErrPluginNotAvailable, types.ErrLimitedConnectivity:
			class = errdefs.ErrUnavailable
		case types.ErrIncompatibleCNIVersion, types.ErrUnsupportedField, types.ErrInvalidNetworkConfig:
			class = errdefs.ErrFailedPrecondition
		default:
			text := strings.ToLower(err.Error())
			if slices.ContainsFunc(exhausted, func(s string) bool { return strings.Contains(text, s) }) {
				return fmt.Errorf("the network has no address left for the pod: %w: %w", err, errdefs.ErrResourceExhausted)
			}
		}
	}
	return fmt.Errorf("%w: %w", err, class)
}
