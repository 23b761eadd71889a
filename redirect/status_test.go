// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

func (n *node) healthy() {
	n.t.Helper()
	status, err := n.Status()
	if err != nil {
		n.t.Fatal(err)
	}
	if !status.Healthy() || !status.Current {
		n.t.Errorf("status: %+v, want healthy", status)
	}
	if diff := cmp.Diff(program.ProgramNames(), status.Links); diff != "" {
		n.t.Errorf("links in force (-want +got):\n%s", diff)
	}
}

// ails fails the test unless Status has exactly one problem, which says so and has a
// remedy.
func (n *node) ails(what string) {
	n.t.Helper()
	status, err := n.Status()
	if err != nil {
		n.t.Fatal(err)
	}
	if status.Healthy() || len(status.Problems) != 1 {
		n.t.Fatalf("problems: %+v, want one with %q", status.Problems, what)
	}
	if p := status.Problems[0]; !strings.Contains(p.What, what) || p.Remedy == "" {
		n.t.Errorf("problem: %+v, want one with %q and a remedy", p, what)
	}
}

// damage is something that happens to a node, and what Status says of it.
type damage struct {
	name, says string
	do         func(t *testing.T, a *alloc)
}

func damages() []damage {
	list := []damage{
		{"link unpinned", "weir_connect4 is not attached", func(t *testing.T, a *alloc) { remove(t, a.node.Paths().Link("weir_connect4")) }},
		{"link detached", "weir_getsockopt is not attached", func(t *testing.T, a *alloc) { detachPinned(t, a.node.Paths().Link("weir_getsockopt")) }},
		{"lookup unpinned", "lookup program is not attached", func(t *testing.T, a *alloc) { remove(t, a.node.Paths().Lookup(a.Cookie())) }},
		{"lookup detached", "lookup program is not attached", func(t *testing.T, a *alloc) { detachPinned(t, a.node.Paths().Lookup(a.Cookie())) }},
		{"IPv4 route", "routes to the proxy are missing", func(t *testing.T, a *alloc) { removeRoute(t, a, workload.EncodedPrefix4) }},
		{"IPv6 route", "routes to the proxy are missing", func(t *testing.T, a *alloc) { removeRoute(t, a, workload.EncodedPrefix6) }},
	}
	for _, name := range []string{"workloads", "budgets", "verdicts"} {
		list = append(list, damage{"row in " + name, "rows are missing", func(t *testing.T, a *alloc) {
			dropRow(t, a, func(tables *bpfmap.Tables, _ uint64) error { return tables.Delete(name, a.Cookie()) })
		}})
	}
	list = append(list,
		damage{"row in proxies", "rows are missing", func(t *testing.T, a *alloc) {
			dropRow(t, a, func(tables *bpfmap.Tables, _ uint64) error { return tables.DeleteProxies(a.Cookie(), 1) })
		}},
		damage{"row in configs", "rows are missing", func(t *testing.T, a *alloc) {
			dropRow(t, a, func(tables *bpfmap.Tables, generation uint64) error {
				return tables.Delete("configs", bpfmap.BpfConfigKey{Cookie: a.Cookie(), Generation: generation})
			})
		}},
		damage{"row in exclusions", "rows are missing", func(t *testing.T, a *alloc) {
			dropRow(t, a, func(tables *bpfmap.Tables, generation uint64) error {
				return tables.Delete("exclusions", bpfmap.BpfExclusionKey{Cookie: a.Cookie(), Generation: generation, Kind: bpfmap.BpfExclusionKindEXCLUSION_UID, Value: 1500})
			})
		}},
		damage{"row in ports", "rows are missing", func(t *testing.T, a *alloc) {
			dropRow(t, a, func(tables *bpfmap.Tables, generation uint64) error {
				return tables.Delete("ports", bpfmap.BpfExclusionKey{Cookie: a.Cookie(), Generation: generation, Kind: bpfmap.BpfExclusionKindEXCLUSION_PORT_OUT, Value: 5432 / bpfmap.PortsPerRow})
			})
		}},
		damage{"row in addresses", "rows are missing", func(t *testing.T, a *alloc) {
			dropRow(t, a, func(tables *bpfmap.Tables, generation uint64) error {
				return tables.Delete("addresses", bpfmap.BpfAddressKey{Cookie: a.Cookie(), Generation: generation, Addr: bpfmap.EncodeAddr(a.v6)})
			})
		}},
		damage{"row in cidrs", "rows are missing", func(t *testing.T, a *alloc) {
			dropRow(t, a, func(tables *bpfmap.Tables, generation uint64) error {
				return tables.Delete("cidrs", bpfmap.EncodeCIDR(netip.MustParsePrefix("172.16.0.0/12"), a.Cookie(), generation))
			})
		}},
		damage{"row in listeners", "is not registered", func(t *testing.T, a *alloc) {
			dropRow(t, a, func(tables *bpfmap.Tables, _ uint64) error {
				return tables.Delete("listeners", bpfmap.BpfListenerKey{Cookie: a.Cookie(), Role: bpfmap.BpfListenerRoleLISTENER_OUTBOUND4, Port: outboundPort})
			})
		}},
	)
	return list
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func removeRoute(t *testing.T, a *alloc, prefix netip.Prefix) {
	t.Helper()
	route := &netlink.Route{LinkIndex: 1, Dst: host.IPNet(prefix), Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL}
	if prefix.Addr().Is4() {
		route.Scope = netlink.SCOPE_HOST
	}
	a.Do(func() {
		if err := netlink.RouteDel(route); err != nil {
			t.Fatalf("remove route %s: %v", prefix, err)
		}
	})
}

func dropRow(t *testing.T, a *alloc, drop func(tables *bpfmap.Tables, generation uint64) error) {
	t.Helper()
	tables, err := bpfmap.OpenTables(a.node.Paths().Maps())
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Close()
	generation, err := tables.Generation(a.Cookie())
	if err != nil {
		t.Fatal(err)
	}
	if err := drop(tables, generation); err != nil {
		t.Fatal(err)
	}
}

// Every damage is named with its remedy, and a CHECK repairs it under a living proxy.
func TestStatusNamesDamage(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) {
		r.ExcludeOutboundPorts = []uint16{5432}
		r.ExcludeUIDs = []uint32{1500}
		r.ExcludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("172.16.0.0/12")}
	})
	a.startProxy()
	n.healthy()
	origin := netip.MustParseAddrPort("192.0.2.1:80")
	for _, damage := range damages() {
		t.Run(damage.name, func(t *testing.T) {
			damage.do(t, a)
			n := &node{Datapath: n.Datapath, t: t, remote: n.remote}
			n.ails(damage.says)
			if repaired, err := n.Check(a.key, a.Path); err != nil || len(repaired) == 0 {
				t.Fatalf("check: %v, repaired %q", err, repaired)
			}
			n.healthy()
			answer, err := a.ask("tcp4", origin.String())
			if err != nil || answer.Server != a.outbound.Name || answer.Origin != origin {
				t.Errorf("dial after the check: %+v, error %v", answer, err)
			}
			if answer, err := a.fromOutside(a.v4, 8080); err != nil || answer.Server != a.inbound.Name {
				t.Errorf("dial from outside after the check: %+v, error %v", answer, err)
			}
			if repaired, err := n.Check(a.key, a.Path); err != nil || len(repaired) > 0 {
				t.Errorf("second check: %v, repaired %q", err, repaired)
			}
		})
	}
}

