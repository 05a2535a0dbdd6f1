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

// hostResolvConf is where the host's resolver configuration lies. With systemd-resolved
// the first one names only a stub on loopback; the second one what is behind it.
const (
	hostResolvConf     = "/etc/resolv.conf"
	resolvedResolvConf = "/run/systemd/resolve/resolv.conf"
)

// resolvConf is a resolver configuration.
type resolvConf struct {
	servers []netip.Addr
	search  []string
	options []string
}

// parseResolvConf reads resolv.conf(5).
func parseResolvConf(b []byte) resolvConf {
	var r resolvConf
	for line := range bytes.Lines(b) {
		f := strings.Fields(string(line))
		if len(f) < 2 || f[0][0] == '#' || f[0][0] == ';' {
			continue
		}
		switch f[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(f[1]); err == nil {
				r.servers = append(r.servers, a)
			}
		case "search":
			r.search = f[1:]
		case "domain":
			r.search = f[1:2]
		case "options":
			r.options = append(r.options, f[1:]...)
		}
	}
	return r
}

func (r resolvConf) bytes() []byte {
	var b bytes.Buffer
	for _, a := range r.servers {
		fmt.Fprintf(&b, "nameserver %s\n", a)
	}
	if len(r.search) > 0 && !(len(r.search) == 1 && r.search[0] == ".") {
		fmt.Fprintf(&b, "search %s\n", strings.Join(r.search, " "))
	}
	if len(r.options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(r.options, " "))
	}
	return b.Bytes()
}

// containerResolvConf makes a container's configuration of the host's, the networks'
// and the client's. A host's loopback server cannot be reached from another network
// namespace and is left out.
func containerResolvConf(host []byte, c Config, eps []network.Endpoint, hostNet bool) resolvConf {
	r := parseResolvConf(host)
	if !hostNet {
		r.servers = slices.DeleteFunc(r.servers, func(a netip.Addr) bool { return a.IsLoopback() })
	}
	if len(c.DNS) > 0 {
		r.servers = c.DNS
	}
	if len(c.DNSSearch) > 0 {
		r.search = c.DNSSearch
	}
	if len(c.DNSOptions) > 0 {
		r.options = c.DNSOptions
	}
	for _, ep := range eps {
		if len(ep.Nameservers) > 0 { // the network's own server forwards to the others
			r.servers = ep.Nameservers
			if !slices.ContainsFunc(r.options, func(o string) bool { return strings.HasPrefix(o, "ndots:") }) {
				r.options = append(slices.Clone(r.options), "ndots:0")
			}
			return r
		}
	}
	if len(r.servers) == 0 && !hostNet {
		r.servers = []netip.Addr{netip.AddrFrom4([4]byte{8, 8, 8, 8}), netip.AddrFrom4([4]byte{8, 8, 4, 4})}
	}
	return r
}

// readHostResolvConf reads what the host resolves with.
func readHostResolvConf() []byte {
	b, _ := os.ReadFile(hostResolvConf)
	r := parseResolvConf(b)
	if len(r.servers) == 1 && r.servers[0] == netip.AddrFrom4([4]byte{127, 0, 0, 53}) {
		if up, err := os.ReadFile(resolvedResolvConf); err == nil {
			return up
		}
	}
	return b
}

// hostsInput is what a hosts file is made of.
type hostsInput struct {
	hostname, domain string
	endpoints        []network.Endpoint
	extra            []string // name:address
	gateway          netip.Addr
	links            []hostEntry
	base             []byte // the host's own file, with the host's network
}

type hostEntry struct {
	addr  string
	names []string
}

func hostsFile(in hostsInput) []byte {
	var b bytes.Buffer
	v6 := slices.ContainsFunc(in.endpoints, func(ep network.Endpoint) bool { return ep.IPv6.IsValid() })
	if in.base != nil {
		b.Write(in.base)
		if n := len(in.base); n > 0 && in.base[n-1] != '\n' {
			b.WriteByte('\n')
		}
	} else {
		b.WriteString("127.0.0.1\tlocalhost\n")
		if v6 || len(in.endpoints) == 0 {
			b.WriteString("::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff00::\tip6-mcastprefix\n" +
				"ff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
		}
	}
	for _, h := range in.extra {
		name, addr, ok := cutHost(h)
		if !ok {
			continue
		}
		if addr == "host-gateway" {
			if !in.gateway.IsValid() {
				continue
			}
			addr = in.gateway.String()
		}
		fmt.Fprintf(&b, "%s\t%s\n", addr, name)
	}
	for _, l := range in.links {
		fmt.Fprintf(&b, "%s\t%s\n", l.addr, strings.Join(l.names, " "))
	}
	own := in.hostname
	if in.domain != "" {
		own = in.hostname + "." + in.domain + " " + in.hostname
	}
	for _, ep := range in.endpoints {
		for _, p := range []netip.Prefix{ep.IPv4, ep.IPv6} {
			if p.IsValid() {
				fmt.Fprintf(&b, "%s\t%s\n", p.Addr(), own)
			}
		}
	}
	return b.Bytes()
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
	in := hostsInput{hostname: v.Hostname, domain: c.Domainname, endpoints: eps, extra: c.ExtraHosts, links: e.linkEntries(v, eps)}
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
	hostname := v.Hostname
	if c.Domainname != "" {
		hostname += "." + c.Domainname
	}
	resolv := containerResolvConf(readHostResolvConf(), c, eps, hostNet)
	for _, f := range []struct {
		path string
		data []byte
	}{
		{v.HostnamePath, []byte(hostname + "\n")},
		{v.HostsPath, hostsFile(in)},
		{v.ResolvPath, resolv.bytes()},
	} {
		if err := os.WriteFile(f.path, f.data, 0o644); err != nil {
			return fmt.Errorf("write %s of container %s: %w", filepath.Base(f.path), v.ID, err)
		}
	}
	return nil
}

// linkEntries are the hosts entries of --link: the other container's address on a
// common network.
func (e *Engine) linkEntries(v Container, eps []network.Endpoint) []hostEntry {
	links := v.Config.Links
	for _, s := range v.Config.Endpoints {
		links = append(slices.Clone(links), s.Links...)
	}
	var out []hostEntry
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
			for _, n := range []string{o.Name, shortID(o.ID)} {
				if n != alias {
					names = append(names, n)
				}
			}
			out = append(out, hostEntry{oep.IPv4.Addr().String(), names})
			break
		}
	}
	return out
}
