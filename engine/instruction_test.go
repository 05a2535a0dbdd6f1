package engine

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
)

func TestApplyChanges(t *testing.T) {
	t.Parallel()
	base := `{"Env":["PATH=/bin","A=old"],"Entrypoint":["/entry"],"Cmd":["arg"],"WorkingDir":"/srv"}`
	for changes, want := range map[string]string{
		`CMD ["a", "b c"]`:             `"Cmd":["a","b c"]`,
		`cmd echo $PATH`:               `"Cmd":["/bin/sh","-c","echo $PATH"]`,
		`CMD []`:                       `"Entrypoint":["/entry"],"WorkingDir"`,
		`ENTRYPOINT ["/x"]`:            `"Entrypoint":["/x"],"WorkingDir"`, // and the command is gone
		"CMD y\nENTRYPOINT [\"/x\"]":   `"Cmd":["/bin/sh","-c","y"]`,
		`ENV A=new B="two words" C=$A`: `"Env":["PATH=/bin","A=new","B=two words","C=old"]`,
		`ENV A two words`:              `"A=two words"`,
		`ENV A=${B:-none} D=a\ b`:      `"A=none","D=a b"`,
		`ENV A='$PATH' B="\$PATH"`:     `"A=$PATH","B=$PATH"`,
		`ENV A="it's" B='say "x"'`:     `"A=it's","B=say \"x\""`,
		`LABEL a.b=c "d e"="f g"`:      `"Labels":{"a.b":"c","d e":"f g"}`,
		`LABEL a=1 \` + "\n" + `b=2`:   `"Labels":{"a":"1","b":"2"}`,
		`EXPOSE 80 53/UDP 90-91`:       `"ExposedPorts":{"53/udp":{},"80/tcp":{},"90/tcp":{},"91/tcp":{}}`,
		`VOLUME ["/a b"]`:              `"Volumes":{"/a b":{}}`,
		`VOLUME /a /b`:                 `"Volumes":{"/a":{},"/b":{}}`,
		`WORKDIR sub/../x`:             `"WorkingDir":"/srv/x"`,
		`WORKDIR /abs/`:                `"WorkingDir":"/abs"`,
		`USER 1000:1000`:               `"User":"1000:1000"`,
		`STOPSIGNAL SIGQUIT`:           `"StopSignal":"SIGQUIT"`,
		`ONBUILD RUN make`:             `"OnBuild":["RUN make"]`,
		`HEALTHCHECK NONE`:             `"Healthcheck":{"Test":["NONE"]}`,
		`HEALTHCHECK --interval=5s --retries=2 CMD curl -f x`: `"Healthcheck":{"Test":["CMD-SHELL","curl -f x"],"Interval":5000000000,"Retries":2}`,
		`# nothing`: base[1 : len(base)-1],
	} {
		var c dockerspec.DockerOCIImageConfig
		if err := json.Unmarshal([]byte(base), &c); err != nil {
			t.Fatal(err)
		}
		if err := applyChanges(&c, []string{changes}); err != nil {
			t.Errorf("%s: %v", changes, err)
			continue
		}
		got, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		if changes != `# nothing` && !strings.Contains(string(got), want) {
			t.Errorf("%s:\n%s lacks\n%s", changes, got, want)
		}
	}
	for changes, want := range map[string]string{
		"FROM x":                    "from is not a valid change command",
		"RUN x":                     "run is not a valid change command",
		"ENV A":                     "ENV must have two arguments",
		"ENV":                       "ENV requires at least one argument",
		`ENV A=b c`:                 `can't find = in "c"`,
		`ENV A="b`:                  "double-quote",
		"EXPOSE x":                  "invalid containerPort: x",
		"EXPOSE 80/icmp":            "invalid proto: icmp",
		"STOPSIGNAL nope":           "nope",
		"HEALTHCHECK CMD":           "Missing command",
		"HEALTHCHECK --x=1 CMD a":   "unknown flag: x",
		"HEALTHCHECK RUN a":         `Unknown type "RUN"`,
		`VOLUME [""]`:               "empty string",
		strings.Repeat("x", 70_000): "more than 65536 bytes",
		"LABEL =x":                  "names can not be blank",
	} {
		var c dockerspec.DockerOCIImageConfig
		if err := applyChanges(&c, []string{changes}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40s: %v, want %s", changes, err, want)
		}
	}
}

func FuzzApplyChanges(f *testing.F) {
	for _, s := range []string{`ENV A="b $C ${D:-e}" F='g'`, `LABEL "a"=b\ c`, "HEALTHCHECK --interval=1s CMD x", `CMD ["a"]`, "EXPOSE 1-65535", `ENV A=\"`, `ENV A="\`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		c := dockerspec.DockerOCIImageConfig{}
		if err := applyChanges(&c, []string{s}); err != nil && !errdefs.IsInvalidArgument(err) {
			t.Error(err)
		}
	})
}
