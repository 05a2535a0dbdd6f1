package docker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/engine"
)

func TestStatusCodes(t *testing.T) {
	wrap := func(err error) error { return fmt.Errorf("start container x: %w", err) }
	for _, tt := range []struct {
		err  error
		want int
	}{
		{wrap(errdefs.ErrNotFound), 404},
		{wrap(errdefs.ErrInvalidArgument), 400},
		{wrap(errdefs.ErrOutOfRange), 400},
		{wrap(errdefs.ErrConflict), 409},
		{wrap(errdefs.ErrAlreadyExists), 409},
		{wrap(errdefs.ErrFailedPrecondition), 409},
		{wrap(errdefs.ErrAborted), 409},
		{wrap(errdefs.ErrNotModified), 304},
		{errors.Join(engine.ErrNotModified, errdefs.ErrFailedPrecondition), 304},
		{wrap(errdefs.ErrUnauthenticated), 401},
		{wrap(errdefs.ErrPermissionDenied), 403},
		{wrap(errdefs.ErrNotImplemented), 501},
		{wrap(errdefs.ErrUnavailable), 503},
		{wrap(context.Canceled), 499},
		{wrap(context.DeadlineExceeded), 504},
		{wrap(errdefs.ErrInternal), 500},
		{wrap(errors.New("disk on fire")), 500},
	} {
		f := &fake{start: func(string) error { return tt.err }}
		n := serve(t, f)
		got := n.expect(tt.want, "POST", "/v1.50/containers/x/start", "")
		if tt.want == 304 {
			continue
		}
		if want := `{"message":"` + strings.ReplaceAll(tt.err.Error(), "\n", `\n`) + `"}`; strings.TrimSpace(got) != want {
			t.Errorf("body %s, want %s", got, want)
		}
	}
}

func TestVersions(t *testing.T) {
	n := serve(t, &fake{})
	for path, want := range map[string]int{
		"/_ping": 200, "/v1.24/_ping": 200, "/v1.52/_ping": 200, "/v1/_ping": 400,
		"/v1.23/_ping": 400, "/v1.53/_ping": 400, "/v2.0/_ping": 400, "/v1.x/_ping": 400, "/v1.50": 404,
		"/v99999999999999999999.1/_ping": 400, "/volumesx": 404, "/v1.50//_ping": 200,
	} {
		n.expect(want, "GET", path, "")
	}
	got := n.expect(400, "GET", "/v1.12/info", "")
	if want := "client version 1.12 is too old. Minimum supported API version is 1.24, please upgrade your client to a newer version"; !strings.Contains(got, want) {
		t.Errorf("too old: %s", got)
	}
	got = n.expect(400, "GET", "/v1.99/info", "")
	if want := "client version 1.99 is too new. Maximum supported API version is 1.52"; !strings.Contains(got, want) {
		t.Errorf("too new: %s", got)
	}
}

func TestPing(t *testing.T) {
	n := serve(t, &fake{})
	for _, method := range []string{"GET", "HEAD"} {
		resp, body := n.do(method, "/_ping", "")
		for k, v := range map[string]string{
			"Api-Version": MaxVersion, "Ostype": "linux", "Docker-Experimental": "false", "Swarm": "inactive",
			"Cache-Control": "no-cache, no-store, must-revalidate", "Pragma": "no-cache", "Server": "hako/0.1.0 (linux)",
			"Content-Type": "text/plain; charset=utf-8", "Content-Length": "2",
		} {
			if got := resp.Header.Get(k); got != v {
				t.Errorf("%s: %s = %q, want %q", method, k, got, v)
			}
		}
		if (method == "GET") != (body == "OK") {
			t.Errorf("%s: body %q", method, body)
		}
	}
}

