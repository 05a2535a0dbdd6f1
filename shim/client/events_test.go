package client_test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/shim/wire"
)

// event is a task event that a shim forwarded.
type event struct {
	Namespace string
	Topic     string // containerd's: /tasks/exit, /tasks/oom, ...
	Time      time.Time
	ID        string // container
	ExecID    string
	Pid       int
	Status    uint32 // of an exit
}

// eventServer takes the events that shims forward, as containerd does.
type eventServer struct {
	l      net.Listener
	path   string
	handle func(event) error
	done   chan struct{}

	mu struct {
		sync.Mutex
		conns  map[net.Conn]struct{}
		closed bool
	}
}

// listenEvents takes events on a unix socket (mode 0600) whose path goes into
// StartOptions.EventsAddress. handle is called for each of them; those of one shim
// come one after the other and in order. If it fails the shim sends the event again.
func listenEvents(path string, handle func(event) error) (*eventServer, error) {
	f, err := wire.Listen(path)
	if err != nil {
		return nil, err
	}
	l, err := net.FileListener(f)
	f.Close()
	if err != nil {
		return nil, fmt.Errorf("listen for events: %w", err)
	}
	s := &eventServer{l: l, path: path, handle: handle, done: make(chan struct{})}
	s.mu.conns = map[net.Conn]struct{}{}
	go s.run()
	return s, nil
}

func (s *eventServer) run() {
	defer close(s.done)
	var wg sync.WaitGroup
	defer wg.Wait()
	services := wire.Services{wire.ServiceEvents: {"Forward": wire.Handle(s.forward)}}
	for {
		conn, err := s.l.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		if s.mu.closed {
			s.mu.Unlock()
			conn.Close()
			return
		}
		s.mu.conns[conn] = struct{}{}
		s.mu.Unlock()
		wg.Go(func() {
			services.Serve(context.Background(), conn, bufio.NewReaderSize(conn, 512))
			s.mu.Lock()
			delete(s.mu.conns, conn)
			s.mu.Unlock()
		})
	}
}

func (s *eventServer) forward(_ context.Context, r *wire.ForwardRequest) (wire.Message, error) {
	if r.Envelope == nil || r.Envelope.Event == nil {
		return nil, fmt.Errorf("event without content: %w", errdefs.ErrInvalidArgument)
	}
	e, err := decodeEvent(r.Envelope)
	if err != nil {
		return nil, err
	}
	if err := s.handle(e); err != nil {
		return nil, err
	}
	return &wire.Empty{}, nil
}

func decodeEvent(env *wire.Envelope) (event, error) {
	e := event{Namespace: env.Namespace, Topic: env.Topic, Time: env.Timestamp}
	decode := func(m wire.Message) error { return wire.Unmarshal(env.Event.Value, m) }
	var err error
	switch env.Topic {
	case "/tasks/create":
		var m wire.TaskCreate
		err = decode(&m)
		e.ID, e.Pid = m.ContainerID, int(m.Pid)
	case "/tasks/start":
		var m wire.TaskStart
		err = decode(&m)
		e.ID, e.Pid = m.ContainerID, int(m.Pid)
	case "/tasks/exit":
		var m wire.TaskExit
		err = decode(&m)
		e.ID, e.Pid, e.Status = m.ContainerID, int(m.Pid), m.ExitStatus
		if m.ID != m.ContainerID {
			e.ExecID = m.ID
		}
	case "/tasks/delete":
		var m wire.TaskDelete
		err = decode(&m)
		e.ID, e.ExecID, e.Pid, e.Status = m.ContainerID, m.ID, int(m.Pid), m.ExitStatus
	case "/tasks/exec-added", "/tasks/exec-started":
		var m wire.TaskExecStarted
		err = decode(&m)
		e.ID, e.ExecID, e.Pid = m.ContainerID, m.ExecID, int(m.Pid)
	default: // oom, paused, resumed: the container is the first field
		var m wire.TaskOOM
		err = decode(&m)
		e.ID = m.ContainerID
	}
	if err != nil {
		return e, fmt.Errorf("decode event %s: %w: %w", env.Topic, err, errdefs.ErrInvalidArgument)
	}
	return e, nil
}

// close ends the server and removes its socket. Shims keep their events and try again.
func (s *eventServer) close() {
	s.mu.Lock()
	s.mu.closed = true
	s.l.Close()
	for conn := range s.mu.conns {
		conn.Close()
	}
	s.mu.Unlock()
	<-s.done
	os.Remove(s.path)
}
