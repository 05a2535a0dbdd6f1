// Package imagetools tests 'hako image' and 'hako login' as a user has them: the built
// programs, a daemon of its own, a real registry, and skopeo as the other program that
// must understand what is written.
//
// In flow the built programs; out flow failures where they do not do what docs/image-tools.md says.
package imagetools
