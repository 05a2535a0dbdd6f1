package snapshot

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// loopDevices lists the files below a directory that loop devices stand for.
func loopDevices(t testing.TB, root string) (list []string) {
	t.Helper()
	devices, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	must(t, err)
	for _, d := range devices {
		b, err := os.ReadFile(d)
		if err != nil {
			continue // cleared meanwhile
		}
		if strings.HasPrefix(string(b), root) {
			list = append(list, strings.TrimSpace(string(b)))
		}
	}
	return list
}

// noLoopDevices waits until the kernel has cleared the devices, which it does after the last use.
func noLoopDevices(t testing.TB, root string) {
	t.Helper()
	for end := time.Now().Add(5 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
		list := loopDevices(t, root)
		if len(list) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Errorf("loop devices are left: %v", list)
			return
		}
	}
}

// TestLoopDevices: on kernels that mount no files, each layer in use has one device, however many
// containers use it, and it is free afterwards. TestCrash does the same with kill -9.
func TestLoopDevices(t *testing.T) {
	needsRoot(t)
	sn := openTest(t, drivers["loop"])
	ctx := testContext()
	t.Cleanup(func() { noLoopDevices(t, sn.root) }) // when the test's own mounts are closed
	top := stackOf(t, sn, 3, func(i int, dir string) { write(t, dir, fmt.Sprint("f", i), "x") })
	for i := range 3 {
		if got := tree(t, prepare(t, sn, fmt.Sprint("c", i), top)); got != "f0=x f1=x f2=x" {
			t.Errorf("container has %s", got)
		}
	}
	if list := loopDevices(t, sn.root); len(list) != 3 {
		t.Errorf("loop devices of %v", list)
	}
	for i := range 3 {
		must(t, sn.Remove(ctx, fmt.Sprint("c", i)))
	}
	sn.hideUnused()
	if left, err := os.ReadDir(sn.driver.(*images).state); err != nil || len(left) > 0 {
		t.Errorf("left mounted: %v, %v", left, err)
	}
}
