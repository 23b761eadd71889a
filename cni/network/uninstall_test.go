// SPDX-License-Identifier: MPL-2.0

package network

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestUninstall(t *testing.T) {
	n := newNode(t)
	a, _ := n.added(t, "a")
	n.ns.Do(func() {
		if removed, kept, err := Uninstall(t.Context(), n.stateDir); err != nil || len(removed)+len(kept) > 0 {
			t.Errorf("with an allocation: removed %q, %v: want nothing", removed, err)
		}
	})
	if repairs, err := n.check(a, nil); err != nil || len(repairs) > 0 {
		t.Errorf("after that: repaired %q, %v: want nothing", repairs, err)
	}
	if err := n.remove(a); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(n.stateDir+"/leases/weir", 0o755); err != nil { // where the default configuration has them
		t.Fatal(err)
	}
	n.ns.Do(func() {
		if removed, kept, err := Uninstall(t.Context(), n.stateDir); err != nil || len(kept) > 0 || !slices.Equal(removed, []string{"bridge " + bridge, "directory " + n.stateDir + "/networks", "directory " + n.stateDir + "/leases"}) {
			t.Errorf("removed %q, %v: want the bridge, records and leases", removed, err)
		}
		if hasDevice(bridge) {
			t.Error("the bridge is still there")
		}
		if left, err := os.ReadDir(n.stateDir); err != nil || len(left) > 0 {
			t.Errorf("left in the state directory: %v, %v: want nothing", left, err)
		}
	})
	n.run(t, "ip", "link", "add", bridge, "type", "bridge")
	n.ns.Do(func() {
		if removed, kept, err := Uninstall(t.Context(), n.stateDir); err != nil || len(removed)+len(kept) > 0 || !hasDevice(bridge) {
			t.Errorf("an operator's own bridge: removed %q, %v: want it left", removed, err)
		}
	})
}

// The mark is on every bridge that a plugin made, whichever instance it was of. Two
// instances share a bridge by its name, and the one that made it removes it.
func TestUninstallLeavesTheBridgeOfAnotherInstance(t *testing.T) {
	n := newNode(t)
	a, _ := n.added(t, "a")
	other := *n
	other.stateDir = filepath.Join(t.TempDir(), "state")
	b, _ := other.added(t, "b")
	if err := n.remove(a); err != nil {
		t.Fatal(err)
	}
	if err := other.remove(b); err != nil {
		t.Fatal(err)
	}
	n.ns.Do(func() {
		removed, kept, err := Uninstall(t.Context(), other.stateDir)
		if err != nil || !slices.Equal(removed, []string{"directory " + other.stateDir + "/networks"}) || !slices.Equal(kept, []string{"bridge " + bridge}) {
			t.Errorf("the other instance: removed %q, kept %q, %v: want its records alone removed", removed, kept, err)
		}
		if !hasDevice(bridge) {
			t.Fatal("the bridge of the first instance is gone")
		}
	})
	// Somebody made one anew under the same name, with the same mark.
	n.run(t, "sh", "-ec", "ip link del $0; ip link add $0 type bridge; ip link set $0 alias 'made by weir'", bridge)
	n.ns.Do(func() {
		removed, kept, err := Uninstall(t.Context(), n.stateDir)
		if err != nil || slices.Contains(removed, "bridge "+bridge) || !slices.Equal(kept, []string{"bridge " + bridge}) || !hasDevice(bridge) {
			t.Errorf("a bridge that took the name: removed %q, kept %q, %v: want it left", removed, kept, err)
		}
		if left, err := os.ReadDir(n.stateDir); err != nil || len(left) > 0 {
			t.Errorf("left in the state directory: %v, %v: want nothing", left, err)
		}
	})
}
