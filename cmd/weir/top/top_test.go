// SPDX-License-Identifier: MPL-2.0

package top

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/program/runstats"
	"github.com/weirmesh/weir/redirect/workload"
)

// A rate is what was added, of an allocation that came meanwhile too, and programs that
// were replaced begin at nothing. A proxy's own connection and a listener are none.
func TestBetween(t *testing.T) {
	at := time.Date(2026, 11, 28, 9, 0, 0, 0, time.UTC)
	key := func(id string) workload.AttachmentID { return workload.AttachmentID{ContainerID: id, IfName: "eth0"} }
	before := Sample{
		At:       at,
		Verdicts: []inspect.WorkloadVerdicts{{Key: key("a"), ID: "a", Job: "old", Cookie: 1, Counts: map[string]uint64{"redirected": 100, "inbound": 10}}},
		Programs: []runstats.RunTime{{Name: "weir_connect4", Programs: 1, Runs: 10, Time: time.Second}, {Name: "weir_lookup", Programs: 2, Runs: 900, Time: time.Second}},
		Traffic:  api.Traffic{Agent: api.Process{PID: 7, CPU: 1.5}},
	}
	after := Sample{
		At: at.Add(2 * time.Second),
		Verdicts: []inspect.WorkloadVerdicts{
			{Key: key("a"), ID: "a", Job: "old", Cookie: 1, Counts: map[string]uint64{"redirected": 104, "inbound": 12, "proxy": 50, "listener": 3, "refused_listener_identity": 1, "refused_guard": 6}},
			{Key: key("b"), Job: "new", Cookie: 2, Counts: map[string]uint64{"direct": 20}},
		},
		Programs: []runstats.RunTime{{Name: "weir_connect4", Programs: 1, Runs: 30, Time: time.Second + 20*time.Microsecond}, {Name: "weir_lookup", Programs: 1, Runs: 100, Time: time.Millisecond}},
		Traffic:  api.Traffic{Agent: api.Process{PID: 7, CPU: 1.6, Memory: 5}, Lost: 2},
		Notes:    []string{"n"},
	}
	got := Between(before, after)
	got.Agent.Cores = float64(int(got.Agent.Cores*1000+0.5)) / 1000
	want := Report{
		Schema: 1, Time: at.Add(2 * time.Second), Seconds: 2, Total: Rates{Outbound: 12, Inbound: 1, Refused: 3},
		Allocations: []Allocation{
			{AllocID: "b", Job: "new", Interface: "eth0", Rates: Rates{Outbound: 10}, Verdicts: map[string]float64{"direct": 10}},
			{AllocID: "a", Job: "old", Interface: "eth0", Rates: Rates{Outbound: 2, Inbound: 1, Refused: 3}, Verdicts: map[string]float64{
				"redirected": 2, "inbound": 1, "proxy": 25, "listener": 1.5, "refused_listener_identity": 0.5, "refused_guard": 3,
			}},
		},
		Destinations: []Destination{},
		Programs: []Program{
			{Name: "weir_lookup", Programs: 1, Runs: 50, Each: 10000, Cores: 0.0005},
			{Name: "weir_connect4", Programs: 1, Runs: 10, Each: 1000, Cores: 0.00001},
		},
		Agent: &Process{PID: 7, Cores: 0.05, Memory: 5},
		Notes: []string{"n", "2 connections are not among the destinations: more than the agent has room for"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("report (-want +got):\n%s", diff)
	}
	after.Traffic.Agent.PID, after.Programs = 8, nil // it was started anew, and the kernel refuses to count
	if got := Between(before, after); got.Agent.Cores != 0 || got.Programs != nil {
		t.Errorf("agent %+v, programs %+v: want nothing of the one before", got.Agent, got.Programs)
	}
}
