package cni

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/internal/durable"
	"github.com/hako-engine/hako/network"
	"github.com/hako-engine/hako/network/internal/nstest"
)

var update = flag.Bool("update", false, "write the golden files")

// TestLifeGolden holds all that plugins are given in the life of a pod.
func TestLifeGolden(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := context.Background()
	w := newWorld(t, "main", "chained", "ipam")
	w.write("10-x.conflist", "1.1.0", "testnet",
		fake{Type: "main", Dir: w.fakes, IPAM: map[string]any{"type": "ipam"}, Capabilities: map[string]bool{
			"bandwidth": true, "dns": true, "ipRanges": true, "ips": true, "mac": true, "cgroupPath": true, "portMappings": false}},
		fake{Type: "chained", Dir: w.fakes, Capabilities: map[string]bool{"portMappings": true, "io.kubernetes.cri.pod-annotations": true}})
	m := w.open(nil)
	eventually(t, "a network", func() bool { return m.Ready() == nil })
	if err := m.SetPodCIDR(ctx, []netip.Prefix{netip.MustParsePrefix("10.1.2.0/24"), netip.MustParsePrefix("2001:db8::/64")}); err != nil {
		t.Fatal(err)
	}
	p := w.pod("web")
	p.Annotations = map[string]string{"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "1Mi", "other": "x;y=z"}
	p.DNS = &DNS{Servers: []string{"10.0.0.10"}, Searches: []string{"svc.cluster.local"}, Options: []string{"ndots:5"}}
	p.CgroupParent, p.IPs, p.MAC = "/kubepods/pod1", []string{"10.1.2.3"}, "02:00:00:00:00:02"
	p.Ports = []network.PortMapping{
		{Proto: "TCP", ContainerPort: 80, HostPort: 8080}, {ContainerPort: 81}, {Proto: "udp", ContainerPort: 53, HostPort: 53, HostIP: netip.MustParseAddr("192.0.2.7")},
		{Proto: "sctp", ContainerPort: 90, HostPort: 90, HostIP: netip.MustParseAddr("2001:db8::7")}}
	res, err := m.Setup(ctx, p)
	if err != nil {
		t.Fatal(err)
	}
	if got := res.IPs; len(got) != 2 || got[0].String() != "10.1.2.3" || got[1].String() != "2001:db8::5" || res.MAC != "02:00:00:00:00:02" {
		t.Errorf("%+v", res)
	}
	if err := m.Check(ctx, p.ID); err != nil {
		t.Error(err)
	}
	if err := m.GC(ctx, []string{p.ID}); err != nil {
		t.Error(err)
	}
	if err := m.Teardown(ctx, p.ID); err != nil {
		t.Error(err)
	}
	w.nothingLeft()

	raw, err := json.MarshalIndent(w.calls(), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got := strings.NewReplacer(p.NetNS, "NETNS", p.ID, "SANDBOX", w.fakes, "FAKES", w.bin, "BIN").Replace(string(raw)) + "\n"
	const golden = "testdata/life.golden"
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (go test -update writes it):\n%s", golden, got)
	}
}

func TestSetupTakesBackWhatFailed(t *testing.T) {
	nstest.NeedRoot(t)
	for name, x := range map[string]struct {
		second fake
		class  func(error) bool
		text   string
	}{
		"plugin fails": {fake{Fail: "ADD", Code: 7}, errdefs.IsFailedPrecondition, "told to fail"},
		"try again":    {fake{Fail: "ADD", Code: 11}, errdefs.IsUnavailable, "told to fail"},
		"other code":   {fake{Fail: "ADD", Code: 120}, errdefs.IsUnknown, "told to fail"},
		"too much":     {fake{Noise: "ADD"}, errdefs.IsOutOfRange, "printed more than"},
		"time limit":   {fake{Hang: "ADD"}, errdefs.IsDeadlineExceeded, "did not end in time"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, "main", "chained")
			x.second.Type, x.second.Dir = "chained", w.fakes
			w.write("10-x.conflist", "1.0.0", "testnet", fake{Type: "main", Dir: w.fakes}, x.second)
			m := w.open(func(o *Options) {
				if x.second.Hang != "" {
					o.Limit = 4 * time.Second
				}
			})
			p := w.pod("web")
			_, err := m.Setup(context.Background(), p)
			if err == nil || !x.class(err) || !strings.Contains(err.Error(), x.text) || !strings.Contains(err.Error(), p.ID) {
				t.Errorf("%v", err)
			}
			if got, want := w.said(), "main ADD, chained ADD, chained DEL, main DEL"; got != want {
				t.Errorf("got %s, want %s", got, want)
			}
			w.nothingLeft()
		})
	}
	t.Run("no address", func(t *testing.T) {
		w := newWorld(t, "main")
		w.write("10-x.conflist", "1.0.0", "testnet", fake{Type: "main", Dir: w.fakes, NoAddress: true})
		if _, err := w.open(nil).Setup(context.Background(), w.pod("web")); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%v", err)
		}
		w.nothingLeft()
	})
	t.Run("bad requests", func(t *testing.T) {
		w := newWorld(t, "main")
		w.write("10-x.conflist", "1.0.0", "testnet", fake{Type: "main", Dir: w.fakes})
		m := w.open(nil)
		for name, set := range map[string]func(*Pod){
			"id":        func(p *Pod) { p.ID = "../x" },
			"no id":     func(p *Pod) { p.ID = "" },
			"name":      func(p *Pod) { p.Name = "a;K8S_POD_NAMESPACE=b" },
			"bandwidth": func(p *Pod) { p.Annotations = map[string]string{annotationEgress: "10X"} },
			"protocol":  func(p *Pod) { p.Ports = []network.PortMapping{{Proto: "icmp", ContainerPort: 1, HostPort: 1}} },
			"port":      func(p *Pod) { p.Ports = []network.PortMapping{{HostPort: 1}} },
		} {
			p := w.pod("web")
			set(&p)
			if _, err := m.Setup(context.Background(), p); !errdefs.IsInvalidArgument(err) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if got := w.said(); got != "" {
			t.Errorf("plugins ran: %s", got)
		}
	})
}

