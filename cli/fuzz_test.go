package cli

import (
	"bytes"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/spf13/pflag"
)

// FuzzRunFlags: whatever stands behind `hako run` is understood or refused in words, and never a panic.
func FuzzRunFlags(f *testing.F) {
	for _, seed := range []string{
		"--name\x00web\x00-p\x00127.0.0.1:8080-8090:80-90/udp\x00-v\x00data:/data:ro\x00image\x00cmd",
		"--mount\x00type=volume,dst=/a,volume-opt=k=v,\"x\x00--ulimit\x00nofile=1:2\x00--device\x00/dev/a:/b:rwm\x00image",
		"--network\x00name=n,alias=a,ip=::1\x00--tmpfs\x00/t:size=1m\x00--gpus\x00all\x00--cpus\x001e-9\x00image",
		"--restart\x00on-failure:9999999999999999999\x00--health-cmd\x00x\x00-e\x00=\x00--add-host\x00h:host-gateway\x00image",
		"--link\x00:\x00--blkio-weight-device\x00:\x00--device-read-bps\x00/dev/x:1kib\x00--security-opt\x00seccomp=\x00image",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, line string) {
		args := strings.Split(line, "\x00")
		for _, a := range args {
			if strings.Contains(a, "file") || strings.Contains(a, "seccomp=") { // these read files of this machine
				return
			}
		}
		var c containerFlags
		fs := pflag.NewFlagSet("run", pflag.ContinueOnError)
		fs.SetInterspersed(false)
		c.register(fs)
		if err := fs.Parse(args); err != nil || fs.NArg() == 0 { // without an image the command ends before
			return
		}
		if _, err := c.parse(fs.Args()); err != nil && strings.TrimSpace(err.Error()) == "" {
			t.Error("refused without a word")
		}
	})
}

// FuzzTable: any template and any names make a table, or an error; no line is wider than asked for, but for
// what is never cut.
func FuzzTable(f *testing.F) {
	f.Add(`{{.ID}}\t{{.Names}}`, "name\tx", 20)
	f.Add(`table {{.ID | upper}}`, "日本語", 3)
	f.Add(`{{range .}}{{json .}}{{end}}{{.Nope}}`, "", -1)
	f.Fuzz(func(t *testing.T, format, name string, limit int) {
		if len(format)+len(name) > 1<<12 || limit > 1<<12 {
			return
		}
		var b bytes.Buffer
		_ = volumeList.print(&b, []any{fuzzRow{name}}, format, false)
		lines := [][]string{{"A", "B"}, strings.Split(name, "\t")}
		for line := range strings.Lines(layout(lines, limit)) {
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); limit >= 60 && len(lines[1]) <= 3 && !strings.Contains(name, "\n") && n > limit {
				t.Errorf("%d columns: %q", n, line)
			}
		}
	})
}

type fuzzRow struct{ name string }

func (r fuzzRow) ID() string    { return r.name }
func (r fuzzRow) Names() string { return r.name }
