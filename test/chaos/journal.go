package chaos

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
)

// Entry is one line of the journal: what a client is about to do to an object, or that
// it was done. Objects have a value; "" is that of one which is not there, Any of one whose
// value is not known before.
type Entry struct {
	Do     string `json:"do"` // "try" or "ack"
	Client int    `json:"c"`
	Object string `json:"o"` // KIND/NAME
	Value  string `json:"v,omitempty"`
}

// leasedKind is of objects that go some time after what holds them has gone: that one is
// there does not say that it will be.
const leasedKind = "leased/"

// Any stands for some value.
const Any = "*"

// Journal writes entries, one a line, each in one write.
type Journal struct {
	mu  sync.Mutex
	w   io.Writer
	err error
	// Note, if set, gets each entry before it is written.
	Note func(Entry)
}

// NewJournal writes to w.
func NewJournal(w io.Writer) *Journal { return &Journal{w: w} }

func (j *Journal) add(e Entry) {
	b, err := json.Marshal(e)
	if err != nil {
		panic(err) // of strings
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.Note != nil {
		j.Note(e)
	}
	if _, err := j.w.Write(append(b, '\n')); err != nil {
		j.err = err
	}
}

// Model is what may be there, by all that was journalled. The zero value knows of nothing.
type Model struct {
	mu      sync.Mutex
	allowed map[string]map[string]bool
	pending map[int]bool   // clients with a try under way
	owner   map[string]int // of objects
	Acks    int
}

// Add takes an entry in.
func (m *Model) Add(e Entry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.allowed == nil {
		m.allowed, m.pending, m.owner = map[string]map[string]bool{}, map[int]bool{}, map[string]int{}
	}
	m.owner[e.Object] = e.Client
	switch {
	case e.Do == "ack":
		m.allowed[e.Object] = map[string]bool{e.Value: true}
		m.pending[e.Client] = false
		m.Acks++
	case m.allowed[e.Object] == nil:
		m.allowed[e.Object] = map[string]bool{"": true, e.Value: true}
		m.pending[e.Client] = true
	default:
		m.allowed[e.Object][e.Value] = true
		m.pending[e.Client] = true
	}
}

// State is what a daemon has: object → value.
type State map[string]string

// Judge compares a state with what may be there. lost entries: the last lines of the
// journal may not have come through, so each client may have begun one thing more.
// What is found becomes what is known.
func (m *Model) Judge(s State, lost bool) (wrong []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	excused := map[int]bool{}
	for _, obj := range slices.Sorted(maps.Keys(m.allowed)) {
		allowed := m.allowed[obj]
		have := s[obj]
		if !allowed[have] && (have == "" || !allowed[Any]) {
			c := m.owner[obj]
			if lost && !m.pending[c] && !excused[c] {
				excused[c] = true
			} else {
				wrong = append(wrong, fmt.Sprintf("%s is %q, may be %q", obj, have, slices.Sorted(maps.Keys(allowed))))
			}
		}
		if !strings.HasPrefix(obj, leasedKind) || !allowed[have] {
			m.allowed[obj] = map[string]bool{have: true}
		}
	}
	m.pending = map[int]bool{}
	return wrong
}

// Summary counts the objects that are there for sure.
func (m *Model) Summary() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := map[string]int{}
	for obj, allowed := range m.allowed {
		if !allowed[""] {
			kind, _, _ := strings.Cut(obj, "/")
			n[kind]++
		}
	}
	var out []string
	for _, k := range slices.Sorted(maps.Keys(n)) {
		out = append(out, fmt.Sprintf("%d %ss", n[k], k))
	}
	return strings.Join(out, ", ")
}
