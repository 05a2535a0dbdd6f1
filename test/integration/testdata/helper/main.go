// Command helper is the program inside the test image that busybox has no applet for.
//
//	helper lines RATE COUNT EXIT   write COUNT numbered lines at RATE bytes a second, then exit with EXIT
//	helper oom BYTES               touch that much memory
//	helper serve PORT TEXT         answer every HTTP request with TEXT
//	helper udp PORT                answer every datagram with itself
//	helper trap                    exit with 42 on SIGTERM, saying "ready" first
package main

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

func main() {
	switch os.Args[1] {
	case "lines":
		lines(number(2), number(3))
		os.Exit(number(4))
	case "oom":
		b := make([]byte, number(2))
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		fmt.Println("survived", b[0])
	case "serve":
		fail(http.ListenAndServe(":"+os.Args[2], http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, os.Args[3])
		})))
	case "udp":
		c, err := net.ListenPacket("udp", ":"+os.Args[2])
		fail(err)
		buf := make([]byte, 2048)
		for {
			n, from, err := c.ReadFrom(buf)
			fail(err)
			if _, err := c.WriteTo(buf[:n], from); err != nil {
				fail(err)
			}
		}
	case "trap":
		ch := make(chan os.Signal, 1)
		signal.Notify(ch, syscall.SIGTERM)
		fmt.Println("ready")
		<-ch
		os.Exit(42)
	}
}

// lines writes numbered lines of 100 bytes, evenly.
func lines(rate, count int) {
	w := bufio.NewWriterSize(os.Stdout, 64<<10)
	start := time.Now()
	for i := range count {
		if _, err := fmt.Fprintf(w, "%010d %088d\n", i, 0); err != nil {
			fail(err)
		}
		if ahead := time.Duration(i*100)*time.Second/time.Duration(rate) - time.Since(start); ahead > 5*time.Millisecond {
			fail(w.Flush())
			time.Sleep(ahead)
		}
	}
	fail(w.Flush())
}

func number(i int) int {
	n, err := strconv.Atoi(os.Args[i])
	fail(err)
	return n
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(9)
	}
}
