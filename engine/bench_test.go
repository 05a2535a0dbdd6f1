package engine

import (
	"fmt"
	"testing"
)

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

// BenchmarkPodContainers lists 100 containers of 10 pods.
func BenchmarkPodContainers(b *testing.B) {
	n := newNode(b)
	for i := range 10 {
		pod := n.pod(hostPod(fmt.Sprint("p", i)))
		for j := range 10 {
			n.member(pod, memberConfig(fmt.Sprint("c", j), "sleep"))
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		if l := n.e.PodContainers(b.Context()); len(l) != 100 {
			b.Fatal(len(l))
		}
	}
}
