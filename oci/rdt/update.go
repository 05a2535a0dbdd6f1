//go:build linux

package rdt

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/oci/internal/classed"
)

// Update writes schemata into a container's group; undo writes back what was there. root is
// where resctrl is mounted. What of r is no schema is not looked at.
func (g *Group) Update(root string, r *specs.LinuxIntelRdt) (undo func() error, err error) {
	lines := schemata(r)
	for _, k := range []struct{ schema, info, name string }{
		{r.L3CacheSchema, "L3", "Intel RDT/CAT: l3 cache schema"},
		{r.MemBwSchema, "MB", "Intel RDT/MBA: memory bandwidth schema"},
	} {
		if k.schema == "" {
			continue
		}
		// With separate caches for code and data the first is L3CODE and L3DATA.
		if found, _ := filepath.Glob(filepath.Join(root, "info", k.info+"*")); len(found) == 0 {
			return nil, classed.Errorf(errdefs.ErrFailedPrecondition, "%s is not enabled", k.name)
		}
	}
	if len(lines) == 0 {
		return func() error { return nil }, nil
	}
	old, err := os.ReadFile(filepath.Join(g.Control, "schemata"))
	if err != nil {
		return nil, fmt.Errorf("linux.intelRdt: %w", err)
	}
	restore := func() error {
		var back []string
		for line := range strings.Lines(string(old)) {
			back = append(back, strings.TrimSpace(line))
		}
		return write(g.Control, "schemata", strings.Join(back, "\n")+"\n")
	}
	if err := write(g.Control, "schemata", strings.Join(lines, "\n")+"\n"); err != nil {
		// The kernel takes the lines before the one that it does not like.
		if rerr := restore(); rerr != nil {
			err = fmt.Errorf("%w; and restore earlier ones: %w", err, rerr)
		}
		return nil, fmt.Errorf("linux.intelRdt: %w", err)
	}
	return restore, nil
}

// Stats is what resctrl tells about a group, with runc's names.
type Stats struct {
	L3CacheInfo       *L3CacheInfo `json:"l3_cache_info,omitempty"`
	L3CacheSchemaRoot string       `json:"l3_cache_schema_root,omitempty"`
	L3CacheSchema     string       `json:"l3_cache_schema,omitempty"`
	MemBwInfo         *MemBwInfo   `json:"mem_bw_info,omitempty"`
	MemBwSchemaRoot   string       `json:"mem_bw_schema_root,omitempty"`
	MemBwSchema       string       `json:"mem_bw_schema,omitempty"`
	Schemata          []string     `json:"schemata,omitempty"`
	MBM               []MBM        `json:"mbm_stats,omitempty"` // by domain
	CMT               []CMT        `json:"cmt_stats,omitempty"` // by domain
}

// L3CacheInfo is what the machine can do about its L3 cache.
type L3CacheInfo struct {
	CbmMask    string `json:"cbm_mask,omitempty"`
	MinCbmBits uint64 `json:"min_cbm_bits,omitempty"`
	NumClosids uint64 `json:"num_closids,omitempty"`
}

// MemBwInfo is what the machine can do about memory bandwidth.
type MemBwInfo struct {
	BandwidthGran uint64 `json:"bandwidth_gran,omitempty"`
	DelayLinear   uint64 `json:"delay_linear,omitempty"`
	MinBandwidth  uint64 `json:"min_bandwidth,omitempty"`
	NumClosids    uint64 `json:"num_closids,omitempty"`
}

// MBM counts bytes that went to memory: all, and to the domain's own.
type MBM struct {
	TotalBytes uint64 `json:"mbm_total_bytes"`
	LocalBytes uint64 `json:"mbm_local_bytes"`
}

// CMT is the space taken in the cache, in bytes.
type CMT struct {
	LLCOccupancy uint64 `json:"llc_occupancy"`
}

// Stats reads them. root is where resctrl is mounted.
func (g *Group) Stats(root string) (*Stats, error) {
	s := new(Stats)
	lines := func(dir string) (out []string, err error) {
		raw, err := os.ReadFile(filepath.Join(dir, "schemata"))
		for line := range strings.Lines(string(raw)) {
			out = append(out, strings.TrimSpace(line))
		}
		return out, err
	}
	all, err := lines(root)
	if err != nil {
		return nil, fmt.Errorf("linux.intelRdt: %w", err)
	}
	if s.Schemata, err = lines(g.Control); err != nil {
		return nil, fmt.Errorf("linux.intelRdt: %w", err)
	}
	last := func(lines []string, name string) (found string) {
		for _, l := range lines {
			if strings.HasPrefix(l, name) {
				found = l
			}
		}
		return found
	}
	if dir := filepath.Join(root, "info/L3"); isDir(dir) {
		s.L3CacheInfo = &L3CacheInfo{CbmMask: text(dir, "cbm_mask"), MinCbmBits: number(dir, "min_cbm_bits"), NumClosids: number(dir, "num_closids")}
		s.L3CacheSchemaRoot, s.L3CacheSchema = last(all, "L3"), last(s.Schemata, "L3")
	}
	if dir := filepath.Join(root, "info/MB"); isDir(dir) {
		s.MemBwInfo = &MemBwInfo{
			BandwidthGran: number(dir, "bandwidth_gran"), DelayLinear: number(dir, "delay_linear"),
			MinBandwidth: number(dir, "min_bandwidth"), NumClosids: number(dir, "num_closids"),
		}
		s.MemBwSchemaRoot, s.MemBwSchema = last(all, "MB"), last(s.Schemata, "MB")
	}
	features := strings.Fields(text(filepath.Join(root, "info/L3_MON"), "mon_features"))
	monitor := g.Monitor
	if monitor == "" {
		monitor = g.Control
	}
	domains, err := os.ReadDir(filepath.Join(monitor, "mon_data"))
	if err != nil && len(features) > 0 {
		return nil, fmt.Errorf("linux.intelRdt: %w", err)
	}
	for _, d := range domains {
		if !strings.HasPrefix(d.Name(), "mon_L3_") { // others have none of these files
			continue
		}
		dir := filepath.Join(monitor, "mon_data", d.Name())
		var counts MBM
		var bandwidth bool
		for _, f := range features {
			switch f {
			case "mbm_total_bytes":
				bandwidth, counts.TotalBytes = true, number(dir, f)
			case "mbm_local_bytes":
				bandwidth, counts.LocalBytes = true, number(dir, f)
			case "llc_occupancy":
				s.CMT = append(s.CMT, CMT{number(dir, f)})
			}
		}
		if bandwidth {
			s.MBM = append(s.MBM, counts)
		}
	}
	return s, nil
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}

func text(dir, name string) string {
	raw, _ := os.ReadFile(filepath.Join(dir, name))
	return strings.TrimSpace(string(raw))
}

// number is 0 for what is not there, or not known ("Unavailable").
func number(dir, name string) uint64 {
	n, _ := strconv.ParseUint(text(dir, name), 10, 64)
	return n
}
