package client_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/hako-engine/hako/shim/client"
)

// TestOutputCost bounds what it costs a shim to write a log: at 10 MB/s, a small part
// of a CPU.
func TestOutputCost(t *testing.T) {
	each(t, func(t *testing.T, e *env) {
		conf, path := e.jsonLog()
		conf.MaxSize, conf.MaxFiles = 50<<20, 2
		const mb = 200
		line := strings.Repeat("x", 99)
		e.create(client.Stdio{Log: conf}, fmt.Sprintf("yes %s | head -c %d", line, mb<<20))
		pid, err := e.shim.Pid(e.ctx)
		e.check(err)
		e.begin()
		e.wait()
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		e.check(err)
		var user, sys int
		fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		fmt.Sscan(fields[11], &user)
		fmt.Sscan(fields[12], &sys)
		perMB := float64(user+sys) * 10 / mb // ms
		t.Logf("%.2f ms of CPU for each MB (%d user, %d sys): %.1f %% of a CPU at 10 MB/s", perMB, user, sys, perMB)
		if perMB > 15 {
			t.Errorf("%.2f ms of CPU for each MB", perMB)
		}
		if st, err := os.Stat(path); err != nil || st.Size() == 0 {
			t.Errorf("log: %v", err)
		}
	})
}
