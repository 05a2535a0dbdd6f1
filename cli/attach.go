package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// session is a live connection between the user's terminal or pipes and the
// streams of a process in a container.
type session struct {
	a     *app
	tty   bool
	stdin bool
	conn  client.HijackedResponse
	// detachKeys end a session with a terminal; empty: ctrl-p,ctrl-q.
	detachKeys string
	resize     func(ctx context.Context, height, width uint) error

	restore func()
	done    chan error // output ended, or the user detached
}

// errDetached ends a session whose process goes on.
var errDetached = errors.New("detached")

// start begins copying. The user's terminal is raw until close, if the process has one.
func (s *session) start() error {
	s.done = make(chan error, 2)
	in := s.a.In
	if s.tty && s.stdin {
		keys, err := parseDetachKeys(s.detachKeys)
		if err != nil {
			return err
		}
		in = &detachReader{r: s.a.In, keys: keys}
	}
	if s.tty && s.stdin && isTerminal(s.a.In) {
		fd, _ := fdOf(s.a.In)
		state, err := term.MakeRaw(fd)
		if err != nil {
			return fmt.Errorf("make the terminal raw: %w", err)
		}
		s.restore = func() { term.Restore(fd, state) }
	}
	go func() {
		var err error
		if s.tty {
			_, err = io.Copy(s.a.Out, s.conn.Reader)
		} else {
			_, err = stdcopy.StdCopy(s.a.Out, s.a.Err, s.conn.Reader)
		}
		s.done <- err
	}()
	if s.stdin {
		go func() {
			_, err := io.Copy(s.conn.Conn, in)
			if errors.Is(err, errDetached) {
				s.done <- err
				return
			}
			// Any other error means that the process or the connection is gone, which the output side reports.
			_ = s.conn.CloseWrite()
		}()
	}
	return nil
}

// follow keeps the size of the process's terminal that of the user's, until ctx ends.
func (s *session) follow(ctx context.Context) {
	if !s.tty || !isTerminal(s.a.Out) {
		return
	}
	set := func() error {
		fd, _ := fdOf(s.a.Out)
		w, h, err := term.GetSize(fd)
		if err != nil {
			return err
		}
		return s.resize(ctx, uint(h), uint(w))
	}
	go func() {
		winch := make(chan os.Signal, 1)
		signal.Notify(winch, syscall.SIGWINCH)
		defer signal.Stop(winch)
		// The process may not be there yet when a session begins.
		for i := 0; set() != nil && i < 20; i++ {
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Duration(i+1) * 10 * time.Millisecond):
			}
		}
		for {
			select {
			case <-ctx.Done():
				return
			case <-winch:
				_ = set()
			}
		}
	}()
}

// wait blocks until the output ended or ctx does.
func (s *session) wait(ctx context.Context) error {
	select {
	case err := <-s.done:
		if errors.Is(err, errDetached) {
			return err
		}
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrClosed) {
			return fmt.Errorf("read output: %w", err)
		}
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *session) close() {
	if s.restore != nil {
		s.restore()
		s.restore = nil
	}
	s.conn.Close()
}

// proxySignals hands the signals that this process gets to f, until the returned stop.
func proxySignals(f func(sig string)) (stop func()) {
	c := make(chan os.Signal, 16)
	signal.Notify(c)
	// Those are about this process, not meant for the container.
	signal.Reset(syscall.SIGCHLD, syscall.SIGWINCH, syscall.SIGURG, syscall.SIGPIPE, syscall.SIGTTIN, syscall.SIGTTOU, syscall.SIGTSTP, syscall.SIGCONT)
	go func() {
		for s := range c {
			if sig, ok := s.(syscall.Signal); ok && sig != syscall.SIGCHLD && sig != syscall.SIGURG && sig != syscall.SIGPIPE && sig != syscall.SIGWINCH {
				if name := unix.SignalName(sig); name != "" {
					f(strings.TrimPrefix(name, "SIG"))
				}
			}
		}
	}()
	return func() { signal.Stop(c); close(c) }
}

// parseDetachKeys reads docker's form of a key sequence: comma-separated single
// characters and ctrl-X, where X is a letter or one of @[\]^_.
func parseDetachKeys(s string) ([]byte, error) {
	if s == "" {
		s = "ctrl-p,ctrl-q"
	}
	var out []byte
	for key := range strings.SplitSeq(s, ",") {
		c, ctrl := strings.CutPrefix(strings.ToLower(key), "ctrl-")
		switch {
		case len(c) != 1 && len(key) != 1:
			return nil, &exitError{exitUsage, fmt.Sprintf("bad --detach-keys %q: %q is neither a character nor ctrl-X", s, key)}
		case !ctrl:
			out = append(out, key[0])
		case c[0] >= 'a' && c[0] <= 'z':
			out = append(out, c[0]-'a'+1)
		case c[0] == '@' || c[0] >= '[' && c[0] <= '_':
			out = append(out, c[0]-'@')
		default:
			return nil, &exitError{exitUsage, fmt.Sprintf("bad --detach-keys %q: no control character %q", s, key)}
		}
	}
	return out, nil
}

// detachReader passes bytes on until the key sequence was typed, then fails with
// errDetached. A started sequence is held back until it is complete or broken off.
type detachReader struct {
	r       io.Reader
	keys    []byte
	matched int
	pending []byte // to be given before err
	err     error
	buf     [4096]byte
}

func (d *detachReader) Read(p []byte) (int, error) {
	for len(d.pending) == 0 {
		if d.err != nil {
			return 0, d.err
		}
		n, err := d.r.Read(d.buf[:])
		d.err = err
		d.filter(d.buf[:n])
	}
	n := copy(p, d.pending)
	d.pending = d.pending[n:]
	return n, nil
}

func (d *detachReader) filter(in []byte) {
	for _, b := range in {
		if b != d.keys[d.matched] {
			d.pending = append(d.pending, d.keys[:d.matched]...)
			d.matched = 0
		}
		if b != d.keys[d.matched] {
			d.pending = append(d.pending, b)
			continue
		}
		if d.matched++; d.matched == len(d.keys) {
			d.err = errDetached
			return
		}
	}
}
