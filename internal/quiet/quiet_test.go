package quiet

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

// TestMain lets the test binary show the slack of its threads, before there are many.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "slacks" {
		Monitor(1234567)
		threads, _ := os.ReadDir("/proc/self/task")
		for _, t := range threads {
			b, err := os.ReadFile("/proc/" + t.Name() + "/timerslack_ns")
			if err != nil {
				fmt.Println(err)
			}
			fmt.Println(t.Name() == strconv.Itoa(os.Getpid()), strings.TrimSpace(string(b)))
		}
		return
	}
	os.Exit(m.Run())
}

func TestMonitor(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: TestMonitor")
	}
	out, err := exec.Command(os.Args[0], "slacks").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	quiet := 0
	for line := range strings.Lines(string(out)) {
		switch first, slack, _ := strings.Cut(strings.TrimSpace(line), " "); {
		case slack == "1234567" && first == "true":
			t.Error("it was set on the first thread")
		case slack == "1234567":
			quiet++
		}
	}
	if quiet != 1 {
		t.Errorf("%d threads are quiet, want the monitor: %s", quiet, out)
	}
}
