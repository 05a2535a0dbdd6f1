// Package version holds the version that was stamped into the binaries at link
// time. Nothing flows in but the linker's -X flags; out flow strings for
// --version and the APIs.
package version

import "runtime/debug"

// Version and Commit are set by the Makefile with -ldflags -X.
var (
	Version = "0.1.0-dev"
	Commit  = ""
)

// Revision is the commit that was built: stamped, or what the Go tool recorded, or "unknown".
func Revision() string {
	if Commit != "" {
		return Commit
	}
	if bi, ok := debug.ReadBuildInfo(); ok {
		for _, s := range bi.Settings {
			if s.Key == "vcs.revision" {
				return s.Value
			}
		}
	}
	return "unknown"
}