func TestStatusNotLoaded(t *testing.T) {
	n := &node{Datapath: unloadedDatapath(t), t: t}
	n.ails("not loaded")
}

// What cannot be repaired in place is named too.
func TestStatusOfAGoneNamespace(t *testing.T) {
	d := newDatapath(t)
	n := &node{Datapath: d, t: t}
	t.Run("workload", func(t *testing.T) {
		a := (&node{Datapath: d, t: t, remote: test.NewNetNS(t)}).newAlloc()
		a.add()
	})
	n.ails("namespace is gone")
	if _, err := d.GC("nomad", nil); err != nil {
		t.Fatal(err)
	}
	n.healthy()
}

func TestStatusOfALostRecord(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	remove(t, n.Paths().Record(a.key))
	n.ails("its record is gone")
}

// What is left of a namespace that outlives its record and has ended since concerns
// nobody: the next prune takes it.
func TestStatusOfALostRecordWhoseNamespaceEnded(t *testing.T) {
	d := newDatapath(t)
	n := &node{Datapath: d, t: t}
	t.Run("workload", func(t *testing.T) {
		a := (&node{Datapath: d, t: t, remote: test.NewNetNS(t)}).newAlloc()
		a.add()
		remove(t, d.Paths().Record(a.key))
	})
	test.Eventually(t, func() error {
		status, err := n.Status()
		if err == nil && !status.Healthy() {
			err = fmt.Errorf("problems: %+v", status.Problems)
		}
		return err
	}, "a healthy node")
	if _, err := d.PruneDead(); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(d.Paths().Lookups()); err != nil || len(left) > 0 {
		t.Errorf("lookup programs after a prune: %v, %v: want none", left, err)
	}
}

