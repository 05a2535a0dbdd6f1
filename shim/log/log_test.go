package log

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func open(t testing.TB, c Config) *Writer {
	t.Helper()
	if c.Path == "" {
		c.Path = filepath.Join(t.TempDir(), "x.log")
	}
	w, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

func write(t testing.TB, w io.Writer, s string) {
	t.Helper()
	if n, err := io.WriteString(w, s); n != len(s) || err != nil {
		t.Fatalf("wrote %d of %d: %v", n, len(s), err)
	}
}

// all reads a log to its end.
func all(t testing.TB, c Config, o ReadOptions) (lines []string) {
	t.Helper()
	o.Format = c.Format
	for e, err := range Read(context.Background(), c.Path, o) {
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, e.Stream+":"+string(e.Line))
	}
	return lines
}

func TestJSONRecord(t *testing.T) {
	ts := []byte("2026-01-02T03:04:05.6Z")
	for _, c := range []struct {
		line, want string
		whole      bool
	}{
		{"hello", `{"log":"hello\n","stream":"stdout","time":"2026-01-02T03:04:05.6Z"}`, true},
		{"", `{"log":"\n","stream":"stdout","time":"2026-01-02T03:04:05.6Z"}`, true},
		{"part", `{"log":"part","stream":"stdout","time":"2026-01-02T03:04:05.6Z"}`, false},
		{"a\r", `{"log":"a\r\n","stream":"stdout","time":"2026-01-02T03:04:05.6Z"}`, true},
		{"\t\x00\x7f\"\\<>&", `{"log":"\u0009\u0000` + "\x7f" + `\"\\\u003c\u003e\u0026\n","stream":"stdout","time":"2026-01-02T03:04:05.6Z"}`, true},
		{"ü\xff\u2028箱", `{"log":"ü\ufffd\u2028箱\n","stream":"stdout","time":"2026-01-02T03:04:05.6Z"}`, true},
	} {
		got := appendJSON(nil, ts, Stdout, nil, []byte(c.line), c.whole)
		if string(got) != c.want+"\n" {
			t.Errorf("%q:\n got %s\nwant %s", c.line, got, c.want)
		}
		if !json.Valid(got) {
			t.Errorf("%q: not JSON: %s", c.line, got)
		}
	}
	attrs := encodeAttrs(map[string]string{"tag": "x\"y", "env": "a"})
	got := appendJSON(nil, ts, Stderr, attrs, []byte("l"), true)
	if want := `{"log":"l\n","stream":"stderr","attrs":{"env":"a","tag":"x\"y"},"time":"2026-01-02T03:04:05.6Z"}` + "\n"; string(got) != want {
		t.Errorf("got %s", got)
	}
}

