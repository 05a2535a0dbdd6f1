package docker

import (
	"github.com/moby/moby/api/types/blkiodev"
	"github.com/moby/moby/api/types/container"

	"github.com/hako-engine/hako/engine"
)

// resourcesFrom converts limits. The engine judges them; only what it could not see
// any more is refused here.
func resourcesFrom(w *container.Resources) (engine.Resources, error) {
	r := engine.Resources{
		Memory: w.Memory, MemoryReservation: w.MemoryReservation, MemorySwap: w.MemorySwap,
		MemorySwappiness: w.MemorySwappiness, OOMKillDisable: w.OomKillDisable,
		NanoCPUs: w.NanoCPUs, CPUShares: w.CPUShares, CPUPeriod: w.CPUPeriod, CPUQuota: w.CPUQuota,
		CPURTPeriod: w.CPURealtimePeriod, CPURTRuntime: w.CPURealtimeRuntime,
		CpusetCPUs: w.CpusetCpus, CpusetMems: w.CpusetMems,
		PidsLimit: w.PidsLimit, BlkioWeight: w.BlkioWeight,
		CgroupParent: w.CgroupParent, DeviceCgroupRules: w.DeviceCgroupRules,
	}
	if r.MemorySwappiness != nil && *r.MemorySwappiness == -1 {
		r.MemorySwappiness = nil // how old clients leave it alone
	}
	for _, d := range w.BlkioWeightDevice {
		if d != nil {
			r.BlkioWeightDevice = append(r.BlkioWeightDevice, engine.WeightDevice{Path: d.Path, Weight: d.Weight})
		}
	}
	r.ReadBps = throttlesFrom(w.BlkioDeviceReadBps)
	r.WriteBps = throttlesFrom(w.BlkioDeviceWriteBps)
	r.ReadIOps = throttlesFrom(w.BlkioDeviceReadIOps)
	r.WriteIOps = throttlesFrom(w.BlkioDeviceWriteIOps)
	for _, d := range w.Devices {
		dev := engine.Device{HostPath: d.PathOnHost, ContainerPath: d.PathInContainer, Permissions: d.CgroupPermissions}
		if dev.HostPath == "" {
			return r, invalidf("invalid device: PathOnHost must not be empty")
		}
		if dev.ContainerPath == "" {
			dev.ContainerPath = dev.HostPath
		}
		if dev.Permissions == "" {
			dev.Permissions = "rwm"
		}
		r.Devices = append(r.Devices, dev)
	}
	for _, u := range w.Ulimits {
		if u == nil {
			continue
		}
		if u.Name == "" {
			return r, invalidf("invalid ulimit: a name is missing")
		}
		r.Ulimits = append(r.Ulimits, engine.Ulimit{Name: u.Name, Soft: u.Soft, Hard: u.Hard})
	}
	return r, nil
}

func throttlesFrom(w []*blkiodev.ThrottleDevice) []engine.ThrottleDevice {
	var out []engine.ThrottleDevice
	for _, d := range w {
		if d != nil {
			out = append(out, engine.ThrottleDevice{Path: d.Path, Rate: d.Rate})
		}
	}
	return out
}

// wireResources gives limits back as they were asked for.
func wireResources(r *engine.Resources) container.Resources {
	w := container.Resources{
		Memory: r.Memory, MemoryReservation: r.MemoryReservation, MemorySwap: r.MemorySwap,
		MemorySwappiness: r.MemorySwappiness, OomKillDisable: r.OOMKillDisable,
		NanoCPUs: r.NanoCPUs, CPUShares: r.CPUShares, CPUPeriod: r.CPUPeriod, CPUQuota: r.CPUQuota,
		CPURealtimePeriod: r.CPURTPeriod, CPURealtimeRuntime: r.CPURTRuntime,
		CpusetCpus: r.CpusetCPUs, CpusetMems: r.CpusetMems,
		PidsLimit: r.PidsLimit, BlkioWeight: r.BlkioWeight,
		CgroupParent: r.CgroupParent, DeviceCgroupRules: r.DeviceCgroupRules,
		BlkioWeightDevice:    []*blkiodev.WeightDevice{},
		BlkioDeviceReadBps:   wireThrottles(r.ReadBps),
		BlkioDeviceWriteBps:  wireThrottles(r.WriteBps),
		BlkioDeviceReadIOps:  wireThrottles(r.ReadIOps),
		BlkioDeviceWriteIOps: wireThrottles(r.WriteIOps),
		Devices:              []container.DeviceMapping{},
		Ulimits:              []*container.Ulimit{},
	}
	for _, d := range r.BlkioWeightDevice {
		w.BlkioWeightDevice = append(w.BlkioWeightDevice, &blkiodev.WeightDevice{Path: d.Path, Weight: d.Weight})
	}
	for _, d := range r.Devices {
		w.Devices = append(w.Devices, container.DeviceMapping{PathOnHost: d.HostPath, PathInContainer: d.ContainerPath, CgroupPermissions: d.Permissions})
	}
	for _, u := range r.Ulimits {
		w.Ulimits = append(w.Ulimits, &container.Ulimit{Name: u.Name, Soft: u.Soft, Hard: u.Hard})
	}
	return w
}

func wireThrottles(list []engine.ThrottleDevice) []*blkiodev.ThrottleDevice {
	out := []*blkiodev.ThrottleDevice{}
	for _, d := range list {
		out = append(out, &blkiodev.ThrottleDevice{Path: d.Path, Rate: d.Rate})
	}
	return out
}