func TestStatusOfAnMPTCPListener(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	if _, err := a.sockets(proxyUID, a.proxyCg).listen("mptcp", outboundListener, unix.IPPROTO_MPTCP); err != nil {
		t.Fatal(err)
	}
	n.ails("is not registered")
}

// The names are the operator's: scripts read them.
func TestWorkloadsJSON(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) { r.Notes = []string{"a remark"} })
	a.startProxy()
	remove(t, n.Paths().Lookup(a.Cookie()))
	list, err := n.Workloads()
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	var rows []struct {
		ID, Job, Group, NetNS, Cookie, Mode, Guard string
		Addresses, Notes                           []string
		Problems                                   []health.Problem
		workload.NomadNames
		Proxy struct {
			UID, Cgroup, Inbound, Outbound uint64
			Identity                       string
			Listeners                      int
		}
	}
	if err := json.Unmarshal(text, &rows); err != nil {
		t.Fatal(err)
	}
	if len(rows) != 1 {
		t.Fatalf("%d workloads, want 1", len(rows))
	}
	row := rows[0]
	if row.ID != a.key.ContainerID || row.Job != "job" || row.Group != "group" || row.NetNS != a.Path ||
		row.Cookie != strconv.FormatUint(a.Cookie(), 10) || row.Mode != "transparent" || row.Guard != "off" {
		t.Errorf("workload: %+v", row)
	}
	if row.AllocID != row.ID || row.TaskGroup != "group" {
		t.Errorf("names of Nomad: %+v", row.NomadNames)
	}
	if p := row.Proxy; p.UID != proxyUID || p.Cgroup != a.proxyCg.ID || p.Inbound != inboundPort || p.Outbound != outboundPort ||
		p.Identity != "cgroup" || p.Listeners != 2 {
		t.Errorf("proxy: %+v", p)
	}
	if p := row.Problems; len(p) != 1 || p[0].Code != "lookup-missing" || p[0].Severity != health.SeverityError || p[0].AllocID != row.ID ||
		p[0].Subject != "workload "+a.key.String() || !strings.Contains(p[0].What, "lookup program is not attached") || !strings.Contains(p[0].Remedy, "CNI CHECK") {
		t.Errorf("problems: %q, want one with its code, its allocation and its remedy", row.Problems)
	}
	if diff := cmp.Diff([]string{"a remark"}, row.Notes); diff != "" {
		t.Errorf("notes (-want +got):\n%s", diff)
	}
	var names []map[string]any
	if err := json.Unmarshal(text, &names); err != nil {
		t.Fatal(err)
	}
	want := []string{"addresses", "alloc_id", "budget", "cookie", "egress", "group", "guard", "id", "job", "key", "mode", "namespace", "netns", "notes", "origins", "problems", "proxy", "task_group"}
	if diff := cmp.Diff(want, slices.Sorted(maps.Keys(names[0]))); diff != "" {
		t.Errorf("names in JSON (-want +got):\n%s", diff)
	}
}
