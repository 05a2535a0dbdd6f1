//go:build linux

package netdev

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// ip runs ip(8), which the test uses to make devices.
func ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// namespace makes a network namespace that ends with the test.
func namespace(t *testing.T) *os.File {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// veth makes a device with addresses, and gives its name.
func veth(t *testing.T, n int) string {
	t.Helper()
	name := fmt.Sprintf("hkt%d%c", os.Getpid()%100000, 'a'+n)
	ip(t, "link", "add", name, "mtu", "1400", "type", "veth", "peer", "name", name+"p")
	t.Cleanup(func() { exec.Command("ip", "link", "del", name+"p").Run() })
	ip(t, "addr", "add", "192.0.2.7/25", "brd", "+", "dev", name)
	ip(t, "addr", "add", "2001:db8::7/64", "nodad", "dev", name)
	return name
}

// describe gives a device and its addresses in a namespace, or in this one.
func describe(t *testing.T, ns *os.File, name string) (out string) {
	t.Helper()
	look := func() error {
		i, err := net.InterfaceByName(name)
		if err != nil {
			return err
		}
		addrs, err := i.Addrs()
		out = fmt.Sprint(i.MTU, i.Flags&net.FlagUp, addrs)
		return err
	}
	var err error
	if ns == nil {
		err = look()
	} else {
		err = inNamespace(ns, look)
	}
	if err != nil {
		return "none"
	}
	// Link-local addresses come and go by themselves.
	var kept []string
	for _, f := range strings.Fields(out) {
		if !strings.HasPrefix(strings.Trim(f, "[]"), "fe80") {
			kept = append(kept, strings.Trim(f, "[]"))
		}
	}
	return strings.Join(kept, " ")
}

func TestMoveAndBack(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: TestMoveAndBack")
	}
	ns := namespace(t)
	name := veth(t, 0)
	const want = "1400 up 192.0.2.7/25 2001:db8::7/64"
	m, err := Move(ns, name, "inside0")
	if err != nil {
		t.Fatal(err)
	}
	if got := describe(t, ns, "inside0"); got != want {
		t.Errorf("inside: %q, want %q", got, want)
	}
	if got := describe(t, nil, name); got != "none" {
		t.Errorf("still outside: %q", got)
	}
	if err := m.Back(ns); err != nil {
		t.Fatal(err)
	}
	if got := describe(t, nil, name); got != want {
		t.Errorf("back: %q, want %q", got, want)
	}
	if got := describe(t, ns, "inside0"); got != "none" {
		t.Errorf("still inside: %q", got)
	}
	if own, err := os.Readlink("/proc/thread-self/ns/net"); err != nil || own == "" {
		t.Error(own, err)
	}
}

func TestMoveRefusesTakenAndMissingNames(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: TestMoveRefusesTakenAndMissingNames")
	}
	ns := namespace(t)
	name := veth(t, 1)
	if _, err := Move(ns, name, "lo"); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), "called lo") {
		t.Errorf("taken name: %v", err)
	}
	if got := describe(t, nil, name); got == "none" {
		t.Error("the device is gone after a failure")
	}
	if _, err := Move(ns, "nosuchdevice", "x"); !errdefs.IsNotFound(err) {
		t.Errorf("missing device: %v", err)
	}
	for i := range 2 {
		m, err := Move(ns, []string{name, name + "p"}[i], "net%d")
		if err != nil || m.To != fmt.Sprintf("net%d", i) {
			t.Errorf("template: %+v %v", m, err)
		}
	}
	if _, err := Move(must(os.Open(filepath.Join(t.TempDir()))), "lo", "x"); err == nil {
		t.Error("a directory is no namespace")
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func FuzzParse(f *testing.F) {
	r := newRequest(unix.RTM_NEWADDR, 0)
	r.b = append(r.b, 2, 24, 0x80, 0, 1, 0, 0, 0)
	r.uint32(unix.IFA_LOCAL, 1)
	f.Add(r.finish(1))
	f.Add([]byte{20, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		_, err := parse(b, 1, func(body []byte) {
			parseLink(body)
			if a, ok := parseAddress(body, 1); ok {
				a.request(1)
			}
		})
		var errno unix.Errno
		if errors.As(err, &errno) && errno == 0 {
			t.Error("an error without a number")
		}
	})
}
