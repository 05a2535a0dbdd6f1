package main

import (
	"bytes"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/oci/cgroup"
	"github.com/hako-engine/hako/shim/wire"
)

func TestUsage(t *testing.T) {
	t.Parallel()
	for _, arg := range []string{"--help", "-h"} {
		var out bytes.Buffer
		if err := run([]string{arg}, &out); err != nil {
			t.Errorf("%s: %v", arg, err)
		}
		for _, want := range []string{"Usage:", " serve ", " start ", " delete ", "-bundle"} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%s does not say %q:\n%s", arg, want, out.String())
			}
		}
	}
	for args, want := range map[string]string{"--nope": "-nope", "": "unknown command", "dance": `unknown command "dance"`} {
		var out bytes.Buffer
		if err := run(strings.Fields(args), &out); err == nil || !strings.Contains(err.Error(), want) || out.Len() > 0 {
			t.Errorf("%q: %v, %q", args, err, out.String())
		}
	}
}

// A reader of metrics takes messages for present that have nothing to tell: one for block
// devices of a container that has used none.
func TestMetricsWithoutDevices(t *testing.T) {
	raw := wire.Marshal(metricsV1(&cgroup.Stats{}))
	if blkio := []byte{5<<3 | 2, 0}; !bytes.Contains(raw, blkio) { // field 5, a message without fields
		t.Errorf("%x", raw)
	}
}

// Nor do they look whether there is one that counts kills, or says how often the CPU was
// withheld, before they read a number of it.
func TestMetricsOfAQuietContainer(t *testing.T) {
	st := &cgroup.Stats{}
	st.CPU.Total, st.Memory.Stat = 1, map[string]uint64{"rss": 1}
	for name, k := range map[string]struct{ raw, want []byte }{
		"kills, v1":      {wire.Marshal(metricsV1(st)), []byte{9<<3 | 2, 0}},
		"throttling, v1": {wire.Marshal(metricsV1(st)), []byte{2<<3 | 2, 0}},
		"kills, v2":      {wire.Marshal(metricsV2(st)), []byte{8<<3 | 2, 0}},
	} {
		if !bytes.Contains(k.raw, k.want) {
			t.Errorf("%s: %x", name, k.raw)
		}
	}
}

// containerd asks for layers with mapped ids by options that no file system knows.
func TestMappedRoot(t *testing.T) {
	var m specs.Mount
	if err := mapped(&m, []string{"index=off", "uidmap=0:1000:10,10:5000:2", "gidmap=0:7:1", "lowerdir=/a"}); err != nil {
		t.Fatal(err)
	}
	want := specs.Mount{
		Options:     []string{"index=off", "lowerdir=/a"},
		UIDMappings: []specs.LinuxIDMapping{{ContainerID: 0, HostID: 1000, Size: 10}, {ContainerID: 10, HostID: 5000, Size: 2}},
		GIDMappings: []specs.LinuxIDMapping{{ContainerID: 0, HostID: 7, Size: 1}},
	}
	if !reflect.DeepEqual(m, want) {
		t.Errorf("got %+v, want %+v", m, want)
	}
	for _, bad := range []string{"uidmap=", "uidmap=1:2", "gidmap=0:x:1", "gidmap=0:1:2:3", "uidmap=0:1:99999999999"} {
		if err := mapped(&m, []string{bad}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
