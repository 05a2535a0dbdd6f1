package chaos

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Load is the clients of one daemon.
type Load struct {
	Socket   string // Docker's API
	Registry string // HOST:PORT
	Images   *Registry
	Clients  int
	Journal  *Journal
	// Pause is how long a client rests between two things; 0: not at all.
	Pause time.Duration
	// Complain, if set, gets what the daemon refused. Much of it is right: clients ask for what
	// is not there.
	Complain func(format string, args ...any)

	http    *http.Client
	remotes remotes
	Done    atomic.Int64 // acknowledged operations
	Tried   atomic.Int64
}

// errNotDone is a definite no.
var errNotDone = errors.New("not done")

func (l *Load) client() *http.Client {
	if l.http == nil {
		l.http = &http.Client{Transport: &http.Transport{
			MaxIdleConnsPerHost: 64,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", l.Socket)
			},
		}}
	}
	return l.http
}

// request gives the answer's body. A status of 400 and more is errNotDone.
func (l *Load) request(ctx context.Context, method, path, body string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://hako"+path, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := l.client().Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 400 {
		err = fmt.Errorf("%s %s: %d %s: %w", method, path, resp.StatusCode, strings.TrimSpace(string(b)), errNotDone)
	}
	return b, err
}

// Ready waits until the daemon answers.
func (l *Load) Ready(ctx context.Context) error {
	for {
		_, err := l.request(ctx, "GET", "/_ping", "")
		if err == nil {
			err = l.remoteState(ctx, State{})
		}
		if err == nil || ctx.Err() != nil {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Run works until ctx ends.
func (l *Load) Run(ctx context.Context) {
	l.client()
	var wg sync.WaitGroup
	for c := range l.Clients {
		wg.Go(func() {
			p := &player{l: l, n: c, rng: rand.New(rand.NewPCG(rand.Uint64(), uint64(c)))}
			for ctx.Err() == nil {
				err := p.step(ctx)
				switch {
				case err == nil, errors.Is(err, errNotDone):
					if err != nil && l.Complain != nil {
						l.Complain("%v", err)
					}
					if l.Pause > 0 {
						time.Sleep(time.Duration(p.rng.Int64N(int64(2 * l.Pause))))
					}
				case ctx.Err() == nil: // the daemon is not there
					time.Sleep(10 * time.Millisecond)
				}
			}
		})
	}
	wg.Wait()
}

// player is one client. It works on names of its own, and so knows what must be there.
type player struct {
	l   *Load
	n   int
	rng *rand.Rand
}

// do tries to give an object a value.
func (p *player) do(object, value string, f func() error) error {
	p.l.Tried.Add(1)
	p.l.Journal.add(Entry{"try", p.n, object, value})
	if err := f(); err != nil {
		return err
	}
	p.l.Journal.add(Entry{"ack", p.n, object, value})
	p.l.Done.Add(1)
	return nil
}

func (p *player) image(i int) string { return fmt.Sprintf("%s/c%d/img%d:latest", p.l.Registry, p.n, i) }
func (p *player) tag(i int) string   { return fmt.Sprintf("c%d/tag:%d", p.n, i) }

func (p *player) step(ctx context.Context) error {
	l := p.l
	i := p.rng.IntN(Images)
	slot := p.rng.IntN(3)
	ask := func(method, path, body string) func() error {
		return func() error { _, err := l.request(ctx, method, path, body); return err }
	}
	switch n := p.rng.IntN(125); {
	case n < 20:
		return p.do("image/"+p.image(i), l.Images.ID(i), func() error { return p.pull(ctx, p.image(i)) })
	case n < 25:
		return p.do("image/"+p.image(i), l.Images.ID(i), func() error { return p.pullCRI(ctx, p.image(i)) })
	case n < 38:
		return p.do("image/"+p.image(i), "", gone(ask("DELETE", "/images/"+p.image(i), "")))
	case n < 48:
		name := p.tag(slot)
		repo, tag, _ := strings.Cut(name, ":")
		return p.do("image/"+name, l.Images.ID(i), ask("POST", "/images/"+p.image(i)+"/tag?repo="+url.QueryEscape(repo)+"&tag="+tag, ""))
	case n < 55:
		return p.do("image/"+p.tag(slot), "", gone(ask("DELETE", "/images/"+p.tag(slot), "")))
	case n < 70:
		name := fmt.Sprintf("c%d-ct%d", p.n, slot)
		body := fmt.Sprintf(`{"Image":%q,"HostConfig":{"Binds":["c%d-vol%d:/v"]}}`, p.image(i), p.n, slot)
		return p.do("container/"+name, "1", func() error {
			_, err := l.request(ctx, "POST", "/containers/create?name="+name, body)
			if err != nil && strings.Contains(err.Error(), " 409 ") {
				return nil // an earlier one is there
			}
			return err
		})
	case n < 80:
		name := fmt.Sprintf("c%d-ct%d", p.n, slot)
		return p.do("container/"+name, "", gone(ask("DELETE", "/containers/"+name, "")))
	case n < 86:
		name := fmt.Sprintf("c%d-vol%d", p.n, slot+3)
		return p.do("volume/"+name, "1", ask("POST", "/volumes/create", fmt.Sprintf(`{"Name":%q}`, name)))
	case n < 90:
		name := fmt.Sprintf("c%d-vol%d", p.n, slot+3)
		return p.do("volume/"+name, "", gone(ask("DELETE", "/volumes/"+name, "")))
	case n < 95:
		ct := fmt.Sprintf("c%d-ct%d", p.n, slot)
		return p.do(fmt.Sprintf("image/c%d/commit:%d", p.n, slot), Any, ask("POST", fmt.Sprintf("/commit?container=%s&repo=c%d/commit&tag=%d", ct, p.n, slot), "{}"))
	case n < 98:
		name := fmt.Sprintf("c%d/commit:%d", p.n, slot)
		return p.do("image/"+name, "", gone(ask("DELETE", "/images/"+name, "")))
	case n < 100:
		_, err := l.request(ctx, "POST", "/images/prune", "")
		return err
	default:
		return p.snapshotStep(ctx)
	}
}

// gone makes "there is none" a success.
func gone(f func() error) func() error {
	return func() error {
		err := f()
		if err != nil && strings.Contains(err.Error(), ": 404 ") {
			return nil
		}
		return err
	}
}

// pull asks for an image. What went wrong after the first byte is told in the stream.
func (p *player) pull(ctx context.Context, name string) error {
	b, err := p.l.request(ctx, "POST", "/images/create?fromImage="+url.QueryEscape(name), "")
	if err != nil {
		return err
	}
	ended := false
	for lines := bufio.NewScanner(strings.NewReader(string(b))); lines.Scan(); {
		var m struct {
			Error, Status string
		}
		_ = json.Unmarshal(lines.Bytes(), &m)
		if m.Error != "" {
			return fmt.Errorf("pull %s: %s: %w", name, m.Error, errNotDone)
		}
		ended = ended || strings.HasPrefix(m.Status, "Status: ")
	}
	if !ended {
		return fmt.Errorf("pull %s: the answer breaks off: %w", name, io.ErrUnexpectedEOF)
	}
	return nil
}

// State asks the daemon what it has.
func (l *Load) State(ctx context.Context) (State, error) {
	s := State{}
	var images []struct {
		Id       string
		RepoTags []string
	}
	var containers []struct{ Names []string }
	var volumes struct{ Volumes []struct{ Name string } }
	for path, v := range map[string]any{"/images/json": &images, "/containers/json?all=1": &containers, "/volumes": &volumes} {
		b, err := l.request(ctx, "GET", path, "")
		if err == nil {
			err = json.Unmarshal(b, v)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	for _, i := range images {
		for _, t := range i.RepoTags {
			s["image/"+t] = i.Id
		}
	}
	for _, c := range containers {
		for _, n := range c.Names {
			s["container/"+strings.TrimPrefix(n, "/")] = "1"
		}
	}
	for _, v := range volumes.Volumes {
		s["volume/"+v.Name] = "1"
	}
	return s, l.remoteState(ctx, s)
}

// Finding is what a check of the store found.
type Finding struct{ Severity, Problem, Object, Detail, Repaired string }

// Check has the daemon check itself, and gives all but notes.
func (l *Load) Check(ctx context.Context, deep bool) (found []Finding, err error) {
	b, err := l.request(ctx, "POST", fmt.Sprintf("/hako/v1/check?deep=%t", deep), "")
	if err != nil {
		return nil, err
	}
	for dec := json.NewDecoder(strings.NewReader(string(b))); ; {
		var line struct {
			Error  string
			Report *struct{ Findings []Finding }
		}
		if err := dec.Decode(&line); err != nil {
			return nil, fmt.Errorf("check: the answer breaks off: %w", err)
		}
		if line.Error != "" {
			return nil, fmt.Errorf("check: %s: %w", line.Error, errNotDone)
		}
		if line.Report == nil {
			continue
		}
		for _, f := range line.Report.Findings {
			if f.Severity != "note" {
				found = append(found, f)
			}
		}
		return found, nil
	}
}
