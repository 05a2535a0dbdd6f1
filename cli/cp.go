package cli

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/safepath"
)

func (a *app) exportCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{Use: "export [OPTIONS] CONTAINER", Short: "Write a container's file system to a tar archive", Args: needArgs(1, 1, "one container"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if output == "" && isTerminal(a.Out) {
				return &exitError{exitGeneral, "an archive is not for a terminal: use -o FILE or a pipe"}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.ContainerExport(cmd.Context(), args[0], client.ContainerExportOptions{})
			if err != nil {
				return err
			}
			defer r.Close()
			return a.writeOutput(output, r)
		}}
	cmd.Flags().StringVarP(&output, "output", "o", "", "file to write (default: standard output)")
	return cmd
}

func (a *app) cpCommand() *cobra.Command {
	var follow, archive, quiet bool
	cmd := &cobra.Command{Use: "cp [OPTIONS] SOURCE DEST", Short: "Copy files between a container and this machine",
		Long:    "Copy files between a container and this machine. One of SOURCE and DEST is CONTAINER:PATH,\nthe other a path here, or - for a tar archive on standard input or output.",
		Example: "  hako cp web:/etc/nginx/nginx.conf .\n  hako cp site/. web:/usr/share/nginx/html",
		Args:    needArgs(2, 2, "a source and a destination"),
		RunE: func(cmd *cobra.Command, args []string) error {
			srcCtr, src := splitCopy(args[0])
			dstCtr, dst := splitCopy(args[1])
			switch {
			case srcCtr != "" && dstCtr != "":
				return &exitError{exitGeneral, "copying between containers is not possible: copy to this machine first"}
			case srcCtr == "" && dstCtr == "":
				return &exitError{exitGeneral, "neither path is in a container: write CONTAINER:PATH for one of them"}
			case srcCtr != "":
				return a.copyFrom(cmd.Context(), srcCtr, src, dst)
			}
			return a.copyTo(cmd.Context(), src, dstCtr, dst, follow, archive)
		}}
	cmd.Flags().BoolVarP(&follow, "follow-link", "L", false, "copy what a link in SOURCE points to")
	cmd.Flags().BoolVarP(&archive, "archive", "a", false, "keep owners")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress")
	return cmd
}

// splitCopy tells CONTAINER:PATH from a path here, which begins with / or . if it has a colon.
func splitCopy(s string) (container, p string) {
	if filepath.IsAbs(s) || strings.HasPrefix(s, ".") {
		return "", s
	}
	c, p, ok := strings.Cut(s, ":")
	if !ok {
		return "", s
	}
	return c, p
}

func wantsDir(p string) bool {
	return strings.HasSuffix(p, "/") || strings.HasSuffix(p, "/.") || p == "."
}

func (a *app) copyFrom(ctx context.Context, ctr, src, dst string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	res, err := c.CopyFromContainer(ctx, ctr, client.CopyFromContainerOptions{SourcePath: src})
	if err != nil {
		return err
	}
	defer res.Content.Close()
	if dst == "-" {
		_, err := io.Copy(a.Out, res.Content)
		return err
	}
	// The archive's names begin with the base name of the source. Where they are to
	// land follows cp(1): into an existing folder, else under the new name.
	dir, name := dst, ""
	st, err := os.Stat(dst)
	contents := strings.HasSuffix(src, "/.")
	switch {
	case err == nil && st.IsDir():
		if contents {
			name = "."
		}
	case err == nil:
		if res.Stat.Mode.IsDir() {
			return fmt.Errorf("cannot copy the folder %s:%s over the file %s", ctr, src, dst)
		}
		dir, name = filepath.Dir(dst), filepath.Base(dst)
	case wantsDir(dst) && !res.Stat.Mode.IsDir():
		return fmt.Errorf("the folder %s does not exist", dst)
	default:
		dir, name = filepath.Dir(dst), filepath.Base(dst)
	}
	return untarInto(dir, res.Stat.Name, name, res.Content)
}

// untarInto extracts below dir; the first path element, base, becomes name unless
// that is "" (keep) or "." (contents only). The archive comes from a container: no
// name and no link of it leads out of dir.
func untarInto(dir, base, name string, r io.Reader) error {
	root, err := safepath.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		p := path.Clean("/" + h.Name)
		first, rest, _ := strings.Cut(strings.TrimPrefix(p, "/"), "/")
		switch {
		case name == ".":
			p = "/" + rest
		case name != "" && (first == base || rest == ""):
			p = path.Join("/", name, rest)
		}
		if p == "/" {
			continue
		}
		if err := extract(root, p, h, tr); err != nil {
			return fmt.Errorf("extract %s: %w", h.Name, err)
		}
	}
}

