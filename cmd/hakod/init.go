package main

import (
	"errors"
	"io"
	"os"
	"path/filepath"
)

// ownInit gives the path of the init for containers: a copy of hako-shim, which acts
// as one under that name. It is a copy because it is mounted into containers: a
// privileged one can make the mount writable, and must not reach a binary of the host.
//
// An empty shim stands for the one beside this executable.
func ownInit(root, shim string) (_ string, err error) {
	if shim == "" {
		self, err := os.Executable()
		if err != nil {
			return "", err
		}
		shim = filepath.Join(filepath.Dir(self), "hako-shim")
	}
	src, err := os.Open(shim)
	if err != nil {
		return "", err
	}
	defer src.Close()
	from, err := src.Stat()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(root, "init")
	path := filepath.Join(dir, "docker-init")
	if to, err := os.Stat(path); err == nil && to.Size() == from.Size() && to.ModTime().Equal(from.ModTime()) {
		return path, nil
	}
	if err := os.MkdirAll(dir, 0o710); err != nil {
		return "", err
	}
	dst, err := os.CreateTemp(dir, "new-*")
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(dst.Name()))
		}
	}()
	_, err = io.Copy(dst, src)
	if err = errors.Join(err, dst.Chmod(0o755), dst.Close()); err != nil {
		return "", err
	}
	if err := os.Chtimes(dst.Name(), from.ModTime(), from.ModTime()); err != nil {
		return "", err
	}
	return path, os.Rename(dst.Name(), path)
}
