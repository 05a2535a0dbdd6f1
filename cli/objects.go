package cli

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/volume"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

func (a *app) objectCommands() []*cobra.Command {
	return []*cobra.Command{a.volumeCommand(), a.networkCommand()}
}

var volumeList = list{
	table:   `{{.Driver}}\t{{.Name}}`,
	headers: map[string]string{"Driver": "DRIVER", "Name": "VOLUME NAME", "Mountpoint": "MOUNTPOINT", "Labels": "LABELS", "Scope": "SCOPE", "CreatedAt": "CREATED AT", "Size": "SIZE", "Links": "LINKS"},
	quiet:   "Name",
}

type volumeRow struct{ v volume.Volume }

func (r volumeRow) Driver() string           { return r.v.Driver }
func (r volumeRow) Name() string             { return r.v.Name }
func (r volumeRow) Mountpoint() string       { return r.v.Mountpoint }
func (r volumeRow) Labels() string           { return joinMap(r.v.Labels) }
func (r volumeRow) Label(name string) string { return r.v.Labels[name] }
func (r volumeRow) Scope() string            { return r.v.Scope }
func (r volumeRow) CreatedAt() string        { return r.v.CreatedAt }
func (r volumeRow) Size() string {
	if r.v.UsageData == nil || r.v.UsageData.Size < 0 {
		return "N/A"
	}
	return units.HumanSizeWithPrecision(float64(r.v.UsageData.Size), 3)
}
func (r volumeRow) Links() string {
	if r.v.UsageData == nil || r.v.UsageData.RefCount < 0 {
		return "N/A"
	}
	return fmt.Sprint(r.v.UsageData.RefCount)
}

func (a *app) volumeCommand() *cobra.Command {
	var create client.VolumeCreateOptions
	var labels, opts []string
	mk := &cobra.Command{Use: "create [OPTIONS] [NAME]", Short: "Create a volume", Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if len(args) == 1 {
				create.Name = args[0]
			}
			create.Labels, create.DriverOpts = mapFlag(labels), mapFlag(opts)
			res, err := c.VolumeCreate(cmd.Context(), create)
			if err != nil {
				return err
			}
			fmt.Fprintln(a.Out, res.Volume.Name)
			return nil
		}}
	mk.Flags().StringVarP(&create.Driver, "driver", "d", "local", "volume driver")
	mk.Flags().StringArrayVar(&labels, "label", nil, "set label KEY=VALUE")
	mk.Flags().StringArrayVarP(&opts, "opt", "o", nil, "option KEY=VALUE of the driver")

	var quiet bool
	var format string
	ls := &cobra.Command{Use: "ls [OPTIONS]", Aliases: []string{"list"}, Short: "List volumes", Args: cobra.NoArgs}
	lsFilter := filterFlag(ls.Flags(), "volumes")
	ls.RunE = func(cmd *cobra.Command, args []string) error {
		c, f, err := a.filtered(*lsFilter)
		if err != nil {
			return err
		}
		res, err := c.VolumeList(cmd.Context(), client.VolumeListOptions{Filters: f})
		if err != nil {
			return err
		}
		rows := make([]any, len(res.Items))
		for i, v := range res.Items {
			rows[i] = volumeRow{v}
		}
		return volumeList.print(a.Out, rows, format, quiet)
	}
	ls.Flags().BoolVarP(&quiet, "quiet", "q", false, "only names")
	ls.Flags().StringVar(&format, "format", "", formatHelp)

	var inspectFormat string
	inspect := &cobra.Command{Use: "inspect [OPTIONS] VOLUME...", Short: "Show everything about volumes", Args: needNames("a volume"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.inspectAll(args, inspectFormat, func(c *client.Client, name string) (any, error) {
				res, err := c.VolumeInspect(cmd.Context(), name, client.VolumeInspectOptions{})
				return res.Volume, err
			})
		}}
	inspect.Flags().StringVarP(&inspectFormat, "format", "f", "", `"json" or a Go template`)

	var force bool
	rm := &cobra.Command{Use: "rm [OPTIONS] VOLUME...", Short: "Remove volumes", Args: needNames("a volume"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onContainers(cmd, args, func(c *client.Client, name string) error {
				_, err := c.VolumeRemove(cmd.Context(), name, client.VolumeRemoveOptions{Force: force})
				return err
			})
		}}
	rm.Flags().BoolVarP(&force, "force", "f", false, "no error if it does not exist")

	var all, yes bool
	prune := &cobra.Command{Use: "prune [OPTIONS]", Short: "Remove volumes that no container uses", Args: cobra.NoArgs}
	pruneFilter := prune.Flags().StringArray("filter", nil, "only volumes that match KEY=VALUE")
	prune.Flags().BoolVarP(&all, "all", "a", false, "named ones too, not only anonymous ones")
	prune.Flags().BoolVarP(&yes, "force", "f", false, "do not ask")
	prune.RunE = func(cmd *cobra.Command, args []string) error {
		if !yes && !a.confirm("This removes all anonymous volumes that no container uses.") {
			return nil
		}
		return a.reclaimed(a.pruneVolumes(cmd.Context(), *pruneFilter, all))
	}
	return group("volume", "Manage volumes", mk, ls, inspect, rm, prune)
}

