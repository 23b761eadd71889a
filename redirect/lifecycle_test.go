// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// generationOf is the generation in force of a namespace; 0 for none.
func generationOf(t *testing.T, d *Datapath, ns *test.NetNS) uint64 {
	t.Helper()
	tables, err := bpfmap.OpenTables(d.paths.Maps())
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Close()
	generation, err := tables.Generation(ns.Cookie())
	if err != nil {
		t.Fatal(err)
	}
	return generation
}

// remove takes the allocation out of Weir.
func (a *alloc) remove() {
	a.node.t.Helper()
	if err := a.node.Remove(a.key); err != nil {
		a.node.t.Fatalf("%+v", err)
	}
}

// free fails the test unless the allocation's traffic passes untouched.
func (a *alloc) free() {
	t := a.node.t
	t.Helper()
	remote := test.Echo(t, a.node.remote, "tcp", "[::]:5432")
	defer remote.Close()
	for _, addr := range []netip.Addr{remote4(a.number), remote6(a.number)} {
		if answer, err := a.ask("tcp", addrPort(addr, 5432)); err != nil || answer.Server != remote.Name {
			t.Errorf("dial of a namespace without Weir: %+v, %v; want %s", answer, err, remote.Name)
		}
	}
	if v4, v6 := routesOf(t, a.NetNS); v4 || v6 {
		t.Errorf("routes are left: IPv4 %t, IPv6 %t", v4, v6)
	}
}

// full is a request that has rows in every table.
func full(r *workload.Request) {
	r.ExcludeInboundPorts = []uint16{22, 8080}
	r.ExcludeOutboundPorts = []uint16{25, 5433}
	r.ExcludeUIDs = []uint32{7, 4_000_000_000}
	r.ExcludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/32")}
	r.DNS = workload.DNS{Port: 8600}
}

func TestAddTwiceIsOnce(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(full)
	a.startProxy()
	a.works()
	generation, rows, lookup := generationOf(t, n.Datapath, a.NetNS), rowCounts(t, n.Datapath), linkIDs(t, n.paths.Lookup(a.Cookie()))
	record, err := os.ReadFile(n.paths.Record(a.key))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		a.add(full)
	}
	if now := generationOf(t, n.Datapath, a.NetNS); now != generation {
		t.Errorf("generation = %d after the same ADD, was %d", now, generation)
	}
	if now := linkIDs(t, n.paths.Lookup(a.Cookie())); now != lookup {
		t.Errorf("lookup link and program = %d after the same ADD, were %d", now, lookup)
	}
	if diff := cmp.Diff(rows, rowCounts(t, n.Datapath)); diff != "" {
		t.Errorf("rows after the same ADD (-want +got):\n%s", diff)
	}
	again, err := os.ReadFile(n.paths.Record(a.key))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(record), string(again)); diff != "" {
		t.Errorf("record after the same ADD (-want +got):\n%s", diff)
	}
	a.works()
}

// What has no rows is part of the request too: GC goes by the network, people
// by the job.
func TestAddAgainKeepsTheLastRequest(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	generation := generationOf(t, n.Datapath, a.NetNS)
	second := filepath.Join(t.TempDir(), "netns")
	if err := os.Symlink(a.Path, second); err != nil {
		t.Fatal(err)
	}
	request := a.request()
	request.Network, request.Job.ID, request.Notes = "other", "renamed", []string{"a note"}
	if err := n.Add(Attachment{Key: a.key, NetNS: second, Request: request}); err != nil {
		t.Fatal(err)
	}
	r, err := n.paths.ReadRecord(a.key)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(request, r.Request, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("request on record (-want +got):\n%s", diff)
	}
	if r.NetNS != second || !r.Complete {
		t.Errorf("record: netns %s, complete %t; want %s, complete", r.NetNS, r.Complete, second)
	}
	if now := generationOf(t, n.Datapath, a.NetNS); now != generation {
		t.Error("rows were written anew for a change that has none")
	}
}

