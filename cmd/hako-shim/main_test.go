package main

import (
	"bytes"
	"strings"
	"testing"

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
