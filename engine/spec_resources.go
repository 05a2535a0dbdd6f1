package engine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// blockDevice is a block device that a limit names, looked up on the host.
type blockDevice struct {
	path         string
	major, minor int64
}

// applicable leaves out limits that say nothing on this machine: the kubelet gives each size of huge
// pages a limit, 0 where the pod asks for none, also to a machine that cannot limit them.
func (h hostFacts) applicable(r Resources) Resources {
	if h.HugeTLB {
		return r
	}
	limits := map[string]uint64{}
	for size, limit := range r.Hugepages {
		if limit != 0 {
			limits[size] = limit
		}
	}
	r.Hugepages = limits
	return r
}

// linuxResources makes the OCI form of the limits, without devices.
func linuxResources(r Resources, blocks []blockDevice) *specs.LinuxResources {
	out := &specs.LinuxResources{}
	if r.Memory != 0 || r.MemorySwap != 0 || r.MemoryReservation != 0 || r.MemorySwappiness != nil || r.OOMKillDisable != nil {
		m := &specs.LinuxMemory{}
		if r.Memory > 0 {
			m.Limit = &r.Memory
		}
		if r.MemorySwap != 0 {
			m.Swap = &r.MemorySwap
		}
		if r.MemoryReservation > 0 {
			m.Reservation = &r.MemoryReservation
		}
		if r.MemorySwappiness != nil && *r.MemorySwappiness >= 0 {
			s := uint64(*r.MemorySwappiness)
			m.Swappiness = &s
		}
		if r.OOMKillDisable != nil && *r.OOMKillDisable {
			m.DisableOOMKiller = r.OOMKillDisable
		}
		out.Memory = m
	}
	cpu := specs.LinuxCPU{Cpus: r.CpusetCPUs, Mems: r.CpusetMems}
	set := cpu.Cpus != "" || cpu.Mems != ""
	if r.CPUShares > 0 {
		v := uint64(r.CPUShares)
		cpu.Shares, set = &v, true
	}
	if r.NanoCPUs > 0 {
		period := uint64(100_000)
		quota := r.NanoCPUs * int64(period) / 1e9
		cpu.Period, cpu.Quota, set = &period, &quota, true
	}
	if r.CPUPeriod > 0 {
		v := uint64(r.CPUPeriod)
		cpu.Period, set = &v, true
	}
	if r.CPUQuota != 0 {
		cpu.Quota, set = &r.CPUQuota, true
	}
	if r.CPURTPeriod > 0 {
		v := uint64(r.CPURTPeriod)
		cpu.RealtimePeriod, set = &v, true
	}
	if r.CPURTRuntime != 0 {
		cpu.RealtimeRuntime, set = &r.CPURTRuntime, true
	}
	if set {
		out.CPU = &cpu
	}
	if r.PidsLimit != nil {
		n := *r.PidsLimit
		if n <= 0 {
			n = -1
		}
		out.Pids = &specs.LinuxPids{Limit: &n}
	}
	out.BlockIO = blockIO(r, blocks)
	out.HugepageLimits, out.Unified = hugepageLimits(r.Hugepages), r.Unified
	return out
}

func blockIO(r Resources, blocks []blockDevice) *specs.LinuxBlockIO {
	if r.BlkioWeight == 0 && len(blocks) == 0 {
		return nil
	}
	b := &specs.LinuxBlockIO{}
	if r.BlkioWeight != 0 {
		b.Weight = &r.BlkioWeight
	}
	find := func(p string) (specs.LinuxWeightDevice, specs.LinuxThrottleDevice) {
		var w specs.LinuxWeightDevice
		var t specs.LinuxThrottleDevice
		for _, d := range blocks {
			if d.path == p {
				w.Major, w.Minor, t.Major, t.Minor = d.major, d.minor, d.major, d.minor
			}
		}
		return w, t
	}
	for _, d := range r.BlkioWeightDevice {
		w, _ := find(d.Path)
		w.Weight = &d.Weight
		b.WeightDevice = append(b.WeightDevice, w)
	}
	for _, l := range []struct {
		from []ThrottleDevice
		to   *[]specs.LinuxThrottleDevice
	}{
		{r.ReadBps, &b.ThrottleReadBpsDevice}, {r.WriteBps, &b.ThrottleWriteBpsDevice},
		{r.ReadIOps, &b.ThrottleReadIOPSDevice}, {r.WriteIOps, &b.ThrottleWriteIOPSDevice},
	} {
		for _, d := range l.from {
			_, t := find(d.Path)
			t.Rate = d.Rate
			*l.to = append(*l.to, t)
		}
	}
	return b
}

