// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/program/filter"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// nftables changes the filter of the allocation's namespace, as a task that may
// administer the network can.
func (a *alloc) nftables(change func(*nftables.Conn, *nftables.Table)) {
	t := a.node.t
	t.Helper()
	var err error
	a.Do(func() {
		conn := &nftables.Conn{}
		change(conn, &nftables.Table{Name: filter.FilterTable, Family: nftables.TableFamilyINet})
		err = conn.Flush()
	})
	if err != nil {
		t.Fatalf("change nftables: %v", err)
	}
}

// filterRules are the comments of the rules in the allocation's filter, by chain.
func (a *alloc) filterRules() map[string][]string {
	t := a.node.t
	t.Helper()
	found := make(map[string][]string)
	a.Do(func() {
		conn := &nftables.Conn{}
		chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
		if err != nil {
			t.Errorf("list chains: %v", err)
		}
		for _, chain := range chains {
			if chain.Table.Name != filter.FilterTable {
				continue
			}
			rules, err := conn.GetRules(chain.Table, chain)
			if err != nil {
				t.Errorf("list rules: %v", err)
			}
			found[chain.Name] = []string{}
			for _, rule := range rules {
				comment, _ := userdata.GetString(rule.UserData, userdata.TypeComment)
				found[chain.Name] = append(found[chain.Name], comment)
			}
		}
	})
	return found
}

// The addresses of a namespace inside of an allocation, as Docker in Docker makes one.
var (
	inner4 = netip.MustParsePrefix("172.31.77.2/24")
	inner6 = netip.MustParsePrefix("fd31:77::2/64")
)

// newInner makes a namespace that reaches the remote through the allocation, and
// is reached from there.
func (a *alloc) newInner() *test.NetNS {
	t := a.node.t
	t.Helper()
	inner := test.NewNetNS(t)
	gateways := []netip.Prefix{netip.MustParsePrefix("172.31.77.1/24"), netip.MustParsePrefix("fd31:77::1/64")}
	test.Veth(t,
		test.VethEnd{NetNS: inner, Addrs: []netip.Prefix{inner4, inner6}, DefaultRoute: true},
		test.VethEnd{NetNS: a.NetNS, Name: "inner0", Addrs: gateways})
	a.Do(func() {
		for _, file := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"} {
			if err := os.WriteFile(file, []byte("1"), 0); err != nil {
				t.Error(err)
			}
		}
	})
	a.node.remote.Do(func() {
		for prefix, via := range map[netip.Prefix]netip.Addr{inner4.Masked(): a.v4, inner6.Masked(): a.v6} {
			if err := netlink.RouteAdd(&netlink.Route{Dst: host.IPNet(prefix), Gw: via.AsSlice()}); err != nil {
				t.Errorf("route to %s: %v", prefix, err)
			}
		}
	})
	return inner
}

func TestForwardedTraffic(t *testing.T) {
	transparent := func(r *workload.Request) { r.Mode = workload.ModeTransparent }
	direct := func(r *workload.Request) { r.Mode = workload.ModeDirect }
	gateway := func(r *workload.Request) { r.Mode = workload.ModeGateway }
	for _, tc := range []struct {
		name    string
		mode    func(*workload.Request)
		guard   workload.Guard
		forward bool
		verdict bpfmap.Verdict // of each connection
		counted bool
	}{
		{"transparent", transparent, workload.GuardOff, false, bpfmap.RefusedForwarded, true},
		{"transparent, audit", transparent, workload.GuardAudit, false, bpfmap.RefusedForwarded, true},
		{"transparent, enforce", transparent, workload.GuardEnforce, false, bpfmap.RefusedForwarded, true},
		{"transparent, allowed", transparent, workload.GuardOff, true, bpfmap.Forwarded, true},
		{"transparent, enforce, allowed", transparent, workload.GuardEnforce, true, bpfmap.Forwarded, true},
		{"direct", direct, workload.GuardOff, false, bpfmap.Forwarded, false},
		{"direct, audit", direct, workload.GuardAudit, false, bpfmap.Forwarded, true},
		{"direct, enforce", direct, workload.GuardEnforce, false, bpfmap.RefusedForwarded, true},
		{"direct, enforce, allowed", direct, workload.GuardEnforce, true, bpfmap.Forwarded, true},
		{"gateway, enforce", gateway, workload.GuardEnforce, false, bpfmap.RefusedForwarded, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.add(tc.mode, func(r *workload.Request) { r.Forward = tc.forward })
			if err := n.SetMeshConfig(a.key, workload.MeshConfig{Guard: tc.guard}); err != nil {
				t.Fatal(err)
			}
			inner := a.newInner()
			test.Echo(t, n.remote, "tcp", "[::]:9000")
			test.Echo(t, inner, "tcp", "[::]:9000")
			want := map[bpfmap.Verdict]uint64{}
			if tc.counted {
				want[tc.verdict] = 1
			}
			for _, dial := range []struct {
				from *test.NetNS
				to   netip.Addr
			}{
				{inner, remote4(a.number)}, {inner, remote6(a.number)}, {n.remote, inner4.Addr()}, {n.remote, inner6.Addr()},
			} {
				moved := a.rose(func() {
					_, err := test.Ask(dial.from, "tcp", addrPort(dial.to, 9000))
					if tc.verdict == bpfmap.RefusedForwarded && !errors.Is(err, syscall.ECONNREFUSED) {
						t.Errorf("dial %s through the allocation: %v, want connection refused", dial.to, err)
					}
					if tc.verdict == bpfmap.Forwarded && err != nil {
						t.Errorf("dial %s through the allocation: %v", dial.to, err)
					}
				})
				verdictsAre(t, moved, want)
			}
		})
	}
}

