//go:build !demo_image || !(amd64 || arm64)

package demo

import "io"

// Archive gives ErrNoImage: make embeds the image, for amd64 and arm64.
func Archive() (io.Reader, error) { return nil, ErrNoImage }
