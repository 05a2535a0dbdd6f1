package streaming

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// tokenBytes of randomness are the only secret that protects a stream.
	tokenBytes = 24
	// tokenLife is how long a client has to use its URL.
	tokenLife = time.Minute
	// maxTokens bounds the requests that wait for their client.
	maxTokens = 1000
)

var tokenEncoding = base64.RawURLEncoding

// tokens holds the requests that wait for their client. They are found by a hash of
// the token, so that how long a search takes tells nothing about the tokens there are.
type tokens struct {
	life time.Duration
	max  int

	mu     sync.Mutex
	byHash map[[sha256.Size]byte]*waiting
}

type waiting struct {
	request any
	expiry  *time.Timer
}

func newTokens() *tokens {
	return &tokens{life: tokenLife, max: maxTokens, byHash: map[[sha256.Size]byte]*waiting{}}
}

// put keeps a request and gives its token: errdefs.ErrResourceExhausted when too many wait.
func (t *tokens) put(request any) (string, error) {
	var raw [tokenBytes]byte
	rand.Read(raw[:]) // never fails (crypto/rand)
	token := tokenEncoding.EncodeToString(raw[:])
	key := sha256.Sum256([]byte(token))
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.byHash) >= t.max {
		return "", fmt.Errorf("%d streams wait for their clients: %w", len(t.byHash), errdefs.ErrResourceExhausted)
	}
	t.byHash[key] = &waiting{request: request, expiry: time.AfterFunc(t.life, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.byHash, key)
	})}
	return token, nil
}

// take gives the request of a token, once.
func (t *tokens) take(token string) (any, bool) {
	if len(token) != tokenEncoding.EncodedLen(tokenBytes) {
		return nil, false
	}
	key := sha256.Sum256([]byte(token))
	t.mu.Lock()
	defer t.mu.Unlock()
	w := t.byHash[key]
	if w == nil {
		return nil, false
	}
	delete(t.byHash, key)
	w.expiry.Stop()
	return w.request, true
}

// clear forgets all.
func (t *tokens) clear() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, w := range t.byHash {
		w.expiry.Stop()
	}
	clear(t.byHash)
}
