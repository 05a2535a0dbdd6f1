//go:build linux

package spec

import (
	"encoding/json"
	"reflect"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// agree fails if decode gives something else than encoding/json.
func agree(t *testing.T, raw []byte) (quick bool) {
	t.Helper()
	got := decode(raw)
	if got == nil {
		return false
	}
	want := new(specs.Spec)
	if err := json.Unmarshal(raw, want); err != nil {
		t.Fatalf("decode accepts what encoding/json refuses: %v\n%s", err, raw)
	}
	if !reflect.DeepEqual(got, want) {
		g, _ := json.Marshal(got)
		w, _ := json.Marshal(want)
		t.Fatalf("decode: %s\nencoding/json: %s\nof: %s", g, w, raw)
	}
	return true
}

func TestDecodeIsQuickForUsualSpecs(t *testing.T) {
	for _, v2 := range []bool{false, true} {
		raw, err := json.MarshalIndent(Default(v2), "", "\t")
		if err != nil {
			t.Fatal(err)
		}
		if !agree(t, raw) {
			t.Error("the default specification takes the slow way")
		}
	}
	for _, raw := range []string{
		`{"ociVersion":"1.0.2","ociVersion":"2"}`, `{"OCIVersion":"1"}`, `{"process":null}`, `{"linux":{"intelRdt":{}}}`,
		`{"process":{"user":{"uid":-1}}}`, `{"root":{"path":"\ud800"}}`, `{`, `[]`, `{"root":{"path":"a` + "\x01" + `"}}`, `{"mounts":[{}],}`,
		`{"process":{"args":["\u00e9\n\u003c"],"user":{"uid":01}}}`, `{"process":{"terminal":truex}}`,
	} {
		agree(t, []byte(raw))
	}
}

func FuzzDecode(f *testing.F) {
	raw, _ := json.Marshal(Default(true))
	f.Add(raw)
	f.Add([]byte(`{"linux":{"seccomp":{"syscalls":[{"names":["a"],"args":[{"index":1,"op":"SCMP_CMP_EQ"}]}]},"sysctl":{"net.x":"1"}},"hooks":{"poststop":[{"path":"/x","timeout":3}]}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		agree(t, raw)
		_, _ = Parse(raw)
	})
}
