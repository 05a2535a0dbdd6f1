//go:build linux

package rdt

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// files makes files with their directories.
func files(t *testing.T, root string, content map[string]string) {
	t.Helper()
	for name, text := range content {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestUpdate(t *testing.T) {
	root := resctrl(t, "gold")
	g := &Group{Control: filepath.Join(root, "gold")}
	r := &specs.LinuxIntelRdt{L3CacheSchema: "L3:0=0f0;1=0f0", MemBwSchema: "MB:0=070;1=070"}
	if _, err := g.Update(root, r); err == nil || !strings.Contains(err.Error(), "l3 cache schema is not enabled") {
		t.Errorf("without L3: %v", err)
	}
	files(t, root, map[string]string{"info/L3CODE/cbm_mask": "fff\n"})
	if _, err := g.Update(root, r); err == nil || !strings.Contains(err.Error(), "memory bandwidth schema is not enabled") {
		t.Errorf("without MB: %v", err)
	}
	files(t, root, map[string]string{"info/MB/min_bandwidth": "10\n"})
	undo, err := g.Update(root, r)
	if err != nil {
		t.Fatal(err)
	}
	content := func() string {
		raw, err := os.ReadFile(filepath.Join(g.Control, "schemata"))
		if err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
	if got := content(); !strings.HasPrefix(got, "L3:0=0f0;1=0f0\nMB:0=070;1=070\n") {
		t.Errorf("%q", got)
	}
	if err := undo(); err != nil {
		t.Fatal(err)
	}
	if got := content(); !strings.HasPrefix(got, "L3:0=0ff;1=0ff\nMB:0=100;1=100\n") {
		t.Errorf("taken back: %q", got)
	}
	if undo, err := g.Update(root, &specs.LinuxIntelRdt{}); err != nil || undo() != nil {
		t.Error(err)
	}
}

func TestStats(t *testing.T) {
	root := resctrl(t, "gold")
	files(t, root, map[string]string{"gold/schemata": "    L3:0=0f0;1=0f0\n    MB:0= 70;1= 70\n"})
	g := &Group{Control: filepath.Join(root, "gold")}
	s, err := g.Stats(root)
	if err != nil || s.L3CacheInfo != nil || s.MBM != nil || len(s.Schemata) != 2 {
		t.Errorf("%+v %v", s, err)
	}
	files(t, root, map[string]string{
		"info/L3/cbm_mask": "fff\n", "info/L3/min_cbm_bits": "2\n", "info/L3/num_closids": "16\n",
		"info/MB/bandwidth_gran": "10\n", "info/MB/delay_linear": "1\n", "info/MB/min_bandwidth": "20\n", "info/MB/num_closids": "8\n",
		"info/L3_MON/mon_features":                               "llc_occupancy\nmbm_total_bytes\nmbm_local_bytes\nnew_thing\n",
		"gold/mon_data/mon_L3_00/mbm_total_bytes":                "1\n",
		"gold/mon_groups/box/mon_data/mon_L3_00/x":               "",
		"gold/mon_groups/box/mon_data/mon_L3_01/x":               "",
		"gold/mon_groups/box/mon_data/mon_PERF_PKG_00/x":         "",
		"gold/mon_groups/box/mon_data/mon_L3_00/mbm_total_bytes": "100\n",
		"gold/mon_groups/box/mon_data/mon_L3_00/mbm_local_bytes": "60\n",
		"gold/mon_groups/box/mon_data/mon_L3_00/llc_occupancy":   "4096\n",
		"gold/mon_groups/box/mon_data/mon_L3_01/mbm_total_bytes": "Unavailable\n",
	})
	g.Monitor = filepath.Join(root, "gold/mon_groups/box")
	if s, err = g.Stats(root); err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(s)
	want := `{"l3_cache_info":{"cbm_mask":"fff","min_cbm_bits":2,"num_closids":16},"l3_cache_schema_root":"L3:0=0ff;1=0ff","l3_cache_schema":"L3:0=0f0;1=0f0",` +
		`"mem_bw_info":{"bandwidth_gran":10,"delay_linear":1,"min_bandwidth":20,"num_closids":8},"mem_bw_schema_root":"MB:0=100;1=100","mem_bw_schema":"MB:0= 70;1= 70",` +
		`"schemata":["L3:0=0f0;1=0f0","MB:0= 70;1= 70"],"mbm_stats":[{"mbm_total_bytes":100,"mbm_local_bytes":60},{"mbm_total_bytes":0,"mbm_local_bytes":0}],` +
		`"cmt_stats":[{"llc_occupancy":4096},{"llc_occupancy":0}]}`
	if err != nil || string(raw) != want {
		t.Errorf("%s\nwant %s\n%v", raw, want, err)
	}
}
