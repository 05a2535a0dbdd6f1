package docker

import (
	"fmt"
	"strconv"
	"strings"
)

// version is a version of the API, comparable by value.
type version struct{ major, minor int }

// Versions that the server speaks.
const (
	MinVersion = "1.24"
	MaxVersion = "1.52"
)

// Versions at which answers change shape (see compat.go and the handlers).
var (
	minVersion = version{1, 24}
	maxVersion = version{1, 52}

	v1_28 = version{1, 28} // networks are listed without their containers
	v1_42 = version{1, 42} // streams say whether they are multiplexed; prune of volumes spares named ones
	v1_44 = version{1, 44} // images have no VirtualSize; a MAC address belongs to an endpoint
	v1_48 = version{1, 48} // images show their descriptor
	v1_50 = version{1, 50} // image inspect without the legacy fields
	v1_52 = version{1, 52} // inspect without top-level addresses; events without status, id, from; new df
)

func (v version) less(o version) bool {
	return v.major < o.major || v.major == o.major && v.minor < o.minor
}

func (v version) String() string { return fmt.Sprintf("%d.%d", v.major, v.minor) }

// cutVersion splits "/v1.50/info" into the version and "/info". A path without
// version has the newest.
func cutVersion(path string) (v version, rest string, err error) {
	s, ok := strings.CutPrefix(path, "/v")
	if !ok || s == "" || s[0] < '0' || s[0] > '9' {
		return maxVersion, path, nil
	}
	number, rest, _ := strings.Cut(s, "/")
	major, minor, _ := strings.Cut(number, ".")
	if minor == "" {
		minor = "0"
	}
	v.major, err = strconv.Atoi(major)
	if err == nil {
		v.minor, err = strconv.Atoi(minor)
	}
	switch {
	case err != nil || v.minor < 0:
		return v, "", invalidf("invalid API version %q", number)
	case v.less(minVersion):
		return v, "", invalidf("client version %s is too old. Minimum supported API version is %s, please upgrade your client to a newer version", v, MinVersion)
	case maxVersion.less(v):
		return v, "", invalidf("client version %s is too new. Maximum supported API version is %s", v, MaxVersion)
	}
	return v, "/" + rest, nil
}
