package docker

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/net/websocket"

	"github.com/hako-engine/hako/api/stream"
	"github.com/hako-engine/hako/engine"
)

// readFrame reads a frame of the multiplexed format: io.EOF is the end between frames.
func readFrame(r io.Reader) (stream int, p []byte, err error) {
	var header [8]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return 0, nil, err
	}
	p = make([]byte, binary.BigEndian.Uint32(header[4:]))
	_, err = io.ReadFull(r, p)
	return int(header[0]), p, err
}

func (n *node) dial() *net.UnixConn {
	n.t.Helper()
	c, err := net.Dial("unix", n.socket)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(5 * time.Minute)); err != nil {
		n.t.Fatal(err)
	}
	return c.(*net.UnixConn)
}

// hijack sends a request for an upgrade and reads the answer's header.
func (n *node) hijack(path, body string) (*net.UnixConn, *bufio.Reader, *http.Response) {
	n.t.Helper()
	c := n.dial()
	_, err := fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body)
	if err != nil {
		n.t.Fatal(err)
	}
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, &http.Request{Method: "POST"})
	if err != nil {
		n.t.Fatal(err)
	}
	return c, br, resp
}

func TestWaitAnswersItsHeadersAtOnce(t *testing.T) {
	registered := make(chan engine.WaitCondition, 1)
	result := make(chan engine.WaitResult, 1)
	n := serve(t, &fake{wait: func(_ context.Context, ref string, cond engine.WaitCondition) (<-chan engine.WaitResult, error) {
		if ref == "nope" {
			return nil, notFoundf("No such container: nope")
		}
		registered <- cond
		return result, nil
	}})
	resp, err := n.client.Post("http://docker/v1.50/containers/x/wait?condition=next-exit", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if cond := <-registered; cond != engine.WaitNextExit || resp.StatusCode != 200 {
		t.Errorf("condition %s, %s", cond, resp.Status)
	}
	result <- engine.WaitResult{ExitCode: 7}
	if b, err := io.ReadAll(resp.Body); err != nil || strings.TrimSpace(string(b)) != `{"StatusCode":7}` {
		t.Errorf("%s %v", b, err)
	}
	result <- engine.WaitResult{ExitCode: 125, Err: errors.New("it broke")}
	if got := n.expect(200, "POST", "/containers/x/wait", ""); strings.TrimSpace(got) != `{"Error":{"Message":"it broke"},"StatusCode":125}` {
		t.Error(got)
	}
	if cond := <-registered; cond != engine.WaitNotRunning {
		t.Errorf("condition %s", cond)
	}
	n.expect(404, "POST", "/containers/nope/wait", "")
	n.expect(400, "POST", "/containers/x/wait?condition=sometime", "")
}

func TestWaitEndsWithItsClient(t *testing.T) {
	ended := make(chan struct{})
	n := serve(t, &fake{wait: func(ctx context.Context, _ string, _ engine.WaitCondition) (<-chan engine.WaitResult, error) {
		context.AfterFunc(ctx, func() { close(ended) })
		return make(chan engine.WaitResult), nil
	}})
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, "POST", "http://docker/containers/x/wait", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := n.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	cancel()
	select {
	case <-ended:
	case <-time.After(5 * time.Minute):
		t.Error("the engine was not told that the client left")
	}
}

func TestAttach(t *testing.T) {
	for _, tt := range []struct {
		name      string
		version   string
		tty       bool
		mediaType string
	}{
		{"multiplexed", "1.50", false, stream.MediaTypeMultiplexed},
		{"terminal", "1.50", true, stream.MediaTypeRaw},
		{"old", "1.41", false, stream.MediaTypeRaw},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newProcess(frame{1, "out"}, frame{2, "err"})
			var asked engine.AttachOptions
			n := serve(t, &fake{
				containers: []engine.Container{{ID: "abc", Name: "x", Config: engine.Config{TTY: tt.tty, OpenStdin: true, StdinOnce: true}}},
				attach:     func(_ string, o engine.AttachOptions) (engine.Attachment, error) { asked = o; return p, nil },
			})
			c, br, resp := n.hijack("/v"+tt.version+"/containers/x/attach?stream=1&stdin=1&stdout=1&stderr=1&logs=1", "")
			if resp.StatusCode != 101 || resp.Header.Get("Content-Type") != tt.mediaType || resp.Header.Get("Upgrade") != "tcp" {
				t.Fatalf("%s %v", resp.Status, resp.Header)
			}
			if asked != (engine.AttachOptions{Stdin: true, Stdout: true, Stderr: true, Stream: true, Logs: true}) {
				t.Errorf("asked %+v", asked)
			}
			if _, err := io.WriteString(c, "input"); err != nil {
				t.Fatal(err)
			}
			if tt.tty {
				buf := make([]byte, 6)
				if _, err := io.ReadFull(br, buf); err != nil || string(buf) != "outerr" {
					t.Errorf("%q %v", buf, err)
				}
				if _, err := c.Write([]byte{16, 17}); err != nil { // ctrl-p ctrl-q
					t.Fatal(err)
				}
				if _, err := br.ReadByte(); err == nil {
					t.Error("not detached")
				}
				return
			}
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if got := <-p.stdin; got != "input" {
				t.Errorf("stdin %q", got)
			}
			r := br
			for _, want := range []frame{{1, "out"}, {2, "err"}} {
				if s, b, err := readFrame(r); err != nil || s != want.stream || string(b) != want.data {
					t.Errorf("%d %q %v, want %v", s, b, err, want)
				}
			}
			close(p.frames)
			if _, _, err := readFrame(r); !errors.Is(err, io.EOF) {
				t.Errorf("at the end: %v", err)
			}
		})
	}
}

