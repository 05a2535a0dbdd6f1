package erofs

import (
	"errors"
	"math/rand"
	"testing"
)

// TestSeal: whatever byte of a sealed image changes, it is found; what is changed and sealed again is not.
func TestSeal(t *testing.T) {
	r := rand.New(rand.NewSource(1))
	data := make([]byte, 5*BlockSize+77)
	r.Read(data)
	write := func(t *testing.T, sum *Sum) (f interface {
		readWriter
		Truncate(int64) error
	}, size int64) {
		t.Helper()
		img := imageFile(t, "image", NewDir(0o755), DataStart)
		root := NewDir(0o755)
		root.Children["a"] = &Node{Mode: 0o100644, Size: int64(len(data)), Addr: DataStart}
		root.Children["b"] = &Node{Mode: 0o100644, Size: 1, Addr: DataStart + 8*BlockSize}
		_, err := img.WriteAt(data, DataStart)
		must(t, err)
		_, err = img.WriteAt([]byte{9}, DataStart+8*BlockSize)
		must(t, err)
		end, _, err := Write(img, root, DataStart+9*BlockSize)
		must(t, err)
		must(t, Verify(img, end))
		must(t, Seal(img, sum))
		must(t, Verify(img, end))
		return img, end
	}
	sum := NewSum()
	sum.Add(data[:100], DataStart)
	sum.Add(data[100:], DataStart+100)
	sum.Add([]byte{9}, DataStart+8*BlockSize)
	f, size := write(t, sum)
	other, _ := write(t, nil)
	a, b := make([]byte, BlockSize), make([]byte, BlockSize)
	_, err := f.ReadAt(a, 0)
	must(t, err)
	_, err = other.ReadAt(b, 0)
	must(t, err)
	if string(a) != string(b) || !isSealed(a) {
		t.Error("data that are added up while they are written, and afterwards, come to something else")
	}

	one := make([]byte, 1)
	flip := func(at int64) {
		t.Helper()
		_, err := f.ReadAt(one, at)
		must(t, err)
		one[0] ^= 1 << r.Intn(8)
		_, err = f.WriteAt(one, at)
		must(t, err)
	}
	for i := range 300 {
		at := r.Int63n(size)
		if i < 40 { // the first block, from byte to byte of the sums
			at = superOffset + int64(i)*4
		}
		_, err := f.ReadAt(a[:1], at)
		must(t, err)
		flip(at)
		if err := Verify(f, size); !errors.Is(err, ErrFormat) {
			t.Errorf("byte %d of %d was changed: %v", at, size, err)
		}
		_, err = f.WriteAt(a[:1], at)
		must(t, err)
	}
	must(t, Verify(f, size))
	if err := Verify(f, size+1); !errors.Is(err, ErrFormat) {
		t.Errorf("too long: %v", err)
	}

	info, err := ReadInfo(f)
	must(t, err)
	root := info.Root
	root.UID = 7
	must(t, SetAttributes(f, info.RootOffset, root))
	if err := Verify(f, size); !errors.Is(err, ErrFormat) {
		t.Errorf("attributes were changed: %v", err)
	}
	must(t, Reseal(f))
	must(t, Verify(f, size))
	flip(DataStart)
	must(t, Reseal(f))
	if err := Verify(f, size); !errors.Is(err, ErrFormat) {
		t.Errorf("data were changed, and the metadata sealed again: %v", err)
	}
	must(t, f.Truncate(size-BlockSize))
	if err := Verify(f, size); err == nil {
		t.Error("it is too short, and nobody finds it")
	}
}
