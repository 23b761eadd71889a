// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/consul"
)

// A new allocation's registration is asked for alone, and is in the view before the next
// bulk read, which is the truth of all of them as before.
func TestNewAllocationIsAskedForAlone(t *testing.T) {
	fake := newFakeConsul(t)
	before, arrival := numbered(1), numbered(2)
	fake.answers(func(w http.ResponseWriter, r *http.Request) {
		switch filter := r.URL.Query().Get("filter"); {
		case !strings.Contains(filter, "ID contains"):
			registered(before)(w, r) // and the new one is never in it
		case strings.Contains(filter, arrival):
			registered(arrival, numbered(3))(w, r) // one of which nobody asked for
		default:
			say(http.StatusInternalServerError, "what is asked for? "+filter)(w, r)
		}
	})
	// As with the agent, nobody is awaited any more before the next read is thought of.
	var watcher *catalog.Watcher
	watcher = catalog.NewWatcher(fake.consul(t, 5*time.Second), func() { watcher.Await(time.Time{}) })
	letRun(t, watcher)
	eventuallyKnown(t, watcher, "the first read", func(v catalog.Snapshot) bool { return v.InSync })
	watcher.Await(time.Now(), arrival, `") or (ID != "`)
	got := eventuallyKnown(t, watcher, "the new allocation", func(v catalog.Snapshot) bool { return len(v.Proxies[arrival]) == 1 })
	if len(got.Proxies[before]) != 1 || len(got.Proxies) != 2 {
		t.Errorf("the view has %+v, want the new one beside that of before", got.Proxies)
	}
	eventuallyKnown(t, watcher, "the bulk read", func(v catalog.Snapshot) bool { return len(v.Proxies) == 1 })
}

// What a bulk read shows is not put off for longer than half a second.
func TestChangesOfOthersAreSeenWhileOneIsAwaited(t *testing.T) {
	fake := newFakeConsul(t)
	fake.answers(registered(numbered(1)))
	watcher := fake.follow(t, unwatched)
	eventuallyKnown(t, watcher, "the first read", func(v catalog.Snapshot) bool { return v.InSync })
	watcher.Await(time.Now(), numbered(9))
	fake.answers(registered(numbered(1), numbered(2)))
	eventuallyKnown(t, watcher, "the other one", func(v catalog.Snapshot) bool { return len(v.Proxies[numbered(2)]) == 1 })
}

// A real Consul understands what is asked of it.
func TestRegistrationsOfOneAllocation(t *testing.T) {
	server := consul.Start(t, false)
	for i, id := range []string{numbered(1), numbered(2), numbered(3)} {
		server.Register(object{"Name": "web", "ID": "_nomad-task-" + id + "-group-g-web-80", "Port": 8080 + i,
			"Connect": object{"SidecarService": object{"Port": 20001 + i}}})
	}
	config := *configfile.DefaultConfig().Consul
	config.Address = server.Address
	client, err := catalog.NewClient(config, catalog.Timeouts{Read: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	got, err := client.ServicesOf(t.Context(), []string{numbered(1), numbered(3)})
	if err != nil {
		t.Fatal(err)
	}
	proxies, problems, err := registration.ParseServices(got.Body, registration.Loopback4())
	if err != nil || len(problems) > 0 {
		t.Fatalf("read %s: %v, %q", got.Body, err, problems)
	}
	ports := make(map[string]uint16)
	for _, p := range proxies {
		ports[p.AllocID] = p.Inbound
	}
	if diff := cmp.Diff(map[string]uint16{numbered(1): 20001, numbered(3): 20003}, ports); diff != "" {
		t.Errorf("inbound ports by allocation (-want +got):\n%s", diff)
	}
}

// A change of all workloads is made in small steps while a new allocation is about to be
// registered, and as soon as it is its turn comes before the rest of them.
func TestChangeOfAllMakesRoomForWhoIsAwaited(t *testing.T) {
	n := newNode(t)
	n.ports = append(n.ports, mapped(20002))
	h := n.haltAt(20002, 3)
	defer h.goOn()
	putOff := 0
	ids := n.full(12, func(a *Agent) {
		a.budget.Least, a.budget.Most, a.budget.Together = 0, time.Hour, 4
		a.notify = func(state string) {
			putOff = max(putOff, a.budget.Left())
			h.notify(state)
		}
	})
	arrival := numbered(len(ids) + 1)
	n.cached(arrival, test.NewNetNS(t).Path, "")
	test.Eventually(t, func() error {
		if !n.agent.expects.Load() {
			return errors.New("nobody is awaited")
		}
		return nil
	}, "the new allocation to be awaited")
	n.fake.answers(registeredAt(20002, ids...))
	n.agent.consul.Wake()
	h.wait(t)
	if putOff > 0 {
		t.Errorf("%d changes were put off while nothing had come", putOff)
	}
	all := append(slices.Clone(ids), arrival)
	n.fake.answers(registeredAt(20002, all...))
	n.agent.consul.Wake()
	eventuallyKnown(t, n.agent.consul, "the registration", func(v catalog.Snapshot) bool { return len(v.Proxies[arrival]) == 1 })
	h.goOn()
	n.allInSync(all, 20002)
	n.wasBeforeNearlyAll(arrival, ids)
}
