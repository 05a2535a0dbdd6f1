package registry

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"golang.org/x/sys/unix"
)

const (
	noteMin = 1 << 20        // bytes of a blob, below which it is as well sent again
	noteAge = 24 * time.Hour // after which a registry may have forgotten an upload
	maxNote = 16 << 10       // bytes
)

// note is a file that says where the upload of a blob goes on, so that another process can
// take it up when this one was killed. It is locked while it is in use: two processes
// never send to one upload. A nil note keeps nothing.
type note struct{ f *os.File }

// noted is what the file holds. It may be torn; then it is as if there were none.
type noted struct {
	Version  int
	Upload   string // what is uploaded, and to where
	Location string
}

func (u *uploading) key() string {
	return fmt.Sprintf("%s://%s%s %s %d", u.h.Scheme, u.h.Host, u.r.path, u.desc.Digest, u.desc.Size)
}

// plain says whether http may be spoken to the host.
func (u *uploading) plain() bool {
	return u.h.Scheme == "http" || u.r.c.o.Insecure || docker.IsLocalhost(u.h.Host)
}

// openNote gives the note of an upload; nil if there is to be none, or another process has it.
func (u *uploading) openNote() *note {
	dir := u.r.c.o.UploadDir
	if dir == "" || u.desc.Size < u.r.c.o.UploadMin {
		return nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil // it only saves time
	}
	sum := sha256.Sum256([]byte(u.key()))
	f, err := os.OpenFile(filepath.Join(dir, hex.EncodeToString(sum[:16])+".json"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil
	}
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil || !linked(f) {
		f.Close()
		return nil
	}
	return &note{f}
}

// linked says whether a file still has its name: another process may have removed it
// between our opening and locking it.
func linked(f *os.File) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Lstat(f.Name())
	return err == nil && os.SameFile(a, b)
}

// location gives where the upload goes on; "": nowhere. plain allows http.
func (n *note) location(key string, plain bool) string {
	if n == nil {
		return ""
	}
	st, err := n.f.Stat()
	if err != nil || time.Since(st.ModTime()) > noteAge {
		return ""
	}
	raw, err := io.ReadAll(io.NewSectionReader(n.f, 0, maxNote))
	var got noted
	if err != nil || json.Unmarshal(raw, &got) != nil || got.Version != 1 || got.Upload != key {
		return ""
	}
	u, err := url.Parse(got.Location)
	if err != nil || u.Host == "" || u.User != nil || u.Scheme != "https" && (u.Scheme != "http" || !plain) {
		return ""
	}
	return got.Location
}

// keep writes where the upload goes on.
func (n *note) keep(key, location string) {
	if n == nil {
		return
	}
	raw, err := json.Marshal(noted{1, key, location})
	if err != nil || len(raw) > maxNote || n.f.Truncate(0) != nil {
		return
	}
	_, _ = n.f.WriteAt(raw, 0) // torn: as if there were none
}

// close lets another process have the note. With forget it is removed: the upload is over.
func (n *note) close(forget bool) {
	if n == nil {
		return
	}
	if forget {
		_ = os.Remove(n.f.Name())
	}
	n.f.Close()
}

// sweepNotes removes notes that nobody came back for.
func (c *Client) sweepNotes() {
	if c.o.UploadDir == "" {
		return
	}
	entries, err := os.ReadDir(c.o.UploadDir)
	if err != nil {
		return
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() || !strings.HasSuffix(e.Name(), ".json") || time.Since(info.ModTime()) < 2*noteAge {
			continue
		}
		_ = os.Remove(filepath.Join(c.o.UploadDir, e.Name()))
	}
}
