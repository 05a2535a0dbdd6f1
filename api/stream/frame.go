package stream

import (
	"encoding/binary"
	"io"
	"sync"
)

// Stream numbers of the multiplexed format.
const (
	Stdin       = 0
	Stdout      = 1
	Stderr      = 2
	SystemError = 3
)

const headerSize = 8

// Framer writes the multiplexed format of the Docker Engine API ("Stream format" of
// its ContainerAttach operation): one byte for the stream, three zero bytes, the
// payload's length as a big-endian uint32, the payload. It is safe for concurrent use.
type Framer struct {
	mu  sync.Mutex
	w   io.Writer
	buf []byte
}

// NewFramer writes frames to w, each with a single Write.
func NewFramer(w io.Writer) *Framer { return &Framer{w: w} }

// WriteFrame writes one frame. An empty payload writes nothing.
func (f *Framer) WriteFrame(stream int, p []byte) error {
	if len(p) == 0 {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var header [headerSize]byte
	header[0] = byte(stream)
	binary.BigEndian.PutUint32(header[4:], uint32(len(p)))
	f.buf = append(append(f.buf[:0], header[:]...), p...)
	_, err := f.w.Write(f.buf)
	return err
}

// Raw is the sink of a terminal: payloads without frames.
type Raw struct{ W io.Writer }

// WriteFrame writes the payload alone.
func (r Raw) WriteFrame(_ int, p []byte) error {
	if len(p) == 0 {
		return nil
	}
	_, err := r.W.Write(p)
	return err
}
