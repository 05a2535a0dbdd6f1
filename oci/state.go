//go:build linux && (amd64 || arm64)

package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/classed"
	"github.com/hako-engine/hako/oci/internal/plainjson"
	"github.com/hako-engine/hako/oci/internal/rawfile"
	"github.com/hako-engine/hako/oci/rdt"
	"github.com/hako-engine/hako/oci/spec"
)

// stateVersion changes with the meaning of state.json. Unknown fields are ignored, a
// higher version is refused.
const stateVersion = 1

// maxState bounds what is read of state.json.
const maxState = 16 << 20

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
	Usual       bool              `json:"usual,omitempty"` // see usual
}

// marshal gives the text of state.json. encoding/json would give the same, after half
// a millisecond of looking at the types.
func (s *state) marshal() ([]byte, error) {
	b := make([]byte, 0, 2048)
	var failed error
	text := func(v string) {
		for _, c := range []byte(v) {
			if c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
				quoted, err := json.Marshal(v)
				failed = errors.Join(failed, err)
				b = append(b, quoted...)
				return
			}
		}
		b = append(append(append(b, '"'), v...), '"')
	}
	number := func(key string, v int64) {
		b = strconv.AppendInt(append(b, key...), v, 10)
	}
	words := func(key string, m map[string]string) {
		if len(m) == 0 {
			return
		}
		b = append(b, key...)
		sep := byte('{')
		for _, k := range slices.Sorted(maps.Keys(m)) {
			b = append(b, sep)
			text(k)
			b = append(b, ':')
			text(m[k])
			sep = ','
		}
		b = append(b, '}')
	}
	number(`{"version":`, int64(s.Version))
	b = append(b, `,"id":`...)
	text(s.ID)
	b = append(b, `,"ociVersion":`...)
	text(s.OCIVersion)
	b = append(b, `,"bundle":`...)
	text(s.Bundle)
	b = append(b, `,"rootfs":`...)
	text(s.Rootfs)
	words(`,"annotations":`, s.Annotations)
	b = append(b, `,"created":"`...)
	b = append(s.Created.AppendFormat(b, time.RFC3339Nano), '"')
	number(`,"owner":`, int64(s.Owner))
	number(`,"pid":`, int64(s.Pid))
	b = strconv.AppendUint(append(b, `,"startTime":`...), s.StartTime, 10)
	words(`,"cgroups":`, s.Cgroups)
	if s.Rootless {
		b = append(b, `,"rootless":true`...)
	}
	if s.Usual {
		b = append(b, `,"usual":true`...)
	}
	rare := func(key string, v any) {
		raw, err := json.Marshal(v)
		failed = errors.Join(failed, err)
		b = append(append(b, key...), raw...)
	}
	if s.Unit != nil {
		rare(`,"unit":`, s.Unit)
	}
	if s.Rdt != nil {
		rare(`,"rdt":`, s.Rdt)
	}
	return append(b, '}'), failed
}

func (c *Container) readState() error {
	raw, err := rawfile.Read(filepath.Join(c.dir, stateFile), 2<<10, maxState)
	if err != nil {
		return err
	}
	return c.state.unmarshal(raw)
}

func (s *state) unmarshal(raw []byte) error {
	if !s.plain(raw) {
		if err := json.Unmarshal(raw, s); err != nil {
			return fmt.Errorf("%s: %w", stateFile, err)
		}
	}
	if s.Version > stateVersion {
		return classed.Errorf(errdefs.ErrFailedPrecondition, "%s: version %d is newer than this runtime", stateFile, s.Version)
	}
	return nil
}

// plain is unmarshal for what marshal has made of the usual container, without reflection.
// It leaves s alone if that is not what it is.
func (s *state) plain(raw []byte) bool {
	var n state
	d := plainjson.New(raw)
	d.Object(func(key string) {
		switch key {
		case "version":
			n.Version = int(d.Int(strconv.IntSize))
		case "id":
			n.ID = d.Str()
		case "ociVersion":
			n.OCIVersion = d.Str()
		case "bundle":
			n.Bundle = d.Str()
		case "rootfs":
			n.Rootfs = d.Str()
		case "annotations":
			n.Annotations = d.StrMap()
		case "created":
			if n.Created.UnmarshalText([]byte(d.Str())) != nil {
				d.Fail()
			}
		case "owner":
			n.Owner = int(d.Int(strconv.IntSize))
		case "pid":
			n.Pid = int(d.Int(strconv.IntSize))
		case "startTime":
			n.StartTime = d.Uint(64)
		case "cgroups":
			n.Cgroups = d.StrMap()
		case "rootless":
			n.Rootless = d.Bool()
		case "usual":
			n.Usual = d.Bool()
		default:
			d.Fail()
		}
	})
	if !d.Plain() {
		return false
	}
	*s = n
	return true
}

