// Package imagetools tests 'hako image' and 'hako login' as a user has them: the built
// programs, a daemon of its own, a real registry, and skopeo as the other program that
// must understand what is written.
package imagetools
