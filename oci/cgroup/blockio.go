//go:build linux

package cgroup

import (
	"fmt"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

const (
	noIOMax = "rbps=max wbps=max riops=max wiops=max"

	minWeight, maxWeight = 10, 1000 // of the specification, from the days of CFQ
)

func (p *planner) blockIO(r *specs.LinuxBlockIO) error {
	throttles := []struct {
		v1, v2 string
		rates  []specs.LinuxThrottleDevice
	}{
		{"blkio.throttle.read_bps_device", "rbps", r.ThrottleReadBpsDevice},
		{"blkio.throttle.write_bps_device", "wbps", r.ThrottleWriteBpsDevice},
		{"blkio.throttle.read_iops_device", "riops", r.ThrottleReadIOPSDevice},
		{"blkio.throttle.write_iops_device", "wiops", r.ThrottleWriteIOPSDevice},
	}
	asked := set(r.Weight) || set(r.LeafWeight) || len(r.WeightDevice) > 0
	for _, t := range throttles {
		asked = asked || len(t.rates) > 0
	}
	if !asked {
		return nil
	}
	dir, v2, err := p.find("blkio", "blockIO")
	if err != nil {
		return err
	}
	if err := p.weights(dir, v2, r); err != nil {
		return err
	}
	for _, t := range throttles {
		for _, d := range t.rates {
			device, err := deviceKey(d.Major, d.Minor)
			if err != nil {
				return err
			}
			if !v2 {
				p.steps = append(p.steps, step{path: dir + "/" + t.v1, value: device + " " + utoa(d.Rate), key: device, none: "0"})
				continue
			}
			rate := utoa(d.Rate)
			if d.Rate == 0 { // v1's word for "no limit"
				rate = "max"
			}
			p.steps = append(p.steps, step{path: dir + "/io.max", value: device + " " + t.v2 + "=" + rate, key: device, none: noIOMax})
		}
	}
	return nil
}

// weights plans the proportional shares. Which file has them depends on the I/O
// scheduler that the kernel was built with.
func (p *planner) weights(dir string, v2 bool, r *specs.LinuxBlockIO) error {
	if set(r.LeafWeight) {
		if v2 || !exists(dir+"/blkio.leaf_weight") {
			return fmt.Errorf("blockIO.leafWeight needs the CFQ scheduler, which this kernel does not have: %w", errdefs.ErrFailedPrecondition)
		}
		p.write(dir+"/blkio.leaf_weight", utoa(uint64(*r.LeafWeight)))
	}
	all, perDevice := dir+"/blkio.weight", dir+"/blkio.weight_device"
	bfqAll, bfqDevice := dir+"/blkio.bfq.weight", dir+"/blkio.bfq.weight_device"
	if v2 {
		all, perDevice = dir+"/io.weight", dir+"/io.weight"
		bfqAll, bfqDevice = dir+"/io.bfq.weight", dir+"/io.bfq.weight"
	}
	var bfq bool
	file := func(plain, bfqFile string) (string, error) {
		for _, f := range []string{bfqFile, plain} {
			if exists(f) {
				bfq = f == bfqFile
				return f, nil
			}
		}
		return "", fmt.Errorf("blockIO.weight: this kernel has no I/O scheduler with weights for cgroups: %w", errdefs.ErrFailedPrecondition)
	}
	value := func(w uint16) (string, error) {
		if w < minWeight || w > maxWeight {
			return "", invalid("blockIO.weight is %d, which is not within %d and %d", w, minWeight, maxWeight)
		}
		if v2 && !bfq { // 1 to 10000
			return utoa(1 + (uint64(w)-minWeight)*9999/(maxWeight-minWeight)), nil
		}
		return utoa(uint64(w)), nil
	}
	if set(r.Weight) {
		f, err := file(all, bfqAll)
		if err != nil {
			return err
		}
		v, err := value(*r.Weight)
		if err != nil {
			return err
		}
		if v2 { // the file has lines for devices too
			p.steps = append(p.steps, step{path: f, value: "default " + v, key: "default", none: "100"})
		} else {
			p.write(f, v)
		}
	}
	for _, d := range r.WeightDevice {
		device, err := deviceKey(d.Major, d.Minor)
		if err != nil {
			return err
		}
		if set(d.Weight) {
			f, err := file(perDevice, bfqDevice)
			if err != nil {
				return err
			}
			v, err := value(*d.Weight)
			if err != nil {
				return err
			}
			none := "0"
			if v2 {
				none = "default"
			}
			p.steps = append(p.steps, step{path: f, value: device + " " + v, key: device, none: none})
		}
		if set(d.LeafWeight) {
			f := dir + "/blkio.leaf_weight_device"
			if v2 || !exists(f) {
				return fmt.Errorf("blockIO.weightDevice.leafWeight needs the CFQ scheduler, which this kernel does not have: %w", errdefs.ErrFailedPrecondition)
			}
			p.steps = append(p.steps, step{path: f, value: device + " " + utoa(uint64(*d.LeafWeight)), key: device, none: "0"})
		}
	}
	return nil
}

func deviceKey(major, minor int64) (string, error) {
	if major < 0 || major > maxMajor || minor < 0 || minor > maxMinor {
		return "", invalid("%d:%d is not a device number", major, minor)
	}
	return strconv.FormatInt(major, 10) + ":" + strconv.FormatInt(minor, 10), nil
}