func TestAttachErrorsHaveAStatus(t *testing.T) {
	n := serve(t, &fake{
		containers: []engine.Container{{ID: "abc", Name: "x"}},
		attach: func(string, engine.AttachOptions) (engine.Attachment, error) {
			return nil, fmt.Errorf("container x is paused: %w", errdefs.ErrConflict)
		},
	})
	for path, want := range map[string]int{"x/attach": 409, "nope/attach": 404, "x/attach?detachKeys=ctrl-1": 400} {
		if _, _, resp := n.hijack("/containers/"+path, ""); resp.StatusCode != want {
			t.Errorf("%s: %s, want %d", path, resp.Status, want)
		}
	}
}

func TestAttachWebSocket(t *testing.T) {
	p := newProcess(frame{1, "hello"})
	n := serve(t, &fake{
		containers: []engine.Container{{ID: "abc", Name: "x", Config: engine.Config{OpenStdin: true, StdinOnce: true}}},
		attach:     func(string, engine.AttachOptions) (engine.Attachment, error) { return p, nil },
	})
	config, err := websocket.NewConfig("ws://localhost/containers/x/attach/ws?stream=1&stdin=1&stdout=1", "http://localhost")
	if err != nil {
		t.Fatal(err)
	}
	ws, err := websocket.NewClient(config, n.dial())
	if err != nil {
		t.Fatal(err)
	}
	var got []byte
	if err := websocket.Message.Receive(ws, &got); err != nil || string(got) != "hello" {
		t.Errorf("%q %v", got, err)
	}
	if err := websocket.Message.Send(ws, []byte("typed")); err != nil {
		t.Fatal(err)
	}
	ws.Close()
	if got := <-p.stdin; got != "typed" {
		t.Errorf("stdin %q", got)
	}
}

