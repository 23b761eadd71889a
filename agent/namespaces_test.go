// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// mounted makes a namespace where Nomad makes an allocation's, and returns what
// Nomad does to end it.
func (n *node) mounted(id string, ns *test.NetNS) (end func()) {
	n.t.Helper()
	path := filepath.Join(n.config.CNI.NetNSDir, id)
	test.WriteFile(n.t, path, "")
	if err := unix.Mount(ns.Path, path, "", unix.MS_BIND, ""); err != nil {
		n.t.Fatalf("mount namespace: %v", err)
	}
	done := false
	end = func() {
		if done {
			return
		}
		done = true
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			n.t.Errorf("unmount namespace: %v", err)
		}
		if err := os.Remove(path); err != nil {
			n.t.Error(err)
		}
	}
	n.t.Cleanup(end)
	return end
}

// A namespace that libcni does not know, as after somebody cleaned its cache, is
// found where Nomad makes it, guarded, and forgotten when it ends.
func TestAgentFindsANamespaceWithoutLibcni(t *testing.T) {
	n := newNode(t)
	n.fake.answers(registered(numbered(1), numbered(2)))
	n.run()
	n.eventually(numbered(1), api.StateUnprotected) // registered, and nowhere to be found
	ns := test.NewNetNS(t)
	endTask := runsTask(t, numbered(1), "connect-proxy-web", ns.Path)
	end := n.mounted(numbered(1), ns)
	view := n.eventually(numbered(1), api.StateManaged)
	if len(view.Problems) != 1 || !strings.Contains(view.Problems[0].What, "ports that its job maps are not known") {
		t.Errorf("problems = %q, want that the mapped ports are not known", view.Problems)
	}
	n.wantCookie(ns.Cookie())
	also := n.mounted("not-an-allocation", ns)

	also()
	endTask()
	ns.End()
	end()
	n.eventually(numbered(1), api.StateUnprotected)
	if list, err := n.Records(); err != nil || len(list) > 0 {
		t.Errorf("on record: %+v, %v; want nothing", list, err)
	}
}

// Cleaning libcni's cache must not open an allocation that runs.
func TestAgentKeepsTheGuardOfAnAllocationWhoseResultIsGone(t *testing.T) {
	n := newNode(t)
	ns := test.NewNetNS(t)
	n.mounted(numbered(1), ns)
	n.cached(numbered(1), filepath.Join(n.config.CNI.NetNSDir, numbered(1)), "")
	n.cached(numbered(2), test.NewNetNS(t).Path, "")
	n.fake.answers(registered(numbered(1), numbered(2)))
	n.run()
	n.eventually(numbered(1), api.StateManaged)
	n.eventually(numbered(2), api.StateManaged)
	for i := range 2 {
		if err := os.Remove(filepath.Join(n.config.CNI.CacheDir, "results", "nomad-"+numbered(i+1)+"-eth0")); err != nil {
			t.Fatal(err)
		}
	}
	n.eventually(numbered(2), api.StateUnprotected) // of it nobody has a namespace any more
	n.wantCookie(ns.Cookie())
}

// A namespace that is made anew has no address until Nomad adds it again: it is
// guarded before, and its addresses are registered when they come.
func TestAgentGuardsAReplacedNamespaceBeforeItHasAnAddress(t *testing.T) {
	n := newNode(t)
	own := netip.MustParsePrefix("10.77.0.2/24")
	first, second, outside := test.NewNetNS(t), test.NewNetNS(t), test.NewNetNS(t)
	test.Veth(t, test.VethEnd{NetNS: first, Addrs: []netip.Prefix{own}}, test.VethEnd{NetNS: outside, Name: "first"})
	id := numbered(1)
	path := filepath.Join(n.config.CNI.NetNSDir, id)
	end := n.mounted(id, first)
	n.cachedWith(id, path, own.String())
	n.fake.answers(registered(id))
	n.run()
	n.eventually(id, api.StateManaged)
	n.wantAddresses(own.Addr())
	end()
	n.mounted(id, second)
	n.wantCookie(second.Cookie())
	n.wantAddresses()
	test.Veth(t, test.VethEnd{NetNS: second, Addrs: []netip.Prefix{own}}, test.VethEnd{NetNS: outside, Name: "second"})
	n.cachedWith(id, path, own.String()) // as libcni does at the end of every ADD
	n.wantAddresses(own.Addr())
}

func (n *node) wantAddresses(want ...netip.Addr) {
	n.t.Helper()
	test.Eventually(n.t, func() error {
		list, err := n.Records()
		if err != nil || len(list) != 1 {
			return fmt.Errorf("on record: %+v, %v; want one", list, err)
		}
		if diff := cmp.Diff(want, list[0].Request.Addresses, sameAddrs()); len(want)+len(list[0].Request.Addresses) > 0 && diff != "" {
			return fmt.Errorf("addresses (-want +got):\n%s", diff)
		}
		return nil
	}, "the addresses to be on record")
}

// A directory that cannot be listed says of no namespace that it is gone.
func TestNamespacesStayWhereNomadsCannotBeListed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "netns")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := test.WriteFile(t, filepath.Join(dir, numbered(1)), "")
	var spaces discover.Namespaces
	finds := func(fails bool, want map[string]string) {
		t.Helper()
		docker := map[string]string{numbered(2): "/" + t.Name()}
		err := spaces.Find(dir, discover.Containers{NetNS: docker})
		if diff := cmp.Diff(discover.Namespaces{Docker: docker, Nomad: want}, spaces); (err != nil) != fails || diff != "" {
			t.Errorf("find: %v, fails %v; namespaces (-want +got):\n%s", err, fails, diff)
		}
	}
	finds(false, map[string]string{numbered(1): path})
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	test.WriteFile(t, dir, "no directory")
	finds(true, map[string]string{numbered(1): path})
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	finds(false, map[string]string{})
}

func TestNamespacesOf(t *testing.T) {
	test.Need(t, test.Root)
	ns := test.NewNetNS(t)
	dir := t.TempDir()
	gone := filepath.Join(dir, "gone")
	empty := test.WriteFile(t, filepath.Join(dir, "empty"), "")
	for _, c := range []struct {
		name     string
		from     discover.Namespaces
		recorded string
		want     string
		live     bool
	}{
		{"nobody has it", discover.Namespaces{}, gone, gone, false},
		{"Docker knows better", discover.Namespaces{Docker: map[string]string{"a": "/new"}}, ns.Path, "/new", true},
		{"Nomad has it where it was added", discover.Namespaces{Nomad: map[string]string{"a": ns.Path}}, ns.Path, ns.Path, true},
		{"Nomad has it, where it was added is gone", discover.Namespaces{Nomad: map[string]string{"a": ns.Path}}, gone, ns.Path, true},
		{"only an empty file is left", discover.Namespaces{Nomad: map[string]string{"a": empty}}, gone, gone, false},
		{"two that live: where it was added counts", discover.Namespaces{Nomad: map[string]string{"a": ns.Path}}, "/proc/self/ns/net", "/proc/self/ns/net", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if path, live := c.from.Of("a", c.recorded); path != c.want || live != c.live {
				t.Errorf("namespace = %s, %v; want %s, %v", path, live, c.want, c.live)
			}
		})
	}
	if list := (discover.Namespaces{Docker: map[string]string{"a": ns.Path, "b": ns.Path}}).Others(map[string]bool{"a": true}); len(list) != 1 ||
		list[0].Key != (workload.AttachmentID{ContainerID: "b", IfName: "eth0"}) || list[0].NetNS != ns.Path {
		t.Errorf("others = %+v, want b alone", list)
	}
}
