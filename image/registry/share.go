package registry

import (
	"context"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/hako-engine/hako/internal/keylock"
)

// maxPlaces bounds how many blobs a process remembers the repositories of.
const maxPlaces = 10_000

// Uploads is what the clients of a process know of each other's uploads: what two images
// share goes to a repository once, and one after the other where both have to send it (a
// registry that writes its files in place gives others half of them meanwhile); and to a
// second repository of the same host it need not go at all. The zero value works.
type Uploads struct {
	turns  keylock.Locks     // by repository and digest
	mu     sync.Mutex        // guards places
	places map[string]string // by host and digest: the path of a repository that has the blob
}

// Turn waits until nobody else of those who share Options.Uploads sends the blob or document to
// the repository. Who has it asks whether it is there by now, sends it if not, and calls done.
func (r *Repository) Turn(ctx context.Context, d digest.Digest) (done func(), err error) {
	h, err := r.pushHost()
	if err != nil {
		return nil, err
	}
	return r.c.o.Uploads.turns.Lock(ctx, h.Scheme+"://"+h.Host+h.Path+"/"+r.path+" "+d.String())
}

// has notes that a repository has a blob.
func (u *Uploads) has(host, path string, d digest.Digest) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.places == nil || len(u.places) >= maxPlaces {
		u.places = map[string]string{}
	}
	u.places[host+" "+d.String()] = path
}

// place gives another repository than path that has a blob; "": none is known.
func (u *Uploads) place(host, path string, d digest.Digest) string {
	u.mu.Lock()
	defer u.mu.Unlock()
	if p := u.places[host+" "+d.String()]; p != path {
		return p
	}
	return ""
}
