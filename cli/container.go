package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

func termSize(fd int) (height, width uint) {
	w, h, err := term.GetSize(fd)
	if err != nil {
		return 0, 0
	}
	return uint(h), uint(w)
}

func (a *app) containerCommands() []*cobra.Command {
	return []*cobra.Command{
		a.runCommand(), a.createCommand(), a.startCommand(), a.stopCommand(), a.restartCommand(), a.killCommand(),
		a.pauseCommand(), a.unpauseCommand(), a.waitCommand(), a.renameCommand(), a.updateCommand(), a.rmCommand(),
		a.psCommand(), a.logsCommand(), a.execCommand(), a.attachCommand(), a.inspectCommand(), a.topCommand(),
		a.statsCommand(), a.cpCommand(), a.diffCommand(), a.exportCommand(), a.commitCommand(), a.portCommand(),
	}
}

// needNames checks that at least one argument is there, and words it as the command's user needs it.
func needNames(what string) cobra.PositionalArgs { return needArgs(1, -1, what) }

// needArgs checks the number of arguments; most < 0 means no limit.
func needArgs(least, most int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) >= least && (most < 0 || len(args) <= most) {
			return nil
		}
		return &exitError{exitGeneral, fmt.Sprintf("'%s' needs %s\n\nUsage:  %s\n\nRun '%s --help' for more information", cmd.CommandPath(), what, cmd.UseLine(), cmd.CommandPath())}
	}
}

func (a *app) startCommand() *cobra.Command {
	var attach, interactive bool
	var detachKeys string
	cmd := &cobra.Command{
		Use: "start [OPTIONS] CONTAINER...", Short: "Start stopped containers", Args: needNames("a container"),
		Example: "  hako start web db\n  hako start -ai shell",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if !attach && !interactive {
				return a.each(args, func(name string) error {
					_, err := c.ContainerStart(cmd.Context(), name, client.ContainerStartOptions{})
					return err
				})
			}
			if len(args) > 1 {
				return &exitError{exitGeneral, "only one container can be started and attached to at once"}
			}
			res, err := c.ContainerInspect(cmd.Context(), args[0], client.ContainerInspectOptions{})
			if err != nil {
				return err
			}
			conf := *res.Container.Config
			conf.AttachStdin, conf.AttachStdout, conf.AttachStderr = interactive && conf.OpenStdin, true, true
			code, err := a.attachAndStart(cmd.Context(), res.Container.ID, &conf, res.Container.HostConfig.AutoRemove, true, detachKeys)
			if err != nil {
				return &exitError{startExitCode(err), a.explain(err)}
			}
			if code != 0 {
				return &exitError{code: code}
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&attach, "attach", "a", false, "connect to the output and pass signals on")
	cmd.Flags().BoolVarP(&interactive, "interactive", "i", false, "connect to the input")
	cmd.Flags().StringVar(&detachKeys, "detach-keys", "", "keys that detach from the container (default ctrl-p,ctrl-q)")
	return cmd
}

func (a *app) stopCommand() *cobra.Command {
	return a.endCommand("stop", "Ask containers to end, then kill them", func(ctx context.Context, c *client.Client, name, signal string, timeout *int) error {
		_, err := c.ContainerStop(ctx, name, client.ContainerStopOptions{Signal: signal, Timeout: timeout})
		return err
	})
}

func (a *app) restartCommand() *cobra.Command {
	return a.endCommand("restart", "Stop and start containers", func(ctx context.Context, c *client.Client, name, signal string, timeout *int) error {
		_, err := c.ContainerRestart(ctx, name, client.ContainerRestartOptions{Signal: signal, Timeout: timeout})
		return err
	})
}

// endCommand is a command that ends containers. timeout is in seconds; nil: the container's.
func (a *app) endCommand(name, short string, end func(ctx context.Context, c *client.Client, name, signal string, timeout *int) error) *cobra.Command {
	var sig string
	var secs int
	cmd := &cobra.Command{Use: name + " [OPTIONS] CONTAINER...", Short: short, Args: needNames("a container")}
	cmd.Flags().StringVarP(&sig, "signal", "s", "", "signal to send first (default: the container's)")
	cmd.Flags().IntVarP(&secs, "time", "t", 0, "seconds to wait before killing (default: the container's, or 10); -1: no limit")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var timeout *int
		if cmd.Flags().Changed("time") {
			timeout = &secs
		}
		return a.onContainers(cmd, args, func(c *client.Client, name string) error {
			return end(cmd.Context(), c, name, sig, timeout)
		})
	}
	return cmd
}

