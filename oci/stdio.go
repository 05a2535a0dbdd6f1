//go:build linux && (amd64 || arm64)

package oci

import (
	"errors"
	"fmt"
	"os"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// ownStdio gives pipes and sockets to the container's user, who could not open
// /dev/stdout again otherwise. Files and devices of the host stay as they are
// (CVE-2026-88265: a runtime that changed the owner of /dev/null).
func ownStdio(s *specs.Spec, p *specs.Process, files ...*os.File) error {
	if p == nil {
		return nil
	}
	uid := p.User.UID
	if s.Linux != nil {
		for _, m := range s.Linux.UIDMappings {
			if uid >= m.ContainerID && uid-m.ContainerID < m.Size {
				uid = m.HostID + (uid - m.ContainerID)
				break
			}
		}
	}
	for _, f := range files {
		if f == nil {
			continue
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return fmt.Errorf("standard input or output: %w", err)
		}
		if t := st.Mode & unix.S_IFMT; t != unix.S_IFIFO && t != unix.S_IFSOCK || st.Uid == uid {
			continue
		}
		err := unix.Fchown(int(f.Fd()), int(uid), -1)
		if err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EROFS) {
			return fmt.Errorf("standard input or output: change owner: %w", err)
		}
	}
	return nil
}
