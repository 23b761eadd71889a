// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/chromedp/chromedp"
	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/agent/web"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/browser"
)

// The map of a real node, in a real browser: what a task dials is an edge with its rate,
// what is refused is red, and a click shows why, from the rows in the kernel.
func TestMap(t *testing.T) {
	test.Need(t, test.Tool("chromium"))
	n, id, _, task := shopNode(t, func(c *configfile.Config) { c.Telemetry.Map = "loopback" })
	n.recording(task)
	const dials = 30
	for range dials {
		if _, err := task.Ask("tcp4", "240.0.0.1:80"); err != nil {
			t.Error(err)
		}
	}
	if _, err := task.Ask("tcp4", "127.128.0.1:80"); err == nil {
		t.Error("the range that carries origins is served")
	}
	page := "http://" + n.agent.Status().Telemetry + "/map/"
	var graph web.Graph
	test.Eventually(t, func() error {
		code, text := get(t, page+"graph")
		if err := json.Unmarshal([]byte(text), &graph); err != nil || code != 200 {
			return fmt.Errorf("graph = %d, %s: %w", code, text, err)
		}
		for _, edge := range graph.Edges {
			if edge.From == id && edge.Refused > 0 {
				return nil
			}
		}
		return fmt.Errorf("edges: %+v", graph.Edges)
	}, "what was dialled to be on the map")
	i := slices.IndexFunc(graph.Edges, func(e web.Edge) bool { return e.To == "to service api" })
	if i < 0 || graph.Edges[i].From != id || graph.Edges[i].Refused != 0 {
		t.Fatalf("edges = %+v: want one from %s to service api", graph.Edges, id)
	}
	if count := graph.Edges[i].Rate * graph.Seconds; count < dials-0.01 || count > dials+0.01 {
		t.Errorf("%f connections in %f s, want %d", count, graph.Seconds, dials)
	}

	tab := browser.Open(t, page, false)
	tab.Until(`document.querySelector("#allocations .card.bad .name")?.textContent === "b412a0b1"`) // libcni's result has no job
	tab.Until(`document.querySelectorAll("#edges path.refused").length === 1`)
	tab.Do(chromedp.Click(chromedp.CSS("#allocations .card")))
	tab.Until(`document.querySelectorAll("#panel .flows tr").length > ` + fmt.Sprint(dials))
	panel := tab.Text("#panel")
	for _, want := range []string{
		id, "outbound port\t15001, the proxy listens\tdefault", "upstream api\t127.0.0.1:9191 240.0.0.1\tconsul",
		"server → 127.128.0.1:80\nrefused: the range that carries origins is not for tasks\n\trefused_encoded", "server → api:80\tupstream",
	} {
		if !strings.Contains(panel, want) {
			t.Errorf("the panel has no %q:\n%q", want, panel)
		}
	}
}

// Whom nobody asked for the map does not find it, nor what it is made of.
func TestMapIsOffUnlessSet(t *testing.T) {
	n := newNode(t)
	n.run()
	address := ""
	test.Eventually(t, func() error {
		if address = n.agent.Status().Telemetry; address == "" {
			return fmt.Errorf("no address")
		}
		return nil
	}, "telemetry")
	for _, path := range []string{"/map", "/map/", "/map/graph", "/map/map.js", "/map/allocations/x"} {
		if code, _ := get(t, "http://"+address+path); code != 404 {
			t.Errorf("%s: %d, want 404", path, code)
		}
	}
	config := configfile.DefaultConfig()
	config.Telemetry.Map = "yes"
	if err := config.Validate(); err == nil || !strings.Contains(err.Error(), `telemetry.map = "yes": want off, loopback or any`) {
		t.Errorf("validate: %v", err)
	}
}

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
