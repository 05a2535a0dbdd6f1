//go:build linux && (amd64 || arm64)

package oci

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/oci/internal/rawfile"
	"github.com/hako-engine/hako/oci/launch"
)

// writeMaps gives a new user namespace its ids.
func writeMaps(pid int, l *specs.Linux) error {
	if os.Geteuid() != 0 {
		return rootlessMaps(pid, l)
	}
	for file, m := range map[string][]specs.LinuxIDMapping{"uid_map": l.UIDMappings, "gid_map": l.GIDMappings} {
		if err := rawfile.Put(fmt.Sprintf("/proc/%d/%s", pid, file), launch.MapText(m)); err != nil {
			return err
		}
	}
	return nil
}

// rootlessMaps writes the maps that an unprivileged user may write, or asks the
// setuid programs that know more (newuidmap(1)).
func rootlessMaps(pid int, l *specs.Linux) error {
	for _, k := range []struct {
		program, file string
		maps          []specs.LinuxIDMapping
		own           int
	}{{"newuidmap", "uid_map", l.UIDMappings, os.Geteuid()}, {"newgidmap", "gid_map", l.GIDMappings, os.Getegid()}} {
		if len(k.maps) == 1 && k.maps[0].Size == 1 && int(k.maps[0].HostID) == k.own {
			if k.file == "gid_map" {
				if err := rawfile.Put(fmt.Sprintf("/proc/%d/setgroups", pid), "deny"); err != nil {
					return err
				}
			}
			if err := rawfile.Put(fmt.Sprintf("/proc/%d/%s", pid, k.file), launch.MapText(k.maps)); err != nil {
				return err
			}
			continue
		}
		args := []string{strconv.Itoa(pid)}
		for _, m := range k.maps {
			args = append(args, strconv.Itoa(int(m.ContainerID)), strconv.Itoa(int(m.HostID)), strconv.Itoa(int(m.Size)))
		}
		if out, err := exec.Command(k.program, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %.200s", k.program, err, out)
		}
	}
	return nil
}
