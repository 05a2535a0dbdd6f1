package docker

import (
	"encoding/json"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/jsonstream"

	"github.com/hako-engine/hako/engine"
	"github.com/hako-engine/hako/internal/errtext"
)

// progressInterval is how often a client hears of one layer while nothing but its number of bytes changes.
const progressInterval = 100 * time.Millisecond

// transferMessage is a line of a pull, push or load. Old clients read error, new ones errorDetail.
type transferMessage struct {
	jsonstream.Message
	ErrorText string `json:"error,omitempty"`
}

// transfer writes the progress of a transfer as a stream of JSON objects. The answer
// begins with the first line, so that an error before it still has a status code of its own.
type transfer struct {
	out *objects

	mu   sync.Mutex
	last map[string]progressState // by layer
	// held is the line that only announces a pull. It waits for the next one, so that an
	// image that cannot be had is still answered with a status code, as clients expect.
	held *transferMessage
}

type progressState struct {
	action string
	at     time.Time
}

func (c *call) transfer() *transfer {
	return &transfer{out: c.objects(typeJSON), last: map[string]progressState{}}
}

// progress is for the Progress options of the image room: safe for concurrent use.
func (t *transfer) progress(p engine.Progress) {
	m := transferMessage{Message: jsonstream.Message{ID: p.ID, Status: p.Action}}
	if strings.HasPrefix(p.Action, "Pulling from ") && !t.out.started() {
		t.mu.Lock()
		t.held = &m
		t.mu.Unlock()
		return
	}
	if p.Message != "" {
		m.Status = p.Message
	} else if t.tooSoon(p) {
		return
	}
	if p.Current != 0 || p.Total != 0 {
		m.Progress = &jsonstream.Progress{Current: p.Current, Total: p.Total}
	}
	t.release()
	_ = t.out.write(m) // the transfer goes on when its client leaves without cancelling
}

// release sends the line that waits.
func (t *transfer) release() {
	t.mu.Lock()
	held := t.held
	t.held = nil
	t.mu.Unlock()
	if held != nil {
		_ = t.out.write(*held)
	}
}

func (t *transfer) tooSoon(p engine.Progress) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	last := t.last[p.ID]
	if last.action == p.Action && now.Sub(last.at) < progressInterval && (p.Total == 0 || p.Current < p.Total) {
		return true
	}
	t.last[p.ID] = progressState{p.Action, now}
	return false
}

// text writes a line of output, as load does.
func (t *transfer) text(s string) error {
	return t.out.write(transferMessage{Message: jsonstream.Message{Stream: s}})
}

// aux writes a result for programs.
func (t *transfer) aux(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	raw := json.RawMessage(b)
	return t.out.write(transferMessage{Message: jsonstream.Message{Aux: &raw}})
}

// finish ends the stream: an error before the first line is the caller's to answer with, a
// later one goes into the stream.
func (t *transfer) finish(err error) error {
	if err == nil {
		t.release()
		t.out.end()
		return nil
	}
	if !t.out.begun() {
		return err
	}
	defer t.out.end()
	code := 0
	if s := statusOf(err); s == 401 || s == 403 || s == 404 {
		code = s
	}
	text := errtext.Plain(err)
	_ = t.out.write(transferMessage{
		Message:   jsonstream.Message{Error: &jsonstream.Error{Code: code, Message: text}},
		ErrorText: text,
	})
	return nil
}
