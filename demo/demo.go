// Package demo holds the image that a newcomer runs first: hako/demo:latest, a small
// static program made from the Go source in demo/guest.
//
// In flow the archive that demo/build wrote before this package was compiled with the
// build tag demo_image; out flows that archive, for docker load or hako load.
package demo

import "errors"

// Name is what the image is called.
const Name = "hako/demo:latest"

// ErrNoImage says that this binary was built without the image.
var ErrNoImage = errors.New("this binary holds no demo image: build it with 'make'")
