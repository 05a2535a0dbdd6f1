package integration

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"testing"

	transfersvc "github.com/containerd/containerd/api/services/transfer/v1"
	transferapi "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/containerd/v2/core/streaming/proxy"
	transferstreams "github.com/containerd/containerd/v2/core/transfer/streaming"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// copyFiles makes a transfer between a container and a stream of this test.
func (c *ctrd) copyFiles(cx context.Context, from, to proto.Message) error {
	src, err := anypb.New(from)
	if err != nil {
		return err
	}
	dst, err := anypb.New(to)
	if err != nil {
		return err
	}
	_, err = transfersvc.NewTransferClient(c.Conn().(grpc.ClientConnInterface)).Transfer(cx, &transfersvc.TransferRequest{Source: src, Destination: dst})
	return errgrpc.ToNative(err)
}

var streamCount int

// readFiles gives the members of what is copied out of a container: names with contents.
func (c *ctrd) readFiles(cx context.Context, id, path string, alone bool) (map[string]string, error) {
	c.t.Helper()
	streamCount++
	name := fmt.Sprint("out", streamCount)
	st, err := proxy.NewStreamCreator(c.Conn()).Create(cx, name)
	if err != nil {
		c.t.Fatal(err)
	}
	defer st.Close()
	r := transferstreams.ReceiveStream(cx, st)
	done := make(chan error, 1)
	go func() {
		done <- c.copyFiles(cx, &transferapi.ContainerPath{ContainerID: id, Path: path, NoWalk: alone}, &transferapi.WriteStream{Stream: name})
	}()
	got := map[string]string{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err != nil {
			break // what is wrong the call says
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			c.t.Error(err)
		}
		got[h.Name] = string(b)
	}
	return got, <-done
}

// writeFiles copies a file into a container.
func (c *ctrd) writeFiles(cx context.Context, id, path, name, content string, owners bool) error {
	c.t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o640, Size: int64(len(content)), Uid: 7, Gid: 8}); err != nil {
		c.t.Fatal(err)
	}
	_, _ = io.WriteString(tw, content)
	if err := tw.Close(); err != nil {
		c.t.Fatal(err)
	}
	streamCount++
	stream := fmt.Sprint("in", streamCount)
	st, err := proxy.NewStreamCreator(c.Conn()).Create(cx, stream)
	if err != nil {
		c.t.Fatal(err)
	}
	transferstreams.SendStream(cx, &b, st)
	return c.copyFiles(cx, &transferapi.ReadStream{Stream: stream, MediaType: "application/x-tar"}, &transferapi.ContainerPath{ContainerID: id, Path: path, PreserveOwnership: owners})
}

// TestContainerPath copies files out of and into containers through the transfer service, whoever made them.
func TestContainerPath(t *testing.T) {
	t.Parallel()
	n, c := ownContainerd(t)
	cx := c.shared()
	docker := strings.TrimSpace(n.docker(t, "run", "-d", testImage, "sleep", "100000"))
	c.sleeping("guest")
	for by, id := range map[string]string{"docker": docker, "containerd": "guest"} {
		n.docker(t, "exec", id, "sh", "-c", "mkdir -p /d/e && echo one >/d/one && echo two >/d/e/two && ln -s /etc/hostname /d/link")
		got, err := c.readFiles(cx, id, "/d", false)
		if want := "map[d/: d/e/: d/e/two:two\n d/link: d/one:one\n]"; err != nil || fmt.Sprint(got) != want {
			t.Errorf("%s: %v, %v, want %s", by, got, err, want)
		}
		if got, err := c.readFiles(cx, id, "/d", true); err != nil || fmt.Sprint(got) != "map[d/:]" {
			t.Errorf("%s: the directory alone: %v, %v", by, got, err)
		}
		if got, err := c.readFiles(cx, id, "/d/one", false); err != nil || got["one"] != "one\n" {
			t.Errorf("%s: a file: %v, %v", by, got, err)
		}
		if _, err := c.readFiles(cx, id, "/none", false); !errdefs.IsNotFound(err) {
			t.Errorf("%s: a path that is not there: %v", by, err)
		}
		long := strings.Repeat("0123456789", 300_000)
		if err := c.writeFiles(cx, id, "/d", "../../new", long, false); err != nil {
			t.Fatalf("%s: %v", by, err)
		}
		if err := c.writeFiles(cx, id, "/d", "owned", "x", true); err != nil {
			t.Fatalf("%s: %v", by, err)
		}
		if out := n.docker(t, "exec", id, "sh", "-c", "stat -c '%u %g %a %s' /d/new /d/owned"); strings.TrimSpace(out) != "0 0 640 3000000\n7 8 640 1" {
			t.Errorf("%s: written: %q", by, out)
		}
		if err := c.writeFiles(cx, id, "/d/one", "x", "x", false); !errdefs.IsInvalidArgument(err) && !errdefs.IsNotFound(err) {
			t.Errorf("%s: into a file: %v", by, err)
		}
	}
	if _, err := c.readFiles(cx, "nobody", "/", false); !errdefs.IsNotFound(err) {
		t.Errorf("no container: %v", err)
	}
	if _, err := c.readFiles(namespaces.WithNamespace(cx, "other"), "guest", "/", false); !errdefs.IsNotFound(err) {
		t.Errorf("of another namespace: %v", err)
	}
}