func (a *app) pruneVolumes(ctx context.Context, filter []string, all bool) (bytes uint64, err error) {
	c, f, err := a.filtered(filter)
	if err != nil {
		return 0, err
	}
	res, err := c.VolumePrune(ctx, client.VolumePruneOptions{All: all, Filters: f})
	if err != nil {
		return 0, err
	}
	a.pruned("Deleted volumes", res.Report.VolumesDeleted)
	return res.Report.SpaceReclaimed, nil
}

func (a *app) pruneContainers(ctx context.Context, filter []string) (bytes uint64, err error) {
	c, f, err := a.filtered(filter)
	if err != nil {
		return 0, err
	}
	res, err := c.ContainerPrune(ctx, client.ContainerPruneOptions{Filters: f})
	if err != nil {
		return 0, err
	}
	a.pruned("Deleted containers", res.Report.ContainersDeleted)
	return res.Report.SpaceReclaimed, nil
}

func (a *app) pruned(title string, names []string) {
	if len(names) > 0 {
		fmt.Fprintln(a.Out, title+":")
		for _, n := range names {
			fmt.Fprintln(a.Out, n)
		}
		fmt.Fprintln(a.Out)
	}
}

// reclaimed says what a prune came to.
func (a *app) reclaimed(bytes uint64, err error) error {
	if err == nil {
		fmt.Fprintln(a.Out, "Total reclaimed space: "+units.HumanSizeWithPrecision(float64(bytes), 3))
	}
	return err
}

// confirm asks the user; anything but yes means no.
func (a *app) confirm(what string) bool {
	fmt.Fprint(a.Out, what+" Go on? [y/N] ")
	var answer string
	if _, err := fmt.Fscanln(a.In, &answer); err != nil && answer == "" {
		fmt.Fprintln(a.Out)
		return false
	}
	answer = strings.ToLower(strings.TrimSpace(answer))
	return answer == "y" || answer == "yes"
}

// inspectAll gathers objects, prints those that were found and reports the others.
func (a *app) inspectAll(names []string, format string, get func(*client.Client, string) (any, error)) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	var objects []any
	var failed []string
	for _, n := range names {
		o, err := get(c, n)
		if err != nil {
			failed = append(failed, a.explain(err))
			continue
		}
		objects = append(objects, o)
	}
	if err := inspectPrint(a.Out, objects, format); err != nil {
		return err
	}
	if len(failed) > 0 {
		return &exitError{exitGeneral, strings.Join(failed, "\nhako: ")}
	}
	return nil
}

var networkList = list{
	table:   `{{.ID}}\t{{.Name}}\t{{.Driver}}\t{{.Scope}}`,
	headers: map[string]string{"ID": "NETWORK ID", "Name": "NAME", "Driver": "DRIVER", "Scope": "SCOPE", "IPv4": "IPV4", "IPv6": "IPV6", "Internal": "INTERNAL", "Labels": "LABELS", "CreatedAt": "CREATED AT"},
	quiet:   "ID",
}

type networkRow struct {
	n     network.Network
	trunc bool
}

func (r networkRow) ID() string {
	if r.trunc {
		return shortID(r.n.ID)
	}
	return r.n.ID
}
func (r networkRow) Name() string             { return r.n.Name }
func (r networkRow) Driver() string           { return r.n.Driver }
func (r networkRow) Scope() string            { return r.n.Scope }
func (r networkRow) IPv4() string             { return fmt.Sprint(r.n.EnableIPv4) }
func (r networkRow) IPv6() string             { return fmt.Sprint(r.n.EnableIPv6) }
func (r networkRow) Internal() string         { return fmt.Sprint(r.n.Internal) }
func (r networkRow) Labels() string           { return joinMap(r.n.Labels) }
func (r networkRow) Label(name string) string { return r.n.Labels[name] }
func (r networkRow) CreatedAt() string        { return r.n.Created.Format(time.RFC3339) }

