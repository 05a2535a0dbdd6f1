package network

import (
	"bufio"
	"bytes"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// EmbeddedDNS is the address at which a container on a user-defined network finds names.
var EmbeddedDNS = netip.AddrFrom4([4]byte{127, 0, 0, 11})

// fallbackServers are used, as in Docker, when the host has no resolver that a container could reach.
func fallbackServers() []netip.Addr {
	return []netip.Addr{netip.AddrFrom4([4]byte{8, 8, 8, 8}), netip.AddrFrom4([4]byte{8, 8, 4, 4})}
}

// resolvedConf is where systemd-resolved lists the real servers behind its loopback stub.
const resolvedConf = "/run/systemd/resolve/resolv.conf"

// Resolver is the content of a resolv.conf(5) file.
type Resolver struct {
	Servers []netip.Addr // zones are kept
	Search  []string
	Options []string
}

// ParseResolvConf reads a resolv.conf(5) file; what it does not understand it leaves out.
func ParseResolvConf(data []byte) Resolver {
	var r Resolver
	sc := bufio.NewScanner(bytes.NewReader(data))
	for sc.Scan() {
		line := sc.Text()
		if i := strings.IndexAny(line, "#;"); i >= 0 {
			line = line[:i]
		}
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(f[1]); err == nil {
				r.Servers = append(r.Servers, a)
			}
		case "search", "domain": // the last of them wins
			r.Search = f[1:]
		case "options":
			r.Options = append(r.Options, f[1:]...)
		}
	}
	return r
}

// ResolvConf gives the content of a container's resolv.conf: base (the host's) with
// those parts replaced that are not nil. A search list of one "." means none.
func ResolvConf(base []byte, servers []netip.Addr, search, options []string) []byte {
	r := ParseResolvConf(base)
	if servers != nil {
		r.Servers = servers
	}
	if search != nil {
		r.Search = search
	}
	if options != nil {
		r.Options = options
	}
	var b bytes.Buffer
	for _, s := range r.Servers {
		b.WriteString("nameserver " + s.String() + "\n")
	}
	if len(r.Search) > 0 && !(len(r.Search) == 1 && r.Search[0] == ".") {
		b.WriteString("search " + strings.Join(r.Search, " ") + "\n")
	}
	if len(r.Options) > 0 {
		b.WriteString("options " + strings.Join(r.Options, " ") + "\n")
	}
	return b.Bytes()
}

// HostEntry is one line of a hosts(5) file.
type HostEntry struct {
	Addr  netip.Addr
	Names []string
}

// Hosts gives the content of a container's hosts file: the usual lines for the
// loopback, then the entries in order. Without ipv6 only the IPv4 line is written.
func Hosts(ipv6 bool, entries []HostEntry) []byte {
	var b bytes.Buffer
	b.WriteString("127.0.0.1\tlocalhost\n")
	if ipv6 {
		b.WriteString("::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
	}
	for _, e := range entries {
		if e.Addr.IsValid() && len(e.Names) > 0 {
			b.WriteString(e.Addr.String() + "\t" + strings.Join(e.Names, " ") + "\n")
		}
	}
	return b.Bytes()
}

// Hostname gives the content of a container's hostname file.
func Hostname(name string) []byte { return []byte(name + "\n") }

// hostResolver reads the host's resolv.conf. A file that is missing counts as empty: resolv.conf(5)
// then means a server on the local machine.
func hostResolver(path string) Resolver {
	data, err := os.ReadFile(path)
	if err != nil {
		return Resolver{}
	}
	return ParseResolvConf(data)
}

// reachableServers are the host's servers that a container can reach from its own
// namespace: loopback stubs are replaced by what is behind them, or by public servers.
func reachableServers(path string) []netip.Addr {
	noLoopback := func(s []netip.Addr) []netip.Addr {
		return slices.DeleteFunc(s, func(a netip.Addr) bool { return a.IsLoopback() || a.Zone() != "" })
	}
	if s := noLoopback(hostResolver(path).Servers); len(s) > 0 {
		return s
	}
	if s := noLoopback(hostResolver(resolvedConf).Servers); len(s) > 0 {
		return s
	}
	return fallbackServers()
}
