// Command guest is what the tests run in containers: it does the operations named by its
// arguments, one after the other, and prints what it sees.
package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// What a thread has of its own (scheduling policy, memory policy) is that of the first
// one: others may begin with less (SCHED_RESET_ON_FORK).
func init() { runtime.LockOSThread() }

func main() {
	args := os.Args[1:]
	next := func() string {
		if len(args) == 0 {
			fmt.Println("guest: argument missing")
			os.Exit(99)
		}
		a := args[0]
		args = args[1:]
		return a
	}
	for len(args) > 0 {
		run(next(), next)
	}
}

func say(v any, err error) {
	if err != nil {
		fmt.Println("error:", err)
		return
	}
	fmt.Println(v)
}

func run(op string, next func() string) {
	switch op {
	case "true":
	case "echo":
		fmt.Println(next())
	case "cat":
		b, err := os.ReadFile(next())
		say(strings.TrimRight(string(b), "\n"), err)
	case "size":
		b, err := os.ReadFile(next())
		say(len(b), err)
	case "ls":
		entries, err := os.ReadDir(next())
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		say(strings.Join(names, " "), err)
	case "readlink":
		say(os.Readlink(next()))
	case "stat":
		var st syscall.Stat_t
		err := syscall.Lstat(next(), &st)
		say(fmt.Sprintf("%o %d:%d %d:%d", st.Mode, st.Rdev>>8, st.Rdev&0xff, st.Uid, st.Gid), err)
	case "write":
		path := next()
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
		if err == nil {
			_, err = f.WriteString(next())
			f.Close()
		} else {
			next()
		}
		say("written", err)
	case "mkdir":
		say("made", os.Mkdir(next(), 0o755))
	case "create":
		f, err := os.OpenFile(next(), os.O_CREATE|os.O_WRONLY, 0o666)
		if err == nil {
			f.Close()
		}
		say("created", err)
	case "fds":
		d, _ := os.Open("/proc/self/fd")
		names, err := d.Readdirnames(-1)
		sort.Strings(names)
		var out []string
		for _, n := range names {
			if link, e := os.Readlink("/proc/self/fd/" + n); e == nil && n != strconv.Itoa(int(d.Fd())) && !ofRuntime(link) {
				out = append(out, n)
			}
		}
		say(strings.Join(out, " "), err)
	case "args":
		say(strings.Join(os.Args, " "), nil)
	case "env":
		say(os.Getenv(next()), nil)
	case "id":
		g, err := os.Getgroups()
		say(fmt.Sprint(os.Getuid(), os.Getgid(), g), err)
	case "hostname":
		say(os.Hostname())
	case "cwd":
		say(os.Getwd())
	case "pid":
		say(os.Getpid(), nil)
	case "umask":
		say(fmt.Sprintf("%04o", syscall.Umask(0)), nil)
	case "status": // a field of /proc/self/status
		key := next()
		b, err := os.ReadFile("/proc/self/status")
		for _, l := range strings.Split(string(b), "\n") {
			if v, ok := strings.CutPrefix(l, key+":"); ok {
				say(strings.TrimSpace(v), err)
			}
		}
	case "rlimit":
		n, _ := strconv.Atoi(next())
		var l [2]uint64
		_, _, e := syscall.RawSyscall6(syscall.SYS_PRLIMIT64, 0, uintptr(n), 0, uintptr(unsafe.Pointer(&l)), 0, 0)
		say(fmt.Sprint(l[0], l[1]), errno(e))
	case "mounts": // mount points and options
		b, err := os.ReadFile("/proc/self/mountinfo")
		for _, l := range strings.Split(strings.TrimSpace(string(b)), "\n") {
			f := strings.Fields(l)
			i := 6
			for f[i] != "-" {
				i++
			}
			fmt.Println(f[3], f[4], f[5], strings.Join(f[6:i], ","), f[i+1])
		}
		say("", err)
	case "links":
		ifs, err := net.Interfaces()
		for _, i := range ifs {
			fmt.Println(i.Name, i.Flags)
		}
		say("", err)
	case "addresses":
		i, err := net.InterfaceByName(next())
		var addrs []net.Addr
		if err == nil {
			addrs, err = i.Addrs()
		}
		say(addrs, err)
	case "tty":
		var ws [4]uint16
		_, _, e := syscall.RawSyscall(syscall.SYS_IOCTL, 0, syscall.TIOCGWINSZ, uintptr(unsafe.Pointer(&ws)))
		say(fmt.Sprintf("tty %dx%d", ws[1], ws[0]), errno(e))
	case "line":
		l, err := bufio.NewReader(os.Stdin).ReadString('\n')
		say("got "+strings.TrimSpace(l), err)
	case "tcp": // a line, over a connection to itself that was there before
		var listen net.ListenConfig
		listen.SetMultipathTCP(false) // CRIU does not know it
		l, err := listen.Listen(context.Background(), "tcp", "127.0.0.1:7777")
		if err != nil {
			say(nil, err)
			return
		}
		to, err := net.Dial("tcp", "127.0.0.1:7777")
		if err != nil {
			say(nil, err)
			return
		}
		from, err := l.Accept()
		say("connected", err)
		line, _ := bufio.NewReader(os.Stdin).ReadString('\n')
		if _, err = to.Write([]byte(line)); err == nil {
			line, err = bufio.NewReader(from).ReadString('\n')
		}
		say("came "+strings.TrimSpace(line), err)
	case "stdin":
		b, err := io.ReadAll(os.Stdin)
		say("got "+string(b), err)
	case "uname":
		var u syscall.Utsname
		err := syscall.Uname(&u)
		var m []byte
		for _, c := range u.Machine {
			if c != 0 {
				m = append(m, byte(c))
			}
		}
		say(string(m), err)
	case "scheduler": // policy, flags, nice, priority
		var a [56]byte
		_, _, e := syscall.RawSyscall6(sysSchedGetattr, 0, uintptr(unsafe.Pointer(&a)), 56, 0, 0, 0)
		say(fmt.Sprint(word(a[4:]), word(a[8:]), int32(word(a[16:])), word(a[20:])), errno(e))
	case "ioprio": // class, priority
		v, _, e := syscall.RawSyscall(sysIoprioGet, 1, 0, 0)
		say(fmt.Sprint(v>>13, v&7), errno(e))
	case "mempolicy": // mode with flags, nodes
		var mode int32
		var nodes [16]uint64
		_, _, e := syscall.RawSyscall6(sysGetMempolicy, uintptr(unsafe.Pointer(&mode)), uintptr(unsafe.Pointer(&nodes)), 1024, 0, 0, 0)
		say(fmt.Sprint(mode, nodes[0]), errno(e))
	case "unshare":
		say("unshared", syscall.Unshare(syscall.CLONE_NEWUTS))
	case "mknod":
		say("made", syscall.Mknod(next(), syscall.S_IFCHR|0o666, 1<<8|3))
	case "open":
		f, err := os.OpenFile(next(), os.O_RDWR, 0)
		if err == nil {
			f.Close()
		}
		say("opened", err)
	case "alloc":
		n, _ := strconv.Atoi(next())
		b := make([]byte, n<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		say("allocated", nil)
	case "peek":
		peek(next())
	case "spawn": // leaves a process behind
		p, err := os.StartProcess("/bin/guest", []string{"guest", "sleep", "3600"}, &os.ProcAttr{Files: []*os.File{nil, os.Stdout}})
		if err == nil {
			p.Release()
		}
		say("spawned", err)
	case "trap":
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM)
		fmt.Println("trapped")
		<-c
		os.Exit(7)
	case "sleep":
		n, _ := strconv.ParseFloat(next(), 64)
		time.Sleep(time.Duration(n * float64(time.Second)))
	case "exit":
		n, _ := strconv.Atoi(next())
		os.Exit(n)
	default:
		fmt.Println("guest: unknown operation", op)
		os.Exit(98)
	}
}

