//go:build linux && (amd64 || arm64)

package oci

import (
	"encoding/json"
	"testing"

	"github.com/hako-engine/hako/oci/spec"
)

// BenchmarkDecode reads a config.json.
func BenchmarkDecode(b *testing.B) {
	raw, err := json.MarshalIndent(spec.Default(false), "", "  ")
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(raw)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := spec.Parse(raw); err != nil {
			b.Fatal(err)
		}
	}
}
