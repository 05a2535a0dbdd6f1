//go:build linux && (amd64 || arm64)

package security

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func digest(t *testing.T, path string) [32]byte {
	t.Helper()
	raw, err := os.ReadFile(path)
	must(t, err)
	return sha256.Sum256(raw)
}

// CVE-2018-15664's kin in runtimes: files that an engine binds over an image's own follow
// the image's links (CVE-2019-18837, CVE-2024-5154, CVE-2024-9341, CVE-2025-9566).
func TestA12InjectedFiles(t *testing.T) {
	battery(t, "A12 CVE-2024-5154, 2024-9341 injected files", false, []engine{without(t, "A5")}, func(t *testing.T, e engine) string {
		for i, name := range []string{"etc", "etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/mtab", "run", "run/secrets", "dev", "tmp", "sys"} {
			to := []string{"", "/sub/new", "/sub"}[i%3]
			b := newBundle(t, "true")
			target := b.canary.dir + to
			if to == "/sub" {
				target = strings.Repeat("../", 30) + target
			}
			b.link(target, name)
			file := filepath.Join(b.dir, "injected")
			must(t, os.WriteFile(file, []byte("injected"), 0o644))
			for _, f := range []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run/secrets/token"} {
				b.mount(f, "bind", file, "bind")
			}
			b.mount("/tmp/a/b", "tmpfs", "tmpfs")
			b.spec.Process.Cwd = "/tmp/work"
			b.run(e)
			if hit := b.canary.touched(t); hit != "" {
				return name + ": " + hit
			}
		}
		return ""
	})
}

// shortLengths passes the namespaces on as runc up to 1.0.2 did: each part behind a length of 16 bits that nobody has compared with
// the part. The rest of one that is too long is read as other parts, and those that nobody knows are skipped.
func shortLengths(l *specs.Linux) {
	var message []byte
	put := func(kind byte, text string) {
		message = append(binary.LittleEndian.AppendUint16(append(message, kind), uint16(len(text))), text...)
	}
	var known []specs.LinuxNamespaceType
	for _, n := range l.Namespaces {
		if known = append(known, n.Type); n.Type == specs.UserNamespace {
			var maps strings.Builder
			for _, m := range l.UIDMappings {
				fmt.Fprintf(&maps, "%4d %6d %3d\n", m.ContainerID, m.HostID, m.Size) // 16 bytes
			}
			put('m', maps.String())
		}
		put('n', string(n.Type)+" "+n.Path)
	}
	l.Namespaces, l.UIDMappings = nil, nil
	for len(message) >= 3 {
		kind, end := message[0], min(3+int(binary.LittleEndian.Uint16(message[1:])), len(message))
		text := string(message[3:end])
		message = message[end:]
		switch kind {
		case 'm':
			for line := range strings.Lines(text) {
				var m specs.LinuxIDMapping
				if _, err := fmt.Sscan(line, &m.ContainerID, &m.HostID, &m.Size); err == nil {
					l.UIDMappings = append(l.UIDMappings, m)
				}
			}
		case 'n':
			typ, path, _ := strings.Cut(text, " ")
			if slices.Contains(known, specs.LinuxNamespaceType(typ)) {
				l.Namespaces = append(l.Namespaces, specs.LinuxNamespace{Type: specs.LinuxNamespaceType(typ), Path: path})
			}
		}
	}
	l.GIDMappings = l.UIDMappings
}