func TestExec(t *testing.T) {
	f := &fake{resized: make(chan [2]uint32, 1)}
	n := serve(t, f)
	n.expect(400, "POST", "/containers/x/exec", `{"Cmd":[]}`)
	n.expect(400, "POST", "/containers/x/exec", `{"Cmd":["a"],"DetachKeys":"ctrl-99"}`)
	if got := n.expect(201, "POST", "/containers/x/exec", `{"Cmd":["sh","-c"],"User":"1:2","Tty":true,"AttachStdout":true,"Env":["A=b"],"ConsoleSize":[24,80],"WorkingDir":"/w","Privileged":true}`); strings.TrimSpace(got) != `{"Id":"e1"}` {
		t.Error(got)
	}
	if c := f.execCreated; c.Container != "x" || c.User != "1:2" || !c.TTY || !c.Privileged || c.WorkingDir != "/w" || c.ConsoleSize != [2]uint{24, 80} {
		t.Errorf("%+v", c)
	}
	n.expect(404, "POST", "/exec/e1/start", `{}`)

	f.containers = []engine.Container{{ID: "abc", State: engine.State{Status: engine.StatusRunning}}}
	f.exec = &engine.Exec{ID: "e1", ContainerID: "abc", Config: engine.ExecConfig{Cmd: []string{"sh", "-c"}, AttachStdin: true, AttachStdout: true}}
	p := newProcess(frame{1, "done"})
	close(p.frames)
	f.attachExec = func() (engine.Attachment, error) { return p, nil }
	_, br, resp := n.hijack("/v1.50/exec/e1/start", `{"Detach":false,"Tty":false}`)
	if resp.StatusCode != 101 {
		t.Fatal(resp.Status)
	}
	if _, b, err := readFrame(br); err != nil || string(b) != "done" {
		t.Errorf("%q %v", b, err)
	}

	// The command is not there: the text goes into the stream, and the client asks for the exit code.
	f.attachExec = func() (engine.Attachment, error) { return nil, notFoundf("exec: nope: not found") }
	_, br, resp = n.hijack("/v1.50/exec/e1/start", `{}`)
	if resp.StatusCode != 101 {
		t.Fatal(resp.Status)
	}
	if _, b, err := readFrame(br); err != nil || string(b) != "exec: nope: not found\r\n" {
		t.Errorf("%q %v", b, err)
	}
	for _, st := range []engine.Status{engine.StatusPaused, engine.StatusExited} {
		f.containers[0].State.Status = st
		if _, _, resp := n.hijack("/v1.50/exec/e1/start", `{}`); resp.StatusCode != 409 {
			t.Errorf("%s: %s", st, resp.Status)
		}
	}
	f.containers[0].State.Status = engine.StatusRunning
	f.exec.Started = true
	if _, _, resp := n.hijack("/v1.50/exec/e1/start", `{}`); resp.StatusCode != 409 {
		t.Error(resp.Status)
	}
	code := 3
	f.exec.ExitCode = &code
	got := n.expect(200, "GET", "/exec/e1/json", "")
	for _, want := range []string{`"ExitCode":3`, `"entrypoint":"sh"`, `"arguments":["-c"]`, `"ContainerID":"abc"`, `"Running":false`} {
		if !strings.Contains(got, want) {
			t.Errorf("%s lacks %s", got, want)
		}
	}
}

func TestResize(t *testing.T) {
	f := &fake{resized: make(chan [2]uint32, 1)}
	n := serve(t, f)
	n.expect(200, "POST", "/containers/x/resize?h=40&w=100", "")
	if got := <-f.resized; got != [2]uint32{100, 40} {
		t.Error(got)
	}
	for _, q := range []string{"", "?h=40", "?h=x&w=1", "?h=-1&w=1", "?h=1&w=70000"} {
		n.expect(400, "POST", "/containers/x/resize"+q, "")
	}
}

