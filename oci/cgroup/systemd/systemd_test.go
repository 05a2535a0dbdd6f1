//go:build linux

package systemd

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// fake is a systemd that writes down what it is asked.
type fake struct {
	path string
	mu   sync.Mutex
	log  []string
	// answer gives the error, or the result of the job, of a method.
	answer func(member string) (failure, result string)
	early  bool // JobRemoved comes before the answer
	mute   bool
}

func newFake(t *testing.T) *fake {
	t.Helper()
	f := &fake{path: filepath.Join(t.TempDir(), "private"), answer: func(string) (string, string) { return "", "done" }}
	l, err := net.Listen("unix", f.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go f.serve(c)
		}
	}()
	return f
}

func (f *fake) serve(c net.Conn) {
	defer c.Close()
	r := bufio.NewReader(c)
	line, err := r.ReadString('\n')
	if want := fmt.Sprintf("\x00AUTH EXTERNAL %x\r\n", fmt.Sprint(os.Geteuid())); err != nil || line != want {
		io.WriteString(c, "REJECTED EXTERNAL\r\n")
		return
	}
	io.WriteString(c, "OK 0123456789abcdef\r\n")
	if line, err = r.ReadString('\n'); err != nil || line != "BEGIN\r\n" {
		return
	}
	serial := uint32(100)
	send := func(m *message) {
		serial++
		m.serial = serial
		c.Write(m.encode())
	}
	for {
		head, err := r.Peek(headerSize)
		if err != nil {
			return
		}
		h, b, err := sizes(head)
		if err != nil {
			return
		}
		buf := make([]byte, h+b)
		if _, err := io.ReadFull(r, buf); err != nil {
			return
		}
		q, err := decode(buf)
		if err != nil {
			return
		}
		f.mu.Lock()
		f.log = append(f.log, strings.TrimSpace(q.destination+" "+q.member+" "+show(q)))
		failure, result := f.answer(q.member)
		early, mute := f.early, f.mute
		f.mu.Unlock()
		if mute {
			continue
		}
		if failure != "" {
			e := &encoder{}
			e.string("it is so")
			send(&message{typ: typeError, reply: q.serial, failure: failure, signature: "s", body: e.b})
			continue
		}
		a, e := &message{typ: typeReturn, reply: q.serial}, &encoder{}
		var signal *message
		switch q.member {
		case "Get":
			a.signature = "v"
			v, _ := q.strings("ss", binary.LittleEndian)
			e.value(map[string]string{"ControlGroup": "/user.slice/", "Version": "252.39-1~deb12u1"}[v[1]])
		case "StartTransientUnit", "StopUnit":
			job := fmt.Sprintf("/job/%d", q.serial)
			a.signature = "o"
			e.string(job)
			s := &encoder{}
			s.uint32(7)
			for _, v := range []string{job, "a.scope", result} {
				s.string(v)
			}
			signal = &message{typ: typeSignal, path: object, iface: manager, member: "JobRemoved", signature: "uoss", body: s.b}
		}
		a.body = e.b
		send(&message{typ: typeSignal, path: object, iface: manager, member: "UnitNew", signature: "so"}) // of no interest
		if signal != nil && early {
			send(signal)
		}
		send(a)
		if signal != nil && !early {
			send(signal)
		}
	}
}

// show prints a body, following its signature.
func show(m *message) string {
	d := &decoder{b: m.body, order: binary.LittleEndian}
	var out []string
	sig := m.signature
	for sig != "" {
		var text string
		text, sig = value(d, sig)
		out = append(out, text)
	}
	if d.bad || d.i != len(d.b) {
		out = append(out, "MALFORMED")
	}
	return strings.Join(out, " ")
}

// value reads one value, independently of the encoder.
func value(d *decoder, sig string) (text, rest string) {
	switch sig[0] {
	case 's', 'o':
		return d.string(), sig[1:]
	case 'b', 'u', 'i':
		return fmt.Sprint(d.uint32()), sig[1:]
	case 'y':
		return fmt.Sprint(d.byte()), sig[1:]
	case 't':
		d.align(8)
		if b := d.take(8); b != nil {
			return fmt.Sprint(d.order.Uint64(b)), sig[1:]
		}
		return "", sig[1:]
	case 'v':
		t, _ := value(d, d.signature())
		return t, sig[1:]
	case '(':
		d.align(8)
		var parts []string
		rest = sig[1:]
		for rest[0] != ')' {
			text, rest = value(d, rest)
			parts = append(parts, text)
		}
		return strings.Join(parts, "="), rest[1:]
	case 'a':
		n := int(d.uint32())
		if sig[1] == '(' || sig[1] == 't' {
			d.align(8)
		}
		end := d.i + n
		var parts []string
		for d.i < end && !d.bad {
			text, _ = value(d, sig[1:])
			parts = append(parts, text)
		}
		return "[" + strings.Join(parts, ",") + "]", skip(sig[1:])
	}
	d.bad = true
	return "", ""
}

