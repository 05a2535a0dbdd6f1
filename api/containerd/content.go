package containerd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"

	api "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/types/known/emptypb"
)

// readChunk is the size of a message of a blob's bytes.
const readChunk = 1 << 20

type contentService struct {
	api.UnimplementedContentServer
	*Server
}

func (s *contentService) Info(ctx context.Context, req *api.InfoRequest) (*api.InfoResponse, error) {
	d, err := toDigest(req.GetDigest())
	if err != nil {
		return nil, err
	}
	info, err := s.opt.Content.Info(ctx, d)
	if err != nil {
		return nil, err
	}
	return &api.InfoResponse{Info: blobOf(info)}, nil
}

func (s *contentService) Update(ctx context.Context, req *api.UpdateRequest) (*api.UpdateResponse, error) {
	d, err := toDigest(req.GetInfo().GetDigest())
	if err != nil {
		return nil, err
	}
	info, err := s.opt.Content.Update(ctx, content.Info{Digest: d, Labels: req.GetInfo().GetLabels()}, req.GetUpdateMask().GetPaths()...)
	if err != nil {
		return nil, err
	}
	return &api.UpdateResponse{Info: blobOf(info)}, nil
}

func (s *contentService) List(req *api.ListContentRequest, out api.Content_ListServer) error {
	var infos []*api.Info
	flush := func() error {
		if len(infos) == 0 {
			return nil
		}
		err := out.Send(&api.ListContentResponse{Info: infos})
		infos = nil
		return err
	}
	err := s.opt.Content.Walk(out.Context(), func(info content.Info) error {
		if infos = append(infos, blobOf(info)); len(infos) < batch {
			return nil
		}
		return flush()
	}, req.GetFilters()...)
	if err != nil {
		return err
	}
	return flush()
}

func (s *contentService) Delete(ctx context.Context, req *api.DeleteContentRequest) (*emptypb.Empty, error) {
	d, err := toDigest(req.GetDigest())
	if err != nil {
		return nil, err
	}
	if err := s.opt.Content.Delete(ctx, d); err != nil {
		return nil, err
	}
	return empty(), nil
}

func (s *contentService) Read(req *api.ReadContentRequest, out api.Content_ReadServer) error {
	d, err := toDigest(req.GetDigest())
	if err != nil {
		return err
	}
	ra, err := s.opt.Content.ReaderAt(out.Context(), ocispec.Descriptor{Digest: d})
	if err != nil {
		return err
	}
	defer ra.Close()
	offset, size := max(req.GetOffset(), 0), req.GetSize()
	if offset > ra.Size() {
		return fmt.Errorf("read past object length %d bytes: %w", ra.Size(), errdefs.ErrOutOfRange)
	}
	if rest := ra.Size() - offset; size <= 0 || size > rest {
		size = rest
	}
	buf := make([]byte, min(size, readChunk))
	for size > 0 {
		n, err := ra.ReadAt(buf[:min(size, readChunk)], offset)
		if n == 0 && err != nil {
			return fmt.Errorf("read content %s: %w", d, err)
		}
		// The message is on the wire, or copied, when Send returns.
		if err := out.Send(&api.ReadContentResponse{Offset: offset, Data: buf[:n]}); err != nil {
			return err
		}
		offset, size = offset+int64(n), size-int64(n)
	}
	return nil
}

func (s *contentService) Status(ctx context.Context, req *api.StatusRequest) (*api.StatusResponse, error) {
	st, err := s.opt.Content.Status(ctx, req.GetRef())
	if err != nil {
		return nil, err
	}
	return &api.StatusResponse{Status: ingestOf(st)}, nil
}

func (s *contentService) ListStatuses(ctx context.Context, req *api.ListStatusesRequest) (*api.ListStatusesResponse, error) {
	list, err := s.opt.Content.ListStatuses(ctx, req.GetFilters()...)
	if err != nil {
		return nil, err
	}
	resp := &api.ListStatusesResponse{}
	for _, st := range list {
		resp.Statuses = append(resp.Statuses, ingestOf(st))
	}
	return resp, nil
}

func (s *contentService) Abort(ctx context.Context, req *api.AbortRequest) (*emptypb.Empty, error) {
	if err := s.opt.Content.Abort(ctx, req.GetRef()); err != nil {
		return nil, err
	}
	return empty(), nil
}

// Write is a conversation: each request gets an answer with the offset and the digest that the
// ingest has come to. It ends with a commit, or with the client, and can then be taken up again.
func (s *contentService) Write(conn api.Content_WriteServer) (err error) {
	req, err := conn.Recv()
	if err != nil {
		return endOf(err)
	}
	if req.GetRef() == "" {
		return invalidf("first message must have a reference")
	}
	in := &ingest{store: s.opt.Content, ctx: conn.Context(), ref: req.GetRef(), total: req.GetTotal(), expected: digest.Digest(req.GetExpected())}
	if in.expected != "" {
		if _, err := toDigest(req.GetExpected()); err != nil {
			return err
		}
	}
	in.w, err = s.opt.Content.Writer(in.ctx, content.WithRef(in.ref), content.WithDescriptor(ocispec.Descriptor{Size: in.total, Digest: in.expected}))
	if err != nil {
		return err
	}
	defer in.w.Close()
	// The lease keeps what there is of it until the client comes back, however long that takes.
	if id, ok := leases.FromContext(in.ctx); ok && id != "" {
		if err := s.opt.Leases.AddResource(in.ctx, leases.Lease{ID: id}, leases.Resource{ID: in.ref, Type: "ingests"}); err != nil {
			if st, serr := in.w.Status(); serr == nil && st.Offset == 0 { // it was made for nothing
				in.w.Close()
				_ = s.opt.Content.Abort(context.WithoutCancel(in.ctx), in.ref)
			}
			return err
		}
	}
	for {
		resp, err := in.handle(req)
		if err != nil {
			return err
		}
		if err := conn.Send(resp); err != nil || req.GetAction() == api.WriteAction_COMMIT {
			return err
		}
		if req, err = conn.Recv(); err != nil {
			return endOf(err)
		}
	}
}

