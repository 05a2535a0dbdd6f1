//go:build linux && (amd64 || arm64)

package security

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// racer (H2) exchanges two names in a loop, as a sibling that shares a volume can.
func racer(t *testing.T, a, b string) (swaps *atomic.Int64, stop func()) {
	t.Helper()
	swaps = new(atomic.Int64)
	var end atomic.Bool
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		for !end.Load() {
			if unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE) == nil {
				swaps.Add(1)
			}
		}
		// An even number leaves things as they were.
		if swaps.Load()%2 == 1 {
			_ = unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
		}
	}()
	return swaps, func() { end.Store(true); <-done }
}

// race starts containers while two names are exchanged, and gives the first hit.
func race(t *testing.T, e engine, b *bundle, one, other string, hit func(output) string) string {
	t.Helper()
	swaps, stop := racer(t, filepath.Join(b.dir, one), filepath.Join(b.dir, other))
	defer stop()
	before := hostFiles()
	for i := range starts() {
		out := b.run(e)
		h := b.canary.touched(t)
		if h == "" && strings.Contains(out.text, secret) {
			h = "the container has seen the host"
		}
		if h == "" && hostFiles() != before {
			h = "a setting of the host has changed"
		}
		if h == "" {
			h = hit(out)
		}
		if h != "" {
			t.Logf("%s: start %d", e.name, i+1)
			return h
		}
	}
	if swaps.Load() < int64(starts()) {
		t.Errorf("only %d exchanges in %d starts", swaps.Load(), starts())
	}
	return ""
}

// CVE-2021-30465: destinations of mounts are exchanged with links while they are looked up.
func TestA5RaceOnMountDestinations(t *testing.T) {
	battery(t, "A5 race on destinations", true, []engine{without(t, "A5")}, func(t *testing.T, e engine) string {
		b := newBundle(t, "for i in 0 1 2 3 4 5 6 7 8 9; do n=0; until [ $n = 500 ] || [ -e /vol/x/sub$i/marker ] || [ -e /vol/link/sub$i/marker ]; do n=$((n+1)); done; [ $n = 500 ] && echo elsewhere; done; true")
		must(t, os.MkdirAll(filepath.Join(b.rootfs, "vol"), 0o755))
		must(t, os.MkdirAll(filepath.Join(b.dir, "source"), 0o755))
		must(t, os.WriteFile(filepath.Join(b.dir, "source/marker"), nil, 0o644))
		must(t, os.MkdirAll(filepath.Join(b.dir, "vol"), 0o755))
		must(t, os.Symlink(b.canary.dir, filepath.Join(b.dir, "vol/link")))
		b.mount("/vol", "bind", filepath.Join(b.dir, "vol"), "bind")
		for i := range 10 {
			must(t, os.MkdirAll(filepath.Join(b.dir, "vol/x", fmt.Sprint("sub", i)), 0o755))
			must(t, os.MkdirAll(filepath.Join(b.canary.dir, fmt.Sprint("sub", i)), 0o755))
			b.mount(fmt.Sprint("/vol/x/sub", i), "bind", filepath.Join(b.dir, "source"), "bind")
		}
		b.canary.before = b.canary.look()
		return race(t, e, b, "vol/x", "vol/link", func(out output) string {
			if strings.Contains(out.text, "elsewhere") {
				return "the mounts went elsewhere"
			}
			return ""
		})
	})
}

// CVE-2024-45310: a missing destination is made on the host.
func TestA6RaceOnMissingDestinations(t *testing.T) {
	controls := peers(t, "runc")
	if len(controls) == 0 {
		controls = append(controls, without(t, "A5"))
	}
	battery(t, "A6 CVE-2024-45310 race on missing destinations", true, controls, func(t *testing.T, e engine) string {
		b := newBundle(t, "true")
		for _, d := range []string{"rootfs/vol", "vol/x"} {
			must(t, os.MkdirAll(filepath.Join(b.dir, d), 0o755))
		}
		must(t, os.Symlink(strings.Repeat("../", 30)+b.canary.dir, filepath.Join(b.dir, "vol/link")))
		b.mount("/vol", "bind", filepath.Join(b.dir, "vol"), "bind")
		for _, d := range []string{"a", "b", "c", "d/e/f", "g/h", "i"} {
			b.mount("/vol/x/new/"+d, "tmpfs", "tmpfs")
		}
		return race(t, e, b, "vol/x", "vol/link", func(output) string {
			for _, d := range []string{"x/new", "link/new"} {
				os.RemoveAll(filepath.Join(b.dir, "vol", d))
			}
			return b.canary.touched(t)
		})
	})
}

// CVE-2019-19921: the image's /proc is exchanged while sysctls are written and paths masked.
func TestA4RaceOnProc(t *testing.T) {
	battery(t, "A4 race on /proc (RUN-01-001)", true, []engine{without(t, "A4")}, func(t *testing.T, e engine) string {
		b := newBundle(t, "for i in 1 2 3 4 5 6 7 8 9; do for p in /proc /link; do head -c 40 $p/interrupts; done; done; true")
		b.link(b.canary.dir, "link")
		b.spec.Linux.Sysctl = map[string]string{"kernel.shm_rmid_forced": "1"}
		b.spec.Linux.MaskedPaths = []string{"/proc/keys", "/proc/interrupts"}
		b.spec.Linux.ReadonlyPaths = []string{"/proc/sys"}
		return race(t, e, b, "rootfs/proc", "rootfs/link", func(out output) string {
			if strings.Contains(out.text, "CPU0") {
				return "a masked path can be read"
			}
			return ""
		})
	})
}

// CVE-2025-31133, CVE-2025-52565, CVE-2026-41579: nodes of /dev are exchanged.
func TestA7RaceOnDev(t *testing.T) {
	battery(t, "A7, A8, A9 race on /dev", true, peers(t, "runc"), func(t *testing.T, e engine) string {
		b := newBundle(t, "stat -c '%t:%T' /proc/interrupts")
		must(t, os.MkdirAll(filepath.Join(b.rootfs, "dev/pts"), 0o755))
		b.link(b.canary.dir, "link")
		b.spec.Mounts = append(b.spec.Mounts, specs.Mount{Destination: "/dev/pts", Type: "devpts", Source: "devpts"})
		b.spec.Linux.MaskedPaths = []string{"/proc/interrupts"}
		return race(t, e, b, "rootfs/dev", "rootfs/link", func(out output) string {
			if out.err == nil && !strings.Contains(out.text, "1:3") {
				return "masked by something else"
			}
			return ""
		})
	})
}