func TestLogs(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 60, time.UTC)
	entries := []engine.LogEntry{
		{Stream: 1, Time: at, Line: []byte("one\n"), Attrs: map[string]string{"b": "2 3", "a": "1"}},
		{Stream: 2, Time: at, Line: []byte("half "), Partial: true},
		{Stream: 1, Time: at, Line: []byte("two\n")},
		{Stream: 2, Time: at, Line: []byte("whole\n")},
	}
	var asked engine.LogOptions
	f := &fake{
		containers: []engine.Container{{ID: "abc", Name: "x"}, {ID: "def", Name: "tty", Config: engine.Config{TTY: true}}},
		logs: func(_ context.Context, _ string, o engine.LogOptions) (iter.Seq2[engine.LogEntry, error], error) {
			asked = o
			return func(yield func(engine.LogEntry, error) bool) {
				for _, e := range entries {
					if !yield(e, nil) {
						return
					}
				}
			}, nil
		},
	}
	n := serve(t, f)
	frames := func(query string) (out []frame) {
		r := strings.NewReader(n.expect(200, "GET", "/v1.50/containers/x/logs?stdout=1&stderr=1"+query, ""))
		for {
			s, b, err := readFrame(r)
			if errors.Is(err, io.EOF) {
				return out
			}
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, frame{s, string(b)})
		}
	}
	if got, want := fmt.Sprint(frames("")), fmt.Sprint([]frame{{1, "one\n"}, {2, "half "}, {1, "two\n"}, {2, "whole\n"}}); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	const ts = "2026-01-02T03:04:05.000000060Z "
	if got, want := fmt.Sprint(frames("&timestamps=1&details=1&tail=5&since=1700000000.5&until=2030-01-01T00:00:00Z")),
		fmt.Sprint([]frame{{1, ts + "a=1,b=2+3 one\n"}, {2, ts + " half "}, {1, ts + " two\n"}, {2, "whole\n"}}); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if asked.Tail != 5 || !asked.Since.Equal(time.Unix(1700000000, 5e8)) || asked.Until.Year() != 2030 || !asked.Details {
		t.Errorf("%+v", asked)
	}
	if got := n.expect(200, "GET", "/containers/tty/logs?stdout=1&tail=all", ""); got != "one\nhalf two\nwhole\n" {
		t.Errorf("%q", got)
	}
	if asked.Tail != -1 || asked.Stderr {
		t.Errorf("%+v", asked)
	}
	for _, q := range []string{"", "?stdout=0", "?stdout=1&tail=x", "?stdout=1&since=x", "?stdout=1&since=99999999999999999999"} {
		n.expect(400, "GET", "/containers/x/logs"+q, "")
	}
	n.expect(404, "GET", "/containers/nope/logs?stdout=1", "")
}

func TestLogsFollowIsPrompt(t *testing.T) {
	more := make(chan string)
	ended := make(chan struct{})
	n := serve(t, &fake{
		containers: []engine.Container{{ID: "def", Name: "x", Config: engine.Config{TTY: true}}},
		logs: func(ctx context.Context, _ string, _ engine.LogOptions) (iter.Seq2[engine.LogEntry, error], error) {
			return func(yield func(engine.LogEntry, error) bool) {
				defer close(ended)
				for {
					select {
					case <-ctx.Done():
						return
					case s := <-more:
						if !yield(engine.LogEntry{Stream: 1, Line: []byte(s)}, nil) {
							return
						}
					}
				}
			}, nil
		},
	})
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", "http://docker/containers/x/logs?stdout=1&follow=1", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := n.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	buf := make([]byte, 5)
	for range 3 {
		more <- "line\n"
		if _, err := io.ReadFull(resp.Body, buf); err != nil || string(buf) != "line\n" {
			t.Fatalf("%q %v", buf, err)
		}
	}
	cancel()
	select {
	case <-ended:
	case <-time.After(5 * time.Minute):
		t.Error("still following after the client left")
	}
}

func lines(t *testing.T, s string) (out []map[string]any) {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(s))
	for {
		var m map[string]any
		if err := dec.Decode(&m); errors.Is(err, io.EOF) {
			return out
		} else if err != nil {
			t.Fatalf("%v in %q", err, s)
		}
		out = append(out, m)
	}
}

