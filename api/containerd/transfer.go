package containerd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	api "github.com/containerd/containerd/api/services/transfer/v1"
	"github.com/containerd/containerd/api/types"
	transferapi "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/containerd/v2/core/transfer"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/hako-engine/hako/engine"
)

// Transfers moves images between registries, the store and archives; the image room documents each.
type Transfers interface {
	TransferPull(ctx context.Context, from engine.RemoteImage, to engine.StoredImage, tell transfer.ProgressFunc) error
	TransferPush(ctx context.Context, from engine.StoredImage, to engine.RemoteImage, tell transfer.ProgressFunc) error
	TransferTag(ctx context.Context, from, to engine.StoredImage, tell transfer.ProgressFunc) error
	TransferImport(ctx context.Context, r io.Reader, compress bool, to engine.StoredImage, tell transfer.ProgressFunc) error
	TransferExport(ctx context.Context, from engine.StoredImage, w io.Writer, o engine.ArchiveOptions, tell transfer.ProgressFunc) error
}

// labelSnapshotter names the default snapshotter of a namespace.
const labelSnapshotter = "containerd.io/defaults/snapshotter"

type transferService struct {
	api.UnimplementedTransferServer
	*Server
}

// Transfer moves an image, or files of a container; what is moved where, the types of the two ends tell.
func (s *transferService) Transfer(ctx context.Context, req *api.TransferRequest) (*emptypb.Empty, error) {
	if s.opt.Transfer == nil {
		return nil, fmt.Errorf("transfers: %w", errdefs.ErrNotImplemented)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	tell, done, err := s.progress(ctx, req.GetOptions().GetProgressStream())
	if err != nil {
		return nil, err
	}
	defer done()
	src, err := unpackEnd(req.GetSource())
	if err != nil {
		return nil, fmt.Errorf("source of transfer: %w", err)
	}
	dst, err := unpackEnd(req.GetDestination())
	if err != nil {
		return nil, fmt.Errorf("destination of transfer: %w", err)
	}
	err = errUnsupported
	switch from := src.(type) {
	case *transferapi.OCIRegistry:
		if to, ok := dst.(*transferapi.ImageStore); ok {
			err = s.pull(ctx, from, to, tell)
		}
	case *transferapi.ImageStore:
		switch to := dst.(type) {
		case *transferapi.OCIRegistry:
			err = s.push(ctx, from, to, tell)
		case *transferapi.ImageStore:
			err = s.opt.Transfer.TransferTag(ctx, s.stored(ctx, from), s.stored(ctx, to), tell)
		case *transferapi.ImageExportStream:
			err = s.export(ctx, from, to, tell)
		}
	case *transferapi.ImageImportStream:
		switch to := dst.(type) {
		case *transferapi.ImageStore:
			err = s.importArchive(ctx, from, to, tell)
		case *transferapi.ImageExportStream:
			err = s.echo(ctx, from, to)
		}
	case *transferapi.ContainerPath:
		if to, ok := dst.(*transferapi.WriteStream); ok {
			err = s.copyOut(ctx, from, to)
		}
	case *transferapi.ReadStream:
		if to, ok := dst.(*transferapi.ContainerPath); ok {
			err = s.copyIn(ctx, from, to)
		}
	}
	if errors.Is(err, errUnsupported) {
		err = fmt.Errorf("transfer from %s to %s: %w", req.GetSource().GetTypeUrl(), req.GetDestination().GetTypeUrl(), errdefs.ErrNotImplemented)
	}
	if err != nil {
		return nil, err
	}
	return empty(), nil
}

var errUnsupported = errors.New("no such transfer")

// unpackEnd reads one end of a transfer.
func unpackEnd(a *anypb.Any) (proto.Message, error) {
	name := a.GetTypeUrl()
	name = name[strings.LastIndexByte(name, '/')+1:]
	var m proto.Message
	switch name {
	case "containerd.types.transfer.OCIRegistry":
		m = &transferapi.OCIRegistry{}
	case "containerd.types.transfer.ImageStore":
		m = &transferapi.ImageStore{}
	case "containerd.types.transfer.ImageImportStream":
		m = &transferapi.ImageImportStream{}
	case "containerd.types.transfer.ImageExportStream":
		m = &transferapi.ImageExportStream{}
	case "containerd.types.transfer.ContainerPath":
		m = &transferapi.ContainerPath{}
	case "containerd.types.transfer.ReadStream":
		m = &transferapi.ReadStream{}
	case "containerd.types.transfer.WriteStream":
		m = &transferapi.WriteStream{}
	default:
		return nil, fmt.Errorf("type %q: %w", a.GetTypeUrl(), errdefs.ErrNotImplemented)
	}
	if err := proto.Unmarshal(a.GetValue(), m); err != nil {
		return nil, invalidf("%s: %v", name, err)
	}
	return m, nil
}

// progress gives what tells steps on a stream of the client's; done ends it. A client that does not
// listen holds up nothing but itself.
func (s *Server) progress(ctx context.Context, id string) (transfer.ProgressFunc, func(), error) {
	if id == "" {
		return nil, func() {}, nil
	}
	st, err := s.streams.get(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	var mu sync.Mutex // one may send at a time
	gone := false
	tell := func(p transfer.Progress) {
		m := &transferapi.Progress{Event: p.Event, Name: p.Name, Parents: p.Parents, Progress: p.Progress, Total: p.Total}
		if p.Desc != nil {
			m.Desc = descriptorOf(*p.Desc)
		}
		mu.Lock()
		defer mu.Unlock()
		if !gone {
			gone = st.send(m) != nil
		}
	}
	return tell, st.close, nil
}

func (s *transferService) pull(ctx context.Context, from *transferapi.OCIRegistry, to *transferapi.ImageStore, tell transfer.ProgressFunc) error {
	r, done, err := s.remote(ctx, from)
	if err != nil {
		return err
	}
	defer done()
	return s.opt.Transfer.TransferPull(ctx, r, s.stored(ctx, to), tell)
}

func (s *transferService) push(ctx context.Context, from *transferapi.ImageStore, to *transferapi.OCIRegistry, tell transfer.ProgressFunc) error {
	r, done, err := s.remote(ctx, to)
	if err != nil {
		return err
	}
	defer done()
	return s.opt.Transfer.TransferPush(ctx, s.stored(ctx, from), r, tell)
}

// remote makes the end that is at a registry. Credentials are asked for on a stream of the client's.
func (s *transferService) remote(ctx context.Context, o *transferapi.OCIRegistry) (r engine.RemoteImage, done func(), err error) {
	res := o.GetResolver()
	r = engine.RemoteImage{Reference: o.GetReference(), HostDir: res.GetHostDir(), PlainHTTP: res.GetDefaultScheme() == "http"}
	if h := res.GetHeaders(); len(h) > 0 {
		r.Headers = http.Header{}
		for k, v := range h {
			r.Headers.Set(k, v)
		}
	}
	var open []*stream
	done = func() {
		for _, st := range open {
			st.close()
		}
	}
	if id := res.GetLogsStream(); id != "" {
		// What goes over the wire to a registry is not shown: it holds credentials.
		st, err := s.streams.get(ctx, id)
		if err != nil {
			return r, nil, err
		}
		open = append(open, st)
	}
	if id := res.GetAuthStream(); id != "" {
		st, err := s.streams.get(ctx, id)
		if err != nil {
			done()
			return r, nil, err
		}
		open = append(open, st)
		a := &asker{st: st, reference: o.GetReference(), known: map[string]engine.RegistryAuth{}}
		r.Ask = a.ask
	}
	return r, done, nil
}

// askLimit is how long a client may take to answer: there may be a human behind it.
const askLimit = 5 * time.Minute

// asker asks a client for credentials, once for each host.
type asker struct {
	st        *stream
	reference string

	mu    sync.Mutex // held over a question and its answer
	known map[string]engine.RegistryAuth
}

func (a *asker) ask(host string) (engine.RegistryAuth, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if k, ok := a.known[host]; ok {
		return k, nil
	}
	if err := a.st.send(&transferapi.AuthRequest{Host: host, Reference: a.reference}); err != nil {
		return engine.RegistryAuth{}, fmt.Errorf("ask the client for credentials for %s: %w", host, err)
	}
	limit := time.AfterFunc(askLimit, a.st.close)
	m, err := a.st.recv()
	limit.Stop()
	if err != nil {
		return engine.RegistryAuth{}, fmt.Errorf("ask the client for credentials for %s: %w", host, err)
	}
	var resp transferapi.AuthResponse
	if err := m.UnmarshalTo(&resp); err != nil {
		return engine.RegistryAuth{}, invalidf("credentials for %s: %v", host, err)
	}
	var k engine.RegistryAuth
	switch resp.GetAuthType() {
	case transferapi.AuthType_CREDENTIALS:
		k.Username, k.Password = resp.GetUsername(), resp.GetSecret()
	case transferapi.AuthType_REFRESH:
		k.IdentityToken = resp.GetSecret()
	case transferapi.AuthType_HEADER:
		scheme, token, _ := strings.Cut(resp.GetSecret(), " ")
		if !strings.EqualFold(scheme, "Bearer") {
			return k, fmt.Errorf("credentials for %s of the scheme %q: %w", host, scheme, errdefs.ErrNotImplemented)
		}
		k.RegistryToken = token
	}
	a.known[host] = k
	return k, nil
}

// stored makes the end that is in the store. Where no snapshotter is named, the namespace's counts.
func (s *Server) stored(ctx context.Context, i *transferapi.ImageStore) engine.StoredImage {
	out := engine.StoredImage{
		Name: i.GetName(), Labels: i.GetLabels(), Platforms: toPlatforms(i.GetPlatforms()),
		Metadata: i.GetAllMetadata(), Limit: int(min(i.GetManifestLimit(), 1<<20)),
	}
	for _, r := range i.GetExtraReferences() {
		out.References = append(out.References, engine.ImageNameRule{
			Name: r.GetName(), IsPrefix: r.GetIsPrefix(), AllowOverwrite: r.GetAllowOverwrite(),
			AddDigest: r.GetAddDigest(), SkipNamedDigest: r.GetSkipNamedDigest(),
		})
	}
	for _, u := range i.GetUnpacks() {
		c := transfer.UnpackConfiguration{Platform: toPlatform(u.GetPlatform()), Snapshotter: u.GetSnapshotter()}
		if c.Snapshotter == "" {
			c.Snapshotter = s.defaultSnapshotter(ctx)
		}
		out.Unpacks = append(out.Unpacks, c)
	}
	return out
}

// defaultSnapshotter is that of the namespace of ctx.
func (s *Server) defaultSnapshotter(ctx context.Context) string {
	if ns, ok := namespaces.Namespace(ctx); ok {
		if labels, err := s.opt.Namespaces.Labels(ctx, ns); err == nil && labels[labelSnapshotter] != "" {
			return labels[labelSnapshotter]
		}
	}
	return s.opt.DefaultSnapshotter
}

func toPlatforms(ps []*types.Platform) (out []ocispec.Platform) {
	for _, p := range ps {
		out = append(out, toPlatform(p))
	}
	return out
}

func (s *transferService) importArchive(ctx context.Context, from *transferapi.ImageImportStream, to *transferapi.ImageStore, tell transfer.ProgressFunc) error {
	st, err := s.streams.get(ctx, from.GetStream())
	if err != nil {
		return err
	}
	defer st.close()
	return s.opt.Transfer.TransferImport(ctx, &byteReader{st: st}, from.GetForceCompress(), s.stored(ctx, to), tell)
}

func (s *transferService) export(ctx context.Context, from *transferapi.ImageStore, to *transferapi.ImageExportStream, tell transfer.ProgressFunc) error {
	st, err := s.streams.get(ctx, to.GetStream())
	if err != nil {
		return err
	}
	defer st.close()
	o := engine.ArchiveOptions{
		Platforms: toPlatforms(to.GetPlatforms()), AllPlatforms: to.GetAllPlatforms(),
		NoDocker: to.GetSkipCompatibilityManifest(), NoForeign: to.GetSkipNonDistributable(),
	}
	return s.opt.Transfer.TransferExport(ctx, s.stored(ctx, from), &byteWriter{ctx: ctx, st: st}, o, tell)
}

// echo gives back what it is sent: with it a client tries a stream.
func (s *transferService) echo(ctx context.Context, from *transferapi.ImageImportStream, to *transferapi.ImageExportStream) error {
	if from.GetMediaType() != to.GetMediaType() {
		return errUnsupported
	}
	in, err := s.streams.get(ctx, from.GetStream())
	if err != nil {
		return err
	}
	defer in.close()
	out, err := s.streams.get(ctx, to.GetStream())
	if err != nil {
		return err
	}
	defer out.close()
	_, err = io.Copy(&byteWriter{ctx: ctx, st: out}, &byteReader{st: in})
	return err
}
