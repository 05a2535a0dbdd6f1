//go:build linux && (amd64 || arm64)

package oci

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/hako-engine/hako/oci/cgroup/systemd"
	"github.com/hako-engine/hako/oci/rdt"
)

// TestStateText compares with encoding/json, which reads it.
func TestStateText(t *testing.T) {
	t.Parallel()
	full := state{
		Version: 1, ID: "a_b", OCIVersion: "1.3.0", Bundle: "/b \"<ü>&\\\n\x00\xff", Rootfs: "/r", Created: time.Unix(1, 2300).UTC(),
		Owner: 1000, Pid: -1, StartTime: 1<<64 - 1, Rootless: true,
		Annotations: map[string]string{"b": "2", "a\t": "", "": "x"}, Cgroups: map[string]string{"": "/v2", "cpu": "/sys/fs/cgroup/cpu/x"},
		Unit: &unit{Unit: systemd.Unit{Name: "a.scope"}, User: true}, Rdt: &rdt.Group{},
	}
	for _, s := range []state{{}, full} {
		got, err := s.marshal()
		want, wantErr := json.Marshal(&s)
		if err != nil || wantErr != nil || string(got) != string(want) {
			t.Errorf("%v, %v\n got %s\nwant %s", err, wantErr, got, want)
		}
		s.Unit, s.Rdt = nil, nil
		usual, err := s.marshal()
		var again state
		if err != nil || !again.plain(usual) {
			t.Errorf("%v, not read without reflection: %s", err, usual)
		}
	}
}

// FuzzState: whatever is in a state file is read or refused, and what is read is written so
// that it is read again as the same.
func FuzzState(f *testing.F) {
	for _, s := range []state{{}, {
		Version: stateVersion, ID: "a", OCIVersion: "1.3.0", Bundle: "/b", Rootfs: "/r", Created: time.Unix(1, 2300).UTC(), Pid: 7, StartTime: 9,
		Annotations: map[string]string{"b": "2"}, Cgroups: map[string]string{"": "/v2"}, Rdt: &rdt.Group{Control: "/x", Own: true},
	}} {
		raw, err := json.Marshal(&s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Add([]byte(`{"version":99}`))
	f.Add([]byte(`{"cgroups":{"cpu":null},"created":"0000-01-01T00:00:00Z","id":"\ud800"}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var plain, slow state
		if plain.plain(raw) {
			if err := json.Unmarshal(raw, &slow); err != nil || !reflect.DeepEqual(plain, slow) {
				t.Errorf("%v\n%+v\n%+v", err, plain, slow)
			}
		}
		var first, second state
		if first.unmarshal(raw) != nil {
			return
		}
		text, err := first.marshal()
		if err != nil {
			return // a time that has no text
		}
		if err := second.unmarshal(text); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		again, err := second.marshal()
		if err != nil || string(again) != string(text) {
			t.Errorf("%v\n%s\n%s", err, text, again)
		}
	})
}

// FuzzHome: whatever is in an image's passwd, HOME is a path.
func FuzzHome(f *testing.F) {
	f.Add([]byte("root:x:0:0:r:/root:/bin/sh\nuser:x:7:7::/home/user:\n"), uint32(7))
	f.Add([]byte("odd:x:8:8::relative:\nshort:x:8\n:::::::\nx:x:4294967295:::/y"), uint32(8))
	f.Fuzz(func(t *testing.T, passwd []byte, uid uint32) {
		home := homeIn(passwd, uid)
		if !filepath.IsAbs(home) || strings.ContainsAny(home, "\x00\n:") {
			t.Errorf("%q", home)
		}
		if home != "/" && !bytes.Contains(passwd, []byte(":"+home)) {
			t.Errorf("%q is not in the file", home)
		}
	})
}
