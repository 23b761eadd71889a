// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/flow"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// guardedBy is registered with the guard that the job of the first asks for.
func guardedBy(guard workload.Guard, ids ...string) http.HandlerFunc {
	services := make(map[string]any)
	for i, id := range ids {
		service := map[string]any{"Kind": "connect-proxy", "Service": "web-sidecar-proxy", "Port": 20001}
		if i == 0 {
			service["Meta"] = map[string]any{"weir-guard": string(guard)}
		}
		services["_nomad-task-"+id+"-group-g-web-80-sidecar-proxy"] = service
	}
	data, err := json.Marshal(services)
	if err != nil {
		return say(500, err.Error())
	}
	return say(200, string(data))
}

// attempt is a connection from outside, as the list names it.
type attempt struct {
	Source, Protocol string
	Port             uint16
}

// The list says what enforce would refuse: the same traffic again is refused where
// the list has it, and nowhere else. And the line that it names lets it in.
func TestGuardListIsWhatEnforceRefuses(t *testing.T) {
	n := newNode(t)
	server, client, outside := test.NewNetNS(t), test.NewNetNS(t), test.NewNetNS(t)
	own, neighbour, outsider := netip.MustParsePrefix("10.77.1.2/24"), netip.MustParsePrefix("10.77.1.3/24"), netip.MustParsePrefix("10.77.2.3/24")
	test.Veth(t, test.VethEnd{NetNS: server, Addrs: []netip.Prefix{own}}, test.VethEnd{NetNS: client, Addrs: []netip.Prefix{neighbour}})
	test.Veth(t, test.VethEnd{NetNS: server, Name: "eth1", Addrs: []netip.Prefix{netip.MustParsePrefix("10.77.2.2/24")}},
		test.VethEnd{NetNS: outside, Addrs: []netip.Prefix{outsider}})
	ids := []string{numbered(1), numbered(2)}
	paths := make(map[string]string)
	for id, ns := range map[string]*test.NetNS{ids[0]: server, ids[1]: client} {
		n.mounted(id, ns)
		paths[id] = n.config.CNI.NetNSDir + "/" + id
	}
	n.cachedWith(ids[0], paths[ids[0]], own.String())
	n.cachedWith(ids[1], paths[ids[1]], neighbour.String())
	for _, at := range []struct{ network, addr string }{{"tcp4", "0.0.0.0:8080"}, {"tcp4", "0.0.0.0:9000"}, {"udp4", "0.0.0.0:9090"}, {"tcp4", "0.0.0.0:20001"}} {
		test.Echo(t, server, at.network, at.addr)
	}
	n.fake.answers(guardedBy(workload.GuardAudit, ids...))
	n.run(func(a *Agent) { a.counting = 50 * time.Millisecond })
	n.eventually(ids[0], api.StateManaged)
	n.eventually(ids[1], api.StateManaged)

	named := "b412a0b1" // what the agent calls the client: its job has no name here
	replay := func() (refused []attempt) {
		for _, from := range []struct {
			ns     *test.NetNS
			source string
			to     netip.Addr
		}{{client, named, own.Addr()}, {outside, outsider.Addr().String(), netip.MustParseAddr("10.77.2.2")}} {
			for _, at := range []attempt{{from.source, "tcp", 8080}, {from.source, "tcp", 9000}, {from.source, "udp", 9090}, {from.source, "tcp", 20001}} {
				if from.ns == outside && at.Port == 9000 {
					continue // nobody dials that one
				}
				if _, err := test.Ask(from.ns, at.Protocol+"4", netip.AddrPortFrom(from.to, at.Port).String()); err != nil {
					refused = append(refused, at)
				}
			}
		}
		return refused
	}
	var list api.GuardList
	listed := func(verdict bpfmap.Verdict) (found []attempt) {
		var err error
		if list, err = api.ReadGuard(context.Background(), n.config.StateDir); err != nil {
			t.Fatal(err)
		}
		for _, e := range list.Entries {
			if e.AllocID != ids[0] || e.Count == 0 || e.Last.Before(e.First) || e.First.Before(list.Since) {
				t.Fatalf("entry %+v: want the allocation, a count and when", e)
			}
			if e.Verdict == verdict.String() {
				found = append(found, attempt{e.Source, e.Protocol, e.Port})
			}
		}
		return found
	}
	const dialled = 5 // pairs of source and port past the proxy
	test.Eventually(t, func() error {
		if refused := replay(); len(refused) > 0 {
			return fmt.Errorf("audit refuses %v", refused)
		}
		if got := listed(bpfmap.GuardAudited); len(got) != dialled {
			return fmt.Errorf("the list is %+v", got)
		}
		return nil
	}, "the audit to list what comes in")
	audited := listed(bpfmap.GuardAudited)

	n.fake.answers(guardedBy(workload.GuardEnforce, ids...))
	n.eventuallyGuarded(ids[0], workload.GuardEnforce)
	order := func(a, b attempt) int {
		return strings.Compare(fmt.Sprint(a.Port, a.Source), fmt.Sprint(b.Port, b.Source))
	}
	refused := replay()
	slices.SortFunc(audited, order)
	slices.SortFunc(refused, order)
	if diff := cmp.Diff(audited, refused); diff != "" {
		t.Errorf("listed by audit (-) and refused by enforce (+):\n%s", diff)
	}
	test.Eventually(t, func() error {
		got := listed(bpfmap.RefusedGuard)
		slices.SortFunc(got, order)
		if diff := cmp.Diff(audited, got); diff != "" {
			return errors.New(diff)
		}
		return nil
	}, "the list to tell that they are refused")

	// Who was let in and is not any more is named, port by port.
	test.Eventually(t, func() error {
		replay()
		told := ""
		for _, problem := range n.eventually(ids[0], api.StateManaged).Problems {
			if problem.Code == "guard-refuses" {
				told = problem.What
			}
		}
		if want := ": port 8080 from 10.77.2.3, b412a0b1; port 9000 from b412a0b1; port 9090 from 10.77.2.3, b412a0b1"; !strings.HasSuffix(told, want) {
			return fmt.Errorf("the problem says %q, want %q", told, want)
		}
		return nil
	}, "the problem to name ports and sources")

	// The remedy for port 8080, as libcni shows it of the job that has it.
	remedy := list.Entries[slices.IndexFunc(list.Entries, func(e api.GuardEntry) bool { return e.Port == 8080 })].Remedy
	if want := `network { port "port-8080" { to = 8080 } }`; remedy != want {
		t.Errorf("remedy = %q, want %q", remedy, want)
	}
	n.ports = append(n.ports, mapped(8080))
	n.cachedWith(ids[0], paths[ids[0]], own.String())
	test.Eventually(t, func() error {
		return test.DialErr(t, client, netip.AddrPortFrom(own.Addr(), 8080).String())
	}, "the port to be let in")
}