func TestCRIRecord(t *testing.T) {
	ts := []byte("2016-10-06T00:17:09.669794202Z")
	for _, c := range []struct {
		line, want string
		whole      bool
	}{
		{"The content of the log entry 1", "2016-10-06T00:17:09.669794202Z stdout F The content of the log entry 1\n", true},
		{"First line of log entry 2", "2016-10-06T00:17:09.669794202Z stdout P First line of log entry 2\n", false},
		{"", "2016-10-06T00:17:09.669794202Z stdout F \n", true},
		{"x\r", "2016-10-06T00:17:09.669794202Z stdout F x\n", true},
	} {
		if got := appendCRI(nil, ts, Stdout, []byte(c.line), c.whole); string(got) != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}

func TestPieces(t *testing.T) {
	for _, format := range []string{FormatJSON, FormatCRI} {
		for _, step := range []int{1 << 20, maxPiece, 1000, 7} {
			c := Config{Format: format, Path: filepath.Join(t.TempDir(), "x.log")}
			w := open(t, c)
			s := w.Stream(Stdout)
			long := strings.Repeat("0123456789abcdef", 2*maxPiece/16) // exactly two pieces
			text := "short\n" + long + "\n" + long + "tail\n" + "\n" + "no end"
			for p := text; len(p) > 0; {
				n := min(step, len(p))
				write(t, s, p[:n])
				p = p[n:]
			}
			s.Close()
			var got strings.Builder
			for _, l := range all(t, c, ReadOptions{Tail: -1}) {
				line := strings.TrimPrefix(l, "stdout:")
				if len(strings.TrimSuffix(line, "\n")) > maxPiece {
					t.Errorf("%s/%d: a record of %d bytes", format, step, len(line))
				}
				got.WriteString(line)
			}
			if got.String() != text {
				t.Errorf("%s/%d: %d bytes came back as %d", format, step, len(text), got.Len())
			}
			if w.Dropped() != 0 {
				t.Errorf("dropped %d", w.Dropped())
			}
		}
	}
}

// A character that lies across two pieces is not torn in JSON.
func TestPiecesKeepCharacters(t *testing.T) {
	c := Config{Format: FormatJSON, Path: filepath.Join(t.TempDir(), "x.log")}
	s := open(t, c).Stream(Stdout)
	text := "x" + strings.Repeat("箱", 20000) + "\n"
	for i := 0; i < len(text); i += 1000 {
		write(t, s, text[i:min(i+1000, len(text))])
	}
	got := strings.ReplaceAll(strings.Join(all(t, c, ReadOptions{Tail: -1}), ""), "stdout:", "")
	if got != text {
		t.Errorf("%d bytes came back as %d", len(text), len(got))
	}
}

// All pieces of a line carry the time of the first, and whole lines their own.
func TestPieceTimes(t *testing.T) {
	c := Config{Format: FormatJSON, Path: filepath.Join(t.TempDir(), "x.log")}
	s := open(t, c).Stream(Stdout)
	write(t, s, strings.Repeat("x", maxPiece+10))
	time.Sleep(2 * time.Millisecond)
	write(t, s, "end\nnext\n")
	var times []time.Time
	for e, err := range Read(t.Context(), c.Path, ReadOptions{Format: FormatJSON, Tail: -1}) {
		if err != nil {
			t.Fatal(err)
		}
		times = append(times, e.Time)
	}
	if len(times) != 3 || !times[0].Equal(times[1]) || !times[2].After(times[1]) {
		t.Errorf("times %v", times)
	}
}

func TestRotation(t *testing.T) {
	for _, compress := range []bool{false, true} {
		c := Config{Format: FormatJSON, Path: filepath.Join(t.TempDir(), "x.log"), MaxSize: 4000, MaxFiles: 200, Compress: compress}
		w := open(t, c)
		var wg sync.WaitGroup
		const lines = 3000
		for _, name := range []string{Stdout, Stderr} {
			s := w.Stream(name)
			wg.Go(func() {
				for i := range lines {
					fmt.Fprintf(s, "line %d\n", i)
				}
			})
		}
		wg.Wait()
		w.mu.Lock()
		w.zip.wait()
		w.mu.Unlock()
		got := all(t, c, ReadOptions{Tail: -1})
		next := map[string]int{}
		for _, l := range got {
			stream, _, _ := strings.Cut(l, ":")
			if want := fmt.Sprintf("%s:line %d\n", stream, next[stream]); l != want {
				t.Fatalf("compress %v: got %q, want %q", compress, l, want)
			}
			next[stream]++
		}
		if next[Stdout] != lines || next[Stderr] != lines {
			t.Errorf("compress %v: %v records", compress, next)
		}
		for i := 0; ; i++ {
			st, err := os.Stat(c.name(i))
			if err != nil {
				break
			}
			if st.Size() > c.MaxSize+200 {
				t.Errorf("%s has %d bytes", c.name(i), st.Size())
			}
		}
		if _, err := os.Stat(c.name(2) + gz); (err == nil) != compress {
			t.Errorf("compress %v: path.2.gz: %v", compress, err)
		}
		if _, err := os.Stat(c.name(1)); err != nil {
			t.Error(err)
		}
		// The tail counts through rotated files.
		tail := all(t, c, ReadOptions{Tail: 100})
		if len(tail) != 100 || tail[99] != got[len(got)-1] || tail[0] != got[len(got)-100] {
			t.Errorf("compress %v: tail of %d", compress, len(tail))
		}
	}
}

func TestRotationBounds(t *testing.T) {
	c := Config{Format: FormatCRI, Path: filepath.Join(t.TempDir(), "x.log"), MaxSize: 1000, MaxFiles: 3, Compress: true}
	w := open(t, c)
	s := w.Stream(Stdout)
	for i := range 500 {
		fmt.Fprintf(s, "line %d\n", i)
	}
	w.Close()
	entries, err := os.ReadDir(filepath.Dir(c.Path))
	if err != nil || len(entries) > 3 {
		t.Errorf("%d files, %v", len(entries), entries)
	}
	got := all(t, c, ReadOptions{Tail: -1})
	if len(got) == 0 || got[len(got)-1] != "stdout:line 499\n" {
		t.Errorf("%d records, last %q", len(got), got[len(got)-1:])
	}
	// A single file is emptied.
	c = Config{Format: FormatJSON, Path: filepath.Join(t.TempDir(), "x.log"), MaxSize: 1000}
	s = open(t, c).Stream(Stdout)
	for i := range 500 {
		fmt.Fprintf(s, "line %d\n", i)
	}
	if st, err := os.Stat(c.Path); err != nil || st.Size() > 1100 {
		t.Errorf("size %d, %v", st.Size(), err)
	}
}

func TestReopen(t *testing.T) {
	c := Config{Format: FormatCRI, Path: filepath.Join(t.TempDir(), "0.log")}
	w := open(t, c)
	s := w.Stream(Stdout)
	write(t, s, "one\n")
	old := c.Path + ".20261128"
	if err := os.Rename(c.Path, old); err != nil {
		t.Fatal(err)
	}
	write(t, s, "two\n")
	if err := w.Reopen(); err != nil {
		t.Fatal(err)
	}
	write(t, s, "three\n")
	a, _ := os.ReadFile(old)
	b, _ := os.ReadFile(c.Path)
	if bytes.Count(a, []byte("\n")) != 2 || !bytes.HasSuffix(b, []byte(" stdout F three\n")) || bytes.Count(b, []byte("\n")) != 1 {
		t.Errorf("old %q new %q", a, b)
	}
}

func TestTornRecord(t *testing.T) {
	c := Config{Format: FormatJSON, Path: filepath.Join(t.TempDir(), "x.log")}
	s := open(t, c).Stream(Stdout)
	write(t, s, "one\n")
	f, _ := os.OpenFile(c.Path, os.O_APPEND|os.O_WRONLY, 0)
	write(t, f, `{"log":"torn`)
	f.Close()
	if got := all(t, c, ReadOptions{Tail: -1}); len(got) != 1 {
		t.Errorf("with a torn end: %q", got)
	}
	s = open(t, c).Stream(Stdout)
	write(t, s, "two\n")
	if got := all(t, c, ReadOptions{Tail: -1}); len(got) != 2 || got[1] != "stdout:two\n" {
		t.Errorf("after it: %q", got)
	}
}

func TestDiskFull(t *testing.T) {
	c := Config{Format: FormatJSON, Path: filepath.Join(t.TempDir(), "x.log")}
	w := open(t, c)
	s := w.Stream(Stdout)
	write(t, s, "one\n")
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	good := w.mu.f
	w.mu.f = full
	write(t, s, "lost 1\nlost 2\n")
	w.mu.f = good
	write(t, s, "two\n")
	if got := all(t, c, ReadOptions{Tail: -1}); len(got) != 2 || w.Dropped() != 2 {
		t.Errorf("dropped %d, kept %q", w.Dropped(), got)
	}
}

func TestRead(t *testing.T) {
	c := Config{Format: FormatCRI, Path: filepath.Join(t.TempDir(), "x.log")}
	base := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	var b []byte
	for i := range 100 {
		b = appendCRI(b, base.Add(time.Duration(i)*time.Second).AppendFormat(nil, criTime), Stdout, fmt.Append(nil, i), true)
	}
	if err := os.WriteFile(c.Path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := all(t, c, ReadOptions{Tail: -1, Since: base.Add(10 * time.Second), Until: base.Add(19 * time.Second)}); len(got) != 10 || got[0] != "stdout:10\n" {
		t.Errorf("since and until: %q", got)
	}
	if got := all(t, c, ReadOptions{Tail: 3}); len(got) != 3 || got[0] != "stdout:97\n" {
		t.Errorf("tail: %q", got)
	}
	if got := all(t, c, ReadOptions{Tail: 0}); len(got) != 0 {
		t.Errorf("tail 0: %q", got)
	}
	if got := all(t, c, ReadOptions{Tail: 1000}); len(got) != 100 {
		t.Errorf("tail 1000: %d", len(got))
	}
	for _, err := range Read(t.Context(), c.Path+"x", ReadOptions{Format: FormatCRI}) {
		if !errdefs.IsNotFound(err) {
			t.Errorf("missing file: %v", err)
		}
	}
	for _, err := range Read(t.Context(), c.Path, ReadOptions{Format: "x"}) {
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("unknown format: %v", err)
		}
	}
	if _, err := Open(Config{Format: "x", Path: c.Path}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("open with unknown format: %v", err)
	}
}

// The follower sees every record, in order, through rotations that overtake it and
// compression behind it.
func TestFollow(t *testing.T) {
	for _, compress := range []bool{false, true} {
		c := Config{Format: FormatJSON, Path: filepath.Join(t.TempDir(), "x.log"), MaxSize: 50000, MaxFiles: 1000, Compress: compress}
		done := make(chan struct{})
		const lines = 20000
		go func() {
			defer close(done)
			time.Sleep(20 * time.Millisecond) // the follower waits for the file
			w, err := Open(c)
			if err != nil {
				t.Error(err)
				return
			}
			s := w.Stream(Stdout)
			for i := range lines {
				fmt.Fprintf(s, "line %d\n", i)
				if i%1000 == 0 {
					time.Sleep(time.Millisecond)
				}
			}
			w.Close()
		}()
		n := 0
		for e, err := range Read(t.Context(), c.Path, ReadOptions{Format: c.Format, Tail: -1, Follow: true, Done: done}) {
			if err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprintf("line %d\n", n); string(e.Line) != want {
				t.Fatalf("compress %v: got %q, want %q", compress, e.Line, want)
			}
			n++
			if n%2000 == 0 {
				time.Sleep(10 * time.Millisecond) // fall behind
			}
		}
		if n != lines {
			t.Errorf("compress %v: %d records", compress, n)
		}
	}
}

func TestFollowEnds(t *testing.T) {
	c := Config{Format: FormatJSON, Path: filepath.Join(t.TempDir(), "x.log")}
	s := open(t, c).Stream(Stdout)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	got := make(chan string)
	ended := make(chan error, 1)
	go func() {
		for e, err := range Read(ctx, c.Path, ReadOptions{Format: c.Format, Follow: true}) {
			if err != nil {
				ended <- err
				return
			}
			got <- string(e.Line)
		}
		ended <- nil
	}()
	for i := 0; ; i++ { // until the follower is at work: Tail is 0
		write(t, s, "x\n")
		select {
		case <-got:
		case <-time.After(10 * time.Millisecond):
			if i < 30000 {
				continue
			}
			t.Fatal("follower sees nothing")
		}
		break
	}
	cancel()
	for {
		select {
		case <-got:
			continue
		case err := <-ended:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("ended with %v", err)
			}
		case <-time.After(5 * time.Minute):
			t.Error("does not end")
		}
		break
	}
}

