package docker

import (
	"bytes"
	"cmp"
	"context"
	"io"
	"mime"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	wireimage "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/api/types/volume"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/engine"
)

// ping is how clients find the version to speak.
func (s *Server) ping(_ context.Context, c *call) error {
	h := c.w.Header()
	h.Set("Builder-Version", "1")
	h.Set("Swarm", "inactive")
	h.Set("Cache-Control", "no-cache, no-store, must-revalidate")
	h.Set("Pragma", "no-cache")
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("Content-Length", "2")
	c.w.WriteHeader(http.StatusOK)
	if c.Method == http.MethodHead {
		return nil
	}
	_, _ = io.WriteString(c.w, "OK")
	return nil
}

func (s *Server) versionInfo(_ context.Context, c *call) error {
	kernel := kernelVersion()
	details := map[string]string{
		"ApiVersion":    MaxVersion,
		"MinAPIVersion": MinVersion,
		"Arch":          runtime.GOARCH,
		"BuildTime":     s.opt.BuildTime,
		"Experimental":  "false",
		"GitCommit":     s.opt.GitCommit,
		"GoVersion":     runtime.Version(),
		"KernelVersion": kernel,
		"Os":            runtime.GOOS,
	}
	return c.json(http.StatusOK, system.VersionResponse{
		Platform:      system.PlatformInfo{Name: "hako"},
		Version:       s.opt.Version,
		APIVersion:    MaxVersion,
		MinAPIVersion: MinVersion,
		Os:            runtime.GOOS,
		Arch:          runtime.GOARCH,
		Components:    []system.ComponentVersion{{Name: "Engine", Version: s.opt.Version, Details: details}},
		GitCommit:     s.opt.GitCommit,
		GoVersion:     runtime.Version(),
		KernelVersion: kernel,
		BuildTime:     s.opt.BuildTime,
	})
}

func kernelVersion() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	release, _, _ := bytes.Cut(u.Release[:], []byte{0})
	return string(release)
}

func (s *Server) info(ctx context.Context, c *call) error {
	i, err := s.opt.Backend.Info(ctx)
	if err != nil {
		return err
	}
	return c.json(http.StatusOK, infoOf(&i))
}

func infoOf(i *engine.Info) system.Info {
	out := system.Info{
		ID:                 i.ID,
		Containers:         i.Containers,
		ContainersRunning:  i.Running,
		ContainersPaused:   i.Paused,
		ContainersStopped:  i.Stopped,
		Images:             i.Images,
		Driver:             i.Snapshotter,
		DriverStatus:       [][2]string{{"driver-type", "io.containerd.snapshotter.v1"}},
		MemoryLimit:        i.MemoryLimit,
		SwapLimit:          i.SwapLimit,
		CPUCfsPeriod:       i.CPUCfs,
		CPUCfsQuota:        i.CPUCfs,
		CPUShares:          i.CPUCfs,
		CPUSet:             i.CPUSet,
		PidsLimit:          i.PidsLimit,
		IPv4Forwarding:     i.IPv4Forwarding,
		OomKillDisable:     i.CgroupVersion == 1 && i.MemoryLimit,
		NGoroutines:        runtime.NumGoroutine(),
		SystemTime:         time.Now().Format(time.RFC3339Nano),
		LoggingDriver:      "json-file",
		CgroupDriver:       i.CgroupDriver,
		CgroupVersion:      strconv.Itoa(i.CgroupVersion),
		KernelVersion:      i.KernelVersion,
		OperatingSystem:    i.OperatingSystem,
		OSVersion:          i.OSVersion,
		OSType:             "linux",
		Architecture:       i.Architecture,
		IndexServerAddress: "https://index.docker.io/v1/",
		NCPU:               i.NCPU,
		MemTotal:           i.MemTotal,
		DockerRootDir:      i.Root,
		Name:               i.Name,
		Labels:             list(i.Labels),
		ServerVersion:      i.Version,
		Runtimes:           map[string]system.RuntimeWithStatus{},
		DefaultRuntime:     defaultRuntime,
		Swarm:              swarm.Info{LocalNodeState: swarm.LocalNodeStateInactive},
		LiveRestoreEnabled: i.LiveRestore,
		SecurityOptions:    list(i.SecurityOptions),
		CDISpecDirs:        []string{},
		Warnings:           list(i.Warnings),
		Plugins: system.PluginsInfo{
			Volume:  []string{"local"},
			Network: []string{"bridge", "host", "null"},
			Log:     []string{"json-file", "none"},
		},
		RegistryConfig: &registry.ServiceConfig{
			IndexConfigs: map[string]*registry.IndexInfo{
				"docker.io": {Name: "docker.io", Mirrors: []string{}, Secure: true, Official: true},
			},
			Mirrors: []string{},
		},
	}
	for name, binary := range i.Runtimes {
		out.Runtimes[name] = system.RuntimeWithStatus{Runtime: system.Runtime{Path: binary}}
	}
	for _, host := range i.InsecureRegistries {
		out.RegistryConfig.IndexConfigs[host] = &registry.IndexInfo{Name: host, Mirrors: []string{}}
	}
	return out
}

// eventFilters are what docker events --filter accepts.
var eventFilters = []string{
	"config", "container", "daemon", "event", "image", "label", "network", "node",
	"plugin", "scope", "secret", "service", "type", "volume",
}

