package plan

import "testing"

// BenchmarkContainer compiles Docker's configuration, and the default one with ten v1
// hierarchies.
func BenchmarkContainer(b *testing.B) {
	all := goldens()
	for _, name := range []string{"docker", "default-hybrid"} {
		g := all[name]
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Container(g.spec, g.facts, g.opts); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
