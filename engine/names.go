package engine

import (
	"crypto/rand"
	"encoding/hex"
	mathrand "math/rand/v2"
	"regexp"
	"strconv"
)

// validName is what Docker accepts as the name of a container or volume.
var validName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)

// newID gives 64 random hex digits, the first twelve of which are not all decimal:
// a short id must not look like a number where one is a host name.
func newID() string {
	for {
		var b [32]byte
		rand.Read(b[:])
		id := hex.EncodeToString(b[:])
		if _, err := strconv.ParseInt(id[:12], 10, 64); err != nil {
			return id
		}
	}
}

// shortID is the form of an id that people see.
func shortID(id string) string {
	if len(id) > 12 {
		return id[:12]
	}
	return id
}

var adjectives = []string{
	"able", "airy", "ample", "amber", "apt", "avid", "azure", "bold", "brave", "breezy", "bright", "brisk",
	"calm", "candid", "cheery", "civil", "clear", "clever", "cosy", "crisp", "curious", "dapper", "daring", "deft",
	"eager", "early", "earnest", "easy", "fair", "fancy", "fearless", "fleet", "fluent", "fond", "frank", "fresh",
	"gallant", "gentle", "glad", "golden", "grand", "hardy", "hearty", "humble", "ideal", "jolly", "jovial", "keen",
	"kind", "lively", "loyal", "lucid", "lunar", "mellow", "merry", "mighty", "modest", "neat", "nimble", "noble",
	"patient", "placid", "plucky", "polite", "prime", "proud", "quick", "quiet", "ready", "robust", "serene", "sharp",
	"silent", "sleek", "smart", "snug", "solid", "sprightly", "stable", "steady", "stellar", "sunny", "swift", "tidy",
	"trusty", "upbeat", "valiant", "vivid", "warm", "wise", "witty", "zealous", "zesty",
}

var surnames = []string{
	"abe", "abel", "arimoto", "banach", "bessel", "bohr", "boole", "born", "bose", "cantor", "cauchy", "chandra",
	"chern", "church", "clarke", "codd", "cray", "curie", "dedekind", "dijkstra", "dirac", "edison", "einstein", "euler",
	"faraday", "fermat", "fermi", "floyd", "fourier", "galois", "gauss", "germain", "goldberg", "grothendieck", "hamilton", "hamming",
	"hertz", "hilbert", "hopper", "hoare", "ito", "iwasawa", "jacobi", "joule", "kalman", "kelvin", "kepler", "kleene",
	"knuth", "kodaira", "lagrange", "laplace", "lamarr", "liskov", "lovelace", "maxwell", "meitner", "mendel", "nash", "neumann",
	"newton", "noether", "ohm", "pascal", "pauling", "peano", "perlman", "planck", "poisson", "ramanujan", "riemann", "ritchie",
	"sagan", "shannon", "shimura", "tarski", "taniyama", "tesla", "thompson", "turing", "volta", "weil", "wiener", "wilkes",
	"wirth", "yukawa", "yonath", "zermelo", "zuse",
}

// randomName gives a name such as brave_noether. From the second attempt on a digit follows.
func randomName(attempt int) string {
	n := adjectives[mathrand.IntN(len(adjectives))] + "_" + surnames[mathrand.IntN(len(surnames))]
	if attempt > 0 {
		n += strconv.Itoa(mathrand.IntN(10))
	}
	if attempt > 5 {
		n += strconv.Itoa(mathrand.IntN(1 << 20))
	}
	return n
}
