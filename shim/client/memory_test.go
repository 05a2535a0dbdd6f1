package client_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/hako-engine/hako/shim/client"
)

// maxPSS is what a shim with an idle container may take, in kB.
const maxPSS = 5 << 10

func TestMemory(t *testing.T) {
	each(t, func(t *testing.T, e *env) {
		conf, _ := e.jsonLog()
		e.create(client.Stdio{OpenStdin: true, Log: conf}, "seq 100000; sleep 600")
		e.begin()
		pid, err := e.shim.Pid(e.ctx)
		e.check(err)
		var pss int
		// A shim gives memory back when it has been quiet for a moment.
		ok := eventually(func() bool {
			pss = rollup(t, pid, "Pss:")
			return pss <= maxPSS
		})
		if !ok {
			t.Errorf("PSS %d kB", pss)
		}
		time.Sleep(2500 * time.Millisecond)
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		t.Logf("PSS %d kB", rollup(t, pid, "Pss:"))
		if pss = rollup(t, pid, "Pss:"); pss > maxPSS {
			t.Errorf("PSS %d kB when idle\n%s", pss, b)
		}
	})
}

func rollup(t *testing.T, pid int, key string) (kB int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "\n"+key)
	if _, err := fmt.Sscan(rest, &kB); err != nil {
		t.Fatalf("%s: %v", b, err)
	}
	return kB
}
