// SPDX-License-Identifier: MPL-2.0

package host

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// FuzzMountinfo holds the mounts, whose names tasks with mounts of their own choose: what
// is taken for the root of cgroup v2 is an absolute path that a line of cgroup2 has, and
// what is refused says what was looked for.
func FuzzMountinfo(f *testing.F) {
	for _, seed := range []string{
		"", "\n", "25 30 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
		"25 30 0:22 /user.slice /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n42 30 0:22 / /sys/fs/cgroup/unified rw shared:9 master:1 - cgroup2 none rw\n",
		"25 30 0:22 / /a\\040b\\012c rw - cgroup2 cgroup2 rw\n", "25 30 0:22 / / rw cgroup2\n", "x x x x x x - cgroup2 x\n", "1 2 3:4 / relative rw - cgroup2 c rw\n",
	} {
		f.Add([]byte(seed))
	}
	path := filepath.Join(f.TempDir(), "mountinfo")
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		root, err := FindCgroupRoot(path)
		if err != nil {
			if root != "" || !strings.Contains(err.Error(), "find cgroup v2") {
				t.Errorf("%q: root %q, error %v", data, root, err)
			}
			return
		}
		if !filepath.IsAbs(root) || !strings.Contains(string(data), "cgroup2") {
			t.Errorf("%q: %q is taken for the root of cgroup v2", data, root)
		}
	})
}
