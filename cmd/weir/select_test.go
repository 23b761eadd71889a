// SPDX-License-Identifier: MPL-2.0

package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/monitor"
	"github.com/weirmesh/weir/redirect/workload"
)

func TestSelectWorkloads(t *testing.T) {
	list := []base.Named{
		{ID: "0b5d0c1e-7c0f", Job: "demo", Group: "web"},
		{ID: "0b5d0c1e-7c0f", Job: "demo", Group: "web"}, // on a second network
		{ID: "0b77aa01-1111", Job: "demo", Group: "db"},
		{ID: "1c6e1d2f-8d1a", Job: "0b", Group: "odd"},
		{ID: "fab00000-0000", Job: "shop", Group: "api"},
		{ID: "c0ffee00-0000", Job: "", Group: ""},
	}
	for _, c := range []struct {
		text string
		want base.Selection
		err  string
	}{
		{text: "demo", want: base.Selection{Job: "demo"}},
		{text: "0b5d0c1e-7c0f", want: base.Selection{ID: "0b5d0c1e-7c0f"}},
		{text: "0b5", want: base.Selection{ID: "0b5d0c1e-7c0f"}},
		{text: "f", want: base.Selection{ID: "fab00000-0000"}},
		{text: "0b", want: base.Selection{Job: "0b"}}, // a job wins over a beginning
		{text: "0", err: `"0" is the beginning of 2 allocations' IDs, so give more of it:
  0b5d0c1e-7c0f  demo/web
  0b77aa01-1111  demo/db`},
		{text: "", err: `"" is no job and no beginning of an allocation's ID on this node: 'weir workloads' lists all`},
		{text: "9", err: `"9" is no job and no beginning of an allocation's ID on this node: 'weir workloads' lists all`},
		{text: "dmeo", err: `"dmeo" is no job and no beginning of an allocation's ID on this node: did you mean job "demo"?`},
	} {
		got, err := base.SelectWorkloads(c.text, list)
		said := ""
		if err != nil {
			said = err.Error()
		}
		if got != c.want || said != c.err {
			t.Errorf("%q: got %+v, %s\nwant %+v, %s", c.text, got, said, c.want, c.err)
		}
	}
}

// A list of matches stays one that somebody reads.
func TestAmbiguousSelectionIsShort(t *testing.T) {
	var list []base.Named
	for i := range 50 {
		list = append(list, base.Named{ID: fmt.Sprintf("a%03d", i)})
	}
	_, err := base.SelectWorkloads("a", list)
	if err == nil || strings.Count(err.Error(), "\n") != 21 || !strings.HasSuffix(err.Error(), "\n  a019\n  and 30 more") {
		t.Errorf("error is %v, want twenty allocations and how many more", err)
	}
}

// The same argument narrows down each list, for people and in JSON, wherever it stands.
func TestListsOfOneWorkload(t *testing.T) {
	n := threeEvents()
	for _, w := range n.verdicts {
		n.list = append(n.list, inspect.WorkloadStatus{Key: w.Key, ID: w.Key.ContainerID, Job: w.Job, Group: w.Group})
	}
	for _, command := range []string{"workloads", "verdicts", "events"} {
		var more []string
		if command == "events" {
			more = []string{"-duration", "1ms"}
		}
		for _, argument := range []string{"demo", "0b5", "0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01"} {
			got := try(t, n, nil, append([]string{command, argument}, more...)...)
			if got.code != 0 || !strings.Contains(got.stdout, "0b5d0c1e") || strings.Contains(got.stdout, "1c6e1d2f") || strings.Contains(got.stdout, "4713") {
				t.Errorf("weir %s %s: %+v, want one workload", command, argument, got)
			}
		}
		got := try(t, n, nil, append([]string{command, "9"}, more...)...)
		if want := "weir " + command + `: "9" is no job`; got.code != 1 || !strings.HasPrefix(got.stderr, want) {
			t.Errorf("weir %s 9: %+v, want %q", command, got, want)
		}
		if got := try(t, n, nil, command, "demo", "0b5"); got.code != 1 || !strings.Contains(got.stderr, `unexpected argument "0b5"`) {
			t.Errorf("weir %s demo 0b5: %+v, want an error", command, got)
		}
	}
	for _, args := range [][]string{{"verdicts", "-json", "1c"}, {"verdicts", "1c", "-json"}, {"workloads", "1c", "-json"}} {
		got := try(t, n, nil, args...)
		if !json.Valid([]byte(got.stdout)) || !strings.Contains(got.stdout, "1c6e1d2f-8d1a-4e1f-8b62-3a7d9f2e1b02") || strings.Contains(got.stdout, "0b5d0c1e") {
			t.Errorf("weir %v: %+v, want one workload", args, got)
		}
	}
}

// A workload of the job that comes while events are read is shown, and what the reader missed of
// others is no loss of this list.
func TestEventsOfAJobGoOnWithItsNextAllocation(t *testing.T) {
	n := threeEvents()
	next := inspect.WorkloadVerdicts{Key: workload.AttachmentID{ContainerID: "2d7f2e3a", IfName: "eth0"}, Job: "demo", Group: "web", Cookie: 4713}
	n.events = append(n.events, monitor.Event{
		Time: time.Now(), Cookie: 4712, Verdict: bpfmap.EventsLost, Name: bpfmap.EventsLost.String(), Lost: 12, Origin: netip.AddrPort{},
	})
	n.onEvents = func() { n.verdicts = append(n.verdicts, next) }
	got := try(t, n, nil, "events", "-duration", "1ms", "demo")
	if got.code != 0 || got.stderr != "" || !strings.Contains(got.stdout, "demo/web/2d7f2e3a") || strings.Contains(got.stdout, "lost") {
		t.Errorf("events of demo: %+v, want those of both its allocations, and no loss", got)
	}
}
