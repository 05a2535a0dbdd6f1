//go:build insecure

package defence

import "os"

func present(row string) bool { return os.Getenv("HAKO_INSECURE") != row }

var (
	SealedLoader = present("A1")
	LateFork     = present("A2")
	CheckedCwd   = present("A3")
	OwnProc      = present("A4")
	InRoot       = present("A5")
)
