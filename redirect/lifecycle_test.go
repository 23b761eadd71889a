// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// generationOf is the generation in force of a namespace; 0 for none.
func generationOf(t *testing.T, d *Datapath, ns *test.NetNS) uint64 {
	t.Helper()
	tables, err := bpfmap.OpenTables(d.Paths().Maps())
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
			if err := os.MkdirAll(n.Paths().Record(a.key)+".tmp", 0o700); err != nil {
				t.Fatal(err)
			}
		}},
		{"lookup cannot be pinned", func(t *testing.T, n *node, a *alloc, r *workload.Request) {
			full(r)
			if err := os.MkdirAll(n.Paths().Lookup(a.Cookie()), 0o700); err != nil {
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
			pin, held := filepath.Join(n.Paths().Maps(), "workloads"), filepath.Join(n.Paths().PinDir, "held")
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
			want, descriptors := held.counts(), test.OpenFiles(t)
			err := n.Add(Attachment{Key: a.key, NetNS: a.Path, Request: request})
			if err == nil {
				t.Fatal("add succeeded")
			}
			t.Logf("add: %v", err)
			closedAgain(t, descriptors, descriptors)
			if _, err := os.Stat(filepath.Join(n.Paths().PinDir, "held")); err == nil {
				if err := os.Rename(filepath.Join(n.Paths().PinDir, "held"), filepath.Join(n.Paths().Maps(), "workloads")); err != nil {
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

func TestRemoveAfterThePinsWereLost(t *testing.T) {
	for _, part := range []string{"", "maps", "links", "lookups"} {
		t.Run("without "+filepath.Join("weir", part), func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.add(full)
			if err := os.RemoveAll(filepath.Join(n.Paths().PinDir, part)); err != nil {
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