// onContainers connects, then runs f for each name.
func (a *app) onContainers(cmd *cobra.Command, names []string, f func(*client.Client, string) error) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	return a.each(names, func(name string) error { return f(c, name) })
}

func (a *app) killCommand() *cobra.Command {
	var sig string
	cmd := &cobra.Command{Use: "kill [OPTIONS] CONTAINER...", Short: "Send a signal to containers", Args: needNames("a container"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onContainers(cmd, args, func(c *client.Client, name string) error {
				_, err := c.ContainerKill(cmd.Context(), name, client.ContainerKillOptions{Signal: sig})
				return err
			})
		}}
	cmd.Flags().StringVarP(&sig, "signal", "s", "KILL", "signal name or number")
	return cmd
}

func (a *app) pauseCommand() *cobra.Command {
	return &cobra.Command{Use: "pause CONTAINER...", Short: "Freeze all processes of containers", Args: needNames("a container"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onContainers(cmd, args, func(c *client.Client, name string) error {
				_, err := c.ContainerPause(cmd.Context(), name, client.ContainerPauseOptions{})
				return err
			})
		}}
}

func (a *app) unpauseCommand() *cobra.Command {
	return &cobra.Command{Use: "unpause CONTAINER...", Short: "Let frozen containers go on", Args: needNames("a container"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onContainers(cmd, args, func(c *client.Client, name string) error {
				_, err := c.ContainerUnpause(cmd.Context(), name, client.ContainerUnpauseOptions{})
				return err
			})
		}}
}

func (a *app) waitCommand() *cobra.Command {
	return &cobra.Command{Use: "wait CONTAINER...", Short: "Wait until containers end and print their exit codes", Args: needNames("a container"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, err := a.client(); err != nil {
				return err
			}
			var failed []error
			for _, name := range args {
				o := <-a.awaitExit(cmd.Context(), name, container.WaitConditionNotRunning)
				if o.err != nil {
					failed = append(failed, o.err)
					continue
				}
				fmt.Fprintln(a.Out, o.code)
			}
			return errors.Join(failed...)
		}}
}

func (a *app) renameCommand() *cobra.Command {
	return &cobra.Command{Use: "rename CONTAINER NEW_NAME", Short: "Give a container another name", Args: needArgs(2, 2, "a container and a new name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			_, err = c.ContainerRename(cmd.Context(), args[0], client.ContainerRenameOptions{NewName: args[1]})
			return err
		}}
}

func (a *app) updateCommand() *cobra.Command {
	var f containerFlags
	cmd := &cobra.Command{Use: "update [OPTIONS] CONTAINER...", Short: "Change limits and the restart policy of containers", Args: needNames("a container"),
		Example: "  hako update -m 512m --cpus 2 web\n  hako update --restart always web"}
	fs := cmd.Flags()
	f.changed = fs.Changed
	f.memorySwappiness = -1
	fs.StringVarP(&f.memory, "memory", "m", "", "memory limit, e.g. 512m")
	fs.StringVar(&f.memoryReservation, "memory-reservation", "", "soft memory limit")
	fs.StringVar(&f.memorySwap, "memory-swap", "", "limit of memory and swap together; -1: unlimited swap")
	fs.StringVar(&f.cpus, "cpus", "", "number of CPUs, e.g. 1.5")
	fs.Int64VarP(&f.cpuShares, "cpu-shares", "c", 0, "relative weight of CPU time")
	fs.Int64Var(&f.cpuPeriod, "cpu-period", 0, "CFS period in microseconds")
	fs.Int64Var(&f.cpuQuota, "cpu-quota", 0, "CFS quota in microseconds")
	fs.StringVar(&f.cpusetCPUs, "cpuset-cpus", "", "CPUs to run on, e.g. 0-2,4")
	fs.StringVar(&f.cpusetMems, "cpuset-mems", "", "memory nodes to use")
	fs.Int64Var(&f.pidsLimit, "pids-limit", 0, "limit of processes; -1: unlimited")
	fs.Uint16Var(&f.blkioWeight, "blkio-weight", 0, "relative weight of block I/O, 10 to 1000")
	fs.StringVar(&f.restart, "restart", "", `when to restart: "no", "on-failure[:N]", "always", "unless-stopped"`)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if fs.NFlag() == 0 {
			return &exitError{exitGeneral, "nothing to update: give at least one option"}
		}
		var h container.HostConfig
		if err := f.resources(&h); err != nil {
			return err
		}
		o := client.ContainerUpdateOptions{Resources: &h.Resources}
		if f.restart != "" {
			p, err := parseRestart(f.restart)
			if err != nil {
				return err
			}
			o.RestartPolicy = &p
		}
		return a.onContainers(cmd, args, func(c *client.Client, name string) error {
			res, err := c.ContainerUpdate(cmd.Context(), name, o)
			for _, w := range res.Warnings {
				fmt.Fprintln(a.Err, "hako: warning: "+w)
			}
			return err
		})
	}
	return cmd
}

