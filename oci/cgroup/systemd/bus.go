//go:build linux

// Package systemd asks systemd for the cgroups of containers: scopes and slices.
//
// In flow a name in the form that engines write (slice:prefix:name), a process, and
// resources of the OCI specification; out flow calls to systemd's manager, and where in
// the cgroup file systems the scope is. It speaks the few messages of D-Bus that this
// takes itself.
package systemd

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/classed"
)

// patience bounds a call, and the job that it starts, hello what is said first.
const (
	patience = 15 * time.Second
	hello    = 5 * time.Second
)

// Manager is a connection to a systemd. It is not safe for concurrent use.
type Manager struct {
	f        *os.File
	r        *bufio.Reader
	serial   uint32
	patience time.Duration
	control  string
	bus      bool                 // there is a message bus in between
	done     map[string][2]string // job to unit and result
}

const (
	service   = "org.freedesktop.systemd1"
	object    = "/org/freedesktop/systemd1"
	manager   = "org.freedesktop.systemd1.Manager"
	busName   = "org.freedesktop.DBus"
	busObject = "/org/freedesktop/DBus"
)

// sockets lists where systemd may listen: its own socket first, which needs no bus.
func sockets(user bool) []string {
	if !user {
		return []string{"/run/systemd/private", "/run/dbus/system_bus_socket"}
	}
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		dir = "/run/user/" + strconv.Itoa(os.Getuid())
	}
	out := []string{filepath.Join(dir, "systemd/private")}
	if path, ok := strings.CutPrefix(os.Getenv("DBUS_SESSION_BUS_ADDRESS"), "unix:path="); ok {
		path, _, _ = strings.Cut(path, ",")
		out = append(out, path)
	}
	return append(out, filepath.Join(dir, "bus"))
}

// Connect reaches the system's systemd, or that of the calling user. A systemd that
// reloads its units may forget a connection, so one that does not answer is tried again.
func Connect(user bool) (*Manager, error) {
	var errs []error
	for range 4 {
		for _, path := range sockets(user) {
			m, err := dial(path, !strings.HasSuffix(path, "/systemd/private"))
			if err == nil {
				return m, nil
			}
			errs = append(errs, fmt.Errorf("%s: %w", path, err))
		}
		if !slices.ContainsFunc(errs, func(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }) {
			break
		}
	}
	return nil, classed.As(errdefs.ErrUnavailable, fmt.Errorf("reach systemd: %w", errors.Join(errs...)))
}

func dial(path string, bus bool) (_ *Manager, err error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("connect", err)
	}
	m := &Manager{f: os.NewFile(uintptr(fd), path), bus: bus, done: map[string][2]string{}}
	m.r = bufio.NewReader(m.f)
	m.patience = hello
	defer func() {
		if err != nil {
			m.Close()
		}
		m.patience = patience
	}()
	if err := m.authenticate(); err != nil {
		return nil, fmt.Errorf("authenticate: %w", err)
	}
	if bus {
		if _, err := m.call(busName, busObject, busName, "Hello", "", nil); err != nil {
			return nil, err
		}
		e := &encoder{}
		e.string("type='signal',sender='" + service + "',interface='" + manager + "',member='JobRemoved'")
		if _, err := m.call(busName, busObject, busName, "AddMatch", "s", e.b); err != nil {
			return nil, err
		}
		if _, err := m.call(service, object, manager, "Subscribe", "", nil); err != nil {
			return nil, err
		}
	}
	if m.control, err = m.get("ControlGroup"); err != nil {
		return nil, err
	}
	return m, nil
}

// Close ends the connection.
func (m *Manager) Close() error { return m.f.Close() }

// authenticate says who we are; the other side knows it from the socket.
func (m *Manager) authenticate() error {
	if err := m.f.SetDeadline(time.Now().Add(m.patience)); err != nil {
		return err
	}
	id := hex.EncodeToString([]byte(strconv.Itoa(os.Geteuid())))
	// All at once, as systemd's own clients do: a systemd that reads BEGIN together with a
	// message that follows leaves the message lying.
	if _, err := m.f.WriteString("\x00AUTH EXTERNAL " + id + "\r\nBEGIN\r\n"); err != nil {
		return err
	}
	line, err := m.r.ReadSlice('\n')
	if err != nil {
		return err
	}
	if !strings.HasPrefix(string(line), "OK ") {
		return classed.Errorf(errdefs.ErrPermissionDenied, "%.80q", line)
	}
	return nil
}

// Error is an error that systemd answers with.
type Error struct{ Name, Text string }

func (e *Error) Error() string { return strings.TrimSpace(e.Text + " (" + e.Name + ")") }

// Unwrap gives the error's class.
func (e *Error) Unwrap() error {
	switch e.Name {
	case service + ".NoSuchUnit":
		return errdefs.ErrNotFound
	case service + ".UnitExists":
		return errdefs.ErrAlreadyExists
	case busName + ".Error.AccessDenied", busName + ".Error.InteractiveAuthorizationRequired":
		return errdefs.ErrPermissionDenied
	case busName + ".Error.InvalidArgs", busName + ".Error.PropertyReadOnly", busName + ".Error.UnknownProperty":
		return errdefs.ErrInvalidArgument
	}
	return errdefs.ErrUnknown
}

