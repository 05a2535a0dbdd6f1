//go:build linux && (amd64 || arm64)

package main

import (
	"encoding/json"
	"math"
	"strings"
	"testing"

	"github.com/hako-engine/hako/oci/cgroup"
)

func TestParseSize(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int64{
		"0": 0, "1": 1, "32": 32, "32b": 32, "32B": 32, "1k": 1 << 10, "1K": 1 << 10, "1kb": 1 << 10, "1KiB": 1 << 10, "64m": 64 << 20, "64 MiB": 64 << 20,
		"1.5g": 3 << 29, "10TB": 10 << 40, "1p": 1 << 50, "0.5k": 512, "100.5m": 105381888, "9223372036854775807": math.MaxInt64, ".5k": 512,
	} {
		if got, err := parseSize(text); err != nil || got != want {
			t.Errorf("%q is %d, %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{
		"", " ", "x", "k", "-1", "-2k", "1x", "1 x", "1  m", "m1", "1mm", "1mib ", "1bb", "1.2.3", "1e9", "0x10", "inf", "nan", "9223372036854775808", "99999999999p", "1kbb", "1i", "+1",
	} {
		if got, err := parseSize(text); err == nil {
			t.Errorf("%q is %d", text, got)
		}
	}
}

// What containers use is told with runc's names and meanings, also on cgroup v2.
func TestEventData(t *testing.T) {
	t.Parallel()
	show := func(s *cgroup.Stats) string {
		raw, err := json.Marshal(eventData(s))
		if err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
	memory := cgroup.MemoryStats{Memory: cgroup.MemoryUsage{Usage: 100, Limit: 1000}, Swap: cgroup.MemoryUsage{Usage: 7, Limit: math.MaxUint64}}
	io := []cgroup.IOStats{{Major: 8, Minor: 1, ReadBytes: 1, WriteBytes: 2, DiscardBytes: 4, SyncBytes: 3, ReadOps: 10}}
	for _, tc := range []struct {
		v2   bool
		want []string
	}{
		{false, []string{
			`"swap":{"limit":9223372036854771712,"usage":7,`, `"usage":{"limit":1000,"usage":100,`, `{"major":8,"minor":1,"op":"Sync","value":3}`, `{"major":8,"minor":1,"op":"Total","value":7}`,
			`"network_interfaces":null`, `"cpuset":{"cpu_exclusive":0`,
		}},
		{true, []string{`"swap":{"limit":18446744073709551615,"usage":107,`, `"ioServiceBytesRecursive":[{"major":8,"minor":1,"op":"Read","value":1},{"major":8,"minor":1,"op":"Write","value":2}]`}},
	} {
		got := show(&cgroup.Stats{Memory: memory, IO: io, V2: tc.v2})
		for _, want := range tc.want {
			if !strings.Contains(got, want) {
				t.Errorf("v2 %v: %s\nlacks %s", tc.v2, got, want)
			}
		}
	}
	limited := memory
	limited.Swap.Limit = 24
	if got := show(&cgroup.Stats{Memory: limited, V2: true}); !strings.Contains(got, `"swap":{"limit":1024,"usage":107,`) {
		t.Error(got)
	}
}
