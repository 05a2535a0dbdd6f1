// Package cli is the command line for people: commands, progress, tables.
//
// In flow arguments, the terminal and files of the user; out flow requests to the
// Docker Engine API of hakod, calls of what works with images away from it (Options.Images),
// text and exit codes. It is a client like any other: it knows nothing of the engine's packages.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/hako-engine/hako/internal/errtext"
	"github.com/hako-engine/hako/internal/version"
)

// Exit codes that are not the container's own, as docker(1) has them.
const (
	exitUsage      = 125 // of run and exec: hako itself failed
	exitNotRun     = 126 // the command could not be invoked
	exitNotFound   = 127 // the command was not found
	exitInterrupt  = 130
	exitGeneral    = 1
	defaultRuntime = "/run/hako"
)

// exitError ends the program with a code. An empty message prints nothing.
type exitError struct {
	code int
	msg  string
}

func (e *exitError) Error() string { return e.msg }

// Options are what the program gives the command line besides the streams.
type Options struct {
	// Demo opens the archive of the demo image; nil if the program carries none.
	Demo func() (io.Reader, error)
	// Images gives the tools for images beyond the daemon; nil if the program has none.
	Images func(ImagesConfig) Images
	// Verify checks signatures; nil if the program cannot.
	Verify Verifier
}

// app is what all commands share.
type app struct {
	Streams
	Options
	host  string
	debug bool
	c     *client.Client
	i     Images
	// registryDir and containerd are flags of the image tools.
	registryDir, containerd string
	retryTimes              int
	// noHelp is why help was asked for in vain: a command that does not exist.
	noHelp error
}

// Main runs the command line and gives the exit code.
func Main(args []string, s Streams, o Options) int {
	a := &app{Streams: s, Options: o}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	root := a.root()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if a.i != nil {
		a.i.Close()
	}
	if a.c != nil {
		a.c.Close()
	}
	if err == nil {
		err = a.noHelp
	}
	if err == nil {
		return 0
	}
	var ee *exitError
	if errors.As(err, &ee) {
		if ee.msg != "" {
			fmt.Fprintln(s.Err, "hako: "+ee.msg)
		}
		return ee.code
	}
	fmt.Fprintln(s.Err, "hako: "+a.explain(err))
	return exitGeneral
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "hako [OPTIONS] COMMAND",
		Short: "Run and manage containers",
		Long: `hako runs and manages containers, images, networks and volumes.

It talks to the daemon hakod, which it finds by --host, $HAKO_HOST, $DOCKER_HOST or
the default socket, in that order.`,
		Example: `  hako run --rm -it alpine sh              run a shell in a new container
  hako run -d -p 8080:80 --name web nginx  run a service in the background
  hako ps                                  list running containers
  hako doctor                              check whether this machine is ready`,
		Version:          version.Version,
		SilenceErrors:    true,
		SilenceUsage:     true,
		TraverseChildren: true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownCommand(cmd, args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return cmd.Help() },
	}
	root.SetOut(a.Out)
	root.SetErr(a.Err)
	root.SetVersionTemplate("hako {{.Version}}\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &exitError{exitUsage, fmt.Sprintf("%s\n\nUsage:  %s\n\nRun '%s --help' for more information", err, cmd.UseLine(), cmd.CommandPath())}
	})
	pf := root.PersistentFlags()
	pf.StringVarP(&a.host, "host", "H", "", "daemon's socket to connect to, e.g. unix:///run/hako/docker.sock")
	pf.BoolVarP(&a.debug, "debug", "D", false, "print requests and their durations to stderr")
	root.AddGroup(
		&cobra.Group{ID: "container", Title: "Containers:"},
		&cobra.Group{ID: "image", Title: "Images:"},
		&cobra.Group{ID: "object", Title: "Networks and volumes:"},
		&cobra.Group{ID: "system", Title: "System:"},
	)
	for group, cmds := range map[string][]*cobra.Command{
		"container": a.containerCommands(),
		"image":     append(a.imageCommands(), a.loginCommand(), a.logoutCommand()),
		"object":    a.objectCommands(),
		"system":    a.systemCommands(),
	} {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	// The long forms that docker's users may be used to: hako container ls, hako image prune.
	containers := longForms(a.containerCommands(), "ps", "ls")
	containers[slices.IndexFunc(containers, func(c *cobra.Command) bool { return c.Name() == "inspect" })] = a.containerInspectCommand()
	container := group("container", "Manage containers", append(containers, a.containerPruneCommand())...)
	image := group("image", "Manage images", append(append(longForms(a.imageCommands(), "images", "ls", "rmi", "rm"), a.imagePruneCommand()), a.imageToolCommands()...)...)
	container.GroupID, image.GroupID = "container", "image"
	root.AddCommand(container, image)
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetHelpCommandGroupID("system")
	root.InitDefaultHelpCmd()
	for _, c := range root.Commands() {
		if c.Name() == "help" {
			c.Use, c.Short, c.Long = "help [COMMAND]", "Show the help of a command", "Show the help of a command, as 'hako COMMAND --help' does."
			c.Run, c.RunE = nil, func(_ *cobra.Command, args []string) error {
				about, rest, err := root.Find(args)
				if err != nil || about.HasSubCommands() && len(rest) > 0 {
					return unknownCommand(about, rest[0])
				}
				return about.Help()
			}
		}
	}
	tidyUsage(root)
	root.InitDefaultVersionFlag()
	root.Flags().Lookup("version").Usage = "print the version"
	a.completeNames(root)
	a.setHelp(root)
	return root
}