func TestCancelTakesBack(t *testing.T) {
	nstest.NeedRoot(t)
	w := newWorld(t, "main", "chained")
	w.write("10-x.conflist", "1.0.0", "testnet", fake{Type: "main", Dir: w.fakes}, fake{Type: "chained", Dir: w.fakes, Hang: "ADD"})
	m := w.open(nil)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	p := w.pod("web")
	go func() {
		_, err := m.Setup(ctx, p)
		done <- err
	}()
	eventually(t, "the plugin", func() bool { _, err := os.Stat(filepath.Join(w.fakes, "pids")); return err == nil })

	// The sandbox is busy, and nobody else is.
	busy, stop := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer stop()
	if err := m.Teardown(busy, p.ID); !errdefs.IsDeadlineExceeded(err) {
		t.Errorf("teardown beside the setup: %v", err)
	}
	w.write("10-x.conflist", "1.0.0", "testnet", fake{Type: "main", Dir: w.fakes})
	q := w.pod("other")
	if _, err := m.Setup(context.Background(), q); err != nil {
		t.Error(err)
	}
	if err := m.Teardown(context.Background(), q.ID); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if got, want := w.said(), "main ADD, chained ADD, main ADD, main DEL, chained DEL, main DEL"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	w.nothingLeft()
}

