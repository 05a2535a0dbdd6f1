package hako

import (
	"encoding/json"
	"errors"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/hako-engine/hako/"

// rooms is a statement of policy: room → the rooms that it may import. Every room
// may import internal/ and itself. ARCHITECTURE.md says why; change both together.
var rooms = map[string]string{
	"internal": "", // plumbing: knows nothing of containers
	"store":    "",
	"snapshot": "store",
	"image":    "store snapshot",
	"network":  "",
	"oci":      "",
	"shim":     "", // runtimes reach it through shim.Runtime
	"engine":   "store snapshot image network shim",
	"api":      "engine",
	"cli":      "", // talks to the socket, never to the engine
	"demo":     "", // the image that hako carries along
	"cmd":      "api engine image network snapshot store shim oci cli demo",
	"test":     "api engine image network snapshot store shim oci cli cmd demo",
}

// lean lists what must never be linked into a binary, with all below it; with a $ at the
// end, only that package.
var lean = map[string][]string{
	"cmd/hako-shim": {"net/http", "google.golang.org/grpc/internal/transport", "github.com/spf13/cobra", module + "api", module + "engine", module + "store", module + "image"},
	"cmd/hako-oci":  {"net/http", "net", "google.golang.org/grpc", "google.golang.org/protobuf", module + "shim", module + "engine"},
	"cmd/hako": {module + "engine", module + "store", module + "snapshot", module + "oci", module + "shim", module + "network", module + "image$", module + "image/verify",
		"go.etcd.io/bbolt", "github.com/sigstore"},
	"cmd/hakod": {module + "oci$", module + "oci/launch", module + "oci/plan", module + "oci/seccomp", module + "cli"},
}

var update = flag.Bool("update", false, "rewrite the lists of linked packages")

type pkg struct {
	ImportPath, Doc, Name string
	Imports, Deps         []string
	Standard              bool
}

func list(t *testing.T) (out []pkg) {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Doc,Name,Imports,Deps", "./...")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	cmd.Stderr = os.Stderr
	data, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for dec := json.NewDecoder(data); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	return out
}

func room(path string) (string, bool) {
	rel, ok := strings.CutPrefix(path, module)
	name, _, _ := strings.Cut(rel, "/")
	return name, ok
}

func TestRooms(t *testing.T) {
	for _, p := range list(t) {
		from, ok := room(p.ImportPath)
		if !ok {
			continue // the root package holds only tests
		}
		allowed, known := rooms[from]
		if !known {
			t.Errorf("%s is in no known room", p.ImportPath)
		}
		if p.Doc == "" {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
		for _, imp := range p.Imports {
			to, ours := room(imp)
			if !ours || to == from && from != "api" || to == "internal" || slices.Contains(strings.Fields(allowed), to) {
				continue
			}
			if from == "api" && to == "api" && (imp == module+"api/stream" || strings.HasPrefix(imp, p.ImportPath+"/")) {
				continue // doors share the byte streams and nothing else
			}
			t.Errorf("%s must not import %s", p.ImportPath, imp)
		}
	}
}

// TestLinkedPackages keeps the binaries lean: each one's list of packages outside
// the standard library stands in docs/deps, so that a new one shows up in a review.
func TestLinkedPackages(t *testing.T) {
	for _, p := range list(t) {
		name := strings.TrimPrefix(p.ImportPath, module)
		if !strings.HasPrefix(name, "cmd/") || p.Name != "main" {
			continue
		}
		for _, bad := range lean[name] {
			for _, d := range p.Deps {
				if one, ok := strings.CutSuffix(bad, "$"); d == one || !ok && strings.HasPrefix(d, bad+"/") {
					t.Errorf("%s links %s", name, d)
				}
			}
		}
		var deps []string
		for _, d := range p.Deps {
			if first, _, _ := strings.Cut(d, "/"); strings.Contains(first, ".") {
				deps = append(deps, d)
			}
		}
		slices.Sort(deps)
		got := strings.Join(deps, "\n") + "\n"
		path := filepath.Join("docs", "deps", filepath.Base(name)+".txt")
		if *update {
			if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
		} else if got != string(want) {
			t.Errorf("%s links other packages than %s says: if that is meant, run 'go test . -update' and explain it in the change", name, path)
		}
	}
}
