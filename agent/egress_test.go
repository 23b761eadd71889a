// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/bpfmap"
)

// The list has each task's destinations and kinds of sockets once, keeps nothing of
// what the guard does not refuse, and none fills it for the others.
func TestEgressTable(t *testing.T) {
	now := time.Now()
	e := newEgressTable()
	put := func(w *flowWorkload, task, transport string, verdict bpfmap.Verdict, to string) {
		r := flowRecord{at: now.UnixNano(), workload: w, task: task, transport: transport, verdict: verdict, uid: 1000}
		copy(r.command[:], "curl")
		if to != "" {
			r.origin, r.originPort, r.valid[1] = packAddr(netip.MustParseAddrPort(to))
		}
		e.note(&r)
	}
	loud, quiet := &flowWorkload{cookie: 1, allocID: "a"}, &flowWorkload{cookie: 2, allocID: "b", job: "shop", group: "api"}
	for i := range 1000 {
		put(loud, "web", "udp", bpfmap.EgressAudited, netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), uint16(i+1)).String())
	}
	put(quiet, "web", "udp", bpfmap.EgressAudited, "192.0.2.1:443")
	put(quiet, "web", "udp", bpfmap.RefusedEgress, "192.0.2.1:443")
	put(quiet, "agent", "udp", bpfmap.RefusedEgress, "192.0.2.1:443")
	put(quiet, "web", "raw icmp", bpfmap.RefusedEgressSocket, "")
	put(quiet, "web", "", bpfmap.UDP, "192.0.2.1:53")
	list, omitted := e.list()
	if len(list) != guardShare+3 || omitted != 1000-guardShare {
		t.Fatalf("%d entries, %d omitted; want %d, %d", len(list), omitted, guardShare+3, 1000-guardShare)
	}
	at := time.Unix(0, now.UnixNano())
	entry := func(task, transport, to string, port uint16, verdict string, count uint64, remedy string) EgressEntry {
		return EgressEntry{
			AllocID: "b", Job: "shop", TaskGroup: "api", Task: task, Command: "curl", UID: 1000, Transport: transport, Destination: to, Port: port,
			Verdict: verdict, Count: count, First: at, Last: at, Remedy: remedy,
		}
	}
	want := []EgressEntry{
		entry("agent", "udp", "192.0.2.1", 443, "refused_egress", 1, `exclude_outbound_ports = ["443"]`),
		entry("web", "raw icmp", "", 0, "refused_egress_socket", 1, `exclude_uids = ["1000"]`),
		entry("web", "udp", "192.0.2.1", 443, "refused_egress", 2, `exclude_outbound_ports = ["443"]`),
	}
	if diff := cmp.Diff(want, list[guardShare:]); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}
	e.keep([]redirect.Record{{Cookie: 2}}, now.Add(2*time.Minute))
	if list, _ := e.list(); len(list) != 3 || e.share[1] != 0 {
		t.Errorf("%d entries once the other workload is gone, want 3", len(list))
	}
}
