package engine

import (
	"encoding/json"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
)

// What docker commit and docker import change of an image's configuration (--change):
// instructions of a Dockerfile, those that run nothing and read no file. Their form is that
// of the Dockerfile reference (docs.docker.com/reference/dockerfile).

const maxInstruction = 64 << 10 // bytes of all changes

// applyChanges applies instructions to a configuration, one after the other.
func applyChanges(c *dockerspec.DockerOCIImageConfig, changes []string) error {
	total, cmdSet := 0, false
	for _, text := range changes {
		for line := range strings.SplitSeq(strings.ReplaceAll(text, "\\\n", ""), "\n") {
			line = strings.TrimSpace(line)
			if total += len(line); total > maxInstruction {
				return invalidf("changes of more than %d bytes", maxInstruction)
			}
			if line == "" || line[0] == '#' {
				continue
			}
			name, rest := line, ""
			if i := strings.IndexAny(line, " \t"); i >= 0 {
				name, rest = line[:i], strings.TrimSpace(line[i:])
			}
			if err := applyInstruction(c, strings.ToUpper(name), rest, &cmdSet); err != nil {
				return err
			}
		}
	}
	return nil
}

func applyInstruction(c *dockerspec.DockerOCIImageConfig, name, rest string, cmdSet *bool) error {
	known := []string{"CMD", "ENTRYPOINT", "ENV", "EXPOSE", "HEALTHCHECK", "LABEL", "ONBUILD", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"}
	if !slices.Contains(known, name) {
		return invalidf("%s is not a valid change command", strings.ToLower(name))
	}
	if rest == "" && name != "CMD" && name != "ENTRYPOINT" {
		return invalidf("%s requires at least one argument", name)
	}
	switch name {
	case "CMD":
		c.Cmd, *cmdSet = commandForm(c, rest), true
	case "ENTRYPOINT":
		c.Entrypoint = commandForm(c, rest)
		if !*cmdSet { // it was made for the entrypoint before
			c.Cmd = nil
		}
	case "ENV":
		pairs, err := pairsOf(name, rest, c.Env)
		if err != nil {
			return err
		}
		for _, p := range pairs {
			c.Env = mergeEnv(c.Env, []string{p[0] + "=" + p[1]})
		}
	case "LABEL":
		pairs, err := pairsOf(name, rest, c.Env)
		if err != nil {
			return err
		}
		c.Labels = orEmpty(c.Labels)
		for _, p := range pairs {
			c.Labels[p[0]] = p[1]
		}
	case "EXPOSE":
		return exposePorts(c, rest)
	case "HEALTHCHECK":
		h, err := healthInstruction(c, rest)
		if err != nil {
			return err
		}
		c.Healthcheck = h
	case "ONBUILD":
		c.OnBuild = append(slices.Clone(c.OnBuild), rest)
	case "STOPSIGNAL":
		sig := expandVars(rest, c.Env)
		if _, err := parseSignal(sig); err != nil {
			return err
		}
		c.StopSignal = sig
	case "USER":
		c.User = expandVars(rest, c.Env)
	case "VOLUME":
		list, ok := jsonList(rest)
		if !ok {
			list = strings.Fields(rest)
		}
		c.Volumes = orEmpty(c.Volumes)
		for _, v := range list {
			if v = strings.TrimSpace(expandVars(v, c.Env)); v == "" {
				return invalidf("VOLUME specified can not be an empty string")
			}
			c.Volumes[v] = struct{}{}
		}
	case "WORKDIR":
		dir := expandVars(rest, c.Env)
		if !path.IsAbs(dir) {
			dir = path.Join("/", c.WorkingDir, dir)
		}
		c.WorkingDir = path.Clean(dir)
	}
	return nil
}

// orEmpty is a map that may be changed without its owner noticing.
func orEmpty[V any](m map[string]V) map[string]V {
	if m == nil {
		return map[string]V{}
	}
	return maps.Clone(m)
}

// commandForm reads the exec form, a JSON list, or else the shell form.
func commandForm(c *dockerspec.DockerOCIImageConfig, rest string) []string {
	if list, ok := jsonList(rest); ok {
		return list
	}
	if rest == "" {
		return nil
	}
	shell := c.Shell
	if len(shell) == 0 {
		shell = []string{"/bin/sh", "-c"}
	}
	return append(slices.Clone(shell), rest)
}

func jsonList(s string) (list []string, ok bool) {
	if !strings.HasPrefix(s, "[") {
		return nil, false
	}
	return list, json.Unmarshal([]byte(s), &list) == nil
}

// pairsOf reads KEY=VALUE ..., or the old form KEY VALUE.
func pairsOf(name, rest string, env []string) (pairs [][2]string, err error) {
	words, err := instructionWords(rest)
	if err != nil {
		return nil, invalidf("%s: %v", name, err)
	}
	if !strings.Contains(words[0], "=") {
		key := words[0]
		value := strings.TrimSpace(strings.TrimPrefix(rest, key))
		if value == "" {
			return nil, invalidf("%s must have two arguments", name)
		}
		return [][2]string{{key, expandVars(value, env)}}, nil
	}
	for _, w := range words {
		k, v, ok := strings.Cut(w, "=")
		if !ok {
			return nil, invalidf("Syntax error - can't find = in %q. Must be of the form: name=value", w)
		}
		k, v = unquote(k, env), unquote(v, env)
		if k == "" {
			return nil, invalidf("%s names can not be blank", name)
		}
		pairs = append(pairs, [2]string{k, v})
	}
	return pairs, nil
}

// instructionWords splits at blanks that are neither quoted nor escaped, and leaves the quotes.
func instructionWords(s string) (words []string, err error) {
	var b strings.Builder
	quote := byte(0)
	for i := 0; i < len(s); i++ {
		ch := s[i]
		switch {
		case ch == '\\' && quote != '\'' && i+1 < len(s):
			b.WriteByte(ch)
			i++
			b.WriteByte(s[i])
			continue
		case quote != 0 && ch == quote:
			quote = 0
		case quote == 0 && (ch == '"' || ch == '\''):
			quote = ch
		case quote == 0 && (ch == ' ' || ch == '\t'):
			if b.Len() > 0 {
				words = append(words, b.String())
				b.Reset()
			}
			continue
		}
		b.WriteByte(ch)
	}
	if quote != 0 {
		return nil, invalidf("unexpected end of statement while looking for matching %s-quote", map[byte]string{'"': "double", '\'': "single"}[quote])
	}
	if b.Len() > 0 {
		words = append(words, b.String())
	}
	return words, nil
}

// unquote resolves quotes, escapes and variables of one word.
func unquote(s string, env []string) string {
	var b strings.Builder
	for len(s) > 0 {
		switch s[0] {
		case '\'':
			end := strings.IndexByte(s[1:], '\'')
			if end < 0 {
				return b.String() + s
			}
			b.WriteString(s[1 : 1+end])
			s = s[end+2:]
		case '"':
			end := 1
			for end < len(s) && s[end] != '"' {
				if s[end] == '\\' {
					end++
				}
				end++
			}
			if end >= len(s) {
				return b.String() + s
			}
			b.WriteString(expandVars(s[1:end], env))
			s = s[end+1:]
		default:
			end := strings.IndexAny(s, `'"`)
			// An escaped quote begins nothing.
			for end > 0 && s[end-1] == '\\' {
				next := strings.IndexAny(s[end+1:], `'"`)
				if next < 0 {
					end = -1
					break
				}
				end += 1 + next
			}
			if end < 0 {
				end = len(s)
			}
			b.WriteString(expandVars(s[:end], env))
			s = s[end:]
		}
	}
	return b.String()
}

// expandVars resolves \x, $NAME, ${NAME}, ${NAME:-word} and ${NAME:+word}.
func expandVars(s string, env []string) string {
	var b strings.Builder
	for i := 0; i < len(s); {
		switch {
		case s[i] == '\\' && i+1 < len(s):
			b.WriteByte(s[i+1])
			i += 2
		case s[i] == '$' && i+1 < len(s) && s[i+1] == '{' && strings.IndexByte(s[i:], '}') > 0:
			end := i + strings.IndexByte(s[i:], '}')
			name, op, word := s[i+2:end], "", ""
			if at := strings.IndexByte(name, ':'); at >= 0 && at+1 < len(name) {
				name, op, word = name[:at], name[at:at+2], name[at+2:]
			}
			v, _ := lookupEnv(env, name)
			switch {
			case op == ":-" && v == "", op == ":+" && v != "":
				v = word
			case op == ":+":
				v = ""
			}
			b.WriteString(v)
			i = end + 1
		case s[i] == '$':
			end := i + 1
			for end < len(s) && (s[end] == '_' || s[end] >= 'a' && s[end] <= 'z' || s[end] >= 'A' && s[end] <= 'Z' || end > i+1 && s[end] >= '0' && s[end] <= '9') {
				end++
			}
			if end == i+1 {
				b.WriteByte('$')
			} else {
				v, _ := lookupEnv(env, s[i+1:end])
				b.WriteString(v)
			}
			i = end
		default:
			b.WriteByte(s[i])
			i++
		}
	}
	return b.String()
}

func exposePorts(c *dockerspec.DockerOCIImageConfig, rest string) error {
	ports := orEmpty(c.ExposedPorts)
	for _, p := range strings.Fields(expandVars(rest, c.Env)) {
		number, proto, ok := strings.Cut(p, "/")
		if !ok {
			proto = "tcp"
		}
		proto = strings.ToLower(proto)
		if proto != "tcp" && proto != "udp" && proto != "sctp" {
			return invalidf("invalid proto: %s", proto)
		}
		first, last, isRange := strings.Cut(number, "-")
		if !isRange {
			last = first
		}
		from, err := strconv.ParseUint(first, 10, 16)
		to, err2 := strconv.ParseUint(last, 10, 16)
		if err != nil || err2 != nil || from == 0 || to < from {
			return invalidf("invalid containerPort: %s", number)
		}
		for ; from <= to; from++ {
			ports[strconv.FormatUint(from, 10)+"/"+proto] = struct{}{}
		}
	}
	c.ExposedPorts = ports
	return nil
}

// healthInstruction reads NONE, or [--OPTION=VALUE ...] CMD COMMAND.
func healthInstruction(c *dockerspec.DockerOCIImageConfig, rest string) (*dockerspec.HealthcheckConfig, error) {
	h := &dockerspec.HealthcheckConfig{}
	for strings.HasPrefix(rest, "--") {
		opt, after, _ := strings.Cut(rest, " ")
		rest = strings.TrimSpace(after)
		key, value, _ := strings.Cut(strings.TrimPrefix(opt, "--"), "=")
		if key == "retries" {
			n, err := strconv.Atoi(value)
			if err != nil || n < 0 {
				return nil, invalidf("--retries must be at least 0, not %q", value)
			}
			h.Retries = n
			continue
		}
		to := map[string]*time.Duration{"interval": &h.Interval, "timeout": &h.Timeout, "start-period": &h.StartPeriod, "start-interval": &h.StartInterval}[key]
		if to == nil {
			return nil, invalidf("unknown flag: %s", key)
		}
		d, err := time.ParseDuration(value)
		if err != nil || d < 0 || d > 0 && d < time.Millisecond {
			return nil, invalidf("interval %q cannot be less than 1ms", opt)
		}
		*to = d
	}
	kind, command, _ := strings.Cut(rest, " ")
	switch command = strings.TrimSpace(command); strings.ToUpper(kind) {
	case "NONE":
		if command != "" {
			return nil, invalidf("HEALTHCHECK NONE takes no arguments")
		}
		h.Test = []string{"NONE"}
	case "CMD":
		if list, ok := jsonList(command); ok && len(list) > 0 {
			h.Test = append([]string{"CMD"}, list...)
		} else if command != "" {
			h.Test = []string{"CMD-SHELL", command}
		} else {
			return nil, invalidf("Missing command after HEALTHCHECK CMD")
		}
	default:
		return nil, invalidf("Unknown type %q in HEALTHCHECK (try CMD)", strings.ToUpper(kind))
	}
	return h, nil
}