func TestPull(t *testing.T) {
	var ref string
	var options engine.PullOptions
	f := &fake{}
	n := serve(t, f)
	f.pull = func(r string, o engine.PullOptions) error {
		ref, options = r, o
		o.Progress(engine.Progress{ID: "abc", Action: "Downloading", Current: 1, Total: 10})
		o.Progress(engine.Progress{ID: "abc", Action: "Downloading", Current: 2, Total: 10}) // too soon after the first
		o.Progress(engine.Progress{ID: "abc", Action: "Downloading", Current: 10, Total: 10})
		o.Progress(engine.Progress{ID: "abc", Action: "Pull complete"})
		o.Progress(engine.Progress{Message: "Status: Downloaded newer image for alpine:3"})
		return nil
	}
	auth := base64.URLEncoding.EncodeToString([]byte(`{"username":"u","password":"p?>","serveraddress":"r"}`))
	got := lines(t, n.expect(200, "POST", "/v1.50/images/create?fromImage=alpine&tag=3&platform=linux/arm64", "", "X-Registry-Auth", auth))
	if len(got) != 4 || got[0]["id"] != "abc" || got[0]["status"] != "Downloading" ||
		fmt.Sprint(got[0]["progressDetail"]) != "map[current:1 total:10]" || got[3]["status"] != "Status: Downloaded newer image for alpine:3" {
		t.Errorf("%v", got)
	}
	if ref != "docker.io/library/alpine:3" || options.AllTags || options.Platform.Architecture != "arm64" ||
		options.Auth == nil || *options.Auth != (engine.RegistryAuth{Username: "u", Password: "p?>", ServerAddress: "r"}) {
		t.Errorf("%s %+v %+v", ref, options, options.Auth)
	}

	const digest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for query, want := range map[string]string{
		"fromImage=alpine&tag=" + digest: "docker.io/library/alpine@" + digest + " false",
		"fromImage=alpine@" + digest:     "docker.io/library/alpine@" + digest + " false",
		"fromImage=localhost:5000/a/b:v": "localhost:5000/a/b:v false",
		"fromImage=alpine":               "docker.io/library/alpine true",
	} {
		n.expect(200, "POST", "/images/create?"+query, "", "X-Registry-Auth", "%%% broken")
		if got := fmt.Sprint(ref, " ", options.AllTags); got != want {
			t.Errorf("%s: %s, want %s", query, got, want)
		}
		if options.Auth != nil {
			t.Errorf("%s: auth %+v", query, options.Auth)
		}
	}
	for query, code := range map[string]int{
		"": 400, "fromImage=UPPER": 400, "fromImage=a&tag=b%20c": 400, "fromImage=a&platform=nope/x/y/z/": 400, "fromSrc=http%3A%2F%2Fx": 501,
	} {
		n.expect(code, "POST", "/images/create?"+query, "")
	}

	f.pull = func(string, engine.PullOptions) error { return notFoundf("manifest for x:y not found") }
	n.expect(404, "POST", "/images/create?fromImage=x&tag=y", "")
	f.pull = func(_ string, o engine.PullOptions) error {
		o.Progress(engine.Progress{Message: "Pulling from x"})
		return errors.New("connection reset")
	}
	got = lines(t, n.expect(200, "POST", "/images/create?fromImage=x&tag=y", ""))
	if last := got[len(got)-1]; last["error"] != "connection reset" || fmt.Sprint(last["errorDetail"]) != "map[message:connection reset]" {
		t.Errorf("%v", got)
	}
}

func TestPush(t *testing.T) {
	d := engine.ImageDetail{}
	d.Target.Digest, d.Target.Size = "sha256:aa", 123
	f := &fake{images: map[string]engine.ImageDetail{"localhost:5000/a/b:v1": d, "plain": d}}
	n := serve(t, f)
	var ref string
	f.push = func(r string, o engine.PushOptions) error {
		ref = r
		o.Progress(engine.Progress{ID: "l", Action: "Pushed"})
		return nil
	}
	got := lines(t, n.expect(200, "POST", "/images/localhost:5000/a/b/push?tag=v1", ""))
	if ref != "localhost:5000/a/b:v1" || fmt.Sprint(got[len(got)-1]) != "map[aux:map[Digest:sha256:aa Size:123 Tag:v1]]" {
		t.Errorf("%s %v", ref, got)
	}
	n.expect(404, "POST", "/images/nope/push", "")
	n.expect(400, "POST", "/images/plain/push?tag=a+b", "")
}