// usual tells whether starting, killing and deleting the container takes nothing but what
// package early can do: no hooks, and no processes but those that end with the first.
func (c *Container) usual(s *specs.Spec) bool {
	return s.Process != nil && ownPidNamespace(s) && c.state.Unit == nil && c.state.Rdt == nil && !c.state.Rootless &&
		(s.Hooks == nil || len(s.Hooks.StartContainer)+len(s.Hooks.Poststart)+len(s.Hooks.Poststop) == 0)
}

func (c *Container) writeState() error {
	raw, err := c.state.marshal()
	if err != nil {
		return err
	}
	// Whole for every reader. Nobody else writes it: creation is over only then.
	path := filepath.Join(c.dir, stateFile)
	if err := rawfile.Write(path+".new", raw, 0o600); err != nil {
		return err
	}
	if err := unix.Rename(path+".new", path); err != nil {
		return &os.LinkError{Op: "rename", Old: path + ".new", New: path, Err: err}
	}
	return nil
}

// readSpec gives the configuration that the container was created with.
func (c *Container) readSpec() (*specs.Spec, error) {
	c.kept.Lock()
	kept := c.kept.spec
	c.kept.Unlock()
	if kept != nil {
		return kept, nil
	}
	raw, err := rawfile.Read(filepath.Join(c.dir, configFile), 16<<10, spec.MaxSize)
	if err != nil {
		return nil, fmt.Errorf("container %q: %w", c.ID(), err)
	}
	s, err := spec.Decode(raw)
	if err != nil {
		return nil, fmt.Errorf("container %q: %w", c.ID(), err)
	}
	return s, nil
}

// keep remembers the configuration that the container was created with.
func (c *Container) keep(s *specs.Spec) {
	b := &specs.Spec{Version: s.Version, Linux: &specs.Linux{}}
	if s.Linux != nil {
		b.Linux.Namespaces = slices.Clone(s.Linux.Namespaces)
	}
	if s.Hooks != nil && len(s.Hooks.Poststop) > 0 {
		b.Hooks = &specs.Hooks{Poststop: s.Hooks.Poststop}
	}
	c.kept.Lock()
	defer c.kept.Unlock()
	c.kept.spec, c.kept.brief = s, b
}

// forget lets go of the memory that only a start needs.
func (c *Container) forget() {
	c.kept.Lock()
	defer c.kept.Unlock()
	c.kept.spec = nil
}

// readBrief gives the namespaces and the hooks for the end.
func (c *Container) readBrief() (*specs.Spec, error) {
	c.kept.Lock()
	brief := c.kept.brief
	c.kept.Unlock()
	if brief != nil {
		return brief, nil
	}
	return c.readSpec()
}

// lock keeps other processes and goroutines from changing the container. The lock lies
// on the directory, so it is gone with it.
func (c *Container) lock() (unlock func(), err error) {
	for {
		d, err := rawfile.Open(c.dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			if errors.Is(err, os.ErrNotExist) {
				return nil, classed.Errorf(errdefs.ErrNotFound, "container %q: container does not exist", filepath.Base(c.dir))
			}
			return nil, err
		}
		for {
			if err = unix.Flock(d, unix.LOCK_EX); err != unix.EINTR {
				break
			}
		}
		if err != nil {
			unix.Close(d)
			return nil, fmt.Errorf("lock %s: %w", c.dir, err)
		}
		// The directory may have been removed, and made again, while we waited.
		var a, b unix.Stat_t
		if unix.Fstat(d, &a) == nil && unix.Stat(c.dir, &b) == nil && a.Ino == b.Ino && a.Dev == b.Dev {
			return func() { unix.Close(d) }, nil
		}
		unix.Close(d)
	}
}

// startTime reads field 22 of /proc/PID/stat, and the state of the process.
func startTime(pid int) (ticks uint64, status byte, err error) {
	raw, err := rawfile.Read("/proc/"+strconv.Itoa(pid)+"/stat", 1<<10, 64<<10)
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