// CVE-2021-43784: lengths that 16 bits do not hold.
func TestA16HugeConfiguration(t *testing.T) {
	ours := hako(t)
	for namespace, change := range map[string]func(*specs.Linux){
		"user": func(l *specs.Linux) {
			l.Namespaces = append(l.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
			for i := range uint32(4096) {
				l.UIDMappings = append(l.UIDMappings, specs.LinuxIDMapping{ContainerID: i, HostID: 100000 + i, Size: 1})
			}
			l.GIDMappings = l.UIDMappings
		},
		"net": func(l *specs.Linux) { l.Namespaces[4].Path = "/" + strings.Repeat("x", 1<<16-len("network /")) },
	} {
		hosts, err := os.Readlink("/proc/self/ns/" + namespace)
		must(t, err)
		attempt := func(handed func(*specs.Linux)) string {
			b := newBundle(t, "echo started in $(readlink /proc/self/ns/"+namespace+")")
			change(b.spec.Linux)
			handed(b.spec.Linux)
			switch out := b.run(ours); {
			case strings.Contains(out.text, "started in "+hosts):
				return "started in the host's namespace"
			case out.err == nil || strings.Contains(out.text, "started") || strings.Contains(out.text, "goroutine "):
				return fmt.Sprintf("no clean refusal: %v %s", out.err, out.text)
			}
			return ""
		}
		control := attempt(shortLengths)
		if !strings.Contains(control, "host's") {
			t.Errorf("control: %s", control)
		}
		compared(t, "A16 CVE-2021-43784 lengths, "+namespace, "lengths of 16 bits", control, attempt(func(*specs.Linux) {}))
	}
}

// expandEnv makes this program a runtime that makes numbers of the configuration's lists.
const expandEnv = "HAKO_SECURITY_EXPAND"

// expand is how a list is obviously read. It ends where it has shown what that costs.
func expand() int {
	if !slices.Contains(os.Args, "run") {
		return 0
	}
	raw, err := os.ReadFile("config.json")
	var spec specs.Spec
	if err = errors.Join(err, json.Unmarshal(raw, &spec)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	cpu := spec.Linux.Resources.CPU
	if cpu == nil {
		return 0
	}
	var all []uint64
	for _, list := range []string{cpu.Cpus, cpu.Mems} {
		if list == "" {
			continue
		}
		first, last, _ := strings.Cut(list, "-")
		from, err := strconv.ParseUint(first, 10, 64)
		to, err2 := strconv.ParseUint(last, 10, 64)
		if err = errors.Join(err, err2); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		for n := from; n <= to; n++ {
			if all = append(all, n); len(all) > 9<<20 {
				return 1
			}
		}
	}
	return 0
}

// CVE-2018-20699: huge numbers make a process that expands them.
func TestA18HugeNumbers(t *testing.T) {
	needRoot(t)
	self, err := os.Executable()
	must(t, err)
	naive := engine{name: "expanding", command: []string{self}, env: []string{expandEnv + "=1"}}
	battery(t, "A18 CVE-2018-20699 huge numbers", false, []engine{naive}, func(t *testing.T, e engine) string {
		attempt := func(change func(*specs.LinuxResources)) (hit string, accepted bool) {
			b := newBundle(t, "true")
			change(b.spec.Linux.Resources)
			b.writeConfig()
			rss, cpu, err := b.took(e, "run", b.id)
			b.remove(e)
			if cpu > 5*time.Second {
				return fmt.Sprintf("took %v of the CPU", cpu), err == nil
			}
			if rss > 64<<10 {
				return fmt.Sprintf("took %d KiB", rss), err == nil
			}
			return "", err == nil
		}
		// What is measured is the number, and not the program.
		if hit, accepted := attempt(func(r *specs.LinuxResources) { r.CPU = &specs.LinuxCPU{Cpus: "0-0"} }); hit != "" || !accepted {
			t.Errorf("%s: an ordinary list: accepted: %t %s", e.name, accepted, hit)
		}
		var hits []string
		for name, change := range map[string]func(*specs.LinuxResources){
			"cpus":   func(r *specs.LinuxResources) { r.CPU = &specs.LinuxCPU{Cpus: "1-2147483647"} },
			"mems":   func(r *specs.LinuxResources) { r.CPU = &specs.LinuxCPU{Mems: "0-4294967295"} },
			"shares": func(r *specs.LinuxResources) { v := ^uint64(0); r.CPU = &specs.LinuxCPU{Shares: &v, Cpus: "NaN"} },
			"memory": func(r *specs.LinuxResources) { v := int64(-1 << 63); r.Memory = &specs.LinuxMemory{Limit: &v} },
		} {
			hit, accepted := attempt(change)
			if accepted && name != "memory" {
				hit += " accepted"
			}
			if hit != "" {
				hits = append(hits, name+": "+hit)
			}
		}
		return strings.Join(hits, "; ")
	})
}

// The annotation of crun by which a configuration names a file for what its hooks say (row B7).
func TestB7RuntimeAnnotations(t *testing.T) {
	battery(t, "B7 annotations of a configuration", false, peers(t, "crun"), func(t *testing.T, e engine) string {
		b := newBundle(t, "true")
		must(t, os.Mkdir(filepath.Join(b.rootfs, "dev"), 0o755))
		ran := filepath.Join(b.dir, "ran")
		b.spec.Hooks = &specs.Hooks{Prestart: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "echo >>" + ran + "; echo owned; echo owned >&2"}}}} //nolint:staticcheck // what crun knows
		b.spec.Annotations = map[string]string{
			"run.oci.hooks.stdout": filepath.Join(b.canary.dir, "sub/file"), "run.oci.hooks.stderr": filepath.Join(b.canary.dir, "new"),
			"run.oci.handler": "krun", "org.systemd.property.ExecStopPost": b.canary.dir, "io.katacontainers.config.hypervisor.path": b.canary.dir,
		}
		if e.name == "crun" {
			delete(b.spec.Annotations, "run.oci.handler") // Debian's is built without it, and refuses
		}
		out := b.run(e)
		if _, err := os.Stat(ran); err != nil {
			t.Errorf("%s: the hook did not run: %v %s", e.name, out.err, out.text)
		}
		return b.canary.touched(t)
	})
}

