// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// newStepwise is an agent whose loop is the test's: each turn of it is called for.
func (n *node) newStepwise() *Agent {
	n.t.Helper()
	a, err := New(n.config, Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		n.t.Fatal(err)
	}
	if _, err := a.datapath.Load(); err != nil {
		n.t.Fatal(err)
	}
	if a.watcher, err = discover.NewWatcher(append(a.config.Paths().Directories(), a.cache.Dir, a.config.CNI.NetNSDir)...); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() {
		if err := a.watcher.Close(); err != nil {
			n.t.Error(err)
		}
	})
	return a
}

// asks is a turn of the loop after a read of Consul.
func (a *Agent) asks(ctx context.Context) {
	a.consul.Read(ctx)
	a.consul.Look(ctx)
	a.pass(true)
}

// Where nothing changes, no turn of the loop writes to a map, whatever it has read
// or looked at, and neither does an agent that starts.
func TestCalmAgentWritesNothing(t *testing.T) {
	n := newNode(t)
	plain, cgroup := test.NewNetNS(t), test.NewCgroup(t)
	n.cached(numbered(1), plain.Path, "")
	mesh, key := n.transparent(numbered(2))
	for _, port := range []int{15001, 20001} {
		test.EchoProcess(t, test.Spec{NetNS: mesh, Cgroup: cgroup, UID: 101, GID: 101}, "tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	}
	n.fake.chain = say(200, `{"Chain":{"AutoVirtualIPs":["240.0.0.1"]}}`)
	upstream := func(port int) {
		proxy := func(settings map[string]any) map[string]any {
			settings["Upstreams"] = []any{map[string]any{"DestinationName": "db", "LocalBindPort": port}}
			return map[string]any{"Kind": "connect-proxy", "Port": 20001, "Proxy": settings}
		}
		data, err := json.Marshal(map[string]any{
			"_nomad-task-" + numbered(1) + "-group-g-api-80-sidecar-proxy": proxy(map[string]any{}),
			"_nomad-task-" + numbered(2) + "-group-g-web-80-sidecar-proxy": proxy(map[string]any{"Mode": "transparent"}),
		})
		if err != nil {
			t.Fatal(err)
		}
		n.fake.answers(say(200, string(data)))
	}
	upstream(9191)
	test.Eventually(t, func() error {
		addrs, err := host.Addresses(mesh.Path)
		if err == nil && !slices.ContainsFunc(addrs, netip.Addr.IsLinkLocalUnicast) {
			err = fmt.Errorf("it has %v", addrs)
		}
		return err
	}, "the kernel to give the device its own address, which is written when it comes")
	a := n.newStepwise()
	inSync := func(port uint16) error {
		list, err := n.Records()
		if err == nil && len(list) != 2 {
			err = fmt.Errorf("%d workloads are on record, want 2", len(list))
		}
		for _, known := range list {
			// The virtual IP is asked for beside the registrations, and may come a pass later.
			if list := known.MeshConfig.Upstreams; len(list) != 1 || list[0].Listener.Port() != port || len(list[0].Addresses) != 1 {
				err = fmt.Errorf("mesh configuration of %s is %+v", known.Key, known.MeshConfig)
			}
		}
		for _, w := range a.Status().Workloads {
			if !w.InSync || len(w.Problems) > 0 {
				err = fmt.Errorf("%s has problems %q", w.ID, w.Problems)
			}
		}
		return err
	}
	test.Eventually(t, func() error {
		a.asks(t.Context())
		a.resynced = time.Time{}
		a.pass(false)
		return inSync(9191)
	}, "both allocations to be in sync")
	if w, err := n.workload(key); err != nil || w.Proxy.Identity == inspect.IdentityNone {
		t.Fatalf("the kernel has %+v, %v; want its proxy known", w, err)
	}

	reads, writes := n.fake.times("/v1/agent/services"), test.CountMapWrites(t)
	for _, c := range []struct {
		what string
		do   func()
	}{
		{"looks", func() { a.pass(false) }},
		{"passes", func() { a.pass(true) }},
		{"reads of Consul", func() { a.asks(t.Context()) }},
		{"looks at everything anew", func() {
			a.resynced, a.pruned, a.freed = time.Time{}, time.Time{}, time.Time{}
			a.pass(false)
		}},
		{"starts", func() {
			a = n.newStepwise()
			a.asks(t.Context())
		}},
	} {
		const times = 5
		for range times {
			c.do()
		}
		if seen := writes.Seen(); len(seen) > 0 {
			t.Errorf("%d %s wrote to maps: %v", times, c.what, seen)
		}
		if err := inSync(9191); err != nil {
			t.Errorf("after %d %s: %v", times, c.what, err)
		}
	}

	if made := n.fake.times("/v1/agent/services") - reads; made != 10 {
		t.Errorf("Consul was read %d times meanwhile, want 10", made)
	}
	upstream(9292)
	a.asks(t.Context())
	if err := inSync(9292); err != nil {
		t.Errorf("after a change: %v", err)
	}
	if len(writes.Seen()) == 0 {
		t.Error("no write of a change was seen")
	}
}

func (n *node) workload(key workload.AttachmentID) (found inspect.WorkloadStatus, err error) {
	list, err := n.Workloads()
	for _, w := range list {
		if w.Key == key {
			return w, err
		}
	}
	return found, fmt.Errorf("workload %s: %w", key, store.ErrUnknown)
}

// Whom the kernel takes for a proxy is looked at again and again where its task
// cannot be told. As long as there is nothing new to show, that is all.
func TestDoubtAboutAProxyIsNoNews(t *testing.T) {
	n := newNode(t)
	mesh, key := n.transparent(numbered(1))
	cgroup := test.NewCgroup(t)
	for _, port := range []int{15001, 20001} {
		test.EchoProcess(t, test.Spec{NetNS: mesh, Cgroup: cgroup, UID: 101, GID: 101}, "tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	}
	n.fake.answers(registered(numbered(1)))
	a := n.newStepwise()
	a.asks(t.Context())
	first := time.Now()
	a.lookSome(first)
	m := a.allocations[key]
	if got := m.proxies.Tries(cgroup.ID); got != 1 {
		t.Fatalf("the process of no task was looked at %d times, want once", got)
	}
	select {
	case <-a.wake: // it was listed for the first time
	default:
	}
	a.lookSome(first.Add(time.Second))
	if got := m.proxies.Tries(cgroup.ID); got != 1 {
		t.Errorf("a second later it was looked at %d times, want once", got)
	}
	a.lookSome(first.Add(time.Minute))
	if got := m.proxies.Tries(cgroup.ID); got != 2 {
		t.Errorf("a minute later it was looked at %d times, want twice", got)
	}
	select {
	case <-a.wake:
		t.Error("a pass over all workloads is due, and nothing changed")
	default:
	}
}
