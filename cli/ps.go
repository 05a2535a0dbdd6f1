package cli

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

var psList = list{
	table: `{{.ID}}\t{{.Image}}\t{{.Command}}\t{{.RunningFor}}\t{{.Status}}\t{{.Ports}}\t{{.Names}}`,
	headers: map[string]string{
		"ID": "CONTAINER ID", "Image": "IMAGE", "Command": "COMMAND", "RunningFor": "CREATED", "Status": "STATUS", "Ports": "PORTS",
		"Names": "NAMES", "CreatedAt": "CREATED AT", "State": "STATE", "Size": "SIZE", "Labels": "LABELS", "Mounts": "MOUNTS", "Networks": "NETWORKS", "LocalVolumes": "LOCAL VOLUMES",
	},
	quiet: "ID",
}

// containerRow is one line of hako ps.
type containerRow struct {
	c     container.Summary
	trunc bool
}

func shortID(id string) string {
	id = strings.TrimPrefix(id, "sha256:")
	if len(id) > 12 {
		return id[:12]
	}
	return id
}

func ellipsis(s string, n int) string {
	r := []rune(s)
	if len(r) <= n {
		return s
	}
	return string(r[:n-1]) + "…"
}

func (r containerRow) ID() string {
	if r.trunc {
		return shortID(r.c.ID)
	}
	return r.c.ID
}

func (r containerRow) Image() string {
	if r.trunc && strings.HasPrefix(r.c.Image, "sha256:") {
		return shortID(r.c.Image)
	}
	return r.c.Image
}

func (r containerRow) Command() string {
	if r.trunc {
		return strconv.Quote(ellipsis(r.c.Command, 20))
	}
	return strconv.Quote(r.c.Command)
}
func (r containerRow) CreatedAt() string  { return time.Unix(r.c.Created, 0).String() }
func (r containerRow) RunningFor() string { return ago(time.Unix(r.c.Created, 0)) }
func (r containerRow) Status() string     { return r.c.Status }
func (r containerRow) State() string      { return string(r.c.State) }

func (r containerRow) Names() string {
	var names []string
	for _, n := range r.c.Names {
		names = append(names, strings.TrimPrefix(n, "/"))
	}
	return strings.Join(names, ",")
}

func (r containerRow) Size() string {
	s := units.HumanSizeWithPrecision(float64(r.c.SizeRw), 3)
	if r.c.SizeRootFs > 0 {
		s += " (virtual " + units.HumanSizeWithPrecision(float64(r.c.SizeRootFs), 3) + ")"
	}
	return s
}

func (r containerRow) Labels() string { return joinMap(r.c.Labels) }

// Label gives one label: {{.Label "com.example.role"}}.
func (r containerRow) Label(name string) string { return r.c.Labels[name] }

func (r containerRow) Mounts() string {
	var out []string
	for _, m := range r.c.Mounts {
		name := m.Name
		if name == "" {
			name = m.Source
		}
		if r.trunc {
			name = ellipsis(name, 15)
		}
		out = append(out, name)
	}
	return strings.Join(out, ",")
}

func (r containerRow) LocalVolumes() string {
	n := 0
	for _, m := range r.c.Mounts {
		if m.Driver == "local" {
			n++
		}
	}
	return strconv.Itoa(n)
}

func (r containerRow) Networks() string {
	if r.c.NetworkSettings == nil {
		return ""
	}
	var out []string
	for n := range r.c.NetworkSettings.Networks {
		out = append(out, n)
	}
	slices.Sort(out)
	return strings.Join(out, ",")
}

func (r containerRow) Ports() string {
	ports := slices.Clone(r.c.Ports)
	slices.SortFunc(ports, func(a, b container.PortSummary) int {
		if a.PrivatePort != b.PrivatePort {
			return int(a.PrivatePort) - int(b.PrivatePort)
		}
		if c := strings.Compare(a.Type, b.Type); c != 0 {
			return c
		}
		return a.IP.Compare(b.IP)
	})
	var out []string
	for _, p := range ports {
		s := fmt.Sprintf("%d/%s", p.PrivatePort, p.Type)
		if p.PublicPort != 0 {
			s = hostPort(p.IP.String(), strconv.Itoa(int(p.PublicPort))) + "->" + s
		}
		out = append(out, s)
	}
	return strings.Join(out, ", ")
}

func joinMap(m map[string]string) string {
	var out []string
	for k, v := range m {
		out = append(out, k+"="+v)
	}
	slices.Sort(out)
	return strings.Join(out, ",")
}

func ago(t time.Time) string {
	if t.IsZero() || t.Unix() <= 0 {
		return "N/A"
	}
	return units.HumanDuration(time.Since(t)) + " ago"
}

func (a *app) psCommand() *cobra.Command {
	var o client.ContainerListOptions
	var quiet, noTrunc, latest bool
	var last int
	var format string
	cmd := &cobra.Command{Use: "ps [OPTIONS]", Aliases: []string{"ls"}, Short: "List containers", Args: cobra.NoArgs,
		Example: `  hako ps -a --filter status=exited
  hako ps --format 'table {{.Names}}\t{{.Status}}\t{{.Ports}}'`}
	fs := cmd.Flags()
	fs.BoolVarP(&o.All, "all", "a", false, "not only running ones")
	fs.BoolVarP(&o.Size, "size", "s", false, "show sizes")
	fs.BoolVarP(&quiet, "quiet", "q", false, "only ids")
	fs.BoolVar(&noTrunc, "no-trunc", false, "do not shorten ids and commands")
	fs.BoolVarP(&latest, "latest", "l", false, "only the newest")
	fs.IntVarP(&last, "last", "n", -1, "only the newest N")
	fs.StringVar(&format, "format", "", formatHelp)
	filter := filterFlag(fs, "containers")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, f, err := a.filtered(*filter)
		if err != nil {
			return err
		}
		o.Filters = f
		if last > 0 {
			o.Limit, o.All = last, true
		}
		if latest {
			o.Limit, o.All = 1, true
		}
		if strings.Contains(format, ".Size") {
			o.Size = true
		}
		res, err := c.ContainerList(cmd.Context(), o)
		if err != nil {
			return err
		}
		rows := make([]any, len(res.Items))
		for i, item := range res.Items {
			rows[i] = containerRow{item, !noTrunc}
		}
		l := psList
		if o.Size {
			l.table += `\t{{.Size}}`
		}
		l.whole = noTrunc
		return l.print(a.Out, rows, format, quiet)
	}
	return cmd
}
