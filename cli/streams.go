package cli

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/moby/moby/client"
	"golang.org/x/term"
)

// Streams are where a command reads and writes. Files are told from other streams
// to find out about terminals.
type Streams struct {
	In  io.Reader
	Out io.Writer
	Err io.Writer
}

// OSStreams are those of the process.
func OSStreams() Streams { return Streams{os.Stdin, os.Stdout, os.Stderr} }

func fdOf(v any) (int, bool) {
	if f, ok := v.(*os.File); ok {
		return int(f.Fd()), true
	}
	return -1, false
}

func isTerminal(v any) bool {
	fd, ok := fdOf(v)
	return ok && term.IsTerminal(fd)
}

// width of the terminal behind w in columns; 0 if there is none.
func width(w any) int {
	fd, ok := fdOf(w)
	if !ok {
		return 0
	}
	cols, _, err := term.GetSize(fd)
	if err != nil {
		return 0
	}
	return cols
}

// colours tells whether to use them: only on a terminal, and not with NO_COLOR (no-color.org).
func colours(w any) bool {
	return isTerminal(w) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

func paint(on bool, code, s string) string {
	if !on {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

// sentAt is the context's key for when a request was sent.
type sentAt struct{}

// debugRequests says what is asked for, at once, since an answer may take long.
func debugRequests(w io.Writer) client.RequestHook {
	return func(r *http.Request) error {
		fmt.Fprintf(w, "hako: debug: %s %s\n", r.Method, r.URL.RequestURI())
		*r = *r.WithContext(context.WithValue(r.Context(), sentAt{}, time.Now()))
		return nil
	}
}

// debugResponses says how long the answer took, to its first byte.
func debugResponses(w io.Writer) client.ResponseHook {
	return func(r *http.Response) {
		if sent, ok := r.Request.Context().Value(sentAt{}).(time.Time); ok {
			fmt.Fprintf(w, "hako: debug: %s %s: %s after %v\n", r.Request.Method, r.Request.URL.RequestURI(), r.Status, time.Since(sent).Round(time.Microsecond))
		}
	}
}
