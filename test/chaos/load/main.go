// Command load is the clients of test/chaos as a program: it works on a daemon until somebody
// ends the machine, and says what was acknowledged.
//
// In flow the daemon's socket and root; out flow lines on standard output: "state JSON",
// "check JSON", "layers JSON" of what it found at its start, then the entries of the journal, each
// a JSON object; "fail TEXT" if something went wrong.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/hako-engine/hako/test/chaos"
)

// startLimit is how long the daemon may take until it has told what it has: there only to end
// what hangs, also in an emulated machine on a busy one.
const startLimit = 20 * time.Minute

func main() {
	socket := flag.String("socket", "/run/hako/docker.sock", "of the daemon")
	root := flag.String("root", "/var/lib/hako", "of the daemon, for a look at layers' files")
	log := flag.String("log", "", "the daemon's log, shown if it does not answer")
	listen := flag.String("listen", "127.0.0.1:5000", "of the registry")
	clients := flag.Int("clients", 16, "how many")
	size := flag.Int("size", 16<<10, "of a layer, in bytes")
	pause := flag.Duration("pause", 0, "between two things that a client does")
	refused := flag.Bool("refused", false, "tell what the daemon refused, in lines that begin with #")
	flag.Parse()
	if err := run(*socket, *root, *listen, *clients, *size, *pause, *refused); err != nil {
		fmt.Printf("fail %v\n", err)
		if b, err := os.ReadFile(*log); err == nil {
			fmt.Printf("fail %q\n", b[max(0, len(b)-4000):])
		}
		os.Exit(1)
	}
}

func run(socket, root, listen string, clients, size int, pause time.Duration, refused bool) error {
	images := chaos.NewRegistry(size)
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	go func() { _ = http.Serve(l, images) }() //nolint:gosec // loopback, for a test
	load := &chaos.Load{Socket: socket, Registry: listen, Images: images, Clients: clients, Pause: pause, Journal: chaos.NewJournal(os.Stdout)}
	ctx, cancel := context.WithTimeout(context.Background(), startLimit)
	defer cancel()
	if err := load.Ready(ctx); err != nil {
		return fmt.Errorf("the daemon does not answer: %w", err)
	}
	state, err := load.State(ctx)
	if err != nil {
		return err
	}
	found, err := load.Check(ctx, true)
	if err != nil {
		return err
	}
	torn, files, err := chaos.CheckLayers(root)
	if err != nil {
		return err
	}
	for name, v := range map[string]any{"state": state, "check": found, "layers": struct {
		Torn  []string
		Files int
	}{torn, files}} {
		b, err := json.Marshal(v)
		if err != nil {
			return err
		}
		fmt.Printf("%s %s\n", name, b)
	}
	fmt.Println("go")
	if refused {
		load.Complain = func(format string, args ...any) { fmt.Printf("# "+format+"\n", args...) }
	}
	load.Run(context.Background())
	return nil
}
