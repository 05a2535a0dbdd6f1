package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

var statsList = list{
	table: `{{.ID}}\t{{.Name}}\t{{.CPUPerc}}\t{{.MemUsage}}\t{{.MemPerc}}\t{{.NetIO}}\t{{.BlockIO}}\t{{.PIDs}}`,
	headers: map[string]string{
		"ID": "CONTAINER ID", "Container": "CONTAINER", "Name": "NAME", "CPUPerc": "CPU %", "MemUsage": "MEM USAGE / LIMIT", "MemPerc": "MEM %", "NetIO": "NET I/O", "BlockIO": "BLOCK I/O", "PIDs": "PIDS",
	},
	quiet: "ID",
}

// statsRow is one line of hako stats.
type statsRow struct {
	ref   string
	s     container.StatsResponse
	trunc bool
}

func (r statsRow) Container() string { return r.ref }
func (r statsRow) Name() string      { return strings.TrimPrefix(r.s.Name, "/") }
func (r statsRow) ID() string {
	if r.trunc {
		return shortID(r.s.ID)
	}
	return r.s.ID
}

// CPUPerc is the use of one CPU's time since the last sample: 200 % means two CPUs.
func (r statsRow) CPUPerc() string {
	cpu := float64(r.s.CPUStats.CPUUsage.TotalUsage) - float64(r.s.PreCPUStats.CPUUsage.TotalUsage)
	system := float64(r.s.CPUStats.SystemUsage) - float64(r.s.PreCPUStats.SystemUsage)
	if cpu <= 0 || system <= 0 {
		return "0.00%"
	}
	return fmt.Sprintf("%.2f%%", cpu/system*float64(max(r.s.CPUStats.OnlineCPUs, 1))*100)
}

// used leaves out the page cache that the kernel can drop at any time.
func (r statsRow) used() uint64 {
	m := r.s.MemoryStats
	for _, key := range []string{"total_inactive_file", "inactive_file"} {
		if v, ok := m.Stats[key]; ok && v < m.Usage {
			return m.Usage - v
		}
	}
	return m.Usage
}

func (r statsRow) MemUsage() string {
	return units.BytesSize(float64(r.used())) + " / " + units.BytesSize(float64(r.s.MemoryStats.Limit))
}

func (r statsRow) MemPerc() string {
	if r.s.MemoryStats.Limit == 0 {
		return "0.00%"
	}
	return fmt.Sprintf("%.2f%%", float64(r.used())/float64(r.s.MemoryStats.Limit)*100)
}

func (r statsRow) NetIO() string {
	var rx, tx uint64
	for _, n := range r.s.Networks {
		rx += n.RxBytes
		tx += n.TxBytes
	}
	return units.HumanSizeWithPrecision(float64(rx), 3) + " / " + units.HumanSizeWithPrecision(float64(tx), 3)
}

func (r statsRow) BlockIO() string {
	var rd, wr uint64
	for _, e := range r.s.BlkioStats.IoServiceBytesRecursive {
		switch strings.ToLower(e.Op) {
		case "read":
			rd += e.Value
		case "write":
			wr += e.Value
		}
	}
	return units.HumanSizeWithPrecision(float64(rd), 3) + " / " + units.HumanSizeWithPrecision(float64(wr), 3)
}

func (r statsRow) PIDs() string { return fmt.Sprint(r.s.PidsStats.Current) }

func (a *app) statsCommand() *cobra.Command {
	var all, noStream, noTrunc bool
	var format string
	cmd := &cobra.Command{Use: "stats [OPTIONS] [CONTAINER...]", Short: "Show the resource use of containers", Example: "  hako stats\n  hako stats --no-stream --format json web",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			for {
				names, err := statsNames(cmd.Context(), c, args, all)
				if err != nil {
					return err
				}
				rows, err := statsOnce(cmd.Context(), c, names, !noTrunc, len(args) > 0)
				if err != nil {
					return err
				}
				if !noStream && isTerminal(a.Out) {
					fmt.Fprint(a.Out, "\x1b[2J\x1b[H")
				}
				l := statsList
				l.whole = noTrunc
				if err := l.print(a.Out, rows, format, false); err != nil {
					return err
				}
				if noStream {
					return nil
				}
				select {
				case <-cmd.Context().Done():
					return nil
				case <-time.After(500 * time.Millisecond):
				}
			}
		}}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "also stopped containers")
	cmd.Flags().BoolVar(&noStream, "no-stream", false, "show one sample and end")
	cmd.Flags().BoolVar(&noTrunc, "no-trunc", false, "do not shorten ids")
	cmd.Flags().StringVar(&format, "format", "", formatHelp)
	return cmd
}

func statsNames(ctx context.Context, c *client.Client, args []string, all bool) ([]string, error) {
	if len(args) > 0 {
		return args, nil
	}
	res, err := c.ContainerList(ctx, client.ContainerListOptions{All: all})
	if err != nil {
		return nil, err
	}
	var names []string
	for _, i := range res.Items {
		names = append(names, i.ID)
	}
	return names, nil
}

// statsOnce samples all containers side by side. Ones that the user did not name may vanish meanwhile.
func statsOnce(ctx context.Context, c *client.Client, names []string, trunc, named bool) ([]any, error) {
	rows := make([]any, len(names))
	errs := make([]error, len(names))
	var wg sync.WaitGroup
	for i, name := range names {
		wg.Go(func() {
			res, err := c.ContainerStats(ctx, name, client.ContainerStatsOptions{IncludePreviousSample: true})
			if err != nil {
				errs[i] = err
				return
			}
			defer res.Body.Close()
			var s container.StatsResponse
			if errs[i] = json.NewDecoder(res.Body).Decode(&s); errs[i] == nil {
				rows[i] = statsRow{name, s, trunc}
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil && named {
			return nil, err
		}
	}
	return slices.DeleteFunc(rows, func(r any) bool { return r == nil }), nil
}
