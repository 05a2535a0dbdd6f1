// Package examples holds the test that runs every script in the folder examples, as
// root, against a daemon of its own, and the tests that hold the pages in docs to what
// the programs say.
//
// In flow the scripts, the pages and the binaries of this repository; out flow failures
// where what is written is not what is.
package examples