func (n *node) eventuallyGuarded(id string, guard workload.Guard) {
	n.t.Helper()
	test.Eventually(n.t, func() error {
		list, err := n.Workloads()
		for _, w := range list {
			if w.Key.ContainerID == id && w.Guard == guard {
				return nil
			}
		}
		return fmt.Errorf("workloads: %+v, %w", list, err)
	}, "the guard to be "+string(guard))
}

// What was refused again is told of who was let in before, as long as it is of late.
func TestGuardTellsWhoItRefusesAgain(t *testing.T) {
	now := time.Now()
	g, w := flow.NewGuardTable(now), &flow.Workload{Cookie: 1, AllocID: "a"}
	put := func(after time.Duration, port uint16, source byte, verdict bpfmap.Verdict) {
		r := flow.Record{At: now.Add(after).UnixNano(), Workload: w, Verdict: verdict, OriginPort: port}
		r.Source, r.SourcePort, r.Valid[0] = flow.PackAddr(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, source}), 1))
		g.Note(&r)
	}
	put(0, 80, 1, bpfmap.GuardAudited)
	put(0, 81, 1, bpfmap.GuardAudited) // and is not refused
	put(0, 82, 1, bpfmap.GuardAudited)
	put(time.Second, 80, 1, bpfmap.RefusedGuard)
	put(time.Second, 80, 2, bpfmap.RefusedGuard) // was never let in
	put(time.Second, 82, 1, bpfmap.RefusedGuard)
	put(2*time.Second, 82, 1, bpfmap.GuardAudited) // and is let in again
	of := inspect.Record{Cookie: 1, Request: workload.Request{Mode: workload.ModeTransparent}}
	want := []flow.RefusedPort{{Port: 80, Sources: []string{"10.0.0.1"}, Remedy: `transparent_proxy { exclude_inbound_ports = ["80"] }`}}
	if diff := cmp.Diff(want, g.RefusedAgain(of, now)); diff != "" {
		t.Errorf("refused again (-want +got):\n%s", diff)
	}
	if list := append(g.RefusedAgain(of, now.Add(2*time.Second)), g.RefusedAgain(inspect.Record{Cookie: 2}, now)...); len(list) != 0 {
		t.Errorf("refused again, of long ago or of another workload: %+v", list)
	}
}

