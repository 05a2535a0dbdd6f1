// Command hako is the command line of the hako container engine.
//
// In flow arguments, standard input and files of the user; out flow requests to hakod's sockets, as
// of any other client, requests to registries, text and exit codes. It links no part of the engine.
package main

import (
	"os"

	"github.com/hako-engine/hako/cli"
	"github.com/hako-engine/hako/demo"
)

func main() {
	os.Exit(cli.Main(os.Args[1:], cli.OSStreams(), cli.Options{Demo: demo.Archive, Images: newImages, Verify: verify}))
}
