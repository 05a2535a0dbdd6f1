// Package chaos works on a daemon as many clients that do not know of each other, while
// somebody kills the daemon, or the machine under it.
//
// In flow the sockets of a daemon; out flow a journal of what was tried and what was
// acknowledged, and verdicts: whatever was acknowledged is there afterwards, and a check of the
// store finds nothing. The images come from a registry of its own (Registry), whose layers hold
// files that are named by what they hold.
package chaos
