package cli

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// A finding is what one check of hako doctor found.
type finding struct {
	Check  string `json:"check"`
	Status string `json:"status"` // ok, warning, error
	Detail string `json:"detail"`
	Advice string `json:"advice,omitempty"`
}

const (
	statusOK      = "ok"
	statusWarning = "warning"
	statusError   = "error"
)

// defaultRoot is where hakod keeps its data if it is not told otherwise.
const defaultRoot = "/var/lib/hako"

func (a *app) doctorCommand() *cobra.Command {
	var format, root string
	cmd := &cobra.Command{Use: "doctor [OPTIONS]", Short: "Check whether this machine is ready, and say what to do if not", Args: cobra.NoArgs,
		Long: "Check the kernel, cgroups, overlayfs, seccomp, namespaces, nftables, disk space and the\ndaemon, and say what to do about each problem.\n\nExit status: 0 if containers can run, 1 otherwise.",
		RunE: func(cmd *cobra.Command, args []string) error {
			daemon, daemonRoot := a.checkDaemon(cmd)
			found := append(diagnose(cmp.Or(root, daemonRoot, defaultRoot)), daemon)
			failed := 0
			for _, f := range found {
				if f.Status == statusError {
					failed++
				}
			}
			if format == "json" {
				if err := inspectPrint(a.Out, []any{found}, "json"); err != nil {
					return err
				}
			} else {
				a.printFindings(found)
			}
			if failed > 0 {
				return &exitError{code: exitGeneral}
			}
			return nil
		}}
	cmd.Flags().StringVar(&format, "format", "", `"json": a list of all findings (default: a finding a line)`)
	cmd.Flags().StringVar(&root, "root", "", "the daemon's data folder, whose disk is checked (default: the one that the daemon names if it answers, else "+defaultRoot+")")
	return cmd
}

func (a *app) printFindings(found []finding) {
	on := colours(a.Out)
	marks := map[string]string{statusOK: paint(on, "32", "ok     "), statusWarning: paint(on, "33", "warning"), statusError: paint(on, "31", "error  ")}
	w := 0
	for _, f := range found {
		w = max(w, len(f.Check))
	}
	for _, f := range found {
		fmt.Fprintf(a.Out, "%s  %-*s  %s\n", marks[f.Status], w, f.Check, f.Detail)
		if f.Advice != "" {
			fmt.Fprintf(a.Out, "         %-*s  → %s\n", w, "", f.Advice)
		}
	}
}

// diagnose runs all checks that need no daemon.
func diagnose(root string) []finding {
	return []finding{
		checkPrivileges(), checkKernel(), checkCgroups(), checkOverlay(), checkSeccomp(), checkUserNamespaces(), checkNftables(), checkForwarding(), checkDisk(root),
	}
}

func checkPrivileges() finding {
	f := finding{Check: "privileges", Status: statusOK, Detail: "root"}
	if os.Geteuid() != 0 {
		f.Status, f.Detail = statusError, fmt.Sprintf("running as uid %d; hakod needs root", os.Geteuid())
		f.Advice = "run hakod as root, and this command with sudo"
		return f
	}
	b, _ := os.ReadFile("/proc/self/status")
	for line := range strings.SplitSeq(string(b), "\n") {
		if hex, ok := strings.CutPrefix(line, "CapEff:\t"); ok {
			caps, err := strconv.ParseUint(hex, 16, 64)
			if err == nil && caps&(1<<unix.CAP_SYS_ADMIN) == 0 {
				return finding{"privileges", statusError, "root without CAP_SYS_ADMIN", "give the outer container CAP_SYS_ADMIN, or run on the machine itself"}
			}
		}
	}
	return f
}

// parseRelease reads the leading numbers of a kernel release: 6.1.0-13-amd64 is 6, 1.
func parseRelease(s string) (major, minor int, ok bool) {
	n, err := fmt.Sscanf(s, "%d.%d", &major, &minor)
	return major, minor, err == nil && n == 2
}

func checkKernel() finding {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return finding{"kernel", statusError, err.Error(), ""}
	}
	release := unix.ByteSliceToString(u.Release[:])
	f := finding{Check: "kernel", Status: statusOK, Detail: release + " " + runtime.GOARCH}
	major, minor, ok := parseRelease(release)
	switch {
	case !ok:
		f.Status, f.Advice = statusWarning, "the release is not understood; Linux 5.12 or newer is needed"
	case major < 5 || major == 5 && minor < 12:
		f.Status, f.Advice = statusError, "hako needs Linux 5.12 or newer (openat2, mount_setattr, pidfd): update the kernel"
	case major == 5 && minor < 19:
		f.Status, f.Advice = statusWarning, "it works; newer kernels start containers faster and confine them better"
	}
	return f
}

func checkCgroups() finding {
	f := finding{Check: "cgroups", Status: statusOK}
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err != nil {
		return finding{"cgroups", statusError, "/sys/fs/cgroup: " + err.Error(), "mount cgroup2: mount -t cgroup2 none /sys/fs/cgroup"}
	}
	need := []string{"cpu", "memory", "pids"}
	var have []string
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		f.Detail = "v2"
		b, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
		if err != nil {
			return finding{"cgroups", statusError, err.Error(), ""}
		}
		have = strings.Fields(string(b))
	} else {
		f.Detail = "v1"
		need = append(need, "devices", "freezer")
		entries, _ := os.ReadDir("/sys/fs/cgroup")
		for _, e := range entries {
			have = append(have, strings.Split(e.Name(), ",")...)
			if e.Name() == "unified" {
				f.Detail = "v1 hybrid"
			}
		}
	}
	var missing []string
	for _, c := range need {
		if !slices.Contains(have, c) {
			missing = append(missing, c)
		}
	}
	if len(missing) > 0 {
		f.Status, f.Detail = statusError, f.Detail+"; missing controllers: "+strings.Join(missing, ", ")
		f.Advice = "enable them on the kernel's command line (cgroup_enable=memory) or mount their hierarchies"
	}
	return f
}

