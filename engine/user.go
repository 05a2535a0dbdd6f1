package engine

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/hako-engine/hako/internal/safepath"
)

// Limits on what is read of a container's /etc/passwd and /etc/group: they are
// hostile input (CVE-2026-47262 and its kin).
const (
	accountFileLimit = 4 << 20 // bytes
	accountLineLimit = 64 << 10
)

// account is a user as the kernel needs it.
type account struct {
	UID, GID uint32
	Groups   []uint32 // supplementary, the primary one first
	Home     string
}

// accounts are the account files of one root file system.
type accounts struct {
	passwd, group []byte
}

// readAccounts reads /etc/passwd and /etc/group inside a root. A missing file is
// an empty one.
func readAccounts(root *safepath.Root) (accounts, error) {
	var a accounts
	for _, f := range []struct {
		name string
		to   *[]byte
	}{{"/etc/passwd", &a.passwd}, {"/etc/group", &a.group}} {
		b, err := root.ReadFile(f.name, accountFileLimit)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !isNotDir(err) {
			return a, fmt.Errorf("read %s of the container: %w", f.name, err)
		}
		*f.to = b
	}
	return a, nil
}

const (
	// cachedAccounts is how many images' account files are kept, and cachedAccountSize how long, in bytes, those of one may be.
	cachedAccounts    = 128
	cachedAccountSize = 32 << 10
)

// accountCache keeps the account files of images by their ids, which say what is in them.
type accountCache struct {
	mu    sync.Mutex
	files map[string]accounts
	order []string // oldest first
}

func (c *accountCache) get(image string) (accounts, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, ok := c.files[image]
	return a, ok
}

func (c *accountCache) add(image string, a accounts) {
	if len(a.passwd)+len(a.group) > cachedAccountSize {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.files[image]; ok {
		return
	}
	if c.files == nil {
		c.files = map[string]accounts{}
	}
	if len(c.order) == cachedAccounts {
		delete(c.files, c.order[0])
		c.order = c.order[1:]
	}
	c.files[image] = a
	c.order = append(c.order, image)
}

// resolve turns Docker's user syntax (name|uid)[:(name|gid)] into ids. What is all
// digits is an id and never a name: an entry named "1000" must not turn USER 1000
// into root (CVE-2016-3697).
func (a accounts) resolve(user string, groupAdd []string) (account, error) {
	userPart, groupPart, hasGroup := strings.Cut(user, ":")
	if hasGroup && groupPart == "" {
		hasGroup = false
	}
	acc := account{Home: "/"}
	var name string
	uid, isID, err := parseID(userPart)
	if err != nil {
		return acc, invalidf("unable to find user %s: invalid user id: %v", userPart, err)
	}
	if userPart == "" {
		uid, isID = 0, true
	}
	found := false
	err = eachLine(a.passwd, func(f []string) bool {
		if len(f) < 4 {
			return true
		}
		lineUID, lineIsID, err := parseID(f[2])
		if err != nil || !lineIsID {
			return true
		}
		if isID && lineUID != uid || !isID && f[0] != userPart {
			return true
		}
		gid, ok, err := parseID(f[3])
		if err != nil || !ok {
			return true
		}
		found, name = true, f[0]
		acc.UID, acc.GID = lineUID, gid
		if len(f) > 5 && strings.HasPrefix(f[5], "/") {
			acc.Home = f[5]
		}
		return false
	})
	if err != nil {
		return acc, fmt.Errorf("read /etc/passwd of the container: %w", err)
	}
	if !found {
		if !isID {
			return acc, invalidf("unable to find user %s: no matching entries in passwd file", userPart)
		}
		acc.UID = uid
	}
	if strings.ContainsAny(acc.Home, "\n\r\x00") {
		return acc, invalidf("home directory of user %s holds control characters", userPart)
	}

	var supplementary []uint32
	if hasGroup {
		if acc.GID, err = a.groupID(groupPart); err != nil {
			return acc, err
		}
	} else if name != "" {
		err = eachLine(a.group, func(f []string) bool {
			if len(f) < 4 || !slices.Contains(strings.Split(f[3], ","), name) {
				return true
			}
			if gid, ok, err := parseID(f[2]); err == nil && ok {
				supplementary = append(supplementary, gid)
			}
			return true
		})
		if err != nil {
			return acc, fmt.Errorf("read /etc/group of the container: %w", err)
		}
	}
	for _, g := range groupAdd {
		gid, err := a.groupID(g)
		if err != nil {
			return acc, err
		}
		supplementary = append(supplementary, gid)
	}
	// The primary group is listed too, or a file that denies it to its group would
	// be open (CVE-2022-36109).
	acc.Groups = []uint32{acc.GID}
	for _, g := range supplementary {
		if !slices.Contains(acc.Groups, g) {
			acc.Groups = append(acc.Groups, g)
		}
	}
	return acc, nil
}

// groupID finds a group by id or name.
func (a accounts) groupID(group string) (uint32, error) {
	gid, isID, err := parseID(group)
	if err != nil {
		return 0, invalidf("unable to find group %s: invalid group id: %v", group, err)
	}
	if isID {
		return gid, nil
	}
	found := false
	err = eachLine(a.group, func(f []string) bool {
		if len(f) < 3 || f[0] != group {
			return true
		}
		id, ok, err := parseID(f[2])
		if err != nil || !ok {
			return true
		}
		gid, found = id, true
		return false
	})
	if err != nil {
		return 0, fmt.Errorf("read /etc/group of the container: %w", err)
	}
	if !found {
		return 0, invalidf("unable to find group %s: no matching entries in group file", group)
	}
	return gid, nil
}

// parseID reads a decimal id of at most 2^31-1. isID is false for what is not a
// number at all; signs, hex and overflow are errors and never wrap (CVE-2024-40635).
func parseID(s string) (id uint32, isID bool, err error) {
	digits := strings.TrimLeft(s, "+-")
	if digits == "" || strings.Trim(digits, "0123456789") != "" {
		if strings.HasPrefix(s, "0x") || strings.HasPrefix(s, "0X") {
			if _, err := strconv.ParseUint(s[2:], 16, 64); err == nil {
				return 0, false, fmt.Errorf("%q is not a decimal number", s)
			}
		}
		return 0, false, nil
	}
	if digits != s {
		return 0, false, fmt.Errorf("%q is out of range", s)
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n > math.MaxInt32 {
		return 0, false, fmt.Errorf("%q is out of range", s)
	}
	return uint32(n), true, nil
}

// eachLine calls f with the fields of each line until it gives false.
func eachLine(b []byte, f func(fields []string) bool) error {
	s := bufio.NewScanner(bytes.NewReader(b))
	s.Buffer(nil, accountLineLimit)
	for s.Scan() {
		line := strings.TrimSpace(s.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		if !f(strings.Split(line, ":")) {
			return nil
		}
	}
	return s.Err()
}
