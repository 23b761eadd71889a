// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/flow"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/monitor"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// flowReader is a reader of flows in the test's own process.
type flowReader struct {
	t     *testing.T
	stop  context.CancelFunc
	done  chan error
	mutex sync.Mutex
	flows []api.Flow
}

// follow starts a reader of what happens from now on.
func (n *node) follow(query api.FlowQuery) *flowReader {
	n.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r := &flowReader{t: n.t, stop: cancel, done: make(chan error, 1)}
	n.t.Cleanup(cancel)
	query.Follow = true
	go func() {
		r.done <- api.ReadFlows(ctx, n.config.StateDir, query, func(flow api.Flow) error {
			r.mutex.Lock()
			defer r.mutex.Unlock()
			r.flows = append(r.flows, flow)
			return nil
		})
	}()
	return r
}

func (r *flowReader) seen() []api.Flow {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	return slices.Clone(r.flows)
}

// end stops the reader, which is no error.
func (r *flowReader) end() {
	r.t.Helper()
	r.stop()
	if err := <-r.done; err != nil {
		r.t.Errorf("flows: %v", err)
	}
}

// history is what the agent has recorded.
func (n *node) history(query api.FlowQuery) (list []api.Flow) {
	n.t.Helper()
	err := api.ReadFlows(context.Background(), n.config.StateDir, query, func(flow api.Flow) error {
		list = append(list, flow)
		return nil
	})
	if err != nil {
		n.t.Fatalf("flows: %v", err)
	}
	return list
}

// recording dials until what the client does is recorded.
func (n *node) recording(task *test.Client) {
	n.t.Helper()
	test.Eventually(n.t, func() error {
		_, _ = task.Ask("tcp4", "127.0.0.1:1") // nobody listens
		if list := n.history(api.FlowQuery{Port: 1}); len(list) == 0 {
			return errors.New("nothing is recorded")
		}
		return nil
	}, "the agent to record")
}

// shopNode is a node with an allocation of job shop that has an upstream api by the
// virtual IP 240.0.0.1, a proxy that listens for both, and a task.
func shopNode(t *testing.T, change func(*configfile.Config)) (n *node, id string, mesh *test.NetNS, task *test.Client) {
	t.Helper()
	n = newNode(t)
	change(&n.config)
	cgroup := test.NewCgroup(t)
	n.config.CgroupRoot = cgroup.Path
	n.Datapath = redirect.New(n.config.Paths())
	mesh = test.NewNetNS(t)
	id = numbered(1)
	err := n.Add(redirect.Attachment{Key: workload.AttachmentID{ContainerID: id, IfName: "eth0"}, NetNS: mesh.Path, Request: workload.Request{
		Network: "nomad", Job: workload.Job{AllocID: id, Namespace: "prod", ID: "shop", Group: "front"},
		Mode: workload.ModeTransparent, ProxyUID: 101, InboundPort: 20001, OutboundPort: 15001,
	}})
	if err != nil {
		t.Fatal(err)
	}
	n.cached(id, mesh.Path, transparentMesh)
	const upstreams = `[{"DestinationName":"api","LocalBindPort":9191}]`
	n.fake.answers(say(200, fmt.Sprintf(`{"_nomad-task-%s-group-front-web-80-sidecar-proxy":{"Kind":"connect-proxy","Service":"web-sidecar-proxy","Port":20001,`+
		`"Proxy":{"Mode":"transparent","DestinationServiceName":"web","DestinationServiceID":"_nomad-task-%s-group-front-web-80","LocalServicePort":80,"Upstreams":%s}}}`, id, id, upstreams)))
	n.fake.set(&n.fake.chain, say(200, `{"Chain":{"AutoVirtualIPs":["240.0.0.1"]}}`))
	n.run()
	n.eventually(id, api.StateManaged)
	test.Eventually(t, func() error {
		for _, w := range n.agent.Status().Workloads {
			if len(w.Upstreams) == 1 && len(w.Upstreams[0].VirtualIPs) == 1 {
				return nil
			}
		}
		return errors.New("the upstream has no virtual IP")
	}, "what Consul knows")

	task = test.NewClient(t, test.Spec{NetNS: mesh, Cgroup: cgroup.Child(t, id+".server.scope"), UID: 1000, GID: 1000})
	proxy := test.Spec{NetNS: mesh, Cgroup: cgroup.Child(t, id+".connect-proxy-web.scope"), UID: 101, GID: 101}
	test.EchoProcess(t, proxy, "tcp4", "127.0.0.1:15001")
	test.EchoProcess(t, proxy, "tcp4", "127.0.0.1:9191") // the upstream's listener
	return n, id, mesh, task
}