func TestAddGivesUpTheOldNamespaceOfAKey(t *testing.T) {
	n := newNode(t)
	old, next := n.newAlloc(), n.newAlloc()
	old.add(full)
	old.startProxy()
	old.works()
	next.key = old.key
	next.add()
	next.startProxy()
	next.works()
	old.free()
	if generation := generationOf(t, n.Datapath, old.NetNS); generation != 0 {
		t.Errorf("the old namespace has generation %d", generation)
	}
	if _, err := os.Stat(n.paths.Lookup(old.Cookie())); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("lookup link of the old namespace: %v, want it gone", err)
	}
	next.remove()
	nothingLeft(t, n.Datapath)
}

func TestAddTakesOverANamespaceOfAnotherKey(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(full)
	a.startProxy()
	a.works()
	former := a.key
	a.key = workload.AttachmentID{ContainerID: "heir", IfName: "eth0"}
	a.add()
	a.works()
	list, err := n.Workloads()
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 || list[0].Key != a.key {
		t.Errorf("workloads = %+v, want %s alone", list, a.key)
	}
	if err := n.Remove(former); err != nil {
		t.Fatal(err)
	}
	a.works() // a late DEL of the former key takes nothing away
	healthy(t, n.Datapath)
	a.remove()
	a.free()
	nothingLeft(t, n.Datapath)
}

