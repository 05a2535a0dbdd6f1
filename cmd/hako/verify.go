package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/hako-engine/hako/cli"
)

// verify has hakod's program check signatures, once and without a daemon: what that takes
// would double the time in which hako starts.
func verify(ctx context.Context, r cli.VerifyRequest) (json.RawMessage, error) {
	program, err := hakod()
	if err != nil {
		return nil, err
	}
	request, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, program, "verify-image")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(request), &out, &errs
	if err := cmd.Run(); err != nil {
		if text := strings.TrimPrefix(strings.TrimSpace(errs.String()), "hakod: "); text != "" {
			return nil, errors.New(text)
		}
		return nil, fmt.Errorf("%s: %w", program, err)
	}
	return out.Bytes(), nil
}

// hakod finds the daemon's program: beside this one, or in $PATH.
func hakod() (string, error) {
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), "hakod")
		if st, err := os.Stat(beside); err == nil && st.Mode().IsRegular() {
			return beside, nil
		}
	}
	path, err := exec.LookPath("hakod")
	if err != nil {
		return "", errors.New("hakod checks signatures, and is neither beside hako nor in $PATH")
	}
	return path, nil
}