// The operator's word reaches a workload that runs, and is taken back.
func TestForwardedTrafficFollowsTheOverlay(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	inner := a.newInner()
	test.Echo(t, n.remote, "tcp", "[::]:9000")
	for _, forward := range []bool{false, true, false} {
		if err := n.SetMeshConfig(a.key, workload.MeshConfig{Forward: forward}); err != nil {
			t.Fatal(err)
		}
		if _, err := test.Ask(inner, "tcp", addrPort(remote4(a.number), 9000)); (err == nil) != forward {
			t.Errorf("dial through the allocation, allowed: %t: %v", forward, err)
		}
	}
}

// A packet that is not forwarded meets no rule that the guard does not need.
func TestFilterHasOnlyTheChainsItNeeds(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) { r.Mode = workload.ModeDirect })
	for _, step := range []struct {
		guard  workload.Guard
		chains []string
	}{{workload.GuardOff, nil}, {workload.GuardAudit, []string{"forward", "input"}}, {workload.GuardEnforce, []string{"forward", "input"}}, {workload.GuardOff, nil}} {
		if err := n.SetMeshConfig(a.key, workload.MeshConfig{Guard: step.guard}); err != nil {
			t.Fatal(err)
		}
		var chains []string
		for chain := range a.filterRules() {
			chains = append(chains, chain)
		}
		if slices.Sort(chains); !slices.Equal(chains, step.chains) {
			t.Errorf("guard %s: chains %v, want %v", step.guard, chains, step.chains)
		}
	}
	b := n.newAlloc()
	b.add()
	if rules := b.filterRules(); len(rules) != 1 || len(rules["forward"]) != 2 {
		t.Errorf("a transparent workload without a guard has the rules %v, want two for what is forwarded", rules)
	}
}

// Where a task removed the rules, status says so, a forwarded packet passes
// until the next CHECK, and then no more.
func TestFilterIsMissed(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	inner := a.newInner()
	test.Echo(t, n.remote, "tcp", "[::]:9000")
	if _, err := n.Check(a.key, a.Path); err != nil { // takes in the addresses of the inner device
		t.Fatal(err)
	}
	a.nftables(func(conn *nftables.Conn, table *nftables.Table) { conn.DelTable(table) })
	list, err := n.Workloads()
	if err != nil {
		t.Fatal(err)
	}
	if problems := list[0].Problems; len(problems) != 1 || !strings.Contains(problems[0].What, "filter of forwarded packets") {
		t.Errorf("problems %v, want one about the filter", problems)
	}
	if repaired, err := n.Check(a.key, a.Path); err != nil || len(repaired) != 1 {
		t.Errorf("check: repaired %q, %v", repaired, err)
	}
	if _, err := test.Ask(inner, "tcp", addrPort(remote4(a.number), 9000)); err == nil {
		t.Error("a dial through the allocation passes after the check")
	}
}

// The rules of a namespace that lives on go with the workload, and those of one
// that stays get the programs of another version.
func TestFilterGoesWithTheWorkload(t *testing.T) {
	for name, end := range map[string]func(*alloc) error{
		"removed":  func(a *alloc) error { return a.node.Remove(a.key) },
		"unloaded": func(a *alloc) error { _, err := a.node.Unload(); return err },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.add()
			if len(a.filterRules()) == 0 {
				t.Fatal("no rules")
			}
			if err := end(a); err != nil {
				t.Fatal(err)
			}
			if rules := a.filterRules(); len(rules) != 0 {
				t.Errorf("rules that are left: %v", rules)
			}
		})
	}
	t.Run("upgraded", func(t *testing.T) {
		n := newNode(t)
		a := n.newAlloc()
		a.add()
		before := a.filterRules()["forward"]
		staleDigest(t, n.Datapath)
		if _, err := n.Load(); err != nil {
			t.Fatal(err)
		}
		if after := a.filterRules()["forward"]; slices.Equal(before, after) || len(after) != len(before) {
			t.Errorf("rules %q became %q, want a new program", before, after)
		}
		healthy(t, n.Datapath)
	})
}

// A datagram has no connection to reset: ICMP says that it is refused.
func TestForwardedDatagramsAreRefused(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	inner := a.newInner()
	test.Echo(t, n.remote, "udp", "[::]:9000")
	for addr, want := range map[netip.Addr]error{remote4(a.number): syscall.EHOSTUNREACH, remote6(a.number): syscall.EACCES} {
		verdictsAre(t, a.rose(func() {
			if _, err := test.Ask(inner, "udp", addrPort(addr, 9000)); !errors.Is(err, want) {
				t.Errorf("a datagram to %s through the allocation: %v, want %v", addr, err, want)
			}
		}), map[bpfmap.Verdict]uint64{bpfmap.RefusedForwarded: 1})
	}
}