func TestPages(t *testing.T) {
	n := serve(t, &fake{containers: []engine.Container{{ID: "abc", Name: "web"}}})
	for _, tt := range []struct {
		method, path string
		want         int
	}{
		{"GET", "/nothing", 404},
		{"DELETE", "/info", 404}, // not 405, as with Docker
		{"GET", "/containers/web/json", 200},
		{"GET", "/containers//web/json", 200}, // names may come with their slash
		{"GET", "/containers/%2Fweb/json", 200},
		{"GET", "/containers/nope/json", 404},
		{"GET", "/containers/../containers/web/json", 404},
		{"GET", "/containers/web/json/", 404},
		{"OPTIONS", "/containers/json", 200},
		{"GET", "/images/search?term=x", 501},
		{"GET", "/distribution/docker.io/library/x/json", 501},
		{"GET", "/images/a/b/c/nothing", 404},
		{"POST", "/images/push", 404},
		{"POST", "/build", 501},
		{"POST", "/session", 501},
		{"POST", "/build/prune", 200},
		{"GET", "/plugins", 200},
		{"GET", "/plugins/x/json", 404},
		{"POST", "/plugins/pull", 501},
		{"GET", "/services", 503},
		{"GET", "/nodes", 503},
		{"POST", "/swarm/init", 503},
		{"GET", "/secrets/x", 503},
		{"GET", "/containers/web/checkpoints", 501},
	} {
		resp, body := n.do(tt.method, "/v1.50"+tt.path, "")
		if resp.StatusCode != tt.want {
			t.Errorf("%s %s: %s %s, want %d", tt.method, tt.path, resp.Status, body, tt.want)
		}
		if tt.want >= 400 && (!strings.HasPrefix(body, `{"message":"`) || resp.Header.Get("Content-Type") != "application/json") {
			t.Errorf("%s %s: error body %q (%s)", tt.method, tt.path, body, resp.Header.Get("Content-Type"))
		}
	}
	if got := n.expect(404, "GET", "/containers/nope/json", ""); !strings.Contains(got, "No such container: nope") {
		t.Error(got)
	}
}

func TestBodies(t *testing.T) {
	n := serve(t, &fake{create: func(string, engine.Config) (string, []string, error) { return "id", nil, nil }})
	for name, tt := range map[string]struct {
		body, header string
		want         string
	}{
		"none":      {"", "", "got EOF while reading request body"},
		"not JSON":  {"{Image", "", "invalid JSON: invalid character"},
		"trailing":  {`{"Image":"x"} {"Image":"y"}`, "", "unexpected content after the value"},
		"wrong":     {`{"Image":7}`, "", "Image must not be a number"},
		"nested":    {`{"Image":"x","HostConfig":{"Memory":"1g"}}`, "", "HostConfig.Memory must not be a string"},
		"media":     {`{"Image":"x"}`, "text/plain", "unsupported Content-Type header (text/plain): must be 'application/json'"},
		"big":       {`{"Image":"x","User":"` + strings.Repeat("x", maxBody) + `"}`, "", "larger than 4194304 bytes"},
		"big after": {`{"Image":"x"}` + strings.Repeat(" ", maxBody), "", "larger than 4194304 bytes"},
		"array":     {`[]`, "", "invalid JSON"},
		"address":   {`{"Image":"x","HostConfig":{"Dns":["nope"]}}`, "", "invalid JSON"},
	} {
		var header []string
		if tt.header != "" {
			header = []string{"Content-Type", tt.header}
		}
		if got := n.expect(400, "POST", "/containers/create", tt.body, header...); !strings.Contains(got, tt.want) {
			t.Errorf("%s: %s", name, got)
		}
	}
	if got := n.expect(201, "POST", "/containers/create?name=x", `{"Image":"x","Unknown":1}`); strings.TrimSpace(got) != `{"Id":"id","Warnings":[]}` {
		t.Error(got)
	}
}

func TestPanicIsAnswered(t *testing.T) {
	n := serve(t, &fake{start: func(string) error { panic("boom") }})
	if got := n.expect(500, "POST", "/containers/x/start", ""); strings.Contains(got, "boom") {
		t.Errorf("the panic's text reached the client: %s", got)
	}
	n.expect(200, "GET", "/_ping", "")
}