// CVE-2022-29162, CVE-2022-27650, CVE-2025-27612: exec gives inheritable capabilities.
func TestB1InheritableCapabilities(t *testing.T) {
	ours := hako(t)
	sets := func(inheritable bool) string {
		b := newBundle(t, "sleep 100000")
		if inheritable {
			b.spec.Process.Capabilities.Inheritable = capabilities
		}
		if pid, out := b.start(ours); pid == 0 {
			t.Fatal(out.text, out.err)
		}
		for _, args := range [][]string{{}, {"--cap", "CAP_NET_ADMIN"}, {"-u", "1000:1000"}, {"-u", "1000", "--cap", "CAP_SYS_ADMIN"}} {
			out := b.do(ours, append(append([]string{"exec"}, args...), b.id, "cat", "/proc/self/status")...)
			for line := range strings.Lines(out.text) {
				if set, ok := strings.CutPrefix(line, "CapInh:"); ok && strings.Trim(set, "\t\n 0") != "" {
					return fmt.Sprintf("exec %q: inheritable set %s", args, strings.TrimSpace(set))
				}
			}
			if !strings.Contains(out.text, "CapInh:") {
				t.Fatal(out.text, out.err)
			}
		}
		return ""
	}
	compared(t, "B1 CVE-2022-29162 inheritable capabilities", "a config that asks for them", sets(true), sets(false))
}

