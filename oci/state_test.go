//go:build linux && (amd64 || arm64)

package oci

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/hako-engine/hako/oci/cgroup/systemd"
	"github.com/hako-engine/hako/oci/rdt"
)

// TestStateText compares with encoding/json, which reads it.
func TestStateText(t *testing.T) {
	t.Parallel()
	full := state{
		Version: 1, ID: "a_b", OCIVersion: "1.3.0", Bundle: "/b \"<ü>&\\\n\x00\xff", Rootfs: "/r", Created: time.Unix(1, 2300).UTC(),
		Owner: 1000, Pid: -1, StartTime: 1<<64 - 1, Rootless: true,
		Annotations: map[string]string{"b": "2", "a\t": "", "": "x"}, Cgroups: map[string]string{"": "/v2", "cpu": "/sys/fs/cgroup/cpu/x"},
		Unit: &unit{Unit: systemd.Unit{Name: "a.scope"}, User: true}, Rdt: &rdt.Group{},
	}
	for _, s := range []state{{}, full} {
		got, err := s.marshal()
		want, wantErr := json.Marshal(&s)
		if err != nil || wantErr != nil || string(got) != string(want) {
			t.Errorf("%v, %v\n got %s\nwant %s", err, wantErr, got, want)
		}
	}
}
