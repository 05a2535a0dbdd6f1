//go:build linux

package longoverlay

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// stack makes n layers, each with a file of its number and one that all have.
func stack(t *testing.T, dir string, n int) Overlay {
	t.Helper()
	o := Overlay{Upper: filepath.Join(dir, "upper"), Work: filepath.Join(dir, "work")}
	for _, d := range []string{o.Upper, o.Work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for i := range n {
		l := filepath.Join(dir, fmt.Sprint(i), "fs")
		if err := os.MkdirAll(l, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"all", fmt.Sprint("only", i)} {
			if err := os.WriteFile(filepath.Join(l, name), []byte(fmt.Sprint(i)), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		o.Lower = append(o.Lower, l)
	}
	return o
}

func read(t *testing.T, root *os.File, name string) string {
	t.Helper()
	fd, err := unix.Openat(int(root.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("open %s: %v", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(f); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestMountLongLists(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: TestMountLongLists mounts overlays")
	}
	for _, n := range []int{1, 20, 120} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), strings.Repeat("long", 10))
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			before, err := os.ReadFile("/proc/self/mountinfo")
			if err != nil {
				t.Fatal(err)
			}
			o := stack(t, dir, n)
			o.Attr = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV
			f, err := o.Mount()
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if got := read(t, f, "all"); got != "0" {
				t.Errorf("the file that all layers have is that of layer %s", got)
			}
			if got, want := read(t, f, fmt.Sprint("only", n-1)), fmt.Sprint(n-1); got != want {
				t.Errorf("the file of the lowest layer holds %q, not %q", got, want)
			}
			var st unix.Statfs_t
			if err := unix.Fstatfs(int(f.Fd()), &st); err != nil || st.Flags&unix.ST_NOSUID == 0 || st.Flags&unix.ST_NODEV == 0 {
				t.Errorf("flags of the mount: %#x, %v", st.Flags, err)
			}
			if fd, err := unix.Openat(int(f.Fd()), "new", unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644); err != nil {
				t.Errorf("write: %v", err)
			} else {
				unix.Close(fd)
			}
			if _, err := os.Stat(filepath.Join(o.Upper, "new")); err != nil {
				t.Errorf("a new file is not in the upper directory: %v", err)
			}
			after, err := os.ReadFile("/proc/self/mountinfo")
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(after, []byte(dir)) && !bytes.Contains(before, []byte(dir)) {
				t.Error("the mount is in the mount table of the process")
			}
		})
	}
}

func TestMountRefuses(t *testing.T) {
	long := Overlay{}
	for i := range 1000 {
		long.Lower = append(long.Lower, fmt.Sprintf("/layers/%d/of/many/fs", i))
	}
	for name, o := range map[string]Overlay{"nothing": {}, "a comma": {Lower: []string{"/a,upperdir=b"}}, "too much": long} {
		if _, err := o.Mount(); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCommonDir(t *testing.T) {
	for want, o := range map[string]Overlay{
		"/a/b": {Lower: []string{"/a/b/1/fs", "/a/b/2/fs"}, Upper: "/a/b/3/fs", Work: "/a/b/3/work"},
		"/a":   {Lower: []string{"/a/bb/1", "/a/b/2"}},
		"/":    {Lower: []string{"/a/1", "/b/2"}},
		"/c":   {Lower: []string{"/c/1"}},
	} {
		if got := o.commonDir(); got != want {
			t.Errorf("common directory of %v is %s, not %s", o, got, want)
		}
	}
	if got := (Overlay{Lower: []string{`/a/\:1`, `/a/2`}}).commonDir(); got != "/" {
		t.Errorf("with an escape: %s", got)
	}
}
