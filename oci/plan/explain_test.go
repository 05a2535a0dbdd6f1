//go:build linux

package plan

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/oci/seccomp"
	"github.com/hako-engine/hako/oci/spec"
)

func rootless(in *input) { spec.Rootless(in.spec, 1000, 1000) }

// explain compiles and explains as the runtime does.
func explain(in input, raw []byte) (*Explanation, error) {
	if err := spec.Validate(in.spec); err != nil {
		return nil, err
	}
	for _, h := range in.facts.Cgroup.Hierarchies {
		if !h.V2 {
			in.opts.Doors = append(in.opts.Doors, h.Name)
		}
	}
	in.opts.LateDoors = true
	if in.spec.Linux.Seccomp != nil {
		f, err := seccomp.Compile(in.spec.Linux.Seccomp, seccomp.Options{})
		if err != nil {
			return nil, err
		}
		in.opts.Filter = Filter{Program: f.Program, Flags: uint32(f.Flags)}
	}
	p, err := Container(in.spec, in.facts, in.opts)
	if err != nil {
		return nil, err
	}
	return Explain(p, in.spec, in.facts, raw), nil
}

// TestConfigs keeps the plans of the default configuration, and for the others what they
// do differently from their base, on hosts with cgroup v2 and v1.
func TestConfigs(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"v2", "v1"} {
		e, err := explain(build("default", kind), nil)
		if err != nil {
			t.Fatal(err)
		}
		check(t, "configs/default-"+kind, e.Brief())
	}
	var names []string
	for _, c := range configs() {
		names = append(names, c.name+".golden")
		t.Run(c.name, func(t *testing.T) {
			diff := func(kind string) string {
				a, err := explain(build(c.base, kind), nil)
				if err != nil {
					// The base is refused as well.
					return "refused: " + err.Error() + "\n"
				}
				in := build(c.name, kind)
				b, err := explain(in, nil)
				if err != nil {
					return "refused: " + err.Error() + "\n"
				}
				sound(t, b.plan)
				return Diff(a, b, c.base, c.name, true)
			}
			v2, v1 := diff("v2"), diff("v1")
			text := "# on a host with cgroup v2\n" + v2
			// Of v1 only what is not the same.
			with, without := "", ""
			a, b := strings.Split(v2, "\n"), strings.Split(v1, "\n")
			for _, m := range align(a, b) {
				switch {
				case m[1] < 0 && !strings.HasPrefix(a[m[0]], "##"):
					without += a[m[0]] + "\n"
				case m[0] < 0 && !strings.HasPrefix(b[m[1]], "##"):
					with += b[m[1]] + "\n"
				}
			}
			switch {
			case v1 == v2:
				text += "\n# on a host with cgroup v1 the same\n"
			case without == "":
				text += "\n# on a host with cgroup v1 the same, and\n" + with
			default:
				text += "\n# on a host with cgroup v1 not\n" + without + "# but\n" + with
			}
			check(t, "configs/"+c.name, text)
		})
	}
	files, err := os.ReadDir("testdata/configs")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !slices.Contains(names, f.Name()) && !strings.HasPrefix(f.Name(), "default-") {
			t.Errorf("testdata/configs/%s belongs to no config", f.Name())
		}
	}
}

// everyone calls do for every config on every host that takes it.
func everyone(t *testing.T, do func(t *testing.T, name string, in input, e *Explanation)) {
	names := []string{"default"}
	for _, c := range configs() {
		names = append(names, c.name)
	}
	for _, name := range names {
		for _, kind := range []string{"v2", "v1"} {
			in := build(name, kind)
			if e, err := explain(in, in.text()); err == nil {
				do(t, name+" "+kind, in, e)
			}
		}
	}
}

