package containerd_test

import (
	"bytes"
	"context"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	streamingapi "github.com/containerd/containerd/api/services/streaming/v1"
	transferapi "github.com/containerd/containerd/api/services/transfer/v1"
	transfertypes "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/containerd/v2/core/transfer"
	tarchive "github.com/containerd/containerd/v2/core/transfer/archive"
	timage "github.com/containerd/containerd/v2/core/transfer/image"
	tregistry "github.com/containerd/containerd/v2/core/transfer/registry"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestTransfer(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	host := newRegistry(t, map[string]v1.Image{"x/y:1": twoLayers(t)})
	if err := r.NamespaceService().Create(r.ctx, "test", map[string]string{"containerd.io/defaults/snapshotter": "native"}); err != nil {
		t.Fatal(err)
	}
	src, err := tregistry.NewOCIRegistry(r.ctx, host+"/x/y:1", tregistry.WithDefaultScheme("http"))
	if err != nil {
		t.Fatal(err)
	}
	here := platforms.DefaultSpec()
	var saved []string
	err = r.Transfer(r.ctx, src, timage.NewStore("my/name:1", timage.WithPlatforms(here), timage.WithAllMetadata, timage.WithImageLabels(map[string]string{"a": "b"}),
		timage.WithUnpack(here, ""), timage.WithUnpack(here, "overlayfs")), transfer.WithProgress(func(p transfer.Progress) {
		if p.Event == "saved" {
			saved = append(saved, p.Name)
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	for _, sn := range []string{"native", "overlayfs"} {
		if got := r.topOf(t, "my/name:1", sn); !maps.Equal(got, afterTwo) {
			t.Errorf("%s: %v", sn, sorted(got))
		}
	}
	img, err := r.ImageService().Get(r.ctx, "my/name:1")
	if err != nil || img.Labels["a"] != "b" {
		t.Errorf("%+v, %v", img, err)
	}
	if err := r.Transfer(r.ctx, timage.NewStore("my/name:1"), timage.NewStore("tag:2")); err != nil {
		t.Fatal(err)
	}
	dst, err := tregistry.NewOCIRegistry(r.ctx, host+"/pushed:3", tregistry.WithDefaultScheme("http"))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Transfer(r.ctx, timage.NewStore("tag:2"), dst); err != nil {
		t.Fatal(err)
	}
	buf := closable{closed: make(chan struct{})}
	if err := r.Transfer(r.ctx, timage.NewStore("tag:2"), tarchive.NewImageExportStream(&buf, "")); err != nil {
		t.Fatal(err)
	}
	archive := buf.wait(t)
	other := namespaces.WithNamespace(r.ctx, "other")
	err = r.Transfer(other, tarchive.NewImageImportStream(bytes.NewReader(archive), ""),
		timage.NewStore("index:1", timage.WithDigestRef("base", true, false), timage.WithUnpack(here, "overlayfs")))
	if err != nil {
		t.Fatal(err)
	}
	list, err := r.ImageService().List(other)
	var names []string
	for _, i := range list {
		names = append(names, strings.SplitN(i.Name, "@", 2)[0])
	}
	if want := []string{"base", "base", "index:1", "tag:2"}; err != nil || !slices.Equal(names, want) {
		t.Errorf("imported %v, %v", names, err)
	}
	// What is wrong is told by class.
	missing, _ := tregistry.NewOCIRegistry(r.ctx, host+"/not/there:1", tregistry.WithDefaultScheme("http"))
	for what, c := range map[string]struct {
		src, dst any
		is       func(error) bool
	}{
		"no such image in the registry": {missing, timage.NewStore("x"), errdefs.IsNotFound},
		"no such image in the store":    {timage.NewStore("x"), timage.NewStore("y"), errdefs.IsNotFound},
		"registry to registry":          {missing, missing, errdefs.IsNotImplemented},
		"not an archive":                {tarchive.NewImageImportStream(strings.NewReader("x"), ""), timage.NewStore("x"), errdefs.IsInvalidArgument},
	} {
		if err := r.Transfer(r.ctx, c.src, c.dst); !c.is(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// closable takes what a stream brings. The transfer's answer may overtake the stream, whose
// end is told by Close.
type closable struct {
	bytes.Buffer
	closed chan struct{}
}

func (c *closable) Close() error {
	close(c.closed)
	return nil
}

// wait is for the whole of the archive.
func (c *closable) wait(t *testing.T) []byte {
	t.Helper()
	select {
	case <-c.closed:
		return c.Bytes()
	case <-time.After(5 * time.Minute):
		t.Fatal("the archive has no end")
		return nil
	}
}

// asked gives credentials, and counts.
type asked struct{ hosts []string }

func (a *asked) GetCredentials(_ context.Context, _, host string) (tregistry.Credentials, error) {
	a.hosts = append(a.hosts, host)
	return tregistry.Credentials{Username: "u", Secret: "p"}, nil
}

func TestTransferAsksForCredentials(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	host := newGuardedRegistry(t, "x:1", twoLayers(t))
	a := &asked{}
	src, err := tregistry.NewOCIRegistry(r.ctx, host+"/x:1", tregistry.WithDefaultScheme("http"), tregistry.WithCredentials(a))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Transfer(r.ctx, src, timage.NewStore("x")); err != nil {
		t.Fatal(err)
	}
	if len(a.hosts) != 1 || a.hosts[0] != host {
		t.Errorf("asked %v", a.hosts)
	}
	src, _ = tregistry.NewOCIRegistry(r.ctx, host+"/x:1", tregistry.WithDefaultScheme("http"))
	if err := r.Transfer(r.ctx, src, timage.NewStore("y")); err == nil {
		t.Error("pulled without credentials")
	}
}

// TestStreamOnce: a stream serves one transfer.
func TestStreamOnce(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	ctx, cancel := context.WithTimeout(r.ctx, 5*time.Minute)
	defer cancel()
	conn := r.Conn().(grpc.ClientConnInterface)
	open := func(id string) {
		t.Helper()
		st, err := streamingapi.NewStreamingClient(conn).Stream(ctx)
		if err != nil {
			t.Fatal(err)
		}
		a, err := anypb.New(&streamingapi.StreamInit{ID: id})
		if err == nil {
			err = st.Send(a)
		}
		if err == nil {
			_, err = st.Recv()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	open("s")
	pack := func(m proto.Message) *anypb.Any {
		a, err := anypb.New(m)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	_, err := transferapi.NewTransferClient(conn).Transfer(ctx, &transferapi.TransferRequest{
		Source: pack(&transfertypes.ImageStore{Name: "x"}), Destination: pack(&transfertypes.ImageExportStream{Stream: "s"}),
		Options: &transferapi.TransferOptions{ProgressStream: "s"},
	})
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("for progress and bytes: %v", err)
	}
}
