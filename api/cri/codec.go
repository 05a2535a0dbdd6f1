package cri

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

// codec is gRPC's for protobuf, but for the buffers that answers are encoded into: gRPC takes them from a pool that has none
// between 32 KiB and 1 MiB, so that each list of a hundred containers is a megabyte, whatever the server's own pool is.
type codec struct {
	encoding.CodecV2
	pool mem.BufferPool
}

func newCodec(pool mem.BufferPool) codec {
	return codec{encoding.GetCodecV2(grpcproto.Name), pool}
}

// Marshal is encoding.CodecV2. gRPC frees the result when it is sent.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(proto.Message)
	if !ok {
		return c.CodecV2.Marshal(v) // which has the error
	}
	size := proto.Size(m)
	if mem.IsBelowBufferPoolingThreshold(size) {
		return c.CodecV2.Marshal(v)
	}
	buf := c.pool.Get(size)
	out, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend((*buf)[:0], m)
	if err == nil && len(out) != size {
		err = fmt.Errorf("%s has %d bytes, and was said to have %d", m.ProtoReflect().Descriptor().FullName(), len(out), size)
	}
	if err != nil {
		c.pool.Put(buf)
		return nil, err
	}
	return mem.BufferSlice{mem.NewBuffer(buf, c.pool)}, nil
}
