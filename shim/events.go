package shim

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/hako-engine/hako/shim/wire"
)

// Topics of events.
const (
	topicCreate       = "/tasks/create"
	topicStart        = "/tasks/start"
	topicOOM          = "/tasks/oom"
	topicExit         = "/tasks/exit"
	topicDelete       = "/tasks/delete"
	topicExecAdded    = "/tasks/exec-added"
	topicExecStarted  = "/tasks/exec-started"
	topicPaused       = "/tasks/paused"
	topicResumed      = "/tasks/resumed"
	topicCheckpointed = "/tasks/checkpointed"
)

const (
	// maxEvents bounds the queue while nobody takes the events; the oldest are dropped.
	// An engine that comes back asks for states, so it misses nothing by that.
	maxEvents    = 1024
	eventTimeout = 5 * time.Second
	maxBackoff   = 10 * time.Second
)

// publisher forwards events to one ttrpc address, in the order in which they were
// published, each until it was taken. It has a goroutine only while there are events.
type publisher struct {
	address   string // path of a unix socket; empty: events are discarded
	namespace string
	log       *slog.Logger

	mu struct {
		sync.Mutex
		queue   []wire.Envelope
		dropped int
		running bool
		closed  bool
		idle    chan struct{} // closed when the goroutine ends
		client  *wire.Client
	}
	stop chan struct{}
}

func newPublisher(address, namespace string, log *slog.Logger) *publisher {
	return &publisher{address: strings.TrimPrefix(address, "unix://"), namespace: namespace, log: log, stop: make(chan struct{})}
}

func (p *publisher) publish(topic, name string, event wire.Message) {
	if p.address == "" {
		return
	}
	e := wire.Envelope{
		Timestamp: time.Now().UTC(), Namespace: p.namespace, Topic: topic,
		Event: &wire.Any{TypeURL: "containerd.events." + name, Value: wire.Marshal(event)},
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.closed {
		return
	}
	if len(p.mu.queue) >= maxEvents {
		p.mu.queue = p.mu.queue[1:]
		p.mu.dropped++
	}
	p.mu.queue = append(p.mu.queue, e)
	if !p.mu.running {
		p.mu.running, p.mu.idle = true, make(chan struct{})
		go p.run()
	}
}

// run forwards until the queue is empty.
func (p *publisher) run() {
	backoff := 10 * time.Millisecond
	for {
		p.mu.Lock()
		if len(p.mu.queue) == 0 || p.mu.closed && backoff > time.Second {
			p.mu.queue, p.mu.running = nil, false
			close(p.mu.idle)
			p.mu.Unlock()
			return
		}
		e, client := p.mu.queue[0], p.mu.client
		before := p.mu.dropped
		p.mu.Unlock()

		client, err := p.forward(client, &e)

		p.mu.Lock()
		p.mu.client = client
		if err == nil && p.mu.dropped == before {
			p.mu.queue = p.mu.queue[1:]
		}
		p.mu.Unlock()
		if err == nil {
			backoff = 10 * time.Millisecond
			continue
		}
		if backoff > time.Second {
			p.log.Warn("event not taken", "topic", e.Topic, "error", err)
		}
		select {
		case <-time.After(backoff):
		case <-p.stop:
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

// forward sends one event, over the client or a new one, and gives the client to
// use for the next.
func (p *publisher) forward(client *wire.Client, e *wire.Envelope) (*wire.Client, error) {
	ctx, cancel := context.WithTimeout(context.Background(), eventTimeout)
	defer cancel()
	for fresh := false; ; fresh = true {
		if client == nil {
			conn, err := wire.Dial(p.address)
			if err != nil {
				return nil, err
			}
			client, fresh = wire.NewClient(conn, p.namespace), true
		}
		err := client.Call(ctx, wire.ServiceEvents, "Forward", &wire.ForwardRequest{Envelope: e}, nil)
		if err == nil {
			return client, nil
		}
		client.Close()
		client = nil
		if fresh {
			return nil, err
		}
	}
}

// close gives the events that are left a second and then ends.
func (p *publisher) close() {
	p.mu.Lock()
	p.mu.closed = true
	idle, running := p.mu.idle, p.mu.running
	p.mu.Unlock()
	close(p.stop)
	if running {
		select {
		case <-idle:
		case <-time.After(2 * time.Second):
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.client != nil {
		p.mu.client.Close()
		p.mu.client = nil
	}
}
