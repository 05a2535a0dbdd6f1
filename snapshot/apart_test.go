package snapshot

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// mountpoints gives the places of the host's mount table.
func mountpoints(t *testing.T) (places []string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for line := range strings.Lines(string(b)) {
		places = append(places, strings.Fields(line)[4])
	}
	return places
}

func TestMountAny(t *testing.T) {
	needsRoot(t)
	dir := t.TempDir()
	for _, d := range []string{"a", "b", "up", "work"} {
		must(t, os.Mkdir(filepath.Join(dir, d), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, d, "of-"+d), nil, 0o600))
	}
	t.Setenv("TMPDIR", filepath.Join(dir, "none")) // nothing is made there, which a kill could leave
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	for name, ms := range map[string][]mount.Mount{
		"a file system of its own": {{Type: "tmpfs", Source: "tmpfs", Options: []string{"size=1m"}}},
		"an option that is not ours": {{Type: "overlay", Source: "overlay", Options: []string{
			"lowerdir=" + b + ":" + a, "upperdir=" + filepath.Join(dir, "up"), "workdir=" + filepath.Join(dir, "work"), "nfs_export=off"}}},
		"one upon the other": {{Type: "tmpfs", Source: "tmpfs"}, {Type: "bind", Source: a, Options: []string{"rbind", "rw"}}},
	} {
		f, err := MountAny(ms)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		fd, err := unix.Openat(int(f.Fd()), "made", unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
		if err != nil {
			t.Errorf("%s: write: %v", name, err)
		} else {
			unix.Close(fd)
		}
		var st unix.Statfs_t
		if err := unix.Fstatfs(int(f.Fd()), &st); err != nil || st.Flags&unix.ST_NOSUID == 0 || st.Flags&unix.ST_NODEV == 0 {
			t.Errorf("%s: not protected: %x %v", name, st.Flags, err)
		}
		if name == "one upon the other" {
			if err := unix.Faccessat(int(f.Fd()), "of-a", unix.F_OK, 0); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if slices.Contains(mountpoints(t), f.Name()) {
			t.Errorf("%s: it is in the host's mount table", name)
		}
		if _, err := os.Lstat(f.Name()); !os.IsNotExist(err) {
			t.Errorf("%s: the place is left: %v", name, err)
		}
		must(t, f.Close())
	}
	if f, err := MountAny([]mount.Mount{{Type: "no-such-type", Source: "x"}}); !errdefs.IsNotImplemented(err) {
		f.Close()
		t.Errorf("a type that nobody knows: %v", err)
	}
}

// TestBetweenOtherMounts compares what another program's snapshotter gave, on a loop device.
func TestBetweenOtherMounts(t *testing.T) {
	needsRoot(t)
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		t.Skip("needs mkfs.ext4 (e2fsprogs): " + t.Name())
	}
	image := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(image)
	must(t, err)
	must(t, f.Truncate(16<<20))
	must(t, f.Close())
	if out, err := exec.Command("mkfs.ext4", "-q", image).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	ms := []mount.Mount{{Type: "ext4", Source: image, Options: []string{"loop", "rw"}}}
	root, err := MountAny(ms)
	must(t, err)
	must(t, unix.Mkdirat(int(root.Fd()), "new", 0o755))
	must(t, root.Close())
	changes, upper, err := Between(context.Background(), []mount.Mount{{Type: "bind", Source: t.TempDir(), Options: []string{"rbind", "ro"}}}, ms)
	must(t, err)
	must(t, upper.Close())
	if !slices.ContainsFunc(changes, func(c Change) bool { return c.Path == "/new" }) {
		t.Errorf("%+v", changes)
	}
}