// endOf is the error of a client that has gone; that it has said all is none.
func endOf(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// ingest is one stream's writer.
type ingest struct {
	store    content.Store
	ctx      context.Context
	w        content.Writer
	ref      string
	total    int64
	expected digest.Digest
}

func (in *ingest) handle(req *api.WriteContentRequest) (*api.WriteContentResponse, error) {
	if r := req.GetRef(); r != "" && r != in.ref {
		return nil, invalidf("ref cannot be changed from %q to %q", in.ref, r)
	}
	// Of what is known the latest counts (content.proto).
	if t := req.GetTotal(); t > 0 {
		in.total = t
	}
	if e := req.GetExpected(); e != "" {
		d, err := toDigest(e)
		if err != nil {
			return nil, err
		}
		if d != in.expected && req.GetAction() != api.WriteAction_COMMIT { // which finds out itself
			if err := in.known(d); err != nil {
				return nil, err
			}
		}
		in.expected = d
	}
	switch req.GetAction() {
	case api.WriteAction_STAT:
	case api.WriteAction_WRITE:
		if err := in.write(req); err != nil {
			return nil, err
		}
	case api.WriteAction_COMMIT:
		if len(req.GetData()) > 0 {
			if err := in.write(req); err != nil {
				return nil, err
			}
		}
		return in.commit(req)
	default:
		return nil, invalidf("write action %v", req.GetAction())
	}
	st, err := in.w.Status()
	if err != nil {
		return nil, err
	}
	return in.response(req.GetAction(), st), nil
}

// known ends the ingest with errdefs.ErrAlreadyExists if it turns out that the blob is there. The lease holds it then.
func (in *ingest) known(d digest.Digest) error {
	if _, err := in.store.Info(in.ctx, d); err != nil {
		return nil
	}
	// Asked for by another name, which nothing is written to.
	w, err := in.store.Writer(in.ctx, content.WithRef("known-"+rand.Text()), content.WithDescriptor(ocispec.Descriptor{Digest: d}))
	if err == nil { // it has just been removed, or only its bytes are missing
		st, err := w.Status()
		w.Close()
		if err == nil {
			_ = in.store.Abort(in.ctx, st.Ref)
		}
		return nil
	}
	if errdefs.IsAlreadyExists(err) {
		in.w.Close()
		if err := in.store.Abort(context.WithoutCancel(in.ctx), in.ref); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return err
}

// write appends at the offset that was come to; a lower one takes back what is behind it.
func (in *ingest) write(req *api.WriteContentRequest) error {
	st, err := in.w.Status()
	if err != nil {
		return err
	}
	switch at := req.GetOffset(); {
	case at > st.Offset || at < 0:
		return fmt.Errorf("write @%v must occur at current offset %v: %w", at, st.Offset, errdefs.ErrOutOfRange)
	case at < st.Offset:
		if err := in.w.Truncate(at); err != nil {
			return fmt.Errorf("go back to offset %d: %w: %w", at, err, errdefs.ErrOutOfRange)
		}
	}
	_, err = in.w.Write(req.GetData())
	return err
}

func (in *ingest) commit(req *api.WriteContentRequest) (*api.WriteContentResponse, error) {
	st, err := in.w.Status()
	if err != nil {
		return nil, err
	}
	if st.Offset < req.GetOffset() {
		return nil, fmt.Errorf("commit at offset %d of an ingest of %d bytes: %w", req.GetOffset(), st.Offset, errdefs.ErrOutOfRange)
	}
	resp := in.response(req.GetAction(), st) // with the digest that it has before it is gone
	if err := in.w.Commit(in.ctx, in.total, in.expected, content.WithLabels(req.GetLabels())); err != nil {
		return nil, err
	}
	return resp, nil
}

func (in *ingest) response(a api.WriteAction, st content.Status) *api.WriteContentResponse {
	return &api.WriteContentResponse{
		Action: a, StartedAt: stampOf(st.StartedAt), UpdatedAt: stampOf(st.UpdatedAt),
		Offset: st.Offset, Total: in.total, Digest: in.w.Digest().String(),
	}
}

func blobOf(i content.Info) *api.Info {
	return &api.Info{Digest: i.Digest.String(), Size: i.Size, CreatedAt: stampOf(i.CreatedAt), UpdatedAt: stampOf(i.UpdatedAt), Labels: i.Labels}
}

func ingestOf(st content.Status) *api.Status {
	return &api.Status{
		StartedAt: stampOf(st.StartedAt), UpdatedAt: stampOf(st.UpdatedAt), Ref: st.Ref,
		Offset: st.Offset, Total: st.Total, Expected: st.Expected.String(),
	}
}
