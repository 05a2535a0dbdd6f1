package network

import (
	"context"
	"testing"
)

func TestConnectDefault(t *testing.T) {
	needRoot(t)
	m := manager(t, options(t))
	a, b := newBox(t, m, "a"), newBox(t, m, "b")
	ea := a.connect("bridge", nil)
	eb := b.connect("bridge", func(c *EndpointConfig) {
		c.Ports = []PortMapping{{Proto: "tcp", ContainerPort: 80, HostPort: 18080}, {Proto: "udp", ContainerPort: 80, HostPort: 18080}}
	})
	t.Logf("%+v\n%+v", ea, eb)
	a.serve(80)
	b.serve(80)
	for _, proto := range []string{"tcp", "udp"} {
		for _, addr := range []string{eb.IPv4.Addr().String() + ":80", "127.0.0.1:18080", "[::1]:18080", eb.Gateway4.String() + ":18080"} {
			out, err := ask(proto, addr, patience)
			t.Log("host", proto, addr, out, err)
		}
		for _, addr := range []string{eb.IPv4.Addr().String() + ":80", eb.Gateway4.String() + ":18080"} {
			out, err := a.ask(proto, addr, patience)
			t.Log("a", proto, addr, out, err)
			out, err = b.ask(proto, addr, patience)
			t.Log("b", proto, addr, out, err)
		}
	}
	a.remove("bridge")
	b.remove("bridge")
	_ = context.Background()
}
