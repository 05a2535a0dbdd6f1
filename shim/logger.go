package shim

import (
	"fmt"
	"net/url"
	"os"
	"time"

	"github.com/containerd/errdefs"
)

// readyTimeout bounds how long a logging binary may take to get ready.
const readyTimeout = 10 * time.Second

// startChild starts a process that the reaper knows.
type startChild func(path string, argv []string, attr *os.ProcAttr) (*child, error)

// startLogger starts the program of a binary:// URI (containerd's protocol): it
// reads stdout from its fd 3 and stderr from fd 4, and closes fd 5 when it is ready. That of a
// binary-v2:// URI writes a byte to it before, so that one which dies is not taken for ready.
// Each key of the query and its value are arguments.
func startLogger(u *url.URL, r ioRequest, start startChild) (out, errs sink, err error) {
	argv := []string{u.Path}
	for k, v := range u.Query() {
		argv = append(argv, k)
		if v[0] != "" {
			argv = append(argv, v[0])
		}
	}
	var files []*os.File
	closeAll := func() {
		for _, f := range files {
			f.Close()
		}
	}
	var theirs, ours [3]*os.File
	for i := range ours {
		if theirs[i], ours[i], err = pipe(i == 2); err != nil {
			closeAll()
			return nil, nil, err
		}
		files = append(files, theirs[i], ours[i])
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		closeAll()
		return nil, nil, err
	}
	defer null.Close()
	_, err = start(u.Path, argv, &os.ProcAttr{
		Env:   append(os.Environ(), "CONTAINER_ID="+r.id, "CONTAINER_NAMESPACE="+r.namespace),
		Files: []*os.File{null, null, null, theirs[0], theirs[1], theirs[2]},
	})
	if err != nil {
		closeAll()
		return nil, nil, fmt.Errorf("start logging binary %s: %w", u.Path, err)
	}
	for _, f := range theirs {
		f.Close()
	}
	defer ours[2].Close()
	ours[2].SetReadDeadline(time.Now().Add(readyTimeout))
	var b [1]byte
	n, err := ours[2].Read(b[:])
	switch {
	case os.IsTimeout(err):
		err = fmt.Errorf("logging binary %s is not ready after %s: %w", u.Path, readyTimeout, errdefs.ErrUnavailable)
	case n == 0 && u.Scheme == "binary-v2":
		err = fmt.Errorf("logging binary %s ended before it was ready: %w", u.Path, errdefs.ErrFailedPrecondition)
	default:
		err = nil
	}
	if err != nil {
		ours[0].Close()
		ours[1].Close()
		return nil, nil, err
	}
	return &piped{File: ours[0]}, &piped{File: ours[1]}, nil
}
