// SPDX-License-Identifier: MPL-2.0

package server

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/flow"
	"github.com/weirmesh/weir/agent/web"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/explain"
	"github.com/weirmesh/weir/redirect/health"
)

// The bounds of what the map shows.
const (
	mapWindow = time.Minute // that rates are over
	mapEnds   = 40          // on either side
	mapFlows  = 50          // of one allocation
)

// Map is what the map shows.
func (s *Server) Map() web.Source { return mapSource{s} }

// mapSource is the agent as its page sees it.
type mapSource struct{ *Server }

// Graph puts the allocations of the last pass together with who talked to what since.
func (m mapSource) Graph() web.Graph {
	status, traffic := m.Source.Status(), m.trafficSince(time.Now().Add(-mapWindow))
	g := web.Graph{
		Schema: 1, Version: m.Version, Time: traffic.Until, Seconds: max(traffic.Until.Sub(traffic.Since).Seconds(), 1),
		Problems: append([]health.Problem{}, status.Problems...), Unrecorded: traffic.Problem, Missed: traffic.Lost + traffic.Omitted,
		Allocations: []web.Node{},
	}
	if m.Flows != nil {
		g.Node = m.Flows.Node
	}
	nodes := make(map[string]*web.Node, len(status.Workloads))
	for _, w := range status.Workloads {
		if nodes[w.ID] == nil { // else it is another network of it
			node := mapNode(w)
			nodes[w.ID] = &node
		}
	}
	g.Ends, g.Edges = mapEdges(traffic.Edges, nodes, g.Seconds)
	for _, node := range nodes {
		g.Allocations = append(g.Allocations, *node)
	}
	slices.SortFunc(g.Allocations, func(a, b web.Node) int {
		return cmp.Or(cmp.Compare(a.Job, b.Job), cmp.Compare(a.Group, b.Group), cmp.Compare(a.ID, b.ID))
	})
	return g
}

func mapNode(w api.WorkloadView) web.Node {
	node := web.Node{
		ID: w.ID, Job: w.Job, Group: w.Group, Namespace: w.Namespace, State: string(w.State), Mode: string(w.Mode), Guard: string(w.Guard), InSync: w.InSync,
	}
	for _, problem := range w.Problems {
		if problem.Severity == health.SeverityError {
			node.Errors++
		} else {
			node.Warnings++
		}
	}
	return node
}

// mapEdge is an edge that the map shows, with its allocation and its other end.
type mapEdge struct {
	api.CountedEdge
	node *web.Node
	end  web.End
}

// keptEnds says as what each end is shown: those that are refused, and then the busiest,
// have a name of their own; the rest is one end.
func keptEnds(list []mapEdge) map[string]web.End {
	type counted struct {
		web.End
		count, refused uint64
	}
	ends := make(map[string]*counted)
	for _, edge := range list {
		if ends[edge.end.ID] == nil {
			ends[edge.end.ID] = &counted{End: edge.end}
		}
		ends[edge.end.ID].count += edge.Count
		if edge.Refused {
			ends[edge.end.ID].refused += edge.Count
		}
	}
	sides := make(map[bool][]*counted)
	for _, end := range ends {
		sides[end.Source] = append(sides[end.Source], end)
	}
	kept := make(map[string]web.End)
	for source, side := range sides {
		slices.SortFunc(side, func(a, b *counted) int {
			return cmp.Or(cmp.Compare(b.refused, a.refused), cmp.Compare(b.count, a.count), cmp.Compare(a.ID, b.ID))
		})
		for i, end := range side {
			kept[end.ID] = end.End
			if i >= mapEnds {
				kept[end.ID] = web.End{ID: endID(source, web.KindOthers, ""), Kind: web.KindOthers, Source: source}
			}
		}
	}
	return kept
}

// mapEdges joins edges by allocation and end, and adds what they carry to the
// allocations.
func mapEdges(list []api.CountedEdge, nodes map[string]*web.Node, seconds float64) ([]web.End, []web.Edge) {
	var mapped []mapEdge
	for _, edge := range list {
		if node, end := endsOf(edge.Edge, nodes); end.ID != "" {
			mapped = append(mapped, mapEdge{edge, node, end})
		}
	}
	kept := keptEnds(mapped)
	edges := make(map[[2]string]*web.Edge)
	shown := make(map[string]web.End)
	for _, edge := range mapped {
		node, end := edge.node, kept[edge.end.ID]
		shown[end.ID] = end
		ways := [2]string{node.ID, end.ID}
		if end.Source {
			ways = [2]string{end.ID, node.ID}
		}
		if edges[ways] == nil {
			edges[ways] = &web.Edge{From: ways[0], To: ways[1], Verdicts: make(map[string]float64)}
		}
		rate := float64(edge.Count) / seconds
		edges[ways].Rate += rate
		edges[ways].Verdicts[edge.Verdict] += rate
		node.Rate += rate
		if edge.Refused {
			edges[ways].Refused += rate
			node.Refused += rate
		}
	}
	endList, edgeList := make([]web.End, 0, len(shown)), make([]web.Edge, 0, len(edges))
	for _, end := range shown {
		endList = append(endList, end)
	}
	for _, edge := range edges {
		edgeList = append(edgeList, *edge)
	}
	slices.SortFunc(endList, func(a, b web.End) int { return cmp.Compare(a.ID, b.ID) })
	slices.SortFunc(edgeList, func(a, b web.Edge) int { return cmp.Or(cmp.Compare(a.From, b.From), cmp.Compare(a.To, b.To)) })
	return endList, edgeList
}

