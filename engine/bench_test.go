package engine

import "testing"

// BenchmarkLife creates, starts, waits for and removes a container (docker run --rm) on
// fakes: what the engine itself costs. The numbers of a real one are in docs/performance.md.
func BenchmarkLife(b *testing.B) {
	n := newNode(b)
	b.ReportAllocs()
	for b.Loop() {
		id := n.create("", Config{Cmd: []string{"exit", "0"}, AutoRemove: true})
		gone, err := n.e.WaitContainer(b.Context(), id, WaitRemoved)
		if err != nil {
			b.Fatal(err)
		}
		if err := n.e.StartContainer(b.Context(), id); err != nil {
			b.Fatal(err)
		}
		<-gone
	}
}
