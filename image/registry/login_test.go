package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestLoginDomain(t *testing.T) {
	t.Parallel()
	for address, want := range map[string]string{
		"": "docker.io", "https://index.docker.io/v1/": "docker.io", "docker.io": "docker.io", "registry-1.docker.io": "docker.io",
		"r.example.com": "r.example.com", "https://r.example.com/v2/": "r.example.com", "localhost:5000": "localhost:5000", "[::1]:5000": "[::1]:5000",
		"https://": "!", "a b": "!", "user@host": "!", "https:///x": "!",
	} {
		got, err := loginDomain(address)
		if want == "!" {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%q: %q %v", address, got, err)
			}
		} else if got != want || err != nil {
			t.Errorf("%q: %q %v, want %q", address, got, err, want)
		}
	}
}

// Registries that ask for a password themselves, and those that send to a token server.
func TestLogin(t *testing.T) {
	t.Parallel()
	right := func(r *http.Request) bool {
		user, pass, ok := r.BasicAuth()
		return ok && user == "me" && pass == "right"
	}
	var asks atomic.Value
	asks.Store("")
	mux := http.NewServeMux()
	mux.HandleFunc("/v2/", func(w http.ResponseWriter, r *http.Request) {
		switch challenge := asks.Load().(string); {
		case challenge == "broken":
			w.WriteHeader(http.StatusNotFound)
		case challenge == "", right(r) && challenge == "Basic", r.Header.Get("Authorization") == "Bearer secret":
			fmt.Fprint(w, "{}")
		default:
			c := `Basic realm="test"`
			if challenge == "Bearer" {
				c = fmt.Sprintf(`Bearer realm="http://%s/token",service="test"`, r.Host)
			}
			w.Header().Set("WWW-Authenticate", c)
			w.WriteHeader(http.StatusUnauthorized)
		}
	})
	mux.HandleFunc("/token", func(w http.ResponseWriter, r *http.Request) {
		if err := r.ParseForm(); err != nil || !right(r) && (r.Form.Get("username") != "me" || r.Form.Get("password") != "right") {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]string{"token": "secret", "access_token": "secret"})
	})
	s := httptest.NewServer(mux)
	defer s.Close()
	c := New(Options{Timeout: 5 * time.Minute, Attempts: 1})
	host := strings.TrimPrefix(s.URL, "http://")
	for _, challenge := range []string{"Basic", "Bearer"} {
		asks.Store(challenge)
		if err := c.Login(context.Background(), host, Credentials{Username: "me", Password: "right"}); err != nil {
			t.Errorf("%s: %v", challenge, err)
		}
		err := c.Login(context.Background(), "https://"+host+"/v1/", Credentials{Username: "me", Password: "wrong"})
		if !errdefs.IsUnauthorized(err) || strings.Contains(err.Error(), "wrong") {
			t.Errorf("%s, wrong password: %v", challenge, err)
		}
	}
	asks.Store("")
	if err := c.Login(context.Background(), host, Credentials{Username: "me", Password: "x"}); err != nil {
		t.Errorf("an open registry: %v", err)
	}
	asks.Store("broken")
	if err := c.Login(context.Background(), host, Credentials{Username: "me", Password: "x"}); !errdefs.IsUnavailable(err) {
		t.Errorf("no registry: %v", err)
	}
	s.Close()
	if err := c.Login(context.Background(), host, Credentials{Username: "me", Password: "x"}); !errdefs.IsUnavailable(err) {
		t.Errorf("nobody there: %v", err)
	}
	if err := c.Login(context.Background(), host, Credentials{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no credentials: %v", err)
	}
}
