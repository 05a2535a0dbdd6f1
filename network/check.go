package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Kinds of problems.
const (
	ProblemRecord   = "network-damaged"        // a record cannot be read, or says what cannot be
	ProblemConflict = "network-conflict"       // two networks have one name, bridge or address
	ProblemEndpoint = "endpoint-damaged"       // the same of an endpoint
	ProblemAddress  = "endpoint-address"       // an address that is not the network's, or taken twice
	ProblemStray    = "endpoint-without-owner" // an endpoint of nobody
)

// Problem is one thing that Check found.
type Problem struct {
	Kind           string
	Object, Detail string
	// Note is of what is allowed: it goes when the daemon starts, or is on its way.
	Note bool
}

// CheckOptions say what to check.
type CheckOptions struct {
	Records Records
	// State is the folder of that option of the Manager.
	State string
	// Owner tells whether somebody has an endpoint of this id; nil: not asked.
	Owner func(id string) bool
}

// checking is one reading of the records.
type checking struct {
	o     CheckOptions
	found []Problem
	nets  map[string]Network
}

// Check compares the networks' records with each other, and with the endpoints that there
// are in this boot. It changes nothing, and needs no Manager.
func Check(o CheckOptions) ([]Problem, error) {
	c := &checking{o: o, nets: map[string]Network{}}
	// Endpoints first: their network is made before them, and removed after.
	ends, err := c.endpoints()
	if err != nil {
		return nil, err
	}
	// ForEach joins the errors of single records; each was noted by the function.
	_ = o.Records.ForEach(func(id string, raw []byte) error {
		var n Network
		err := json.Unmarshal(raw, &n)
		if err == nil && n.ID != id {
			err = fmt.Errorf("it is of %q", n.ID)
		}
		if err == nil {
			_, err = newNetw(n)
		}
		if err == nil {
			err = n.sound()
		}
		if err != nil {
			c.add(ProblemRecord, id, "its record: %v", err)
		}
		c.nets[id] = n
		return nil
	})
	c.conflicts()
	c.addresses(ends)
	return c.found, nil
}

func (c *checking) add(kind, object, format string, args ...any) {
	c.found = append(c.found, Problem{Kind: kind, Object: object, Detail: fmt.Sprintf(format, args...)})
}

// sound says what is wrong with a network by itself.
func (n Network) sound() error {
	switch n.Driver {
	case DriverHost, DriverNone:
		return nil
	case DriverBridge:
	default:
		return fmt.Errorf("driver %q", n.Driver)
	}
	if n.Name == "" || n.Bridge == "" || len(n.Bridge) > 15 || strings.ContainsAny(n.Bridge, "/ \x00") {
		return fmt.Errorf("name %q, bridge %q", n.Name, n.Bridge)
	}
	for i, s := range n.Subnets {
		if !s.Prefix.IsValid() || s.Prefix != s.Prefix.Masked() {
			return fmt.Errorf("subnet %s", s.Prefix)
		}
		if s.Gateway.IsValid() && !s.Prefix.Contains(s.Gateway) {
			return fmt.Errorf("gateway %s is not in %s", s.Gateway, s.Prefix)
		}
		if s.Range.IsValid() && (!s.Prefix.Contains(s.Range.Addr()) || s.Range.Bits() < s.Prefix.Bits()) {
			return fmt.Errorf("range %s is not in %s", s.Range, s.Prefix)
		}
		for name, a := range s.Reserved {
			if !s.Prefix.Contains(a) {
				return fmt.Errorf("reserved address %s (%s) is not in %s", a, name, s.Prefix)
			}
		}
		for _, other := range n.Subnets[:i] {
			if other.Prefix.Overlaps(s.Prefix) {
				return fmt.Errorf("subnets %s and %s overlap", other.Prefix, s.Prefix)
			}
		}
	}
	return nil
}

