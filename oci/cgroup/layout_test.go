//go:build linux

package cgroup

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestParseLayout(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, mounts, own, want string
	}{
		{
			"v2", "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
			"0::/user.slice/user-0.slice/session-1.scope\n",
			"v2 /sys/fs/cgroup(v2 [] /user.slice/user-0.slice/session-1.scope)",
		},
		{
			"v1 with combined controllers and a second mount in a root file system",
			`31 30 0:27 / /var/lib/x/rootfs/sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct
32 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
33 30 0:28 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset,noprefix
34 30 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
35 30 0:30 / /proc rw - proc proc rw
`,
			"4:cpuset:/a\n3:cpu,cpuacct:/a:b\n2:name=systemd:/\n5:memory:/\n",
			"v1 /sys/fs/cgroup/cpuset([cpuset] /a) /sys/fs/cgroup/cpu,cpuacct([cpu cpuacct] /a:b) /sys/fs/cgroup/systemd([name=systemd] /)",
		},
		{
			"hybrid, in a container without cgroup namespace, with a space in the mount point",
			`31 30 0:27 /docker/abc /sys/fs/cg\040roup/pids ro - cgroup cgroup rw,pids
32 30 0:28 /docker/abc /sys/fs/cgroup/unified ro - cgroup2 cgroup2 rw
`,
			"2:pids:/docker/abc\n0::/docker/abc/sub\n",
			"hybrid /sys/fs/cg roup/pids([pids] /) /sys/fs/cgroup/unified(v2 [] /sub)",
		},
		{
			"outside of the cgroup namespace", "30 23 0:26 /../.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "0::/../x\n",
			"v2 /sys/fs/cgroup(v2 [] )",
		},
		{"elsewhere", "30 23 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "0::/docker/abcdef\n", "v2 /sys/fs/cgroup(v2 [] )"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l, err := parseLayout([]byte(c.mounts), []byte(c.own))
			if err != nil {
				t.Fatal(err)
			}
			got := string(l.Mode)
			for _, h := range l.Hierarchies {
				v2 := ""
				if h.V2 {
					v2 = "v2 "
				}
				got += fmt.Sprintf(" %s(%s%v %s)", h.Mount, v2, h.Controllers, h.Own)
			}
			if got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
	for _, mounts := range []string{"", "30 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n", "- cgroup\n", "a b c d - cgroup2 x\n", "1 2 3 / /x rw - cgroup x rw,name=systemd\n"} {
		if _, err := parseLayout([]byte(mounts), []byte("0::/\n1:name=systemd:/\nx\n::\n")); !errors.Is(err, errdefs.ErrFailedPrecondition) {
			t.Errorf("%q: %v", mounts, err)
		}
	}
}

func TestHierarchyDir(t *testing.T) {
	t.Parallel()
	v1 := Hierarchy{Controllers: []string{"pids"}, Mount: "/m", Own: "/own/sub"}
	v2 := Hierarchy{V2: true, Mount: "/m", Own: "/own/sub"}
	for _, c := range []struct {
		h          Hierarchy
		path, want string
	}{
		{v1, "/a/b", "/m/a/b"},
		{v1, "a/b", "/m/own/sub/a/b"},
		{v2, "a", "/m/own/a"}, // in a v2 layout
		{v1, "/../../a", "/m/a"},
		{v1, "../../a", "/m/own/sub/a"},
		{v1, "/a/../b/.", "/m/b"},
		{v1, "/", ""},
		{v1, "..", ""},
		{Hierarchy{Mount: "/m"}, "a", ""},
	} {
		mode := V1
		if c.h.V2 {
			mode = V2
		}
		got, err := Layout{Mode: mode}.dir(c.h, c.path)
		if got != c.want || (err != nil) != (c.want == "") {
			t.Errorf("%q below %s: %q, %v", c.path, c.h.Own, got, err)
		}
	}
	for _, path := range []string{"", "a\x00b", "a\nb", "/", "/.."} {
		if _, err := (Layout{Hierarchies: []Hierarchy{v1}}).New(path); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("New(%q): %v", path, err)
		}
	}
}

func FuzzParsers(f *testing.F) {
	f.Add([]byte("31 30 0:27 /docker/abc /sys/fs/cg\\040roup/pids ro - cgroup cgroup rw,pids\n0::/\n2:pids:/docker/abc\n"))
	f.Add([]byte("a *:* rwm\nc 1:3 rwm\nb 8:* r\n"))
	f.Add([]byte("8:0 Read 1\n8:0 rbytes=1 wios=2\nTotal 3\nsome avg10=0.00 total=1\nmlx4_0 hca_handle=2 hca_object=max\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if l, err := parseLayout(b, b); err == nil {
			for _, h := range l.Hierarchies {
				if !strings.HasPrefix(h.Mount, "/") || h.Own != "" && !strings.HasPrefix(h.Own, "/") {
					t.Errorf("%+v", h)
				}
			}
		}
		if w, err := parseWhitelist(b); err == nil {
			if c := w.change(w); len(c) > 0 {
				t.Errorf("change to itself: %v", c)
			}
		}
		for _, pid := range parsePids(nil, b) {
			if pid <= 0 {
				t.Errorf("pid %d", pid)
			}
		}
		keyed(b)
		parsePSI(b)
		parseRdma(b)
		parseIOStat(b)
		m := ioMap{}
		parseBlkio(m, b, true)
		m.sorted()
		pageSize(string(b))
		_ = checkList(string(b))
	})
}
