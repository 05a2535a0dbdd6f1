//go:build linux

package cgroup

import (
	"fmt"
	"os"
	"testing"
	"time"
)

// BenchmarkDefaultContainer makes, limits and deletes a cgroup as for a container with
// default settings.
func BenchmarkDefaultContainer(b *testing.B) {
	if os.Getuid() != 0 {
		b.Skipf("needs root: %s makes cgroups", b.Name())
	}
	l, err := Detect()
	if err != nil {
		b.Fatal(err)
	}
	r := defaultResources()
	var apply time.Duration
	for b.Loop() {
		c, err := l.New(fmt.Sprintf("/hako-bench-%d", os.Getpid()))
		if err != nil {
			b.Fatal(err)
		}
		began := time.Now()
		err = c.Apply(r)
		apply += time.Since(began)
		b.StopTimer()
		if derr := c.Delete(); err != nil || derr != nil {
			b.Fatal(err, derr)
		}
		b.StartTimer()
	}
	b.ReportMetric(float64(apply.Nanoseconds())/float64(b.N), "apply-ns/op")
}

func BenchmarkDetect(b *testing.B) {
	for b.Loop() {
		if _, err := Detect(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkStats(b *testing.B) {
	if os.Getuid() != 0 {
		b.Skipf("needs root: %s makes cgroups", b.Name())
	}
	l, err := Detect()
	if err != nil {
		b.Fatal(err)
	}
	c, err := l.New(fmt.Sprintf("/hako-bench-stats-%d", os.Getpid()))
	if err != nil {
		b.Fatal(err)
	}
	defer c.Delete()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Stats(); err != nil {
			b.Fatal(err)
		}
	}
}
