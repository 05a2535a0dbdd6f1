package containerd_test

import (
	"bytes"
	"io"
	"slices"
	"strings"
	"testing"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestContent(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	cs := r.ContentStore()
	data := bytes.Repeat([]byte("0123456789"), 300_000)
	d := digest.FromBytes(data)
	desc := ocispec.Descriptor{Digest: d, Size: int64(len(data)), MediaType: "x"}

	w, err := cs.Writer(r.ctx, content.WithRef("r"), content.WithDescriptor(desc))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data[:1000]); err != nil {
		t.Fatal(err)
	}
	if _, err := cs.Writer(r.ctx, content.WithRef("r")); !errdefs.IsUnavailable(err) {
		t.Errorf("second writer: %v", err)
	}
	st, err := cs.Status(r.ctx, "r")
	if err != nil || st.Offset != 1000 || st.Total != desc.Size || st.Expected != d {
		t.Errorf("status %+v, %v", st, err)
	}
	if list, err := cs.ListStatuses(r.ctx, "ref==r"); err != nil || len(list) != 1 {
		t.Errorf("statuses %v, %v", list, err)
	}
	// It is taken up again by whoever comes.
	w.Close()
	w, err = content.OpenWriter(r.ctx, cs, content.WithRef("r"), content.WithDescriptor(desc))
	if err != nil {
		t.Fatal(err)
	}
	if err := content.Copy(r.ctx, w, bytes.NewReader(data), desc.Size, d, content.WithLabels(map[string]string{"a": "b"})); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if _, err := cs.Writer(r.ctx, content.WithRef("other"), content.WithDescriptor(desc)); !errdefs.IsAlreadyExists(err) {
		t.Errorf("known content: %v", err)
	}
	info, err := cs.Info(r.ctx, d)
	if err != nil || info.Size != desc.Size || info.Labels["a"] != "b" {
		t.Errorf("info %+v, %v", info, err)
	}
	info.Labels = map[string]string{"c": "d"}
	if info, err = cs.Update(r.ctx, info, "labels.c"); err != nil || info.Labels["a"] != "b" || info.Labels["c"] != "d" {
		t.Errorf("updated %+v, %v", info, err)
	}
	if _, err := cs.Update(r.ctx, info, "size"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("update of the size: %v", err)
	}
	n := 0
	if err := cs.Walk(r.ctx, func(content.Info) error { n++; return nil }, `labels.c==d`); err != nil || n != 1 {
		t.Errorf("walk: %d, %v", n, err)
	}
	ra, err := cs.ReaderAt(r.ctx, desc)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 50)
	if k, err := ra.ReadAt(got, desc.Size-20); k != 20 || err != io.EOF || !bytes.Equal(got[:20], data[len(data)-20:]) {
		t.Errorf("read %d, %v", k, err)
	}
	ra.Close()
	raw := contentapi.NewContentClient(r.Conn().(grpc.ClientConnInterface))
	stream, err := raw.Read(r.ctx, &contentapi.ReadContentRequest{Digest: d.String(), Offset: desc.Size + 1})
	if err == nil {
		_, err = stream.Recv()
	}
	if err == nil || !strings.Contains(err.Error(), "OutOfRange") {
		t.Errorf("read behind the end: %v", err)
	}
	// The wrong digest at the commit.
	w, err = cs.Writer(r.ctx, content.WithRef("wrong"))
	if err != nil {
		t.Fatal(err)
	}
	w.Write([]byte("x"))
	if err := w.Commit(r.ctx, 0, digest.FromString("y")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("commit of another digest: %v", err)
	}
	if err := cs.Abort(r.ctx, "wrong"); err != nil {
		t.Errorf("abort: %v", err)
	}
	if err := cs.Abort(r.ctx, "wrong"); !errdefs.IsNotFound(err) {
		t.Errorf("abort again: %v", err)
	}
	if err := cs.Delete(r.ctx, d); err != nil {
		t.Error(err)
	}
	if _, err := cs.Info(r.ctx, d); !errdefs.IsNotFound(err) {
		t.Errorf("deleted: %v", err)
	}
}

