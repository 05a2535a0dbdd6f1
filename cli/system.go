package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/hako-engine/hako/internal/version"
)

func (a *app) systemCommands() []*cobra.Command {
	return []*cobra.Command{a.versionCommand(), a.infoCommand(), a.eventsCommand(), a.doctorCommand(), a.systemCommand(), a.completionCommand()}
}

// clientVersion is what hako version says of the program itself.
type clientVersion struct {
	Version, APIVersion, GitCommit, GoVersion, Os, Arch string
}

func (a *app) versionCommand() *cobra.Command {
	var format string
	var clientOnly bool
	cmd := &cobra.Command{Use: "version [OPTIONS]", Short: "Show the versions of hako and the daemon", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			v := struct {
				Client clientVersion
				Server *client.ServerVersionResult
			}{Client: clientVersion{version.Version, cmp.Or(os.Getenv(client.EnvOverrideAPIVersion), client.MaxAPIVersion), version.Revision(), runtime.Version(), runtime.GOOS, runtime.GOARCH}}
			var serverErr error
			if !clientOnly {
				c, err := a.client()
				if err != nil {
					return err
				}
				res, err := c.ServerVersion(cmd.Context(), client.ServerVersionOptions{})
				if err != nil {
					serverErr = &exitError{exitGeneral, a.explain(err)}
				} else {
					v.Server, v.Client.APIVersion = &res, c.ClientVersion()
				}
			}
			atMost := "" // until a daemon has agreed to it
			if v.Server == nil {
				atMost = " (at most)"
			}
			switch format {
			case "":
				rows := [][]string{{"Client:"}, {" Version:", v.Client.Version}, {" API version:", v.Client.APIVersion + atMost}, {" Go version:", v.Client.GoVersion}, {" Git commit:", v.Client.GitCommit}, {" OS/Arch:", v.Client.Os + "/" + v.Client.Arch}}
				if v.Server != nil {
					rows = append(rows, []string{""}, []string{"Server: " + v.Server.Platform.Name}, []string{" Version:", v.Server.Version},
						[]string{" API version:", fmt.Sprintf("%s (minimum %s)", v.Server.APIVersion, v.Server.MinAPIVersion)}, []string{" OS/Arch:", v.Server.Os + "/" + v.Server.Arch})
					for _, comp := range v.Server.Components {
						rows = append(rows, []string{" " + comp.Name + ":", comp.Version})
					}
				}
				io.WriteString(a.Out, layoutPairs(rows))
			case "json":
				s, err := jsonString(v)
				if err != nil {
					return err
				}
				fmt.Fprintln(a.Out, s)
			default:
				if err := inspectPrint(a.Out, []any{v}, format); err != nil {
					return err
				}
			}
			return serverErr
		}}
	cmd.Flags().StringVarP(&format, "format", "f", "", `"json" or a Go template`)
	cmd.Flags().BoolVar(&clientOnly, "client", false, "only the version of hako itself, without asking the daemon")
	return cmd
}

// layoutPairs aligns the values of label and value rows.
func layoutPairs(rows [][]string) string {
	w := 0
	for _, r := range rows {
		if len(r) > 1 {
			w = max(w, len(r[0]))
		}
	}
	var b strings.Builder
	for _, r := range rows {
		if len(r) > 1 {
			fmt.Fprintf(&b, "%-*s  %s\n", w, r[0], r[1])
		} else {
			fmt.Fprintln(&b, r[0])
		}
	}
	return b.String()
}

