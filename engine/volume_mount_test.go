package engine

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestParseVolumeOptions(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		opts  map[string]string
		flags uintptr
		data  string
		more  []uintptr
	}{
		"bind":  {map[string]string{"type": "none", "device": "/srv", "o": "bind"}, unix.MS_BIND, "", nil},
		"rbind": {map[string]string{"type": "none", "device": "/srv", "o": "rbind,ro,nosuid,rslave"}, unix.MS_BIND | unix.MS_REC | unix.MS_RDONLY | unix.MS_NOSUID, "", []uintptr{unix.MS_SLAVE | unix.MS_REC}},
		"tmpfs": {map[string]string{"type": "tmpfs", "device": "tmpfs", "o": "size=100m,uid=1000,nodev,ro,rw"}, unix.MS_NODEV, "size=100m,uid=1000", nil},
		"nfs":   {map[string]string{"type": "nfs", "device": ":/export", "o": "addr=10.0.0.1,rw,nfsvers=4,soft"}, 0, "addr=10.0.0.1,nfsvers=4,soft", nil},
		"plain": {map[string]string{"type": "ext4", "device": "/dev/sdb1"}, 0, "", nil},
	} {
		a := parseVolumeOptions(tt.opts)
		if a.flags != tt.flags || strings.Join(a.data, ",") != tt.data || !slices.Equal(a.propagation, tt.more) || a.device != tt.opts["device"] || a.fsType != tt.opts["type"] {
			t.Errorf("%s: %+v", name, a)
		}
	}
	for want, opts := range map[string]map[string]string{
		`create v: missing required option: "device"`:         {"type": "none", "o": "bind"},
		`create v: missing required option: "type"`:           {"device": "/srv"},
		`create v: invalid option: "uid"`:                     {"uid": "0"},
		`create v: quota size requested but no quota support`: {"size": "1g"},
		`create v: mount option "remount" makes no volume`:    {"type": "tmpfs", "device": "tmpfs", "o": "remount"},
		`create v: invalid value of option "device"`:          {"type": "none", "device": "a\x00b"},
		`create v: value of option "o" is too long`:           {"type": "tmpfs", "device": "tmpfs", "o": strings.Repeat("x", 5000)},
	} {
		if err := checkVolumeOptions("v", opts); !errdefs.IsInvalidArgument(err) || err.Error() != want {
			t.Errorf("%v: %v, want %s", opts, err, want)
		}
	}
	if err := checkVolumeOptions("v", nil); err != nil {
		t.Error(err)
	}
}

func TestParseMounts(t *testing.T) {
	t.Parallel()
	table := `21 1 254:0 / / rw - ext4 /dev/vda rw
40 21 0:33 / /lib/my\040volumes/a/_data rw - tmpfs tmpfs rw
41 21 0:34 / /lib/my\040volumes/ab rw - tmpfs tmpfs rw
42 40 0:35 / /lib/my\040volumes/a/_data/x\134y rw - tmpfs tmpfs rw
43 40 0:36 / /lib/my\040volumes/a/_data rw - tmpfs tmpfs rw
short line
`
	got := parseMounts(table, "/lib/my volumes/a")
	if want := []string{`/lib/my volumes/a/_data/x\y`, "/lib/my volumes/a/_data", "/lib/my volumes/a/_data"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// Files that are mounted in a volume's folder, by whomever, are never removed with it.
func TestMountedFilesStay(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s mounts", t.Name())
	}
	root := t.TempDir()
	dir, precious := filepath.Join(root, "volumes", "v"), filepath.Join(root, "precious")
	for _, d := range []string{filepath.Join(dir, "_data", "sub"), precious} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(precious, "file")
	if err := os.WriteFile(file, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, at := range []string{filepath.Join(dir, "_data"), filepath.Join(dir, "_data", "sub")} {
		if err := mountVolume(t.Context(), map[string]string{"type": "none", "device": precious, "o": "bind"}, at); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
		if err := removeFiles(dir); !errdefs.IsConflict(err) {
			t.Errorf("removed a folder with a mount at %s: %v", at, err)
		}
		if _, err := os.Stat(file); err != nil {
			t.Fatal(err)
		}
		if err := unmountVolume(at); err != nil {
			t.Fatal(err)
		}
	}
	// Also what lies below a volume that is unmounted with all of the root's.
	at := filepath.Join(dir, "_data")
	for range 2 { // one upon the other
		if err := mountVolume(t.Context(), map[string]string{"type": "none", "device": precious, "o": "bind,ro"}, at); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(at, "new"), nil, 0o644); err == nil {
		t.Error("a volume with o=bind,ro was written to")
	}
	if err := UnmountVolumes(root); err != nil {
		t.Fatal(err)
	}
	if err := removeFiles(dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
}
