//go:build linux && (amd64 || arm64)

package security

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/execfile"
)

// CVE-2019-5736: a container keeps the binary of the process that enters it, and writes it
// once it is no longer executed. The window is held open: the other container waits for its
// start in the PID namespace of this one.
func TestA1RuntimeBinary(t *testing.T) {
	battery(t, "A1 CVE-2019-5736 runtime binary", false, []engine{without(t, "A1")}, func(t *testing.T, e engine) string {
		before := digest(t, e.command[len(e.command)-1])
		a := newBundle(t, `until [ -d /proc/2 ]; do :; done; n=$(for p in /proc/[0-9]*; do p=${p#/proc/}; [ $p = 1 ] || [ $p = $$ ] || { readlink /proc/$p/exe | grep -q -e memfd -e runc -e hako && echo $p && break; }; done)
			exec 9</proc/$n/exe && touch /got; until [ -e /go ]; do :; done; { echo owned >/proc/self/fd/9; } 2>/dev/null && touch /wrote; touch /end; sleep 100000`)
		a.spec.Process.NoNewPrivileges = false
		pid, out := a.start(e)
		if pid == 0 {
			t.Fatal(out.text, out.err)
		}
		b := newBundle(t, "true")
		b.spec.Linux.Namespaces[0].Path = fmt.Sprintf("/proc/%d/ns/pid", pid)
		if pid, out := b.start(e, "create"); pid == 0 {
			t.Fatal(out.text, out.err)
		}
		exists := func(name string) func() bool {
			return func() bool { _, err := os.Stat(filepath.Join(a.rootfs, name)); return err == nil }
		}
		eventually(t, "the attacker holds the binary", exists("got"))
		if out := b.do(e, "start", b.id); out.err != nil {
			t.Fatal(out.text)
		}
		must(t, os.WriteFile(filepath.Join(a.rootfs, "go"), nil, 0o644))
		eventually(t, "the attacker's end", exists("end"))
		must(t, execfile.Write(filepath.Join(a.rootfs, "bin/script"), []byte("#!/proc/self/exe\n"), 0o755))
		a.link("/proc/self/exe", "bin/exe")
		for _, program := range []string{"/bin/script", "/bin/exe", "/proc/self/exe"} {
			a.do(e, "exec", a.id, program)
		}
		switch {
		case digest(t, e.command[len(e.command)-1]) != before:
			return "the runtime's binary was changed"
		case exists("wrote")():
			return "what enters the container was written"
		}
		return ""
	})
}

// CVE-2016-9962: a container looks into, or traces, a process that is entering it.
func TestA2EnteringProcess(t *testing.T) {
	guest := built(t, guestBinary)
	battery(t, "A2 CVE-2016-9962 entering process", true, []engine{without(t, "A2")}, func(t *testing.T, e engine) string {
		b := newBundle(t, "")
		raw, err := os.ReadFile(guest)
		must(t, err)
		must(t, execfile.Write(filepath.Join(b.rootfs, "bin/guest"), raw, 0o755))
		b.spec.Process.Args = []string{"/bin/guest", "peek", "/stop"}
		b.writeConfig()
		log := filepath.Join(b.dir, "log")
		f, err := os.Create(log)
		must(t, err)
		defer f.Close()
		cmd := b.command(e, "run", "-d", b.id)
		cmd.Stdout, cmd.Stderr = f, f
		if err := cmd.Run(); err != nil {
			raw, _ := os.ReadFile(log)
			t.Fatalf("%v %s", err, raw)
		}
		t.Cleanup(func() { b.remove(e) })
		leak := func() string {
			raw, _ := os.ReadFile(log)
			for line := range strings.Lines(string(raw)) {
				if strings.HasPrefix(line, "leak:") && !strings.Contains(line, "busybox") && !strings.Contains(line, "/out") {
					return strings.TrimSpace(line)
				}
			}
			return ""
		}
		for range min(starts(), 500) {
			b.do(e, "exec", b.id, "/bin/guest", "true")
			if l := leak(); l != "" {
				return l
			}
		}
		must(t, os.WriteFile(filepath.Join(b.rootfs, "stop"), nil, 0o644))
		eventually(t, "the end of the attacker", func() bool { raw, _ := os.ReadFile(log); return strings.Contains(string(raw), "peeked") })
		return leak()
	})
}

