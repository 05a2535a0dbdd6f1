package network

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/hako-engine/hako/network/internal/nstest"
)

func BenchmarkConnect(b *testing.B) {
	nstest.NeedRoot(b)
	ctx := context.Background()
	for _, bm := range []struct {
		network string
		ports   []PortMapping
	}{{"bridge", nil}, {"bridge", []PortMapping{{Proto: "tcp", ContainerPort: 80}}}, {"apps", nil}} {
		b.Run(fmt.Sprintf("%s-%dports", bm.network, len(bm.ports)), func(b *testing.B) {
			o := options(b)
			o.Log = nil
			m := manager(b, o)
			if _, err := m.Create(ctx, Config{Name: "apps"}); err != nil {
				b.Fatal(err)
			}
			var netnsTime, connect, disconnect, del time.Duration
			for i := 0; b.Loop(); i++ {
				id := fmt.Sprint("b", i)
				t0 := time.Now()
				path, err := m.NewNetns(ctx, id)
				if err != nil {
					b.Fatal(err)
				}
				t1 := time.Now()
				if _, err := m.Connect(ctx, EndpointConfig{ID: id, Network: bm.network, Netns: path, Name: id, Ports: bm.ports}); err != nil {
					b.Fatal(err)
				}
				t2 := time.Now()
				if err := m.Disconnect(ctx, bm.network, id); err != nil {
					b.Fatal(err)
				}
				t3 := time.Now()
				if err := m.DeleteNetns(ctx, path); err != nil {
					b.Fatal(err)
				}
				netnsTime, connect, disconnect, del = netnsTime+t1.Sub(t0), connect+t2.Sub(t1), disconnect+t3.Sub(t2), del+time.Since(t3)
			}
			for name, d := range map[string]time.Duration{"netns": netnsTime, "connect": connect, "disconnect": disconnect, "delete": del} {
				b.ReportMetric(float64(d.Microseconds())/float64(b.N), name+"-µs")
			}
		})
	}
}
