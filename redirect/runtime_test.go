// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/program/runstats"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// What the kernel counts while it is asked to is each run of each program, those of
// namespaces together.
func TestRunTimes(t *testing.T) {
	d := newDatapath(t)
	spaces := []*test.NetNS{test.NewNetNS(t), test.NewNetNS(t)}
	for i, ns := range spaces {
		err := d.Add(Attachment{
			Key: workload.AttachmentID{ContainerID: []string{"a", "b"}[i], IfName: "eth0"}, NetNS: ns.Path,
			Request: workload.Request{Network: "nomad", Mode: workload.ModeTransparent, ProxyUID: proxyUID, InboundPort: inboundPort, OutboundPort: outboundPort},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	counting, err := d.CountRunTime()
	if err != nil {
		t.Fatal(err)
	}
	defer counting.Close()
	before := runTimes(t, d)
	const dials = 20
	for range dials {
		for _, ns := range spaces {
			_, _ = test.Ask(ns, "tcp4", "127.0.0.1:80") // nobody listens
		}
	}
	after := runTimes(t, d)
	for name, programs := range map[string]int{"weir_connect4": 1, program.LookupName: 2, "weir_forward": 1} {
		if got := after[name].Programs; got != programs {
			t.Errorf("%s: %d programs, want %d", name, got, programs)
		}
	}
	for _, name := range []string{"weir_connect4", program.LookupName} {
		runs, took := after[name].Runs-before[name].Runs, after[name].Time-before[name].Time
		if runs < dials*2 { // connect4 runs for others of the machine, too
			t.Errorf("%s: %d runs, want %d", name, runs, dials*2)
		}
		if took <= 0 || took > time.Second {
			t.Errorf("%s: %s in %d runs", name, took, runs)
		}
	}
}

func runTimes(t *testing.T, d *Datapath) map[string]runstats.RunTime {
	t.Helper()
	list, err := d.RunTimes()
	if err != nil {
		t.Fatal(err)
	}
	of := make(map[string]runstats.RunTime, len(list))
	for _, counted := range list {
		of[counted.Name] = counted
	}
	return of
}
