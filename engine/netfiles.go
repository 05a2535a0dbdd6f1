package engine

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hako-engine/hako/network"
)

// hostResolvConf is what the host itself resolves with.
const hostResolvConf = "/etc/resolv.conf"

// containerResolvConf makes a container's resolv.conf of the host's, the networks' and
// the client's. On a user-defined network the network's own server stays, because it
// alone knows the names of other containers.
func containerResolvConf(host []byte, c Config, eps []network.Endpoint) []byte {
	var servers []netip.Addr
	embedded := false
	for _, ep := range eps {
		if len(ep.Nameservers) > 0 && !embedded {
			servers = ep.Nameservers
			embedded = slices.Contains(servers, network.EmbeddedDNS)
		}
	}
	if len(c.DNS) > 0 && !embedded {
		servers = c.DNS
	}
	options := c.DNSOptions
	if embedded && !slices.ContainsFunc(options, func(o string) bool { return strings.HasPrefix(o, "ndots:") }) {
		if options == nil {
			options = network.ParseResolvConf(host).Options
		}
		options = append(slices.Clone(options), "ndots:0")
	}
	return network.ResolvConf(host, servers, c.DNSSearch, options)
}

// hostsInput is what a hosts file is made of.
type hostsInput struct {
	hostname, domain string
	endpoints        []network.Endpoint
	extra            []string // name:address
	gateway          netip.Addr
	links            []network.HostEntry
	base             []byte // the host's own file, with the host's network
	noIPv6           bool   // not even ::1 is there
}

func hostsFile(in hostsInput) []byte {
	var entries []network.HostEntry
	for _, h := range in.extra {
		name, addr, ok := cutHost(h)
		if !ok {
			continue
		}
		a, err := netip.ParseAddr(addr)
		if addr == "host-gateway" {
			a, err = in.gateway, nil
		}
		if err == nil {
			entries = append(entries, network.HostEntry{Addr: a, Names: []string{name}})
		}
	}
	entries = append(entries, in.links...)
	full := in.hostname
	if in.domain != "" {
		full += "." + in.domain
	}
	own := []string{full}
	if short, _, ok := strings.Cut(full, "."); ok {
		own = append(own, short)
	}
	for _, ep := range in.endpoints {
		for _, p := range []netip.Prefix{ep.IPv4, ep.IPv6} {
			if p.IsValid() {
				entries = append(entries, network.HostEntry{Addr: p.Addr(), Names: own})
			}
		}
	}
	if in.base == nil {
		return network.Hosts(!in.noIPv6, entries)
	}
	// The host's own lines instead of the usual ones.
	_, lines, _ := bytes.Cut(network.Hosts(false, entries), []byte("\n"))
	base := bytes.TrimRight(in.base, "\n")
	return slices.Concat(base, []byte("\n"), lines)
}

// touchNetFiles makes the files that are bound over /etc/hosts, /etc/hostname and
// /etc/resolv.conf, so that they can be mounted while their content is not known yet.
func touchNetFiles(v Container) error {
	for _, p := range []string{v.HostnamePath, v.HostsPath, v.ResolvPath} {
		f, err := os.OpenFile(p, os.O_WRONLY|os.O_CREATE, 0o644)
		if err != nil {
			return err
		}
		err = f.Chmod(0o644)
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// writeNetFiles fills them. They are written in place: a running container has the
// inodes mounted.
func (e *Engine) writeNetFiles(ctx context.Context, v Container, eps []network.Endpoint) error {
	c := v.Config
	if strings.HasPrefix(c.NetworkMode, "container:") {
		return nil // the files are the other container's
	}
	hostNet := c.NetworkMode == "host"
	in := hostsInput{hostname: v.Hostname, domain: c.Domainname, endpoints: eps, extra: c.ExtraHosts, links: e.linkEntries(v, eps),
		noIPv6: c.Sysctls["net.ipv6.conf.all.disable_ipv6"] == "1" || c.Sysctls["net.ipv6.conf.lo.disable_ipv6"] == "1"}
	if hostNet {
		in.base, _ = os.ReadFile("/etc/hosts")
		if in.base == nil {
			in.base = []byte{}
		}
	}
	if slices.ContainsFunc(c.ExtraHosts, func(h string) bool { return strings.HasSuffix(h, "host-gateway") }) {
		gw, err := e.opt.Networks.HostGateway(ctx)
		if err != nil {
			return fmt.Errorf("address for host-gateway: %w", err)
		}
		in.gateway = gw
	}
	host, _ := os.ReadFile(hostResolvConf) // a missing one is an empty one
	for _, f := range []struct {
		path string
		data []byte
	}{
		{v.HostnamePath, network.Hostname(v.Hostname)},
		{v.HostsPath, hostsFile(in)},
		{v.ResolvPath, containerResolvConf(host, c, eps)},
	} {
		if err := os.WriteFile(f.path, f.data, 0o644); err != nil {
			return fmt.Errorf("write %s of container %s: %w", filepath.Base(f.path), v.ID, err)
		}
	}
	return nil
}

// linkEntries are the hosts entries of --link: the other container's address on a
// common network.
func (e *Engine) linkEntries(v Container, eps []network.Endpoint) []network.HostEntry {
	links, networks := v.Config.Links, v.Attached
	for _, s := range networks {
		links = append(slices.Clone(links), s.Links...)
	}
	var out []network.HostEntry
	for _, l := range links {
		ref, alias, ok := strings.Cut(l, ":")
		if !ok {
			alias = strings.TrimPrefix(ref, "/")
		}
		other, err := e.containers.get(ref)
		if err != nil {
			continue
		}
		o := other.view()
		for _, oep := range o.Endpoints {
			if !oep.IPv4.IsValid() || !slices.ContainsFunc(eps, func(ep network.Endpoint) bool { return ep.NetworkID == oep.NetworkID }) {
				continue
			}
			names := []string{alias}
			for _, n := range []string{o.Hostname, o.Name} {
				if !slices.Contains(names, n) {
					names = append(names, n)
				}
			}
			out = append(out, network.HostEntry{Addr: oep.IPv4.Addr(), Names: names})
			break
		}
	}
	return out
}
