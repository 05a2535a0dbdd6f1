package main

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// times is how long calls took.
type times struct {
	mu sync.Mutex
	of map[string][]time.Duration
}

func (t *times) add(name string, took time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.of == nil {
		t.of = map[string][]time.Duration{}
	}
	t.of[name] = append(t.of[name], took)
}

func (t *times) print() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(t.of)) {
		d := t.of[name]
		slices.Sort(d)
		ms := func(q float64) float64 { return float64(d[int(q*float64(len(d)-1))].Microseconds()) / 1000 }
		fmt.Printf("%-18s %6d times, median %8.1f ms, 99 %% %8.1f ms, most %8.1f ms\n", name, len(d), ms(0.5), ms(0.99), ms(1))
	}
}
