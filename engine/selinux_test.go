//go:build linux

package engine

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// fakeSELinux is a machine with a policy that knows containers, and takes every context.
func fakeSELinux(t *testing.T) (sys, etc string) {
	t.Helper()
	sys, etc = t.TempDir(), t.TempDir()
	for path, text := range map[string]string{
		filepath.Join(sys, "fs/selinux/enforce"): "1",
		filepath.Join(sys, "fs/selinux/context"): "",
		filepath.Join(etc, "selinux/config"):     "# SELINUXTYPE=no\nSELINUX=enforcing\nSELINUXTYPE=mine\n",
		filepath.Join(etc, "selinux/mine/contexts/lxc_contexts"): "process = \"system_u:system_r:container_t:s0\"\nfile = \"system_u:object_r:container_file_t:s0\"\n" +
			"ro_file = \"system_u:object_r:container_ro_file_t:s0\"\n",
	} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return sys, etc
}

// refusing is a file of the kernel that takes no context, as selinuxfs's does with one that the policy does not have: with EINVAL.
const refusing = "/proc/self/oom_score_adj"

func TestProbeSELinux(t *testing.T) {
	t.Parallel()
	sys, etc := fakeSELinux(t)
	s, why := probeSELinux(sys, etc)
	if s == nil || why != "" || s.process.String() != "system_u:system_r:container_t:s0" || s.file.Type != "container_file_t" {
		t.Fatalf("%+v, %q", s, why)
	}
	if s, why := probeSELinux(t.TempDir(), etc); s != nil || why != "" {
		t.Errorf("where it is off: %+v, %q", s, why)
	}
	if s, why := probeSELinux(sys, t.TempDir()); s != nil || !strings.Contains(why, "container-selinux") {
		t.Errorf("without a policy for containers: %+v, %q", s, why)
	}
}

func TestSELinuxLabels(t *testing.T) {
	t.Parallel()
	s, _ := probeSELinux(fakeSELinux(t))
	const level = "s0:c1,c2"
	for what, c := range map[string]struct {
		pod, own      *SELinux
		privileged    bool
		process, file string
	}{
		"nothing":              {nil, nil, false, "system_u:system_r:container_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2"},
		"privileged":           {nil, nil, true, "system_u:system_r:spc_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2"},
		"a type":               {nil, &SELinux{Type: "mine_t"}, false, "system_u:system_r:mine_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2"},
		"of the pod":           {&SELinux{Type: "mine_t", Level: level}, nil, false, "system_u:system_r:mine_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2"},
		"own, over the pod's":  {&SELinux{Type: "pod_t", Role: "r"}, &SELinux{Type: "mine_t", Level: "s0:c5"}, false, "system_u:r:mine_t:s0:c5", "system_u:object_r:container_file_t:s0:c5"},
		"privileged by a type": {nil, &SELinux{User: "u", Type: "mine_t"}, true, "u:system_r:mine_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2"},
	} {
		if p, f, err := s.labels(c.pod, c.own, level, c.privileged); p != c.process || f != c.file || err != nil {
			t.Errorf("%s: %s, %s, %v", what, p, f, err)
		}
	}
	taken := map[string]bool{}
	for range 1000 {
		l, err := s.level(nil, taken)
		if err != nil || taken[l] || !strings.HasPrefix(l, "s0:c") {
			t.Fatalf("level %q, %v", l, err)
		}
		taken[l] = true
	}
	s.check = refusing
	if _, _, err := s.labels(nil, &SELinux{Level: "s0,c4,c5"}, level, false); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a context that there is not: %v", err)
	}
	if _, err := s.level(&SELinux{Level: "s0,c4,c5"}, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a level that there is not: %v", err)
	}
	if _, _, err := s.labels(nil, &SELinux{Type: "a b"}, level, false); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a type with a space: %v", err)
	}
}