// call calls a method and waits for its answer.
func (m *Manager) call(destination, path, iface, member, signature string, body []byte) (*message, error) {
	m.serial++
	q := &message{typ: typeCall, serial: m.serial, path: path, iface: iface, member: member, signature: signature, body: body}
	if m.bus {
		q.destination = destination
	}
	if err := m.f.SetDeadline(time.Now().Add(m.patience)); err != nil {
		return nil, err
	}
	if _, err := m.f.Write(q.encode()); err != nil {
		return nil, fmt.Errorf("systemd: %s: %w", member, err)
	}
	for {
		a, err := m.next()
		if err != nil {
			return nil, fmt.Errorf("systemd: %s: %w", member, err)
		}
		if a.reply != m.serial {
			continue
		}
		switch a.typ {
		case typeReturn:
			return a, nil
		case typeError:
			e := &Error{Name: a.failure}
			if t, err := a.strings("s", binary.LittleEndian); err == nil {
				e.Text = t[0]
			}
			return nil, fmt.Errorf("systemd: %s: %w", member, e)
		}
	}
}

// next reads a message, and remembers jobs that have ended.
func (m *Manager) next() (*message, error) {
	head, err := m.r.Peek(headerSize)
	if err != nil {
		return nil, err
	}
	header, body, err := sizes(head)
	if err != nil {
		return nil, err
	}
	buf := make([]byte, header+body)
	if _, err := io.ReadFull(m.r, buf); err != nil {
		return nil, err
	}
	msg, err := decode(buf)
	if err != nil {
		return nil, err
	}
	if buf[0] != 'l' {
		return nil, errors.New("a D-Bus message of another byte order")
	}
	if msg.typ == typeSignal && msg.iface == manager && msg.member == "JobRemoved" {
		v, err := msg.strings("uoss", binary.LittleEndian) // number, job, unit, result
		if err != nil {
			return nil, err
		}
		m.done[v[1]] = [2]string{v[2], v[3]}
	}
	return msg, nil
}

// job calls a method that starts a job, and waits until it has ended.
func (m *Manager) job(member, unit, signature string, body []byte) error {
	a, err := m.call(service, object, manager, member, signature, body)
	if err != nil {
		return err
	}
	v, err := a.strings("o", binary.LittleEndian)
	if err != nil {
		return err
	}
	if err := m.f.SetDeadline(time.Now().Add(m.patience)); err != nil {
		return err
	}
	for {
		if r, ok := m.done[v[0]]; ok {
			delete(m.done, v[0])
			if r[1] == "done" {
				return nil
			}
			return fmt.Errorf("systemd: %s of %s: the job ended with %q", member, unit, r[1])
		}
		if _, err := m.next(); err != nil {
			return fmt.Errorf("systemd: wait for %s of %s: %w", member, unit, err)
		}
	}
}

// Property is a property of a unit. Its value is a string, bool, int32, uint32, uint64,
// []string, []uint32, []byte or [][2]string.
type Property struct {
	Name  string
	Value any
}

func (e *encoder) properties(list []Property) (err error) {
	e.array(8, func() {
		for _, p := range list {
			e.align(8)
			e.string(p.Name)
			err = errors.Join(err, e.value(p.Value))
		}
	})
	return err
}

// StartTransientUnit makes a unit, and returns when it is active.
func (m *Manager) StartTransientUnit(unit string, properties []Property) error {
	e := &encoder{}
	e.string(unit)
	e.string("replace")
	if err := e.properties(properties); err != nil {
		return err
	}
	e.array(8, func() {}) // no further units
	return m.job("StartTransientUnit", unit, "ssa(sv)a(sa(sv))", e.b)
}

// StopUnit stops a unit, and returns when it has. One that is not there is
// errdefs.ErrNotFound.
func (m *Manager) StopUnit(unit string) error {
	e := &encoder{}
	e.string(unit)
	e.string("replace")
	return m.job("StopUnit", unit, "ss", e.b)
}

// SetUnitProperties changes a unit until it ends.
func (m *Manager) SetUnitProperties(unit string, properties []Property) error {
	e := &encoder{}
	e.string(unit)
	e.uint32(1) // at run time only
	if err := e.properties(properties); err != nil {
		return err
	}
	_, err := m.call(service, object, manager, "SetUnitProperties", "sba(sv)", e.b)
	return err
}

// ResetFailedUnit lets systemd forget a unit that has failed.
func (m *Manager) ResetFailedUnit(unit string) error {
	e := &encoder{}
	e.string(unit)
	_, err := m.call(service, object, manager, "ResetFailedUnit", "s", e.b)
	return err
}

// ControlGroup gives the cgroup below which this systemd keeps its units, "" for the top.
func (m *Manager) ControlGroup() string { return m.control }

// Version gives the number in systemd's version, 0 if it is not to be read.
func (m *Manager) Version() int {
	v, err := m.get("Version")
	if err != nil {
		return 0
	}
	end := strings.IndexFunc(v, func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		end = len(v)
	}
	n, _ := strconv.Atoi(v[:end])
	return n
}

func (m *Manager) get(property string) (string, error) {
	e := &encoder{}
	e.string(manager)
	e.string(property)
	a, err := m.call(service, object, "org.freedesktop.DBus.Properties", "Get", "ss", e.b)
	if err != nil {
		return "", err
	}
	v, err := a.strings("v", binary.LittleEndian)
	if err != nil {
		return "", err
	}
	return strings.TrimSuffix(v[0], "/"), nil
}
