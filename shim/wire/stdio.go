package wire

import (
	"fmt"
	"net/url"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/shim/log"
)

// Scheme is the URI scheme in a task's stdout that configures the streams of a
// process as hako's engine wants them:
//
//	hako:///var/log/x.log?format=json-file&max-size=1000&max-files=3&compress=1&attr.KEY=VALUE&stdin=1&once=1
const Scheme = "hako"

// Stdio is the content of such a URI.
type Stdio struct {
	OpenStdin bool
	StdinOnce bool
	Log       log.Config // Format "" for none
}

// String is the URI.
func (s Stdio) String() string {
	q := url.Values{}
	set := func(key string, on bool, value string) {
		if on {
			q.Set(key, value)
		}
	}
	set("stdin", s.OpenStdin, "1")
	set("once", s.StdinOnce, "1")
	set("format", s.Log.Format != "", s.Log.Format)
	set("max-size", s.Log.MaxSize != 0, strconv.FormatInt(s.Log.MaxSize, 10))
	set("max-files", s.Log.MaxFiles != 0, strconv.Itoa(s.Log.MaxFiles))
	set("compress", s.Log.Compress, "1")
	for k, v := range s.Log.Attrs {
		q.Set("attr."+k, v)
	}
	return (&url.URL{Scheme: Scheme, Path: "/" + strings.TrimLeft(s.Log.Path, "/"), RawQuery: q.Encode()}).String()
}

// ParseStdio reads such a URI.
func ParseStdio(u *url.URL) (s Stdio, err error) {
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return s, fmt.Errorf("stdio %q: %w: %w", u, err, errdefs.ErrInvalidArgument)
	}
	for k, v := range q {
		value := v[0]
		switch k {
		case "stdin":
			s.OpenStdin = value == "1"
		case "once":
			s.StdinOnce = value == "1"
		case "format":
			s.Log.Format, s.Log.Path = value, u.Path
		case "max-size":
			s.Log.MaxSize, err = strconv.ParseInt(value, 10, 64)
		case "max-files":
			s.Log.MaxFiles, err = strconv.Atoi(value)
		case "compress":
			s.Log.Compress = value == "1"
		default:
			name, ok := strings.CutPrefix(k, "attr.")
			if !ok {
				return s, fmt.Errorf("stdio %q: unknown key %q: %w", u, k, errdefs.ErrInvalidArgument)
			}
			if s.Log.Attrs == nil {
				s.Log.Attrs = map[string]string{}
			}
			s.Log.Attrs[name] = value
		}
		if err != nil {
			return s, fmt.Errorf("stdio %q: %w: %w", u, err, errdefs.ErrInvalidArgument)
		}
	}
	return s, nil
}