func endID(source bool, kind web.Kind, name string) string {
	side := "to"
	if source {
		side = "from"
	}
	return side + " " + string(kind) + " " + name
}

// endsOf are the allocation of an edge and its other end; no end where the map shows
// none: a proxy's own connection stands for one of a task. A forwarded one is shown from
// the allocation that it passes, past its proxy.
func endsOf(edge api.Edge, nodes map[string]*web.Node) (*web.Node, web.End) {
	s, d := edge.Source, edge.Destination
	var node *web.Node
	end := web.End{Kind: web.KindAddress}
	switch {
	case edge.Direction == api.DirectionInbound:
		node, end.Source = nodes[d.AllocID], true
		end.Name = s.IP.String()
		if s.AllocID != "" {
			end.Kind, end.Name, end.AllocID = web.KindAllocation, ofAllocation(s.AllocID, s.Job, s.TaskGroup), s.AllocID
		}
	case edge.Direction == api.DirectionOutbound && edge.Verdict != bpfmap.Proxy.String():
		node = nodes[s.AllocID]
		end = destinationOf(edge)
	case edge.Direction == api.DirectionForwarded:
		node = nodes[edge.Through.AllocID] // whatever is inside of it has no place of its own
		end = destinationOf(edge)
	}
	if node == nil {
		return nil, web.End{}
	}
	end.ID = endID(end.Source, end.Kind, end.Name)
	return node, end
}

// destinationOf is where a connection goes.
func destinationOf(edge api.Edge) web.End {
	s, d := edge.Source, edge.Destination
	switch {
	case d.Service != "":
		return web.End{Kind: web.KindService, Name: d.Service}
	case edge.Verdict == bpfmap.Local.String() || d.AllocID == s.AllocID && d.AllocID != "":
		return web.End{Kind: web.KindLoopback}
	case d.AllocID != "":
		return web.End{Kind: web.KindAllocation, Name: ofAllocation(d.AllocID, d.Job, d.TaskGroup), AllocID: d.AllocID}
	}
	return web.End{Kind: web.KindAddress, Name: netip.AddrPortFrom(d.IP, d.Port).String()}
}

func ofAllocation(id, job, group string) string {
	return (&flow.Workload{AllocID: id, Job: job, Group: group}).Label()
}

// Allocation is what decides about an allocation's connections, from the rows in the
// kernel, and the last of them.
func (m mapSource) Allocation(id string) (web.Allocation, bool) {
	list := m.Source.Status().Workloads
	i := slices.IndexFunc(list, func(w api.WorkloadView) bool { return w.ID == id })
	if i < 0 {
		return web.Allocation{}, false
	}
	w := list[i]
	found := web.Allocation{
		Schema: 1, Node: mapNode(w), Task: w.Task, Since: w.Since, Problems: w.Problems, Settings: []explain.Setting{}, Flows: []web.Flow{},
	}
	if w.State != api.StateManaged {
		found.Unknown = "it is not under Weir, so nothing decides about its connections"
	} else if settings, _, err := m.Datapath.Settings(w.Key); err != nil {
		found.Unknown = err.Error()
	} else {
		found.Settings = settings
	}
	if m.Flows == nil {
		found.Unrecorded = api.ErrFlowsOff.Error()
		return found, true
	}
	for _, one := range m.Flows.LastOf(id, mapFlows) {
		found.Flows = append(found.Flows, mapFlow(id, one))
	}
	found.Unrecorded = m.Flows.Trouble()
	return found, true
}

// mapFlow is a flow as the allocation sees it.
func mapFlow(id string, f api.Flow) web.Flow {
	s, d := f.Source, f.Destination
	shown := web.Flow{Time: f.Time, Direction: string(f.Direction), Verdict: f.Verdict, Refused: f.Refused, Task: cmp.Or(s.Task, s.Command)}
	for _, verdict := range bpfmap.AllVerdicts() {
		if verdict.String() == f.Verdict {
			shown.Meaning = verdict.Describe()
		}
	}
	port := ":" + strconv.Itoa(int(d.Port))
	switch {
	case f.Direction == api.DirectionInbound && s.AllocID != "":
		shown.Peer = ofAllocation(s.AllocID, s.Job, s.TaskGroup) + " to " + port
	case f.Direction == api.DirectionInbound:
		shown.Peer = s.IP.String() + " to " + port
	case d.Service != "":
		shown.Peer = d.Service + port
	case d.AllocID != "" && d.AllocID != id:
		shown.Peer = ofAllocation(d.AllocID, d.Job, d.TaskGroup) + port
	default:
		shown.Peer = netip.AddrPortFrom(d.IP, d.Port).String()
	}
	return shown
}