func TestBrowsersAreRefused(t *testing.T) {
	n := serve(t, &fake{})
	n.expect(403, "GET", "/_ping", "", "Origin", "https://evil.example")
	n.expect(403, "GET", "/_ping", "", "Origin", "null")
	n.expect(403, "GET", "/containers/x/attach/ws", "", "Origin", "http://evil.example")

	// Over TCP the Host must be one that DNS cannot forge.
	tcp := httptest.NewServer(New(Options{Backend: &fake{}}))
	defer tcp.Close()
	for host, want := range map[string]int{"": 200, "localhost:1": 200, "[::1]:2375": 200, "evil.example": 403, "127.0.0.1.evil.example": 403} {
		for origin, refused := range map[string]bool{"": false, "http://evil.example": true, "http://" + host: host == "" || want == 403} {
			req, err := http.NewRequest("GET", tcp.URL+"/_ping", nil)
			if err != nil {
				t.Fatal(err)
			}
			if host != "" {
				req.Host = host
			}
			if origin != "" {
				req.Header.Set("Origin", origin)
			}
			resp, err := tcp.Client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			code := want
			if refused {
				code = 403
			}
			if resp.StatusCode != code {
				t.Errorf("Host %q Origin %q: %s, want %d", host, origin, resp.Status, code)
			}
		}
	}
}

func TestOnlyUnixSockets(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := New(Options{Backend: &fake{}}).Serve(l); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("served on TCP: %v", err)
	}
}

func TestListOptions(t *testing.T) {
	f := &fake{}
	n := serve(t, f)
	for query, want := range map[string]engine.ListOptions{
		"":                               {},
		"?all=1":                         {All: true},
		"?all=false":                     {},
		"?limit=3&size=1":                {All: true, Limit: 3, Size: true},
		"?limit=-1":                      {},
		`?filters={"status":["exited"]}`: {All: true, Filters: engine.Filters{"status": {"exited"}}},
		`?filters={"label":{"a=b":true,"c":false}}`: {Filters: engine.Filters{"label": {"a=b"}}},
	} {
		n.expect(200, "GET", "/containers/json"+query, "")
		if got := fmt.Sprint(*f.listed); got != fmt.Sprint(want) {
			t.Errorf("%s: %s, want %v", query, got, want)
		}
	}
	for _, query := range []string{
		"?limit=x", `?filters={"nope":["x"]}`, `?filters={"status":["sleeping"]}`, `?filters={"health":["ill"]}`,
		"?filters=x", `?filters={"label":7}`, `?filters={"label":["a"]}x`, `?filters=[]`,
	} {
		n.expect(400, "GET", "/containers/json"+query, "")
	}
}

func TestStopAndRemove(t *testing.T) {
	var stopped engine.StopOptions
	var removed engine.RemoveOptions
	n := serve(t, &fake{
		stop:   func(_ string, o engine.StopOptions) error { stopped = o; return nil },
		remove: func(_ string, o engine.RemoveOptions) error { removed = o; return nil },
	})
	n.expect(204, "POST", "/containers/x/stop?t=-1&signal=INT", "")
	if stopped.Signal != "INT" || stopped.Timeout == nil || *stopped.Timeout != -1 {
		t.Errorf("%+v", stopped)
	}
	n.expect(204, "POST", "/containers/x/stop", "")
	if stopped.Timeout != nil {
		t.Errorf("%+v", stopped)
	}
	n.expect(400, "POST", "/containers/x/stop?t=soon", "")
	n.expect(204, "DELETE", "/containers/x?force=1&v=true", "")
	if !removed.Force || !removed.Volumes {
		t.Errorf("%+v", removed)
	}
	n.expect(501, "DELETE", "/containers/x?link=1", "")
}
