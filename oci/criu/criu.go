//go:build linux && (amd64 || arm64)

// Package criu speaks with CRIU, the program that writes processes to files and makes
// them again, and looks at its files before it does.
//
// In flow options in the form of CRIU's RPC, and directories of images that somebody else
// may have written; out flow requests to a `criu swrk` that lives as long as one
// conversation, and errors that quote its log. The messages are go-criu's generated types;
// its own client is not used, because it neither takes descriptors along with a
// notification nor lets the caller choose the thread that CRIU is started on.
package criu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/rpc"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/classed"
)

// MinVersion is the oldest CRIU that is used, as Version counts: 3.15 takes network and
// PID namespaces as given from outside.
const MinVersion = 31500

// maxMessage bounds an answer. CRIU's own limit is smaller.
const maxMessage = 64 << 10

// Path finds the program. Without it the error is errdefs.ErrNotImplemented.
func Path() (string, error) {
	path, err := exec.LookPath("criu")
	if err != nil {
		return "", classed.Errorf(errdefs.ErrNotImplemented, "checkpoint and restore need CRIU, and there is no program criu in $PATH")
	}
	return path, nil
}

// Conversation is one running CRIU.
type Conversation struct {
	path string
	pid  int
	sock int
}

// Start runs CRIU on the calling thread's namespaces. It inherits files as descriptors
// 3, 4, ....
func Start(path string, files []*os.File) (*Conversation, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "criu")
	defer theirs.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		unix.Close(pair[0])
		return nil, err
	}
	defer null.Close()
	all := append([]*os.File{null, null, null}, files...)
	all = append(all, theirs)
	// CRIU looks for tools (iptables, tar) in $PATH, and has other variables that change
	// what it does: it gets none of those.
	attr := &os.ProcAttr{Env: []string{"PATH=" + os.Getenv("PATH")}, Files: all}
	p, err := os.StartProcess(path, []string{"criu", "swrk", fmt.Sprint(len(all) - 1)}, attr)
	if err != nil {
		unix.Close(pair[0])
		return nil, fmt.Errorf("start CRIU: %w", err)
	}
	c := &Conversation{path: path, pid: p.Pid, sock: pair[0]}
	return c, p.Release()
}

// Pid gives CRIU's process.
func (c *Conversation) Pid() int { return c.pid }

// closeWait is how long CRIU may take to end by itself.
const closeWait = 2000 // ms

// Close ends CRIU and reaps it.
func (c *Conversation) Close() {
	unix.Close(c.sock)
	// It is a child that nobody else reaps: the pid is its own.
	if fd, err := unix.PidfdOpen(c.pid, 0); err == nil {
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, closeWait)
		unix.Close(fd)
	}
	_ = unix.Kill(c.pid, unix.SIGKILL)
	for {
		if _, err := unix.Wait4(c.pid, nil, 0, nil); err != unix.EINTR {
			return
		}
	}
}

// Event is a step that CRIU has come to. It goes on when the handler has returned.
type Event struct {
	Name string   // as "post-restore"
	Pid  int      // of the first process, where CRIU knows it
	File *os.File // with "orphan-pts-master": the handler closes it
}

// Do makes a request and gives the answer. Each event goes to handle; where that fails,
// CRIU is told, and the error is part of Do's.
func (c *Conversation) Do(ctx context.Context, req *rpc.CriuReq, handle func(Event) error) (*rpc.CriuResp, error) {
	if err := c.send(req); err != nil {
		return nil, err
	}
	var failed error
	for {
		resp, file, err := c.receive(ctx)
		if err != nil {
			return nil, cause(failed, err)
		}
		if resp.GetType() != rpc.CriuReqType_NOTIFY || resp.GetNotify() == nil {
			if file != nil {
				file.Close()
			}
			if !resp.GetSuccess() {
				return resp, cause(failed, refusal(resp))
			}
			if resp.GetType() != req.GetType() {
				return resp, errors.Join(failed, fmt.Errorf("CRIU answers %v to %v", resp.GetType(), req.GetType()))
			}
			return resp, failed
		}
		e := Event{Name: resp.Notify.GetScript(), Pid: int(resp.Notify.GetPid()), File: file}
		var ok bool
		if handle == nil {
			ok = true
		} else if err := handle(e); err != nil {
			failed = errors.Join(failed, err)
		} else {
			ok = true
		}
		if err := c.send(&rpc.CriuReq{Type: new(rpc.CriuReqType_NOTIFY), NotifySuccess: &ok}); err != nil {
			return nil, cause(failed, err)
		}
	}
}

// cause is the handler's error, if there is one: CRIU's is then what follows of it.
func cause(failed, err error) error {
	if failed != nil {
		return failed
	}
	return err
}

