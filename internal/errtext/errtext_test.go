package errtext

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
)

// wired is an error as it comes over a wire: a text, and the class apart from it.
type wired struct {
	text  string
	class error
}

func (w wired) Error() string { return w.text }
func (w wired) Unwrap() error { return w.class }

func TestPlain(t *testing.T) {
	t.Parallel()
	allocated := fmt.Errorf("Bind for 0.0.0.0:80 failed: port is already allocated: %w", errdefs.ErrAlreadyExists)
	for _, tt := range []struct {
		err  error
		want string
	}{
		{errors.New("x: not found"), "x: not found"},
		{errdefs.ErrNotFound, "not found"},
		{wired{"conflict: unable to delete x", errdefs.ErrConflict}, "conflict: unable to delete x"},
		{allocated, "Bind for 0.0.0.0:80 failed: port is already allocated"},
		{fmt.Errorf("endpoint web: %w", allocated), "endpoint web: Bind for 0.0.0.0:80 failed: port is already allocated"},
		{fmt.Errorf("network x not found: %w", errdefs.ErrNotFound), "network x not found"},
		{wired{"network x not found", errdefs.ErrNotFound}, "network x not found"},
		{wired{"create c: no such file or directory: not found", errdefs.ErrNotFound}, "create c: no such file or directory"},
		{fmt.Errorf("a: %w: %w", errors.New("b: conflict"), errdefs.ErrConflict), "a: b: conflict"},
		{fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, errors.New("bad")), "bad"},
		{errors.Join(allocated, fmt.Errorf("undo: %w", errdefs.ErrUnavailable)), "Bind for 0.0.0.0:80 failed: port is already allocated\nundo: unavailable"},
		{fmt.Errorf("%w (and more)", fmt.Errorf("x is odd: %w", errdefs.ErrInternal)), "x is odd (and more)"},
		{&fs.PathError{Op: "open", Path: "/x", Err: syscall.EACCES}, "open /x: permission denied"},
		{fmt.Errorf("exec /x: %w: %w", syscall.EACCES, errdefs.ErrPermissionDenied), "exec /x: permission denied"},
		{wired{"exec /x: permission denied", errdefs.ErrPermissionDenied}, "exec /x: permission denied"},
		{fmt.Errorf("lease %s: %w", "x", errdefs.ErrNotFound), "lease x: not found"},
		{wired{"create container c: lease x: not found", errdefs.ErrNotFound}, "create container c: lease x: not found"},
		{fmt.Errorf("no such image: x: %w", errdefs.ErrNotFound), "no such image: x"},
		{fmt.Errorf("pull x: %w", fmt.Errorf("%w: %w", errors.New("manifest unknown"), errdefs.ErrNotFound)), "pull x: manifest unknown"},
		{fmt.Errorf("x: %w: %w", syscall.ECONNREFUSED, errdefs.ErrUnavailable), "x: connection refused"},
		{wired{"an own text", nil}, "an own text"},
	} {
		if got := Plain(tt.err); got != tt.want {
			t.Errorf("%q became %q, want %q", tt.err, got, tt.want)
		}
	}
}
