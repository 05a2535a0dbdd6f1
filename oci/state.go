//go:build linux && (amd64 || arm64)

package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/durable"
	"github.com/hako-engine/hako/oci/internal/classed"
	"github.com/hako-engine/hako/oci/rdt"
	"github.com/hako-engine/hako/oci/spec"
)

// stateVersion changes with the meaning of state.json. Unknown fields are ignored, a
// higher version is refused.
const stateVersion = 1

// state is state.json: what cannot be derived.
type state struct {
	Version     int               `json:"version"`
	ID          string            `json:"id"`
	OCIVersion  string            `json:"ociVersion"`
	Bundle      string            `json:"bundle"`
	Rootfs      string            `json:"rootfs"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Created     time.Time         `json:"created"`
	Owner       int               `json:"owner"`
	Pid         int               `json:"pid"`
	StartTime   uint64            `json:"startTime"` // of the pid, in clock ticks since boot
	Cgroups     map[string]string `json:"cgroups,omitempty"`
	Rootless    bool              `json:"rootless,omitempty"`
	Unit        *unit             `json:"unit,omitempty"` // with the cgroup driver systemd
	Rdt         *rdt.Group        `json:"rdt,omitempty"`
}

func (c *Container) readState() error {
	raw, err := os.ReadFile(filepath.Join(c.dir, stateFile))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(raw, &c.state); err != nil {
		return fmt.Errorf("%s: %w", stateFile, err)
	}
	if c.state.Version > stateVersion {
		return classed.Errorf(errdefs.ErrFailedPrecondition, "%s: version %d is newer than this runtime", stateFile, c.state.Version)
	}
	return nil
}

func (c *Container) writeState() error {
	raw, err := json.Marshal(&c.state)
	if err != nil {
		return err
	}
	return durable.WriteVolatile(filepath.Join(c.dir, stateFile), raw, 0o600)
}

// readSpec gives the configuration that the container was created with.
func (c *Container) readSpec() (*specs.Spec, error) {
	raw, err := os.ReadFile(filepath.Join(c.dir, configFile))
	if err != nil {
		return nil, fmt.Errorf("container %q: %w", c.ID(), err)
	}
	s, err := spec.Decode(raw)
	if err != nil {
		return nil, fmt.Errorf("container %q: %w", c.ID(), err)
	}
	return s, nil
}

// lock keeps other processes and goroutines from changing the container. The lock lies
// on the directory, so it is gone with it.
func (c *Container) lock() (unlock func(), err error) {
	for {
		d, err := os.Open(c.dir)
		if err != nil {
			if errors.Is(err, os.ErrNotExist) {
				return nil, classed.Errorf(errdefs.ErrNotFound, "container %q: container does not exist", filepath.Base(c.dir))
			}
			return nil, err
		}
		for {
			if err = unix.Flock(int(d.Fd()), unix.LOCK_EX); err != unix.EINTR {
				break
			}
		}
		if err != nil {
			d.Close()
			return nil, fmt.Errorf("lock %s: %w", c.dir, err)
		}
		// The directory may have been removed, and made again, while we waited.
		var a, b unix.Stat_t
		if unix.Fstat(int(d.Fd()), &a) == nil && unix.Stat(c.dir, &b) == nil && a.Ino == b.Ino && a.Dev == b.Dev {
			return func() { d.Close() }, nil
		}
		d.Close()
	}
}

// startTime reads field 22 of /proc/PID/stat, and the state of the process.
func startTime(pid int) (ticks uint64, status byte, err error) {
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, 0, err
	}
	// The command in parentheses may contain anything.
	i := bytes.LastIndexByte(raw, ')')
	if i < 0 {
		return 0, 0, fmt.Errorf("/proc/%d/stat: %.40q", pid, raw)
	}
	f := bytes.Fields(raw[i+1:])
	if len(f) < 20 {
		return 0, 0, fmt.Errorf("/proc/%d/stat: %.40q", pid, raw)
	}
	ticks, err = strconv.ParseUint(string(f[19]), 10, 64)
	return ticks, f[0][0], err
}

// alive tells whether this very process lives: a zombie does not.
func alive(pid int, start uint64) bool {
	if pid <= 0 {
		return false
	}
	t, status, err := startTime(pid)
	return err == nil && t == start && status != 'Z' && status != 'X'
}
