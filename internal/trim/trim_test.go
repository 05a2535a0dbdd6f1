//go:build linux

package trim

import (
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// mapped gives the resident KiB of what is mapped of this program and cannot have been written to.
func mapped(t *testing.T) (kib int) {
	t.Helper()
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	ours := false
	for line := range strings.Lines(string(raw)) {
		f := strings.Fields(line)
		switch {
		case len(f) >= 5 && strings.Contains(f[0], "-"):
			ours = len(f) > 5 && f[5] == self && !strings.Contains(f[1], "w")
		case ours && f[0] == "Rss:":
			n := 0
			if _, err := fmt.Sscan(f[1], &n); err != nil {
				t.Fatal(err)
			}
			kib += n
		}
	}
	return kib
}

func TestProgram(t *testing.T) {
	before := mapped(t)
	Program()
	if after := mapped(t); before == 0 || after >= before {
		t.Errorf("%d KiB were mapped, and %d afterwards", before, after)
	}
}

func TestTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls atomic.Int64
		timer := NewTimer(time.Minute, func() { calls.Add(1) })
		at := func(d time.Duration, want int64) {
			t.Helper()
			time.Sleep(d)
			synctest.Wait()
			if got := calls.Load(); got != want {
				t.Errorf("%d calls, want %d", got, want)
			}
		}
		at(time.Hour, 0) // nothing is done, nothing happens
		for range 100 {
			timer.Busy()
		}
		at(59*time.Second, 0)
		timer.Busy()
		at(2*time.Second, 1)
		at(time.Hour, 1)
		for range 150 { // work that goes on does not put it off
			timer.Busy()
			time.Sleep(time.Second)
		}
		at(time.Hour, 4)
	})
}
