package docker

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/moby/moby/api/types/registry"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/engine"
)

// maxBody bounds a JSON body, in bytes.
const maxBody = 4 << 20

// id gives the object that a path names; a leading slash is part of no name.
func (c *call) id() string { return strings.TrimPrefix(c.PathValue("id"), "/") }

// body reads the JSON body. It must be there.
func (c *call) body(v any) error {
	if ct := c.Header.Get("Content-Type"); ct != "" || c.ContentLength != 0 {
		if kind, _, err := mime.ParseMediaType(ct); err != nil || kind != typeJSON {
			return invalidf("unsupported Content-Type header (%s): must be 'application/json'", ct)
		}
	}
	return decodeJSON(http.MaxBytesReader(c.w.ResponseWriter, c.Body, maxBody), v)
}

// optionalBody reads the JSON body if there is one.
func (c *call) optionalBody(v any) error {
	if c.ContentLength == 0 {
		return nil
	}
	return c.body(v)
}

// decodeJSON reads exactly one JSON value. Errors are errdefs.ErrInvalidArgument.
func decodeJSON(r io.Reader, v any) error {
	dec := json.NewDecoder(r)
	err := dec.Decode(v)
	var tooBig *http.MaxBytesError
	var kind *json.UnmarshalTypeError
	switch {
	case errors.As(err, &tooBig):
		return invalidf("invalid JSON: the request body is larger than %d bytes", tooBig.Limit)
	case errors.Is(err, io.EOF):
		return invalidf("invalid JSON: got EOF while reading request body")
	case errors.As(err, &kind) && kind.Field != "":
		return invalidf("invalid JSON: %s must not be a %s", fieldPath(kind.Field), kind.Value)
	case err != nil:
		return invalidf("invalid JSON: %v", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		if errors.As(err, &tooBig) {
			return invalidf("invalid JSON: the request body is larger than %d bytes", tooBig.Limit)
		}
		return invalidf("invalid JSON: unexpected content after the value")
	}
	return nil
}

// fieldPath drops the names of Go's embedded structs, which the client does not know.
func fieldPath(s string) string {
	return strings.NewReplacer("CreateRequest.Config.", "", "CreateRequest.", "", "Resources.", "").Replace(s)
}

// query gives one value of the query.
func (c *call) query(name string) string { return c.URL.Query().Get(name) }

// flag reads a boolean as Docker does: absent, 0, no, false and none are false, and the rest is true.
func (c *call) flag(name string) bool { return c.flagOr(name, false) }

func (c *call) flagOr(name string, absent bool) bool {
	q := c.URL.Query()
	if !q.Has(name) {
		return absent
	}
	switch strings.ToLower(strings.TrimSpace(q.Get(name))) {
	case "", "0", "no", "false", "none":
		return false
	}
	return true
}

// number reads an optional integer.
func (c *call) number(name string) (*int, error) {
	s := c.query(name)
	if s == "" {
		return nil, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		return nil, invalidf("invalid value for %s: %q is not an integer", name, s)
	}
	return &n, nil
}

// moment reads an optional time: seconds since 1970, with a fraction or not, or RFC 3339.
func (c *call) moment(name string) (time.Time, error) {
	t, err := parseMoment(c.query(name))
	if err != nil {
		return t, invalidf("invalid value for %s: %v", name, err)
	}
	return t, nil
}

func parseMoment(s string) (time.Time, error) {
	if s == "" || s == "0" {
		return time.Time{}, nil
	}
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return t, nil
	}
	whole, frac, _ := strings.Cut(s, ".")
	sec, err := strconv.ParseInt(whole, 10, 64)
	if err != nil || sec > math.MaxInt64/int64(time.Second) || sec < 0 {
		return time.Time{}, fmt.Errorf("%q is not a timestamp", s)
	}
	var nsec int64
	if frac != "" {
		if len(frac) > 9 {
			frac = frac[:9]
		}
		n, err := strconv.ParseUint(frac, 10, 32)
		if err != nil {
			return time.Time{}, fmt.Errorf("%q is not a timestamp", s)
		}
		nsec = int64(n)
		for range 9 - len(frac) {
			nsec *= 10
		}
	}
	return time.Unix(sec, nsec), nil
}

// filters reads the filters and refuses fields that are not accepted.
func (c *call) filters(accepted ...string) (engine.Filters, error) {
	f, err := parseFilters(c.query("filters"))
	if err != nil {
		return nil, err
	}
	for field := range f {
		if !slices.Contains(accepted, field) {
			return nil, invalidf("invalid filter '%s'", field)
		}
	}
	return f, nil
}

// parseFilters understands {"label":["a=b"]} and the form of old clients,
// {"label":{"a=b":true}}.
func parseFilters(s string) (engine.Filters, error) {
	if s == "" {
		return nil, nil
	}
	if len(s) > maxBody {
		return nil, invalidf("invalid filters: too long")
	}
	var fields map[string]json.RawMessage
	if err := decodeJSON(strings.NewReader(s), &fields); err != nil {
		return nil, invalidf("invalid filters: %v", err)
	}
	f := make(engine.Filters, len(fields))
	for field, raw := range fields {
		var list []string
		if json.Unmarshal(raw, &list) != nil {
			var set map[string]bool
			if err := json.Unmarshal(raw, &set); err != nil {
				return nil, invalidf("invalid filters: the values of '%s' must be a list of strings", field)
			}
			for value, on := range set {
				if on {
					list = append(list, value)
				}
			}
			slices.Sort(list)
		}
		if len(list) > 0 {
			f[field] = list
		}
	}
	return f, nil
}

// auth reads the credentials of the X-Registry-Auth header. A header that cannot be read
// is taken for none, as clients send broken ones for anonymous pulls; the registry
// decides then.
func (c *call) auth() *engine.RegistryAuth {
	var a registry.AuthConfig
	raw := strings.TrimRight(c.Header.Get(registry.AuthHeader), "=")
	b, err := base64.RawURLEncoding.DecodeString(raw)
	if err != nil {
		b, err = base64.RawStdEncoding.DecodeString(raw)
	}
	if raw == "" || err != nil || json.Unmarshal(b, &a) != nil {
		return nil
	}
	return authOf(a)
}

// authOf gives credentials the engine's type; nil for none.
func authOf(a registry.AuthConfig) *engine.RegistryAuth {
	if a.Username == "" && a.Auth != "" {
		if pair, err := base64.StdEncoding.DecodeString(a.Auth); err == nil {
			a.Username, a.Password, _ = strings.Cut(string(pair), ":")
		}
	}
	if a.Username == "" && a.Password == "" && a.IdentityToken == "" && a.RegistryToken == "" {
		return nil
	}
	return &engine.RegistryAuth{
		Username: a.Username, Password: a.Password,
		IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken,
		ServerAddress: a.ServerAddress,
	}
}

// platform reads an optional platform: os/arch[/variant], or a JSON object.
func (c *call) platform() (*ocispec.Platform, error) {
	s := c.query("platform")
	if s == "" {
		return nil, nil
	}
	if strings.HasPrefix(s, "{") {
		var p ocispec.Platform
		if err := decodeJSON(strings.NewReader(s), &p); err != nil {
			return nil, invalidf("invalid platform: %v", err)
		}
		return &p, nil
	}
	p, err := platforms.Parse(s)
	if err != nil {
		return nil, invalidf("invalid platform %q: %v", s, err)
	}
	return &p, nil
}