func (a *app) infoCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{Use: "info [OPTIONS]", Short: "Show the state of the daemon and the machine", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			res, err := c.Info(cmd.Context(), client.InfoOptions{})
			if err != nil {
				return err
			}
			i := res.Info
			if format == "json" {
				s, err := jsonString(i)
				if err != nil {
					return err
				}
				fmt.Fprintln(a.Out, s)
				return nil
			}
			if format != "" {
				return inspectPrint(a.Out, []any{i}, format)
			}
			var runtimes []string
			for name := range i.Runtimes {
				runtimes = append(runtimes, name)
			}
			slices.Sort(runtimes)
			rows := [][]string{
				{"Daemon:"},
				{" Version:", i.ServerVersion}, {" Address:", a.address()}, {" Root:", i.DockerRootDir}, {" Storage driver:", i.Driver},
				{" Cgroup driver:", i.CgroupDriver + " (cgroup v" + i.CgroupVersion + ")"}, {" Log driver:", i.LoggingDriver},
				{" Runtimes:", strings.Join(runtimes, " ")}, {" Default runtime:", i.DefaultRuntime}, {" Live restore:", fmt.Sprint(i.LiveRestoreEnabled)},
				{" Security options:", strings.Join(i.SecurityOptions, " ")},
				{"Objects:"},
				{" Containers:", fmt.Sprintf("%d (%d running, %d paused, %d stopped)", i.Containers, i.ContainersRunning, i.ContainersPaused, i.ContainersStopped)},
				{" Images:", fmt.Sprint(i.Images)},
				{"Machine:"},
				{" Name:", i.Name}, {" Operating system:", i.OperatingSystem}, {" Kernel:", i.KernelVersion}, {" Architecture:", i.Architecture},
				{" CPUs:", fmt.Sprint(i.NCPU)}, {" Memory:", units.BytesSize(float64(i.MemTotal))},
			}
			io.WriteString(a.Out, layoutPairs(rows))
			for _, w := range i.Warnings {
				fmt.Fprintln(a.Err, "hako: "+w)
			}
			return nil
		}}
	cmd.Flags().StringVarP(&format, "format", "f", "", `"json" or a Go template`)
	return cmd
}

func (a *app) eventsCommand() *cobra.Command {
	var o client.EventsListOptions
	var format string
	cmd := &cobra.Command{Use: "events [OPTIONS]", Short: "Show what happens, as it happens", Args: cobra.NoArgs,
		Example: "  hako events --filter type=container --filter event=die\n  hako events --since 1h --until 0s --format json"}
	fs := cmd.Flags()
	fs.StringVar(&o.Since, "since", "", "also earlier ones since a time (RFC 3339) or age (10m)")
	fs.StringVar(&o.Until, "until", "", "end at a time (RFC 3339) or age (0s: now)")
	fs.StringVar(&format, "format", "", `"json" or a Go template`)
	filter := filterFlag(fs, "events")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, f, err := a.filtered(*filter)
		if err != nil {
			return err
		}
		o.Filters = f
		res := c.Events(cmd.Context(), o)
		for {
			select {
			case m := <-res.Messages:
				if err := a.printEvent(m, format); err != nil {
					return err
				}
			case err := <-res.Err:
				if err == nil || errors.Is(err, io.EOF) || errors.Is(err, context.Canceled) {
					return nil
				}
				return err
			}
		}
	}
	return cmd
}

func (a *app) printEvent(m events.Message, format string) error {
	switch format {
	case "":
		var attrs []string
		for k, v := range m.Actor.Attributes {
			attrs = append(attrs, k+"="+v)
		}
		slices.Sort(attrs)
		line := fmt.Sprintf("%s %s %s %s", time.Unix(0, m.TimeNano).Format("2006-01-02T15:04:05.000000000Z07:00"), m.Type, m.Action, m.Actor.ID)
		if len(attrs) > 0 {
			line += " (" + strings.Join(attrs, ", ") + ")"
		}
		fmt.Fprintln(a.Out, line)
		return nil
	case "json":
		return json.NewEncoder(a.Out).Encode(m)
	}
	return inspectPrint(a.Out, []any{m}, format)
}

func (a *app) systemCommand() *cobra.Command {
	return group("system", "Manage the engine as a whole", a.dfCommand(), a.systemPruneCommand(), a.checkCommand(), a.infoCommand(), a.eventsCommand())
}

var dfList = list{
	table:   `{{.Type}}\t{{.TotalCount}}\t{{.Active}}\t{{.Size}}\t{{.Reclaimable}}`,
	headers: map[string]string{"Type": "TYPE", "TotalCount": "TOTAL", "Active": "ACTIVE", "Size": "SIZE", "Reclaimable": "RECLAIMABLE"},
	quiet:   "Type",
}

type dfRow struct {
	kind                             string
	total, active, size, reclaimable int64
}

