// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/flow"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
)

// The list has each task's destinations and kinds of sockets once, keeps nothing of
// what the guard does not refuse, and none fills it for the others.
func TestEgressTable(t *testing.T) {
	now := time.Now()
	e := flow.NewEgressTable()
	put := func(w *flow.Workload, task, transport string, verdict bpfmap.Verdict, to string) {
		r := flow.Record{At: now.UnixNano(), Workload: w, Task: task, Transport: transport, Verdict: verdict, Uid: 1000}
		copy(r.Command[:], "curl")
		if to != "" {
			r.Origin, r.OriginPort, r.Valid[1] = flow.PackAddr(netip.MustParseAddrPort(to))
		}
		e.Note(&r)
	}
	loud, quiet := &flow.Workload{Cookie: 1, AllocID: "a"}, &flow.Workload{Cookie: 2, AllocID: "b", Job: "shop", Group: "api"}
	for i := range 1000 {
		put(loud, "web", "udp", bpfmap.EgressAudited, netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), uint16(i+1)).String())
	}
	put(quiet, "web", "udp", bpfmap.EgressAudited, "192.0.2.1:443")
	put(quiet, "web", "udp", bpfmap.RefusedEgress, "192.0.2.1:443")
	put(quiet, "agent", "udp", bpfmap.RefusedEgress, "192.0.2.1:443")
	put(quiet, "web", "raw icmp", bpfmap.RefusedEgressSocket, "")
	put(quiet, "web", "", bpfmap.UDP, "192.0.2.1:53")
	kernel := flow.Record{At: now.UnixNano(), Workload: quiet, Transport: "protocol 47", Verdict: bpfmap.RefusedEgress, Uid: ^uint32(0)}
	copy(kernel.Command[:], "kernel")
	kernel.Origin, kernel.OriginPort, kernel.Valid[1] = flow.PackAddr(netip.MustParseAddrPort("192.0.2.7:0"))
	e.Note(&kernel)
	list, omitted := e.List()
	if len(list) != flow.GuardShare+4 || omitted != 1000-flow.GuardShare {
		t.Fatalf("%d entries, %d omitted; want %d, %d", len(list), omitted, flow.GuardShare+4, 1000-flow.GuardShare)
	}
	at := time.Unix(0, now.UnixNano())
	entry := func(task, transport, to string, port uint16, verdict string, count uint64, remedy string) api.EgressEntry {
		return api.EgressEntry{
			AllocID: "b", Job: "shop", TaskGroup: "api", Task: task, Command: "curl", UID: 1000, Transport: transport, Destination: to, Port: port,
			Verdict: verdict, Count: count, First: at, Last: at, Remedy: remedy,
		}
	}
	kernels := entry("", "protocol 47", "192.0.2.7", 0, "refused_egress", 1, "none: the kernel's own, by a tunnel or to a forged source")
	kernels.Command, kernels.UID = "kernel", ^uint32(0)
	want := []api.EgressEntry{
		kernels,
		entry("agent", "udp", "192.0.2.1", 443, "refused_egress", 1, `exclude_outbound_ports = ["443"]`),
		entry("web", "raw icmp", "", 0, "refused_egress_socket", 1, `exclude_uids = ["1000"]`),
		entry("web", "udp", "192.0.2.1", 443, "refused_egress", 2, `exclude_outbound_ports = ["443"]`),
	}
	if diff := cmp.Diff(want, list[flow.GuardShare:]); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}
	e.Keep([]inspect.Record{{Cookie: 2}}, now.Add(2*time.Minute))
	if list, _ := e.List(); len(list) != 4 || e.Share[1] != 0 {
		t.Errorf("%d entries once the other workload is gone, want 4", len(list))
	}
}
