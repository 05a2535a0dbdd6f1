package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// impatient makes registries that say nothing fail soon.
func impatient(o *Options) {
	o.Registry.Timeout, o.Registry.Attempts = 300*time.Millisecond, 2
}

// pullBusy pulls with the patience of a rig that has none, from a registry that answers as soon as the machine lets it.
func (r *rig) pullBusy(ref string) error {
	for end := time.Now().Add(5 * time.Minute); ; {
		_, err := r.Pull(r.ctx, ref, PullOptions{})
		if !errdefs.IsUnavailable(err) || time.Now().After(end) {
			return err
		}
	}
}

// TestSilentRegistry: one that takes the connection and never answers fails after its time,
// at once when the client goes away, and keeps no other pull.
func TestSilentRegistry(t *testing.T) {
	t.Parallel()
	r, good, silent := newRig(t, impatient), newServer(t), newServer(t)
	b := threeLayers(t)
	bad := silent.push(t, "app", "v1", b)
	ref := good.push(t, "app", "v1", b)
	for name, stall := range map[string]func(*http.Request) bool{
		"no manifest": func(q *http.Request) bool { return !isBlob(q) },
		"no blob":     isBlob,
	} {
		silent.intercept(func(w http.ResponseWriter, q *http.Request, next http.Handler) {
			if stall(q) {
				<-q.Context().Done()
				return
			}
			next.ServeHTTP(w, q)
		})
		patient := newRig(t)
		ctx, cancel := context.WithTimeout(patient.ctx, 300*time.Millisecond)
		_, err := patient.Pull(ctx, bad, PullOptions{})
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) { // and not that the registry is silent
			t.Errorf("%s: an impatient client got %v", name, err)
		}
		patient.clean(t)

		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := r.Pull(r.ctx, bad, PullOptions{}); !errdefs.IsUnavailable(err) {
				t.Errorf("%s: %v", name, err)
			}
		})
		if _, err := newRig(t).Pull(r.ctx, ref, PullOptions{}); err != nil {
			t.Errorf("%s: another registry: %v", name, err)
		}
		wg.Wait()
		r.clean(t)
	}
	silent.intercept(nil)
	if err := r.pullBusy(bad); err != nil {
		t.Errorf("after it has come to itself: %v", err)
	}
}

// TestTokens pulls with the two kinds of tokens, and holds that no secret is logged or in an
// error.
func TestTokens(t *testing.T) {
	t.Parallel()
	const secret = "very-secret-token"
	s := newServer(t)
	ref := s.push(t, "app", "v1", threeLayers(t))
	realm := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		_ = q.ParseForm()
		if q.Method != http.MethodPost || q.Form.Get("grant_type") != "refresh_token" || q.Form.Get("refresh_token") != secret {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		fmt.Fprint(w, `{"access_token":"`+secret+`"}`)
	}))
	t.Cleanup(realm.Close)
	s.intercept(func(w http.ResponseWriter, q *http.Request, next http.Handler) {
		if q.Header.Get("Authorization") != "Bearer "+secret {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+realm.URL+`",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, q)
	})
	var log lockedBuffer
	logged := func(o *Options) {
		o.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	for name, a := range map[string]Auth{"identity": {IdentityToken: secret}, "registry": {RegistryToken: secret}} {
		r := newRig(t, logged)
		if _, err := r.Pull(r.ctx, ref, PullOptions{Auth: &a}); err != nil {
			t.Errorf("%s token: %v", name, err)
		}
		wrong := Auth{IdentityToken: strings.ReplaceAll(a.IdentityToken, "very", "wrong"), RegistryToken: strings.ReplaceAll(a.RegistryToken, "very", "wrong")}
		_, err := newRig(t, logged).Pull(r.ctx, ref, PullOptions{Auth: &wrong})
		if err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("a wrong %s token: %v", name, err)
		}
	}
	if text := log.String(); strings.Contains(text, "secret") {
		t.Errorf("a secret is in the log:\n%s", text)
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