// TestIngestLease: what is written under a lease is the lease's while it is written.
func TestIngestLease(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	cs, lm := r.ContentStore(), r.LeasesService()
	l, err := lm.Create(r.ctx, leases.WithID("l"))
	if err != nil {
		t.Fatal(err)
	}
	ctx := leases.WithLease(r.ctx, l.ID)
	held := func(when string, want ...leases.Resource) {
		t.Helper()
		if list, err := lm.ListResources(r.ctx, l); err != nil || !slices.Equal(list, want) {
			t.Errorf("%s: %v, %v; want %v", when, list, err, want)
		}
	}
	text := leases.Resource{ID: digest.FromString("text").String(), Type: "content"}
	write := func(ref string) content.Writer {
		t.Helper()
		w, err := cs.Writer(ctx, content.WithRef(ref))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte("text")); err != nil {
			t.Fatal(err)
		}
		return w
	}
	w := write("r")
	held("written to", leases.Resource{ID: "r", Type: "ingests"})
	if err := w.Commit(ctx, 4, digest.FromString("text")); err != nil {
		t.Fatal(err)
	}
	held("committed", text)
	if err := write("again").Commit(ctx, 4, digest.FromString("text")); !errdefs.IsAlreadyExists(err) {
		t.Errorf("known content: %v", err)
	}
	held("known", text)
	write("aborted").Close()
	held("left", text, leases.Resource{ID: "aborted", Type: "ingests"})
	for err = errdefs.ErrUnavailable; errdefs.IsUnavailable(err); { // until the daemon knows that the writer has gone
		err = cs.Abort(ctx, "aborted")
	}
	if err != nil {
		t.Error(err)
	}
	held("aborted", text)
	w, err = cs.Writer(leases.WithLease(r.ctx, "none"), content.WithRef("x"))
	if err == nil {
		w.Close()
	}
	if !errdefs.IsNotFound(err) {
		t.Errorf("of a lease that is not there: %v", err)
	}
}

func TestWriteOffsets(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	raw := contentapi.NewContentClient(r.Conn().(grpc.ClientConnInterface))
	conn, err := raw.Write(r.ctx)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(req *contentapi.WriteContentRequest) *contentapi.WriteContentResponse {
		t.Helper()
		if err := conn.Send(req); err != nil {
			t.Fatal(err)
		}
		resp, err := conn.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	write := contentapi.WriteAction_WRITE
	ask(&contentapi.WriteContentRequest{Action: contentapi.WriteAction_STAT, Ref: "r"})
	ask(&contentapi.WriteContentRequest{Action: write, Data: []byte("abcdef")})
	if resp := ask(&contentapi.WriteContentRequest{Action: write, Offset: 6, Data: []byte("gh")}); resp.Offset != 8 || resp.Digest != digest.FromString("abcdefgh").String() {
		t.Errorf("appended: %v", resp)
	}
	if resp := ask(&contentapi.WriteContentRequest{Action: write, Data: []byte("again")}); resp.Offset != 5 || resp.Digest != digest.FromString("again").String() {
		t.Errorf("restarted: %v", resp)
	}
	// Of the total and the digest that are expected, the last word counts.
	ask(&contentapi.WriteContentRequest{Action: contentapi.WriteAction_STAT, Total: 9, Expected: digest.FromString("other").String()})
	if resp := ask(&contentapi.WriteContentRequest{Action: contentapi.WriteAction_COMMIT, Offset: 5, Total: 5, Expected: digest.FromString("again").String()}); resp.Digest != digest.FromString("again").String() {
		t.Errorf("committed: %v", resp)
	}
	if _, err := conn.Recv(); err != io.EOF {
		t.Errorf("after the commit: %v", err)
	}
	if conn, err = raw.Write(r.ctx); err != nil {
		t.Fatal(err)
	}
	ask(&contentapi.WriteContentRequest{Action: write, Ref: "s", Expected: digest.FromString("other").String(), Data: []byte("x")})
	if err := conn.Send(&contentapi.WriteContentRequest{Action: contentapi.WriteAction_STAT, Expected: digest.FromString("again").String()}); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Recv(); status.Code(err) != codes.AlreadyExists {
		t.Errorf("the digest turns out to be known: %v", err)
	}
	if conn, err = raw.Write(r.ctx); err != nil {
		t.Fatal(err)
	}
	ask(&contentapi.WriteContentRequest{Action: write, Ref: "u", Data: []byte("x")})
	if err := conn.Send(&contentapi.WriteContentRequest{Action: contentapi.WriteAction_STAT, Expected: digest.FromString("again").String()}); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Recv(); status.Code(err) != codes.AlreadyExists {
		t.Errorf("that nobody had told: %v", err)
	}
	if list, err := r.ContentStore().ListStatuses(r.ctx); err != nil || len(list) != 0 {
		t.Errorf("ingests stay: %v, %v", list, err)
	}
}