// CVE-2024-21626: the working directory is a descriptor that the caller or the runtime has
// left open.
func TestA3WorkingDirectory(t *testing.T) {
	battery(t, "A3 CVE-2024-21626 working directory", false, []engine{without(t, "A3")}, func(t *testing.T, e engine) string {
		b := newBundle(t, "cat host-secret ../host-secret; pwd")
		held, err := os.Open(b.canary.dir)
		must(t, err)
		defer held.Close()
		try := func(args ...string) string {
			cmd := b.command(e, args...)
			cmd.ExtraFiles = []*os.File{held, held, held, held}
			raw, _ := cmd.CombinedOutput()
			if strings.Contains(string(raw), secret) {
				return "host files read through " + args[len(args)-1]
			}
			return ""
		}
		for fd := 3; fd <= 12; fd++ {
			cwd := fmt.Sprintf("/proc/self/fd/%d", fd)
			b.link(cwd, "way")
			for _, dir := range []string{cwd, "/way", cwd + "/sub"}[:2+fd%2] {
				b.spec.Process.Cwd = dir
				b.writeConfig()
				hit := try("run", b.id)
				b.remove(e)
				if hit != "" {
					return hit
				}
			}
		}
		b.spec.Process.Cwd, b.spec.Process.Args = "/", []string{"sleep", "100000"}
		if pid, out := b.start(e); pid == 0 {
			t.Fatal(out.text, out.err)
		}
		for fd := 3; fd <= 12; fd++ {
			if hit := try("exec", "--cwd", fmt.Sprintf("/proc/self/fd/%d", fd), b.id, "cat", "host-secret"); hit != "" {
				return hit
			}
		}
		raw, err := b.command(e, "exec", b.id, "ls", "/proc/self/fd").Output()
		if got := strings.Fields(string(raw)); err != nil || strings.Join(got, " ") != "0 1 2 3" { // 3 is ls's own
			return fmt.Sprintf("descriptors in the container: %q %v", got, err)
		}
		return ""
	})
}

// CVE-2019-16884, CVE-2019-19921, CVE-2023-27561, CVE-2025-52881: the runtime takes
// something else for /proc, and writes sysctls there.
func TestA4ForgedProc(t *testing.T) {
	battery(t, "A4 CVE-2025-52881 forged /proc", false, []engine{without(t, "A4")}, func(t *testing.T, e engine) string {
		forge := map[string]func(b *bundle){
			"bind over /proc/sys": func(b *bundle) { b.mount("/proc/sys", "bind", b.canary.dir, "bind") },
			"bind over /proc": func(b *bundle) {
				b.spec.Mounts[0] = specs.Mount{Destination: "/proc", Type: "bind", Source: b.canary.dir, Options: []string{"bind"}}
			},
			"tmpfs on /proc":          func(b *bundle) { b.spec.Mounts[0] = specs.Mount{Destination: "/proc", Type: "tmpfs", Source: "tmpfs"} },
			"tmpfs on attributes":     func(b *bundle) { b.mount("/proc/self/attr", "tmpfs", "tmpfs") },
			"link in the image":       func(b *bundle) { b.link("/tmp", "proc") },
			"link to /proc/sys":       func(b *bundle) { b.link("/proc/sys", "way"); b.mount("/way", "bind", b.canary.dir, "bind") },
			"link to the host's /sys": func(b *bundle) { b.link("/proc/1/root/sys", "sys"); b.mount("/sys", "sysfs", "sysfs") },
		}
		for name, change := range forge {
			b := newBundle(t, "mount")
			before := hostFiles()
			b.spec.Linux.Sysctl = map[string]string{"kernel.shm_rmid_forced": "1"}
			change(b)
			out := b.run(e)
			if hit := b.canary.touched(t); hit != "" {
				return name + ": " + hit
			}
			if hostFiles() != before {
				return name + ": a setting of the host has changed"
			}
			if out.err == nil && e.name == "hako" {
				return name + ": the container was started"
			}
		}
		return ""
	})
}