func (a *app) rmCommand() *cobra.Command {
	var o client.ContainerRemoveOptions
	cmd := &cobra.Command{Use: "rm [OPTIONS] CONTAINER...", Short: "Remove containers", Args: needNames("a container"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onContainers(cmd, args, func(c *client.Client, name string) error {
				_, err := c.ContainerRemove(cmd.Context(), name, o)
				return err
			})
		}}
	cmd.Flags().BoolVarP(&o.Force, "force", "f", false, "kill a running container first")
	cmd.Flags().BoolVarP(&o.RemoveVolumes, "volumes", "v", false, "remove anonymous volumes too")
	return cmd
}

func (a *app) logsCommand() *cobra.Command {
	o := client.ContainerLogsOptions{ShowStdout: true, ShowStderr: true}
	cmd := &cobra.Command{Use: "logs [OPTIONS] CONTAINER", Short: "Show what a container printed", Args: needArgs(1, 1, "one container"),
		Example: "  hako logs -f --tail 100 web\n  hako logs --since 10m --timestamps web",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if _, err := strconv.Atoi(o.Tail); err != nil && o.Tail != "all" {
				return usage("bad --tail %q: expected a number or all", o.Tail)
			}
			res, err := c.ContainerInspect(cmd.Context(), args[0], client.ContainerInspectOptions{})
			if err != nil {
				return err
			}
			r, err := c.ContainerLogs(cmd.Context(), res.Container.ID, o)
			if err != nil {
				return err
			}
			defer r.Close()
			if res.Container.Config.Tty {
				_, err = io.Copy(a.Out, r)
			} else {
				_, err = stdcopy.StdCopy(a.Out, a.Err, r)
			}
			return err
		}}
	fs := cmd.Flags()
	fs.BoolVarP(&o.Follow, "follow", "f", false, "go on as more is printed")
	fs.StringVarP(&o.Tail, "tail", "n", "all", "only the last N lines")
	fs.StringVar(&o.Since, "since", "", "only since a time (RFC 3339) or age (10m)")
	fs.StringVar(&o.Until, "until", "", "only before a time (RFC 3339) or age (10m)")
	fs.BoolVarP(&o.Timestamps, "timestamps", "t", false, "show the time of each line")
	fs.BoolVar(&o.Details, "details", false, "show the attributes of each line")
	return cmd
}

func (a *app) execCommand() *cobra.Command {
	var o client.ExecCreateOptions
	var detach bool
	var envFile []string
	cmd := &cobra.Command{Use: "exec [OPTIONS] CONTAINER COMMAND [ARG...]", Short: "Run a command in a running container",
		Long:    "Run a command in a running container.\n\nExit status: the command's own; 125 if hako or the daemon failed, 126 if the command\ncould not be invoked, 127 if it was not found.",
		Example: "  hako exec -it web sh\n  hako exec -u 0 -e DEBUG=1 web env",
		Args:    needArgs(2, -1, "a container and a command"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if o.Env, err = readVars(envFile, o.Env, true); err != nil {
				return err
			}
			o.Cmd = args[1:]
			return a.exec(cmd.Context(), args[0], o, detach)
		}}
	fs := cmd.Flags()
	fs.SetInterspersed(false)
	fs.BoolVarP(&detach, "detach", "d", false, "run in the background")
	fs.BoolVarP(&o.TTY, "tty", "t", false, "give the command a terminal")
	fs.BoolVarP(&o.AttachStdin, "interactive", "i", false, "keep the command's stdin open")
	fs.StringVarP(&o.User, "user", "u", "", "user name or uid, with :group or :gid if wanted")
	fs.StringVarP(&o.WorkingDir, "workdir", "w", "", "working directory in the container")
	fs.StringArrayVarP(&o.Env, "env", "e", nil, "set KEY=VALUE, or KEY to pass the variable on")
	fs.StringArrayVar(&envFile, "env-file", nil, "read variables from this file")
	fs.BoolVar(&o.Privileged, "privileged", false, "give all capabilities")
	fs.StringVar(&o.DetachKeys, "detach-keys", "", "keys that detach from the command (default ctrl-p,ctrl-q)")
	return cmd
}