// skip gives what follows the first complete type.
func skip(sig string) string {
	switch sig[0] {
	case 'a':
		return skip(sig[1:])
	case '(':
		depth := 0
		for i, c := range sig {
			if c == '(' {
				depth++
			} else if c == ')' {
				if depth--; depth == 0 {
					return sig[i+1:]
				}
			}
		}
	}
	return sig[1:]
}

func TestStartUpdateStop(t *testing.T) {
	for _, bus := range []bool{false, true} {
		for _, early := range []bool{false, true} {
			f := newFake(t)
			f.early = early
			m, err := dial(f.path, bus)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			if control := m.ControlGroup(); control != "/user.slice" || m.Version() != 252 {
				t.Errorf("%q %d", control, m.Version())
			}
			u, err := Parse("a-b.slice:pre:box", "box", false)
			if err != nil {
				t.Fatal(err)
			}
			f.log = nil
			if err := m.Start(u, "box", 77, true, []Property{{"MemoryMax", uint64(1 << 20)}, {"Delegate", false}, {"AllowedCPUs", []byte{3}}}); err != nil {
				t.Fatal(err)
			}
			if err := m.SetUnitProperties(u.Name, []Property{{"DeviceAllow", [][2]string{{"/dev/null", "rw"}, {"char-*", "m"}}}, {"KillSignal", int32(9)}, {"After", []string{"x.service", "y.service"}}}); err != nil {
				t.Fatal(err)
			}
			if err := m.Stop(u); err != nil {
				t.Fatal(err)
			}
			d := ""
			if bus {
				d = service + " "
			}
			want := []string{
				d + "StartTransientUnit pre-box.scope replace [Description=hako container box,DefaultDependencies=0,Slice=a-b.slice,PIDs=[77]," +
					"MemoryAccounting=1,CPUAccounting=1,TasksAccounting=1,IOAccounting=1,MemoryMax=1048576,Delegate=0,AllowedCPUs=[3]] []",
				d + "SetUnitProperties pre-box.scope 1 [DeviceAllow=[/dev/null=rw,char-*=m],KillSignal=9,After=[x.service,y.service]]",
				d + "StopUnit pre-box.scope replace",
				d + "ResetFailedUnit pre-box.scope",
			}
			f.mu.Lock()
			if !reflect.DeepEqual(f.log, want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(f.log, "\n"), strings.Join(want, "\n"))
			}
			f.mu.Unlock()
		}
	}
}

func TestFailures(t *testing.T) {
	f := newFake(t)
	m, err := dial(f.path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	u := Unit{"system.slice", "x.scope"}
	answers := map[string]string{}
	results := map[string]string{}
	f.answer = func(member string) (string, string) {
		if r := results[member]; r != "" {
			return "", r
		}
		return answers[member], "done"
	}
	answers["StopUnit"], answers["ResetFailedUnit"] = service+".NoSuchUnit", service+".NoSuchUnit"
	if err := m.Stop(u); err != nil {
		t.Errorf("a unit that is gone: %v", err)
	}
	answers["StartTransientUnit"] = service + ".UnitExists"
	if err := m.Start(u, "x", 1, true, nil); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), "it is so") {
		t.Error(err)
	}
	answers["SetUnitProperties"] = busName + ".Error.PropertyReadOnly"
	if err := m.SetUnitProperties("x.scope", nil); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	results["StartTransientUnit"] = "failed"
	if err := m.Start(u, "x", 1, true, nil); err == nil || !strings.Contains(err.Error(), `StartTransientUnit of x.scope: the job ended with "failed"`) {
		t.Error(err)
	}
	if err := m.SetUnitProperties("x.scope", []Property{{"X", 1.5}}); err == nil {
		t.Error("a value without a type")
	}
	if _, err := dial(filepath.Join(t.TempDir(), "nobody"), false); err == nil {
		t.Error("nobody listens")
	}
}

