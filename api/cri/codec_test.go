package cri

import (
	"strings"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// counted is a pool that notes how large the buffers are that it has given and not got back.
type counted struct {
	mem.BufferPool
	out map[*[]byte]int
}

func (c *counted) Get(n int) *[]byte {
	b := c.BufferPool.Get(n)
	c.out[b] = cap(*b)
	return b
}

func (c *counted) Put(b *[]byte) {
	delete(c.out, b)
	c.BufferPool.Put(b)
}

func TestCodec(t *testing.T) {
	t.Parallel()
	for _, size := range []int{0, 100, 5000, 40000, 200000, 3 << 20} {
		pool := &counted{mem.NewTieredBufferPool(bufferSizes...), map[*[]byte]int{}}
		c := newCodec(pool)
		want := &api.ExecSyncResponse{Stdout: []byte(strings.Repeat("x", size))}
		data, err := c.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range pool.out {
			if n > 4*size+4096 {
				t.Errorf("%d bytes are encoded into a buffer of %d", size, n)
			}
		}
		var got api.ExecSyncResponse
		if err := c.Unmarshal(data, &got); err != nil || !proto.Equal(&got, want) {
			t.Errorf("%d bytes: %v, or another message", size, err)
		}
		data.Free()
		if len(pool.out) != 0 {
			t.Errorf("%d bytes: the buffer was not given back", size)
		}
	}
	if _, err := newCodec(mem.DefaultBufferPool()).Marshal(42); err == nil {
		t.Error("a number is no message")
	}
}