// conflicts compares networks with each other. Those that are predefined may be of a
// daemon that was configured otherwise: they are not in use then.
func (c *checking) conflicts() {
	type key struct{ kind, value string }
	taken := map[key]string{}
	ids := sortedIDs(c.nets)
	for _, id := range ids {
		n := c.nets[id]
		if n.ID == "" || n.Predefined {
			continue
		}
		for _, k := range []key{{"name", n.Name}, {"bridge", n.Bridge}} {
			if k.value == "" {
				continue
			}
			if other, ok := taken[k]; ok {
				c.add(ProblemConflict, id, "%s %s is also that of network %s", k.kind, k.value, other)
			}
			taken[k] = id
		}
	}
	for i, a := range ids {
		for _, b := range ids[:i] {
			if c.nets[a].Predefined || c.nets[b].Predefined {
				continue
			}
			for _, s := range c.nets[a].Subnets {
				for _, o := range c.nets[b].Subnets {
					if s.Prefix.IsValid() && o.Prefix.IsValid() && s.Prefix.Overlaps(o.Prefix) {
						c.add(ProblemConflict, a, "subnet %s overlaps %s of network %s", s.Prefix, o.Prefix, b)
					}
				}
			}
		}
	}
}

// endpoints reads what lies in the state folder, of this boot.
func (c *checking) endpoints() ([]endpointState, error) {
	dir := filepath.Join(c.o.State, "endpoints")
	files, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("check endpoints: %w", err)
	}
	boot := bootID()
	var out []endpointState
	for _, f := range files {
		id, ok := strings.CutSuffix(f.Name(), ".json")
		if !ok {
			continue // being written
		}
		raw, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // gone meanwhile
		}
		var s endpointState
		if err == nil {
			err = json.Unmarshal(raw, &s)
		}
		if err == nil && s.Endpoint.EndpointID != id {
			err = fmt.Errorf("it is of %q", s.Endpoint.EndpointID)
		}
		switch {
		case err != nil:
			c.add(ProblemEndpoint, id, "its record: %v", err)
		case s.BootID == boot: // else of an earlier boot: dropped when the daemon starts
			out = append(out, s)
		}
	}
	return out, nil
}

// addresses compares endpoints with their networks, and with each other. One that is about
// to be removed keeps its address until its record is gone.
func (c *checking) addresses(ends []endpointState) {
	type key struct{ network, what string }
	taken := map[key]string{}
	for _, s := range ends {
		e := s.Endpoint
		n, ok := c.nets[e.NetworkID]
		if !ok && (e.NetworkName == "host" || e.NetworkName == "none") {
			continue // they have no records
		}
		if !ok {
			c.add(ProblemEndpoint, e.EndpointID, "its network %s (%s) is not there", e.NetworkID, e.NetworkName)
			continue
		}
		if c.o.Owner != nil && !s.Unfinished && !c.o.Owner(e.ID) {
			c.found = append(c.found, Problem{Kind: ProblemStray, Object: e.EndpointID, Detail: fmt.Sprintf("of %s on network %s, which is neither a container nor a sandbox", e.ID, e.NetworkName), Note: true})
		}
		if n.Driver != DriverBridge {
			continue
		}
		for _, a := range []netip.Prefix{e.IPv4, e.IPv6} {
			if !a.IsValid() {
				continue
			}
			inside := false
			for _, sub := range n.Subnets {
				inside = inside || sub.Prefix.Contains(a.Addr()) && sub.Prefix.Bits() == a.Bits()
				if sub.Gateway == a.Addr() {
					c.add(ProblemAddress, e.EndpointID, "%s has the gateway's address %s", e.ID, a.Addr())
				}
			}
			if !inside {
				c.add(ProblemAddress, e.EndpointID, "%s has %s, which is in no subnet of network %s", e.ID, a, n.Name)
			}
		}
		for _, what := range []string{addressOf(e.IPv4), addressOf(e.IPv6), e.MAC, e.HostIfName} {
			if what == "" {
				continue
			}
			k := key{e.NetworkID, what}
			if other, ok := taken[k]; ok {
				c.add(ProblemAddress, e.EndpointID, "%s has %s on network %s, as %s has", e.ID, what, n.Name, other)
			}
			taken[k] = e.ID
		}
	}
}

func sortedIDs(nets map[string]Network) []string { return slices.Sorted(maps.Keys(nets)) }

func addressOf(p netip.Prefix) string {
	if !p.IsValid() {
		return ""
	}
	return p.Addr().String()
}
