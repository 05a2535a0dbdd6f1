package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/hako-engine/hako/image/verify"
)

const testKey = `-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEhIerKMsHjH+vw/MNIMCH+hPm5w1M
m88YIvVH/dyAR8v78UIXwxwe2zQAaogXAjfTKuAQ66qygIzACmKI1Y+E2A==
-----END PUBLIC KEY-----
`

type fakeRuntimes struct {
	set  map[string]string
	kept []string
}

func (f *fakeRuntimes) SetRuntimes(m map[string]string) []string {
	f.set = maps.Clone(m)
	return f.kept
}

// fakeRules remembers the rules, and does not take those with a keys.
type fakeRules struct{ set map[string]verify.Rule }

func (f *fakeRules) SetRules(m map[string]verify.Rule) error {
	for _, r := range m {
		if len(r.Keys) > 0 {
			return errors.New("its key went away")
		}
	}
	f.set = maps.Clone(m)
	return nil
}

func TestReload(t *testing.T) {
	t.Parallel()
	path := writeConfig(t, "log-level = 'info'\n")
	read := func() (config, error) { return settings(path, false, []string{"--mtu", "1400"}) }
	cfg, err := read()
	if err != nil || cfg.MTU != 1400 {
		t.Fatalf("%+v, %v", cfg, err)
	}
	var out bytes.Buffer
	log, level := newLogger(cfg, &out)
	eng, rules := &fakeRuntimes{kept: []string{"old"}}, &fakeRules{}
	r := &reloader{read: read, now: cfg, level: level, log: log}
	reload := func(text string) string {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		out.Reset()
		r.apply(eng, rules)
		return out.String()
	}

	got := reload("log-level = 'debug'\nmtu = 9000\nbridge-name = 'x0'\n[runtimes]\nrunc = '/usr/bin/runc'\n")
	if level.Level() != slog.LevelDebug || eng.set["runc"] != "/usr/bin/runc" {
		t.Errorf("level %v, runtimes %v", level.Level(), eng.set)
	}
	// The flag goes before the file, so mtu has not changed.
	for _, want := range []string{"changed=\"[log-level runtimes]\"", "runtimes=[old]", "after a restart of the daemon\" keys=[bridge-name]"} {
		if !strings.Contains(got, want) {
			t.Errorf("%s lacks %s", got, want)
		}
	}
	// What is wrong changes nothing.
	eng.set = nil
	for _, bad := range []string{"log-level = 'loud'\n", "log-levell = 'warn'\n", "= =\n"} {
		if got := reload(bad); !strings.Contains(got, "not reloaded") || level.Level() != slog.LevelDebug || eng.set != nil {
			t.Errorf("%q: %s", bad, got)
		}
	}
	// Rules that were good when they were read, and cannot be taken.
	key := filepath.Join(t.TempDir(), "cosign.pub")
	if err := os.WriteFile(key, []byte(testKey), 0o600); err != nil {
		t.Fatal(err)
	}
	withKey := "log-level = 'warn'\n[verify.'a.example']\nkeys = ['" + key + "']\n"
	if got := reload(withKey); !strings.Contains(got, "went away") || level.Level() != slog.LevelDebug {
		t.Errorf("%s: level %v", got, level.Level())
	}
	if got := reload("[verify.'a.example']\npolicy = 'reject'\n"); rules.set["a.example"].Policy != verify.Reject || strings.Contains(got, "restart") {
		t.Errorf("%s: %v", got, rules.set)
	}
	if err := os.Remove(path); err != nil { // it may be missing: the defaults
		t.Fatal(err)
	}
	out.Reset()
	r.apply(eng, rules)
	if level.Level() != slog.LevelInfo || len(eng.set)+len(rules.set) != 0 {
		t.Errorf("without a file: level %v, runtimes %v", level.Level(), eng.set)
	}
	r.read = func() (config, error) { return config{}, errors.New("no") }
	r.apply(eng, rules)
}

// TestConfigDocumented holds docs/config.md to the code: each key is there, once, with its default and with when a
// change of it counts, and no other.
func TestConfigDocumented(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("../../docs/config.md")
	if err != nil {
		t.Fatal(err)
	}
	var seen []string
	for line := range strings.Lines(string(doc)) {
		cells := strings.Split(line, "|")
		if !strings.HasPrefix(line, "| `") || len(cells) < 6 {
			continue
		}
		key := strings.Trim(cells[1], " `")
		seen = append(seen, key)
		if slices.Index(keys(), key) < 0 {
			t.Errorf("docs/config.md has %s, which is no key", key)
			continue
		}
		if got, want := strings.TrimSpace(cells[2]), defaultOf(key); want != "" && !strings.HasPrefix(got, "`"+want+"`") || want == "" && strings.HasPrefix(got, "`") && !chosen[key] {
			t.Errorf("docs/config.md: the default of %s is %s, not %q", key, got, want)
		}
		want := "at the next start"
		if reloads(t, key) {
			want = "at SIGHUP"
		}
		if got := strings.TrimSpace(cells[3]); got != want {
			t.Errorf("docs/config.md: a change of %s counts %s, not %s", key, want, got)
		}
	}
	for _, key := range keys() {
		if n := len(slices.DeleteFunc(slices.Clone(seen), func(k string) bool { return k != key })); n != 1 {
			t.Errorf("docs/config.md has %s %d times", key, n)
		}
	}
}

// chosen are the keys whose default depends on the machine.
var chosen = map[string]bool{"cgroup-driver": true, "bridge-subnet": true}

// defaultOf is what the configuration has without a file, "" for what is empty or a table.
func defaultOf(key string) string {
	c := defaultConfig()
	switch v := reflect.ValueOf(c).Field(slices.Index(keys(), key)); {
	case v.Kind() == reflect.Map:
		return ""
	case v.Interface() == unset:
		return strings.TrimSuffix(key, "-socket") + ".sock"
	default:
		return fmt.Sprint(v.Interface())
	}
}

// reloads tells whether a running daemon takes a change of a key.
func reloads(t *testing.T, key string) bool {
	t.Helper()
	next := defaultConfig()
	v := reflect.ValueOf(&next).Elem().Field(slices.Index(keys(), key))
	switch v.Kind() {
	case reflect.String:
		v.SetString("debug")
	case reflect.Int:
		v.SetInt(v.Int() + 1)
	case reflect.Float64:
		v.SetFloat(v.Float() / 2)
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(reflect.ValueOf("x"), reflect.New(v.Type().Elem()).Elem())
	default:
		t.Fatalf("%s: what is another %s?", key, v.Kind())
	}
	r := &reloader{read: func() (config, error) { return next, nil }, now: defaultConfig(), level: new(slog.LevelVar), log: slog.New(slog.DiscardHandler)}
	r.apply(&fakeRuntimes{}, &fakeRules{})
	return len(changed(r.now, next)) == 0
}
