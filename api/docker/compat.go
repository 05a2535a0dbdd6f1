package docker

import (
	"net/netip"

	"github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/api/types/volume"
)

// This file is the layer that gives answers the shape that a client's version of the
// API has. Handlers and conversions make the newest shape.

// legacyNetworkSettings has the address of the default bridge once more at the top, as
// it was before containers could be in several networks. Removed in API 1.52.
type legacyNetworkSettings struct {
	*container.NetworkSettings
	Bridge                 string
	HairpinMode            bool
	LinkLocalIPv6Address   string
	LinkLocalIPv6PrefixLen int
	SecondaryIPAddresses   []string
	SecondaryIPv6Addresses []string
	EndpointID             string
	Gateway                netip.Addr
	GlobalIPv6Address      netip.Addr
	GlobalIPv6PrefixLen    int
	IPAddress              netip.Addr
	IPPrefixLen            int
	IPv6Gateway            netip.Addr
	MacAddress             network.HardwareAddr
}

type legacyInspect struct {
	*container.InspectResponse
	NetworkSettings legacyNetworkSettings
}

// inspect shapes the description of a container.
func (v version) inspect(r *container.InspectResponse) any {
	if !v.less(v1_52) {
		return r
	}
	out := legacyInspect{InspectResponse: r, NetworkSettings: legacyNetworkSettings{NetworkSettings: r.NetworkSettings}}
	if es := r.NetworkSettings.Networks[network.NetworkBridge]; es != nil {
		n := &out.NetworkSettings
		n.EndpointID, n.Gateway, n.IPAddress, n.IPPrefixLen = es.EndpointID, es.Gateway, es.IPAddress, es.IPPrefixLen
		n.IPv6Gateway, n.GlobalIPv6Address, n.GlobalIPv6PrefixLen = es.IPv6Gateway, es.GlobalIPv6Address, es.GlobalIPv6PrefixLen
		n.MacAddress = es.MacAddress
	}
	return out
}

// legacyEvent repeats an event's essence at the top. Removed in API 1.52.
type legacyEvent struct {
	Status string `json:"status,omitempty"`
	ID     string `json:"id,omitempty"`
	From   string `json:"from,omitempty"`
	events.Message
}

// event shapes an event.
func (v version) event(m events.Message) any {
	if !v.less(v1_52) {
		return m
	}
	switch m.Type {
	case events.ContainerEventType:
		return legacyEvent{Status: string(m.Action), ID: m.Actor.ID, From: m.Actor.Attributes["image"], Message: m}
	case events.ImageEventType:
		return legacyEvent{Status: string(m.Action), ID: m.Actor.ID, Message: m}
	}
	return m
}

// legacyImage has VirtualSize, removed in API 1.44.
type legacyImage struct {
	image.Summary
	VirtualSize int64
}

// images shapes a list of images.
func (v version) images(list []image.Summary) any {
	if v.less(v1_48) {
		for i := range list {
			list[i].Descriptor, list[i].Manifests = nil, nil
		}
	}
	if !v.less(v1_44) {
		return list
	}
	out := make([]legacyImage, 0, len(list))
	for _, im := range list {
		out = append(out, legacyImage{Summary: im, VirtualSize: im.Size})
	}
	return out
}

// legacyImageInspect has what was removed in API 1.44 and 1.50.
type legacyImageInspect struct {
	image.InspectResponse
	Parent        string
	DockerVersion string
	VirtualSize   int64 `json:",omitempty"`
}

// image shapes the description of an image.
func (v version) image(r image.InspectResponse) any {
	if v.less(v1_48) {
		r.Descriptor, r.Manifests = nil, nil
	}
	if !v.less(v1_50) {
		return r
	}
	out := legacyImageInspect{InspectResponse: r}
	if v.less(v1_44) {
		out.VirtualSize = r.Size
	}
	return out
}

// legacyDiskUsage is what /system/df answered before API 1.53; in 1.52 both shapes are there.
type legacyDiskUsage struct {
	LayersSize  int64
	Images      any
	Containers  []container.Summary
	Volumes     []volume.Volume
	BuildCache  []build.CacheRecord
	BuilderSize *int64 `json:",omitempty"`
	*system.DiskUsage
}

// diskUsage shapes what the objects take on disk. Parts that were not asked for are nil.
func (v version) diskUsage(layers int64, u *system.DiskUsage, verbose bool) any {
	out := legacyDiskUsage{LayersSize: layers}
	if u.ImageUsage != nil {
		out.Images = v.images(list(u.ImageUsage.Items))
	}
	if u.ContainerUsage != nil {
		out.Containers = list(u.ContainerUsage.Items)
	}
	if u.VolumeUsage != nil {
		out.Volumes = list(u.VolumeUsage.Items)
	}
	if u.BuildCacheUsage != nil {
		out.BuildCache = []build.CacheRecord{}
	}
	if !v.less(v1_52) {
		out.DiskUsage = u
		if !verbose {
			dropItems(u)
		}
	} else {
		out.BuilderSize = new(int64)
	}
	return out
}

// dropItems leaves the sums, as the new shape does unless asked to be verbose.
func dropItems(u *system.DiskUsage) {
	if u.ImageUsage != nil {
		u.ImageUsage.Items = nil
	}
	if u.ContainerUsage != nil {
		u.ContainerUsage.Items = nil
	}
	if u.VolumeUsage != nil {
		u.VolumeUsage.Items = nil
	}
}
