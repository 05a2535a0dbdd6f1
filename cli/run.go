package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

func (a *app) runCommand() *cobra.Command {
	var (
		f          containerFlags
		detach     bool
		sigProxy   bool
		detachKeys string
	)
	cmd := &cobra.Command{
		Use:   "run [OPTIONS] IMAGE [COMMAND] [ARG...]",
		Short: "Create a container from an image, start it and connect to it",
		Long: `Create a container from an image, start it, and connect to its streams.

Exit status: the command's own; 125 if hako or the daemon failed, 126 if the command
could not be invoked, 127 if it was not found.`,
		Example: `  hako run --rm alpine echo hello
  hako run --rm -it -v "$PWD:/src" -w /src golang:1.26 go test ./...
  hako run -d --name web --restart unless-stopped -p 8080:80 -m 256m --cpus 0.5 nginx`,
		Args: needImage,
		RunE: func(cmd *cobra.Command, args []string) error {
			if detach && len(f.attach) > 0 {
				return &exitError{exitUsage, "--attach and --detach exclude each other"}
			}
			return a.run(cmd.Context(), &f, args, detach, sigProxy, detachKeys)
		},
	}
	fs := cmd.Flags()
	fs.SetInterspersed(false)
	f.register(fs)
	fs.BoolVarP(&detach, "detach", "d", false, "run in the background and print the container's id")
	fs.BoolVar(&sigProxy, "sig-proxy", true, "pass received signals on to the container")
	fs.StringVar(&detachKeys, "detach-keys", "", "keys that detach from the container (default ctrl-p,ctrl-q)")
	return cmd
}

func (a *app) createCommand() *cobra.Command {
	var f containerFlags
	cmd := &cobra.Command{
		Use:     "create [OPTIONS] IMAGE [COMMAND] [ARG...]",
		Short:   "Create a container without starting it",
		Example: "  hako create --name web -p 8080:80 nginx && hako start web",
		Args:    needImage,
		RunE: func(cmd *cobra.Command, args []string) error {
			conf, err := f.parse(args)
			if err != nil {
				return err
			}
			id, err := a.create(cmd.Context(), &f, conf)
			if err != nil {
				return &exitError{exitUsage, a.explain(err)}
			}
			fmt.Fprintln(a.Out, id)
			return nil
		},
	}
	fs := cmd.Flags()
	fs.SetInterspersed(false)
	f.register(fs)
	return cmd
}

func needImage(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return &exitError{exitUsage, fmt.Sprintf("'%s' needs an image\n\nUsage:  %s\n\nRun '%s --help' for more information", cmd.CommandPath(), cmd.UseLine(), cmd.CommandPath())}
	}
	return nil
}

// create makes a container, pulling its image first where --pull asks for it or the image is missing.
func (a *app) create(ctx context.Context, f *containerFlags, conf client.ContainerCreateOptions) (string, error) {
	c, err := a.client()
	if err != nil {
		return "", err
	}
	if f.cidFile != "" {
		if _, err := os.Stat(f.cidFile); err == nil {
			return "", fmt.Errorf("container id file %s exists: remove it, or name another --cidfile", f.cidFile)
		}
	}
	pull := func() error {
		progress := a.Err
		if f.quiet {
			progress = nil
		}
		return a.pull(ctx, conf.Config.Image, f.platform, progress)
	}
	if f.pull == "always" {
		if err := pull(); err != nil {
			return "", err
		}
	}
	res, err := c.ContainerCreate(ctx, conf)
	if errdefs.IsNotFound(err) && f.pull == "missing" && strings.Contains(strings.ToLower(err.Error()), "no such image") {
		if !f.quiet {
			fmt.Fprintf(a.Err, "Unable to find image '%s' locally\n", conf.Config.Image)
		}
		if err := pull(); err != nil {
			return "", err
		}
		res, err = c.ContainerCreate(ctx, conf)
	}
	if err != nil {
		return "", err
	}
	for _, w := range res.Warnings {
		fmt.Fprintln(a.Err, "hako: warning: "+w)
	}
	if f.cidFile != "" {
		if err := os.WriteFile(f.cidFile, []byte(res.ID), 0o644); err != nil {
			return "", fmt.Errorf("write container id file: %w", err)
		}
	}
	return res.ID, nil
}

func parsePlatform(s string) (*ocispec.Platform, error) {
	if s == "" {
		return nil, nil
	}
	p, err := platforms.Parse(s)
	if err != nil {
		return nil, &exitError{exitUsage, fmt.Sprintf("bad --platform %q: expected OS/ARCH[/VARIANT]", s)}
	}
	return &p, nil
}

