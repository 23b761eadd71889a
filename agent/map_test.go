// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/chromedp/chromedp"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/web"
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