func TestLoadAndSave(t *testing.T) {
	f := &fake{}
	n := serve(t, f)
	f.load = func(r io.Reader, o engine.LoadOptions) ([]engine.LoadedImage, error) {
		b, err := io.ReadAll(r)
		if err != nil || string(b) != "tar" {
			return nil, invalidf("not a tar: %q", b)
		}
		if o.Progress != nil {
			o.Progress(engine.Progress{ID: "l", Action: "Loading layer", Current: 1, Total: 2})
		}
		return []engine.LoadedImage{{Names: []string{"docker.io/library/a:1"}}, {Image: engine.ImageRecord{ID: "sha256:bb"}}}, nil
	}
	got := lines(t, n.expect(200, "POST", "/images/load?quiet=1", "tar", "Content-Type", "application/x-tar"))
	if fmt.Sprint(got) != "[map[stream:Loaded image: a:1\n] map[stream:Loaded image ID: sha256:bb\n]]" {
		t.Errorf("%v", got)
	}
	if got := lines(t, n.expect(200, "POST", "/images/load?quiet=0", "tar")); len(got) != 3 {
		t.Errorf("%v", got)
	}
	n.expect(400, "POST", "/images/load", "zip")

	var refs []string
	f.save = func(r []string, w io.Writer) error {
		refs = r
		if r[0] == "nope" {
			return notFoundf("No such image: nope")
		}
		_, err := io.WriteString(w, "tar")
		if r[0] == "bad" {
			return errors.New("disk error")
		}
		return err
	}
	resp, body := n.do("GET", "/images/get?names=a:1&names=b/c", "")
	if body != "tar" || resp.Header.Get("Content-Type") != "application/x-tar" || fmt.Sprint(refs) != "[a:1 b/c]" {
		t.Errorf("%q %v %v", body, resp.Header, refs)
	}
	n.expect(200, "GET", "/images/docker.io/library/a:1/get", "")
	if fmt.Sprint(refs) != "[docker.io/library/a:1]" {
		t.Errorf("%v", refs)
	}
	n.expect(404, "GET", "/images/nope/get", "")
	n.expect(400, "GET", "/images/get", "")
	resp, err := n.client.Get("http://docker/images/bad/get")
	if err == nil {
		_, err = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	if err == nil {
		t.Error("a save that failed half way looks whole")
	}
}

func TestArchive(t *testing.T) {
	f := &fake{}
	n := serve(t, f)
	f.get = func(p string) (io.ReadCloser, engine.PathStat, error) {
		return io.NopCloser(strings.NewReader("tar of " + p)), engine.PathStat{Name: "f", Size: 3, Mode: 0o644}, nil
	}
	resp, body := n.do("GET", "/containers/x/archive?path=/etc/f", "")
	b, err := base64.StdEncoding.DecodeString(resp.Header.Get("X-Docker-Container-Path-Stat"))
	if body != "tar of /etc/f" || err != nil || !bytes.Contains(b, []byte(`"name":"f","size":3,"mode":420`)) {
		t.Errorf("%q %s %v", body, b, err)
	}
	f.put = func(p string, r io.Reader, o engine.PutOptions) error {
		if b, err := io.ReadAll(r); err != nil || string(b) != "tar" || p != "/d" || !o.NoOverwriteDirNonDir || o.CopyUIDGID {
			return invalidf("%q %v %s %+v", b, err, p, o)
		}
		return nil
	}
	n.expect(200, "PUT", "/containers/x/archive?path=/d&noOverwriteDirNonDir=true", "tar", "Content-Type", "application/x-tar")
	n.expect(400, "PUT", "/containers/x/archive", "tar")
	n.expect(400, "GET", "/containers/x/archive", "")
}

func TestStats(t *testing.T) {
	sample := uint64(0)
	f := &fake{
		containers: []engine.Container{{ID: "abc", Name: "x"}},
		stats: func() (engine.Stats, error) {
			sample++
			return engine.Stats{
				Read: time.Unix(int64(sample), 0), CPUTotal: 100 * sample, SystemCPU: 1000 * sample, OnlineCPUs: 2,
				MemUsage: 5, MemStats: map[string]uint64{"inactive_file": 1}, Pids: 3,
				Networks: map[string]engine.NetStats{"eth0": {RxBytes: 9}},
				Blkio:    []engine.BlkioEntry{{Major: 8, Op: "Read", Bytes: 7, Ops: 1}},
			}, nil
		},
	}
	n := serve(t, f)
	cpu := func(m map[string]any, key string) any {
		return m[key].(map[string]any)["cpu_usage"].(map[string]any)["total_usage"]
	}
	one := lines(t, n.expect(200, "GET", "/containers/x/stats?stream=0&one-shot=1", ""))
	if len(one) != 1 || cpu(one[0], "cpu_stats") != 100.0 || cpu(one[0], "precpu_stats") != 0.0 || one[0]["name"] != "/x" {
		t.Errorf("%v", one)
	}
	two := lines(t, n.expect(200, "GET", "/containers/x/stats?stream=0", ""))
	if len(two) != 1 || cpu(two[0], "cpu_stats") != 300.0 || cpu(two[0], "precpu_stats") != 200.0 {
		t.Errorf("%v", two)
	}
	n.expect(400, "GET", "/containers/x/stats?one-shot=1", "")
	n.expect(404, "GET", "/containers/nope/stats", "")
	f.stats = func() (engine.Stats, error) {
		return engine.Stats{}, fmt.Errorf("not running: %w", errdefs.ErrConflict)
	}
	if got := lines(t, n.expect(200, "GET", "/containers/x/stats?stream=0", "")); len(got) != 1 || got[0]["read"] != "0001-01-01T00:00:00Z" {
		t.Errorf("%v", got)
	}
}

func TestEvents(t *testing.T) {
	e := engine.Event{Type: "container", Action: "die", ID: "abc", Attributes: map[string]string{"image": "i", "exitCode": "1"}, Time: time.Unix(5, 6)}
	var filters engine.Filters
	n := serve(t, &fake{eventStream: func(_ context.Context, since, _ time.Time, f engine.Filters) (<-chan engine.Event, error) {
		filters = f
		ch := make(chan engine.Event, 1)
		ch <- e
		close(ch)
		return ch, nil
	}})
	got := n.expect(200, "GET", `/v1.50/events?since=1&until=2&filters={"type":["container"]}`, "")
	if want := `{"status":"die","id":"abc","from":"i","Type":"container","Action":"die","Actor":{"ID":"abc","Attributes":{"exitCode":"1","image":"i"}},"scope":"local","time":5,"timeNano":5000000006}`; strings.TrimSpace(got) != want {
		t.Errorf("%s, want %s", got, want)
	}
	if fmt.Sprint(filters) != "map[type:[container]]" {
		t.Error(filters)
	}
	resp, got := n.do("GET", `/v1.52/events`, "", "Accept", "application/json-seq, application/json")
	if resp.Header.Get("Content-Type") != "application/json-seq" || !strings.HasPrefix(got, "\x1e{\"Type\":") {
		t.Errorf("%v %q", resp.Header, got)
	}
	n.expect(400, "GET", `/events?since=3&until=2`, "")
	n.expect(400, "GET", `/events?filters={"colour":["red"]}`, "")
}

func TestEventsBeginAtOnceAndEndAtShutdown(t *testing.T) {
	n := serve(t, &fake{eventStream: func(ctx context.Context, _, _ time.Time, _ engine.Filters) (<-chan engine.Event, error) {
		ch := make(chan engine.Event)
		context.AfterFunc(ctx, func() { close(ch) })
		return ch, nil
	}})
	resp, err := n.client.Get("http://docker/events")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := n.server.Shutdown(ctx); err != nil {
		t.Error(err)
	}
}
