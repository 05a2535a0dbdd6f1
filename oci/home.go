//go:build linux && (amd64 || arm64)

package oci

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/internal/safepath"
)

// maxPasswd bounds what is read of a container's /etc/passwd.
const maxPasswd = 1 << 20

// withHome gives the environment with HOME in it, which callers of a runtime leave to it.
// root is the container's root on the host; it is that of an image, and never trusted.
func withHome(p *specs.Process, root string) []string {
	if slices.ContainsFunc(p.Env, func(e string) bool { return strings.HasPrefix(e, "HOME=") }) {
		return p.Env
	}
	return append(slices.Clip(p.Env), "HOME="+home(root, p.User.UID))
}

// home looks the user up in etc/passwd below root; "/" if it is not there.
func home(root string, uid uint32) string {
	const nowhere = "/"
	r, err := safepath.OpenRoot(root)
	if err != nil {
		return nowhere
	}
	defer r.Close()
	raw, err := r.ReadFile("etc/passwd", maxPasswd)
	if err != nil {
		return nowhere
	}
	for line := range strings.Lines(string(raw)) {
		f := strings.Split(strings.TrimRight(line, "\n"), ":")
		if len(f) < 6 || f[2] != strconv.FormatUint(uint64(uid), 10) {
			continue
		}
		if filepath.IsAbs(f[5]) && !strings.ContainsRune(f[5], 0) {
			return f[5]
		}
		break
	}
	return nowhere
}

// procRoot is the root of a process as the host's /proc shows it.
func procRoot(pid int) string { return fmt.Sprintf("/proc/%d/root", pid) }
