//go:build linux && (amd64 || arm64)

package criu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/rpc"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// The test is its own CRIU: under that name it answers as the file "says" in the first
// folder of $PATH tells it to.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "criu" {
		fake()
		return
	}
	os.Exit(m.Run())
}

func fake() {
	fd, _ := strconv.Atoi(os.Args[2])
	says, _ := os.ReadFile(filepath.Join(os.Getenv("PATH"), "says"))
	buf := make([]byte, 64<<10)
	receive := func() *rpc.CriuReq {
		n, _ := unix.Read(fd, buf)
		req := new(rpc.CriuReq)
		if n <= 0 || req.UnmarshalVT(buf[:n]) != nil {
			os.Exit(1)
		}
		return req
	}
	send := func(r *rpc.CriuResp, oob []byte) {
		b, _ := r.MarshalVT()
		if unix.Sendmsg(fd, b, oob, nil, 0) != nil {
			os.Exit(1)
		}
	}
	req := receive()
	answer := &rpc.CriuResp{Type: req.Type, Success: new(true)}
	what, rest, _ := strings.Cut(string(says), " ")
	switch what {
	case "version":
		var a, b, c int32
		fmt.Sscan(rest, &a, &b, &c)
		answer.Version = &rpc.CriuVersion{MajorNumber: &a, MinorNumber: &b, Sublevel: &c}
	case "features":
		answer.Features = &rpc.CriuFeatures{MemTrack: new(true)}
	case "dies":
		return
	case "garbage":
		unix.Write(fd, []byte("\xff\xff\xff"))
		return
	case "long":
		unix.Write(fd, make([]byte, 100<<10))
		return
	case "sleeps":
		time.Sleep(time.Hour)
	case "refuses":
		answer.Success, answer.CrErrmsg = new(false), new("it cannot be\n")
	case "other":
		answer.Type = new(rpc.CriuReqType_CHECK)
	case "events":
		for i, name := range strings.Fields(rest) {
			var oob []byte
			if name == "orphan-pts-master" {
				oob = unix.UnixRights(1, 2)
			}
			send(&rpc.CriuResp{Type: new(rpc.CriuReqType_NOTIFY), Success: new(true), Notify: &rpc.CriuNotify{Script: &name, Pid: new(int32(i))}}, oob)
			if r := receive(); r.GetType() != rpc.CriuReqType_NOTIFY || !r.GetNotifySuccess() {
				answer.Success = new(false)
			}
		}
	}
	send(answer, nil)
}

// say makes a CRIU that answers so.
func say(t *testing.T, what string) string {
	t.Helper()
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(exe, filepath.Join(dir, "criu")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "says"), []byte(what), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	path, err := Path()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func TestVersion(t *testing.T) {
	for says, want := range map[string]int{"version 3 17 1": 31701, "version 4 1 0": 40100, "version 3 15 0": 31500} {
		if got, err := Version(t.Context(), say(t, says)); got != want || err != nil {
			t.Errorf("%s: %d %v", says, got, err)
		}
	}
	if _, err := Version(t.Context(), say(t, "version 3 14 9")); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "CRIU 3.14 is too old") {
		t.Errorf("an old one: %v", err)
	}
	for _, bad := range []string{"dies", "garbage", "long", "refuses", "other"} {
		if _, err := Version(t.Context(), say(t, bad)); err == nil {
			t.Errorf("%s: no error", bad)
		}
	}
	if track, lazy, err := Features(t.Context(), say(t, "features")); !track || lazy || err != nil {
		t.Errorf("features: %v %v %v", track, lazy, err)
	}
	t.Setenv("PATH", t.TempDir())
	if _, err := Path(); !errdefs.IsNotImplemented(err) {
		t.Errorf("without the program: %v", err)
	}
}

