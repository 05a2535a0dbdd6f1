package engine

import "testing"

func TestWish(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		labels      map[string]string
		there, over bool
		status      uint32
		want        move
	}{
		{map[string]string{}, false, false, 0, moveNone},
		{map[string]string{labelRestartStatus: "running"}, false, false, 0, moveStart},
		{map[string]string{labelRestartStatus: "running"}, true, false, 0, moveNone}, // created, running, paused
		{map[string]string{labelRestartStatus: "running"}, true, true, 0, moveStart},
		{map[string]string{labelRestartStatus: "running", labelRestartPolicy: "no"}, true, true, 1, moveNone},
		{map[string]string{labelRestartStatus: "running", labelRestartPolicy: "always"}, true, true, 0, moveStart},
		{map[string]string{labelRestartStatus: "running", labelRestartPolicy: "unless-stopped", labelRestartStopped: "true"}, true, true, 0, moveNone},
		{map[string]string{labelRestartStatus: "running", labelRestartPolicy: "unless-stopped", labelRestartStopped: "false"}, true, true, 0, moveStart},
		{map[string]string{labelRestartStatus: "running", labelRestartPolicy: "on-failure"}, true, true, 0, moveNone},
		{map[string]string{labelRestartStatus: "running", labelRestartPolicy: "on-failure"}, true, true, 1, moveStart},
		{map[string]string{labelRestartStatus: "running", labelRestartPolicy: "on-failure:2", labelRestartCount: "1"}, true, true, 1, moveStart},
		{map[string]string{labelRestartStatus: "running", labelRestartPolicy: "on-failure:2", labelRestartCount: "2"}, true, true, 1, moveNone},
		{map[string]string{labelRestartStatus: "stopped"}, true, false, 0, moveStop},
		{map[string]string{labelRestartStatus: "stopped"}, true, true, 0, moveNone},
		{map[string]string{labelRestartStatus: "stopped"}, false, false, 0, moveNone},
	} {
		w, err := wishOf(c.labels)
		if got := w.move(c.there, c.over, c.status); err != nil || got != c.want {
			t.Errorf("%v, there %v, over %v with %d: %v, %v; want %v", c.labels, c.there, c.over, c.status, got, err, c.want)
		}
	}
	for _, bad := range []map[string]string{
		{labelRestartPolicy: "sometimes"}, {labelRestartPolicy: "always:3"}, {labelRestartPolicy: "on-failure:x"}, {labelRestartPolicy: "on-failure:-1"}, {labelRestartCount: "x"},
	} {
		if _, err := wishOf(bad); err == nil {
			t.Errorf("%v is taken", bad)
		}
	}
}
