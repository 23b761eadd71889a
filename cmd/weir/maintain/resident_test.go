// SPDX-License-Identifier: MPL-2.0

package maintain

import (
	"os"
	"strconv"
	"strings"
	"testing"
)

// residentCode is how many kB of the program's own file are mapped.
func residentCode(t *testing.T) (kilobytes int) {
	t.Helper()
	own, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	mappings, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	ours := false
	for line := range strings.Lines(string(mappings)) {
		fields := strings.Fields(line)
		if strings.Contains(fields[0], "-") {
			ours = strings.HasSuffix(strings.TrimSpace(line), own)
		}
		if ours && fields[0] == "Rss:" {
			size, err := strconv.Atoi(fields[1])
			if err != nil {
				t.Fatal(err)
			}
			kilobytes += size
		}
	}
	return kilobytes
}

// What only the start needs of the program's file is given back, and the program goes on.
func TestReleaseCode(t *testing.T) {
	before := residentCode(t)
	if err := releaseCodeOnce(); err != nil {
		t.Fatal(err)
	}
	if after := residentCode(t); before == 0 || after >= before {
		t.Errorf("%d kB of the program's file are resident, and were %d kB", after, before)
	}
}