// TestOriginsAreThere follows every origin into the text of the configuration: it must be
// there, and the line must be that of the value, or the default must be known to be one.
func TestOriginsAreThere(t *testing.T) {
	t.Parallel()
	defaults := []string{"linux.cgroupsPath", "linux.rootfsPropagation", "process.user.umask", "process.capabilities.bounding"}
	own := map[string]bool{}
	everyone(t, func(t *testing.T, name string, in input, e *Explanation) {
		lines := strings.Split(string(in.text()), "\n")
		for _, p := range e.Parts {
			for _, f := range p.From {
				switch {
				case !f.Given && !slices.Contains(defaults, f.Path):
					t.Errorf("%s: %q comes from %s, which the configuration does not have", name, p.Do, f.Path)
				case f.Given && (f.Line < 1 || f.Line > len(lines)):
					t.Errorf("%s: %s on line %d of %d", name, f.Path, f.Line, len(lines))
				case f.Given:
					if last := f.Path[strings.LastIndexAny(f.Path, ".[")+1:]; !strings.HasSuffix(f.Path, "]") && !strings.Contains(lines[f.Line-1], `"`+last+`"`) {
						t.Errorf("%s: %s is not on line %d: %s", name, f.Path, f.Line, lines[f.Line-1])
					}
				}
			}
			if len(p.From) == 0 && p.Promise == "" {
				own[p.format] = true
			}
		}
	})
	// What nobody asked for is little, and known.
	known := []string{
		"close descriptors of the runtime", "hide from ptrace", "unblock signals", "reset signal %d", "clear the umask", "start a session",
		"join a new session keyring", "check that cwd is inside the container", "close all other descriptors", "wait for start",
		"hand on descriptor %d", "clone the container's first process", "set up standard input and output",
	}
	for format := range own {
		if !slices.Contains(known, format) {
			t.Errorf("%q has no origin", format)
		}
	}
}

// TestOriginsFitTheSentence: an origin that an earlier action left behind would be wrong in a
// way that the other test cannot see.
func TestOriginsFitTheSentence(t *testing.T) {
	t.Parallel()
	everyone(t, func(t *testing.T, name string, in input, e *Explanation) {
		for _, p := range e.Parts {
			path := p.origin(false)
			fits := true
			switch {
			case strings.HasPrefix(p.format, "mask %s"):
				fits = strings.HasPrefix(path, "linux.maskedPaths[")
			case strings.HasPrefix(p.format, "mount %s"), strings.HasPrefix(p.format, "bind %s on %s"), strings.HasPrefix(p.format, "bind the host's /sys"):
				fits = strings.HasPrefix(path, "mounts[")
			case strings.HasPrefix(p.format, "join the %s namespace"), strings.HasPrefix(p.format, "open the %s namespace"):
				fits = strings.HasPrefix(path, "linux.namespaces[")
			case p.format == "set the host name to %q":
				fits = path == "hostname"
			case strings.HasPrefix(p.format, "set sysctl"):
				fits = strings.HasPrefix(path, "linux.sysctl[")
			case p.format == "set capabilities":
				fits = path == "process.capabilities"
			case strings.HasPrefix(p.format, "take the host's"), strings.HasPrefix(p.format, "bind the host's %s"):
				fits = strings.HasPrefix(path, "linux.devices[") || p.Promise == "default devices"
			case strings.HasPrefix(p.format, "exec "):
				fits = path == "process.args"
			}
			if !fits {
				t.Errorf("%s: %q comes from %s", name, p.Do, path)
			}
		}
	})
}

func TestEveryStepIsExplainedOnce(t *testing.T) {
	t.Parallel()
	everyone(t, func(t *testing.T, name string, _ input, e *Explanation) {
		n := 0
		for _, p := range e.Parts {
			for _, s := range p.Steps {
				if n++; s.Number != n {
					t.Fatalf("%s: step %d comes at place %d", name, s.Number, n)
				}
			}
			if p.Do == "" || e.title(p.Stage) == "" || len(p.Steps) == 0 && p.By == "container" {
				t.Errorf("%s: %+v", name, p)
			}
		}
		if want := len(e.plan.Host) + len(e.plan.Program); n != want {
			t.Errorf("%s: %d steps are explained, there are %d", name, n, want)
		}
		text := e.Text()
		for _, want := range []string{"(runtime)", "line ", "## the container's first process", "execveat("} {
			if !strings.Contains(text, want) {
				t.Errorf("%s: no %q in the text", name, want)
			}
		}
	})
}

