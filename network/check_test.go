package network

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hako-engine/hako/network/internal/nstest"
)

// kinds gives the kinds of what Check finds, sorted.
func kinds(t *testing.T, o CheckOptions) []string {
	t.Helper()
	found, err := Check(o)
	if err != nil {
		t.Fatal(err)
	}
	out := []string{}
	for _, p := range found {
		if p.Object == "" || p.Detail == "" {
			t.Errorf("%+v", p)
		}
		out = append(out, p.Kind)
	}
	slices.Sort(out)
	return out
}

// TestCheckRecords breaks records one by one.
func TestCheckRecords(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	net := func(id, name, bridge, subnet string) Network {
		p := netip.MustParsePrefix(subnet)
		return Network{ID: id, Name: name, Driver: DriverBridge, EnableIPv4: true, Bridge: bridge, Subnets: []Subnet{{Prefix: p, Gateway: p.Addr().Next()}}}
	}
	end := func(id, network, addr string) endpointState {
		return endpointState{BootID: bootID(), Endpoint: Endpoint{ID: "c" + id, EndpointID: id, NetworkID: network, NetworkName: network, IPv4: netip.MustParsePrefix(addr), MAC: "02:00:00:00:00:0" + id, HostIfName: "veth" + id}}
	}
	for name, c := range map[string]struct {
		change func(nets map[string]Network, ends map[string]endpointState)
		want   []string
	}{
		"good":                        {nil, []string{}},
		"a record of another network": {func(n map[string]Network, _ map[string]endpointState) { a := n["a"]; a.ID = "x"; n["a"] = a }, []string{ProblemRecord}},
		"an unknown driver":           {func(n map[string]Network, _ map[string]endpointState) { a := n["a"]; a.Driver = "x"; n["a"] = a }, []string{ProblemRecord}},
		"a bridge that is none":       {func(n map[string]Network, _ map[string]endpointState) { a := n["a"]; a.Bridge = "../x"; n["a"] = a }, []string{ProblemRecord}},
		"a gateway outside": {func(n map[string]Network, _ map[string]endpointState) {
			a := n["b"]
			a.Subnets = []Subnet{{Prefix: a.Subnets[0].Prefix, Gateway: netip.MustParseAddr("10.9.9.9")}}
			n["b"] = a
		}, []string{ProblemRecord}},
		"two of one name":               {func(n map[string]Network, _ map[string]endpointState) { a := n["a"]; a.Name = "b"; n["a"] = a }, []string{ProblemConflict}},
		"two of one bridge":             {func(n map[string]Network, _ map[string]endpointState) { a := n["a"]; a.Bridge = "hk-b"; n["a"] = a }, []string{ProblemConflict}},
		"subnets that overlap":          {func(n map[string]Network, _ map[string]endpointState) { n["b"] = net("b", "b", "hk-b", "10.1.0.0/16") }, []string{ProblemConflict}},
		"an endpoint without a network": {func(n map[string]Network, _ map[string]endpointState) { delete(n, "a") }, []string{ProblemEndpoint, ProblemEndpoint}},
		"the gateway's address":         {func(_ map[string]Network, e map[string]endpointState) { e["1"] = end("1", "a", "10.1.1.1/24") }, []string{ProblemAddress}},
		"an address outside":            {func(_ map[string]Network, e map[string]endpointState) { e["1"] = end("1", "a", "10.7.0.3/24") }, []string{ProblemAddress}},
		"another length":                {func(_ map[string]Network, e map[string]endpointState) { e["1"] = end("1", "a", "10.1.1.7/16") }, []string{ProblemAddress}},
		"one address twice":             {func(_ map[string]Network, e map[string]endpointState) { e["2"] = end("2", "a", "10.1.1.2/24") }, []string{ProblemAddress}},
		"one interface twice": {func(_ map[string]Network, e map[string]endpointState) {
			s := e["2"]
			s.Endpoint.HostIfName = "veth1"
			e["2"] = s
		}, []string{ProblemAddress}},
		"of nobody": {func(_ map[string]Network, e map[string]endpointState) {
			s := e["2"]
			s.Endpoint.ID = "nobody"
			e["2"] = s
		}, []string{ProblemStray}},
		"of nobody, and going": {func(_ map[string]Network, e map[string]endpointState) {
			s := e["2"]
			s.Endpoint.ID, s.Unfinished = "nobody", true
			e["2"] = s
		}, []string{}},
		"of an earlier boot": {func(_ map[string]Network, e map[string]endpointState) {
			s := end("2", "gone", "10.1.1.2/24")
			s.BootID = "x"
			e["2"] = s
		}, []string{}},
		"under another name": {func(_ map[string]Network, e map[string]endpointState) { e["3"] = e["2"] }, []string{ProblemEndpoint}},
	} {
		nets := map[string]Network{"a": net("a", "a", "hk-a", "10.1.1.0/24"), "b": net("b", "b", "hk-b", "10.2.0.0/24")}
		ends := map[string]endpointState{"1": end("1", "a", "10.1.1.2/24"), "2": end("2", "a", "10.1.1.3/24")}
		if c.change != nil {
			c.change(nets, ends)
		}
		dir := t.TempDir()
		records, err := openFileRecords(filepath.Join(dir, "nets"))
		if err != nil {
			t.Fatal(err)
		}
		for id, n := range nets {
			if err := records.Put(ctx, id, n); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Mkdir(filepath.Join(dir, "endpoints"), 0o700); err != nil {
			t.Fatal(err)
		}
		for id, e := range ends {
			raw, err := json.Marshal(e)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "endpoints", id+".json"), raw, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		owner := func(id string) bool { return strings.HasPrefix(id, "c") }
		if got := kinds(t, CheckOptions{Records: records, State: dir, Owner: owner}); !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
	// No state folder: the machine was rebooted.
	records, err := openFileRecords(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if got := kinds(t, CheckOptions{Records: records, State: "/nonexistent"}); len(got) != 0 {
		t.Errorf("nothing: %q", got)
	}
}

// TestCheckManager finds nothing wrong with what a Manager writes.
func TestCheckManager(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := context.Background()
	o := options(t)
	m := manager(t, o)
	if _, err := m.Create(ctx, Config{Name: "checked", EnableIPv4: true, EnableIPv6: true}); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"one", "two"} {
		path, err := m.NewNetns(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range []string{DefaultName, "checked"} {
			if _, err := m.Connect(ctx, EndpointConfig{ID: id, Network: n, Netns: path}); err != nil {
				t.Fatal(err)
			}
		}
	}
	check := CheckOptions{Records: m.records, State: m.o.State, Owner: func(id string) bool { return id == "one" || id == "two" }}
	if got := kinds(t, check); len(got) != 0 {
		t.Errorf("with endpoints: %q", got)
	}
	check.Owner = func(id string) bool { return id == "one" }
	if got := kinds(t, check); !slices.Equal(got, []string{ProblemStray, ProblemStray}) {
		t.Errorf("without an owner: %q", got)
	}
}