// longForms gives commands the names that they have in a group, in pairs of the short
// and the long name; the short one works there, too.
func longForms(cmds []*cobra.Command, names ...string) []*cobra.Command {
	for _, c := range cmds {
		for i := 0; i < len(names); i += 2 {
			if c.Name() == names[i] {
				c.Use = names[i+1] + strings.TrimPrefix(c.Use, names[i])
				c.Aliases = append([]string{names[i]}, map[string][]string{"ls": {"list"}, "rm": {"remove"}}[names[i+1]]...)
				break
			}
		}
	}
	return cmds
}

func unknownCommand(cmd *cobra.Command, name string) error {
	msg := fmt.Sprintf("%q is not a %s command", name, cmd.CommandPath())
	cmd.SuggestionsMinimumDistance = 2
	if s := cmd.SuggestionsFor(name); len(s) > 0 {
		msg += "; did you mean " + strings.Join(s, " or ") + "?"
	}
	return &exitError{exitGeneral, msg + "\nSee '" + cmd.CommandPath() + " --help'"}
}

// group makes a command that only holds others.
func group(use, short string, cmds ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use: use + " COMMAND", Short: short,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownCommand(cmd, args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return cmd.Help() },
	}
	c.AddCommand(cmds...)
	return c
}

// address finds the daemon.
func (a *app) address() string {
	for _, h := range []string{a.host, os.Getenv("HAKO_HOST"), os.Getenv("DOCKER_HOST")} {
		if h != "" {
			if strings.HasPrefix(h, "/") {
				h = "unix://" + h
			}
			return h
		}
	}
	return "unix://" + defaultRuntime + "/docker.sock"
}

// client connects lazily, so that commands without a daemon start at once.
func (a *app) client() (*client.Client, error) {
	if a.c != nil {
		return a.c, nil
	}
	opts := []client.Opt{client.WithHost(a.address()), client.WithTLSClientConfigFromEnv(), client.WithAPIVersionFromEnv(), client.WithUserAgent("hako")}
	if a.debug {
		opts = append(opts, client.WithHTTPRequestHook(debugRequests(a.Err)), client.WithHTTPResponseHook(debugResponses(a.Err)))
	}
	c, err := client.New(opts...)
	if err != nil {
		return nil, fmt.Errorf("use daemon address %s: %w", a.address(), err)
	}
	a.c = c
	return c, nil
}

// explain words an error for people.
func (a *app) explain(err error) string {
	msg := err.Error()
	switch {
	case client.IsErrConnectionFailed(err):
		addr := a.address()
		if path, ok := strings.CutPrefix(addr, "unix://"); ok {
			_, serr := os.Stat(path)
			switch {
			case errors.Is(serr, os.ErrNotExist):
				return fmt.Sprintf("cannot reach the daemon: there is no socket %s. Is hakod running? Start it with 'hakod', or name another socket with --host", path)
			case errors.Is(serr, os.ErrPermission), os.Geteuid() != 0:
				return fmt.Sprintf("cannot reach the daemon at %s: permission denied. Use root, or a user of the socket's group", path)
			}
		}
		return fmt.Sprintf("cannot reach the daemon at %s: is hakod running? (%s)", addr, firstLine(msg))
	case errdefs.IsCanceled(err), errors.Is(err, context.Canceled):
		return "interrupted"
	}
	if text, ok := strings.CutPrefix(msg, "Error response from daemon: "); ok {
		return text
	}
	return errtext.Plain(err)
}

func firstLine(s string) string { l, _, _ := strings.Cut(s, "\n"); return l }

// each runs f for all names, prints the names that succeeded and reports every failure.
func (a *app) each(names []string, f func(name string) error) error {
	var failed []error
	for _, n := range names {
		if err := f(n); err != nil {
			failed = append(failed, err)
			continue
		}
		fmt.Fprintln(a.Out, n)
	}
	if len(failed) == 0 {
		return nil
	}
	lines := make([]string, len(failed))
	for i, err := range failed {
		lines[i] = a.explain(err)
	}
	return &exitError{exitGeneral, strings.Join(lines, "\nhako: ")}
}

// mapFlag turns repeated KEY=VALUE flags into a map.
func mapFlag(values []string) map[string]string {
	if len(values) == 0 {
		return nil
	}
	m := make(map[string]string, len(values))
	for _, v := range values {
		k, val, _ := strings.Cut(v, "=")
		m[k] = val
	}
	return m
}

// filters parses repeated --filter KEY=VALUE flags.
func filters(values []string) (client.Filters, error) {
	f := client.Filters{}
	for _, v := range values {
		k, val, ok := strings.Cut(v, "=")
		if !ok || k == "" {
			return nil, &exitError{exitUsage, fmt.Sprintf("bad filter %q: expected KEY=VALUE", v)}
		}
		f.Add(strings.ToLower(strings.TrimSpace(k)), strings.TrimSpace(val))
	}
	return f, nil
}

// filtered connects, and parses the --filter flags of a request.
func (a *app) filtered(values []string) (*client.Client, client.Filters, error) {
	c, err := a.client()
	if err != nil {
		return nil, nil, err
	}
	f, err := filters(values)
	return c, f, err
}

func filterFlag(fs *pflag.FlagSet, what string) *[]string {
	return fs.StringArrayP("filter", "f", nil, "show only "+what+" that match KEY=VALUE")
}