// TestTeardownNeedsNothing: neither the configuration, nor the namespace, nor our record.
func TestTeardownNeedsNothing(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := context.Background()
	w := newWorld(t, "main", "chained")
	w.write("10-x.conflist", "1.0.0", "testnet", fake{Type: "main", Dir: w.fakes})
	if err := os.Mkdir(filepath.Join(w.conf, "testnet"), 0o700); err != nil {
		t.Fatal(err)
	}
	raw, _ := json.Marshal(fake{Type: "chained", Dir: w.fakes, Capabilities: map[string]bool{"portMappings": true}})
	w.writeRaw("testnet/x.conf", string(raw)) // part of the list, by the specification 1.1
	m := w.open(nil)
	setup := func(name string) Pod {
		p := w.pod(name)
		p.Ports = []network.PortMapping{{ContainerPort: 80, HostPort: 8080}}
		if _, err := m.Setup(ctx, p); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Setup(ctx, p); !errdefs.IsAlreadyExists(err) {
			t.Errorf("second setup: %v", err)
		}
		return p
	}
	plain, gone, damaged, lost, rebooted := setup("plain"), setup("gone"), setup("damaged"), setup("lost"), setup("rebooted")
	nothing := setup("nothing")
	for _, f := range []string{m.records.path(nothing.ID), filepath.Join(w.state, "results", "testnet-"+nothing.ID+"-eth0")} {
		if err := os.Truncate(f, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Teardown(ctx, nothing.ID); err != nil {
		t.Error(err)
	}

	if err := os.RemoveAll(w.conf); err != nil {
		t.Fatal(err)
	}
	if err := w.nets.DeleteNetns(ctx, gone.NetNS); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.records.path(damaged.ID), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(m.records.path(lost.ID)); err != nil {
		t.Fatal(err)
	}
	// A power cut tears what libcni does not sync.
	if err := os.Truncate(filepath.Join(w.state, "results", "testnet-"+rebooted.ID+"-eth0"), 0); err != nil {
		t.Fatal(err)
	}
	for _, p := range []Pod{plain, gone, damaged, lost, rebooted} {
		before := len(w.calls())
		for range 2 {
			if err := m.Teardown(ctx, p.ID); err != nil {
				t.Errorf("%s: %v", p.Name, err)
			}
		}
		calls := w.calls()[before:]
		if len(calls) != 2 || calls[0].Plugin != "chained" || calls[0].Command != "DEL" || calls[1].Plugin != "main" {
			t.Fatalf("%s: %v", p.Name, calls)
		}
		ns := p.NetNS
		if p.ID == gone.ID {
			ns = ""
		}
		c := calls[0]
		if c.Env["CNI_NETNS"] != ns || c.Env["CNI_IFNAME"] != "eth0" || !strings.Contains(c.Env["CNI_ARGS"], "K8S_POD_NAME="+p.Name) {
			t.Errorf("%s: %v", p.Name, c.Env)
		}
		if c.Stdin["runtimeConfig"] == nil || (c.Stdin["prevResult"] == nil) != (p.ID == rebooted.ID) {
			t.Errorf("%s: %v", p.Name, c.Stdin)
		}
	}
	w.nothingLeft()
	if err := m.Teardown(ctx, "never-seen"); err != nil {
		t.Error(err)
	}
	if err := m.Check(ctx, "never-seen"); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
	if err := m.Ready(); err == nil {
		eventually(t, "not ready", func() bool { return m.Ready() != nil })
	}
}

// TestKilledInTheMiddle: the daemon dies while a plugin works, and the plugin lives on.
func TestKilledInTheMiddle(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := context.Background()
	w := newWorld(t, "main", "chained")
	w.write("10-x.conflist", "1.0.0", "testnet", fake{Type: "main", Dir: w.fakes})
	first := w.open(nil)
	kept, forgotten := w.pod("kept"), w.pod("forgotten")
	for _, p := range []Pod{kept, forgotten} {
		if _, err := first.Setup(ctx, p); err != nil {
			t.Fatal(err)
		}
	}
	first.Close()

	w.write("10-x.conflist", "1.0.0", "testnet", fake{Type: "main", Dir: w.fakes}, fake{Type: "chained", Dir: w.fakes, Hang: "ADD"})
	torn := w.pod("torn")
	daemon := victim{w.options(), []Pod{torn}}.start(t)
	eventually(t, "the plugin", func() bool { _, err := os.Stat(filepath.Join(w.fakes, "pids")); return err == nil })
	if err := daemon.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	daemon.Wait()

	m := w.open(nil)
	if err := m.GC(ctx, []string{kept.ID}); err != nil {
		t.Error(err)
	}
	files, err := os.ReadDir(filepath.Join(w.fakes, "taken"))
	if err != nil || len(files) != 1 || files[0].Name() != "main-"+kept.ID {
		t.Errorf("%v, %v", files, err)
	}
	if err := m.Check(ctx, kept.ID); err != nil {
		t.Error(err)
	}
	if err := m.Teardown(ctx, kept.ID); err != nil {
		t.Error(err)
	}
	w.nothingLeft()
}

// TestFirstDelFails: a plugin fails once on what another daemon left half done, and removes it nevertheless.
func TestFirstDelFails(t *testing.T) {
	nstest.NeedRoot(t)
	w := newWorld(t, "main")
	w.write("10-x.conflist", "1.0.0", "testnet", fake{Type: "main", Dir: w.fakes, FailFirst: true})
	first := w.open(nil)
	if _, err := first.Setup(context.Background(), w.pod("web")); err != nil {
		t.Fatal(err)
	}
	first.Close()
	if err := w.open(nil).GC(context.Background(), nil); err != nil {
		t.Error(err)
	}
	w.nothingLeft()
}

func TestOwedIsTriedAgain(t *testing.T) {
	nstest.NeedRoot(t)
	w := newWorld(t, "main", "chained")
	w.write("10-x.conflist", "1.0.0", "testnet", fake{Type: "main", Dir: w.fakes, Fail: "DEL"}, fake{Type: "chained", Dir: w.fakes, Fail: "ADD"})
	m := w.open(func(o *Options) { o.Poll = 50 * time.Millisecond })
	p := w.pod("web")
	_, err := m.Setup(context.Background(), p)
	if err == nil || !strings.Contains(err.Error(), "undo network") {
		t.Errorf("%v", err)
	}
	if !m.owes(p.ID) {
		t.Error("forgotten")
	}
	// The plugin recovers: its configuration is in the record.
	rec, err := m.records.get(p.ID)
	if err != nil {
		t.Fatal(err)
	}
	rec.Config = json.RawMessage(strings.ReplaceAll(string(rec.Config), `"fail":"DEL"`, `"fail":""`))
	raw, _ := json.Marshal(rec)
	if err := durable.WriteVolatile(m.records.path(p.ID), raw, 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the second try", func() bool { return !m.owes(p.ID) })
	w.nothingLeft()
}

func TestGC11(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := context.Background()
	w := newWorld(t, "main", "other")
	w.write("10-x.conflist", "1.1.0", "testnet", fake{Type: "main", Dir: w.fakes})
	first := w.open(nil)
	kept, stale := w.pod("kept"), w.pod("stale")
	for _, p := range []Pod{kept, stale} {
		if _, err := first.Setup(ctx, p); err != nil {
			t.Fatal(err)
		}
	}
	first.Close()
	// What no record tells of: only the plugin knows it.
	for _, name := range []string{"main-unheard", "other-unheard"} {
		if err := os.WriteFile(filepath.Join(w.fakes, "taken", name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w.write("10-x.conflist", "1.1.0", "othernet", fake{Type: "other", Dir: w.fakes})
	m := w.open(nil)
	fresh := w.pod("fresh") // set up by this daemon, before GC, and not in its list
	if _, err := m.Setup(ctx, fresh); err != nil {
		t.Fatal(err)
	}
	if err := m.GC(ctx, []string{kept.ID}); err != nil {
		t.Error(err)
	}
	var names []string
	files, _ := os.ReadDir(filepath.Join(w.fakes, "taken"))
	for _, f := range files {
		names = append(names, f.Name())
	}
	if want := []string{"main-" + kept.ID, "other-" + fresh.ID}; !slices.Equal(names, want) {
		t.Errorf("got %v, want %v", names, want)
	}
	for _, p := range []Pod{kept, fresh} {
		if err := m.Teardown(ctx, p.ID); err != nil {
			t.Error(err)
		}
	}
	w.nothingLeft()
}

// TestStuckPluginDelaysOnlyItsPod: while one ADD hangs, others, and even a GC, do not wait for it forever.
func TestStuckPluginDelaysOnlyItsPod(t *testing.T) {
	nstest.NeedRoot(t)
	ctx, cancel := context.WithCancel(context.Background())
	w := newWorld(t, "main")
	w.write("10-x.conflist", "1.0.0", "testnet", fake{Type: "main", Dir: w.fakes, Hang: "ADD"})
	m := w.open(func(o *Options) { o.Limit = time.Hour }) // whoever waited for it, would hang
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	p := w.pod("stuck")
	wg.Go(func() { _, _ = m.Setup(ctx, p) })
	eventually(t, "the plugin", func() bool { _, err := os.Stat(filepath.Join(w.fakes, "pids")); return err == nil })
	short, stop := context.WithTimeout(ctx, 100*time.Millisecond)
	defer stop()
	var gc sync.WaitGroup
	gc.Go(func() {
		if err := m.collect(short); !errdefs.IsDeadlineExceeded(err) {
			t.Errorf("gc: %v", err)
		}
	})
	w.write("10-x.conflist", "1.0.0", "testnet", fake{Type: "main", Dir: w.fakes})
	for _, name := range []string{"a", "b", "c"} {
		q := w.pod(name)
		if _, err := m.Setup(ctx, q); err != nil {
			t.Error(err)
		}
		if err := m.Teardown(ctx, q.ID); err != nil {
			t.Error(err)
		}
	}
	gc.Wait()
}

// TestNamespaceIsPrepared: plugins find IPv6 allowed in it.
func TestNamespaceIsPrepared(t *testing.T) {
	nstest.NeedRoot(t)
	w := newWorld(t)
	p := w.pod("web")
	for range 2 {
		if err := prepare(p.NetNS); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command("nsenter", "--net="+p.NetNS, "cat", "/proc/sys/net/ipv6/conf/default/disable_ipv6", "/proc/sys/net/ipv6/conf/default/accept_ra").CombinedOutput()
	if err != nil || string(out) != "0\n0\n" {
		t.Errorf("%q, %v", out, err)
	}
	if alive(p.NetNS) == "" || alive(p.NetNS+"x") != "" || alive(w.conf) != "" || alive("") != "" {
		t.Error("alive is wrong")
	}
	if err := prepare(w.conf); err == nil {
		t.Error("entered a folder")
	}
}