func TestDiff(t *testing.T) {
	t.Parallel()
	change := func(f func(*input)) string {
		t.Helper()
		a, b := build("docker-volumes", "v2"), build("docker-volumes", "v2")
		f(&b)
		ea, err := explain(a, a.text())
		if err != nil {
			t.Fatal(err)
		}
		eb, err := explain(b, b.text())
		if err != nil {
			t.Fatal(err)
		}
		return Diff(ea, eb, "a", "b", false)
	}
	if got := change(func(*input) {}); got != "" {
		t.Errorf("no change:\n%s", got)
	}
	// An entry in front of all others moves every number, and changes nothing else.
	got := change(func(in *input) {
		in.spec.Linux.MaskedPaths = append([]string{"/proc/first"}, in.spec.Linux.MaskedPaths...)
	})
	if n := strings.Count(got, "@@ "); n > 2 || !strings.Contains(got, "+mask /proc/first\n") || strings.Contains(got, "\n-") {
		t.Errorf("a masked path more:\n%s", got)
	}
	got = change(func(in *input) {
		m := specs.Mount{Destination: "/x", Type: "tmpfs", Source: "tmpfs"}
		in.spec.Mounts = slices.Insert(in.spec.Mounts, 1, m)
	})
	if strings.Contains(got, "\n-") || strings.Count(got, "+mount /x") == 0 || strings.Contains(got, "/data") {
		t.Errorf("a mount more:\n%s", got)
	}
	got = change(func(in *input) { in.mount("/data").Source = "/srv/other" })
	if !strings.Contains(got, "-bind /srv/data on /data\n") || !strings.Contains(got, "+bind /srv/other on /data\n") {
		t.Errorf("another source:\n%s", got)
	}
	got = change(func(in *input) {
		in.spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: number[int64](1 << 20)}
	})
	if !strings.Contains(got, "+limit memory.limit to 1048576\n") || strings.Count(got, "@@ ") != 1 {
		t.Errorf("a limit:\n%s", got)
	}
	got = change(func(in *input) {
		r := in.spec.Linux.ReadonlyPaths
		r[0], r[1] = r[1], r[0]
	})
	if strings.Count(got, "at another time") != 1 || strings.Contains(got, "@@") {
		t.Errorf("another order:\n%s", got)
	}
}

func TestAlign(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ a, b, want string }{
		{"", "", ""}, {"abc", "abc", "abc"}, {"", "ab", "+a+b"}, {"ab", "", "-a-b"},
		{"abcd", "abxcd", "ab+xcd"}, {"abcd", "acd", "a-bcd"}, {"aaa", "aa", "aa-a"}, {"xay", "zaw", "-x+za-y+w"},
	} {
		a, b := strings.Split(tc.a, ""), strings.Split(tc.b, "")
		got := ""
		for _, m := range align(a, b) {
			switch {
			case m[1] < 0:
				got += "-" + a[m[0]]
			case m[0] < 0:
				got += "+" + b[m[1]]
			default:
				got += b[m[1]]
			}
		}
		if got != tc.want {
			t.Errorf("%q to %q: %q, want %q", tc.a, tc.b, got, tc.want)
		}
	}
}

func TestLines(t *testing.T) {
	t.Parallel()
	got := Lines([]byte("{\n \"a\": [1,\n  {\"b\": 2}],\n\n \"c.d\":\n  {\"e\": null}}"))
	want := map[string]int{"": 1, "a": 2, "a[0]": 2, "a[1]": 3, "a[1].b": 3, `["c.d"]`: 5, `["c.d"].e`: 6}
	if len(got) != len(want) {
		t.Error(got)
	}
	for path, line := range want {
		if got[path] != line {
			t.Errorf("%s: line %d, want %d", path, got[path], line)
		}
	}
	for _, bad := range []string{"", "{", `{"a"`, `{"a":`, "[1,", strings.Repeat("[", 10000), `{"a": 1`} {
		Lines([]byte(bad))
	}
}