// CVE-2021-30465 and CVE-2024-45310 without the race: a mount's destination leads out.
func TestA5MountDestination(t *testing.T) {
	battery(t, "A5 CVE-2021-30465 mount destination", false, []engine{without(t, "A5")}, func(t *testing.T, e engine) string {
		for name, target := range map[string]func(b *bundle) string{
			"absolute": func(b *bundle) string { return b.canary.dir },
			"relative": func(b *bundle) string { return strings.Repeat("../", 30) + b.canary.dir },
			"dangling": func(b *bundle) string { return b.canary.dir + "/new" },
		} {
			b := newBundle(t, "mount")
			b.link(target(b), "way")
			b.mount("/way/deep/er", "tmpfs", "tmpfs")
			b.run(e)
			if hit := b.canary.touched(t); hit != "" {
				return name + ": " + hit
			}
		}
		return ""
	})
}

// CVE-2025-31133, CVE-2025-62161: the mask is the image's /dev/null.
func TestA7MaskedPathSource(t *testing.T) {
	battery(t, "A7 CVE-2025-31133 source of masks", false, peers(t, "runc"), func(t *testing.T, e engine) string {
		for _, kind := range []string{"link", "file", "fifo"} {
			b := newBundle(t, "cat /proc/self/mountinfo; stat -c '%t:%T %F' /proc/interrupts")
			null := filepath.Join(b.rootfs, "dev/null")
			must(t, os.MkdirAll(filepath.Dir(null), 0o755))
			switch kind {
			case "link":
				b.link("/proc/sys/kernel/hostname", "dev/null")
			case "file":
				must(t, os.WriteFile(null, []byte("mine"), 0o666))
			}
			b.spec.Linux.MaskedPaths = []string{"/proc/interrupts"}
			out := b.run(e)
			if out.err == nil && !strings.Contains(out.text, "1:3 character special file") {
				return kind + ": /proc/interrupts is masked by something else, read-write"
			}
		}
		return ""
	})
}

// CVE-2025-52565, CVE-2026-88264: /dev/console of the image leads to the host.
func TestA8Console(t *testing.T) {
	battery(t, "A8 CVE-2025-52565, 2026-88264 console", false, peers(t, "crun"), func(t *testing.T, e engine) string {
		for _, target := range []string{"/new", "/ptmx"} {
			b := newBundle(t, "stat -c '%t' /dev/console")
			b.link(b.canary.dir+target, "dev/console")
			out := b.terminal(e)
			if hit := b.canary.touched(t); hit != "" {
				return hit
			}
			if out.err == nil && !strings.Contains(out.text, "88") {
				return "/dev/console is no terminal"
			}
		}
		return ""
	})
}

// CVE-2026-41579, CVE-2026-47766: /dev of the image leads to the host.
func TestA9DevDirectory(t *testing.T) {
	battery(t, "A9 CVE-2026-41579, 2026-47766 /dev", false, peers(t, "runc", "crun"), func(t *testing.T, e engine) string {
		for _, tmpfs := range []bool{false, true} {
			b := newBundle(t, "ls /dev")
			b.link(b.canary.dir, "dev")
			if tmpfs {
				b.mount("/dev", "tmpfs", "tmpfs")
			}
			b.run(e)
			if hit := b.canary.touched(t); hit != "" {
				return hit
			}
		}
		return ""
	})
}

// CVE-2026-88265: standard input and output are reopened through the image's /dev/null.
func TestA10StandardStreams(t *testing.T) {
	battery(t, "A10 CVE-2026-88265 stdio", false, peers(t, "runc", "crun"), func(t *testing.T, e engine) string {
		b := newBundle(t, "sleep 100000")
		b.link("/proc/sys/kernel/hostname", "dev/null")
		pid, _ := b.start(e)
		if pid == 0 {
			return ""
		}
		for fd := range 3 {
			to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd))
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(to, "hostname") {
				return fmt.Sprintf("descriptor %d is %s", fd, to)
			}
		}
		return ""
	})
}