func (r dfRow) Type() string       { return r.kind }
func (r dfRow) TotalCount() string { return fmt.Sprint(r.total) }
func (r dfRow) Active() string     { return fmt.Sprint(r.active) }
func (r dfRow) Size() string       { return units.HumanSizeWithPrecision(float64(r.size), 3) }
func (r dfRow) Reclaimable() string {
	s := units.HumanSizeWithPrecision(float64(r.reclaimable), 3)
	if r.size > 0 {
		s += fmt.Sprintf(" (%d%%)", r.reclaimable*100/r.size)
	}
	return s
}

func (a *app) dfCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{Use: "df [OPTIONS]", Short: "Show the disk space in use", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			res, err := c.DiskUsage(cmd.Context(), client.DiskUsageOptions{Containers: true, Images: true, Volumes: true})
			if err != nil {
				return err
			}
			return dfList.print(a.Out, []any{
				dfRow{"Images", res.Images.TotalCount, res.Images.ActiveCount, res.Images.TotalSize, res.Images.Reclaimable},
				dfRow{"Containers", res.Containers.TotalCount, res.Containers.ActiveCount, res.Containers.TotalSize, res.Containers.Reclaimable},
				dfRow{"Volumes", res.Volumes.TotalCount, res.Volumes.ActiveCount, res.Volumes.TotalSize, res.Volumes.Reclaimable},
			}, format, false)
		}}
	cmd.Flags().StringVar(&format, "format", "", formatHelp)
	return cmd
}

func (a *app) systemPruneCommand() *cobra.Command {
	var all, volumes, force bool
	cmd := &cobra.Command{Use: "prune [OPTIONS]", Short: "Remove everything that is not in use", Args: cobra.NoArgs}
	filter := cmd.Flags().StringArray("filter", nil, "only objects that match KEY=VALUE")
	cmd.Flags().BoolVarP(&all, "all", "a", false, "all images without a container, not only untagged ones")
	cmd.Flags().BoolVar(&volumes, "volumes", false, "anonymous volumes too")
	cmd.Flags().BoolVarP(&force, "force", "f", false, "do not ask")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		what := "This removes all stopped containers, unused networks and untagged images."
		if all {
			what = "This removes all stopped containers, unused networks and images without a container."
		}
		if !force && !a.confirm(what) {
			return nil
		}
		ctx := cmd.Context()
		total, err := a.pruneContainers(ctx, *filter)
		if err != nil {
			return err
		}
		if err := a.pruneNetworks(ctx, *filter); err != nil {
			return err
		}
		if volumes {
			n, err := a.pruneVolumes(ctx, *filter, false)
			if err != nil {
				return err
			}
			total += n
		}
		n, err := a.pruneImages(ctx, *filter, all)
		return a.reclaimed(total+n, err)
	}
	return cmd
}

func (a *app) completionCommand() *cobra.Command {
	shells := []string{"bash", "zsh", "fish"}
	cmd := &cobra.Command{Use: "completion SHELL", Short: "Print the completion script of a shell", ValidArgs: shells,
		Long:    "Print the completion script for bash, zsh or fish. For the running shell:\n\n  source <(hako completion bash)\n\n'hako completion man DIR' writes the manual pages into a folder.",
		Example: "  hako completion bash > /usr/share/bash-completion/completions/hako\n  hako completion fish > ~/.config/fish/completions/hako.fish",
		Args:    needArgs(1, 1, "a shell: bash, zsh or fish"),
		RunE: func(cmd *cobra.Command, args []string) error {
			root := cmd.Root()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(a.Out, true)
			case "zsh":
				return root.GenZshCompletion(a.Out)
			case "fish":
				return root.GenFishCompletion(a.Out, true)
			}
			return usage("no completion for %q: expected bash, zsh or fish", args[0])
		}}
	man := &cobra.Command{Use: "man DIR", Short: "Write the manual pages into a folder", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			root := cmd.Root()
			root.DisableAutoGenTag = true
			nameLists(root)
			return doc.GenManTree(root, &doc.GenManHeader{Title: "HAKO", Section: "1", Source: "hako " + version.Version}, args[0])
		}}
	cmd.AddCommand(man)
	return cmd
}