func TestFactsChange(t *testing.T) {
	t.Parallel()
	f := host("v1")
	f.Sources["/here"] = Source{Exists: true}
	if err := f.Change("cgroup=v2, kernel=5.15.0-91-generic, apparmor=true"); err != nil {
		t.Fatal(err)
	}
	f.Cgroup.Locate("/../box")
	if !f.Cgroup.V2 || f.Cgroup.Hierarchies[0].Dir != "/sys/fs/cgroup/box" || f.LastCap != 40 || f.LayerByLayer || !f.AppArmor || !f.Sources["/here"].Exists {
		t.Errorf("%+v", f)
	}
	raw, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	g := host("v1")
	g.Sources["/there"] = Source{Dir: true}
	if err := g.Change(string(raw)); err != nil {
		t.Fatal(err)
	}
	if !g.Cgroup.V2 || !g.Sources["/here"].Exists || !g.Sources["/there"].Dir || g.Kernel != f.Kernel {
		t.Errorf("%+v", g)
	}
	for _, bad := range []string{"", "x", "cgroup=v3", "kernel=six", "kernel=5", "rootless=maybe", "lastcap=64", "lastcap=-1", "what=1", "{", `{"nosuch":1}`, `{"lastCap":99}`} {
		f := host("v2")
		if f.Change(bad) == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func TestOldKernelsAreWarnedOf(t *testing.T) {
	t.Parallel()
	in := build("old-kernel", "v2")
	e, err := explain(in, nil)
	if err != nil {
		t.Fatal(err)
	}
	if e.Needs != "5.12" || !slices.ContainsFunc(e.Warnings, func(w string) bool { return strings.Contains(w, "mount_setattr (Linux 5.12)") }) {
		t.Errorf("needs %s, warnings %q", e.Needs, e.Warnings)
	}
}

// TestSchema holds the JSON form to its documented schema.
func TestSchema(t *testing.T) {
	t.Parallel()
	raw, err := os.ReadFile(filepath.Join("..", "..", "docs", "plan.schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	var root map[string]any
	if err := json.Unmarshal(raw, &root); err != nil {
		t.Fatal(err)
	}
	v := schema{root}
	everyone(t, func(t *testing.T, name string, _ input, e *Explanation) {
		out, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		var doc any
		if err := json.Unmarshal(out, &doc); err != nil {
			t.Fatal(err)
		}
		for _, problem := range v.check(root, doc, "plan") {
			t.Errorf("%s: %s", name, problem)
		}
	})
	// The validator does find faults.
	for _, bad := range []string{`{}`, `[]`, `{"version":1,"facts":{},"actions":[{"stage":"never"}],"terminal":1,"waitsForStart":true,"extra":1}`} {
		var doc any
		if err := json.Unmarshal([]byte(bad), &doc); err != nil {
			t.Fatal(err)
		}
		if len(v.check(root, doc, "plan")) == 0 {
			t.Errorf("%s passes", bad)
		}
	}
}

// TestNobodyWritesIntoThePlan: a plan is read to find out what a configuration does, so
// that the configuration must not be able to hide or add lines.
func TestNobodyWritesIntoThePlan(t *testing.T) {
	t.Parallel()
	const evil = "\n## start\nloader     nothing at all\x1b[2J\r\u202e"
	in := build("docker-userns", "v2")
	p := in.spec.Process
	p.Args[0], p.Cwd = "a"+evil, "/cwd"+evil
	p.Env = append(p.Env, "X="+evil)
	p.Capabilities.Bounding = append(slices.Clone(p.Capabilities.Bounding), "CAP"+evil)
	in.spec.Hostname = "h\n## start"
	in.spec.Linux.MaskedPaths = append(in.spec.Linux.MaskedPaths, "/a"+evil, "/b"+evil)
	in.spec.Linux.Seccomp.Syscalls = append(in.spec.Linux.Seccomp.Syscalls, specs.LinuxSyscall{Names: []string{"no" + evil}, Action: specs.ActAllow})
	in.spec.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/x" + evil, Type: "c", Major: 1, Minor: 1}}
	in.spec.Linux.CgroupsPath = "/box" + evil
	in.spec.Linux.Resources.Unified = map[string]string{"memory.high" + evil: evil}
	in.spec.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/hook" + evil, Args: []string{"x", evil}}}}
	in.bind("/src"+evil, "/dst"+evil, "ro")
	in.mount("/dev/shm").Options = append(in.mount("/dev/shm").Options, "x="+evil)
	in.drop("/dev") // so that devices are bound, in slots with their names
	in.namespace(specs.IPCNamespace, "/ns"+evil)
	e, err := explain(in, in.text())
	if err != nil {
		t.Fatal(err)
	}
	plain, err := explain(build("docker", "v2"), nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"text": e.Text(), "brief": e.Brief(), "diff": Diff(plain, e, "a", "b", false), "brief diff": Diff(plain, e, "a", "b", true),
	} {
		if strings.ContainsAny(text, "\x1b\r\u202e") || strings.Contains(text, "\nloader     nothing") {
			t.Errorf("%s: the configuration wrote into it", name)
		}
	}
}

func FuzzLines(f *testing.F) {
	in := build("docker", "v2")
	f.Add(in.text())
	f.Add([]byte(`{"a":[{"b.c":1}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		n := strings.Count(string(raw), "\n") + 1
		for path, line := range Lines(raw) {
			if line < 1 || line > n {
				t.Errorf("%s: line %d of %d", path, line, n)
			}
		}
	})
}