// CVE-2024-40635, CVE-2026-30892: a user id that overflows becomes 0.
func TestB2UserOverflow(t *testing.T) {
	battery(t, "B2 CVE-2024-40635 user overflow", false, peers(t, "runc", "crun"), func(t *testing.T, e engine) string {
		b := newBundle(t, "sleep 100000")
		must(t, os.WriteFile(filepath.Join(b.rootfs, "etc/passwd"), []byte("1000:x:0:0::/:/bin/sh\nroot:x:0:0::/:/bin/sh\n"), 0o644))
		must(t, os.Mkdir(filepath.Join(b.rootfs, "dev"), 0o755))
		b.spec.Process.User = specs.User{UID: 7, GID: 7}
		if pid, out := b.start(e); pid == 0 {
			t.Fatal(out.text, out.err)
		}
		for _, user := range []string{"4294967296", "18446744073709551616", "-1", "0x0", "1000", "1000:4294967296", "4294967295", "1e3", " 0", "+0", "1000:0x0"} {
			out := b.do(e, "exec", "-u", user, b.id, "id")
			if strings.Contains(out.text, "uid=0") || strings.Contains(out.text, "gid=0") && user != "1000" {
				return fmt.Sprintf("exec -u %s: %s", user, out.text)
			}
		}
		return ""
	})
}

// The row E2 (CVE-2026-53489): images that somebody else has prepared. What they are is looked
// at before CRIU is, so this needs none; E1 and E3 with CRIU are tests of oci, in the virtual
// machine.
func TestE2ImagesOfOthers(t *testing.T) {
	needRoot(t)
	secret := filepath.Join(t.TempDir(), "secret")
	must(t, os.WriteFile(secret, []byte("secret"), 0o600))
	control, hit := "", ""
	for name, prepare := range map[string]func(dir string) error{
		"link":      func(dir string) error { return os.Symlink(secret, filepath.Join(dir, "descriptors.json")) },
		"dump.log":  func(dir string) error { return os.Symlink(secret, filepath.Join(dir, "dump.log")) },
		"hard link": func(dir string) error { return os.Link(secret, filepath.Join(dir, "pages-1.img")) },
		"device":    func(dir string) error { return unix.Mknod(filepath.Join(dir, "core-1.img"), unix.S_IFBLK|0o600, 8<<8) },
		"fifo":      func(dir string) error { return unix.Mkfifo(filepath.Join(dir, "status"), 0o600) },
		"parent":    func(dir string) error { return os.Symlink("/etc", filepath.Join(dir, "parent")) },
		"writable":  func(dir string) error { return os.Chmod(dir, 0o777) },
	} {
		b := newBundle(t, "true")
		b.writeConfig()
		dir := filepath.Join(b.dir, "images")
		must(t, os.Mkdir(dir, 0o700))
		must(t, prepare(dir))
		if raw, err := os.ReadFile(filepath.Join(dir, "descriptors.json")); err == nil && string(raw) == "secret" {
			control = "read " + name
		}
		if out := b.do(hako(t), "restore", "--bundle", b.dir, "--image-path", dir, b.id); out.err == nil || !strings.Contains(out.text, "images in ") {
			hit += fmt.Sprintf("%s: %v %s; ", name, out.err, out.text)
		}
	}
	compared(t, "E2 CVE-2026-53489 images of others", "reading through the link", control, hit)
}

// The row E3 (CVE-2026-119101): a name of a mount that goes on as another option of CRIU.
func TestE3NamesOfMounts(t *testing.T) {
	needRoot(t)
	evil := "/a]:/etc"
	// The obvious way to name the mount: what CRIU takes for its name ends at the bracket.
	naive := "mnt[" + evil + "]:" + "/tmp"
	control := ""
	if _, source, _ := strings.Cut(strings.TrimPrefix(naive, "mnt["), "]:"); source != "/tmp" {
		control = "CRIU would mount " + source
	}
	b := newBundle(t, "true")
	b.mount(evil, "", "/tmp", "bind")
	b.writeConfig()
	dir := filepath.Join(b.dir, "images")
	must(t, os.Mkdir(dir, 0o700))
	hit := ""
	if out := b.do(hako(t), "restore", "--bundle", b.dir, "--image-path", dir, b.id); out.err == nil || !strings.Contains(out.text, "bracket") {
		hit = fmt.Sprintf("%v %s", out.err, out.text)
	}
	compared(t, "E3 CVE-2026-119101 names of mounts", "the name in CRIU's options", control, hit)
}
