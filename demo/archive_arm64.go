//go:build demo_image

package demo

import (
	"bytes"
	_ "embed"
	"io"
)

//go:embed image/demo-arm64.tar.gz
var archive []byte

// Archive gives the image for this machine: an archive for docker load or hako load.
func Archive() (io.Reader, error) { return bytes.NewReader(archive), nil }
