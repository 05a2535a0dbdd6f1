package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
)

// disk is a disk with a write cache, as QEMU sees one over the NBD protocol. What was
// flushed stays; what was not may be there after a power cut, or not, or in part.
type disk struct {
	size int64

	mu      sync.Mutex
	current *os.File // what reads give
	stable  *os.File // what a power cut leaves for sure
	cache   []write  // since the last flush, in order
	flushes int
	cut     bool // the power is off
	lie     bool // flushes are forgotten like everything else

	writes  int // and flushes, that are yet to come before reached is closed; 0: not counted
	reached chan struct{}
}

// after gives a channel that is closed after n more writes and flushes.
func (d *disk) after(n int) <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.writes, d.reached = n, make(chan struct{})
	return d.reached
}

// countLocked counts one. At the end the power is off at once, so that what is then in the
// cache does not depend on how fast the machine is killed.
func (d *disk) countLocked() {
	if d.writes > 0 {
		if d.writes--; d.writes == 0 {
			d.cut = true
			close(d.reached)
		}
	}
}

type write struct {
	at   int64
	data []byte // nil: zeroes
	n    int64
}

func (w write) apply(f *os.File) error {
	data := w.data
	if data == nil {
		data = make([]byte, w.n)
	}
	_, err := f.WriteAt(data, w.at)
	return err
}

// newDisk makes a disk in dir of an image.
func newDisk(dir, image string) (*disk, error) {
	d := &disk{}
	for name, f := range map[string]**os.File{"current": &d.current, "stable": &d.stable} {
		var err error
		if *f, err = os.OpenFile(dir+"/"+name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600); err != nil {
			return nil, err
		}
	}
	src, err := os.Open(image)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	if d.size, err = io.Copy(d.stable, src); err != nil {
		return nil, err
	}
	return d, copyFile(d.current, d.stable, d.size)
}

func (d *disk) close() {
	d.current.Close()
	d.stable.Close()
}

func copyFile(to, from *os.File, size int64) error {
	buf := make([]byte, 1<<20)
	for at := int64(0); at < size; at += int64(len(buf)) {
		n := min(int64(len(buf)), size-at)
		if _, err := from.ReadAt(buf[:n], at); err != nil {
			return err
		}
		if _, err := to.WriteAt(buf[:n], at); err != nil {
			return err
		}
	}
	return nil
}

func (d *disk) write(w write, durable bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cut {
		return errors.New("no power")
	}
	if w.at < 0 || w.at+w.n > d.size {
		return errors.New("beyond the end")
	}
	if err := w.apply(d.current); err != nil {
		return err
	}
	if durable && !d.lie {
		// What the cache holds of the same place must not come after it.
		d.cache = append(d.cache, write{w.at, w.data, w.n})
		return w.apply(d.stable)
	}
	d.cache = append(d.cache, w)
	d.countLocked()
	return nil
}

func (d *disk) flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cut {
		return errors.New("no power")
	}
	if !d.lie {
		for _, w := range d.cache {
			if err := w.apply(d.stable); err != nil {
				return err
			}
		}
		d.cache = d.cache[:0]
	}
	d.flushes++
	d.countLocked()
	return nil
}

func (d *disk) read(b []byte, at int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if at < 0 || at+int64(len(b)) > d.size {
		return errors.New("beyond the end")
	}
	_, err := d.current.ReadAt(b, at)
	return err
}

// sector is what a disk writes as a whole.
const sector = 512

// powerCut loses the cache: all of it, a part, or nothing. It says what it did.
func (d *disk) powerCut(rng *rand.Rand) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cut = true
	kept, torn := 0, 0
	how := rng.IntN(4)
	prefix := 0
	if len(d.cache) > 0 {
		prefix = rng.IntN(len(d.cache) + 1)
	}
	for i, w := range d.cache {
		keep := false
		switch how {
		case 0: // nothing of it
		case 1: // those that came first
			keep = i < prefix
		default: // any
			keep = rng.IntN(2) == 0
		}
		if !keep {
			continue
		}
		if how == 3 && w.n > sector && rng.IntN(4) == 0 {
			// Some of its sectors.
			torn++
			for at := int64(0); at < w.n; at += sector {
				if rng.IntN(2) == 0 {
					n := min(sector, w.n-at)
					part := write{at: w.at + at, n: n}
					if w.data != nil {
						part.data = w.data[at : at+n]
					}
					if err := part.apply(d.stable); err != nil {
						return "", err
					}
				}
			}
			continue
		}
		kept++
		if err := w.apply(d.stable); err != nil {
			return "", err
		}
	}
	text := fmt.Sprintf("%s: kept %d, tore %d of %d unflushed writes", []string{"lose all", "keep a prefix", "keep any", "keep any, torn"}[how], kept, torn, len(d.cache))
	d.cache = nil
	return text, copyFile(d.current, d.stable, d.size)
}

