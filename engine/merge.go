package engine

import (
	"maps"
	"slices"
	"strings"
	"time"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
)

// reservedLabels are namespaces of labels that this engine or one of its front-ends
// gives a meaning to. An image must not reach them (CVE-2026-53488).
var reservedLabels = []string{
	"containerd.io/", "io.containerd.", "io.cri-containerd", "io.kubernetes.", "io.cri-o.",
	"nerdctl/", "io.hako.", "hako.",
}

func isReservedLabel(key string) bool {
	return slices.ContainsFunc(reservedLabels, func(p string) bool { return strings.HasPrefix(key, p) })
}

// merge fills what the client left open from the image's configuration, in Docker's
// way. It does not touch c.
func merge(v *Container, c Config, img dockerspec.DockerOCIImageConfig) error {
	entrypoint, cmd := c.Entrypoint, c.Cmd
	if len(entrypoint) == 0 {
		if len(cmd) == 0 {
			cmd = img.Cmd
		}
		if !c.EntrypointSet {
			entrypoint = img.Entrypoint
		}
	}
	if len(entrypoint) == 1 && entrypoint[0] == "" {
		entrypoint = nil
	}
	v.Entrypoint, v.Cmd = slices.Clone(entrypoint), slices.Clone(cmd)
	argv := slices.Concat(entrypoint, cmd)
	if len(argv) == 0 {
		return invalidf("no command specified")
	}
	v.Path, v.Args = argv[0], argv[1:]

	v.Env = mergeEnv(img.Env, c.Env)
	v.User = c.User
	if v.User == "" {
		v.User = img.User
	}
	v.WorkingDir = c.WorkingDir
	if v.WorkingDir == "" {
		v.WorkingDir = img.WorkingDir
	}
	v.StopSignal = c.StopSignal
	if v.StopSignal == "" {
		v.StopSignal = img.StopSignal
	}
	v.Labels = map[string]string{}
	for k, val := range img.Labels {
		if !isReservedLabel(k) {
			v.Labels[k] = val
		}
	}
	maps.Copy(v.Labels, c.Labels)
	ports := map[string]struct{}{}
	for p := range img.ExposedPorts {
		if !strings.Contains(p, "/") {
			p += "/tcp"
		}
		ports[p] = struct{}{}
	}
	for _, p := range c.ExposedPorts {
		ports[p] = struct{}{}
	}
	for _, p := range c.Ports {
		ports[portKey(p.ContainerPort, p.Proto)] = struct{}{}
	}
	v.ExposedPorts = slices.Sorted(maps.Keys(ports))
	v.Healthcheck = mergeHealthcheck(c.Healthcheck, img.Healthcheck)
	return nil
}

// mergeEnv lays the client's variables over the image's. "KEY" alone removes one.
func mergeEnv(base, over []string) []string {
	out := make([]string, 0, len(base)+len(over))
	index := map[string]int{}
	put := func(kv string) {
		k, _, has := strings.Cut(kv, "=")
		i, ok := index[k]
		switch {
		case !has && ok:
			out[i] = ""
			delete(index, k)
		case !has:
		case ok:
			out[i] = kv
		default:
			index[k] = len(out)
			out = append(out, kv)
		}
	}
	for _, kv := range base {
		put(kv)
	}
	for _, kv := range over {
		put(kv)
	}
	return slices.DeleteFunc(out, func(s string) bool { return s == "" })
}

// lookupEnv finds the value of a variable.
func lookupEnv(env []string, key string) (string, bool) {
	for _, kv := range env {
		if k, v, ok := strings.Cut(kv, "="); ok && k == key {
			return v, true
		}
	}
	return "", false
}

func mergeHealthcheck(c *Healthcheck, img *dockerspec.HealthcheckConfig) *Healthcheck {
	if c == nil && img == nil {
		return nil
	}
	var h Healthcheck
	if c != nil {
		h = *c
	}
	if img != nil {
		if len(h.Test) == 0 {
			h.Test = slices.Clone(img.Test)
		}
		for _, f := range []struct {
			to   *time.Duration
			from time.Duration
		}{
			{&h.Interval, img.Interval}, {&h.Timeout, img.Timeout},
			{&h.StartPeriod, img.StartPeriod}, {&h.StartInterval, img.StartInterval},
		} {
			if *f.to == 0 {
				*f.to = f.from
			}
		}
		if h.Retries == 0 {
			h.Retries = img.Retries
		}
	}
	return &h
}