// CVE-2026-115521: the root is made read-only through a descriptor's path that the container
// has forged.
func TestA11ReadonlyRoot(t *testing.T) {
	needRoot(t)
	attack := func(e engine, readonly bool) string {
		for _, forge := range []string{"/proc/self/fd", "/proc/self", "/proc/thread-self/fd"} {
			b := newBundle(t, "echo x >/written && cat /written")
			b.spec.Root.Readonly = readonly
			for i := range 40 {
				must(t, os.MkdirAll(filepath.Join(b.dir, "fds/fd", fmt.Sprint(i)), 0o755))
				must(t, os.MkdirAll(filepath.Join(b.dir, "fds", fmt.Sprint(i)), 0o755))
			}
			b.mount(forge, "bind", filepath.Join(b.dir, "fds"), "bind")
			if out := b.run(e); out.err == nil && strings.HasPrefix(out.text, "x") {
				return forge + ": the root is writable"
			}
		}
		return ""
	}
	// hako refuses the mounts. Where they are allowed they do not help either.
	open := without(t, "A4")
	if hit := attack(open, true); hit != "" {
		t.Errorf("hako with mounts in /proc is hit: %s", hit)
	}
	compared(t, "A11 CVE-2026-115521 read-only root", "hako without A4 and readonly", attack(open, false), attack(hako(t), true))
}

// lateEntry tells whether the kernel (6.17) can mount the procfs of another PID namespace.
// Older ones make the process that mounts it enter first, with the host's root.
func lateEntry() bool {
	var u unix.Utsname
	var major, minor int
	if unix.Uname(&u) != nil {
		return false
	}
	_, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return err == nil && (major > 6 || major == 6 && minor >= 17)
}

// CVE-2016-9962 in a pod: a container that may trace looks into its neighbour's first process
// while that is being made. A hook holds the window open.
func TestA2SharedPIDNamespace(t *testing.T) {
	if !lateEntry() {
		t.Skipf("%s needs Linux 6.17: see docs/security.md", t.Name())
	}
	controls := peers(t, "runc")
	if len(controls) == 0 {
		controls = append(controls, without(t, "A2"))
	}
	battery(t, "A2 shared PID namespace", false, controls, func(t *testing.T, e engine) string {
		canary := newCanary(t).dir
		a := newBundle(t, fmt.Sprintf(`until [ -e /stop ]; do for p in /proc/[0-9]*; do [ -e $p/root%[1]s/host-secret ] || [ -e $p/cwd%[1]s/host-secret ] && touch /reached; done; echo >>/passes; done; touch /end; while :; do sleep 1; done`, canary))
		pid, out := a.start(e)
		if pid == 0 {
			t.Fatal(out.text, out.err)
		}
		b := newBundle(t, "sleep 100000")
		b.spec.Linux.Namespaces[0].Path = fmt.Sprintf("/proc/%d/ns/pid", pid)
		// Long enough for the attacker to have looked at every process.
		passes := filepath.Join(a.rootfs, "passes")
		must(t, os.WriteFile(passes, nil, 0o644))
		b.spec.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "n=$(wc -c <$0); until [ $(wc -c <$0) -gt $((n+2)) ]; do sleep 0.05; done", passes}}}}
		bPid, out := b.start(e)
		if bPid == 0 {
			t.Fatal(out.text, out.err)
		}
		own, err1 := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid))
		its, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", bPid))
		if own != its || err1 != nil || err2 != nil {
			t.Errorf("PID namespaces: %s and %s", own, its)
		}
		must(t, os.WriteFile(filepath.Join(a.rootfs, "stop"), nil, 0o644))
		eventually(t, "the attacker's end", func() bool { _, err := os.Stat(filepath.Join(a.rootfs, "end")); return err == nil })
		if _, err := os.Stat(filepath.Join(a.rootfs, "reached")); err == nil {
			return "the host's root was reached"
		}
		return ""
	})
}
