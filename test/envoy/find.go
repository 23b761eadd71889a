// SPDX-License-Identifier: MPL-2.0

package envoy

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// ErrNotInstalled says that no Envoy is on this machine yet.
var ErrNotInstalled = errors.New("envoy is not installed: run test/tools/setup.sh envoy")

// Find returns the path of an Envoy: the one on PATH, or the one that
// test/tools/setup.sh has put below .tools of the module that the working
// directory is in.
func Find() (string, error) {
	if path, err := exec.LookPath("envoy"); err == nil {
		return filepath.Abs(path)
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find envoy: %w", err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("find envoy: %w", ErrNotInstalled)
		}
		dir = filepath.Dir(dir)
	}
	path, err := exec.LookPath(filepath.Join(dir, ".tools", "envoy", "envoy"))
	if err != nil {
		return "", fmt.Errorf("find envoy: %w", ErrNotInstalled)
	}
	return path, nil
}
