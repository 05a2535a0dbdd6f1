// Command hako is the command line of the hako container engine. It speaks to
// hakod's sockets like any other client, and to registries by itself; it links no part
// of the engine.
package main

import (
	"os"

	"github.com/hako-engine/hako/cli"
	"github.com/hako-engine/hako/demo"
)

func main() {
	os.Exit(cli.Main(os.Args[1:], cli.OSStreams(), cli.Options{Demo: demo.Archive, Images: newImages, Verify: verify}))
}