// lookupBlocks finds the block devices that limits name.
func lookupBlocks(r Resources) ([]blockDevice, error) {
	var out []blockDevice
	look := func(p string) error {
		var st unix.Stat_t
		if err := unix.Stat(p, &st); err != nil {
			return invalidf("no such device: %q: %v", p, err)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFBLK {
			return invalidf("%q is not a block device", p)
		}
		out = append(out, blockDevice{p, int64(unix.Major(uint64(st.Rdev))), int64(unix.Minor(uint64(st.Rdev)))})
		return nil
	}
	for _, d := range r.BlkioWeightDevice {
		if err := look(d.Path); err != nil {
			return nil, err
		}
	}
	for _, l := range [][]ThrottleDevice{r.ReadBps, r.WriteBps, r.ReadIOps, r.WriteIOps} {
		for _, d := range l {
			if err := look(d.Path); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// defaultDeviceRules allow a container the devices that every one has.
func defaultDeviceRules() []specs.LinuxDeviceCgroup {
	rule := func(t string, major, minor int64, access string) specs.LinuxDeviceCgroup {
		d := specs.LinuxDeviceCgroup{Allow: true, Type: t, Access: access}
		if major >= 0 {
			d.Major = &major
		}
		if minor >= 0 {
			d.Minor = &minor
		}
		return d
	}
	return []specs.LinuxDeviceCgroup{
		{Allow: false, Access: "rwm"},
		rule("c", -1, -1, "m"), rule("b", -1, -1, "m"), // making a node is not using it
		rule("c", 1, 3, "rwm"), rule("c", 1, 5, "rwm"), rule("c", 1, 7, "rwm"), rule("c", 1, 8, "rwm"), rule("c", 1, 9, "rwm"),
		rule("c", 5, 0, "rwm"), rule("c", 5, 1, "rwm"), rule("c", 5, 2, "rwm"), rule("c", 136, -1, "rwm"),
	}
}

func validDevicePermissions(p string) bool {
	return p != "" && strings.Trim(p, "rwm") == "" && len(p) <= 3
}

// parseDeviceRule reads "c 42:* rmw".
func parseDeviceRule(s string) (specs.LinuxDeviceCgroup, error) {
	bad := invalidf("invalid device cgroup rule format: '%s'", s)
	f := strings.Fields(s)
	if len(f) != 3 || f[0] != "a" && f[0] != "b" && f[0] != "c" || !validDevicePermissions(f[2]) {
		return specs.LinuxDeviceCgroup{}, bad
	}
	d := specs.LinuxDeviceCgroup{Allow: true, Type: f[0], Access: f[2]}
	major, minor, ok := strings.Cut(f[1], ":")
	if !ok {
		return d, bad
	}
	for _, n := range []struct {
		s  string
		to **int64
	}{{major, &d.Major}, {minor, &d.Minor}} {
		if n.s == "*" {
			continue
		}
		v, err := strconv.ParseInt(n.s, 10, 32)
		if err != nil || v < 0 {
			return d, bad
		}
		*n.to = &v
	}
	return d, nil
}

// lookupDevices finds the devices that a container is given, and the rules that let
// it use them.
func lookupDevices(c Config) ([]specs.LinuxDevice, []specs.LinuxDeviceCgroup, error) {
	var devs []specs.LinuxDevice
	var rules []specs.LinuxDeviceCgroup
	if c.Privileged {
		all, err := devicesBelow("/dev", "/dev")
		if err != nil {
			return nil, nil, err
		}
		devs = all
	}
	for _, d := range c.Resources.Devices {
		to := d.ContainerPath
		if to == "" {
			to = d.HostPath
		}
		found, err := devicesAt(d.HostPath, to)
		if err != nil {
			return nil, nil, err
		}
		for _, dev := range found {
			devs = append(devs, dev)
			rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Type: dev.Type, Major: &dev.Major, Minor: &dev.Minor, Access: d.Permissions})
		}
	}
	for _, r := range c.Resources.DeviceCgroupRules {
		rule, err := parseDeviceRule(r)
		if err != nil {
			return nil, nil, err
		}
		rules = append(rules, rule)
	}
	return devs, rules, nil
}

// devicesAt gives the device at a host path, or all in a directory below /dev.
func devicesAt(host, to string) ([]specs.LinuxDevice, error) {
	real, err := filepath.EvalSymlinks(host)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fs.ErrNotExist
		}
		return nil, invalidf("error gathering device information while adding custom device %q: %v", host, errText(err))
	}
	dev, err := deviceAt(real, to)
	if err != nil {
		return nil, err
	}
	if dev != nil {
		return []specs.LinuxDevice{*dev}, nil
	}
	// A directory: only below /dev, or "/" would walk the whole machine.
	if fi, err := os.Stat(real); err == nil && fi.IsDir() && (real == "/dev" || strings.HasPrefix(real, "/dev/")) {
		return devicesBelow(real, to)
	}
	return nil, invalidf("error gathering device information while adding custom device %q: not a device node", host)
}

func errText(err error) string {
	if errors.Is(err, fs.ErrNotExist) {
		return "no such file or directory"
	}
	return err.Error()
}

func devicesBelow(dir, to string) ([]specs.LinuxDevice, error) {
	var out []specs.LinuxDevice
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		if d.IsDir() {
			if name := d.Name(); dir == "/dev" && rel != "." && (name == "pts" || name == "shm" || name == "fd" || name == "mqueue" || name == ".lxc" || name == ".udev") {
				return fs.SkipDir
			}
			return nil
		}
		if d.Name() == "console" || d.Type()&fs.ModeDevice == 0 {
			return nil
		}
		dev, err := deviceAt(p, filepath.Join(to, rel))
		if err == nil && dev != nil {
			out = append(out, *dev)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list devices in %s: %w", dir, err)
	}
	return out, nil
}

// deviceAt describes a node; nil for what is none.
func deviceAt(host, to string) (*specs.LinuxDevice, error) {
	var st unix.Stat_t
	if err := unix.Lstat(host, &st); err != nil {
		return nil, fmt.Errorf("device %s: %w", host, err)
	}
	d := specs.LinuxDevice{Path: to, Major: int64(unix.Major(uint64(st.Rdev))), Minor: int64(unix.Minor(uint64(st.Rdev)))}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		d.Type = "c"
	case unix.S_IFBLK:
		d.Type = "b"
	default:
		return nil, nil
	}
	mode := os.FileMode(st.Mode & 0o777)
	d.FileMode, d.UID, d.GID = &mode, &st.Uid, &st.Gid
	return &d, nil
}