func (a *app) run(ctx context.Context, f *containerFlags, args []string, detach, sigProxy bool, detachKeys string) error {
	conf, err := f.parse(args)
	if err != nil {
		return err
	}
	fail := func(err error) error {
		var ee *exitError
		if errors.As(err, &ee) {
			return err
		}
		return &exitError{startExitCode(err), a.explain(err)}
	}
	if !detach {
		attachDefaults(conf.Config, f)
		if conf.Config.Tty && conf.Config.AttachStdin && !isTerminal(a.In) {
			return &exitError{exitGeneral, "the input is not a terminal: leave out -t, or run it from one"}
		}
		if conf.Config.Tty && isTerminal(a.Out) {
			if h, w := a.size(); h > 0 {
				conf.HostConfig.ConsoleSize = [2]uint{h, w}
			}
		}
	} else {
		conf.Config.AttachStdin, conf.Config.AttachStdout, conf.Config.AttachStderr = false, false, false
		conf.Config.StdinOnce = false
	}
	id, err := a.create(ctx, f, conf)
	if err != nil {
		return fail(err)
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	if detach {
		if _, err := c.ContainerStart(ctx, id, client.ContainerStartOptions{}); err != nil {
			return fail(err)
		}
		fmt.Fprintln(a.Out, id)
		return nil
	}
	code, err := a.attachAndStart(ctx, id, conf.Config, f.rm, sigProxy, detachKeys)
	if err != nil {
		return fail(err)
	}
	if code != 0 {
		return &exitError{code: code}
	}
	return nil
}

func (a *app) size() (height, width uint) {
	fd, ok := fdOf(a.Out)
	if !ok {
		return 0, 0
	}
	return termSize(fd)
}

// attachDefaults connects what the user did not choose: output always, input with -i.
func attachDefaults(c *container.Config, f *containerFlags) {
	if len(f.attach) == 0 {
		c.AttachStdout, c.AttachStderr, c.AttachStdin = true, true, c.OpenStdin
	}
	c.StdinOnce = c.OpenStdin && c.AttachStdin
}

// attachAndStart connects first, so that not a byte of output is missed, then starts
// the container and waits for it. It gives the container's exit code.
func (a *app) attachAndStart(ctx context.Context, id string, conf *container.Config, remove, sigProxy bool, detachKeys string) (int, error) {
	c, err := a.client()
	if err != nil {
		return 0, err
	}
	res, err := c.ContainerAttach(ctx, id, client.ContainerAttachOptions{
		Stream: true, Stdin: conf.AttachStdin, Stdout: conf.AttachStdout, Stderr: conf.AttachStderr, DetachKeys: detachKeys,
	})
	if err != nil {
		return 0, err
	}
	s := &session{a: a, tty: conf.Tty, stdin: conf.AttachStdin, detachKeys: detachKeys, conn: res.HijackedResponse, resize: func(ctx context.Context, h, w uint) error {
		_, err := c.ContainerResize(ctx, id, client.ContainerResizeOptions{Height: h, Width: w})
		return err
	}}
	defer s.close()
	cond := container.WaitConditionNextExit
	if remove {
		cond = container.WaitConditionRemoved
	}
	waitCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	exit := a.awaitExit(waitCtx, id, cond)
	if sigProxy && !conf.Tty {
		stop := proxySignals(func(sig string) {
			_, _ = c.ContainerKill(waitCtx, id, client.ContainerKillOptions{Signal: sig})
		})
		defer stop()
	}
	if _, err := c.ContainerStart(ctx, id, client.ContainerStartOptions{}); err != nil {
		if remove {
			// The daemon removes it as well; that it is gone already is fine.
			_, _ = c.ContainerRemove(context.WithoutCancel(ctx), id, client.ContainerRemoveOptions{Force: true})
		}
		return 0, err
	}
	if err := s.start(); err != nil {
		return 0, err
	}
	s.follow(waitCtx)
	if conf.AttachStdout || conf.AttachStderr || conf.AttachStdin {
		if err := s.wait(waitCtx); errors.Is(err, errDetached) {
			return 0, nil
		} else if err != nil {
			return 0, err
		}
	}
	s.close()
	o := <-exit
	return o.code, o.err
}

// outcome is how a wait for a container ended.
type outcome struct {
	code int
	err  error
}

// awaitExit gives the exit of a container once.
func (a *app) awaitExit(ctx context.Context, id string, cond container.WaitCondition) <-chan outcome {
	wait := a.c.ContainerWait(ctx, id, client.ContainerWaitOptions{Condition: cond})
	out := make(chan outcome, 1)
	go func() {
		select {
		case r := <-wait.Result:
			if r.Error != nil && r.Error.Message != "" {
				out <- outcome{exitUsage, errors.New(r.Error.Message)}
				return
			}
			out <- outcome{code: int(r.StatusCode)}
		case err := <-wait.Error:
			out <- outcome{exitUsage, fmt.Errorf("wait for container %s: %w", id, err)}
		}
	}()
	return out
}

// startExitCode is docker's: what the shell would have said of the command.
func startExitCode(err error) int {
	msg := strings.ToLower(err.Error())
	switch {
	case client.IsErrConnectionFailed(err):
		return exitUsage
	case strings.Contains(msg, "executable file not found"), strings.Contains(msg, "no such file or directory") && strings.Contains(msg, "exec:"), strings.Contains(msg, "not a directory") && strings.Contains(msg, "exec:"):
		return exitNotFound
	case strings.Contains(msg, "exec:") && (strings.Contains(msg, "permission denied") || strings.Contains(msg, "is a directory")):
		return exitNotRun
	}
	return exitUsage
}
