// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/test"
)

// fakeCatalog is no catalog. It answers a blocking query for the names of
// services, and fails it when told to.
type fakeCatalog struct {
	mu      sync.Mutex
	index   uint64 // 0: there is no such page
	names   []string
	failing bool
	changed chan struct{}
}

func (c *fakeCatalog) set(names ...string) {
	c.change(func() { c.names, c.failing = names, false })
}

func (c *fakeCatalog) fail() { c.change(func() { c.failing = true }) }

func (c *fakeCatalog) change(edit func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	edit()
	c.index++
	if c.changed != nil {
		close(c.changed)
	}
	c.changed = make(chan struct{})
}

func (c *fakeCatalog) serve(w http.ResponseWriter, r *http.Request) {
	for {
		c.mu.Lock()
		index, names, failing, changed := c.index, c.names, c.failing, c.changed
		c.mu.Unlock()
		seen, _ := strconv.ParseUint(r.URL.Query().Get("index"), 10, 64)
		switch {
		case index == 0:
			say(404, "no such page")(w, r)
			return
		case failing:
			say(500, "no cluster leader")(w, r)
			return
		case index > seen:
			w.Header().Set("X-Consul-Index", strconv.FormatUint(index, 10))
			answer := make(map[string][]string)
			for _, name := range names {
				answer[name] = []string{"a-tag", "another"}
			}
			if err := json.NewEncoder(w).Encode(answer); err != nil {
				panic(http.ErrAbortHandler)
			}
			return
		}
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}

func chainOf(addrs ...string) http.HandlerFunc {
	return say(200, fmt.Sprintf(`{"Chain":{"AutoVirtualIPs":[%s]}}`, strings.Join(addrs, ",")))
}

func (f *fakeConsul) chains(chain http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.chain = chain
}

func virtualIPOf(name, addr string) func(catalog.Snapshot) bool {
	return func(v catalog.Snapshot) bool {
		return slices.Equal(v.Facts.VirtualIPs[registration.Service{Name: name}], addrs(addr))
	}
}

// The virtual IP of a service that leaves the catalog may be another's at once,
// and one that comes back may have another: it is asked for then, and only its
// own. No bulk read is made for it, and as few connections as ever.
func TestVirtualIPsFollowTheCatalog(t *testing.T) {
	fake := newFakeConsul(t)
	fake.catalog.set("api", "db", "web")
	fake.chains(chainOf(`"240.0.0.1"`))
	fake.answers(say(200, strings.Replace(oneProxy, `{"DestinationName": "api", "LocalBindPort": 9191}`,
		`{"DestinationName": "api", "LocalBindPort": 9191}, {"DestinationName": "db", "LocalBindPort": 9292}`, 1)))
	config := *configfile.DefaultConfig().Consul
	config.Address = fake.URL
	// On a busy machine an answer takes longer than the tests' patience, and what was not
	// answered is followed by a bulk read.
	watcher := runWatcher(t, config, func(f *catalog.Watcher) { f.Client.Read = 30 * time.Second })
	eventuallyKnown(t, watcher, "the virtual IP of api", virtualIPOf("api", "240.0.0.1"))
	before := eventuallyKnown(t, watcher, "that of db", virtualIPOf("db", "240.0.0.1"))
	test.Eventually(t, func() error {
		if fake.times("/v1/catalog/services") < 2 {
			return errors.New("not yet")
		}
		return nil
	}, "the names to be waited for")

	fake.chains(chainOf())
	fake.catalog.set("db", "web")
	eventuallyKnown(t, watcher, "api to have none", func(v catalog.Snapshot) bool {
		list, answered := v.Facts.VirtualIPs[registration.Service{Name: "api"}]
		return answered && len(list) == 0
	})
	fake.chains(chainOf(`"240.0.0.2"`))
	fake.catalog.set("api", "db", "web")
	after := eventuallyKnown(t, watcher, "api to have another", virtualIPOf("api", "240.0.0.2"))
	if !virtualIPOf("db", "240.0.0.1")(after) || fake.times("/v1/discovery-chain/db") != 1 {
		t.Errorf("db, which stayed, was asked for %d times, want once: %v", fake.times("/v1/discovery-chain/db"), after.Facts.VirtualIPs)
	}
	if after.Counts.Reads != before.Counts.Reads {
		t.Errorf("%d bulk reads for it, want none", after.Counts.Reads-before.Counts.Reads)
	}
	fake.mu.Lock()
	defer fake.mu.Unlock()
	if fake.most > catalog.Connections {
		t.Errorf("%d connections at a time, want at most %d", fake.most, catalog.Connections)
	}
}

// What happened while the names could not be read is not missed.
func TestVirtualIPsAreAskedAnewAfterAGap(t *testing.T) {
	fake := newFakeConsul(t)
	l := fake.lookups(t)
	l.Virtual[registration.Service{Name: "api"}] = &catalog.Query[[]netip.Addr]{Presence: catalog.Present, Next: l.Now().Add(catalog.LookupInterval)}
	l.Names.Set(map[string]catalog.Ignored{"api": {}}, true)
	l.OnCatalogChange()
	if next := l.Virtual[registration.Service{Name: "api"}].Next; next.After(l.Now().Add(catalog.LookupInterval / 5)) {
		t.Errorf("asked again in %s, want soon", next.Sub(l.Now()))
	}
}

// Names that could not be read for a while are no names, and may have come and
// gone meanwhile.
func TestNamesTellOfAGap(t *testing.T) {
	fake := newFakeConsul(t)
	fake.catalog.set("api")
	n := catalog.NewServiceList(fake.client(t))
	n.Need()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { n.Follow(ctx) })
	defer running.Wait()
	defer cancel()
	want := func(presence catalog.Presence, missed int) {
		t.Helper()
		test.Eventually(t, func() error {
			got := n.Of(registration.Service{Name: "api"})
			n.Mu.Lock()
			defer n.Mu.Unlock()
			if got != presence || n.Missed != missed {
				return fmt.Errorf("presence %d, %d gaps", got, n.Missed)
			}
			return nil
		}, fmt.Sprintf("presence %d and %d gaps", presence, missed))
	}
	want(catalog.Present, 0)
	fake.catalog.set("db")
	want(catalog.Absent, 0)
	fake.catalog.fail()
	want(catalog.PresenceUnknown, 0)
	fake.catalog.set("api")
	want(catalog.Present, 1)
}