func (a *app) exec(ctx context.Context, name string, o client.ExecCreateOptions, detach bool) error {
	fail := func(err error) error { return &exitError{startExitCode(err), a.explain(err)} }
	c, err := a.client()
	if err != nil {
		return err
	}
	if o.TTY && o.AttachStdin && !detach && !isTerminal(a.In) {
		return &exitError{exitGeneral, "the input is not a terminal: leave out -t, or run it from one"}
	}
	if o.TTY {
		if h, w := a.size(); h > 0 {
			o.ConsoleSize = client.ConsoleSize{Height: h, Width: w}
		}
	}
	if !detach {
		o.AttachStdout, o.AttachStderr = true, true
	} else {
		o.AttachStdin = false
	}
	res, err := c.ExecCreate(ctx, name, o)
	if err != nil {
		return fail(err)
	}
	if detach {
		if _, err := c.ExecStart(ctx, res.ID, client.ExecStartOptions{Detach: true, TTY: o.TTY}); err != nil {
			return fail(err)
		}
		return nil
	}
	at, err := c.ExecAttach(ctx, res.ID, client.ExecAttachOptions{TTY: o.TTY, ConsoleSize: o.ConsoleSize})
	if err != nil {
		return fail(err)
	}
	s := &session{a: a, tty: o.TTY, stdin: o.AttachStdin, detachKeys: o.DetachKeys, conn: at.HijackedResponse, resize: func(ctx context.Context, h, w uint) error {
		_, err := c.ExecResize(ctx, res.ID, client.ExecResizeOptions{Height: h, Width: w})
		return err
	}}
	defer s.close()
	if err := s.start(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.follow(ctx)
	if err := s.wait(ctx); errors.Is(err, errDetached) {
		return nil
	} else if err != nil {
		return err
	}
	s.close()
	code, err := a.execCode(ctx, res.ID)
	if err != nil {
		return fail(err)
	}
	if code != 0 {
		return &exitError{code: code}
	}
	return nil
}

// execCode asks for the exit code. Output ends a moment before the daemon knows of the exit.
func (a *app) execCode(ctx context.Context, id string) (int, error) {
	for i := 0; ; i++ {
		res, err := a.c.ExecInspect(ctx, id, client.ExecInspectOptions{})
		if err != nil || !res.Running || i == 100 {
			return res.ExitCode, err
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(time.Duration(min(i+1, 10)) * time.Millisecond):
		}
	}
}

func (a *app) attachCommand() *cobra.Command {
	var noStdin, sigProxy bool
	var detachKeys string
	cmd := &cobra.Command{Use: "attach [OPTIONS] CONTAINER", Short: "Connect to a running container's streams", Args: needArgs(1, 1, "one container"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			res, err := c.ContainerInspect(ctx, args[0], client.ContainerInspectOptions{})
			if err != nil {
				return err
			}
			ctr := res.Container
			switch {
			case !ctr.State.Running:
				return &exitError{exitGeneral, fmt.Sprintf("container %s is not running: start it with 'hako start -ai %s'", args[0], args[0])}
			case ctr.State.Paused:
				return &exitError{exitGeneral, fmt.Sprintf("container %s is paused: unpause it first", args[0])}
			}
			stdin := !noStdin && ctr.Config.OpenStdin
			exit := a.awaitExit(ctx, ctr.ID, container.WaitConditionNotRunning)
			at, err := c.ContainerAttach(ctx, ctr.ID, client.ContainerAttachOptions{Stream: true, Stdin: stdin, Stdout: true, Stderr: true, DetachKeys: detachKeys})
			if err != nil {
				return err
			}
			s := &session{a: a, tty: ctr.Config.Tty, stdin: stdin, detachKeys: detachKeys, conn: at.HijackedResponse, resize: func(ctx context.Context, h, w uint) error {
				_, err := c.ContainerResize(ctx, ctr.ID, client.ContainerResizeOptions{Height: h, Width: w})
				return err
			}}
			defer s.close()
			if sigProxy && !ctr.Config.Tty {
				defer proxySignals(func(sig string) {
					_, _ = c.ContainerKill(ctx, ctr.ID, client.ContainerKillOptions{Signal: sig})
				})()
			}
			if err := s.start(); err != nil {
				return err
			}
			s.follow(ctx)
			if err := s.wait(ctx); errors.Is(err, errDetached) {
				return nil
			} else if err != nil {
				return err
			}
			s.close()
			o := <-exit
			if o.err != nil {
				return o.err
			}
			if o.code != 0 {
				return &exitError{code: o.code}
			}
			return nil
		}}
	cmd.Flags().BoolVar(&noStdin, "no-stdin", false, "do not connect the input")
	cmd.Flags().BoolVar(&sigProxy, "sig-proxy", true, "pass received signals on to the container")
	cmd.Flags().StringVar(&detachKeys, "detach-keys", "", "keys that detach from the container (default ctrl-p,ctrl-q)")
	return cmd
}

func (a *app) topCommand() *cobra.Command {
	return &cobra.Command{Use: "top CONTAINER [PS OPTIONS]", Short: "Show the processes of a container", Args: needNames("a container"), DisableFlagParsing: false,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			res, err := c.ContainerTop(cmd.Context(), args[0], client.ContainerTopOptions{Arguments: args[1:]})
			if err != nil {
				return err
			}
			_, err = io.WriteString(a.Out, layout(append([][]string{res.Titles}, res.Processes...), width(a.Out)))
			return err
		}}
}

