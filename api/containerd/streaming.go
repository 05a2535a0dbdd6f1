package containerd

import (
	"context"
	"fmt"
	"sync"

	api "github.com/containerd/containerd/api/services/streaming/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

type streamingService struct {
	api.UnimplementedStreamingServer
	*Server
}

// streams are those that are open, by namespace and id. A client opens one, and names it in
// another call.
type streams struct {
	mu sync.Mutex
	m  map[[2]string]*stream
}

// stream is one of them. Its two directions may be used by different goroutines.
type stream struct {
	conn   api.Streaming_StreamServer
	used   bool // somebody has got it; guarded by mu of streams
	once   sync.Once
	closed chan struct{}
}

// Stream opens a stream under the id in its first message, tells so, and keeps it until either
// side has enough.
func (s *streamingService) Stream(conn api.Streaming_StreamServer) error {
	first, err := conn.Recv()
	if err != nil {
		return endOf(err)
	}
	var init api.StreamInit
	if err := first.UnmarshalTo(&init); err != nil {
		return invalidf("open stream: %v", err)
	}
	if init.GetID() == "" || len(init.GetID()) > 1024 {
		return invalidf("open stream: an id of 1 to 1024 bytes is needed")
	}
	ns, err := namespaces.NamespaceRequired(conn.Context())
	if err != nil {
		return err
	}
	st := &stream{conn: conn, closed: make(chan struct{})}
	if err := s.streams.add(ns, init.GetID(), st); err != nil {
		return err
	}
	defer s.streams.remove(ns, init.GetID())
	if err := conn.Send(&anypb.Any{}); err != nil {
		return err
	}
	select {
	case <-st.closed:
	case <-conn.Context().Done():
	}
	return nil
}

func (s *streams) add(ns, id string, st *stream) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.m[[2]string{ns, id}]; ok {
		return fmt.Errorf("stream %q: %w", id, errdefs.ErrAlreadyExists)
	}
	if s.m == nil {
		s.m = map[[2]string]*stream{}
	}
	s.m[[2]string{ns, id}] = st
	return nil
}

func (s *streams) remove(ns, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.m, [2]string{ns, id})
}

// get takes a stream of the namespace of ctx, once, and closes it when ctx ends.
func (s *streams) get(ctx context.Context, id string) (*stream, error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.m[[2]string{ns, id}]
	if st == nil {
		return nil, fmt.Errorf("stream %q: %w", id, errdefs.ErrNotFound)
	}
	if st.used { // two would write to it at the same time
		return nil, fmt.Errorf("stream %q is in use already: %w", id, errdefs.ErrFailedPrecondition)
	}
	st.used = true
	context.AfterFunc(ctx, st.close) // also wakes who waits for a message
	return st, nil
}

// send gives the client a message.
func (st *stream) send(m proto.Message) error {
	select {
	case <-st.closed:
		return fmt.Errorf("stream is closed: %w", errdefs.ErrFailedPrecondition)
	default:
	}
	a, err := packed(m)
	if err != nil {
		return err
	}
	return st.conn.Send(a)
}

// recv waits for a message of the client: io.EOF when it has said all.
func (st *stream) recv() (*anypb.Any, error) { return st.conn.Recv() }

// close ends the stream: the client reads what was sent, and then its end.
func (st *stream) close() { st.once.Do(func() { close(st.closed) }) }
