package snapshot

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// eachKind runs a benchmark upon images of 5, 20 and 60 layers: the lowest one has 4,000 files, the others 40 each, in the
// same 200 directories. What is not in the benchmark's loop is ready: layers are mounted, and merged if that is looked at.
func eachKind(b *testing.B, run func(b *testing.B, sn *Snapshotter, top string)) {
	needsRoot(b)
	for _, layers := range []int{2, 5, 10, 20, 60} {
		for _, kind := range []struct {
			name string
			open opener
		}{{"overlayfs", NewOverlay}, {"stack", newErofs}, {"merged", erofsWith(ErofsOptions{MergeFrom: 2})}} {
			b.Run(fmt.Sprintf("layers=%d/%s", layers, kind.name), func(b *testing.B) {
				sn := openTest(b, kind.open)
				top := stackOf(b, sn, layers, func(i int, dir string) {
					n := 40
					if i == 0 {
						n = 4000
					}
					for k := range n {
						d := filepath.Join("lib", fmt.Sprint("d", (k+7*i)%20), fmt.Sprint("e", (k+3*i)%10))
						must(b, os.MkdirAll(filepath.Join(dir, d), 0o755))
						write(b, filepath.Join(dir, d), fmt.Sprintf("f%d-%d", i, k), "some text")
					}
				})
				must(b, sn.Merge(testContext(), top))
				_, err := sn.View(testContext(), "view", top)
				must(b, err)
				run(b, sn, top)
			})
		}
	}
}

// cpuMeter adds up the CPU time of this process: on a busy machine it says more than the clock.
type cpuMeter struct{ used time.Duration }

func (m *cpuMeter) time(fn func()) {
	before := cpuTime()
	fn()
	m.used += cpuTime() - before
}

func (m *cpuMeter) report(b *testing.B) {
	b.ReportMetric(float64(m.used.Microseconds())/1000/float64(b.N), "cpu-ms/op")
}

func cpuTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkPrepareRemove is what a container's file system costs: made, mounted, removed.
func BenchmarkPrepareRemove(b *testing.B) {
	eachKind(b, func(b *testing.B, sn *Snapshotter, top string) {
		var cpu cpuMeter
		for b.Loop() {
			cpu.time(func() { live(b, sn, top) })
		}
		cpu.report(b)
	})
}

// live prepares, mounts and removes a snapshot.
func live(b *testing.B, sn *Snapshotter, top string) {
	m, err := sn.Prepare(testContext(), "x", top)
	must(b, err)
	f, err := MountDetached(m)
	must(b, err)
	f.Close()
	must(b, sn.Remove(testContext(), "x"))
}

// BenchmarkFirstMount is the same when the layers are not mounted: for the first container of an image.
func BenchmarkFirstMount(b *testing.B) {
	eachKind(b, func(b *testing.B, sn *Snapshotter, top string) {
		must(b, sn.Remove(testContext(), "view"))
		var cpu cpuMeter
		for b.Loop() {
			b.StopTimer()
			sn.hideUnused()
			b.StartTimer()
			cpu.time(func() { live(b, sn, top) })
		}
		cpu.report(b)
	})
}

// fresh mounts a snapshot anew, so that nothing is known of its names, and times fn.
func fresh(b *testing.B, sn *Snapshotter, top string, fn func(root string)) {
	m, err := sn.Prepare(testContext(), "x", top)
	must(b, err)
	var cpu cpuMeter
	for b.Loop() {
		b.StopTimer()
		f, err := MountDetached(m)
		must(b, err)
		b.StartTimer()
		cpu.time(func() { fn(fmt.Sprintf("/proc/self/fd/%d/", f.Fd())) })
		b.StopTimer()
		f.Close()
		b.StartTimer()
	}
	cpu.report(b)
}

// BenchmarkFind is find / with the attributes of all files, in a new container.
func BenchmarkFind(b *testing.B) {
	eachKind(b, func(b *testing.B, sn *Snapshotter, top string) {
		fresh(b, sn, top, func(root string) {
			n := 0
			must(b, filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
				var st unix.Stat_t
				n++
				if err == nil {
					err = unix.Lstat(p, &st)
				}
				return err
			}))
			if n < 4000 {
				b.Fatal(n)
			}
		})
	})
}

// BenchmarkMissing looks 200 names up in each of 20 directories that are not there, as interpreters do that
// search for a module.
func BenchmarkMissing(b *testing.B) {
	eachKind(b, func(b *testing.B, sn *Snapshotter, top string) {
		fresh(b, sn, top, func(root string) {
			var st unix.Stat_t
			for d := range 20 {
				for i := range 200 {
					if err := unix.Lstat(fmt.Sprintf("%slib/d%d/no%d", root, d, i), &st); err == nil {
						b.Fatal("it is there")
					}
				}
			}
		})
	})
}

// BenchmarkMerge makes the merged image.
func BenchmarkMerge(b *testing.B) {
	eachKind(b, func(b *testing.B, sn *Snapshotter, top string) {
		d, ok := sn.driver.(*images)
		if !ok || d.merged.from > 2 {
			b.Skip("merges nothing")
		}
		own, parents, err := sn.layers(testContext(), top)
		must(b, err)
		var cpu cpuMeter
		for b.Loop() {
			must(b, os.Remove(own.merged()))
			cpu.time(func() { must(b, d.merge(testContext(), append([]layer{own}, parents...))) })
		}
		cpu.report(b)
	})
}
