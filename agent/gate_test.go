// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// gated is an allocation that comes while the agent runs, with a task that dials.
type gated struct {
	id     string
	ns     *test.NetNS
	cgroup *test.Cgroup
	task   *test.Client
}

func (n *node) gated(cgroup *test.Cgroup, number int) gated {
	n.t.Helper()
	g := gated{id: numbered(number)}
	g.ns, _ = n.transparent(g.id)
	g.cgroup = cgroup.Child(n.t, fmt.Sprint("envoy", number))
	g.task = test.NewClient(n.t, test.Spec{NetNS: g.ns, Cgroup: cgroup.Child(n.t, fmt.Sprint("task", number)), UID: 1000, GID: 1000})
	return g
}

// dial opens a connection in the background.
func (g gated) dial() <-chan error {
	done := make(chan error, 1)
	go func() {
		answer, err := g.task.Ask("tcp4"+test.Waiting, "192.0.2.1:80")
		if err == nil && answer.Origin.String() != "192.0.2.1:80" {
			err = fmt.Errorf("answered by %+v", answer)
		}
		done <- err
	}()
	return done
}

func (g gated) serve(t *testing.T) *test.ServerProcess {
	t.Helper()
	return test.EchoProcess(t, test.Spec{NetNS: g.ns, Cgroup: g.cgroup, UID: 101, GID: 101}, "tcp4", "127.0.0.1:15001")
}

// withGate is a node whose agent runs with a gate of that length.
func withGate(t *testing.T, timeout string) (n *node, cgroup *test.Cgroup) {
	t.Helper()
	n = newNode(t)
	cgroup = test.NewCgroup(t)
	n.config.CgroupRoot, n.config.Gate.Timeout = cgroup.Path, timeout
	n.Datapath = redirect.New(n.config.Paths())
	n.fake.answers(registered(numbered(1), numbered(2)))
	return n, cgroup
}

// eventuallyHeld waits until the agent says whether the allocation's connections wait.
func (n *node) eventuallyHeld(id string, want bool) {
	n.t.Helper()
	test.Eventually(n.t, func() error {
		if since := n.eventually(id, api.StateManaged).HeldSince; since.IsZero() == want {
			return fmt.Errorf("held since %s", since)
		}
		return nil
	}, fmt.Sprintf("held to be %t", want))
}

// What a new allocation dials waits for its proxy, and no more than that: once the
// proxy has listened, a connection is refused while it does not.
func TestGateOfANewAllocation(t *testing.T) {
	n, cgroup := withGate(t, "1m")
	n.run()
	g := n.gated(cgroup, 1)
	n.eventuallyHeld(g.id, true)
	n.recording(g.task)
	flows := n.follow(api.FlowQuery{Verdicts: []string{"held"}})
	done := g.dial()
	test.Eventually(t, func() error {
		if held := n.agent.Status().Counts.Held; held != 1 {
			return fmt.Errorf("%d connections are counted", held)
		}
		return nil
	}, "the connection to be counted")
	test.Eventually(t, func() error {
		list := flows.seen()
		if len(list) != 1 || list[0].Source.AllocID != g.id || list[0].Refused || list[0].Direction != api.DirectionOutbound ||
			list[0].Destination.IP.String() != "192.0.2.1" || list[0].Destination.Port != 80 || list[0].Source.UID == nil || *list[0].Source.UID != 1000 {
			return fmt.Errorf("flows are %+v", list)
		}
		return nil
	}, "the flow that is held")
	proxy := g.serve(t)
	if err := <-done; err != nil {
		t.Errorf("a connection that waited: %v", err)
	}
	n.eventuallyHeld(g.id, false)
	proxy.Stop()
	if err := <-g.dial(); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial when the proxy stopped: %v, want it refused", err)
	}
	if counts := n.agent.Status().Counts; counts.Held != 1 || counts.HeldTimeout != 0 {
		t.Errorf("counts are %+v, want one that was held", counts)
	}
}

// A proxy that does not come is waited for until the time is over, and then nothing of
// the gate is left in the namespace.
func TestGateTimesOut(t *testing.T) {
	n, cgroup := withGate(t, "3s")
	n.run()
	g := n.gated(cgroup, 1)
	n.eventuallyHeld(g.id, true)
	if got := listeners(t, g.ns); got != 1 {
		t.Errorf("%d sockets listen in the namespace, want the gate's", got)
	}
	if err := <-g.dial(); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a connection that waited: %v, want it refused", err)
	}
	n.eventuallyHeld(g.id, false)
	if counts := n.agent.Status().Counts; counts.Held != 1 || counts.HeldTimeout != 1 {
		t.Errorf("counts are %+v, want one that was held and timed out", counts)
	}
	for _, action := range []string{"held", "held_timeout"} {
		if err := n.metric(fmt.Sprintf("weir_actions_total{action=%q} 1", action)); err != nil {
			t.Error(err)
		}
	}
	if err := <-g.dial(); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial after the timeout: %v, want it refused", err)
	}
	if got := listeners(t, g.ns); got != 0 {
		t.Errorf("%d sockets listen in the namespace after the timeout", got)
	}
}

func listeners(t *testing.T, in *test.NetNS) int {
	t.Helper()
	ns, err := host.OpenNamespace(in.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	sockets, err := ns.Listening()
	if err != nil {
		t.Fatal(err)
	}
	return len(sockets)
}

// A node or a job without a gate has none, and an allocation that is older than the
// agent's gate gets none.
func TestNoGate(t *testing.T) {
	n, cgroup := withGate(t, "0s")
	g := n.gated(cgroup, 1)
	n.run()
	n.eventually(g.id, api.StateManaged)
	if err := <-g.dial(); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial without a gate: %v, want it refused", err)
	}
}

