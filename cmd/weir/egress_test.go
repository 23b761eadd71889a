// SPDX-License-Identifier: MPL-2.0

package main

import (
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/api"
)

func TestGuardEgress(t *testing.T) {
	n := audited()
	now := time.Now()
	n.guard.Egress = []api.EgressEntry{
		{
			AllocID: "0b5d0c1e-7c0f", Job: "demo", TaskGroup: "web", Task: "front", Command: "curl", UID: 1000, Transport: "udp", Destination: "192.0.2.1", Port: 443,
			Verdict: "egress_audit", Count: 12, Last: now.Add(-90 * time.Second), Remedy: `exclude_outbound_ports = ["443"]`,
		},
		{
			AllocID: "1c6e1d2f-8d1a", Job: "shop", TaskGroup: "api", Command: "ping", Transport: "raw icmp", Verdict: "refused_egress_socket",
			Count: 1, Last: now, Remedy: `exclude_uids = ["0"]`,
		},
	}
	want(t, try(t, n, nil, "guard", "-egress"), outcome{stdout: `ALLOC     JOB   TASK   COMMAND  BY        TO         PORT  COUNT  LAST
0b5d0c1e  demo  front  curl     udp       192.0.2.1  443   12     1m
1c6e1d2f  shop  -      ping     raw icmp  -          -     1      0s

To let it out, in the group's transparent_proxy block:
  demo/web: exclude_outbound_ports = ["443"]
  shop/api: exclude_uids = ["0"]
exclude_uids takes all that the user sends out of the mesh, TCP too

all of it since the agent began to record, 3h ago; LAST is how long ago
`})
	got := tryOn(t, n, true, nil, "guard", "-egress", "1c")
	if !strings.Contains(got.stdout, "\x1b[31m1c6e1d2f") || strings.Contains(got.stdout, "demo") {
		t.Errorf("weir guard -egress 1c: %+v, want one allocation, and what was refused in red", got)
	}
	n.guard.Egress = nil
	if got := try(t, n, nil, "guard", "-egress"); !strings.HasPrefix(got.stdout, "nothing that an egress guard sees went out past a proxy since the agent began\n  to record, ") {
		t.Errorf("weir guard -egress: %+v", got)
	}
}