// Each dial is seen once by each of two readers, with the names of both ends,
// and a filter lets through what matches and nothing else. What reads the
// kernel's events is given them by the agent.
func TestFlows(t *testing.T) {
	n, id, mesh, task := shopNode(t, func(*configfile.Config) {})
	n.recording(task)
	all, refused := n.follow(api.FlowQuery{}), n.follow(api.FlowQuery{Refused: true})
	began := time.Now()
	marker := func(r *flowReader, dial string) {
		t.Helper()
		to := netip.MustParseAddrPort(dial)
		test.Eventually(t, func() error {
			_, _ = task.Ask("tcp4", dial)
			for _, flow := range r.seen() {
				if flow.Destination.IP == to.Addr() && flow.Destination.Port == to.Port() {
					return nil
				}
			}
			return fmt.Errorf("%s is not among %d flows", dial, len(r.seen()))
		}, "a reader to follow")
	}
	marker(all, "127.0.0.1:1")
	marker(refused, "127.128.0.9:1")

	const dials = 5
	for range dials {
		if _, err := task.Ask("tcp4", "240.0.0.1:80"); err != nil {
			t.Error(err)
		}
		if _, err := task.Ask("tcp4", "198.51.100.7:443"); err != nil {
			t.Error(err)
		}
	}
	if _, err := task.Ask("tcp4", "127.128.0.1:80"); err == nil {
		t.Error("the range that carries origins is served")
	}
	marker(all, "127.0.0.1:2")
	marker(refused, "127.128.0.9:2")
	all.end()
	refused.end()

	uid := uint32(1000)
	want := api.Flow{
		Schema: 1, Node: n.agent.flows.Node, Direction: api.DirectionOutbound,
		Source: api.FlowSource{AllocID: id, Namespace: "prod", Job: "shop", TaskGroup: "front", Task: "server", Service: "web", PID: uint32(task.PID)},
	}
	count := func(list []api.Flow, to string) (count int) {
		t.Helper()
		for _, flow := range list {
			if flow.Destination.IP != netip.MustParseAddr(to) || flow.Destination.Port < 80 {
				continue
			}
			count++
			if flow.Source.UID == nil || *flow.Source.UID != uid || flow.Source.Command == "" {
				t.Errorf("user of %+v: want %d, and a command", flow.Source, uid)
			}
			got := api.Flow{Schema: flow.Schema, Node: flow.Node, Direction: flow.Direction, Source: flow.Source}
			got.Source.UID, got.Source.Command = nil, ""
			if got != want {
				t.Errorf("flow %+v: want %+v", got, want)
			}
			if service := flow.Destination.Service; (service == "api") != (to == "240.0.0.1") {
				t.Errorf("service of %s = %q", to, service)
			}
			if flow.Refused != (to == "127.128.0.1") {
				t.Errorf("%s: refused = %t", to, flow.Refused)
			}
		}
		return count
	}
	for reader, list := range map[string][]api.Flow{"live": all.seen(), "history": n.history(api.FlowQuery{Since: began})} {
		for to, want := range map[string]int{"240.0.0.1": dials, "198.51.100.7": dials, "127.128.0.1": 1} {
			if got := count(list, to); got != want {
				t.Errorf("%s: %d flows to %s, want %d", reader, got, to, want)
			}
		}
	}
	traffic, err := api.ReadTraffic(context.Background(), n.config.StateDir, began)
	if err != nil {
		t.Fatal(err)
	}
	edges := make(map[string]uint64)
	for _, edge := range traffic.Edges {
		if edge.Source.Task == "server" && edge.Destination.Port >= 80 {
			edges[edge.Destination.IP.String()+" "+edge.Destination.Service] += edge.Count
		}
	}
	if edges["240.0.0.1 api"] != dials || edges["198.51.100.7 "] != dials || edges["127.128.0.1 "] != 1 {
		t.Errorf("traffic: %v of %+v", edges, traffic)
	}
	for _, flow := range refused.seen() {
		if !flow.Refused {
			t.Errorf("a reader of refusals is told of %+v", flow)
		}
	}
	if got := count(refused.seen(), "127.128.0.1"); got != 1 {
		t.Errorf("%d refusals of the dial, want 1", got)
	}
	filters := []struct {
		query api.FlowQuery
		want  int
	}{
		{api.FlowQuery{To: "api"}, dials},
		{api.FlowQuery{To: "240.0.0.0/8", From: "shop"}, dials},
		{api.FlowQuery{To: "api", From: "another"}, 0},
		{api.FlowQuery{To: "api", Last: 2}, 2},
		{api.FlowQuery{Service: "api", Alloc: id[:3], Job: "shop", Task: "server", Port: 80, Verdicts: []string{"upstream", "redirected"}}, dials},
		{api.FlowQuery{To: "api", Since: time.Now()}, 0},
		{api.FlowQuery{To: "api", Until: began}, 0},
		{api.FlowQuery{Port: 443}, dials},
		{api.FlowQuery{Task: "server", Not: true}, 0},
	}
	for _, f := range filters {
		if got := n.history(f.query); len(got) != f.want {
			t.Errorf("%+v: %d flows, want %d", f.query, len(got), f.want)
		}
	}

	// The kernel's ring has one reader, and that is the agent.
	if err := n.Events(context.Background(), func(monitor.Event) error { return nil }); !errors.Is(err, monitor.ErrBusy) {
		t.Errorf("a second reader of the kernel's ring: %v, want busy", err)
	}
	found := errors.New("found")
	test.Eventually(t, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
		defer cancel()
		go func() {
			for ctx.Err() == nil {
				_, _ = task.Ask("tcp4", "127.128.0.1:81")
			}
		}()
		err := api.ReadEvents(ctx, n.config.StateDir, func(event monitor.Event) error {
			if event.Verdict == bpfmap.RefusedEncoded && event.Cookie == mesh.Cookie() && event.PID == uint32(task.PID) {
				return found
			}
			return nil
		})
		if errors.Is(err, found) {
			return nil
		}
		return fmt.Errorf("events: %w", err)
	}, "an event by the agent")
}