func (a *app) networkCommand() *cobra.Command {
	inspectFormat, yes, force := "", false, false
	inspect := &cobra.Command{Use: "inspect [OPTIONS] NETWORK...", Short: "Show everything about networks", Args: needNames("a network"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.inspectAll(args, inspectFormat, func(c *client.Client, name string) (any, error) {
				res, err := c.NetworkInspect(cmd.Context(), name, client.NetworkInspectOptions{})
				return res.Network, err
			})
		}}
	inspect.Flags().StringVarP(&inspectFormat, "format", "f", "", `"json" or a Go template`)

	rm := &cobra.Command{Use: "rm NETWORK...", Short: "Remove networks", Args: needNames("a network"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onContainers(cmd, args, func(c *client.Client, name string) error {
				_, err := c.NetworkRemove(cmd.Context(), name, client.NetworkRemoveOptions{})
				return err
			})
		}}

	disconnect := &cobra.Command{Use: "disconnect [OPTIONS] NETWORK CONTAINER", Short: "Take a container off a network", Args: needArgs(2, 2, "a network and a container"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			_, err = c.NetworkDisconnect(cmd.Context(), args[0], client.NetworkDisconnectOptions{Container: args[1], Force: force})
			return err
		}}
	disconnect.Flags().BoolVarP(&force, "force", "f", false, "do it even if the container does not answer")

	prune := &cobra.Command{Use: "prune [OPTIONS]", Short: "Remove networks that no container uses", Args: cobra.NoArgs}
	pruneFilter := prune.Flags().StringArray("filter", nil, "only networks that match KEY=VALUE")
	prune.Flags().BoolVarP(&yes, "force", "f", false, "do not ask")
	prune.RunE = func(cmd *cobra.Command, args []string) error {
		if !yes && !a.confirm("This removes all networks that no container uses.") {
			return nil
		}
		return a.pruneNetworks(cmd.Context(), *pruneFilter)
	}
	return group("network", "Manage networks", a.networkCreate(), a.networkLs(), inspect, a.networkConnect(), disconnect, rm, prune)
}

func (a *app) pruneNetworks(ctx context.Context, filter []string) error {
	c, f, err := a.filtered(filter)
	if err != nil {
		return err
	}
	res, err := c.NetworkPrune(ctx, client.NetworkPruneOptions{Filters: f})
	if err != nil {
		return err
	}
	if len(res.Report.NetworksDeleted) > 0 {
		io.WriteString(a.Out, "Deleted networks:\n"+strings.Join(res.Report.NetworksDeleted, "\n")+"\n")
	}
	return nil
}

func (a *app) networkLs() *cobra.Command {
	var quiet, noTrunc bool
	var format string
	ls := &cobra.Command{Use: "ls [OPTIONS]", Aliases: []string{"list"}, Short: "List networks", Args: cobra.NoArgs}
	filter := filterFlag(ls.Flags(), "networks")
	ls.Flags().BoolVarP(&quiet, "quiet", "q", false, "only ids")
	ls.Flags().BoolVar(&noTrunc, "no-trunc", false, "do not shorten ids")
	ls.Flags().StringVar(&format, "format", "", formatHelp)
	ls.RunE = func(cmd *cobra.Command, args []string) error {
		c, f, err := a.filtered(*filter)
		if err != nil {
			return err
		}
		res, err := c.NetworkList(cmd.Context(), client.NetworkListOptions{Filters: f})
		if err != nil {
			return err
		}
		rows := make([]any, len(res.Items))
		for i, n := range res.Items {
			rows[i] = networkRow{n.Network, !noTrunc}
		}
		l := networkList
		l.whole = noTrunc
		return l.print(a.Out, rows, format, quiet)
	}
	return ls
}

