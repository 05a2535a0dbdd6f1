//go:build linux

// Package netdev moves network devices into the network namespace of a container.
//
// In flow names of devices in the caller's network namespace and a descriptor of another
// one; out flow the devices, there, up, with the addresses that they had. It speaks
// rtnetlink(7) itself: a handful of messages.
package netdev

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/classed"
)

// Moved is a device that has been moved.
type Moved struct {
	From, To  string // its name in the caller's namespace, and in the other
	addresses []address
	up        bool
}

// Move moves the device called from into the network namespace, where it is called to
// (a name, or one that ends in %d for the first number that is free), and brings it up.
// Its permanent addresses of global scope go with it. When Move fails, the device is
// where it was.
func Move(namespace *os.File, from, to string) (_ *Moved, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("move network device %s into the container: %w", from, err)
		}
	}()
	m, err := move(namespace, from, to, true)
	if err != nil {
		return nil, err
	}
	if err := inNamespace(namespace, m.restore); err != nil {
		return nil, errors.Join(err, m.Back(namespace))
	}
	return m, nil
}

// Back undoes Move.
func (m *Moved) Back(namespace *os.File) error {
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer own.Close()
	err = inNamespace(namespace, func() error {
		_, err := move(own, m.To, m.From, false)
		return err
	})
	if err == nil {
		back := *m
		back.To = m.From
		err = back.restore()
	}
	if err != nil {
		return fmt.Errorf("move network device %s back: %w", m.From, err)
	}
	return nil
}

// move takes a device out of the namespace of the calling thread.
func move(namespace *os.File, from, to string, find bool) (*Moved, error) {
	c, err := dial()
	if err != nil {
		return nil, err
	}
	defer c.close()
	l, err := c.link(from)
	if err != nil {
		return nil, err
	}
	m := &Moved{From: from, To: to, up: l.flags&unix.IFF_UP != 0}
	if m.addresses, err = c.addresses(l.index); err != nil {
		return nil, fmt.Errorf("read its addresses: %w", err)
	}
	var before []link
	if find {
		if err := inNamespace(namespace, func() (err error) { before, err = links(); return err }); err != nil {
			return nil, err
		}
		for _, o := range before {
			if o.name == to {
				return nil, classed.Errorf(errdefs.ErrAlreadyExists, "the container has a network device called %s", to)
			}
		}
	}
	// One request moves and renames, so that the name is never wrong on either side.
	r := newRequest(unix.RTM_NEWLINK, 0)
	r.link(l.index, 0, 0)
	r.uint32(unix.IFLA_NET_NS_FD, uint32(namespace.Fd()))
	r.string(unix.IFLA_IFNAME, to)
	if err := c.ask(r, nil); err != nil {
		return nil, err
	}
	if strings.HasSuffix(to, "%d") {
		err := inNamespace(namespace, func() error {
			after, err := links()
			if err != nil {
				return err
			}
			m.To = fresh(before, after)
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return m, nil
}

// fresh gives the name of the link that is only in after.
func fresh(before, after []link) string {
	known := map[int32]bool{}
	for _, l := range before {
		known[l.index] = true
	}
	for _, l := range after {
		if !known[l.index] {
			return l.name
		}
	}
	return ""
}

// restore gives a moved device its addresses, and brings it up. It runs in the namespace
// of the device.
func (m *Moved) restore() error {
	c, err := dial()
	if err != nil {
		return err
	}
	defer c.close()
	l, err := c.link(m.To)
	if err != nil {
		return err
	}
	for _, a := range m.addresses {
		if err := c.ask(a.request(l.index), nil); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("give it its address: %w", err)
		}
	}
	r := newRequest(unix.RTM_NEWLINK, 0)
	r.link(l.index, unix.IFF_UP, unix.IFF_UP)
	if err := c.ask(r, nil); err != nil {
		return fmt.Errorf("bring it up: %w", err)
	}
	return nil
}

// inNamespace calls f on a thread in another network namespace. If the thread cannot come
// back it ends.
func inNamespace(namespace *os.File, f func() error) (err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		own, e := os.Open("/proc/thread-self/ns/net")
		if e != nil {
			runtime.UnlockOSThread()
			err = e
			return
		}
		defer own.Close()
		if e := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNET); e != nil {
			runtime.UnlockOSThread()
			err = fmt.Errorf("enter the network namespace: %w", e)
			return
		}
		err = f()
		if unix.Setns(int(own.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
	}()
	<-done
	return err
}
