// Package daemon reaches the images of a hakod from outside: through its containerd
// socket, where blobs are read and written one by one and keep their digests, else by
// saving and loading archives through its Docker socket.
//
// In flow the sockets and names of images; out flow sources and destinations of package
// transport.
package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/images"
	leaseproxy "github.com/containerd/containerd/v2/core/leases/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/distribution/reference"
	"github.com/moby/moby/client"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/hako-engine/hako/image/transport"
)

// maxMessage bounds a message of the containerd API in bytes, as its clients do.
const maxMessage = 16 << 20

// Options of New.
type Options struct {
	// Docker gives a client of the Docker socket.
	Docker func() (*client.Client, error)
	// Containerd is the path of the containerd socket; "": there is none.
	Containerd string
	Namespace  string // of the images
}

// Daemon is a daemon whose images are reached. Close it.
type Daemon struct {
	o Options

	mu   sync.Mutex
	conn *grpc.ClientConn
}

// New connects to nothing yet.
func New(o Options) *Daemon { return &Daemon{o: o} }

// Close ends the connection.
func (d *Daemon) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conn == nil {
		return nil
	}
	conn := d.conn
	d.conn = nil
	return conn.Close()
}

// Conn gives the connection to the containerd socket, errdefs.ErrUnavailable if there is none.
func (d *Daemon) Conn() (*grpc.ClientConn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conn != nil {
		return d.conn, nil
	}
	path := d.o.Containerd
	if st, err := os.Stat(path); path == "" || err != nil || st.Mode().Type() != os.ModeSocket {
		return nil, fmt.Errorf("no containerd socket %s: %w", path, errdefs.ErrUnavailable)
	}
	named := func(ctx context.Context) context.Context { return namespaces.WithNamespace(ctx, d.o.Namespace) }
	conn, err := grpc.NewClient("passthrough:///hakod",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var dialer net.Dialer
			return dialer.DialContext(ctx, "unix", path)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, call grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return call(named(ctx), method, req, reply, cc, opts...)
		}),
		grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, stream grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return stream(named(ctx), desc, cc, method, opts...)
		}),
	)
	if err != nil {
		return nil, err
	}
	d.conn = conn
	return conn, nil
}

// store gives the daemon's store, if it serves the containerd API.
func (d *Daemon) store(ctx context.Context) (transport.Store, error) {
	conn, err := d.Conn()
	if err != nil {
		return transport.Store{}, err
	}
	recs := records{imagesapi.NewImagesClient(conn)}
	if _, err := recs.Get(ctx, "hako.invalid/probe:none"); err != nil && !errdefs.IsNotFound(err) {
		return transport.Store{}, err
	}
	return transport.Store{Content: proxy.NewContentStore(conn), Images: recs, Leases: leaseproxy.NewLeaseManager(leasesapi.NewLeasesClient(conn))}, nil
}

// absent says whether the containerd API is not there, so that Docker's has to do.
func absent(err error) bool { return errdefs.IsUnavailable(err) || errdefs.IsNotImplemented(err) }

// Open gives an image.
func (d *Daemon) Open(ctx context.Context, name reference.Named) (transport.Source, error) {
	s, err := d.store(ctx)
	if err == nil {
		return transport.OpenStore(s, name), nil
	}
	if !absent(err) {
		return nil, err
	}
	c, err := d.o.Docker()
	if err != nil {
		return nil, err
	}
	res, err := c.ImageSave(ctx, []string{reference.FamiliarString(name)})
	if err != nil {
		return nil, err
	}
	defer res.Close()
	r := transport.Ref{Kind: transport.DockerArchive, Path: "(daemon)"}
	if dig, ok := name.(reference.Digested); ok {
		r.Digest = dig.Digest()
	} else {
		r.Tag = name.String()
	}
	return transport.ReadArchive(ctx, r, res)
}

// Create gives a place for an image. from is the registry's name that it comes from; nil: none.
func (d *Daemon) Create(ctx context.Context, name, from reference.Named) (transport.Destination, error) {
	s, err := d.store(ctx)
	if err == nil {
		return transport.CreateStore(s, name, from), nil
	}
	if !absent(err) {
		return nil, err
	}
	if _, ok := name.(reference.Digested); ok {
		return nil, fmt.Errorf("%s: an image is loaded by name and tag: %w", name, errdefs.ErrInvalidArgument)
	}
	c, err := d.o.Docker()
	if err != nil {
		return nil, err
	}
	if _, err := c.Ping(ctx, client.PingOptions{}); err != nil {
		return nil, err
	}
	r, w := io.Pipe()
	loaded := make(chan error, 1)
	go func() {
		err := load(ctx, c, r)
		r.CloseWithError(errors.Join(err, io.ErrClosedPipe))
		loaded <- err
	}()
	return transport.WriteArchive(transport.Ref{Kind: transport.Local, Name: name}, w, func(ok bool) error {
		if !ok {
			w.CloseWithError(errors.New("given up"))
			<-loaded
			return nil
		}
		w.Close()
		return <-loaded
	}), nil
}

// load sends an archive and waits for what becomes of it.
func load(ctx context.Context, c *client.Client, r io.Reader) error {
	res, err := c.ImageLoad(ctx, r, client.ImageLoadWithQuiet(true))
	if err != nil {
		return err
	}
	defer res.Close()
	for dec := json.NewDecoder(res); ; {
		var m struct {
			ErrorDetail *struct{ Message string }
			Error       string
		}
		err := dec.Decode(&m)
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("read what the daemon says: %w", err)
		case m.ErrorDetail != nil:
			return errors.New(m.ErrorDetail.Message)
		case m.Error != "":
			return errors.New(m.Error)
		}
	}
}

// records are the daemon's image records.
type records struct{ c imagesapi.ImagesClient }

func toProto(i images.Image) *imagesapi.Image {
	return &imagesapi.Image{Name: i.Name, Labels: i.Labels, Target: &types.Descriptor{
		MediaType: i.Target.MediaType, Digest: i.Target.Digest.String(), Size: i.Target.Size, Annotations: i.Target.Annotations}}
}

func fromProto(i *imagesapi.Image, err error) (images.Image, error) {
	if err != nil {
		return images.Image{}, errgrpc.ToNative(err)
	}
	t := i.GetTarget()
	return images.Image{Name: i.GetName(), Labels: i.GetLabels(), Target: ocispec.Descriptor{
		MediaType: t.GetMediaType(), Digest: digest.Digest(t.GetDigest()), Size: t.GetSize(), Annotations: t.GetAnnotations()}}, nil
}

func (r records) Get(ctx context.Context, name string) (images.Image, error) {
	res, err := r.c.Get(ctx, &imagesapi.GetImageRequest{Name: name})
	return fromProto(res.GetImage(), err)
}

func (r records) Create(ctx context.Context, i images.Image) (images.Image, error) {
	res, err := r.c.Create(ctx, &imagesapi.CreateImageRequest{Image: toProto(i)})
	return fromProto(res.GetImage(), err)
}

func (r records) Update(ctx context.Context, i images.Image, paths ...string) (images.Image, error) {
	res, err := r.c.Update(ctx, &imagesapi.UpdateImageRequest{Image: toProto(i), UpdateMask: &fieldmaskpb.FieldMask{Paths: paths}})
	return fromProto(res.GetImage(), err)
}
