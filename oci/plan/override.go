//go:build linux

package plan

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path"
	"strconv"
	"strings"
)

// Change turns the facts of one host into those of another. text is either the JSON that
// the facts themselves give, which replaces them but for the sources of mounts that it
// does not name, or a list of changes:
//
//	cgroup=v1|hybrid|v2  kernel=RELEASE  rootless=BOOL  apparmor=BOOL  selinux=BOOL  lastcap=N
func (f *Facts) Change(text string) error {
	if trimmed := strings.TrimSpace(text); strings.HasPrefix(trimmed, "{") {
		return f.replace([]byte(trimmed))
	}
	for part := range strings.SplitSeq(text, ",") {
		key, value, ok := strings.Cut(strings.TrimSpace(part), "=")
		if !ok {
			return fmt.Errorf("facts: %q is not of the form key=value", part)
		}
		if err := f.set(key, value); err != nil {
			return fmt.Errorf("facts: %s=%s: %w", key, value, err)
		}
	}
	return nil
}

func (f *Facts) replace(raw []byte) error {
	next := Facts{}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(&next); err != nil {
		return fmt.Errorf("facts: %w", err)
	}
	if next.LastCap < 0 || next.LastCap > 63 {
		return fmt.Errorf("facts: lastCap: %d is not within 0 and 63", next.LastCap)
	}
	for file, s := range f.Sources {
		if _, ok := next.Sources[file]; !ok {
			if next.Sources == nil {
				next.Sources = map[string]Source{}
			}
			next.Sources[file] = s
		}
	}
	*f = next
	return nil
}

func (f *Facts) set(key, value string) (err error) {
	switch key {
	case "cgroup":
		return f.Cgroup.become(value)
	case "kernel":
		v, ok := parseVersion(value)
		if !ok {
			return fmt.Errorf("not the release of a kernel")
		}
		f.Kernel = value
		// Capabilities came in these releases (capabilities(7)), layers one by one with 6.7,
		// procfs of other PID namespaces with 6.17.
		f.LayerByLayer = !v.before(version{6, 7})
		f.ProcOfOthers = !v.before(version{6, 17})
		switch {
		case v.before(version{5, 8}):
			f.LastCap = 37
		case v.before(version{5, 9}):
			f.LastCap = 39
		default:
			f.LastCap = len(capabilities) - 1
		}
	case "rootless":
		f.Rootless, err = strconv.ParseBool(value)
	case "apparmor":
		f.AppArmor, err = strconv.ParseBool(value)
	case "selinux":
		f.SELinux, err = strconv.ParseBool(value)
	case "lastcap":
		n, err := strconv.Atoi(value)
		if err != nil || n < 0 || n > 63 {
			return fmt.Errorf("not a number within 0 and 63")
		}
		f.LastCap = n
	default:
		return fmt.Errorf("unknown fact")
	}
	return err
}

// hierarchiesV1 are those of a usual host.
var hierarchiesV1 = []string{
	"cpuset", "cpu,cpuacct", "blkio", "memory", "devices", "freezer", "net_cls,net_prio", "perf_event", "hugetlb", "pids", "rdma",
}

// become lays the hierarchies out as a usual host of this kind does.
func (c *CgroupFacts) become(kind string) error {
	const top = "/sys/fs/cgroup"
	*c = CgroupFacts{V2: kind == "v2"}
	switch kind {
	case "v2":
		c.Hierarchies = []Hierarchy{{Name: path.Base(top), Mountpoint: top, V2: true}}
		return nil
	case "v1", "hybrid":
		for _, name := range hierarchiesV1 {
			c.Hierarchies = append(c.Hierarchies, Hierarchy{Name: name, Mountpoint: path.Join(top, name), Options: strings.Split(name, ",")})
		}
		c.Hierarchies = append(c.Hierarchies, Hierarchy{Name: "systemd", Mountpoint: top + "/systemd", Options: []string{"none", "name=systemd"}})
		if kind == "hybrid" {
			c.Hierarchies = append(c.Hierarchies, Hierarchy{Name: "unified", Mountpoint: top + "/unified", V2: true})
		}
		return nil
	}
	return fmt.Errorf("neither v1, hybrid nor v2")
}

// Locate says where in the hierarchies a container's cgroup lies.
func (c *CgroupFacts) Locate(cgroup string) {
	for i := range c.Hierarchies {
		h := &c.Hierarchies[i]
		h.Dir = path.Join(h.Mountpoint, path.Clean("/"+cgroup))
	}
}
