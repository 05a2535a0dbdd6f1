package erofs

import (
	"fmt"
	"io"

	"github.com/cespare/xxhash/v2"
)

// The sums of an image lie behind its superblock, under the superblock's checksum, where the kernel
// does not look: a mark, then XXH64 of the data and XXH64 of the metadata. They find what a disk
// has changed. They are no defence: who can write the file can write them.
const (
	sumOffset = superOffset + superSize
	sumMark   = "hakosum1"
)

// Sum adds up the data of an image while they are written. Use NewSum.
type Sum struct {
	h   *xxhash.Digest
	pos int64
}

// NewSum gives the sum of no data.
func NewSum() *Sum { return &Sum{xxhash.New(), DataStart} }

// Add takes in what is written at an offset of the image. Offsets only grow; what is between them is zeros.
func (s *Sum) Add(b []byte, at int64) {
	s.padTo(at)
	_, _ = s.h.Write(b) // it never fails
	s.pos += int64(len(b))
}

func (s *Sum) padTo(at int64) {
	for s.pos < at {
		n := min(at-s.pos, BlockSize)
		_, _ = s.h.Write(zeros[:n])
		s.pos += n
	}
}

// readWriter is an image that is open for both.
type readWriter interface {
	io.ReaderAt
	io.WriterAt
}

// Seal notes in an image that Write has written what its data and metadata add up to, for Verify. data may
// be nil: then the data are read. Image and notes are not synced.
func Seal(f readWriter, data *Sum) error {
	block, meta, end, err := readHead(f)
	if err != nil {
		return fmt.Errorf("seal image: %w", err)
	}
	if data == nil {
		data = NewSum()
		if err := data.read(f, meta); err != nil {
			return fmt.Errorf("seal image: %w", err)
		}
	}
	data.padTo(meta)
	copy(block[sumOffset:], sumMark)
	le.PutUint64(block[sumOffset+8:], data.h.Sum64())
	return writeSeal(f, block, meta, end)
}

// Reseal is Seal after metadata were changed (SetAttributes). It does nothing to an image that was not sealed.
func Reseal(f readWriter) error {
	block, meta, end, err := readHead(f)
	if err != nil {
		return fmt.Errorf("seal image: %w", err)
	}
	if !isSealed(block) {
		return nil
	}
	return writeSeal(f, block, meta, end)
}

// readHead reads the first block of an image that Write has written, and where its metadata begin and end.
func readHead(f io.ReaderAt) (block []byte, meta, end int64, err error) {
	block = make([]byte, BlockSize)
	if _, err := f.ReadAt(block, 0); err != nil {
		return nil, 0, 0, fmt.Errorf("read superblock: %w", err)
	}
	s := block[superOffset:]
	if le.Uint32(s) != magic || s[12] != blockBits || le.Uint32(s[4:]) != checksum(s) {
		return nil, 0, 0, damaged("no superblock of an image that hako has made")
	}
	return block, int64(le.Uint32(s[40:])) * BlockSize, int64(le.Uint32(s[36:])) * BlockSize, nil
}

func isSealed(block []byte) bool { return string(block[sumOffset:sumOffset+8]) == sumMark }

func writeSeal(f readWriter, block []byte, meta, end int64) error {
	m := &Sum{xxhash.New(), meta}
	if err := m.read(f, end); err != nil {
		return fmt.Errorf("seal image: %w", err)
	}
	le.PutUint64(block[sumOffset+16:], m.h.Sum64())
	s := block[superOffset:]
	le.PutUint32(s[4:], checksum(s))
	if _, err := f.WriteAt(block, 0); err != nil {
		return fmt.Errorf("seal image: %w", err)
	}
	return nil
}

// read takes in what the image has up to an offset.
func (s *Sum) read(f io.ReaderAt, to int64) error {
	n, err := io.CopyBuffer(struct{ io.Writer }{s.h}, io.NewSectionReader(f, s.pos, to-s.pos), make([]byte, 1<<20))
	if s.pos += n; err == nil && s.pos < to {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// Verify reads an image that Write has written from end to end, and compares it with what Seal has noted. Of one that
// was not sealed only the superblock and the length are compared. The class of the errors that are not of
// reading is ErrFormat.
func Verify(f io.ReaderAt, size int64) error {
	block, meta, end, err := readHead(f)
	if err != nil {
		return err
	}
	if size != end || meta < DataStart || meta > end {
		return damaged("it has %d bytes of %d", size, end)
	}
	for _, b := range block[:superOffset] {
		if b != 0 {
			return damaged("what is before its superblock is not what was written")
		}
	}
	data, metadata := NewSum(), &Sum{xxhash.New(), meta}
	if err := data.read(f, meta); err != nil {
		return err
	}
	if err := metadata.read(f, end); err != nil {
		return err
	}
	switch {
	case !isSealed(block):
		return nil
	case le.Uint64(block[sumOffset+8:]) != data.h.Sum64():
		return damaged("its files' data are not what was written")
	case le.Uint64(block[sumOffset+16:]) != metadata.h.Sum64():
		return damaged("its metadata are not what was written")
	}
	return nil
}
