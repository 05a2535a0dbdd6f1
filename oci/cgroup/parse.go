//go:build linux

package cgroup

import (
	"bytes"
	"cmp"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// keyed reads a "flat keyed" file: a name and a number in each line. Lines of another
// form, and numbers that are none, are left out: later kernels may add some.
func keyed(b []byte) map[string]uint64 {
	m := make(map[string]uint64, bytes.Count(b, []byte("\n")))
	for line := range bytes.Lines(b) {
		key, value, ok := bytes.Cut(bytes.TrimSpace(line), []byte(" "))
		if !ok {
			continue
		}
		if n, err := parseUint(string(value)); err == nil {
			m[string(key)] = n
		}
	}
	return m
}

// parsePSI reads a pressure file.
func parsePSI(b []byte) *PSI {
	if len(b) == 0 {
		return nil
	}
	var p PSI
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) == 0 {
			continue
		}
		var to *Pressure
		switch string(f[0]) {
		case "some":
			to = &p.Some
		case "full":
			to = &p.Full
		default:
			continue
		}
		for _, kv := range f[1:] {
			key, value, _ := strings.Cut(string(kv), "=")
			switch key {
			case "avg10":
				to.Avg10, _ = strconv.ParseFloat(value, 64)
			case "avg60":
				to.Avg60, _ = strconv.ParseFloat(value, 64)
			case "avg300":
				to.Avg300, _ = strconv.ParseFloat(value, 64)
			case "total":
				to.Total, _ = strconv.ParseUint(value, 10, 64)
			}
		}
	}
	return &p
}

type device struct{ major, minor uint64 }

// parseDevice reads "8:16".
func parseDevice(s string) (d device, ok bool) {
	major, minor, ok := strings.Cut(s, ":")
	if !ok {
		return d, false
	}
	var err1, err2 error
	d.major, err1 = strconv.ParseUint(major, 10, 64)
	d.minor, err2 = strconv.ParseUint(minor, 10, 64)
	return d, err1 == nil && err2 == nil
}

type ioMap map[device]*IOStats

func (m ioMap) at(d device) *IOStats {
	s := m[d]
	if s == nil {
		s = &IOStats{Major: d.major, Minor: d.minor}
		m[d] = s
	}
	return s
}

func (m ioMap) sorted() []IOStats {
	keys := slices.SortedFunc(maps.Keys(m), func(a, b device) int {
		return cmp.Or(cmp.Compare(a.major, b.major), cmp.Compare(a.minor, b.minor))
	})
	out := make([]IOStats, 0, len(keys))
	for _, k := range keys {
		out = append(out, *m[k])
	}
	return out
}

// parseBlkio adds a v1 file of lines like "8:0 Read 4096". Its last line is a total
// without device.
func parseBlkio(m ioMap, b []byte, isBytes bool) {
	for line := range bytes.Lines(b) {
		f := strings.Fields(string(line))
		if len(f) != 3 {
			continue
		}
		d, ok := parseDevice(f[0])
		n, err := strconv.ParseUint(f[2], 10, 64)
		if !ok || err != nil {
			continue
		}
		s := m.at(d)
		var size, ops *uint64
		switch f[1] {
		case "Read":
			size, ops = &s.ReadBytes, &s.ReadOps
		case "Write":
			size, ops = &s.WriteBytes, &s.WriteOps
		case "Discard":
			size, ops = &s.DiscardBytes, &s.DiscardOps
		case "Sync":
			size, ops = &s.SyncBytes, &s.SyncOps
		case "Async":
			size, ops = &s.AsyncBytes, &s.AsyncOps
		default:
			continue
		}
		if isBytes {
			*size = n
		} else {
			*ops = n
		}
	}
}

// parseIOStat reads v2's io.stat: "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6".
func parseIOStat(b []byte) []IOStats {
	m := ioMap{}
	for line := range bytes.Lines(b) {
		f := strings.Fields(string(line))
		if len(f) < 2 {
			continue // a device without traffic
		}
		d, ok := parseDevice(f[0])
		if !ok {
			continue
		}
		s := m.at(d)
		for _, kv := range f[1:] {
			key, value, _ := strings.Cut(kv, "=")
			n, err := strconv.ParseUint(value, 10, 64)
			if err != nil {
				continue
			}
			switch key {
			case "rbytes":
				s.ReadBytes = n
			case "wbytes":
				s.WriteBytes = n
			case "dbytes":
				s.DiscardBytes = n
			case "rios":
				s.ReadOps = n
			case "wios":
				s.WriteOps = n
			case "dios":
				s.DiscardOps = n
			}
		}
	}
	return m.sorted()
}

// parseRdma reads rdma.current: "mlx4_0 hca_handle=2 hca_object=2000".
func parseRdma(b []byte) []RdmaStats {
	var out []RdmaStats
	for line := range bytes.Lines(b) {
		f := strings.Fields(string(line))
		if len(f) < 2 {
			continue
		}
		s := RdmaStats{Device: f[0]}
		for _, kv := range f[1:] {
			key, value, _ := strings.Cut(kv, "=")
			n, err := strconv.ParseUint(value, 10, 32)
			if value == "max" {
				n, err = 1<<32-1, nil
			}
			if err != nil {
				continue
			}
			switch key {
			case "hca_handle":
				s.HcaHandles = uint32(n)
			case "hca_object":
				s.HcaObjects = uint32(n)
			}
		}
		out = append(out, s)
	}
	return out
}
