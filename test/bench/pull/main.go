// Command pull times one pull into an empty store, for the pull benchmark.
//
// In flow a reference; out flow the seconds it took until the image was unpacked and
// durable: pull [-root DIR] [-cpuprofile FILE] REFERENCE
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"runtime/pprof"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/hako-engine/hako/image"
	"github.com/hako-engine/hako/snapshot"
	"github.com/hako-engine/hako/store"
)

func main() {
	root := flag.String("root", "", "directory of the store; must be empty (default: a temporary one)")
	name := flag.String("snapshotter", "erofs", "erofs or overlayfs")
	profile := flag.String("cpuprofile", "", "file to write a CPU profile to")
	flag.Parse()
	if err := run(*root, *name, *profile, flag.Arg(0)); err != nil {
		log.Fatal(err)
	}
}

func run(root, name, profile, ref string) error {
	if root == "" {
		dir, err := os.MkdirTemp("", "hako-pull-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		root = dir
	}
	st, err := store.Open(filepath.Join(root, "store"), store.Options{})
	if err != nil {
		return err
	}
	defer st.Close()
	var sn *snapshot.Snapshotter
	if name == "erofs" {
		sn, err = snapshot.NewErofs(filepath.Join(root, "erofs"), filepath.Join(root, "mounts"), st, snapshot.ErofsOptions{})
	} else {
		sn, err = snapshot.NewOverlay(filepath.Join(root, "overlayfs"), st)
	}
	if err != nil {
		return err
	}
	defer sn.Close()
	svc := image.New(image.Options{
		Content: st.Content(), Images: st.Images(), Leases: st.Leases(),
		Snapshotters: map[string]snapshots.Snapshotter{sn.Name(): sn}, Default: sn.Name(),
	})
	if profile != "" {
		f, err := os.Create(profile)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	start := time.Now()
	if _, err := svc.Pull(context.Background(), ref, image.PullOptions{}); err != nil {
		return err
	}
	fmt.Printf("%.2f\n", time.Since(start).Seconds())
	return nil
}
