package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"github.com/hako-engine/hako/test/chaos"
)

// machine is a virtual machine that runs.
type machine struct {
	cmd     *exec.Cmd
	lines   chan string // what its clients say; closed at its end
	console string
	once    sync.Once
	files   []io.Closer
}

// boot starts the machine with QEMU's arguments for the disk under test.
func (s settings) boot(ctx context.Context, name string, disk ...string) (*machine, error) {
	port := filepath.Join(s.work, name+".port")
	_ = os.Remove(port)
	l, err := net.Listen("unix", port)
	if err != nil {
		return nil, err
	}
	m := &machine{lines: make(chan string, 1024), console: filepath.Join(s.work, name+".console"), files: []io.Closer{l}}
	args := append([]string{
		"-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max,cx16=off", "-machine", "q35", "-m", "1024", "-smp", "2",
		"-display", "none", "-nodefaults", "-no-reboot", "-kernel", filepath.Join(s.image, "vmlinuz"), "-initrd", filepath.Join(s.work, "initrd.cpio"),
		"-append", `console=ttyS0 quiet panic=-1 mitigations=off no_timer_check snapshotter=` + s.snapshotter + ` load="` + s.load + `"`,
		// The first disk is the one with the programs.
		"-drive", "file=" + filepath.Join(s.work, "tools.ext4") + ",format=raw,if=none,id=tools,readonly=on", "-device", "virtio-blk-pci,drive=tools",
		"-serial", "file:" + m.console,
		"-device", "virtio-serial-pci", "-chardev", "socket,id=o,path=" + port, "-device", "virtserialport,chardev=o,name=vm.output",
	}, disk...)
	m.cmd = exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	log, err := os.Create(filepath.Join(s.work, name+".qemu"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	m.cmd.Stdout, m.cmd.Stderr = log, log
	if err := m.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(m.lines)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		sc := bufio.NewScanner(c)
		sc.Buffer(nil, 8<<20)
		for sc.Scan() {
			m.lines <- sc.Text()
		}
	}()
	return m, nil
}

// kill ends it as a power cut does: it gets no say in it. Lines that came before can still be read.
func (m *machine) kill() {
	m.once.Do(func() {
		_ = m.cmd.Process.Kill()
		_ = m.cmd.Wait()
		for _, f := range m.files {
			_ = f.Close()
		}
	})
}

func (m *machine) logs() string {
	b, _ := os.ReadFile(m.console)
	q, _ := os.ReadFile(strings.TrimSuffix(m.console, ".console") + ".qemu")
	return fmt.Sprintf("console:\n%s\nqemu:\n%s", b[max(0, len(b)-2000):], q)
}

// greeting is what the clients tell before they begin.
type greeting struct {
	state  chaos.State
	check  []chaos.Finding
	layers struct {
		Torn  []string
		Files int
	}
}

// take reads a line of the greeting. done tells that it was the last one.
func (g *greeting) take(line string) (done bool, err error) {
	word, rest, _ := strings.Cut(line, " ")
	var v any
	switch word {
	case "go":
		return true, nil
	case "state":
		v = &g.state
	case "check":
		v = &g.check
	case "layers":
		v = &g.layers
	default:
		return false, fmt.Errorf("the machine says: %s", line)
	}
	return false, json.Unmarshal([]byte(rest), v)
}

// verdict compares the greeting with the model.
func (g *greeting) verdict(m *chaos.Model) (wrong []string) {
	wrong = m.Judge(g.state, true)
	for _, f := range g.check {
		wrong = append(wrong, fmt.Sprintf("check: %s %s %s: %s", f.Severity, f.Problem, f.Object, f.Detail))
	}
	for _, f := range g.layers.Torn {
		wrong = append(wrong, "torn: "+f)
	}
	return wrong
}