func (a *app) networkCreate() *cobra.Command {
	var o client.NetworkCreateOptions
	var ipv4, ipv6 bool
	var subnets, gateways, ranges, aux, labels, opts []string
	cmd := &cobra.Command{Use: "create [OPTIONS] NETWORK", Short: "Create a network", Args: needArgs(1, 1, "a name"),
		Example: "  hako network create backend\n  hako network create --subnet 10.10.0.0/24 --ipv6 --internal backend"}
	fs := cmd.Flags()
	fs.StringVarP(&o.Driver, "driver", "d", "bridge", "network driver")
	fs.BoolVar(&o.Internal, "internal", false, "no way out of the network")
	fs.BoolVar(&o.Attachable, "attachable", false, "let containers join by hand")
	fs.BoolVar(&ipv4, "ipv4", true, "give IPv4 addresses")
	fs.BoolVar(&ipv6, "ipv6", false, "give IPv6 addresses")
	fs.StringArrayVar(&subnets, "subnet", nil, "subnet, e.g. 10.10.0.0/24")
	fs.StringArrayVar(&gateways, "gateway", nil, "gateway in a subnet")
	fs.StringArrayVar(&ranges, "ip-range", nil, "part of a subnet to give addresses from")
	fs.StringArrayVar(&aux, "aux-address", nil, "NAME=IP that is never given")
	fs.StringArrayVar(&labels, "label", nil, "set label KEY=VALUE")
	fs.StringArrayVarP(&opts, "opt", "o", nil, "option KEY=VALUE of the driver")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := a.client()
		if err != nil {
			return err
		}
		if fs.Changed("ipv4") {
			o.EnableIPv4 = &ipv4
		}
		if fs.Changed("ipv6") {
			o.EnableIPv6 = &ipv6
		}
		o.Labels, o.Options = mapFlag(labels), mapFlag(opts)
		if o.IPAM, err = parseIPAM(subnets, gateways, ranges, aux); err != nil {
			return err
		}
		res, err := c.NetworkCreate(cmd.Context(), args[0], o)
		if err != nil {
			return err
		}
		for _, w := range res.Warning {
			if w != "" {
				fmt.Fprintln(a.Err, "hako: warning: "+w)
			}
		}
		fmt.Fprintln(a.Out, res.ID)
		return nil
	}
	return cmd
}

// parseIPAM assigns gateways, ranges and reserved addresses to the subnet that holds them.
func parseIPAM(subnets, gateways, ranges, aux []string) (*network.IPAM, error) {
	ipam := &network.IPAM{}
	for _, s := range subnets {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, usage("bad --subnet %q: expected ADDRESS/BITS", s)
		}
		ipam.Config = append(ipam.Config, network.IPAMConfig{Subnet: p.Masked()})
	}
	holder := func(ip netip.Addr) *network.IPAMConfig {
		for i := range ipam.Config {
			if ipam.Config[i].Subnet.Contains(ip) {
				return &ipam.Config[i]
			}
		}
		return nil
	}
	for _, s := range gateways {
		ip, err := netip.ParseAddr(s)
		if err != nil {
			return nil, usage("bad --gateway %q: not an IP address", s)
		}
		c := holder(ip)
		if c == nil {
			return nil, usage("no --subnet holds the gateway %s", s)
		}
		c.Gateway = ip
	}
	for _, s := range ranges {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, usage("bad --ip-range %q: expected ADDRESS/BITS", s)
		}
		c := holder(p.Addr())
		if c == nil {
			return nil, usage("no --subnet holds the range %s", s)
		}
		c.IPRange = p
	}
	for _, s := range aux {
		name, v, _ := strings.Cut(s, "=")
		ip, err := netip.ParseAddr(v)
		if err != nil {
			return nil, usage("bad --aux-address %q: expected NAME=IP", s)
		}
		c := holder(ip)
		if c == nil {
			return nil, usage("no --subnet holds the address %s", v)
		}
		if c.AuxAddress == nil {
			c.AuxAddress = map[string]netip.Addr{}
		}
		c.AuxAddress[name] = ip
	}
	return ipam, nil
}

func (a *app) networkConnect() *cobra.Command {
	var ip4, ip6, mac string
	ep := &network.EndpointSettings{}
	cmd := &cobra.Command{Use: "connect [OPTIONS] NETWORK CONTAINER", Short: "Join a container to a network", Args: needArgs(2, 2, "a network and a container"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := setAddresses(ep, ip4, ip6, mac); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			_, err = c.NetworkConnect(cmd.Context(), args[0], client.NetworkConnectOptions{Container: args[1], EndpointConfig: ep})
			return err
		}}
	fs := cmd.Flags()
	fs.StringArrayVar(&ep.Aliases, "alias", nil, "further name of the container on the network")
	fs.StringVar(&ip4, "ip", "", "IPv4 address")
	fs.StringVar(&ip6, "ip6", "", "IPv6 address")
	fs.StringVar(&mac, "mac-address", "", "MAC address")
	fs.StringArrayVar(&ep.Links, "link", nil, "make another container known under an alias: NAME[:ALIAS]")
	fs.IntVar(&ep.GwPriority, "gw-priority", 0, "the network with the highest priority gives the default route")
	return cmd
}