// A node that has nothing to ask of the catalog does not ask it.
func TestNamesAreNotAskedForWithoutUpstreams(t *testing.T) {
	fake := newFakeConsul(t)
	fake.catalog.set("web")
	fake.answers(registered(exampleAlloc))
	watcher := fake.follow(t)
	eventuallyKnown(t, watcher, "the proxy", inSync)
	watcher.Wake()
	eventuallyKnown(t, watcher, "another read", func(v catalog.Snapshot) bool { return v.Counts.Reads > 1 })
	if times := fake.times("/v1/catalog/services"); times > 0 {
		t.Errorf("asked %d times, want never", times)
	}
}

func TestWatcherNames(t *testing.T) {
	fake := newFakeConsul(t)
	consul := fake.client(t)
	consul.Config.Namespace = "default"
	n := catalog.NewServiceList(consul)
	if got := n.Of(registration.Service{Name: "api"}); got != catalog.PresenceUnknown {
		t.Errorf("before an answer: %v", got)
	}
	n.Set(map[string]catalog.Ignored{"api": {}}, false)
	for of, want := range map[registration.Service]catalog.Presence{
		{Name: "api"}: catalog.Present, {Name: "api", Namespace: "default", Partition: "default"}: catalog.Present,
		{Name: "db"}: catalog.Absent, {Name: "api", Namespace: "other"}: catalog.PresenceUnknown, {Name: "db", Partition: "other"}: catalog.PresenceUnknown,
	} {
		if got := n.Of(of); got != want {
			t.Errorf("presence of %+v = %v, want %v", of, got, want)
		}
	}
	if rest := n.Rest(20000, 0); rest < 10*time.Second || rest > 30*time.Second {
		t.Errorf("rest with 20,000 services = %s, want about 20 s", rest)
	}
	if rest := n.Rest(10, 0); rest < 500*time.Millisecond || rest > 1500*time.Millisecond {
		t.Errorf("rest with 10 services = %s, want about a second", rest)
	}
}

// What no list tells of is asked for by the clock, and the more of it there is
// the more seldom.
func TestHasten(t *testing.T) {
	fake := newFakeConsul(t)
	l := fake.lookups(t)
	now := time.Unix(1000, 0)
	l.Now = func() time.Time { return now }
	later := now.Add(catalog.LookupInterval)
	for i := range 60 {
		l.Virtual[registration.Service{Name: fmt.Sprint(i)}] = &catalog.Query[[]netip.Addr]{Presence: catalog.Absent, Next: later}
	}
	l.Virtual[registration.Service{Name: "api"}] = &catalog.Query[[]netip.Addr]{Presence: catalog.Present, Next: later}
	l.Virtual[registration.Service{Name: "never asked"}] = &catalog.Query[[]netip.Addr]{Presence: catalog.Absent}
	l.Gateways[registration.Gateway{Service: registration.Service{Name: "in"}}] = &catalog.Query[[]uint16]{Next: later}
	l.ShortenDeadlines()
	for name, want := range map[string]time.Time{"0": now.Add(61 * time.Second), "api": later, "never asked": {}} {
		if got := l.Virtual[registration.Service{Name: name}].Next; !got.Equal(want) {
			t.Errorf("%s is asked for at %s, want %s", name, got, want)
		}
	}
	if got := l.Gateways[registration.Gateway{Service: registration.Service{Name: "in"}}].Next; !got.Equal(now.Add(5 * time.Second)) {
		t.Errorf("the gateway is asked for at %s, want in 5 s", got)
	}
}

func (f *fakeConsul) client(t *testing.T) *catalog.Client {
	t.Helper()
	config := *configfile.DefaultConfig().Consul
	config.Address = f.URL
	consul, err := catalog.NewClient(config, catalog.DefaultTimeouts())
	if err != nil {
		t.Fatal(err)
	}
	return consul
}

func (f *fakeConsul) lookups(t *testing.T) *catalog.Queries { return catalog.NewQueries(f.client(t)) }