func refusal(resp *rpc.CriuResp) error {
	text := resp.GetCrErrmsg()
	if n := resp.GetCrErrno(); text == "" && n != 0 {
		text = unix.Errno(n).Error()
	}
	if text == "" {
		text = "failed"
	}
	return fmt.Errorf("CRIU: %s", strings.TrimSpace(text))
}

func (c *Conversation) send(req *rpc.CriuReq) error {
	b, err := req.MarshalVT()
	if err != nil {
		return fmt.Errorf("request to CRIU: %w", err)
	}
	for {
		_, err = unix.SendmsgN(c.sock, b, nil, nil, unix.MSG_NOSIGNAL)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("CRIU has ended: %w", err)
	}
	return nil
}

func (c *Conversation) receive(ctx context.Context) (*rpc.CriuResp, *os.File, error) {
	for {
		p := []unix.PollFd{{Fd: int32(c.sock), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 500)
		if err != nil && err != unix.EINTR {
			return nil, nil, os.NewSyscallError("poll", err)
		}
		if n > 0 {
			break
		}
		if err := ctx.Err(); err != nil {
			return nil, nil, err
		}
	}
	buf, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*4))
	n, oobn, flags, _, err := unix.Recvmsg(c.sock, buf, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, nil, fmt.Errorf("read CRIU's answer: %w", err)
	}
	file := fileOf(oob[:oobn])
	resp := new(rpc.CriuResp)
	switch {
	case n == 0:
		err = errors.New("CRIU has ended without an answer")
	case flags&unix.MSG_TRUNC != 0:
		err = errors.New("CRIU's answer is too long")
	default:
		if err = resp.UnmarshalVT(buf[:n]); err != nil {
			err = fmt.Errorf("CRIU's answer: %w", err)
		}
	}
	if err != nil {
		if file != nil {
			file.Close()
		}
		return nil, nil, err
	}
	return resp, file, nil
}

// fileOf takes the one descriptor of a message, and closes others.
func fileOf(oob []byte) (f *os.File) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			if f == nil {
				f = os.NewFile(uintptr(fd), "console")
			} else {
				unix.Close(fd)
			}
		}
	}
	return f
}

// ask makes one request to a CRIU of its own.
func ask(ctx context.Context, path string, req *rpc.CriuReq) (*rpc.CriuResp, error) {
	c, err := Start(path, nil)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.Do(ctx, req, nil)
}

// Version asks for the version: 31701 is 3.17.1. One that is too old is
// errdefs.ErrNotImplemented.
func Version(ctx context.Context, path string) (int, error) {
	resp, err := ask(ctx, path, &rpc.CriuReq{Type: new(rpc.CriuReqType_VERSION)})
	if err != nil {
		return 0, fmt.Errorf("version of %s: %w", path, err)
	}
	v := resp.GetVersion()
	n := int(v.GetMajorNumber())*10000 + int(v.GetMinorNumber())*100 + int(v.GetSublevel())
	if v.GetGitid() != "" && v.GetSublevel() == 0 {
		n++ // a build between two releases
	}
	if n < MinVersion {
		return n, classed.Errorf(errdefs.ErrNotImplemented, "CRIU %d.%d is too old, 3.15 or later is needed", v.GetMajorNumber(), v.GetMinorNumber())
	}
	return n, nil
}

// Features asks for what depends on the kernel: memory tracking and lazy pages.
func Features(ctx context.Context, path string) (memTrack, lazyPages bool, err error) {
	resp, err := ask(ctx, path, &rpc.CriuReq{
		Type:     new(rpc.CriuReqType_FEATURE_CHECK),
		Features: &rpc.CriuFeatures{MemTrack: new(true), LazyPages: new(true)},
	})
	if err != nil {
		return false, false, fmt.Errorf("features of %s: %w", path, err)
	}
	return resp.GetFeatures().GetMemTrack(), resp.GetFeatures().GetLazyPages(), nil
}

// logTail bounds what is read of a log, and logErrors what is quoted.
const (
	logTail   = 64 << 10
	logErrors = 4
)

// LogErrors gives the lines of CRIU's log that tell what went wrong, the first ones
// first: those are the cause, what follows is the way out.
func LogErrors(dir *os.File, name string) string {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Size() > logTail {
		_, _ = f.Seek(-logTail, io.SeekEnd)
	}
	raw, _ := io.ReadAll(io.LimitReader(f, logTail))
	var out []string
	for line := range bytes.Lines(raw) {
		_, text, ok := bytes.Cut(line, []byte("Error ("))
		// That there are no tun devices is found out, and does no harm.
		if !ok || len(out) == logErrors || bytes.Contains(text, []byte("Unable to create tun")) {
			continue
		}
		if _, after, ok := bytes.Cut(text, []byte("): ")); ok {
			text = after
		}
		out = append(out, strings.ToValidUTF8(strings.TrimSpace(string(text)), "?"))
	}
	return strings.Join(out, "; ")
}
