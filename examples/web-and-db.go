//go:build ignore

// The web server of web-and-db.sh: it answers with what another server said.
//
//	web URL          serve on port 80
//	web -once URL    ask once and print the answer
package main

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"time"
)

func main() {
	log.SetFlags(0)
	args := os.Args[1:]
	once := len(args) == 2 && args[0] == "-once"
	if once {
		args = args[1:]
	}
	if len(args) != 1 {
		log.Fatal("usage: web [-once] URL")
	}
	if once {
		s, err := ask(args[0])
		if err != nil {
			log.Fatal(err)
		}
		fmt.Print(s)
		return
	}
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		s, err := ask(args[0])
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		fmt.Fprintf(w, "web asked %s, which said: %s", args[0], s)
	})
	log.Fatal(http.ListenAndServe(":80", nil))
}

func ask(url string) (string, error) {
	c := http.Client{Timeout: 3 * time.Second}
	resp, err := c.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	return string(b), err
}
