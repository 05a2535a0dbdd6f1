package engine

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/internal/execfile"
)

func TestAppArmorDecision(t *testing.T) {
	t.Parallel()
	off := hostFacts{}
	on := hostFacts{AppArmor: true, AppArmorProfile: apparmorProfile}
	bare := hostFacts{AppArmor: true} // no parser
	for name, tt := range map[string]struct {
		host       hostFacts
		opt        string
		privileged bool
		want       string
		refused    bool
	}{
		"by default":                     {host: on, want: "hako-default"},
		"privileged":                     {host: on, privileged: true, want: "unconfined"},
		"privileged, but":                {host: on, privileged: true, opt: "apparmor=mine", want: "mine"},
		"unconfined":                     {host: on, opt: "apparmor=unconfined", want: "unconfined"},
		"by name":                        {host: on, opt: "apparmor=mine", want: "mine"},
		"Docker's old form":              {host: on, opt: "apparmor:mine", want: "mine"},
		"without a parser":               {host: bare},
		"without a parser, privileged":   {host: bare, privileged: true},
		"without a parser, by name":      {host: bare, opt: "apparmor=mine", want: "mine"},
		"AppArmor off":                   {host: off},
		"AppArmor off, privileged":       {host: off, privileged: true},
		"AppArmor off, unconfined":       {host: off, opt: "apparmor=unconfined"},
		"AppArmor off, but by name":      {host: off, opt: "apparmor=mine", refused: true},
		"AppArmor off, but ours by name": {host: off, opt: "apparmor=hako-default", refused: true},
	} {
		in := goldenInput(Config{Privileged: tt.privileged})
		in.Host.AppArmor, in.Host.AppArmorProfile = tt.host.AppArmor, tt.host.AppArmorProfile
		if tt.opt != "" {
			in.C.Config.SecurityOpt = []string{tt.opt}
		}
		s, err := buildSpec(in)
		switch {
		case tt.refused:
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%s: %v", name, err)
			}
		case err != nil:
			t.Errorf("%s: %v", name, err)
		case s.Process.ApparmorProfile != tt.want:
			t.Errorf("%s: profile %q, want %q", name, s.Process.ApparmorProfile, tt.want)
		}
	}
}

func TestProbeAppArmor(t *testing.T) {
	t.Parallel()
	sys := t.TempDir()
	check := func(parser string, on bool, profile, why string) {
		t.Helper()
		gotOn, gotProfile, gotWhy := probeAppArmor(sys, parser)
		if gotOn != on || gotProfile != profile || !strings.Contains(gotWhy, why) || (why == "") != (gotWhy == "") {
			t.Errorf("%v %q %q, want %v %q %q", gotOn, gotProfile, gotWhy, on, profile, why)
		}
	}
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(sys, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	check("/sbin/apparmor_parser", false, "", "")
	write("module/apparmor/parameters/enabled", "N\n")
	check("/sbin/apparmor_parser", false, "", "")
	write("module/apparmor/parameters/enabled", "Y\n")
	check("/sbin/apparmor_parser", true, "", "securityfs")
	write("kernel/security/apparmor/profiles", "")
	check("", true, "", "apparmor_parser is not installed")
	check("/sbin/apparmor_parser", true, "hako-default", "")
}

// The profile is given to the parser when it is not in the kernel, or is an older daemon's.
func TestAppArmorEnsure(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	list, calls := filepath.Join(dir, "profiles"), filepath.Join(dir, "calls")
	parser := filepath.Join(dir, "parser")
	script := "#!/bin/sh\necho \"$@\" >>" + calls + "\ncat >" + dir + "/text\n[ ! -e " + dir + "/broken ] || { echo syntax error >&2; exit 1; }\necho 'hako-default (enforce)' >" + list + "\n"
	if err := execfile.Write(parser, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	// A profile of a similar name, and ours as another daemon loaded it.
	if err := os.WriteFile(list, []byte("hako-default-2 (enforce)\nhako-default (enforce)\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	a := &apparmor{parser: parser, profiles: list}
	count := func(want int) {
		t.Helper()
		b, err := os.ReadFile(calls)
		if err != nil && want > 0 {
			t.Fatal(err)
		}
		if got := strings.Count(string(b), "\n"); got != want {
			t.Errorf("the parser ran %d times, want %d", got, want)
		}
	}
	for range 3 {
		if err := a.ensure(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	count(1)
	text, err := os.ReadFile(filepath.Join(dir, "text"))
	if err != nil || string(text) != apparmorSource(ownLabel()) {
		t.Errorf("the parser read %q, %v", text, err)
	}
	if err := os.WriteFile(list, []byte("hako-default-2 (enforce)\n"), 0o600); err != nil { // aa-remove-unknown
		t.Fatal(err)
	}
	if err := a.ensure(context.Background()); err != nil {
		t.Fatal(err)
	}
	count(2)
	for _, f := range []string{list, filepath.Join(dir, "broken")} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.ensure(context.Background()); err == nil || !strings.Contains(err.Error(), "hako-default could not be loaded") || !strings.Contains(err.Error(), "syntax error") {
		t.Errorf("a profile that cannot be loaded: %v", err)
	}
}

func TestAppArmorSource(t *testing.T) {
	t.Parallel()
	plain := apparmorSource("unconfined")
	if strings.Contains(plain, "%") || strings.Count(plain, "  signal (") != 2 || plain != apparmorSource("") || plain != apparmorSource("x\"\n}") {
		t.Errorf("source:\n%s", plain)
	}
	if s := apparmorSource("/usr/local/bin/hakod"); !strings.Contains(s, `signal (receive) peer="/usr/local/bin/hakod",`) {
		t.Errorf("source:\n%s", s)
	}
}