// A line of 10 MiB, and a malformed one, are read in bounded memory.
func TestLongLines(t *testing.T) {
	c := Config{Format: FormatJSON, Path: filepath.Join(t.TempDir(), "x.log")}
	s := open(t, c).Stream(Stdout)
	line := bytes.Repeat([]byte{'x'}, 10<<20)
	s.Write(append(line, '\n'))
	f, _ := os.OpenFile(c.Path, os.O_APPEND|os.O_WRONLY, 0)
	f.Write(append(line, '\n'))
	f.Close()
	write(t, s, "end\n")
	n, last := 0, ""
	allocs := testing.AllocsPerRun(1, func() {
		n = 0
		for e, err := range Read(t.Context(), c.Path, ReadOptions{Format: c.Format, Tail: -1}) {
			if err != nil {
				t.Fatal(err)
			}
			n += len(e.Line)
			last = string(e.Line)
			if len(e.Line) > maxPiece+1 {
				t.Fatalf("record of %d bytes", len(e.Line))
			}
		}
	})
	if n != 10<<20+1+4 || last != "end\n" {
		t.Errorf("%d bytes, last %q", n, last)
	}
	if allocs > 2000 {
		t.Errorf("%v allocations", allocs)
	}
}

func FuzzParseJSON(f *testing.F) {
	f.Add([]byte(`{"log":"hello\n","stream":"stdout","time":"2026-01-02T03:04:05.6Z"}`))
	f.Add([]byte(`{"log":"\u00fc\"\\\ud83d\ude00","stream":"stderr","attrs":{"a":"b"},"time":"2026-01-02T03:04:05.6Z"}`))
	f.Add([]byte(`{"log":"`))
	f.Fuzz(func(t *testing.T, rec []byte) {
		e, err := parseJSON(rec, nil)
		if fast, ok := parseJSONFast(rec, nil); ok {
			// Whatever the fast way takes, encoding/json takes in the same way.
			var r struct {
				Log, Stream string
				Time        time.Time
			}
			if err := json.Unmarshal(rec, &r); err != nil {
				t.Fatalf("fast parser took %q: %v", rec, err)
			}
			if r.Log != string(fast.Line) || r.Stream != fast.Stream || !r.Time.Equal(fast.Time) {
				t.Fatalf("%q: fast %+v, slow %+v", rec, fast, r)
			}
		}
		if err != nil {
			return
		}
		// What was parsed survives another round.
		if e.Stream != Stdout && e.Stream != Stderr || e.Time.Year() < 0 || e.Time.Year() > 9999 {
			return
		}
		line, whole := bytes.CutSuffix(e.Line, []byte("\n"))
		again := appendJSON(nil, e.Time.AppendFormat(nil, time.RFC3339Nano), e.Stream, encodeAttrs(e.Attrs), line, whole)
		e2, err := parseJSON(bytes.TrimSuffix(again, []byte("\n")), nil)
		if err != nil || !bytes.Equal(bytes.ToValidUTF8(e2.Line, nil), bytes.ToValidUTF8(e.Line, []byte("\ufffd"))) && !bytes.Equal(e2.Line, e.Line) {
			t.Fatalf("%q: %q, %v", e.Line, e2.Line, err)
		}
	})
}

