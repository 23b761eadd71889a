// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/program/filter"
	"github.com/weirmesh/weir/test"
)

func TestUnloadRemovesEverything(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	a.works()
	held, pins := kernelObjects(t, n.Datapath), files(t, n.Datapath)
	if want := [3]int{len(held.maps), len(program.ProgramNames()) + len(filter.FilterNames()) + 2, len(program.ProgramNames()) + 1}; held.counts() != want {
		t.Fatalf("maps, programs, links = %d, want %d", held.counts(), want)
	}
	removed, err := n.Unload()
	if err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprint(removed)
	for _, pin := range pins {
		if strings.HasPrefix(pin, n.Paths().PinDir) && !strings.Contains(text, pin) {
			t.Errorf("unload does not say that it removed %s", pin)
		}
	}
	if !slices.Contains(removed, program.Removal{Kind: program.WorkloadRemoved, Object: a.key.String()}) {
		t.Errorf("unload does not name the workload: %q", removed)
	}
	if left := files(t, n.Datapath); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	if _, err := os.Stat(n.Paths().PinDir); err == nil {
		t.Error("the pin directory is left")
	}
	if v4, v6 := routesOf(t, a.NetNS); v4 || v6 {
		t.Errorf("routes are left: IPv4 %t, IPv6 %t", v4, v6)
	}
	held.gone(t)
	// The task reaches the remote itself now.
	remote := test.Echo(t, n.remote, "tcp4", "10.9.1.1:80")
	if answer, err := a.ask("tcp4", "10.9.1.1:80"); err != nil || answer.Server != remote.Name {
		t.Errorf("dial after unload: %+v, %v", answer, err)
	}
	again, err := n.Unload()
	if err != nil || len(again) != 0 {
		t.Errorf("unload of nothing: removed %q, %v", again, err)
	}
}

func TestUnloadFinishesAHalfRemovedInstance(t *testing.T) {
	for _, part := range []string{"maps", "links", "lookups", "maps/control", "records"} {
		t.Run(part, func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.add()
			held := kernelObjects(t, n.Datapath)
			path := filepath.Join(n.Paths().PinDir, part)
			if part == "records" {
				path = n.Paths().Workloads()
			}
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
			if _, err := n.Unload(); err != nil {
				t.Fatal(err)
			}
			if left := files(t, n.Datapath); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
			if part == "records" {
				// Nobody knows the way to the namespace any more: its rules let
				// everything go, and go with it.
				test.Echo(t, n.remote, "tcp4", "10.9.1.1:80")
				if _, err := test.Ask(a.newInner(), "tcp4", "10.9.1.1:80"); err != nil {
					t.Errorf("dial through the allocation after unload: %v", err)
				}
				a.End()
			}
			held.gone(t)
			if _, err := n.Load(); err != nil {
				t.Fatal(err)
			}
			healthy(t, n.Datapath)
		})
	}
}
