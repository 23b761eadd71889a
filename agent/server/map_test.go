// SPDX-License-Identifier: MPL-2.0

package server

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/agent/web"
	"github.com/weirmesh/weir/redirect/health"
)

func TestMapEdges(t *testing.T) {
	flow := func(direction api.Direction, verdict string, refused bool) api.Edge {
		return api.Edge{
			Direction: direction, Verdict: verdict, Refused: refused, Source: api.FlowSource{AllocID: "a1b2c3d4e5", Job: "shop", TaskGroup: "front"},
			Destination: api.FlowDestination{IP: registration.Loopback4(), Port: 80},
		}
	}
	out := func(verdict string, change func(*api.Edge)) api.Edge {
		e := flow(api.DirectionOutbound, verdict, strings.HasPrefix(verdict, "refused"))
		change(&e)
		return e
	}
	address := func(text string) func(*api.Edge) {
		return func(e *api.Edge) { e.Destination.IP = catalog.ParseAddresses([]string{text})[0] }
	}
	// Of a container inside of the allocation, whose address nobody knows.
	forwarded := func(verdict, to string) api.Edge {
		e := flow(api.DirectionForwarded, verdict, strings.HasPrefix(verdict, "refused"))
		e.Source = api.FlowSource{IP: catalog.ParseAddresses([]string{"172.17.0.2"})[0]}
		e.Through = api.FlowThrough{AllocID: "a1b2c3d4e5"}
		address(to)(&e)
		return e
	}
	list := []api.CountedEdge{
		{Edge: out("upstream", func(e *api.Edge) { e.Destination.Service = "api" }), Count: 60},
		{Edge: out("refused_no_proxy", func(e *api.Edge) { e.Destination.Service = "api" }), Count: 6},
		{Edge: out("local", func(*api.Edge) {}), Count: 12},
		{Edge: out("proxy", address("10.0.0.9")), Count: 600}, // stands for one of a task
		{Edge: out("direct", func(e *api.Edge) {
			address("10.0.0.2")(e)
			e.Destination.AllocID, e.Destination.Job = "ffff0000aaaa", "db"
		}), Count: 6},
		{Edge: api.Edge{Direction: api.DirectionInbound, Verdict: "inbound", Source: api.FlowSource{IP: catalog.ParseAddresses([]string{"10.0.0.7"})[0]}, Destination: api.FlowDestination{AllocID: "a1b2c3d4e5"}}, Count: 18},
		{Edge: out("redirected", func(e *api.Edge) { e.Source.AllocID = "gone" }), Count: 6},
		{Edge: forwarded("forwarded", "198.51.100.7"), Count: 6},
		{Edge: forwarded("refused_forwarded", "198.51.100.8"), Count: 12},
	}
	for i := range mapEnds - 2 {
		list = append(list, api.CountedEdge{Edge: out("redirected", address(fmt.Sprintf("192.0.2.%d", i+1))), Count: 1})
	}
	nodes := map[string]*web.Node{"a1b2c3d4e5": {ID: "a1b2c3d4e5"}}
	ends, edges := mapEdges(list, nodes, 6)
	if len(ends) != mapEnds+2 {
		t.Errorf("%d ends, want %d on one side, what is left over, and one on the other", len(ends), mapEnds)
	}
	rates := make(map[string]web.Edge)
	for _, edge := range edges {
		rates[edge.From+" > "+edge.To] = edge
	}
	want := map[string]web.Edge{
		"a1b2c3d4e5 > to service api":             {Rate: 11, Refused: 1, Verdicts: map[string]float64{"upstream": 10, "refused_no_proxy": 1}},
		"a1b2c3d4e5 > to loopback ":               {Rate: 2, Verdicts: map[string]float64{"local": 2}},
		"a1b2c3d4e5 > to allocation db/ffff0000":  {Rate: 1, Verdicts: map[string]float64{"direct": 1}},
		"from address 10.0.0.7 > a1b2c3d4e5":      {Rate: 3, Verdicts: map[string]float64{"inbound": 3}},
		"a1b2c3d4e5 > to address 198.51.100.7:80": {Rate: 1, Verdicts: map[string]float64{"forwarded": 1}},
		"a1b2c3d4e5 > to address 198.51.100.8:80": {Rate: 2, Refused: 2, Verdicts: map[string]float64{"refused_forwarded": 2}},
		"a1b2c3d4e5 > to others ":                 {Rate: 0.5, Verdicts: map[string]float64{"redirected": 0.5}},
		"a1b2c3d4e5 > to address 10.0.0.9:80":     {},
		"gone > to loopback ":                     {},
	}
	for ways, edge := range want {
		got := rates[ways]
		got.From, got.To = "", ""
		if diff := cmp.Diff(edge, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", ways, diff)
		}
	}
	if node := nodes["a1b2c3d4e5"]; node.Refused != 3 || node.Rate < 26.3 || node.Rate > 26.4 { // (66+12+6+18+38+6+12)/6
		t.Errorf("node = %+v", node)
	}
}

func TestMapCountsProblems(t *testing.T) {
	node := mapNode(api.WorkloadView{Problems: []health.Problem{{Severity: health.SeverityError}, {Severity: health.SeverityWarning}, {Severity: health.SeverityWarning}}})
	if node.Errors != 1 || node.Warnings != 2 {
		t.Errorf("node = %+v, want an error and two warnings", node)
	}
}
