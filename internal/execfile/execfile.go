// Package execfile writes programs that are executed soon after. In go the bytes of a program
// or a script, out comes a file that execve(2) takes.
package execfile

import (
	"os"
	"syscall"
)

// Write is os.WriteFile for a file that is to be executed. While it is open nobody in this
// process forks: a child would hold it open for writing until it executes its own program,
// and until then executing this one fails (ETXTBSY, execve(2)).
func Write(path string, data []byte, mode os.FileMode) error {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	return os.WriteFile(path, data, mode)
}