// The end of the agent lets nothing wait for ever, and a new one opens the gate again
// for what is left of its time.
func TestGateEndsWithTheAgent(t *testing.T) {
	n, cgroup := withGate(t, "1m")
	g := n.gated(cgroup, 1)
	instance, err := New(n.config, Options{Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- instance.Run(ctx) }()
	test.Eventually(t, func() error {
		for _, w := range instance.Status().Workloads {
			if w.ID == g.id && !w.HeldSince.IsZero() {
				return nil
			}
		}
		return errors.New("it is not held")
	}, "the gate to open")
	done := g.dial()
	test.Eventually(t, func() error {
		if instance.Status().Counts.Held == 0 {
			return errors.New("nothing is held")
		}
		return nil
	}, "the connection to wait")
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := <-done; !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a connection that waited: %v, want it refused", err)
	}
	n.run()
	n.eventuallyHeld(g.id, true)
}

// An allocation that ends without a DEL while its gate is open is forgotten: the gate
// does not keep its namespace alive.
func TestGateKeepsNoNamespaceAlive(t *testing.T) {
	n, _ := withGate(t, "10m")
	n.run()
	id := numbered(1)
	ns, key := n.transparent(id)
	n.eventuallyHeld(id, true)
	ns.End()
	n.fake.answers(registered())
	if err := os.Remove(filepath.Join(n.config.CNI.CacheDir, "results", "nomad-"+id+"-eth0")); err != nil {
		t.Fatal(err)
	}
	test.Eventually(t, func() error {
		if _, err := n.PruneDead(); err != nil {
			return err
		}
		known, err := n.Records()
		if err != nil || len(known) > 0 {
			return fmt.Errorf("on record: %+v, %w", known, err)
		}
		return nil
	}, key.String()+" to be forgotten")
}

// A job asks by its service's meta.
func TestGateOfARegistration(t *testing.T) {
	for asked, want := range map[string]string{"5s": "5s", "0s": "0s", "11m": "", "soon": "", "-1s": ""} {
		text := fmt.Sprintf(`{"_nomad-task-%s-group-g-web-80-sidecar-proxy":{"Kind":"connect-proxy","Service":"web-sidecar-proxy","Port":20001,"Meta":{"weir-gate":%q}}}`, numbered(1), asked)
		proxies, problems, err := registration.ParseServices([]byte(text), registration.Loopback4())
		if err != nil || len(proxies) != 1 {
			t.Fatalf("proxies %+v, %v", proxies, err)
		}
		got := ""
		if proxies[0].Gate != nil {
			got = proxies[0].Gate.String()
		}
		told := strings.Contains(fmt.Sprint(problems, proxies[0]), "weir-gate")
		if got != want || told != (want == "") {
			t.Errorf("weir-gate = %q gives %q, told %t; want %q", asked, got, told, want)
		}
	}
}

// plain is an allocation in which nothing is redirected, with an upstream at port 9191.
func (n *node) plain(id string) *test.NetNS {
	n.t.Helper()
	ns := test.NewNetNS(n.t)
	n.fake.answers(say(200, fmt.Sprintf(`{"_nomad-task-%s-group-g-web-80-sidecar-proxy":{"Kind":"connect-proxy","Service":"web-sidecar-proxy","Port":20001,
		"Proxy":{"DestinationServiceName":"web","Upstreams":[{"DestinationType":"service","DestinationName":"api","LocalBindPort":9191}]}}}`, id)))
	n.cached(id, ns.Path, "")
	return ns
}

// upstreamWaits lets a task dial the upstream's port, and an Envoy listen there once the
// connection is counted among those that are held.
func upstreamWaits(t *testing.T, ns *test.NetNS, cgroup *test.Cgroup, held func() uint64) {
	t.Helper()
	task := test.NewClient(t, test.Spec{NetNS: ns, Cgroup: cgroup.Child(t, "task"), UID: 1000, GID: 1000})
	done := make(chan error, 1)
	go func() {
		_, err := task.Ask("tcp4"+test.Waiting, "127.0.0.1:9191")
		done <- err
	}()
	test.Eventually(t, func() error {
		if count := held(); count != 1 {
			return fmt.Errorf("%d connections are counted", count)
		}
		return nil
	}, "the connection to wait")
	test.EchoProcess(t, test.Spec{NetNS: ns, Cgroup: cgroup.Child(t, "envoy"), UID: 101, GID: 101}, "tcp4", "127.0.0.1:9191")
	if err := <-done; err != nil {
		t.Errorf("a connection that waited: %v", err)
	}
}

// The pass that puts an allocation under Weir opens its gate: a task dials within some
// hundred milliseconds of ADD.
func TestGateOpensInThePassThatAdds(t *testing.T) {
	n, cgroup := withGate(t, "1m")
	id := numbered(1)
	ns := n.plain(id)
	agent := n.newStepwise()
	defer agent.closeGates(func(workload.AttachmentID) bool { return false })
	agent.asks(t.Context())
	if list := agent.Status().Workloads; len(list) != 1 || list[0].State != api.StateManaged || list[0].HeldSince.IsZero() {
		t.Fatalf("after one pass there is %+v, want it under Weir with an open gate", list)
	}
	upstreamWaits(t, ns, cgroup, func() uint64 {
		agent.lookAtGates(time.Now())
		return agent.Status().Counts.Held
	})
}

// A plain allocation has a gate for its explicit upstreams and for nothing else.
func TestGateOfAPlainAllocation(t *testing.T) {
	n, cgroup := withGate(t, "1m")
	id := numbered(1)
	n.run()
	ns := n.plain(id)
	n.eventuallyHeld(id, true)
	upstreamWaits(t, ns, cgroup, func() uint64 { return n.agent.Status().Counts.Held })
	n.eventuallyHeld(id, false)
}