// powerOn lets it work again.
func (d *disk) powerOn() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cut, d.cache, d.writes = false, nil, 0
}

// NBD: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
const (
	nbdMagic      = 0x4e42444d41474943
	nbdOption     = 0x49484156454F5054
	nbdReply      = 0x3e889045565a9
	nbdRequest    = 0x25609513
	nbdSimple     = 0x67446698
	optExport     = 1
	optAbort      = 2
	optGo         = 7
	repAck        = 1
	repInfo       = 3
	repUnsup      = 1<<31 + 1
	flagHas       = 1 << 0
	flagFlush     = 1 << 2
	flagFUA       = 1 << 3
	flagTrim      = 1 << 5
	flagZeroes    = 1 << 6
	cmdRead       = 0
	cmdWrite      = 1
	cmdDisconnect = 2
	cmdFlush      = 3
	cmdTrim       = 4
	cmdZeroes     = 6
	cmdFlagFUA    = 1 << 0
	errIO         = 5
	errInvalid    = 22
)

const diskFlags = flagHas | flagFlush | flagFUA | flagTrim | flagZeroes

// serve speaks NBD on a connection until it ends.
func (d *disk) serve(c net.Conn) error {
	defer c.Close()
	if err := d.negotiate(c); err != nil {
		return err
	}
	header := make([]byte, 28)
	for {
		if _, err := io.ReadFull(c, header); err != nil {
			return err
		}
		if binary.BigEndian.Uint32(header) != nbdRequest {
			return errors.New("nbd: bad request")
		}
		flags, typ := binary.BigEndian.Uint16(header[4:]), binary.BigEndian.Uint16(header[6:])
		at, n := int64(binary.BigEndian.Uint64(header[16:])), int64(binary.BigEndian.Uint32(header[24:]))
		var data []byte
		var err error
		code := uint32(0)
		switch typ {
		case cmdRead:
			data = make([]byte, n)
			err = d.read(data, at)
		case cmdWrite:
			b := make([]byte, n)
			if _, err := io.ReadFull(c, b); err != nil {
				return err
			}
			err = d.write(write{at, b, n}, flags&cmdFlagFUA != 0)
		case cmdZeroes:
			err = d.write(write{at: at, n: n}, flags&cmdFlagFUA != 0)
		case cmdFlush:
			err = d.flush()
		case cmdTrim: // what was there may stay
		case cmdDisconnect:
			return nil
		default:
			code = errInvalid
		}
		if err != nil {
			code, data = errIO, nil
		}
		reply := make([]byte, 16, 16+len(data))
		binary.BigEndian.PutUint32(reply, nbdSimple)
		binary.BigEndian.PutUint32(reply[4:], code)
		copy(reply[8:], header[8:16])
		if _, err := c.Write(append(reply, data...)); err != nil {
			return err
		}
	}
}

func (d *disk) negotiate(c net.Conn) error {
	hello := binary.BigEndian.AppendUint64(nil, nbdMagic)
	hello = binary.BigEndian.AppendUint64(hello, nbdOption)
	hello = binary.BigEndian.AppendUint16(hello, 3) // fixed newstyle, no zeroes
	if _, err := c.Write(hello); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
		return err
	}
	for {
		header := make([]byte, 16)
		if _, err := io.ReadFull(c, header); err != nil {
			return err
		}
		option, n := binary.BigEndian.Uint32(header[8:]), binary.BigEndian.Uint32(header[12:])
		if n > 64<<10 {
			return errors.New("nbd: long option")
		}
		if _, err := io.ReadFull(c, make([]byte, n)); err != nil {
			return err
		}
		reply := func(typ uint32, data []byte) error {
			b := binary.BigEndian.AppendUint64(nil, nbdReply)
			b = binary.BigEndian.AppendUint32(b, option)
			b = binary.BigEndian.AppendUint32(b, typ)
			b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
			_, err := c.Write(append(b, data...))
			return err
		}
		export := binary.BigEndian.AppendUint64(nil, uint64(d.size))
		export = binary.BigEndian.AppendUint16(export, diskFlags)
		switch option {
		case optExport:
			_, err := c.Write(export)
			return err
		case optGo:
			if err := reply(repInfo, append([]byte{0, 0}, export...)); err != nil {
				return err
			}
			return reply(repAck, nil)
		case optAbort:
			return errors.New("nbd: aborted")
		default:
			if err := reply(repUnsup, nil); err != nil {
				return err
			}
		}
	}
}
