// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// dropRow deletes the rows of the allocation's namespace from a table.
func (a *alloc) dropRow(t *testing.T, name string) {
	t.Helper()
	tables, err := bpfmap.OpenTables(a.node.Paths().Maps())
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Close()
	cookie := a.Cookie()
	switch name {
	case "configs":
		generation, err := tables.Generation(cookie)
		if err != nil {
			t.Fatal(err)
		}
		err = tables.Delete(name, bpfmap.BpfConfigKey{Cookie: cookie, Generation: generation})
		if err != nil {
			t.Fatal(err)
		}
	case "exclusions":
		err = bpfmap.DeleteIf[bpfmap.BpfExclusionKey, uint32](tables, name, func(k bpfmap.BpfExclusionKey) bool { return k.Cookie == cookie })
	case "ports":
		err = bpfmap.DeleteIf[bpfmap.BpfExclusionKey, bpfmap.BpfPorts](tables, name, func(k bpfmap.BpfExclusionKey) bool { return k.Cookie == cookie })
	case "addresses":
		err = bpfmap.DeleteIf[bpfmap.BpfAddressKey, bpfmap.BpfAddress](tables, name, func(k bpfmap.BpfAddressKey) bool { return k.Cookie == cookie })
	case "cidrs":
		err = bpfmap.DeleteIf[bpfmap.BpfCidrKey, uint32](tables, name, func(bpfmap.BpfCidrKey) bool { return true })
	case "listeners":
		err = bpfmap.DeleteIf[bpfmap.BpfListenerKey, uint64](tables, name, func(k bpfmap.BpfListenerKey) bool { return k.Cookie == cookie })
	case "proxies":
		err = tables.DeleteProxies(cookie, ^uint8(0))
	default:
		err = tables.Delete(name, cookie)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (a *alloc) dropRoute(t *testing.T, family int) {
	t.Helper()
	prefix, scope := host.IPNet(workload.EncodedPrefix4), netlink.SCOPE_HOST
	if family == netlink.FAMILY_V6 {
		prefix, scope = host.IPNet(workload.EncodedPrefix6), netlink.SCOPE_UNIVERSE
	}
	a.Do(func() {
		route := &netlink.Route{LinkIndex: 1, Dst: prefix, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Scope: scope}
		if err := netlink.RouteDel(route); err != nil {
			t.Errorf("delete route: %v", err)
		}
	})
}

// CHECK repairs what it can: an error would make Nomad destroy the namespace of
// a running allocation. The proxy was there before the damage and stays.
func TestCheckRepairs(t *testing.T) {
	lose := func(path ...string) func(*testing.T, *alloc) {
		return func(t *testing.T, a *alloc) {
			if err := os.RemoveAll(filepath.Join(append([]string{a.node.Paths().PinDir}, path...)...)); err != nil {
				t.Fatal(err)
			}
		}
	}
	row := func(name string) func(*testing.T, *alloc) {
		return func(t *testing.T, a *alloc) { a.dropRow(t, name) }
	}
	for name, damage := range map[string]func(*testing.T, *alloc){
		"all pins lost":       lose(),
		"maps lost":           lose("maps"),
		"links lost":          lose("links"),
		"one link lost":       lose("links", "weir_connect4"),
		"lookups lost":        lose("lookups"),
		"control table lost":  lose("maps", "control"),
		"links and maps lost": func(t *testing.T, a *alloc) { lose("links")(t, a); lose("maps")(t, a) },
		"link detached":       func(t *testing.T, a *alloc) { detachPinned(t, a.node.Paths().Link("weir_getsockopt")) },
		"lookup detached":     func(t *testing.T, a *alloc) { detachPinned(t, a.node.Paths().Lookup(a.Cookie())) },
		"IPv4 route lost":     func(t *testing.T, a *alloc) { a.dropRoute(t, netlink.FAMILY_V4) },
		"IPv6 route lost":     func(t *testing.T, a *alloc) { a.dropRoute(t, netlink.FAMILY_V6) },
		"filters lost":        lose("filters"),
		"a filter lost":       lose("filters", "weir_input"),
		"filter table lost": func(t *testing.T, a *alloc) {
			a.nftables(func(conn *nftables.Conn, table *nftables.Table) { conn.DelTable(table) })
		},
		"filter rules lost": func(t *testing.T, a *alloc) {
			a.nftables(func(conn *nftables.Conn, table *nftables.Table) { conn.FlushTable(table) })
		},
		"workload row lost": row("workloads"),
		"config row lost":   row("configs"),
		"exclusions lost":   row("exclusions"),
		"ports lost":        row("ports"),
		"addresses lost":    row("addresses"),
		"CIDRs lost":        row("cidrs"),
		"budget row lost":   row("budgets"),
		"proxy row lost":    row("proxies"),
		"verdict row lost":  row("verdicts"),
		"releases row lost": row("releases"),
		"listeners lost":    row("listeners"),
		"lo down": func(t *testing.T, a *alloc) {
			a.Do(func() {
				lo, err := netlink.LinkByIndex(1)
				if err == nil {
					err = netlink.LinkSetDown(lo)
				}
				if err != nil {
					t.Error(err)
				}
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.add(full)
			a.startProxy()
			a.works()
			if repaired, err := n.Check(a.key, a.Path); err != nil || len(repaired) != 0 {
				t.Fatalf("check of a workload that is right: repaired %q, %v", repaired, err)
			}
			damage(t, a)
			repaired, err := n.Check(a.key, a.Path)
			if err != nil {
				t.Fatalf("check: %v", err)
			}
			if len(repaired) == 0 {
				t.Error("check does not say what it repaired")
			}
			t.Logf("repaired %q", repaired)
			a.works()
			healthy(t, n.Datapath)
			if list, err := n.Workloads(); err != nil || list[0].Proxy.Identity != inspect.IdentityCgroup || list[0].Origins != 2 {
				t.Errorf("workload after the check: %+v, %v; want its proxy known by its cgroup and two origins", list, err)
			}
			if repaired, err := n.Check(a.key, ""); err != nil || len(repaired) != 0 {
				t.Errorf("second check: repaired %q, %v; want nothing", repaired, err)
			}
			a.remove()
			nothingLeft(t, n.Datapath)
		})
	}
}

func TestCheckRefuses(t *testing.T) {
	n := newNode(t)
	a, b := n.newAlloc(), n.newAlloc()
	a.add()
	if _, err := n.Check(workload.AttachmentID{ContainerID: "nobody", IfName: "eth0"}, a.Path); !errors.Is(err, store.ErrUnknown) {
		t.Errorf("check of an unknown workload: %v, want ErrUnknown", err)
	}
	if _, err := n.Check(a.key, b.Path); !errors.Is(err, host.ErrNetNSGone) {
		t.Errorf("check with another namespace: %v, want ErrNetNSGone", err)
	}
	if _, err := n.Check(a.key, "/no/such/netns"); !errors.Is(err, host.ErrNetNSGone) {
		t.Errorf("check without its namespace: %v, want ErrNetNSGone", err)
	}
	if generation := generationOf(t, n.Datapath, b.NetNS); generation != 0 {
		t.Error("the check redirected the other namespace")
	}
	if err := n.Paths().RemoveRecord(a.key); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Check(a.key, a.Path); !errors.Is(err, store.ErrUnknown) {
		t.Errorf("check after the record was lost: %v, want ErrUnknown", err)
	}
}

// Maps that are lost while workloads run come back with the next call for any
// of them, for all of them.
func TestLostMapsComeBackForAll(t *testing.T) {
	n := newNode(t)
	a, b := n.newAlloc(), n.newAlloc()
	for _, alloc := range []*alloc{a, b} {
		alloc.add(full)
		alloc.startProxy()
	}
	if err := n.SetMeshConfig(b.key, workload.MeshConfig{ExcludeInboundPorts: []uint16{7777}}); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(n.Paths().PinDir); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Check(a.key, a.Path); err != nil {
		t.Fatal(err)
	}
	a.works()
	b.works()
	app := b.serve(taskUID, b.taskCg, "tcp4", "0.0.0.0:7777")
	if answer, err := test.Ask(n.remote, "tcp4", addrPort(b.v4, 7777)); err != nil || answer.Server != app.Name {
		t.Errorf("dial a port that the mesh configuration excludes: %+v, %v; want the application", answer, err)
	}
	healthy(t, n.Datapath)
}

// Rows of one workload are lost: its connections are refused by name, never
// sent past the proxy, until a check repairs it.
func TestLostRowsNeverBypass(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	test.Echo(t, n.remote, "tcp", "[::]:4321")
	test.Echo(t, a.NetNS, "tcp", "[::]:4321")
	a.dropRow(t, "configs")
	moved := a.rose(func() {
		if answer, err := a.ask("tcp4", addrPort(remote4(1), 4321)); !errors.Is(err, unix.ENETUNREACH) {
			t.Errorf("dial without rows: %+v, %v; want ENETUNREACH", answer, err)
		}
		if answer, err := test.Ask(n.remote, "tcp4", addrPort(a.v4, 4321)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("dial from outside without rows: %+v, %v; want ECONNREFUSED", answer, err)
		}
	})
	if moved[bpfmap.RefusedTable] != 2 || len(moved) != 1 {
		t.Errorf("verdicts = %v, want refused_table twice", moved)
	}
	if _, err := n.Check(a.key, a.Path); err != nil {
		t.Fatal(err)
	}
	a.works()
}