// ofRuntime tells the descriptors that the Go runtime opens itself.
func ofRuntime(link string) bool {
	return strings.Contains(link, "eventpoll") || strings.Contains(link, "eventfd") || strings.HasPrefix(link, "/sys/fs/cgroup/") || strings.HasPrefix(link, "/sys/kernel/mm/")
}

func word(b []byte) uint32 { return *(*uint32)(unsafe.Pointer(&b[0])) }

func errno(e syscall.Errno) error {
	if e == 0 {
		return nil
	}
	return e
}

// peek looks, until the file stop exists, through the /proc entries of all other
// processes for a link that leads out of the container, and tries to open every
// executable for writing. own is the inode of the container's root.
func peek(stop string) {
	var seen, leaks int
	var root syscall.Stat_t
	syscall.Stat("/", &root)
	self := os.Getpid()
	var kept []int
	for {
		if _, err := os.Stat(stop); err == nil {
			break
		}
		procs, _ := filepath.Glob("/proc/[0-9]*")
		for _, p := range procs {
			if p == "/proc/"+strconv.Itoa(self) {
				continue
			}
			seen++
			for _, l := range []string{"cwd", "root"} {
				var st syscall.Stat_t
				if syscall.Stat(p+"/"+l, &st) == nil && st.Dev != root.Dev {
					leaks++
					fmt.Println("leak:", p, l)
				}
			}
			if exe, err := os.Readlink(p + "/exe"); err == nil && !strings.HasPrefix(exe, "/bin/guest") && !strings.HasPrefix(exe, "/memfd:hako-loader") {
				leaks++
				fmt.Println("leak: exe", exe)
			}
			if fd, err := syscall.Open(p+"/exe", syscall.O_RDONLY, 0); err == nil {
				if len(kept) < 200 {
					kept = append(kept, fd)
				} else {
					syscall.Close(fd)
				}
			}
			fds, _ := os.ReadDir(p + "/fd")
			for _, f := range fds {
				link, err := os.Readlink(p + "/fd/" + f.Name())
				if err != nil || strings.HasPrefix(link, "pipe:") || strings.HasPrefix(link, "socket:") || strings.HasPrefix(link, "anon_inode:") ||
					ofRuntime(link) || strings.HasPrefix(link, "/memfd:hako-loader") || link == "/dev/null" || strings.HasPrefix(link, "/proc") || strings.HasPrefix(link, "/dev/pts") {
					continue
				}
				leaks++
				fmt.Println("leak: fd", f.Name(), link)
			}
		}
	}
	for _, fd := range kept {
		link, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
		if strings.HasPrefix(link, "/bin/guest") {
			continue
		}
		w, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_WRONLY, 0)
		if err != nil {
			continue
		}
		// The loader can be opened, but it is sealed.
		if _, err := w.Write([]byte("owned")); err == nil {
			leaks++
			fmt.Println("leak: wrote to", link)
		}
		w.Close()
	}
	fmt.Printf("peeked %t leaks %d\n", seen > 0, leaks)
}
