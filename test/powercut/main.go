// Command powercut cuts the power of a machine that hako works in, and looks what is left.
//
// In flow a kernel (test/vm/image.sh) and hako's binaries; out flow verdicts. In a virtual
// machine a daemon serves 16 clients (test/chaos) from a virtual disk; what they were promised goes
// out over a port that is not the disk. Two ways:
//
//	powercut kill -n 100     the machine is killed at random points. The disk is ours: it has a
//	                         write cache, and loses what was not flushed, all of it or any part
//	powercut replay          one run on a disk that logs every write and flush (QEMU's
//	                         blklogwrites); then, for each flush, the disk as it was then
//
// Afterwards the file system is mounted, the daemon starts, its check finds nothing, and all
// that was acknowledged is there.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "powercut:", err)
		os.Exit(1)
	}
}

// settings are what both ways need.
type settings struct {
	bin, image, work string
	diskMB           int
	snapshotter      string
	load             string // arguments of the clients
	verbose, lie     bool
}

func run() error {
	if len(os.Args) < 2 {
		return errors.New("usage: powercut kill|replay [flags]")
	}
	fs := flag.NewFlagSet("powercut "+os.Args[1], flag.ContinueOnError)
	var s settings
	fs.StringVar(&s.bin, "bin", "bin", "folder with hakod, hako-shim and load")
	fs.StringVar(&s.image, "image", "", "folder that test/vm/image.sh printed; empty: ask it")
	fs.StringVar(&s.work, "work", "", "folder for disks; empty: a temporary one in memory")
	fs.IntVar(&s.diskMB, "disk", 256, "size of the disk, in MiB")
	fs.StringVar(&s.snapshotter, "snapshotter", "overlayfs", "of the daemon: overlayfs, native, or erofs, for which KERNEL=backports\nmakes a machine that can (without it, through loop devices)")
	fs.StringVar(&s.load, "load", "", "more arguments of test/chaos/load")
	fs.BoolVar(&s.verbose, "v", false, "say what happens")
	fs.BoolVar(&s.lie, "lie", false, "kill: a disk that forgets what was flushed. A control: something must be lost")
	n := fs.Int("n", 100, "kill: how often")
	flushes := fs.Int("flushes", 400, "replay: how long the run is, in flushes")
	skip := fs.Int("skip", 1, "replay: look at every one of so many flushes")
	if err := fs.Parse(os.Args[2:]); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if s.work == "" {
		dir, err := os.MkdirTemp("/dev/shm", "powercut")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		s.work = dir
	}
	if s.image == "" {
		out, err := exec.CommandContext(ctx, "test/vm/image.sh").Output()
		if err != nil {
			return fmt.Errorf("test/vm/image.sh: %w", err)
		}
		s.image = strings.TrimSpace(string(out))
	}
	if err := s.prepare(ctx); err != nil {
		return err
	}
	switch os.Args[1] {
	case "kill":
		return kills(ctx, s, *n)
	case "replay":
		return replay(ctx, s, *flushes, *skip)
	}
	return fmt.Errorf("unknown way %q", os.Args[1])
}

// modules are what the machine's kernel needs for a disk, a port, and hako.
var modules = []string{"virtio_pci", "virtio_blk", "virtio_console", "ext4", "overlay", "loop", "erofs"}

// prepare makes the initrd, the disk with the programs, and the disk under test.
func (s settings) prepare(ctx context.Context) error {
	self, err := os.ReadFile("test/powercut/guest-init")
	if err != nil {
		return fmt.Errorf("run it from the top of the sources: %w", err)
	}
	release, err := os.ReadFile(filepath.Join(s.image, "complete"))
	if err != nil {
		return err
	}
	rd := filepath.Join(s.work, "initrd")
	for _, d := range []string{"bin", "dev", "proc", "sys", "modules"} {
		if err := os.MkdirAll(filepath.Join(rd, d), 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(rd, "init"), self, 0o755); err != nil {
		return err
	}
	root := filepath.Join(s.work, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	script := `set -e
cp "$(command -v busybox)" "$RD/bin/busybox"
ln -sf busybox "$RD/bin/sh"
mount -o loop,ro "$IMAGE/root.ext4" "$ROOT"
trap 'umount "$ROOT"' EXIT
for m in $MODULES; do
	chroot "$ROOT" modprobe -S "$RELEASE" --show-depends "$m" 2>/dev/null | awk '$1 == "insmod" { print $2 }'
done | awk '!seen[$0]++' | while read -r f; do
	cp "$ROOT$f" "$RD/modules/"
	basename "$f" >>"$RD/modules/order"
done
(cd "$RD" && find . | busybox cpio -o -H newc 2>/dev/null >"$WORK/initrd.cpio")
mkdir -p "$WORK/tools"
cp "$BIN/hakod" "$BIN/hako-shim" "$BIN/load" "$WORK/tools/"
mke2fs -q -t ext4 -O ^has_journal -d "$WORK/tools" "$WORK/tools.ext4" "$(($(du -sm "$WORK/tools" | cut -f1) + 16))M"
mke2fs -q -t ext4 -E lazy_itable_init=0,lazy_journal_init=0 "$WORK/base.ext4" "${DISK}M"
`
	cmd := exec.CommandContext(ctx, "bash", "-c", script)
	cmd.Env = append(os.Environ(), "RD="+rd, "IMAGE="+s.image, "ROOT="+root, "WORK="+s.work, "BIN="+s.bin,
		"RELEASE="+strings.TrimSpace(string(release)), "MODULES="+strings.Join(modules, " "), fmt.Sprint("DISK=", s.diskMB))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("prepare: %w\n%s", err, out.Bytes())
	}
	return nil
}
