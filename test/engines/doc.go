// Package engines drives the engines that Debian has with hako's runtime and shim below
// them. In flow the binaries built from this tree; out flow the lines of the scripts
// beside this file, each a subtest.
package engines