// fileSystems lists what the kernel can mount now; modules may add to it.
func fileSystems() []string {
	file, err := os.Open("/proc/filesystems")
	if err != nil {
		return nil
	}
	defer file.Close()
	var out []string
	for s := bufio.NewScanner(file); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) > 0 {
			out = append(out, fields[len(fields)-1])
		}
	}
	return out
}

func checkOverlay() finding {
	if slices.Contains(fileSystems(), "overlay") {
		return finding{Check: "overlayfs", Status: statusOK, Detail: "available"}
	}
	// Asking for the file system makes the kernel load its module.
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err == nil {
		unix.Close(fd)
		return finding{Check: "overlayfs", Status: statusOK, Detail: "available"}
	}
	return finding{"overlayfs", statusWarning, "not available: " + err.Error(), "load it with 'modprobe overlay'; until then use hakod --snapshotter native, which copies files"}
}

func checkSeccomp() finding {
	b, err := os.ReadFile("/proc/sys/kernel/seccomp/actions_avail")
	if err != nil {
		return finding{"seccomp", statusError, "the kernel has no seccomp filters", "use a kernel with CONFIG_SECCOMP_FILTER, or run containers with --security-opt seccomp=unconfined"}
	}
	return finding{Check: "seccomp", Status: statusOK, Detail: strings.TrimSpace(string(b))}
}

func checkUserNamespaces() finding {
	b, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
	if err != nil {
		return finding{"user namespaces", statusWarning, "the kernel has none", "only needed for containers with their own users"}
	}
	if n := strings.TrimSpace(string(b)); n == "0" {
		return finding{"user namespaces", statusWarning, "switched off", "only needed for containers with their own users: sysctl user.max_user_namespaces=15000"}
	}
	return finding{Check: "user namespaces", Status: statusOK, Detail: "available"}
}

func checkNftables() finding {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return finding{"nftables", statusError, "netfilter: " + err.Error(), "load it with 'modprobe nf_tables'; until then use --network host or none"}
	}
	unix.Close(fd)
	if _, err := os.Stat("/proc/sys/net/netfilter"); errors.Is(err, os.ErrNotExist) {
		if out, err := os.ReadFile("/proc/modules"); err == nil && !strings.Contains(string(out), "nf_tables") {
			return finding{"nftables", statusWarning, "the module is not loaded yet", "hakod loads it when needed; 'modprobe nf_tables nf_nat' shows whether it can be"}
		}
	}
	return finding{Check: "nftables", Status: statusOK, Detail: "available"}
}

func checkForwarding() finding {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	switch {
	case err != nil:
		return finding{"forwarding", statusError, err.Error(), "hakod must be able to write /proc/sys/net/ipv4/ip_forward"}
	case strings.TrimSpace(string(b)) != "1":
		return finding{Check: "forwarding", Status: statusOK, Detail: "off; hakod switches it on with the first container on a bridge"}
	}
	return finding{Check: "forwarding", Status: statusOK, Detail: "on"}
}

// existing gives the nearest parent of a path that exists.
func existing(p string) string {
	for p != "/" && p != "." {
		if _, err := os.Stat(p); err == nil {
			return p
		}
		p = filepath.Dir(p)
	}
	return p
}

func checkDisk(root string) finding {
	var st unix.Statfs_t
	dir := existing(root)
	if err := unix.Statfs(dir, &st); err != nil {
		return finding{"disk", statusError, dir + ": " + err.Error(), ""}
	}
	free := float64(st.Bavail) * float64(st.Bsize)
	f := finding{Check: "disk", Status: statusOK, Detail: fmt.Sprintf("%s free for %s", units.HumanSize(free), root)}
	switch {
	case free < 100e6:
		f.Status, f.Advice = statusError, "free some space, or move the data with hakod --root; 'hako system prune' removes what is not in use"
	case free < 2e9:
		f.Status, f.Advice = statusWarning, "'hako system prune' removes what is not in use"
	case st.Files > 0 && st.Ffree*50 < st.Files:
		f.Status, f.Advice = statusWarning, "fewer than 2 % of the inodes are free"
	}
	return f
}

// checkDaemon asks the daemon whether it answers, and where its data is: "" if it does not say, or is on another machine.
func (a *app) checkDaemon(cmd *cobra.Command) (f finding, root string) {
	c, err := a.client()
	if err == nil {
		res, perr := c.Ping(cmd.Context(), client.PingOptions{NegotiateAPIVersion: true})
		if perr == nil {
			if strings.HasPrefix(a.address(), "unix://") {
				if info, err := c.Info(cmd.Context(), client.InfoOptions{}); err == nil {
					root = info.Info.DockerRootDir
				}
			}
			return finding{Check: "daemon", Status: statusOK, Detail: fmt.Sprintf("answers at %s (API %s)", a.address(), res.APIVersion)}, root
		}
		err = perr
	}
	return finding{"daemon", statusWarning, a.explain(err), "start it with 'hakod', or see docs/install.md for a service unit"}, ""
}