func (s *Server) events(ctx context.Context, c *call) error {
	f, err := c.filters(eventFilters...)
	if err != nil {
		return err
	}
	since, err := c.moment("since")
	if err != nil {
		return err
	}
	until, err := c.moment("until")
	if err != nil {
		return err
	}
	if !until.IsZero() && until.Before(since) {
		return invalidf("`since` time (%s) cannot be after `until` time (%s)", c.query("since"), c.query("until"))
	}
	stream, err := s.opt.Backend.Events(ctx, since, until, f)
	if err != nil {
		return err
	}
	out := c.objects(c.version.eventType(c.Header.Values("Accept")))
	out.begin()
	for e := range stream {
		if e.Type == engine.EventSandbox {
			continue // Docker has no sandboxes
		}
		if err := out.write(c.version.event(eventOf(&e))); err != nil {
			return nil // the client left
		}
	}
	return nil
}

// eventType negotiates how objects are parted, since API 1.52.
func (v version) eventType(accept []string) string {
	if v.less(v1_52) {
		return typeJSON
	}
	for kind := range strings.SplitSeq(strings.Join(accept, ","), ",") {
		kind, _, err := mime.ParseMediaType(kind)
		if err == nil && slices.Contains([]string{typeNDJSON, typeJSONL, typeJSONSeq, typeJSON}, kind) {
			return kind
		}
	}
	return typeJSON
}

func eventOf(e *engine.Event) events.Message {
	return events.Message{
		Type: events.Type(e.Type), Action: events.Action(e.Action),
		Actor: events.Actor{ID: e.ID, Attributes: dict(e.Attributes)},
		Scope: "local", Time: e.Time.Unix(), TimeNano: e.Time.UnixNano(),
	}
}

func (s *Server) diskUsage(ctx context.Context, c *call) error {
	types := c.URL.Query()["type"]
	for _, t := range types {
		switch system.DiskUsageObject(t) {
		case system.ContainerObject, system.ImageObject, system.VolumeObject, system.BuildCacheObject:
		default:
			return invalidf("unknown object type: %s", t)
		}
	}
	u, err := s.opt.Backend.DiskUsage(ctx)
	if err != nil {
		return err
	}
	wanted := func(o system.DiskUsageObject) bool { return len(types) == 0 || slices.Contains(types, string(o)) }
	out := &system.DiskUsage{}
	if wanted(system.ImageObject) {
		out.ImageUsage = imageUsage(&u)
	}
	if wanted(system.ContainerObject) {
		out.ContainerUsage = containerUsage(&u)
	}
	if wanted(system.VolumeObject) {
		out.VolumeUsage = volumeUsage(&u)
	}
	if wanted(system.BuildCacheObject) {
		out.BuildCacheUsage = &build.DiskUsage{}
	}
	return c.json(http.StatusOK, c.version.diskUsage(u.LayersSize, out, c.flag("verbose")))
}

func imageUsage(u *engine.DiskUsage) *wireimage.DiskUsage {
	out := &wireimage.DiskUsage{TotalCount: int64(len(u.Images)), TotalSize: u.LayersSize}
	for i := range u.Images {
		im := &u.Images[i]
		out.Items = append(out.Items, imageSummaryOf(im))
		if im.Containers > 0 {
			out.ActiveCount++
		} else {
			out.Reclaimable += im.Size - max(im.SharedSize, 0)
		}
	}
	return out
}

func containerUsage(u *engine.DiskUsage) *container.DiskUsage {
	out := &container.DiskUsage{TotalCount: int64(len(u.Containers))}
	now := time.Now()
	for i := range u.Containers {
		ctr := &u.Containers[i]
		out.Items = append(out.Items, summaryOf(ctr, now))
		size := deref(ctr.SizeRw)
		out.TotalSize += size
		switch ctr.State.Status {
		case engine.StatusRunning, engine.StatusPaused, engine.StatusRestarting:
			out.ActiveCount++
		default:
			out.Reclaimable += size
		}
	}
	return out
}

func volumeUsage(u *engine.DiskUsage) *volume.DiskUsage {
	out := &volume.DiskUsage{TotalCount: int64(len(u.Volumes))}
	for i := range u.Volumes {
		v := &u.Volumes[i]
		w := volumeOf(v)
		w.UsageData = &volume.UsageData{RefCount: int64(v.RefCount), Size: v.Size}
		out.Items = append(out.Items, w)
		out.TotalSize += max(v.Size, 0)
		if v.RefCount > 0 {
			out.ActiveCount++
		} else {
			out.Reclaimable += max(v.Size, 0)
		}
	}
	return out
}

// authenticate answers docker login. The client keeps the credentials: a daemon hands out no
// identity token of its own.
func (s *Server) authenticate(ctx context.Context, c *call) error {
	var req registry.AuthConfig
	if err := c.body(&req); err != nil {
		return err
	}
	a := authOf(req)
	if a == nil {
		return invalidf("no credentials were given for %s", cmp.Or(req.ServerAddress, "docker.io"))
	}
	if err := s.opt.Backend.Login(ctx, *a); err != nil {
		return err
	}
	return c.json(http.StatusOK, registry.AuthResponse{Status: "Login Succeeded"})
}
