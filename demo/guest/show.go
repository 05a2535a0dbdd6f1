package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

// show prints what a process can see of its box.
func show(w io.Writer) {
	host, _ := os.Hostname()
	line := func(what, format string, args ...any) {
		fmt.Fprintf(w, "%-13s %s\n", what, fmt.Sprintf(format, args...))
	}
	line("hostname", "%s", host)
	line("pid", "%d (parent %d)", os.Getpid(), os.Getppid())
	line("user", "%d:%d", os.Getuid(), os.Getgid())
	for _, a := range addresses() {
		line("address", "%s", a)
	}
	for _, r := range routes() {
		line("route", "%s", r)
	}
	status := fields("/proc/self/status")
	line("capabilities", "%s", capabilities(status["CapEff"]))
	line("bounding set", "%s", capabilities(status["CapBnd"]))
	line("no new privs", "%s", status["NoNewPrivs"])
	line("seccomp", "%s", map[string]string{"0": "off", "1": "strict", "2": "filter"}[status["Seccomp"]])
	for _, l := range limits() {
		line("limit", "%s", l)
	}
	for _, m := range mounts() {
		line("mount", "%s", m)
	}
}

func addresses() (list []string) {
	ifs, err := net.Interfaces()
	if err != nil {
		return []string{err.Error()}
	}
	for _, i := range ifs {
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			list = append(list, i.Name+" "+a.String())
		}
	}
	return list
}

// routes reads the IPv4 routes (proc_pid_net(5)).
func routes() (list []string) {
	b, err := os.ReadFile("/proc/net/route")
	if err != nil {
		return nil
	}
	for l := range strings.Lines(string(b)) {
		f := strings.Fields(l)
		if len(f) < 8 || f[0] == "Iface" {
			continue
		}
		dst, gw, mask := hexIP(f[1]), hexIP(f[2]), net.IPMask(hexIP(f[7]).To4())
		ones, _ := mask.Size()
		text := fmt.Sprintf("%s/%d dev %s", dst, ones, f[0])
		if !gw.IsUnspecified() {
			text = fmt.Sprintf("%s/%d via %s dev %s", dst, ones, gw, f[0])
		}
		list = append(list, strings.Replace(text, "0.0.0.0/0", "default", 1))
	}
	return list
}

// hexIP reads an address as the kernel prints it: a number in the machine's byte order.
func hexIP(s string) net.IP {
	n, err := strconv.ParseUint(s, 16, 32)
	if err != nil {
		return net.IPv4zero
	}
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], uint32(n))
	return net.IP(b[:]).To4()
}

// fields reads a file of lines "key: value".
func fields(name string) map[string]string {
	m := map[string]string{}
	b, err := os.ReadFile(name)
	if err != nil {
		return m
	}
	for l := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(l, ":"); ok {
			m[k] = strings.TrimSpace(v)
		}
	}
	return m
}

// capabilityNames are in the order of their numbers (capabilities(7)).
var capabilityNames = strings.Fields(`chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap
linux_immutable net_bind_service net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot
sys_ptrace sys_pacct sys_admin sys_boot sys_nice sys_resource sys_time sys_tty_config mknod lease audit_write
audit_control setfcap mac_override mac_admin syslog wake_alarm block_suspend audit_read perfmon bpf checkpoint_restore`)

func capabilities(hex string) string {
	set, err := strconv.ParseUint(hex, 16, 64)
	if err != nil {
		return "unknown"
	}
	if set == 0 {
		return "none"
	}
	if set == 1<<len(capabilityNames)-1 {
		return "all"
	}
	var list []string
	for i, n := range capabilityNames {
		if set&(1<<i) != 0 {
			list = append(list, n)
		}
	}
	return strings.Join(list, " ")
}

// limits reads the cgroup's files, of whichever version is mounted.
func limits() (list []string) {
	for _, l := range []struct{ name, v2, v1 string }{
		{"memory", "memory.max", "memory/memory.limit_in_bytes"},
		{"pids", "pids.max", "pids/pids.max"},
		{"cpu", "cpu.max", "cpu/cpu.cfs_quota_us"},
	} {
		text := first("/sys/fs/cgroup/" + l.v2)
		if text == "" {
			text = first("/sys/fs/cgroup/" + l.v1)
			if l.name == "cpu" && text != "" {
				text += " " + first("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
			}
		}
		if text == "" {
			continue
		}
		list = append(list, l.name+" "+pretty(l.name, text))
	}
	return list
}

func pretty(name, text string) string {
	quota, period, hasPeriod := strings.Cut(text, " ")
	n, err := strconv.ParseInt(quota, 10, 64)
	if err != nil || n < 0 || n >= 1<<62 {
		return "unlimited"
	}
	switch {
	case name == "memory":
		return fmt.Sprintf("%d MiB", n>>20)
	case name == "cpu" && hasPeriod:
		if p, err := strconv.ParseInt(period, 10, 64); err == nil && p > 0 {
			return fmt.Sprintf("%.2f CPUs", float64(n)/float64(p))
		}
	}
	return text
}

func first(name string) string {
	b, err := os.ReadFile(name)
	if err != nil {
		return ""
	}
	l, _, _ := strings.Cut(string(b), "\n")
	return strings.TrimSpace(l)
}

// mounts reads /proc/self/mountinfo (proc_pid_mountinfo(5)).
func mounts() (list []string) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	for l := range strings.Lines(string(b)) {
		before, after, ok := strings.Cut(l, " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 6 || len(g) < 1 {
			continue
		}
		access, _, _ := strings.Cut(f[5], ",")
		list = append(list, fmt.Sprintf("%-24s %-8s %s", f[4], g[0], access))
	}
	return list
}

// serve answers every request with a greeting until it is told to stop.
func serve(args []string) int {
	addr := ":8080"
	if len(args) > 0 {
		addr = args[0]
	}
	host, _ := os.Hostname()
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "Hello from %s, you are %s\n", host, r.RemoteAddr)
	})
	mux.HandleFunc("/show", func(w http.ResponseWriter, _ *http.Request) { show(w) })
	srv := &http.Server{Addr: addr, Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return fail("serve: %v", err)
	}
	fmt.Printf("serving on %s\n", l.Addr())
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(l) }()
	select {
	case err := <-failed:
		if !errors.Is(err, http.ErrServerClosed) {
			return fail("serve: %v", err)
		}
	case <-stopped():
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		_ = srv.Shutdown(ctx)
	}
	return 0
}
