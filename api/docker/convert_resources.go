package docker

import (
	"github.com/moby/moby/api/types/blkiodev"
	"github.com/moby/moby/api/types/container"

	"github.com/hako-engine/hako/engine"
)

// minMemory is the least limit that Docker accepts: a container does not start with less.
const minMemory = 6 << 20

// resourcesFrom converts limits. Contradictions that the text of an error can name are
// refused here; what the machine cannot do is the engine's to know.
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
	switch {
	case r.Memory < 0, r.Memory > 0 && r.Memory < minMemory:
		return r, invalidf("Minimum memory limit allowed is 6MB")
	case r.MemoryReservation < 0, r.MemoryReservation > 0 && r.MemoryReservation < minMemory:
		return r, invalidf("Minimum memory reservation allowed is 6MB")
	case r.Memory > 0 && r.MemoryReservation > r.Memory:
		return r, invalidf("Minimum memory limit can not be less than memory reservation limit, see usage")
	case r.Memory > 0 && r.MemorySwap > 0 && r.MemorySwap < r.Memory:
		return r, invalidf("Minimum memoryswap limit should be larger than memory limit, see usage")
	case r.MemorySwap < -1:
		return r, invalidf("invalid memory swap limit %d: use -1 for no limit", r.MemorySwap)
	case r.MemorySwappiness != nil && (*r.MemorySwappiness < 0 || *r.MemorySwappiness > 100):
		return r, invalidf("Invalid value: %d, valid memory swappiness range is 0-100", *r.MemorySwappiness)
	case r.NanoCPUs < 0:
		return r, invalidf("invalid CPU limit %d: NanoCpus must not be negative", r.NanoCPUs)
	case r.NanoCPUs > 0 && r.CPUPeriod > 0:
		return r, invalidf("Conflicting options: Nano CPUs and CPU Period cannot both be set.")
	case r.NanoCPUs > 0 && r.CPUQuota > 0:
		return r, invalidf("Conflicting options: Nano CPUs and CPU Quota cannot both be set.")
	case r.CPUShares < 0:
		return r, invalidf("invalid CPU shares (%d): value must be a positive integer", r.CPUShares)
	case r.CPUPeriod != 0 && (r.CPUPeriod < 1000 || r.CPUPeriod > 1000000):
		return r, invalidf("CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)")
	case r.CPUQuota > 0 && r.CPUQuota < 1000:
		return r, invalidf("CPU cfs quota can not be less than 1ms (i.e. 1000)")
	case r.BlkioWeight > 0 && (r.BlkioWeight < 10 || r.BlkioWeight > 1000):
		return r, invalidf("Range of blkio weight is from 10 to 1000")
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
		for _, p := range dev.Permissions {
			if p != 'r' && p != 'w' && p != 'm' {
				return r, invalidf("invalid device %s: permissions %q must be of r, w and m", dev.HostPath, dev.Permissions)
			}
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
		if u.Hard != -1 && (u.Soft > u.Hard || u.Soft == -1) {
			return r, invalidf("ulimit soft limit must be less than or equal to hard limit: %d > %d", u.Soft, u.Hard)
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
