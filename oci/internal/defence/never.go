//go:build insecure && demo_image

package defence

// Every binary of the Makefile is built with the tag demo_image: none of them can be insecure.
var _ = theTagsInsecureAndDemoImageExcludeEachOther
