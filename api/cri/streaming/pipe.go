package streaming

import (
	"io"
	"sync"
	"time"
)

// pipe is a bounded buffer between the reader of a connection and whoever takes the
// bytes of one stream.
type pipe struct {
	limit int
	// blocked, if not nil, is called from time to time while a Write has to wait.
	blocked func()

	mu     sync.Mutex
	buf    []byte
	err    error         // what the reader gets when buf is empty; nil: more may come
	gone   bool          // nobody reads any more
	data   chan struct{} // of one: there is something to read, or the end
	space  chan struct{} // of one: there is room, or nobody reads
	closed bool
}

// blockedEvery is how often a waiting Write calls blocked.
const blockedEvery = 10 * time.Second

func newPipe(limit int) *pipe {
	return &pipe{limit: limit, data: make(chan struct{}, 1), space: make(chan struct{}, 1)}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Write queues p, and waits while there is no room. It is for one writer. What nobody
// reads is dropped.
func (p *pipe) Write(b []byte) (int, error) {
	total := len(b)
	var tick *time.Ticker
	var ticks <-chan time.Time
	for {
		p.mu.Lock()
		if p.gone || p.closed {
			p.mu.Unlock()
			return total, nil
		}
		n := min(len(b), p.limit-len(p.buf))
		if n > 0 {
			p.buf = append(p.buf, b[:n]...)
			b = b[n:]
			signal(p.data)
		}
		p.mu.Unlock()
		if len(b) == 0 {
			return total, nil
		}
		if tick == nil && p.blocked != nil {
			tick = time.NewTicker(blockedEvery)
			defer tick.Stop()
			ticks = tick.C
		}
		select {
		case <-p.space:
		case <-ticks:
			p.blocked()
		}
	}
}

// end lets the reader see err after what is queued. The first one counts.
func (p *pipe) end(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.closed, p.err = true, err
	signal(p.data)
	signal(p.space)
}

// abort drops what is queued: the reader sees err at once.
func (p *pipe) abort(err error) {
	p.end(err)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.buf = nil
	signal(p.data)
}

// Read gives what is queued. It is for one reader.
func (p *pipe) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	for {
		p.mu.Lock()
		switch {
		case p.gone:
			p.mu.Unlock()
			return 0, io.ErrClosedPipe
		case len(p.buf) > 0:
			n := copy(b, p.buf)
			p.buf = p.buf[n:]
			if len(p.buf) == 0 {
				p.buf = nil
			}
			signal(p.space)
			p.mu.Unlock()
			return n, nil
		case p.closed:
			err := p.err
			signal(p.data) // a second Read sees it again
			p.mu.Unlock()
			return 0, err
		}
		p.mu.Unlock()
		<-p.data
	}
}

// Close is the reader's: nothing is kept any more, and a Read under way ends.
func (p *pipe) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone, p.buf = true, nil
	signal(p.data)
	signal(p.space)
	return nil
}
