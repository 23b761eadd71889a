// SPDX-License-Identifier: MPL-2.0

package program

import (
	"errors"
	"testing"

	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// What the kernel refuses is not tried again at each check; what failed for another
// reason is. The kernel is a fake: none of those that the tests run on refuses.
func TestFamiliesRememberARefusal(t *testing.T) {
	paths := store.Paths{PinDir: t.TempDir(), StateDir: t.TempDir()} // without a program
	guarded := workload.Workload{Egress: workload.GuardEnforce}
	for name, tc := range map[string]struct {
		refusal error
		want    int
	}{"the kernel refuses": {errors.New("no such attach type"), 1}, "it may pass": {nil, 3}} {
		t.Run(name, func(t *testing.T) {
			tries, asked := 0, 0
			f := &Families{
				attach: func(store.Paths) error { tries++; return errors.New("no") },
				refuse: func() error { asked++; return tc.refusal },
			}
			for range 3 {
				if f.Hold(paths, guarded) {
					t.Error("reports that it is attached")
				}
			}
			if f.Hold(paths, workload.Workload{}) || tries != tc.want || asked != tc.want {
				t.Errorf("tried %d times and asked %d times, want %d", tries, asked, tc.want)
			}
		})
	}
}
