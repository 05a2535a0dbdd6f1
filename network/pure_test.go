package network

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/network/internal/nstest"
)

var update = flag.Bool("update", false, "write the golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (go test -update writes it):\n--- got\n%s--- want\n%s", name, got, want)
	}
}

func addr(s string) netip.Addr {
	if s == "" {
		return netip.Addr{}
	}
	return netip.MustParseAddr(s)
}

func TestPool(t *testing.T) {
	s := Subnet{Prefix: netip.MustParsePrefix("192.0.2.0/29"), Gateway: addr("192.0.2.1"), Reserved: map[string]netip.Addr{"printer": addr("192.0.2.3")}}
	p, err := newPool(s)
	if err != nil {
		t.Fatal(err)
	}
	take := func(holder, want, got string, class error) {
		t.Helper()
		a, err := p.take(holder, addr(want))
		if a != addr(got) || !errors.Is(err, class) {
			t.Errorf("take(%s, %q) = %v, %v; want %s, %v", holder, want, a, err, got, class)
		}
	}
	take("a", "", "192.0.2.2", nil)
	take("b", "", "192.0.2.4", nil)
	p.release("a", addr("192.0.2.2"))
	take("c", "", "192.0.2.5", nil) // not the one just released
	take("d", "192.0.2.5", "", errdefs.ErrAlreadyExists)
	take("d", "192.0.2.1", "", errdefs.ErrInvalidArgument)
	take("d", "192.0.2.3", "", errdefs.ErrInvalidArgument)
	take("d", "192.0.2.7", "", errdefs.ErrInvalidArgument)
	take("d", "192.0.3.2", "", errdefs.ErrInvalidArgument)
	take("d", "2001:db8::1", "", errdefs.ErrInvalidArgument)
	take("d", "192.0.2.6", "192.0.2.6", nil)
	take("e", "", "192.0.2.2", nil)
	take("f", "", "", errdefs.ErrResourceExhausted)
	p.release("x", addr("192.0.2.2")) // not the holder
	take("f", "", "", errdefs.ErrResourceExhausted)
	p.release("e", addr("192.0.2.2"))
	take("f", "", "192.0.2.2", nil)

	for _, bad := range []Subnet{
		{},
		{Prefix: s.Prefix, Gateway: addr("192.0.3.1")},
		{Prefix: s.Prefix, Range: netip.MustParsePrefix("192.0.2.0/28")},
		{Prefix: s.Prefix, Range: netip.MustParsePrefix("192.0.3.0/30")},
		{Prefix: s.Prefix, Reserved: map[string]netip.Addr{"x": addr("10.0.0.1")}},
	} {
		if _, err := newPool(bad); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("newPool(%+v): %v", bad, err)
		}
	}
}

// TestPoolModel compares the pool with the definition: an address has at most one holder, a
// blocked one has none, and an automatic request fails only if the range is full.
func TestPoolModel(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		base := netip.MustParsePrefix([]string{"10.1.2.0/28", "10.1.2.0/24", "fd00::/124", "192.0.2.4/31", "192.0.2.4/32"}[r.IntN(5)])
		s := Subnet{Prefix: base}
		if base.Bits() < 30 {
			s.Gateway = base.Addr().Next()
			if r.IntN(2) == 0 {
				s.Range = netip.PrefixFrom(base.Addr(), base.Bits()+1)
			}
		}
		p, err := newPool(s)
		if err != nil {
			t.Fatal(err)
		}
		model := map[netip.Addr]string{}
		for i := range 400 {
			holder := fmt.Sprint("h", i)
			if r.IntN(3) > 0 {
				a, err := p.take(holder, netip.Addr{})
				if err != nil {
					for x := p.span.Addr(); p.span.Contains(x); x = x.Next() {
						if _, blocked := p.blocked[x]; model[x] == "" && !blocked {
							t.Fatalf("seed %d: %s is free, but: %v", seed, x, err)
						}
						if !x.Next().IsValid() {
							break
						}
					}
					continue
				}
				if _, blocked := p.blocked[a]; blocked || model[a] != "" || !p.span.Contains(a) {
					t.Fatalf("seed %d: %s was given out twice or is blocked", seed, a)
				}
				model[a] = holder
			} else {
				for a, h := range model {
					p.release(h, a)
					delete(model, a)
					break
				}
			}
		}
	}
}

