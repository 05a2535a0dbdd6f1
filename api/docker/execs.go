package docker

import (
	"context"
	"io"
	"net/http"

	"github.com/moby/moby/api/types/container"

	"github.com/hako-engine/hako/api/stream"
	"github.com/hako-engine/hako/engine"
)

func (s *Server) execCreate(ctx context.Context, c *call) error {
	var req container.ExecCreateRequest
	if err := c.body(&req); err != nil {
		return err
	}
	if len(req.Cmd) == 0 {
		return invalidf("No exec command specified")
	}
	if _, err := stream.ParseDetachKeys(req.DetachKeys); err != nil {
		return err
	}
	config := engine.ExecConfig{
		Container: c.id(), Cmd: req.Cmd, User: req.User, Env: req.Env, WorkingDir: req.WorkingDir,
		Privileged: req.Privileged, TTY: req.Tty, DetachKeys: req.DetachKeys,
		AttachStdin: req.AttachStdin, AttachStdout: req.AttachStdout, AttachStderr: req.AttachStderr,
	}
	if req.ConsoleSize != nil {
		config.ConsoleSize = *req.ConsoleSize
	}
	id, err := s.opt.Backend.CreateExec(ctx, config)
	if err != nil {
		return err
	}
	return c.json(http.StatusCreated, container.ExecCreateResponse{ID: id})
}

func (s *Server) execStart(ctx context.Context, c *call) error {
	var req container.ExecStartRequest
	if err := c.optionalBody(&req); err != nil {
		return err
	}
	e, err := s.opt.Backend.Exec(ctx, c.id())
	if err != nil {
		return err
	}
	if req.Detach {
		if err := s.opt.Backend.StartExec(ctx, e.ID); err != nil {
			return err
		}
		return c.empty(http.StatusOK)
	}
	keys, err := stream.ParseDetachKeys(e.Config.DetachKeys)
	if err != nil {
		return err
	}
	if err := s.execStartable(ctx, &e); err != nil {
		return err
	}
	// The answer goes out before the process starts: a client that reads output together
	// with the header may lose it in its HTTP library's buffer (docker-py does).
	conn, err := c.hijack(e.Config.TTY)
	if err != nil {
		return err
	}
	o := stream.PumpOptions{
		Stdin:  e.Config.AttachStdin,
		Output: e.Config.AttachStdout || e.Config.AttachStderr || e.Config.TTY,
	}
	if e.Config.TTY {
		o.DetachKeys = keys
	}
	process, err := s.opt.Backend.AttachExec(ctx, e.ID)
	if err != nil {
		// Clients read the exit code (126, 127) from the exec, and the reason from the
		// stream, as they do from a shell.
		process, o = &message{[]byte(err.Error() + "\r\n")}, stream.PumpOptions{Output: true}
	} else if size := req.ConsoleSize; size != nil && e.Config.TTY && e.Config.ConsoleSize == [2]uint{} {
		if err := s.opt.Backend.ResizeExec(ctx, e.ID, uint32(size[1]), uint32(size[0])); err != nil {
			s.log.Debug("set the size of an exec's terminal", "exec", e.ID, "error", err)
		}
	}
	s.pump(ctx, c, conn, process, e.Config.TTY, o)
	return nil
}

// execStartable finds the reasons against a start that deserve a status code of their own.
func (s *Server) execStartable(ctx context.Context, e *engine.Exec) error {
	ctr, err := s.opt.Backend.Container(ctx, e.ContainerID)
	switch {
	case err != nil:
		return err
	case e.Running:
		return conflictf("Error: Exec command %s is already running", e.ID)
	case e.Started:
		return conflictf("Error: Exec command %s has already run", e.ID)
	case ctr.State.Status == engine.StatusPaused:
		return conflictf("Container %s is paused, unpause the container before exec", ctr.ID)
	case ctr.State.Status != engine.StatusRunning:
		return conflictf("Container %s is not running", ctr.ID)
	}
	return nil
}

// message is the Attachment of a process that could not be started: its output is the reason.
type message struct{ text []byte }

// ReadFrame gives the text once.
func (m *message) ReadFrame() (int, []byte, error) {
	if m.text == nil {
		return 0, nil, io.EOF
	}
	text := m.text
	m.text = nil
	return stream.Stdout, text, nil
}

func (m *message) Write(p []byte) (int, error) { return len(p), nil }

// CloseWrite does nothing.
func (m *message) CloseWrite() error { return nil }

// Close does nothing.
func (m *message) Close() error { return nil }

func (s *Server) execResize(ctx context.Context, c *call) error {
	width, height, err := c.size()
	if err != nil {
		return err
	}
	if err := s.opt.Backend.ResizeExec(ctx, c.id(), width, height); err != nil {
		return err
	}
	return c.empty(http.StatusOK)
}

func (s *Server) execInspect(ctx context.Context, c *call) error {
	e, err := s.opt.Backend.Exec(ctx, c.id())
	if err != nil {
		return err
	}
	keys, err := stream.ParseDetachKeys(e.Config.DetachKeys)
	if err != nil {
		keys = nil
	}
	out := container.ExecInspectResponse{
		ID: e.ID, Running: e.Running, ExitCode: e.ExitCode, Pid: e.Pid, ContainerID: e.ContainerID,
		OpenStdin: e.Config.AttachStdin, OpenStdout: e.Config.AttachStdout, OpenStderr: e.Config.AttachStderr,
		DetachKeys: keys,
		ProcessConfig: &container.ExecProcessConfig{
			Tty: e.Config.TTY, User: e.Config.User, Privileged: &e.Config.Privileged,
		},
	}
	if len(e.Config.Cmd) > 0 {
		out.ProcessConfig.Entrypoint, out.ProcessConfig.Arguments = e.Config.Cmd[0], list(e.Config.Cmd[1:])
	}
	return c.json(http.StatusOK, out)
}
