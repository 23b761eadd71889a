// SPDX-License-Identifier: MPL-2.0

package host

import (
	"path/filepath"
	"testing"

	"github.com/weirmesh/weir/test"
)

func TestUsualPlaceOfTheCgroupRoot(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2)
	root, inner := test.CgroupRoot(t), test.NewCgroup(t).Path
	for _, tc := range []struct {
		name  string
		paths []string
		want  string
	}{
		{"the root", []string{root}, root},
		{"a cgroup below the root", []string{inner}, ""},
		{"another file system", []string{t.TempDir()}, ""},
		{"nothing", []string{filepath.Join(root, "missing")}, ""},
		{"the first that is the root", []string{filepath.Join(root, "missing"), inner, root}, root},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := cgroupRootAmong(tc.paths...); got != tc.want {
				t.Errorf("root = %q, want %q", got, tc.want)
			}
		})
	}
	// Wherever it is, both ways lead to the same.
	read, err := FindCgroupRoot("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := CgroupRoot(); err != nil || got != read {
		t.Errorf("root = %q, %v; mountinfo names %q", got, err, read)
	}
}
