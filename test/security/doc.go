// Package security holds the battery of published escapes: each test is named after a row of
// docs/security.md and runs the attack twice, against a control that is hit and against hako.
//
// Nothing flows in; out flows a table of row, control and result. Controls are the installed
// runc, crun and podman where these are vulnerable, and else hako-oci built with one defence taken out
// (oci/internal/defence), the same request with the protection turned off by its own switch, or the
// same check of something that has the flaw, where hako has nothing that could be taken out.
// A control that is not hit fails the test: then the attack does not work, and proves nothing.
package security