func FuzzParseCRI(f *testing.F) {
	f.Add([]byte("2016-10-06T00:17:09.669794202Z stdout F The content"))
	f.Add([]byte("2016-10-06T00:17:09.669794202Z stderr P:x y"))
	f.Add([]byte("2016-10-06T00:17:09+01:00 stdout F "))
	f.Fuzz(func(t *testing.T, rec []byte) {
		e, err := parseCRI(rec, nil)
		if err != nil || bytes.ContainsAny(rec, "\n") {
			return
		}
		line, whole := bytes.CutSuffix(e.Line, []byte("\n"))
		again := appendCRI(nil, e.Time.AppendFormat(nil, time.RFC3339Nano), e.Stream, line, whole)
		e2, err := parseCRI(bytes.TrimSuffix(again, []byte("\n")), nil)
		if err != nil {
			t.Fatalf("%q: %v", again, err)
		}
		if want := e.Line; !bytes.Equal(e2.Line, want) && !(whole && bytes.HasSuffix(line, []byte("\r"))) {
			t.Fatalf("%q came back as %q", want, e2.Line)
		}
	})
}

// FuzzWriter: whatever is written in whatever pieces comes back.
func FuzzWriter(f *testing.F) {
	f.Add([]byte("a\nb\n\nc"), uint16(3), true)
	f.Fuzz(func(t *testing.T, data []byte, step uint16, cri bool) {
		c := Config{Format: FormatJSON, Path: filepath.Join(t.TempDir(), "x.log")}
		want := string(bytes.ToValidUTF8(data, nil))
		if cri {
			c.Format = FormatCRI
			want = strings.ReplaceAll(string(data), "\r", "")
			data = []byte(want)
		} else {
			data = []byte(want)
		}
		s := open(t, c).Stream(Stdout)
		for p := data; len(p) > 0; {
			n := min(len(p), int(step)+1)
			write(t, s, string(p[:n]))
			p = p[n:]
		}
		s.Close()
		got := strings.Join(all(t, c, ReadOptions{Tail: -1}), "")
		if got = strings.ReplaceAll(got, "stdout:", ""); got != strings.ReplaceAll(want, "stdout:", "") {
			t.Fatalf("%q came back as %q", want, got)
		}
	})
}