func TestParse(t *testing.T) {
	for path, want := range map[string]string{
		"":                                    "/x/system.slice/hako-box.scope",
		"machine.slice:libpod:abc":            "/x/machine.slice/libpod-abc.scope",
		":cri-containerd:abc":                 "/x/system.slice/cri-containerd-abc.scope",
		"system.slice::abc":                   "/x/system.slice/abc.scope",
		"-.slice:a:b":                         "/x/a-b.scope",
		"kubepods-burstable-pod1.slice:cri:c": "/x/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-c.scope",
		"a.slice:x:pod-7.slice":               "/x/pod.slice/pod-7.slice",
		"/docker/abc":                         "!", "a:b": "!", "a:b:c": "!", "a.slice:b:": "!", "a--b.slice:b:c": "!", ".slice:a:b": "!",
		"a.slice:b:c/d": "!", "a.slice:b:c:d": "!", "a.slice:b:\n": "!", "a/../b.slice:a:b": "!",
	} {
		u, err := Parse(path, "box", false)
		if (err != nil) != (want == "!") || err == nil && u.Path("/x") != want {
			t.Errorf("%q: %s %v, want %s", path, u.Path("/x"), err, want)
		}
		if err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", path, err)
		}
	}
	if u, err := Parse("", "box", true); err != nil || u.Slice != "user.slice" {
		t.Errorf("of a user: %+v %v", u, err)
	}
}

func TestResources(t *testing.T) {
	ptr64 := func(v int64) *int64 { return &v }
	u64 := func(v uint64) *uint64 { return &v }
	w := uint16(1000)
	r := &specs.LinuxResources{
		CPU:     &specs.LinuxCPU{Shares: u64(1024), Quota: ptr64(12345), Period: u64(50000), Cpus: "0-2,9", Mems: "0"},
		Memory:  &specs.LinuxMemory{Limit: ptr64(1 << 20), Swap: ptr64(3 << 20), Reservation: ptr64(-1)},
		Pids:    &specs.LinuxPids{Limit: ptr64(-1)},
		BlockIO: &specs.LinuxBlockIO{Weight: &w},
	}
	weight := func(uint64) uint64 { return 100 }
	text := func(p []Property) string {
		var out []string
		for _, v := range p {
			out = append(out, fmt.Sprintf("%s=%v", v.Name, v.Value))
		}
		return strings.Join(out, " ")
	}
	const inf = "18446744073709551615"
	for _, k := range []struct {
		v2      bool
		version int
		want    string
	}{
		{true, 252, "CPUWeight=100 CPUQuotaPeriodUSec=50000 CPUQuotaPerSecUSec=250000 AllowedCPUs=[7 2] AllowedMemoryNodes=[1] MemoryMax=1048576 MemoryLow=" + inf + " MemorySwapMax=2097152 TasksMax=" + inf + " IOWeight=10000"},
		{true, 241, "CPUWeight=100 CPUQuotaPerSecUSec=250000 MemoryMax=1048576 MemoryLow=" + inf + " MemorySwapMax=2097152 TasksMax=" + inf + " IOWeight=10000"},
		{false, 252, "CPUShares=1024 CPUQuotaPeriodUSec=50000 CPUQuotaPerSecUSec=250000 MemoryLimit=1048576 TasksMax=" + inf + " BlockIOWeight=1000"},
	} {
		if got := text(Resources(r, k.v2, k.version, weight)); got != k.want {
			t.Errorf("got  %s\nwant %s", got, k.want)
		}
	}
	if p := Resources(nil, true, 252, weight); p != nil {
		t.Error(p)
	}
}

func TestAnnotations(t *testing.T) {
	for text, want := range map[string]any{
		"TimeoutStopUSec uint64 7":         uint64(7),
		"TimeoutStopSec 1.5":               uint64(1500000),
		"CollectMode 'inactive-or-failed'": "inactive-or-failed",
		"DefaultDependencies true":         true,
		"KillSignal 2":                     int32(2),
		"After ['a.service', \"b.mount\"]": []string{"a.service", "b.mount"},
		"After []":                         []string{},
		"ExecStart 'x'":                    nil, "DeviceAllow []": nil, "Slice 'x.slice'": nil, "Delegate false": nil, "PIDs [1]": nil,
		"CollectMode x": nil, "After 'x'": nil, "KillSignal 99999999999": nil, "After ['a\\'']": nil, "TimeoutStopSec -1": nil, "TimeoutStopSec x": nil,
	} {
		name, value, _ := strings.Cut(text, " ")
		p, err := Annotated(map[string]string{AnnotationPrefix + name: value, "other": "x"})
		if (err != nil) != (want == nil) || err == nil && (len(p) != 1 || !reflect.DeepEqual(p[0].Value, want)) {
			t.Errorf("%s: %v %v, want %v", text, p, err, want)
		}
		if err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	e := &encoder{}
	e.properties([]Property{{"A", "b"}, {"C", []uint32{1}}})
	f.Add((&message{typ: typeCall, serial: 1, path: object, iface: manager, member: "X", signature: "a(sv)", body: e.b}).encode())
	f.Add((&message{typ: typeError, reply: 4, failure: "a.b", signature: "s"}).encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decode(b)
		if err != nil {
			return
		}
		m.strings("uoss", binary.LittleEndian)
		m.strings("v", binary.LittleEndian)
	})
}
