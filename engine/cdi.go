package engine

import (
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"tags.cncf.io/container-device-interface/pkg/cdi"

	"github.com/hako-engine/hako/internal/errtext"
)

// cdiNames are the devices by name (Container Device Interface, "vendor.com/class=name") that
// a container gets: its client's, and those that plugins gave it.
func (v *Container) cdiNames() []string {
	var names []string
	if p := v.Config.Pod; p != nil {
		names = append(names, p.CDIDevices...)
	}
	if v.Adjustment != nil {
		names = append(names, v.Adjustment.CDIDevices...)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// injectCDI edits a configuration as the files of the CDI folders say for these devices. They
// are read each time: a device comes and goes with its file.
func (e *Engine) injectCDI(s *specs.Spec, names []string) error {
	if len(names) == 0 {
		return nil
	}
	cache, err := cdi.NewCache(cdi.WithSpecDirs(e.opt.CDISpecDirs...), cdi.WithAutoRefresh(false))
	if err != nil {
		return invalidf("CDI devices %s: %v", strings.Join(names, ", "), errtext.Plain(err))
	}
	missing, err := cache.InjectDevices(s, names...)
	if len(missing) > 0 {
		return invalidf("unresolvable CDI devices %s", strings.Join(missing, ", "))
	}
	if err != nil {
		return invalidf("CDI devices %s: %v", strings.Join(names, ", "), errtext.Plain(err))
	}
	return nil
}

// annotatedCDI adds the devices that are asked for by annotations of a pod's container, "cdi.k8s.io/PLUGIN_DEVICE": the way of device plugins that
// do not use the field of the API. A kubelet puts nothing of a pod's own annotations there.
func annotatedCDI(c *Config) error {
	_, names, err := cdi.ParseAnnotations(c.Annotations)
	if err != nil {
		return invalidf("%v", err)
	}
	slices.Sort(names) // a request that is made again is the same
	for _, n := range names {
		if !slices.Contains(c.Pod.CDIDevices, n) {
			c.Pod.CDIDevices = append(slices.Clip(c.Pod.CDIDevices), n)
		}
	}
	return nil
}

// checkCDI finds out whether devices can be given.
func (e *Engine) checkCDI(names []string) error { return e.injectCDI(&specs.Spec{}, names) }
