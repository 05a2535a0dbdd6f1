package network

import (
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Counters are what one interface transferred since it exists, as its owner sees it.
type Counters struct {
	RxBytes, RxPackets, RxErrors, RxDropped uint64
	TxBytes, TxPackets, TxErrors, TxDropped uint64
}

// NetnsStats gives the counters of the interfaces, but for the loopback, of the network namespace at path.
func NetnsStats(path string) (map[string]Counters, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return nil, fmt.Errorf("read interface counters of %s: %w", path, err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("read interface counters of %s: %w", path, err)
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("read interface counters of %s: %w", path, err)
	}
	out := make(map[string]Counters, len(links))
	for _, l := range links {
		a := l.Attrs()
		if s := a.Statistics; s != nil && a.Flags&net.FlagLoopback == 0 {
			out[a.Name] = Counters{s.RxBytes, s.RxPackets, s.RxErrors, s.RxDropped, s.TxBytes, s.TxPackets, s.TxErrors, s.TxDropped}
		}
	}
	return out, nil
}
