package integration

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// inspected is what the test of kills looks at.
type inspected struct {
	State struct {
		Status                string
		Pid, ExitCode         int
		StartedAt, FinishedAt time.Time
		Error                 string
	}
}

// TestKilledAtRandom kills the daemon at 25 random points while 8 clients make, start and
// remove containers. Whatever a client was told stays true, no container that runs is
// touched, no exit code or time is wrong, and the daemon is there again within 5 seconds.
func TestKilledAtRandom(t *testing.T) {
	n := own(t)
	defer func() {
		if b, err := os.ReadFile(n.log.Name()); err == nil && t.Failed() {
			for line := range strings.Lines(string(b)) {
				if !strings.Contains(line, "level=DEBUG") && !strings.Contains(line, "msg=ready") {
					t.Log(strings.TrimSpace(line))
				}
			}
		}
	}()
	const kills, clients, life = 25, 8, 300 * time.Millisecond
	pids := map[string]int{}
	for i := range 4 {
		name := fmt.Sprint("lives", i)
		n.docker(t, "run", "-d", "--name", name, testImage, "sleep", "1000")
		pids[name] = (persist{t, n}).inspect(name).State.Pid
	}
	n.killAtRandom(t, kills, clients, func(name string, exit int) bool {
		(persist{t, n}).live(name, exit, life)
		return true
	}, func(kill int) {
		for name, pid := range pids {
			if s := (persist{t, n}).inspect(name).State; s.Status != "running" || s.Pid != pid {
				t.Errorf("after kill %d %s is %s with pid %d, was %d", kill, name, s.Status, s.Pid, pid)
			}
		}
	})
}

// killAtRandom kills the daemon at random points and starts it again, while clients call live again and again, each with a
// name and an exit code of its own; live tells whether what it made has lived. look is called after each start.
func (n *node) killAtRandom(t *testing.T, kills, clients int, live func(name string, exit int) bool, look func(kill int)) {
	t.Helper()
	var over atomic.Bool
	var lives atomic.Int32
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			for i := 0; !over.Load() && !t.Failed(); i++ {
				if live(fmt.Sprintf("c%d-%d", c, i), (c*31+i)%120+1) {
					lives.Add(1)
				}
			}
		})
	}
	for i := range kills {
		time.Sleep(time.Duration(50+rand.IntN(900)) * time.Millisecond)
		if t.Failed() {
			break
		}
		if err := n.signal(syscall.SIGKILL); err != nil {
			t.Error(err)
		}
		began := time.Now()
		if err := n.start(); err != nil {
			t.Errorf("start %d: %v", i, err)
			break
		}
		t.Logf("ready %v after kill %d", time.Since(began), i)
		look(i)
	}
	over.Store(true)
	wg.Wait()
	t.Logf("%d lived", lives.Load())
}

// persist is a client that asks again when the daemon goes away.
type persist struct {
	t *testing.T
	n *node
}

// ask repeats a request until it has an answer.
func (p persist) ask(method, path, body string) (int, string) {
	deadline := time.Now().Add(hangLimit)
	for {
		code, text, err := p.n.request(method, path, strings.NewReader(body), "Content-Type", "application/json")
		if err == nil && code != 503 {
			return code, strings.TrimSpace(text)
		}
		if time.Now().After(deadline) {
			p.t.Errorf("%s %s: %d %s %v", method, path, code, text, err)
			return 0, ""
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (p persist) inspect(name string) (v inspected) {
	code, text := p.ask("GET", "/containers/"+name+"/json", "")
	if err := json.Unmarshal([]byte(text), &v); err != nil || code != 200 {
		p.t.Errorf("inspect %s: %d %s %v", name, code, text, err)
	}
	return v
}

// live takes one container from its creation to its removal.
func (p persist) live(name string, exit int, life time.Duration) {
	path := "/containers/" + name
	body := fmt.Sprintf(`{"Image":%q,"Cmd":["sh","-c","sleep %v; exit %d"],"HostConfig":{"PortBindings":{"80/tcp":[{"HostIp":"127.0.0.1"}]}}}`, testImage, life.Seconds(), exit)
	// 409: an earlier try was heard, and its answer lost.
	if code, text := p.ask("POST", "/containers/create?name="+name, body); code != 201 && code != 409 {
		p.t.Errorf("create %s: %d %s", name, code, text)
		return
	}
	acknowledged := false
	for deadline := time.Now().Add(hangLimit); ; time.Sleep(20 * time.Millisecond) {
		v := p.inspect(name)
		if v.State.Status == "created" && !acknowledged {
			code, text, err := p.n.request("POST", path+"/start", nil)
			acknowledged = err == nil && (code == 204 || code == 304)
			if err == nil && !acknowledged && code != 503 {
				p.t.Errorf("start %s: %d %s", name, code, text)
				return
			}
			continue
		}
		if v.State.Status == "exited" {
			ran := v.State.FinishedAt.Sub(v.State.StartedAt)
			if v.State.ExitCode != exit || ran < life || ran > life+hangLimit {
				p.t.Errorf("%s ended with %d after %v (%s), want %d after %v", name, v.State.ExitCode, ran, v.State.Error, exit, life)
			}
			break
		}
		if v.State.Status != "running" || time.Now().After(deadline) {
			p.t.Errorf("%s is %s; its start was acknowledged: %v", name, v.State.Status, acknowledged)
			return
		}
	}
	for deadline := time.Now().Add(hangLimit); ; time.Sleep(20 * time.Millisecond) {
		code, text := p.ask("DELETE", path+"?v=1", "")
		if code == 204 || code == 404 {
			break
		}
		if code != 409 || time.Now().After(deadline) { // 409: an earlier try is at it
			p.t.Errorf("remove %s: %d %s", name, code, text)
			return
		}
	}
	if code, text := p.ask("GET", path+"/json", ""); code != 404 {
		p.t.Errorf("%s was removed, and is there: %d %s", name, code, text)
	}
}
