// SPDX-License-Identifier: MPL-2.0

package test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// CNIPlugins requires the reference CNI plugins.
const CNIPlugins Requirement = "reference CNI plugins"

// CNIPath returns the directory with the reference CNI plugins: the one that
// test/tools/setup.sh has filled below .tools of the module that the working
// directory is in, else where distributions put them. It skips the test where
// there is none.
func CNIPath(tb testing.TB) string {
	tb.Helper()
	Need(tb, CNIPlugins)
	dir, err := findPlugins()
	if err != nil {
		tb.Fatal(err)
	}
	return dir
}

func findPlugins() (string, error) {
	places := []string{"/opt/cni/bin", "/usr/lib/cni"}
	if tools, err := toolsDir(); err == nil {
		places = append([]string{filepath.Join(tools, "cni")}, places...)
	}
	for _, place := range places {
		if _, err := os.Stat(filepath.Join(place, "host-local")); err == nil {
			return place, nil
		}
	}
	return "", fmt.Errorf("no host-local in %q: run test/tools/setup.sh cni", places)
}

// toolsDir is where test/tools/setup.sh puts what it does not install: .tools of the
// module that the working directory is in.
func toolsDir() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return filepath.Join(dir, ".tools"), nil
		}
	}
	return "", errors.New("the working directory is in no module")
}