func TestAddRefuses(t *testing.T) {
	d := newDatapath(t)
	empty := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	valid := test.NewNetNS(t)
	hosted := filepath.Join(t.TempDir(), "host")
	if err := os.WriteFile(hosted, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("/proc/self/ns/net", hosted, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(hosted, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	for _, tc := range []struct {
		name, netns string
		request     workload.Request
		want        error
	}{
		{"the caller's namespace", "/proc/self/ns/net", workload.Request{}, host.ErrHostNetNS},
		{"the host's namespace by another name", hosted, workload.Request{}, host.ErrHostNetNS},
		{"a path that is gone", "/no/such/netns", workload.Request{}, host.ErrNetNSGone},
		{"an empty file", empty, workload.Request{}, host.ErrNetNSGone},
		{"a directory", t.TempDir(), workload.Request{}, host.ErrNetNSGone},
		{"a namespace of another kind", "/proc/self/ns/mnt", workload.Request{}, host.ErrNetNSGone},
		{"the same port twice", valid.Path, workload.Request{InboundPort: 15001}, nil},
		{"an unknown mode", valid.Path, workload.Request{Mode: "magic"}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := d.Add(Attachment{Key: workload.AttachmentID{ContainerID: "refused", IfName: "eth0"}, NetNS: tc.netns, Request: tc.request})
			if err == nil || tc.want != nil && !errors.Is(err, tc.want) {
				t.Errorf("add: %v, want %v", err, tc.want)
			}
			nothingLeft(t, d)
		})
	}
}

func TestFailedAddLeavesNothing(t *testing.T) {
	many := make([]uint32, 262144+1) // MAX_ROWS, and one
	for i := range many {
		many[i] = uint32(i)
	}
	for _, tc := range []struct {
		name   string
		damage func(t *testing.T, n *node, a *alloc, r *workload.Request)
	}{
		{"record cannot be written", func(t *testing.T, n *node, a *alloc, _ *workload.Request) {
			if err := os.MkdirAll(n.paths.Record(a.key)+".tmp", 0o700); err != nil {
				t.Fatal(err)
			}
		}},
		{"lookup cannot be pinned", func(t *testing.T, n *node, a *alloc, r *workload.Request) {
			full(r)
			if err := os.MkdirAll(n.paths.Lookup(a.Cookie()), 0o700); err != nil {
				t.Fatal(err)
			}
		}},
		{"a table is full", func(_ *testing.T, _ *node, _ *alloc, r *workload.Request) {
			full(r)
			r.ExcludeUIDs = many
		}},
		{"the last table is another one", func(t *testing.T, n *node, _ *alloc, r *workload.Request) {
			full(r)
			// The true one is back in place when the test looks at what is left.
			pin, held := filepath.Join(n.paths.Maps(), "workloads"), filepath.Join(n.paths.PinDir, "held")
			if err := os.Rename(pin, held); err != nil {
				t.Fatal(err)
			}
			other, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
			if err != nil {
				t.Fatal(err)
			}
			defer other.Close()
			if err := other.Pin(pin); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			request := a.request()
			tc.damage(t, n, a, &request)
			held := kernelObjects(t, n.Datapath)
			want, descriptors := held.counts(), openFiles(t)
			err := n.Add(Attachment{Key: a.key, NetNS: a.Path, Request: request})
			if err == nil {
				t.Fatal("add succeeded")
			}
			t.Logf("add: %v", err)
			if now := openFiles(t); now != descriptors {
				t.Errorf("%d descriptors are open, were %d", now, descriptors)
			}
			if _, err := os.Stat(filepath.Join(n.paths.PinDir, "held")); err == nil {
				if err := os.Rename(filepath.Join(n.paths.PinDir, "held"), filepath.Join(n.paths.Maps(), "workloads")); err != nil {
					t.Fatal(err)
				}
			}
			nothingLeft(t, n.Datapath)
			a.free()
			held.settle(t, want)
			// The cause is gone, the same ADD works.
			a.add(full)
			a.startProxy()
			a.works()
		})
	}
}

func TestRemoveWhatIsNotThere(t *testing.T) {
	d := unloadedDatapath(t)
	key := workload.AttachmentID{ContainerID: "nobody", IfName: "eth0"}
	if err := d.Remove(key); err != nil {
		t.Errorf("remove with nothing loaded: %v", err)
	}
	if _, err := os.Stat(d.paths.PinDir); err == nil {
		t.Error("remove loaded the data path")
	}
	if _, err := d.Load(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := d.Remove(key); err != nil {
			t.Errorf("remove of an unknown workload: %v", err)
		}
	}
}

func TestRemoveGivesTheNamespaceBack(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(full)
	a.startProxy()
	a.works()
	for range 2 {
		a.remove()
		a.free()
		nothingLeft(t, n.Datapath)
	}
	// The proxy's listeners outlive the DEL; they are registered again.
	a.add(full)
	a.works()
}

func TestRemoveWithoutItsNamespace(t *testing.T) {
	n := newNode(t)
	var key workload.AttachmentID
	t.Run("allocation", func(t *testing.T) {
		ns := test.NewNetNS(t)
		key = workload.AttachmentID{ContainerID: "dead", IfName: "eth0"}
		request := workload.Request{}
		full(&request)
		if err := n.Add(Attachment{Key: key, NetNS: ns.Path, Request: request}); err != nil {
			t.Fatal(err)
		}
	})
	for range 2 {
		if err := n.Remove(key); err != nil {
			t.Fatal(err)
		}
		nothingLeft(t, n.Datapath)
	}
}

func TestRemoveAfterThePinsWereLost(t *testing.T) {
	for _, part := range []string{"", "maps", "links", "lookups"} {
		t.Run("without "+filepath.Join("weir", part), func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.add(full)
			if err := os.RemoveAll(filepath.Join(n.paths.PinDir, part)); err != nil {
				t.Fatal(err)
			}
			a.remove()
			if _, err := n.Load(); err != nil {
				t.Fatal(err)
			}
			nothingLeft(t, n.Datapath)
			a.free()
		})
	}
}

// A workload whose addresses changed dials from its new one.
func TestAddAgainWithAnotherAddress(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	moved := netip.MustParseAddr("10.9.1.7")
	a.Do(func() {
		eth0, err := netlink.LinkByName("eth0")
		if err == nil {
			err = netlink.AddrAdd(eth0, &netlink.Addr{IPNet: host.IPNet(netip.PrefixFrom(moved, 24))})
		}
		if err != nil {
			t.Error(err)
		}
	})
	a.add(func(r *workload.Request) { r.Addresses = []netip.Addr{moved, a.v6} })
	answer, err := a.ask("tcp4", addrPort(remote4(1), 80))
	if err != nil || answer.From.Addr() != moved || answer.Peer.Addr() != moved {
		t.Errorf("dial: %+v, %v; want it from %s", answer, err, moved)
	}
	a.remove()
	a.free()
}
