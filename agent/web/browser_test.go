// SPDX-License-Identifier: MPL-2.0

package web

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"github.com/weirmesh/weir/redirect/explain"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/test/browser"
)

// fakeSource is no agent. It shows what a test gives it.
type fakeSource struct {
	mu          sync.Mutex
	graph       Graph
	allocations map[string]Allocation
	asked       int
}

func (f *fakeSource) Graph() Graph {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	return f.graph
}

func (f *fakeSource) Allocation(id string) (Allocation, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	found, known := f.allocations[id]
	return found, known
}

func (f *fakeSource) set(change func(*fakeSource)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

const (
	frontID   = "0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01"
	apiID     = "7f1a9b3c-2a44-4b0e-8c11-9d3e5f7a1b02"
	dbID      = "c3d4e5f6-1b2a-4c3d-9e8f-0a1b2c3d4e03"
	batchID   = "e41c7d90-5f3b-4a6d-b2c1-7e8f9a0b1c04"
	gatewayID = "f9e8d7c6-b5a4-4392-8170-6f5e4d3c2b05"
)

func node(id, job, group, mode, guard string) Node {
	return Node{ID: id, Job: job, Group: group, Namespace: "default", State: "managed", Mode: mode, Guard: guard, InSync: true}
}

// shopNode is a node with a shop on it, of which one allocation's proxy does not listen.
func shopNode() *fakeSource {
	front, api, db := node(frontID, "shop", "front", "transparent", "audit"), node(apiID, "shop", "api", "transparent", "enforce"), node(dbID, "orders-db", "postgres", "direct", "audit")
	batch, gateway := node(batchID, "nightly-report", "batch", "transparent", "audit"), node(gatewayID, "ingress", "gateway", "gateway", "enforce")
	batch.Errors, batch.InSync = 1, true
	to := func(kind Kind, name string) End { return End{ID: endIDOf(false, kind, name), Kind: kind, Name: name} }
	from := func(kind Kind, name string) End {
		return End{ID: endIDOf(true, kind, name), Kind: kind, Name: name, Source: true}
	}
	outside, mesh, prober := from(KindAddress, "203.0.113.40"), from(KindAddress, "10.20.0.7"), from(KindAddress, "10.20.0.3")
	apiService, dbService, shopService := to(KindService, "api"), to(KindService, "orders-db"), to(KindService, "shop")
	payments, stripe, others := to(KindService, "payments"), to(KindAddress, "198.51.100.7:443"), to(KindOthers, "")
	g := Graph{
		Schema: 1, Node: "worker-12", Version: "v0.2.0", Time: time.Date(2026, 11, 28, 10, 30, 0, 0, time.UTC), Seconds: 60, Problems: []health.Problem{},
		Ends: []End{outside, mesh, prober, apiService, dbService, shopService, payments, stripe, others},
	}
	edge := func(from, to string, rate, refused float64, verdict string) {
		verdicts := map[string]float64{}
		if rate > refused {
			verdicts[verdict] = rate - refused
		}
		if refused > 0 {
			verdicts["refused_no_proxy"] = refused
		}
		g.Edges = append(g.Edges, Edge{From: from, To: to, Rate: rate, Refused: refused, Verdicts: verdicts})
		for _, n := range []*Node{&front, &api, &db, &batch, &gateway} {
			if n.ID == from || n.ID == to {
				n.Rate, n.Refused = n.Rate+rate, n.Refused+refused
			}
		}
	}
	edge(outside.ID, gatewayID, 182, 0, "inbound")
	edge(gatewayID, shopService.ID, 180, 0, "redirected")
	edge(mesh.ID, frontID, 64, 0, "inbound")
	edge(frontID, apiService.ID, 118.4, 0, "upstream")
	edge(frontID, payments.ID, 3.2, 0, "redirected")
	edge(mesh.ID, apiID, 96.5, 0, "inbound")
	edge(apiID, dbService.ID, 41.7, 0, "redirected")
	edge(apiID, stripe.ID, 2.4, 0, "redirected")
	edge(mesh.ID, dbID, 41.1, 0, "inbound")
	edge(prober.ID, dbID, 0.2, 0, "guard_audit")
	edge(batchID, dbService.ID, 0.8, 0.8, "redirected")
	edge(batchID, others.ID, 6.1, 0.4, "redirected")
	silent := health.Problem{
		Code: "proxy-not-listening", Severity: health.SeverityError, Subject: "allocation nightly-report/batch/e41c7d90", AllocID: batchID,
		What:   "its proxy does not listen on 15001 for 42 s: connections of its tasks are refused",
		Remedy: "'nomad alloc logs e41c7d90 connect-proxy-report' says why Envoy does not listen",
	}
	g.Problems = append(g.Problems, silent)
	g.Allocations = []Node{gateway, batch, db, api, front}
	at := g.Time
	flow := func(ago int, task, peer, verdict, meaning string) Flow {
		return Flow{
			Time: at.Add(-time.Duration(ago) * time.Second), Direction: "outbound", Task: task, Peer: peer, Verdict: verdict, Meaning: meaning,
			Refused: verdict == "refused_no_proxy",
		}
	}
	const noProxy = "refused: the proxy has no outbound listener"
	return &fakeSource{graph: g, allocations: map[string]Allocation{batchID: {
		Schema: 1, Node: batch, Task: "connect-proxy-report", Since: at.Add(-42 * time.Second), Problems: []health.Problem{silent},
		Settings: []explain.Setting{
			{Name: "mode", Value: "transparent", Source: "job"}, {Name: "proxy UID", Value: "101", Source: "job"},
			{Name: "outbound port", Value: "15001, the proxy does not listen", Source: "job"}, {Name: "inbound port", Value: "20000, the proxy listens", Source: "job"},
			{Name: "own addresses", Value: "172.26.64.9", Source: "node"}, {Name: "guard", Value: "audit", Source: "default"},
			{Name: "excluded CIDRs", Value: "10.0.0.0/8", Source: "job"}, {Name: "upstream orders-db", Value: "127.0.0.1:5432 240.0.0.3", Source: "consul"},
			{Name: "destinations", Value: "212 of 65536", Source: "default"},
		},
		Flows: []Flow{
			flow(1, "report", "orders-db:5432", "refused_no_proxy", noProxy), flow(2, "report", "orders-db:5432", "refused_no_proxy", noProxy),
			flow(3, "report", "10.1.7.20:9000", "cidr_excluded", "left alone: its address is in an excluded CIDR"),
			flow(5, "report", "10.1.7.21:9000", "cidr_excluded", "left alone: its address is in an excluded CIDR"),
			flow(6, "report", "198.51.100.80:443", "refused_no_proxy", noProxy),
			{Time: at.Add(-9 * time.Second), Direction: "inbound", Peer: "10.20.0.7 to :20000", Verdict: "inbound", Meaning: "from outside, sent to the proxy's inbound listener"},
		},
	}}}
}

func endIDOf(source bool, kind Kind, name string) string {
	if source {
		return "from " + string(kind) + " " + name
	}
	return "to " + string(kind) + " " + name
}

// serve is a server with the page of the source.
func serve(t *testing.T, source Source) *httptest.Server {
	t.Helper()
	mux := http.NewServeMux()
	Register(mux, source, ClientsLoopback, "worker-12")
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	return server
}

// What is drawn is kept in docs/, where WEIR_UPDATE_DOCS is set.
func TestPictures(t *testing.T) {
	for _, scheme := range []string{"light", "dark"} {
		tab := browser.Open(t, serve(t, shopNode()).URL+"/map/#"+batchID, scheme == "dark")
		tab.Until(`document.querySelectorAll(".card").length === 14 && document.querySelectorAll("#edges path").length === 13`)
		tab.Until(`document.querySelectorAll("#panel .flows tr").length === 6`)
		background := `getComputedStyle(document.body).backgroundColor`
		tab.Until(map[string]string{"light": background + ` === "rgb(243, 245, 248)"`, "dark": background + ` === "rgb(13, 18, 23)"`}[scheme])
		if os.Getenv("WEIR_UPDATE_DOCS") != "" {
			tab.Screenshot(filepath.Join("..", "..", "docs", "map-"+scheme+".png"))
		}
	}
}

// Rates are on the cards and beside the edges, refusals in red, and a click shows what
// decides about an allocation and its last connections; one on an end shows who talks
// to it.
func TestGraph(t *testing.T) {
	tab := browser.Open(t, serve(t, shopNode()).URL+"/map/", false)
	tab.Until(`document.querySelectorAll(".card").length === 14`)
	for selector, want := range map[string]string{
		"#node": "worker-12", "#health": "1 problem", "#count": "5 allocations", "#when": "rates over the last 60 s, as of 10:30:00",
		"#allocations li:first-child .card": "ingress/gateway\n362/s\nf9e8d7c6\ngateway\nguard enforce",
		"#allocations .card.bad":            "nightly-report/batch\n6.9/s\ne41c7d90\n1.2/s refused\n1 problem\ntransparent\nguard audit",
	} {
		if got := tab.Text(selector); got != want {
			t.Errorf("%s reads %q, want %q", selector, got, want)
		}
	}
	const red = `"rgb(192, 31, 26)"`
	tab.Until(`[...document.querySelectorAll("#edges path.refused")].filter((e) => getComputedStyle(e).stroke === ` + red + `).length === 2`)
	tab.Until(`[...document.querySelectorAll("#edges text.refused")].map((e) => e.textContent).sort().join() === "24/min refused,48/min refused"`)
	tab.Do(chromedp.Click(chromedp.CSS("#allocations .card.bad")))
	tab.Until(`document.querySelector("#panel h2")?.textContent === "nightly-report/batch"`)
	panel := tab.Text("#panel")
	for _, want := range []string{
		"its proxy does not listen on 15001 for 42 s: connections of its tasks are refused", "What to do: 'nomad alloc logs e41c7d90 connect-proxy-report'",
		"outbound port\t15001, the proxy does not listen\tjob", "weir explain e41c7d90 ADDR:PORT",
		"10:29:59\treport → orders-db:5432\nrefused: the proxy has no outbound listener\n\trefused_no_proxy",
		"10:29:51\t← 10.20.0.7 to :20000\tinbound",
	} {
		if !strings.Contains(panel, want) {
			t.Errorf("the panel has no %q:\n%q", want, panel)
		}
	}
	tab.Until(`location.hash === "#` + batchID + `"`)
	tab.Do(chromedp.Click(chromedp.CSS("#to li:nth-child(2) .card")))
	tab.Until(`document.querySelector("#panel h2")?.textContent === "orders-db"`)
	if panel := tab.Text("#panel"); !strings.Contains(panel, "nightly-report/batch e41c7d90\nrefused_no_proxy 48/min\n\t48/min refused of 48/min") || !strings.Contains(panel, "shop/api 7f1a9b3c\nredirected 42/s\n\t42/s") {
		t.Errorf("the panel of a service reads\n%q", panel)
	}
	tab.Do(chromedp.Click(chromedp.CSS("#health")))
	tab.Until(`document.querySelector("#panel h2")?.textContent === "Node worker-12"`)
	if panel := tab.Text("#panel"); !strings.Contains(panel, "allocation nightly-report/batch/e41c7d90: its proxy does not listen") {
		t.Errorf("the panel of the node reads\n%q", panel)
	}
}

// All that a click does, a key does, and the focus is where it was once the panel closes.
func TestKeyboard(t *testing.T) {
	tab := browser.Open(t, serve(t, shopNode()).URL+"/map/", false)
	tab.Until(`document.querySelectorAll(".card").length === 14`)
	focused := func(name string) {
		t.Helper()
		tab.Until(`document.activeElement.querySelector(".name")?.textContent === "` + name + `"`)
	}
	tab.Keys(kb.ArrowDown)
	focused("ingress/gateway")
	tab.Keys(kb.ArrowDown)
	focused("nightly-report/batch")
	tab.Keys(kb.ArrowRight)
	focused("orders-db")
	tab.Keys(kb.ArrowLeft)
	focused("nightly-report/batch")
	tab.Keys(kb.Enter)
	tab.Until(`document.activeElement.id === "panel" && document.querySelector("#panel h2").textContent === "nightly-report/batch"`)
	tab.Keys(kb.Escape)
	focused("nightly-report/batch")
	tab.Until(`document.getElementById("panel").hidden`)
	tab.Keys("/")
	tab.Until(`document.activeElement.id === "filter"`)
	tab.Keys("payments") // what talks to it
	tab.Until(`document.querySelectorAll(".card").length === 4 && document.querySelector("#count").textContent === "1 of 5 allocations"`)
	tab.Keys("-nowhere")
	tab.Until(`document.querySelector("#empty-title").textContent === "Nothing matches the filter" && !document.getElementById("empty").hidden`)
	tab.Keys(kb.Escape)
	tab.Until(`document.querySelectorAll(".card").length === 14 && document.activeElement.id !== "filter"`)
	tab.Keys("p")
	tab.Until(`document.querySelector("#pause").textContent === "Paused"`)
}

// What changes on the node changes on the page, and what cannot be shown is said.
func TestStates(t *testing.T) {
	source := shopNode()
	whole := source.graph
	source.graph = Graph{Schema: 1, Node: "worker-12", Seconds: 60, Problems: []health.Problem{}, Allocations: []Node{}, Ends: []End{}, Edges: []Edge{}}
	server := serve(t, source)
	tab := browser.Open(t, server.URL+"/map/#"+apiID, false)
	tab.Until(`!document.getElementById("empty").hidden`)
	if text := tab.Text("#empty"); !strings.HasPrefix(text, "No allocation of the mesh is on this node\n") || tab.Text("#health") != "healthy" {
		t.Errorf("an empty node reads %q", tab.Text("body"))
	}
	tab.Until(`document.querySelector("#panel .problem").textContent === "It is not on this node any more."`)
	tab.Keys(kb.Escape)

	source.set(func(f *fakeSource) {
		f.graph = whole
		f.graph.Ends, f.graph.Edges = []End{}, []Edge{}
	})
	tab.Until(`document.querySelector("#notice").textContent === "No connection in the last 60 s."`)
	source.set(func(f *fakeSource) { f.graph.Unrecorded = "flows are off" })
	tab.Until(`document.querySelector("#notice").textContent === "Connections are not recorded, so there are no rates: flows are off."`)
	source.set(func(f *fakeSource) { f.graph, f.graph.Missed = whole, 1234 })
	tab.Until(`document.querySelector("#notice").textContent.startsWith("1,234 connections are in no rate")`)
	tab.Until(`document.querySelectorAll("#edges path").length === 13 && document.getElementById("empty").hidden`)

	server.CloseClientConnections()
	server.Listener.Close()
	tab.Until(`!document.getElementById("alert").hidden && document.body.classList.contains("stale")`)
	if text := tab.Text("#alert"); !strings.HasPrefix(text, "The agent does not answer since ") || !strings.Contains(text, "What you see is from ") {
		t.Errorf("the page says %q", text)
	}
	if cards := tab.Text("#allocations"); !strings.Contains(cards, "nightly-report/batch") {
		t.Errorf("what was known is gone: %q", cards)
	}
}

// A thousand allocations are as many answers to read, and the page stays usable: those
// with trouble and traffic are drawn, and each other is a filter away.
func TestManyAllocations(t *testing.T) {
	source := shopNode()
	for i := range 1000 {
		source.graph.Allocations = append(source.graph.Allocations, node(fmt.Sprintf("%08d-0000", i), fmt.Sprintf("job-%d", i), "g", "direct", "audit"))
	}
	tab := browser.Open(t, serve(t, source).URL+"/map/", false)
	tab.Until(`document.querySelectorAll("#allocations .card").length === 60 && document.querySelector("#count").textContent === "1005 allocations"`)
	tab.Until(`document.querySelector("#notice").textContent === "The 60 allocations with most trouble and traffic are drawn, of 1005: filter for another."`)
	tab.Until(`[...document.querySelectorAll("#allocations .name")].some((e) => e.textContent === "nightly-report/batch")`)
	tab.Keys("/")
	tab.Keys("job-777")
	tab.Until(`document.querySelectorAll("#allocations .card").length === 1`)
}

// Names come from tasks. None becomes a part of the page, runs, or hides what it is.
func TestHostileNames(t *testing.T) {
	const attack = `<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>"'` + "\u202emoc.live\x1b[2J"
	source := shopNode()
	source.graph.Node, source.graph.Unrecorded, source.graph.Version = attack, attack, attack
	n := node("a/../../b?c#d"+attack, attack, attack, "transparent", "audit")
	source.graph.Allocations = []Node{n}
	source.graph.Ends = []End{{ID: attack, Kind: KindService, Name: attack}}
	source.graph.Edges = []Edge{{From: n.ID, To: attack, Rate: 1, Verdicts: map[string]float64{attack: 1}}}
	source.graph.Problems = []health.Problem{{Code: attack, Severity: health.SeverityError, Subject: attack, What: attack, Remedy: attack}}
	source.allocations = map[string]Allocation{n.ID: {
		Node: n, Task: attack, Problems: source.graph.Problems, Unknown: attack, Unrecorded: attack,
		Settings: []explain.Setting{{Name: attack, Value: attack, Source: attack}},
		Flows:    []Flow{{Direction: attack, Task: attack, Peer: attack, Verdict: attack, Meaning: attack, Refused: true}},
	}}
	tab := browser.Open(t, serve(t, source).URL+"/map/", false)
	shows := func(panel string) {
		t.Helper()
		tab.Until(`document.querySelector("#panel h2")?.textContent.includes("onerror=")`)
		tab.Until(`document.title.startsWith("Weir map of <img")`) // and so not "owned"
		tab.Until(`document.querySelectorAll("script").length === 1 && document.querySelectorAll("img").length === 1`)
		tab.Until(`!/[\u202e\u001b]/.test(document.body.innerText + document.title)`)
		if text := tab.Text("body"); !strings.Contains(text, `\u202emoc.live\u001b[2J`) {
			t.Errorf("%s: the name is not shown as it is: %q", panel, text)
		}
	}
	tab.Until(`document.querySelectorAll(".card").length === 2`)
	tab.Do(chromedp.Click(chromedp.CSS("#allocations .card")))
	tab.Until(`document.querySelectorAll("#panel .flows tr").length === 1`)
	shows("allocation")
	tab.Do(chromedp.Click(chromedp.CSS("#to .card")))
	tab.Until(`document.querySelector("#panel .link") !== null`)
	shows("end")
	tab.Do(chromedp.Click(chromedp.CSS("#health")))
	tab.Until(`document.querySelector("#panel h2").textContent.startsWith("Node")`)
	shows("node")
}