// An agent that is told not to record leaves the kernel's ring to others.
func TestFlowsTurnedOff(t *testing.T) {
	n := newNode(t)
	n.config.Flows.Enabled = false
	n.run()
	test.Eventually(t, func() error {
		_, err := api.ReadStatus(context.Background(), n.config.StateDir)
		return err
	}, "the agent to answer")
	none := func(api.Flow) error { return nil }
	if err := api.ReadFlows(context.Background(), n.config.StateDir, api.FlowQuery{}, none); !errors.Is(err, api.ErrFlowsOff) {
		t.Errorf("flows = %v, want %v", err, api.ErrFlowsOff)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := n.Events(ctx, func(monitor.Event) error { return nil }); err != nil {
		t.Errorf("events: %v", err)
	}
}

// The ring keeps no more than it may, in number and in time, and tells how many
// gave way; a reader that is too slow misses what is gone and is told how many.
func TestFlowRingIsBounded(t *testing.T) {
	const history = time.Hour
	ring := flow.NewRing(640*flow.RecordSize, history)
	if bytes := ring.Most * ring.ChunkLen * flow.RecordSize; bytes > 640*flow.RecordSize {
		t.Errorf("it may take %d bytes, want at most %d", bytes, 640*flow.RecordSize)
	}
	now := time.Now()
	put := func(i int, at time.Time) { ring.Append(flow.Record{At: at.UnixNano(), Uid: uint32(i)}) }
	for i := range 1000 {
		put(i, now.Add(-time.Minute))
	}
	number, dropped := ring.Since(time.Time{})
	if number != 360 || dropped != 360 {
		t.Errorf("the oldest is record %d and %d gave way, want 360 and 360", number, dropped)
	}
	if _, dropped := ring.Since(now.Add(-time.Second)); dropped != 0 {
		t.Errorf("of what came after the oldest %d gave way, want none", dropped)
	}
	var got []uint32
	missed := uint64(0)
	for number := uint64(100); ; {
		records, gone, changed := ring.Read(number)
		missed += gone
		if changed != nil {
			break
		}
		for _, r := range records {
			got = append(got, r.Uid)
		}
		number += gone + uint64(len(records))
	}
	if missed != 260 || len(got) != 640 || got[0] != 360 || got[639] != 999 {
		t.Errorf("a slow reader missed %d and got %d records, want 260 and 640 in order", missed, len(got))
	}
	if number := ring.Last(3, 360, func(r *flow.Record) bool { return r.Uid%2 == 0 }); number != 994 {
		t.Errorf("the last three even ones begin with %d, want 994", number)
	}
	ring.Tidy(now.Add(history))
	if number, _ := ring.Since(time.Time{}); number != 1000 || len(ring.Chunks) != 0 {
		t.Errorf("after the history %d chunks are kept, from %d; want none", len(ring.Chunks), number)
	}
	_, _, changed := ring.Read(1000)
	put(1000, now)
	select {
	case <-changed:
	default:
		t.Error("a reader that waits is not woken")
	}
}