func FuzzParseResolvConf(f *testing.F) {
	f.Add([]byte("nameserver 192.0.2.1\nsearch a b\noptions ndots:2 # x\n"))
	f.Add([]byte("nameserver fe80::1%eth0\ndomain x\n;nameserver 1.1.1.1"))
	f.Fuzz(func(t *testing.T, data []byte) {
		once := ResolvConf(data, nil, nil, nil)
		if twice := ResolvConf(once, nil, nil, nil); string(twice) != string(once) {
			t.Errorf("%q becomes %q, then %q", data, once, twice)
		}
	})
}

func FuzzReverse(f *testing.F) {
	f.Add("2.1.0.10.in-addr.arpa.")
	f.Add("1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa.")
	f.Fuzz(func(t *testing.T, name string) { reverseAddr(name) })
}

func TestChoose(t *testing.T) {
	pools := []Pool{{netip.MustParsePrefix("10.0.0.0/15"), 16}, {netip.MustParsePrefix("fd00::/62"), 64}, {netip.MustParsePrefix("255.255.255.0/24"), 25}}
	var used []netip.Prefix
	for _, want := range []string{"10.0.0.0/16", "10.1.0.0/16", "255.255.255.0/25", "255.255.255.128/25", ""} {
		got, err := choose(pools, used, true)
		if want == "" {
			if !errors.Is(err, errdefs.ErrResourceExhausted) {
				t.Errorf("got %v, %v", got, err)
			}
			break
		}
		if err != nil || got.String() != want {
			t.Errorf("got %v, %v; want %s", got, err, want)
		}
		used = append(used, got)
	}
	got, err := choose(pools, []netip.Prefix{netip.MustParsePrefix("fd00::/64"), netip.MustParsePrefix("fd00:0:0:1:8000::/65")}, false)
	if err != nil || got.String() != "fd00:0:0:2::/64" {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestResolvConf(t *testing.T) {
	base := []byte("# made by hand\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\nnameserver nonsense\ndomain old.test\nsearch a.test b.test\noptions ndots:3\noptions rotate ; yes\n")
	var b strings.Builder
	for _, x := range []struct {
		servers         []netip.Addr
		search, options []string
	}{
		{},
		{servers: []netip.Addr{EmbeddedDNS}, options: []string{"ndots:0"}},
		{search: []string{"."}, options: []string{}},
		{servers: []netip.Addr{addr("2001:db8::53")}, search: []string{"c.test"}},
	} {
		fmt.Fprintf(&b, "servers %v, search %q, options %q:\n%s\n", x.servers, x.search, x.options, ResolvConf(base, x.servers, x.search, x.options))
	}
	golden(t, "resolvconf.golden", b.String())
}

func TestHosts(t *testing.T) {
	entries := []HostEntry{{addr("192.0.2.2"), []string{"web.example.test", "web"}}, {addr("2001:db8::2"), []string{"web"}}, {}, {addr("192.0.2.1"), []string{"host.docker.internal"}}}
	golden(t, "hosts.golden", "IPv4:\n"+string(Hosts(false, entries))+"\nIPv6:\n"+string(Hosts(true, entries)))
}

func TestReachableServers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	for _, x := range []struct{ content, want string }{
		{"nameserver 127.0.0.53\nnameserver 192.0.2.1\n", "[192.0.2.1]"},
		{"nameserver fe80::1%eth0\nnameserver 2001:db8::1\n", "[2001:db8::1]"},
	} {
		if err := os.WriteFile(path, []byte(x.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(reachableServers(path)); got != x.want {
			t.Errorf("%q: got %s, want %s", x.content, got, x.want)
		}
	}
	if got := reachableServers(filepath.Join(t.TempDir(), "none")); len(got) == 0 || slices.ContainsFunc(got, netip.Addr.IsLoopback) {
		t.Errorf("without a file: %v", got)
	}
}

// rulesText gives the table as nft(8) lists it, without elements.
func rulesText(table string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "table inet %s {\n", table)
	for _, s := range hostSets() {
		kind, typ := "set", s.KeyType.Name
		if s.IsMap {
			kind, typ = "map", s.KeyType.Name+" : "+s.DataType.Name
		}
		fmt.Fprintf(&b, "\t%s %s {\n\t\ttype %s\n", kind, s.Name, typ)
		if s.Interval {
			b.WriteString("\t\tflags interval\n")
		}
		b.WriteString("\t}\n\n")
	}
	for i, c := range hostChains() {
		if i > 0 {
			b.WriteString("\n")
		}
		fmt.Fprintf(&b, "\tchain %s {\n\t\ttype %s; policy accept;\n", c.name, c.label)
		for _, r := range c.rules {
			fmt.Fprintf(&b, "\t\t%s\n", strings.Join(r.text, " "))
		}
		b.WriteString("\t}\n")
	}
	b.WriteString("}\n")
	return b.String()
}

func TestRules(t *testing.T) {
	golden(t, "rules.golden", rulesText("hako"))
}

// TestRulesInKernel compares the golden text with what nft(8) says that the kernel has.
func TestRulesInKernel(t *testing.T) {
	nstest.NeedRoot(t)
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft: " + t.Name())
	}
	f := newFirewall("hako-golden")
	if err := f.build(); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("nft", "list", "table", "inet", f.name).CombinedOutput()
	if err != nil {
		t.Fatal(err, string(out))
	}
	// nft leaves out what follows from the rest of a rule, and has no name for dstnat in every hook.
	plain := func(s string) string {
		s = regexp.MustCompile(`meta nfproto ipv[46] `).ReplaceAllString(s, "")
		return strings.ReplaceAll(s, "output priority -100", "output priority dstnat")
	}
	if got, want := plain(string(out)), plain(rulesText(f.name)); got != want {
		t.Errorf("--- kernel\n%s--- text\n%s", got, want)
	}
	if err := f.clear(); err != nil {
		t.Error(err)
	}
	if exec.Command("nft", "list", "table", "inet", f.name).Run() == nil {
		t.Error("the table is still there")
	}
}

func TestPorts(t *testing.T) {
	p := newPorts(func(netip.Addr) bool { return true })
	to := target{v4: addr("127.0.0.1"), port: 9}
	other, err := net.Listen("tcp", "127.0.0.1:0") // another program of the host
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	taken := uint16(other.Addr().(*net.TCPAddr).Port)
	free, err := p.reserve(PortMapping{ContainerPort: 80}, to)
	if err != nil {
		t.Fatal(err)
	}
	base := free.HostPort
	if base < firstEphemeral || base > lastEphemeral {
		t.Errorf("ephemeral port %d", base)
	}
	var held []*reservation
	defer func() {
		for _, r := range append(held, free) {
			p.release(r)
		}
		if len(p.used) != 0 {
			t.Errorf("still in use: %v", p.used)
		}
	}()
	for _, x := range []struct {
		m     PortMapping
		class error
		text  string
	}{
		{PortMapping{Proto: "tcp", ContainerPort: 80, HostPort: base}, errdefs.ErrAlreadyExists, fmt.Sprintf("Bind for 0.0.0.0:%d failed: port is already allocated", base)},
		{PortMapping{Proto: "tcp", ContainerPort: 80, HostPort: base, HostIP: addr("127.0.0.1")}, errdefs.ErrAlreadyExists, fmt.Sprintf("Bind for 127.0.0.1:%d failed: port is already allocated", base)},
		{PortMapping{Proto: "udp", ContainerPort: 80, HostPort: base, HostIP: addr("127.0.0.1")}, nil, ""},
		{PortMapping{Proto: "udp", ContainerPort: 80, HostPort: base, HostIP: addr("127.0.0.2")}, nil, ""},
		{PortMapping{Proto: "udp", ContainerPort: 80, HostPort: base, HostIP: addr("0.0.0.0")}, errdefs.ErrAlreadyExists, "port is already allocated"},
		{PortMapping{Proto: "sctp", ContainerPort: 80, HostPort: base}, nil, ""},
		{PortMapping{Proto: "tcp", ContainerPort: 80, HostPort: taken}, errdefs.ErrAlreadyExists, "address already in use"},
		{PortMapping{Proto: "tcp", ContainerPort: 80, HostPort: 8080, HostIP: addr("203.0.113.77")}, errdefs.ErrFailedPrecondition, "cannot assign requested address"},
		{PortMapping{Proto: "icmp", ContainerPort: 80}, errdefs.ErrInvalidArgument, "icmp"},
		{PortMapping{Proto: "tcp", HostPort: 80}, errdefs.ErrInvalidArgument, "container port"},
		{PortMapping{Proto: "tcp", ContainerPort: 80, HostPort: 90, HostPortEnd: 80}, errdefs.ErrInvalidArgument, "90-80"},
		{PortMapping{Proto: "tcp", ContainerPort: 80, HostPort: base, HostPortEnd: base + 200}, nil, ""},
		{PortMapping{Proto: "tcp", ContainerPort: 80, HostPort: base, HostPortEnd: base}, errdefs.ErrAlreadyExists, ""},
	} {
		r, err := p.reserve(x.m, to)
		if !errors.Is(err, x.class) || err != nil && !strings.Contains(err.Error(), x.text) {
			t.Errorf("%+v: %v; want %v, %q", x.m, err, x.class, x.text)
		}
		if r != nil {
			held = append(held, r)
			if x.m.HostPortEnd > base && (r.HostPort <= base || r.HostPort > x.m.HostPortEnd) {
				t.Errorf("%+v: got port %d", x.m, r.HostPort)
			}
		}
	}
}

func TestEndpointChecks(t *testing.T) {
	for _, c := range []EndpointConfig{
		{},
		{ID: "x", IfName: "much-too-long-a-name"},
		{ID: "x", IfName: "a/b"},
		{ID: "x", MAC: "01:00:5e:00:00:01"},
		{ID: "x", MAC: "nonsense"},
		{ID: "x", Sysctls: map[string]string{"kernel.core_pattern": "|/x"}},
		{ID: "x", Sysctls: map[string]string{"net.ipv4.conf.all.forwarding": "1"}},
		{ID: "x", Sysctls: map[string]string{"net.ipv4.conf.IFNAME.x/../../../../kernel": "1"}},
		{ID: "x", Sysctls: map[string]string{"net.ipv4.conf.IFNAME.forwarding": "1\n2"}},
	} {
		if _, err := checkEndpoint(c); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func TestFileRecords(t *testing.T) {
	ctx := context.Background()
	r, err := openFileRecords(filepath.Join(t.TempDir(), "x"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.Put(ctx, "a", 1), r.Put(ctx, "b", "two"), r.Put(ctx, "a", 3), r.Delete(ctx, "b"), r.Delete(ctx, "b")); err != nil {
		t.Fatal(err)
	}
	var got []string
	if err := r.ForEach(func(id string, raw []byte) error { got = append(got, id+"="+string(raw)); return nil }); err != nil || fmt.Sprint(got) != "[a=3]" {
		t.Error(got, err)
	}
}