// Whoever scans takes the share of one allocation, and what ended takes none.
func TestGuardTableIsBounded(t *testing.T) {
	now := time.Now()
	g := flow.NewGuardTable(now)
	put := func(w *flow.Workload, port, source int, verdict bpfmap.Verdict) {
		r := flow.Record{At: now.UnixNano(), Workload: w, Verdict: verdict, OriginPort: uint16(port), Lost: 7}
		r.Source, r.SourcePort, r.Valid[0] = flow.PackAddr(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(source >> 8), byte(source)}), 1))
		g.Note(&r)
	}
	scanned, quiet := &flow.Workload{Cookie: 1, AllocID: "a"}, &flow.Workload{Cookie: 2, AllocID: "b", Job: "shop", Group: "api"}
	for i := range 1000 {
		put(scanned, i+1, 1, bpfmap.GuardAudited)
	}
	put(scanned, 1, 1, bpfmap.GuardAudited)
	put(quiet, 80, 1, bpfmap.GuardAudited)
	put(quiet, 80, 1, bpfmap.RefusedGuard)
	put(quiet, 40000, 1, bpfmap.GuardEphemeral) // enforce lets it in
	put(quiet, 80, 2, bpfmap.Inbound)
	put(quiet, 0, 0, bpfmap.EventsLost)
	none := func(string) (tcp, udp map[uint16]bool, err error) { return nil, nil, host.ErrNetNSGone }
	list := g.List([]inspect.Record{{Cookie: 2, Request: workload.Request{Mode: workload.ModeTransparent}}}, none)
	if len(list.Entries) != flow.GuardShare+1 || list.Omitted != 1000-flow.GuardShare || list.Lost != 7 || list.Entries[0].Count != 2 {
		t.Errorf("%d entries, %d omitted, %d lost, the first counts %d; want %d, %d, 7, 2",
			len(list.Entries), list.Omitted, list.Lost, list.Entries[0].Count, flow.GuardShare+1, 1000-flow.GuardShare)
	}
	at := time.Unix(0, now.UnixNano())
	want := api.GuardEntry{
		AllocID: "b", Job: "shop", TaskGroup: "api", Port: 80, Source: "10.0.0.1", Verdict: "refused_guard", Count: 2, First: at, Last: at,
		Remedy: `transparent_proxy { exclude_inbound_ports = ["80"] }`,
	}
	if diff := cmp.Diff(want, list.Entries[flow.GuardShare]); diff != "" {
		t.Errorf("entry (-want +got):\n%s", diff)
	}
	g.Keep([]inspect.Record{{Cookie: 2}}, now.Add(30*time.Second))
	if len(g.Entries) != flow.GuardShare+1 {
		t.Errorf("%d entries while the list of workloads may be older", len(g.Entries))
	}
	g.Keep([]inspect.Record{{Cookie: 2}}, now.Add(2*time.Minute))
	if len(g.Entries) != 1 || !slices.Equal(slices.Collect(maps.Keys(g.Share)), []uint64{2}) {
		t.Errorf("%d entries, shares %v; want those of the workload that is there", len(g.Entries), g.Share)
	}
}