func benchmarkWrite(b *testing.B, format string) {
	w := open(b, Config{Format: format, MaxSize: 64 << 20, MaxFiles: 2})
	s := w.Stream(Stdout)
	chunk := bytes.Repeat([]byte("2026-01-01 INFO a line of a log of a usual length, as programs write them, 100 bytes with its end..\n"), 650)
	b.SetBytes(int64(len(chunk)))
	b.ReportAllocs()
	for b.Loop() {
		s.Write(chunk)
	}
}

func BenchmarkWriteJSON(b *testing.B) { benchmarkWrite(b, FormatJSON) }
func BenchmarkWriteCRI(b *testing.B)  { benchmarkWrite(b, FormatCRI) }

func benchmarkRead(b *testing.B, format string) {
	c := Config{Format: format, Path: filepath.Join(b.TempDir(), "x.log")}
	s := open(b, c).Stream(Stdout)
	for i := range 10000 {
		fmt.Fprintf(s, "%d a line of a log of a usual length, as programs write them, 100 bytes with its end.....\n", i)
	}
	st, _ := os.Stat(c.Path)
	b.SetBytes(st.Size())
	b.ReportAllocs()
	for b.Loop() {
		for _, err := range Read(context.Background(), c.Path, ReadOptions{Format: format, Tail: -1}) {
			if err != nil {
				b.Fatal(err)
			}
		}
	}
}

func BenchmarkReadJSON(b *testing.B) { benchmarkRead(b, FormatJSON) }
func BenchmarkReadCRI(b *testing.B)  { benchmarkRead(b, FormatCRI) }
