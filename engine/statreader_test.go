package engine

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestStatReader(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("n", "42\n")
	write("max", "max\n")
	write("flat", "a 1\nb 2\nab 3\n")
	write("long", strings.Repeat("padding 0\n", 400)+"last 7\n")
	write("cpu.pressure", "some avg10=1.50 avg60=2.00 avg300=0.25 total=3\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5\n")
	kept := map[statFile]*os.File{}
	for range 2 { // the second time from files that are open
		for _, r := range []*statReader{{}, {kept: kept}} {
			if n := r.number(dir, "n"); n != 42 {
				t.Errorf("number: %d", n)
			}
			if n := r.number(dir, "max") + r.number(dir, "missing") + r.number("", "n"); n != 0 {
				t.Errorf("max, missing file, missing controller: %d", n)
			}
			var b, ab, none, last uint64
			r.flat(dir, "flat", field{"b", &b}, field{"ab", &ab}, field{"c", &none})
			r.flat(dir, "long", field{"last", &last})
			if b != 2 || ab != 3 || none != 0 || last != 7 {
				t.Errorf("flat: b %d, ab %d, none %d, last %d", b, ab, none, last)
			}
			p := r.psi(dir, "cpu.pressure")
			if p == nil || p.Some.Avg10 != 1.5 || p.Some.Avg60 != 2 || p.Some.Avg300 != 0.25 || p.Some.Total != 3000 || p.Full.Total != 5000 {
				t.Errorf("psi: %+v", p)
			}
			if p := r.psi(dir, "io.pressure"); p != nil {
				t.Errorf("psi of a missing file: %+v", p)
			}
		}
	}
	if f, known := kept[statFile{dir, "missing"}]; !known || f != nil || kept[statFile{dir, "n"}] == nil {
		t.Errorf("kept: %v", kept)
	}
}
