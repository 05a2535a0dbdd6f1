//go:build linux && (amd64 || arm64)

package security

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

var (
	traceLine = regexp.MustCompile(`^\d+ +([a-z_0-9]+)\((.*)$`)
	// A descriptor as strace -y prints it, then a name.
	relative = regexp.MustCompile(`^(AT_FDCWD|-100|\d+)(?:<[^>]*>)?, "([^"]*)"`)
	quoted   = regexp.MustCompile(`"([^"]*)"`)
)

// pathCalls take a path and change something, or mount.
const pathCalls = "mount,mkdir,mkdirat,mknod,mknodat,symlink,symlinkat,unlink,unlinkat,chown,lchown,fchownat,chmod,fchmodat,open,openat,creat,rename,link,linkat,clone,clone3,unshare,execve,execveat"

// violations (H3) reads a trace: between the making of the mount namespace and the exec of
// the container's program nothing below the root file system or /proc is mounted on, made,
// removed, changed or opened for writing by its path.
func violations(trace, rootfs string) (out []string) {
	inside := false
	for line := range strings.Lines(trace) {
		m := traceLine.FindStringSubmatch(strings.TrimSpace(line))
		if m == nil {
			continue
		}
		call, args := m[1], m[2]
		if (strings.HasPrefix(call, "clone") || call == "unshare") && strings.Contains(args, "CLONE_NEWNS") {
			inside = true
			continue
		}
		if !inside {
			continue
		}
		if strings.HasPrefix(call, "execve") {
			if strings.Contains(args, "/bin/sh") || strings.Contains(args, `"sh"`) {
				return out
			}
			continue
		}
		path := ""
		if call == "symlinkat" { // the first string is what the link says
			_, args, _ = strings.Cut(args, ", ")
		}
		if r := relative.FindStringSubmatch(args); r != nil && strings.HasSuffix(call, "at") {
			if r[1] != "AT_FDCWD" && r[1] != "-100" && !strings.Contains(r[2], "/") {
				continue // one name in a directory that is open
			}
			path = r[2]
		} else if q := quoted.FindAllStringSubmatch(args, -1); q != nil {
			path = q[len(q)-1][1]
			if call == "mount" {
				path = q[min(1, len(q)-1)][1]
			}
		}
		if strings.HasPrefix(call, "open") && !strings.Contains(args, "O_WRONLY") && !strings.Contains(args, "O_RDWR") && !strings.Contains(args, "O_CREAT") {
			continue
		}
		if path == "" || strings.HasPrefix(path, "/") && !strings.HasPrefix(path, rootfs) && !strings.HasPrefix(path, "/proc") {
			continue
		}
		out = append(out, strings.TrimSpace(line))
	}
	return append(out, "the container's program was never executed")
}

// H3: the rule behind the rows A4 to A12.
func TestH3NoPathIsUsed(t *testing.T) {
	needRoot(t)
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skipf("%s needs the command strace", t.Name())
	}
	battery(t, "H3 no path below the root is used", false, peers(t, "runc"), func(t *testing.T, e engine) string {
		b := newBundle(t, "true")
		b.spec.Process.Args[0] = "/bin/sh"
		b.spec.Mounts = append(b.spec.Mounts,
			specs.Mount{Destination: "/sys", Type: "sysfs", Source: "sysfs"},
			specs.Mount{Destination: "/dev", Type: "tmpfs", Source: "tmpfs"},
			specs.Mount{Destination: "/dev/pts", Type: "devpts", Source: "devpts"},
			specs.Mount{Destination: "/not/there", Type: "tmpfs", Source: "tmpfs"})
		b.spec.Linux.Sysctl = map[string]string{"kernel.shm_rmid_forced": "1"}
		b.spec.Linux.MaskedPaths, b.spec.Linux.ReadonlyPaths = []string{"/proc/keys", "/sys/firmware"}, []string{"/proc/sys"}
		b.writeConfig()
		file := filepath.Join(b.dir, "trace")
		traced := e
		traced.command = append([]string{"strace", "-f", "-y", "-s", "256", "-o", file, "-e", "trace=" + pathCalls}, e.command...)
		if out := b.do(traced, "run", b.id); out.err != nil {
			t.Fatal(out.text, out.err)
		}
		b.remove(e)
		raw, err := os.ReadFile(file)
		must(t, err)
		if v := violations(string(raw), b.rootfs); len(v) > 0 {
			return fmt.Sprintf("%d calls, the first: %s", len(v), v[0])
		}
		return ""
	})
}
