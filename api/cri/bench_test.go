package cri

import (
	"fmt"
	"testing"

	api "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hako-engine/hako/engine"
)

// BenchmarkListContainers asks for the list of 100 running containers with the labels that a kubelet gives, client and all.
func BenchmarkListContainers(b *testing.B) {
	f := &fake{}
	for i := range 100 {
		id := fmt.Sprintf("%064d", i)
		c := container(id, fmt.Sprintf("%064d", i/10), engine.State{Status: engine.StatusRunning})
		c.Config.Labels = map[string]string{"io.kubernetes.container.name": "c", "io.kubernetes.pod.name": "p", "io.kubernetes.pod.namespace": "default",
			"io.kubernetes.pod.uid": "00000000-0000-0000-0000-000000000000"}
		c.Config.Annotations = map[string]string{"io.kubernetes.container.hash": "1", "io.kubernetes.container.restartCount": "0",
			"io.kubernetes.container.terminationMessagePath": "/dev/termination-log", "io.kubernetes.container.terminationMessagePolicy": "File",
			"io.kubernetes.pod.terminationGracePeriod": "30"}
		f.containers = append(f.containers, c)
	}
	r, _ := clients(b, f)
	b.ReportAllocs()
	for b.Loop() {
		if l, err := r.ListContainers(b.Context(), &api.ListContainersRequest{}); err != nil || len(l.Containers) != 100 {
			b.Fatal(len(l.GetContainers()), err)
		}
	}
}
