package main

import "context"

func replay(ctx context.Context, s settings, flushes, skip int) error { return nil }
