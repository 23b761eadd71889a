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

// Find returns the path of Envoy: the one that WEIR_TEST_ENVOY names, else the one
// that test/tools/setup.sh has put below .tools of the module that the working
// directory is in, else the one on PATH.
func Find() (string, error) {
	if path := os.Getenv("WEIR_TEST_ENVOY"); path != "" {
		return path, nil
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find envoy: %w", err)
	}
	for ; dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		if path, err := exec.LookPath(filepath.Join(dir, ".tools", "envoy", "envoy")); err == nil {
			return path, nil
		}
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
	}
	path, err := exec.LookPath("envoy")
	if err != nil {
		return "", ErrNotInstalled
	}
	return filepath.Abs(path)
}
