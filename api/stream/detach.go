package stream

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
)

// ErrDetached ends the input of a client that typed the detach keys.
var ErrDetached = errors.New("the client detached")

// DefaultDetachKeys is what an attached client types to leave: ctrl-p ctrl-q.
const DefaultDetachKeys = "ctrl-p,ctrl-q"

// ParseDetachKeys understands the form of docker's --detach-keys: keys parted by
// commas, each a single character or ctrl- and one of a-z @ [ \ ] ^ _. An empty
// string means DefaultDetachKeys. Errors are errdefs.ErrInvalidArgument.
func ParseDetachKeys(s string) ([]byte, error) {
	if s == "" {
		s = DefaultDetachKeys
	}
	var keys []byte
	for key := range strings.SplitSeq(s, ",") {
		if len(key) == 1 {
			keys = append(keys, key[0])
			continue
		}
		c, ok := strings.CutPrefix(strings.ToLower(key), "ctrl-")
		switch {
		case ok && len(c) == 1 && c[0] >= 'a' && c[0] <= 'z':
			keys = append(keys, c[0]-'a'+1)
		case ok && c == "@":
			keys = append(keys, 0)
		case ok && len(c) == 1 && c[0] >= '[' && c[0] <= '_':
			keys = append(keys, c[0]-'['+27)
		default:
			return nil, fmt.Errorf("invalid detach keys (%s) provided: unknown key %q: %w", s, key, errdefs.ErrInvalidArgument)
		}
	}
	return keys, nil
}

// detachReader passes bytes on until it has seen all keys in a row.
type detachReader struct {
	r       io.Reader
	keys    []byte
	matched int    // how many keys the bytes held back have matched
	pending []byte // decided, not yet delivered
	err     error
}

// NewDetachReader reads from r until the keys were typed one after the other; then
// it ends with ErrDetached, and the keys are not delivered. A prefix of the keys is held
// back until it is clear what it becomes.
func NewDetachReader(r io.Reader, keys []byte) io.Reader {
	if len(keys) == 0 {
		return r
	}
	return &detachReader{r: r, keys: keys}
}

func (d *detachReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(d.pending) == 0 {
		if d.err != nil {
			return 0, d.err
		}
		n, err := d.r.Read(p)
		for _, c := range p[:n] {
			if d.push(c) {
				err = ErrDetached
				break
			}
		}
		if err != nil {
			d.err = err
			if !errors.Is(err, ErrDetached) {
				d.pending = append(d.pending, d.keys[:d.matched]...)
				d.matched = 0
			}
		}
	}
	n := copy(p, d.pending)
	d.pending = d.pending[n:]
	return n, nil
}

// push takes one byte and tells whether it completed the keys.
func (d *detachReader) push(c byte) bool {
	for {
		if c == d.keys[d.matched] {
			d.matched++
			return d.matched == len(d.keys)
		}
		if d.matched == 0 {
			d.pending = append(d.pending, c)
			return false
		}
		// What was held back is not the keys from its first byte on; the rest of it may be.
		d.pending = append(d.pending, d.keys[0])
		d.matched = d.restart(d.matched - 1)
	}
}

// restart gives the longest k <= n such that the last k of the first n+1 keys are the
// first k keys, delivering the bytes that fall out.
func (d *detachReader) restart(n int) int {
	held := d.keys[1 : n+1]
	for len(held) > 0 {
		if string(held) == string(d.keys[:len(held)]) {
			return len(held)
		}
		d.pending = append(d.pending, held[0])
		held = held[1:]
	}
	return 0
}
