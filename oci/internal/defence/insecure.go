//go:build insecure

package defence

import "os"

func present(row string) bool { return os.Getenv("HAKO_INSECURE") != row }

// The defences of secure.go, but for the one that HAKO_INSECURE names.
var (
	SealedLoader = present("A1")
	LateFork     = present("A2")
	CheckedCwd   = present("A3")
	OwnProc      = present("A4")
	InRoot       = present("A5")
)
