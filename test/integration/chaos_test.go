package integration

import (
	"bufio"
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// TestKilledDaemon kills the daemon while a container writes 10 MB/s, and others
// end meanwhile: no line is lost, no writer blocks, and every exit code is right.
func TestKilledDaemon(t *testing.T) {
	n := own(t)
	const count = 600_000 // lines of 100 bytes: 60 MB in 6 s
	n.docker(t, "run", "-d", "--name", "writer", testImage, "helper", "lines", "10000000", fmt.Sprint(count), "21")
	n.docker(t, "run", "-d", "--name", "ends", testImage, "sh", "-c", "sleep 2; exit 33")
	n.docker(t, "run", "-d", "--name", "killed", testImage, "sleep", "1000")
	n.docker(t, "run", "-d", "--name", "lives", "-p", "127.0.0.1::8080", testImage, "helper", "serve", "8080", "alive")
	n.docker(t, "run", "-d", "--name", "paused", testImage, "sleep", "1000")
	n.docker(t, "pause", "paused")
	n.docker(t, "run", "-d", "--rm", "--name", "removed", testImage, "sleep", "2")
	port := n.docker(t, "port", "lives", "8080")
	pid := n.docker(t, "inspect", "-f", "{{.State.Pid}}", "lives")
	victim, err := strconv.Atoi(n.docker(t, "inspect", "-f", "{{.State.Pid}}", "killed"))
	if err != nil {
		t.Fatal(err)
	}

	ended := strings.Fields(n.docker(t, "inspect", "-f", "{{.Id}}", "ends", "killed"))
	eventually(t, "the writer to write", func() bool { return n.docker(t, "logs", "--tail", "1", "writer") != "" })
	if err := n.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(victim, syscall.SIGKILL); err != nil {
		t.Error(err)
	}
	for _, id := range ended {
		n.awaitEnd(t, id)
	}
	if got := fetch(port); got != "alive" {
		t.Errorf("without the daemon the published port answers %q", got)
	}
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"ends": "exited 33", "killed": "exited 137", "lives": "running 0", "paused": "paused 0"} {
		// A shim that takes long to answer is taken up after the daemon's start.
		eventually(t, name+" to be "+want, func() bool { return n.state(t, name) == want })
	}
	if got := n.docker(t, "inspect", "-f", "{{.State.Pid}}", "lives"); got != pid {
		t.Errorf("pid %s became %s", pid, got)
	}
	if got := fetch(port); got != "alive" {
		t.Errorf("after the restart the published port answers %q", got)
	}
	if got := n.docker(t, "exec", "lives", "echo", "in"); got != "in" {
		t.Error(got)
	}
	n.docker(t, "unpause", "paused")
	eventually(t, "the container of run --rm to be removed", func() bool {
		return n.docker(t, "ps", "-aq", "--filter", "name=removed") == ""
	})
	if got := n.docker(t, "wait", "writer"); got != "21" {
		t.Errorf("the writer ended with %s", got)
	}
	lines(t, n.run(nil, "logs", "writer").out, count)

	// A daemon that stops as it should leaves everything running, too.
	if err := n.signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if got := fetch(port); got != "alive" {
		t.Errorf("after a stop the published port answers %q", got)
	}
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	if got := n.state(t, "lives"); got != "running 0" {
		t.Error(got)
	}
	if got := n.docker(t, "stop", "-t", "1", "lives"); got != "lives" {
		t.Error(got)
	}
}

// lines checks that a log holds the numbered lines of helper, each once and in order.
func lines(t *testing.T, log string, count int) {
	t.Helper()
	next := 0
	scan := bufio.NewScanner(strings.NewReader(log))
	for scan.Scan() {
		number, _, _ := strings.Cut(scan.Text(), " ")
		if i, err := strconv.Atoi(number); err != nil || i != next {
			t.Fatalf("line %d is %.30q", next, scan.Text())
		}
		next++
	}
	if next != count {
		t.Errorf("%d lines of %d", next, count)
	}
}

// TestLives runs many short lives side by side: each gives its own answer, and together
// they leave nothing behind.
func TestLives(t *testing.T) {
	n := own(t)
	n.docker(t, "run", "--rm", testImage, "true") // makes what stays while the daemon runs
	eventually(t, "the first life to be over", func() bool { return n.docker(t, "ps", "-aq") == "" })
	before, err := n.census()
	if err != nil {
		t.Fatal(err)
	}
	const total, side = 60, 8
	work := make(chan int)
	var wg sync.WaitGroup
	for range side {
		wg.Go(func() {
			for i := range work {
				code := i % 200
				r := n.run(bytes.NewReader([]byte("in")), "run", "--rm", "-i", "-v", "/anon", "-p", "8080", testImage, "sh", "-c", fmt.Sprintf("echo $(cat) %d; exit %d", i, code))
				if r.code != code || r.out != fmt.Sprintf("in %d\n", i) || r.stderr != "" {
					t.Error(r)
				}
			}
		})
	}
	for i := range total {
		work <- i
	}
	close(work)
	wg.Wait()
	eventually(t, "all containers to be removed", func() bool { return n.docker(t, "ps", "-aq") == "" })
	if got := n.docker(t, "volume", "ls", "-q"); got != "" {
		t.Errorf("volumes left: %s", got)
	}
	if got := n.docker(t, "network", "inspect", "-f", "{{len .Containers}}", "bridge"); got != "0" {
		t.Errorf("%s endpoints left", got)
	}
	if err := n.expectCensus(before); err != nil {
		t.Error(err)
	}
}
