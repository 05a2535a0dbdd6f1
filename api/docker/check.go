package docker

import (
	"context"
	"sync"
	"time"

	"github.com/hako-engine/hako/engine"
	"github.com/hako-engine/hako/internal/errtext"
)

// checkLine is one line of the answer to a check: progress, and at the end the report or
// what kept it from being made.
type checkLine struct {
	Progress *checkProgress      `json:"progress,omitempty"`
	Report   *engine.CheckReport `json:"report,omitempty"`
	Error    string              `json:"error,omitempty"`
}

type checkProgress struct {
	What  string `json:"what"`
	Done  int64  `json:"done"`
	Total int64  `json:"total"`
}

// check checks the whole system. It is not in Docker's API.
func (s *Server) check(ctx context.Context, c *call) error {
	out := c.objects(typeNDJSON)
	var mu sync.Mutex
	var last time.Time
	tell := func(what string, done, total int64) {
		mu.Lock()
		defer mu.Unlock()
		if now := time.Now(); now.Sub(last) >= progressInterval {
			last = now
			_ = out.write(checkLine{Progress: &checkProgress{what, done, total}}) // the end tells that the client left
		}
	}
	r, err := s.opt.Backend.Check(ctx, engine.CheckOptions{Deep: c.flag("deep"), Repair: c.flag("repair"), Progress: tell})
	if err != nil {
		if !out.begun() {
			return err
		}
		defer out.end()
		return out.write(checkLine{Error: errtext.Plain(err)})
	}
	defer out.end()
	if r.Findings == nil {
		r.Findings = []engine.Finding{}
	}
	return out.write(checkLine{Report: &r})
}