func (a *app) diffCommand() *cobra.Command {
	return &cobra.Command{Use: "diff CONTAINER", Short: "Show what a container changed in its file system", Args: needArgs(1, 1, "one container"),
		Long: "Show what a container changed in its file system: A added, C changed, D deleted.",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			res, err := c.ContainerDiff(cmd.Context(), args[0], client.ContainerDiffOptions{})
			if err != nil {
				return err
			}
			for _, ch := range res.Changes {
				fmt.Fprintf(a.Out, "%s %s\n", ch.Kind, ch.Path)
			}
			return nil
		}}
}

func (a *app) portCommand() *cobra.Command {
	return &cobra.Command{Use: "port CONTAINER [PORT[/PROTO]]", Short: "Show the published ports of a container", Args: needArgs(1, 2, "a container"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			res, err := c.ContainerInspect(cmd.Context(), args[0], client.ContainerInspectOptions{})
			if err != nil {
				return err
			}
			found := false
			if res.Container.NetworkSettings != nil {
				for port, bindings := range res.Container.NetworkSettings.Ports {
					if len(args) == 2 && port.String() != args[1] && port.String() != args[1]+"/tcp" {
						continue
					}
					for _, b := range bindings {
						found = true
						addr := hostPort(b.HostIP.String(), b.HostPort)
						if len(args) == 2 {
							fmt.Fprintln(a.Out, addr)
						} else {
							fmt.Fprintf(a.Out, "%s -> %s\n", port, addr)
						}
					}
				}
			}
			if len(args) == 2 && !found {
				return &exitError{exitGeneral, fmt.Sprintf("container %s does not publish port %s", args[0], args[1])}
			}
			return nil
		}}
}

func hostPort(ip, port string) string {
	if strings.Contains(ip, ":") {
		ip = "[" + ip + "]"
	}
	return ip + ":" + port
}

func (a *app) containerPruneCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{Use: "prune [OPTIONS]", Short: "Remove all stopped containers", Args: cobra.NoArgs}
	filter := cmd.Flags().StringArray("filter", nil, "only containers that match KEY=VALUE")
	cmd.Flags().BoolVarP(&force, "force", "f", false, "do not ask")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if !force && !a.confirm("This removes all stopped containers.") {
			return nil
		}
		return a.reclaimed(a.pruneContainers(cmd.Context(), *filter))
	}
	return cmd
}