func TestEvents(t *testing.T) {
	c, err := Start(say(t, "events setup-namespaces orphan-pts-master pre-resume"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var got []string
	no := errors.New("no")
	_, err = c.Do(t.Context(), &rpc.CriuReq{Type: new(rpc.CriuReqType_RESTORE)}, func(e Event) error {
		got = append(got, fmt.Sprintf("%s:%d:%v", e.Name, e.Pid, e.File != nil))
		if e.File != nil {
			e.File.Close()
		}
		if e.Name == "pre-resume" {
			return no
		}
		return nil
	})
	if want := "setup-namespaces:0:false orphan-pts-master:1:true pre-resume:2:false"; strings.Join(got, " ") != want {
		t.Errorf("events %q", got)
	}
	if !errors.Is(err, no) {
		t.Errorf("got %v, want the handler's error", err)
	}
	if _, err := c.Do(t.Context(), &rpc.CriuReq{Type: new(rpc.CriuReqType_CHECK)}, nil); err == nil {
		t.Error("a CRIU that has ended answers")
	}
}

func TestImagesOfOthers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s", t.Name())
	}
	target := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(target, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	fill := func(f func(dir string) error) string {
		dir := filepath.Join(t.TempDir(), "images")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "core-1.img"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := f(dir); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	for name, f := range map[string]func(dir string) error{
		"link":          func(dir string) error { return os.Symlink(target, filepath.Join(dir, "pages-1.img")) },
		"dangling link": func(dir string) error { return os.Symlink(target+"x", filepath.Join(dir, "dump.log")) },
		"hard link": func(dir string) error {
			return os.Link(filepath.Join(dir, "core-1.img"), filepath.Join(filepath.Dir(dir), "other"))
		},
		"device": func(dir string) error { return unix.Mknod(filepath.Join(dir, "d"), unix.S_IFCHR|0o600, 1<<8|3) },
		"fifo":   func(dir string) error { return unix.Mkfifo(filepath.Join(dir, "status"), 0o600) },
		"socket": func(dir string) error { return unix.Mknod(filepath.Join(dir, "s"), unix.S_IFSOCK|0o600, 0) },
		"socket of others": func(dir string) error {
			name := filepath.Join(dir, "lazy-pages.socket")
			return errors.Join(unix.Mknod(name, unix.S_IFSOCK|0o600, 0), os.Chown(name, 1000, 1000))
		},
		"directory":     func(dir string) error { return os.Mkdir(filepath.Join(dir, "d"), 0o700) },
		"writable":      func(dir string) error { return os.Chmod(dir, 0o777) },
		"writable file": func(dir string) error { return os.Chmod(filepath.Join(dir, "core-1.img"), 0o666) },
		"owner":         func(dir string) error { return os.Chown(dir, 1000, 1000) },
		"owner of file": func(dir string) error { return os.Chown(filepath.Join(dir, "core-1.img"), 1000, 1000) },
		"parent":        func(dir string) error { return os.Symlink("/etc", filepath.Join(dir, "parent")) },
		"parent with links": func(dir string) error {
			os.Symlink(filepath.Dir(target), filepath.Join(filepath.Dir(dir), "way"))
			return os.Symlink("../way", filepath.Join(dir, "parent"))
		},
		"parent of others": func(dir string) error {
			os.MkdirAll(filepath.Join(filepath.Dir(dir), "first", "d"), 0o700)
			return os.Symlink("../first", filepath.Join(dir, "parent"))
		},
		"endless parents": func(dir string) error { return os.Symlink("../images", filepath.Join(dir, "parent")) },
	} {
		dir := fill(f)
		if d, err := OpenImages(dir); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
			if err == nil {
				d.Close()
			}
		}
		if d, err := MakeImages(dir); err == nil {
			t.Errorf("%s is written to", name)
			d.Close()
		}
	}
	dir := fill(func(dir string) error {
		os.Mkdir(filepath.Join(filepath.Dir(dir), "first"), 0o700)
		// criu lazy-pages listens in the directory for work.
		if err := unix.Mknod(filepath.Join(dir, "lazy-pages.socket"), unix.S_IFSOCK|0o700, 0); err != nil {
			return err
		}
		return os.Symlink("../first", filepath.Join(dir, "parent"))
	})
	d, err := OpenImages(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := CheckParent(d, "../first"); err != nil {
		t.Error(err)
	}
	for _, p := range []string{"", "/etc", "../missing", "../../../../../../../etc"} {
		if err := CheckParent(d, p); err == nil {
			t.Errorf("parent %q", p)
		}
	}
	if err := os.Symlink(dir, dir+"2"); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenImages(dir + "2"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a link to the images: %v", err)
	}
	if _, err := Reopen(filepath.Dir(dir), d); err == nil {
		t.Error("another directory is taken for the same")
	}
}

// message encodes fields: a number, or what has a length.
func message(fields ...any) (b []byte) {
	for i := 0; i < len(fields); i += 2 {
		n := uint64(fields[i].(int))
		switch v := fields[i+1].(type) {
		case int:
			b = binary.AppendUvarint(binary.AppendUvarint(b, n<<3), uint64(v))
		case string:
			b = append(binary.AppendUvarint(binary.AppendUvarint(b, n<<3|2), uint64(len(v))), v...)
		case []byte:
			b = append(binary.AppendUvarint(binary.AppendUvarint(b, n<<3|2), uint64(len(v))), v...)
		}
	}
	return b
}

func image(magic uint32, entries ...[]byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, magicCommon)
	b = binary.LittleEndian.AppendUint32(b, magic)
	for _, e := range entries {
		b = append(binary.LittleEndian.AppendUint32(b, uint32(len(e))), e...)
	}
	return b
}

func TestCheckFiltersAndCgroups(t *testing.T) {
	path := t.TempDir()
	dir, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	want := []byte("12345678")
	ours, later := message(1, want), message(1, "other", 2, 0)
	for name, c := range map[string]struct {
		image []byte
		ok    bool
	}{
		"ours":       {image(magicSeccomp, message(1, ours, 1, later)), true},
		"other":      {image(magicSeccomp, message(1, message(1, "87654321"))), false},
		"one of two": {image(magicSeccomp, message(1, ours, 1, message(1, "x"))), false},
		"in a ring":  {image(magicSeccomp, message(1, message(1, "x", 2, 1), 1, message(1, "y", 2, 0), 1, ours)), false},
		"on itself":  {image(magicSeccomp, message(1, later)), false},
		"on nothing": {image(magicSeccomp, message(1, ours, 1, message(1, "x", 2, 9))), false},
		"before it":  {image(magicSeccomp, message(1, message(1, "x", 2, 1), 1, ours)), true},
		"none":       {image(magicSeccomp), false},
		"short":      {image(magicSeccomp, ours)[:11], false},
		"magic":      {image(magicCgroup, message(1, ours)), false},
		"garbage":    {image(magicSeccomp, []byte("\x0a\xff\xff\xff\xff\xff")), false},
		"empty":      {nil, false},
	} {
		if err := os.WriteFile(filepath.Join(path, "seccomp.img"), c.image, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := CheckFilters(dir, want); (err == nil) != c.ok || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("filters, %s: %v", name, err)
		}
	}
	inner := func(name, property string) []byte {
		return message(2, message(1, "cpu", 2, message(1, "/a/b", 2, message(1, name, 3, message(1, property, 2, "1")))))
	}
	for name, c := range map[string]struct {
		image []byte
		ok    bool
	}{
		"plain":    {image(magicCgroup, append(message(1, message(1, 1, 2, message(1, "cpu", 2, "/a"))), inner("c", "cpu.max")...)), true},
		"path":     {image(magicCgroup, message(1, message(2, message(1, "cpu", 2, "/a/../../b")))), false},
		"dir":      {image(magicCgroup, inner("../x", "cpu.max")), false},
		"property": {image(magicCgroup, inner("c", "../cgroup.procs")), false},
		"name":     {image(magicCgroup, message(2, message(1, "../.."))), false},
		"garbage":  {image(magicCgroup, bytes.Repeat([]byte{0x12, 0xff}, 9)), false},
	} {
		if err := os.WriteFile(filepath.Join(path, "cgroup.img"), c.image, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := CheckCgroups(dir); (err == nil) != c.ok || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("cgroups, %s: %v", name, err)
		}
	}
	deep := message(1, "x")
	for range 2 * maxCgroupDepth {
		deep = message(1, "x", 2, deep)
	}
	if err := checkCgroupDir(deep, maxCgroupDepth); err == nil {
		t.Error("no end to nested cgroups")
	}
}

func TestLogErrors(t *testing.T) {
	path := t.TempDir()
	dir, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	log := "(00.1) Warn  (x.c:1): no\n(00.1) Error (criu/tun.c:85): tun: Unable to create tun: No such file\n(00.2) Error (criu/a.c:7): cause\n(00.3)   1: Error (criu/b.c:9): then\n"
	if err := os.WriteFile(filepath.Join(path, "log"), []byte(log), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := LogErrors(dir, "log"); got != "cause; then" {
		t.Errorf("%q", got)
	}
	if err := os.Symlink("log", filepath.Join(path, "link")); err != nil {
		t.Fatal(err)
	}
	if got := LogErrors(dir, "link") + LogErrors(dir, "none"); got != "" {
		t.Errorf("%q", got)
	}
}

func FuzzImages(f *testing.F) {
	f.Add(image(magicSeccomp, message(1, message(1, "12345678"))))
	f.Add(image(magicCgroup, message(2, message(1, "cpu", 2, message(1, "/a/b")))))
	f.Fuzz(func(t *testing.T, raw []byte) {
		path := t.TempDir()
		dir, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		for _, name := range []string{"seccomp.img", "cgroup.img"} {
			if err := os.WriteFile(filepath.Join(path, name), raw, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		_, _ = CheckFilters(dir, []byte("12345678")), CheckCgroups(dir)
	})
}