// TestPodLabels: the containers of a pod have one level, which no other pod has and which stays over a restart.
func TestPodLabels(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.e.host.SELinux, _ = probeSELinux(fakeSELinux(t))
	one, other := n.pod(hostPod("one")), n.pod(hostPod("other"))
	label := func(id string) string {
		t.Helper()
		s := n.spec(id)
		p, okp := parseSELinux(s.Process.SelinuxLabel)
		f, okf := parseSELinux(s.Linux.MountLabel)
		if !okp || !okf || p.Level != f.Level || f.Type != "container_file_t" {
			t.Errorf("labels %q and %q", s.Process.SelinuxLabel, s.Linux.MountLabel)
		}
		return p.Type + " " + p.Level
	}
	a, b := label(n.member(one, memberConfig("a"))), label(n.member(one, memberConfig("b")))
	typed := memberConfig("c")
	typed.Pod.SELinux = &SELinux{Type: "mine_t"}
	c := label(n.member(one, typed))
	if a != b || !strings.HasPrefix(a, "container_t s0:c") || c != strings.Replace(a, "container_t", "mine_t", 1) {
		t.Errorf("labels in one pod: %s, %s, %s", a, b, c)
	}
	if d := label(n.member(other, memberConfig("a"))); d == a {
		t.Errorf("two pods have the level %s", a)
	}
	selinux := n.e.host.SELinux
	n.crash()
	n.e.host.SELinux = selinux
	if d := label(n.member(one, memberConfig("d"))); d != a {
		t.Errorf("after a restart %s, before %s", d, a)
	}
	selinux.check = refusing
	bad := memberConfig("e")
	bad.Pod.SELinux = &SELinux{Level: "s0,c4,c5"}
	if _, err := n.e.CreatePodContainer(bg, one, bad); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a level that there is not: %v", err)
	}
}

func TestRelabel(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s", t.Name())
	}
	dir, outside := t.TempDir(), filepath.Join(t.TempDir(), "outside")
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "a/b"), 0o755), os.WriteFile(filepath.Join(dir, "a/b/f"), nil, 0o644), os.WriteFile(outside, nil, 0o644),
		os.Symlink(outside, filepath.Join(dir, "a/link")), os.Symlink("/", filepath.Join(dir, "a/root")),
		unix.Mkfifo(filepath.Join(dir, "a/fifo"), 0o644)); err != nil {
		t.Fatal(err)
	}
	// Mounts in the tree: of the same file system, and of another.
	same := t.TempDir()
	t.Cleanup(func() {
		for _, m := range []string{"same", "other"} {
			_ = unix.Unmount(filepath.Join(dir, m), unix.MNT_DETACH) // not mounted, if the test failed before
		}
	})
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "same"), 0o755), os.Mkdir(filepath.Join(dir, "other"), 0o755), os.WriteFile(filepath.Join(same, "f"), nil, 0o644),
		unix.Mount(same, filepath.Join(dir, "same"), "", unix.MS_BIND, ""), unix.Mount("tmpfs", filepath.Join(dir, "other"), "tmpfs", 0, "")); err != nil {
		t.Fatal(err)
	}
	of := func(path string) string {
		b := make([]byte, 100)
		n, err := unix.Lgetxattr(path, xattrSELinux, b)
		if err != nil {
			return ""
		}
		return string(b[:n])
	}
	v := &Container{Config: Config{Pod: &PodMember{FileLabel: "u:r:t:s0"}}, Mounts: []Mount{{Kind: MountBind, Source: dir, Relabel: true}}}
	if err := relabelMounts(v); err != nil {
		t.Fatal(err)
	}
	if of(dir) == "" {
		t.Skipf("needs a file system with security labels: %s", t.Name())
	}
	for _, p := range []string{"", "a", "a/b", "a/b/f", "a/link", "a/root", "a/fifo"} {
		if got := of(filepath.Join(dir, p)); got != "u:r:t:s0" {
			t.Errorf("%s has the label %q", p, got)
		}
	}
	if got := of(outside); got != "" {
		t.Errorf("what a link leads to has the label %q", got)
	}
	for _, p := range []string{"same", "same/f", "other"} {
		if got := of(filepath.Join(dir, p)); got == "u:r:t:s0" {
			t.Errorf("%s, which is of another mount, has the label of the tree", p)
		}
	}
	etc := filepath.Join(dir, "etc")
	if err := os.Symlink("/usr/../etc", etc); err != nil {
		t.Fatal(err)
	}
	for _, source := range []string{"/usr/../etc", etc, filepath.Join(dir, "missing")} {
		v.Mounts[0].Source = source
		if err := relabelMounts(v); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", source, err)
		}
	}
	v.Mounts[0].Relabel = false
	if err := relabelMounts(v); err != nil {
		t.Error(err)
	}
}
