// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// readOnly makes a directory read-only until the test ends.
func readOnly(t *testing.T, dir string) {
	t.Helper()
	err := unix.Mount(dir, dir, "", unix.MS_BIND, "")
	if err == nil {
		t.Cleanup(func() {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Errorf("unmount: %v", err)
			}
		})
		err = unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
	}
	if err != nil {
		t.Fatalf("make %s read-only: %v", dir, err)
	}
}

// What cannot be looked at is redirected all the same, and who only reads still
// reads what there is. Nobody takes it for damage.
func TestWhatCannotBeLookedAtIsInForce(t *testing.T) {
	for _, tc := range []struct {
		name    string
		damage  func(t *testing.T, a *alloc)
		reason  string
		problem string
	}{
		{"record cut short", func(t *testing.T, a *alloc) {
			if err := os.Truncate(a.node.Paths().Record(a.key), 40); err != nil {
				t.Fatal(err)
			}
		}, "record_unreadable", "record cannot be read"},
		{"newer record", func(t *testing.T, a *alloc) {
			path := a.node.Paths().Record(a.key)
			text := strings.Replace(readIfThere(t, path), `"schema": 1`, `"schema": 2`, 1)
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "record_newer", "a newer version wrote it"},
		{"read-only state directory", func(t *testing.T, a *alloc) { readOnly(t, a.node.Paths().StateDir) }, "read_only", "is read-only"},
		{"read-only bpffs", func(t *testing.T, a *alloc) {
			dir := filepath.Dir(a.node.Paths().PinDir)
			remount := func(flags uintptr) error { return unix.Mount("bpf", dir, "bpf", unix.MS_REMOUNT|flags, "") }
			if err := remount(unix.MS_RDONLY); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := remount(0); err != nil {
					t.Error(err)
				}
			})
		}, "read_only", "is read-only"},
		{"stopped holder of the lock", func(t *testing.T, a *alloc) {
			holder, _ := test.HoldLock(t, a.node.Paths().Lock())
			if err := holder.Signal(unix.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := holder.Signal(unix.SIGCONT); err != nil {
					t.Error(err)
				}
			})
		}, "locked", "is stopped"},
		{"another layout", func(t *testing.T, a *alloc) {
			editControl(t, a.node.Datapath, func(row *bpfmap.BpfControl) { row.Layout++ })
			t.Cleanup(func() {
				table, err := ebpf.LoadPinnedMap(filepath.Join(a.node.Paths().Maps(), "control"), nil)
				if err != nil {
					t.Fatal(err)
				}
				defer table.Close()
				var row bpfmap.BpfControl
				if err := table.Lookup(uint32(0), &row); err != nil {
					t.Fatal(err)
				}
				row.Layout--
				if err := table.Put(uint32(0), &row); err != nil {
					t.Fatal(err)
				}
			})
		}, "layout", "another version"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			n.Datapath = n.Within(50 * time.Millisecond)
			a, b := n.newAlloc(), n.newAlloc()
			a.add(full)
			b.add()
			a.startProxy()
			a.works()
			tc.damage(t, a)
			_, err := n.Check(a.key, a.Path)
			if reason, unseen := inspect.CouldNotLook(err); !unseen || reason != tc.reason {
				t.Errorf("check: %v, reason %q; want %q", err, reason, tc.reason)
			}
			if redirected, err := n.InForce(a.Path); err != nil || !redirected {
				t.Errorf("in force: %t, %v; want it so", redirected, err)
			}
			status, err := n.Status()
			if err != nil || !anyProblem(status.Problems, tc.problem) || len(status.Problems) > 3 {
				t.Errorf("status: %v, %v; want a problem that says %q", status.Problems, err, tc.problem)
			}
			if list, err := n.Workloads(); tc.reason != "layout" && (len(list) == 0 || err != nil && !errors.Is(err, store.ErrUnreadable)) {
				t.Errorf("workloads: %v, %v", list, err)
			}
			if list, err := n.Verdicts(); tc.reason != "layout" && (len(list) == 0 || err != nil && !errors.Is(err, store.ErrUnreadable)) {
				t.Errorf("verdicts: %v, %v", list, err)
			}
			a.works()
		})
	}
}

func TestWhatIsBrokenIsNotInForce(t *testing.T) {
	for name, damage := range map[string]func(*testing.T, *alloc){
		"link detached":   func(t *testing.T, a *alloc) { detachPinned(t, a.node.Paths().Link("weir_getsockopt")) },
		"lookup detached": func(t *testing.T, a *alloc) { detachPinned(t, a.node.Paths().Lookup(a.Cookie())) },
		"rows lost":       func(t *testing.T, a *alloc) { a.dropRow(t, "workloads") },
		"route lost":      func(t *testing.T, a *alloc) { a.dropRoute(t, netlink.FAMILY_V4) },
		"unloaded": func(t *testing.T, a *alloc) {
			if _, err := a.node.Unload(); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.add()
			if redirected, err := n.InForce(a.Path); err != nil || !redirected {
				t.Fatalf("in force: %t, %v; want it so", redirected, err)
			}
			damage(t, a)
			if redirected, err := n.InForce(a.Path); err != nil || redirected {
				t.Errorf("in force: %t, %v; want it not so", redirected, err)
			}
		})
	}
	n := newNode(t)
	if redirected, err := n.InForce(test.NewNetNS(t).Path); err != nil || redirected {
		t.Errorf("namespace that was never added: %t, %v", redirected, err)
	}
}