func extract(root *safepath.Root, p string, h *tar.Header, r io.Reader) error {
	mode := uint32(h.FileInfo().Mode().Perm())
	if h.Typeflag == tar.TypeDir {
		d, err := root.MkdirAll(p, 0o755, nil)
		if err != nil {
			return err
		}
		defer d.Close()
		return unix.Fchmodat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", d.Fd()), mode, 0)
	}
	parent, err := root.MkdirAll(path.Dir(p), 0o755, nil)
	if err != nil {
		return err
	}
	defer parent.Close()
	fd, base := int(parent.Fd()), path.Base(p)
	if err := unix.Unlinkat(fd, base, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	switch h.Typeflag {
	case tar.TypeReg:
		n, err := unix.Openat(fd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return err
		}
		f := os.NewFile(uintptr(n), p)
		defer f.Close()
		if _, err := io.Copy(f, r); err != nil {
			return err
		}
		if err := f.Chmod(fs.FileMode(mode)); err != nil {
			return err
		}
		return f.Close()
	case tar.TypeSymlink:
		return unix.Symlinkat(h.Linkname, fd, base)
	case tar.TypeLink:
		src, srcBase, err := root.OpenParent(h.Linkname)
		if err != nil {
			return err
		}
		defer src.Close()
		return unix.Linkat(int(src.Fd()), srcBase, fd, base, 0)
	case tar.TypeFifo:
		return unix.Mkfifoat(fd, base, mode)
	}
	return fmt.Errorf("a file of type %q cannot be copied to this machine", h.Typeflag)
}

func (a *app) copyTo(ctx context.Context, src, ctr, dst string, follow, archive bool) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	o := client.CopyToContainerOptions{DestinationPath: dst, CopyUIDGID: archive, AllowOverwriteDirWithFile: false}
	if src == "-" {
		o.Content = a.In
		_, err := c.CopyToContainer(ctx, ctr, o)
		return err
	}
	st, err := os.Lstat(src)
	if err == nil && (follow || wantsDir(src)) {
		st, err = os.Stat(src)
	}
	if err != nil {
		return err
	}
	name := filepath.Base(filepath.Clean(src))
	if strings.HasSuffix(src, "/.") || src == "." {
		name = "."
	}
	res, err := c.ContainerStatPath(ctx, ctr, client.ContainerStatPathOptions{Path: dst})
	switch {
	case err == nil && (res.Stat.Mode.IsDir() || res.Stat.Mode&fs.ModeSymlink != 0 && wantsDir(dst)):
	case err == nil && st.IsDir():
		return fmt.Errorf("cannot copy the folder %s over the file %s:%s", src, ctr, dst)
	case err == nil || errdefs.IsNotFound(err):
		if err != nil && wantsDir(dst) && !st.IsDir() {
			return fmt.Errorf("the folder %s:%s does not exist", ctr, dst)
		}
		o.DestinationPath, name = path.Dir(path.Clean(dst)), path.Base(path.Clean(dst))
	default:
		return err
	}
	pr, pw := io.Pipe()
	go func() { pw.CloseWithError(tarTree(pw, src, name, follow || wantsDir(src))) }()
	o.Content = pr
	_, err = c.CopyToContainer(ctx, ctr, o)
	pr.CloseWithError(errors.New("the daemon ended the copy"))
	return err
}

// tarTree writes a file or folder of this machine; its top is called name.
func tarTree(w io.Writer, src, name string, follow bool) error {
	tw := tar.NewWriter(w)
	if follow {
		resolved, err := filepath.EvalSymlinks(src)
		if err != nil {
			return err
		}
		src = resolved
	}
	links := map[[2]uint64]string{}
	err := filepath.WalkDir(src, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, p)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if info.Mode()&fs.ModeSocket != 0 {
			return nil // a socket cannot be copied, as with tar(1)
		}
		target := ""
		if info.Mode()&fs.ModeSymlink != 0 {
			if target, err = os.Readlink(p); err != nil {
				return err
			}
		}
		h, err := tar.FileInfoHeader(info, target)
		if err != nil {
			return err
		}
		h.Name = path.Join(name, filepath.ToSlash(rel))
		if info.IsDir() {
			h.Name += "/"
		}
		if key, many := inode(info); many && info.Mode().IsRegular() {
			if first, seen := links[key]; seen {
				h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			} else {
				links[key] = h.Name
			}
		}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg {
			return nil
		}
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.CopyN(tw, f, h.Size)
		return err
	})
	if err != nil {
		return err
	}
	return tw.Close()
}

// inode identifies a file with several names.
func inode(info fs.FileInfo) (key [2]uint64, many bool) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || st.Nlink < 2 {
		return key, false
	}
	return [2]uint64{uint64(st.Dev), st.Ino}, true
}
