// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"path"
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

// fakeCatalog is no catalog. It answers blocking queries for the instances of a
// service, of which each has one.
type fakeCatalog struct {
	mu      sync.Mutex
	index   uint64            // 0: there is no such page
	names   map[string]uint64 // ... and the index at which the instance came
	changed chan struct{}
}

func (c *fakeCatalog) set(names ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.index++
	before := c.names
	c.names = make(map[string]uint64)
	for _, name := range names {
		c.names[name] = cmp.Or(before[name], c.index)
	}
	if c.changed != nil {
		close(c.changed)
	}
	c.changed = make(chan struct{})
}

func (c *fakeCatalog) serve(w http.ResponseWriter, r *http.Request) {
	seen, _ := strconv.ParseUint(r.URL.Query().Get("index"), 10, 64)
	for {
		c.mu.Lock()
		index, came, changed := c.index, c.names[path.Base(r.URL.Path)], c.changed
		c.mu.Unlock()
		switch {
		case index == 0:
			say(404, "no such page")(w, r)
			return
		case index > seen:
			w.Header().Set("X-Consul-Index", strconv.FormatUint(index, 10))
			if came == 0 {
				fmt.Fprint(w, "[]")
			} else {
				fmt.Fprintf(w, `[{"Service": {"CreateIndex": %d}}]`, came)
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
	t.Parallel()
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
	eventuallyKnown(t, watcher, "that of db", virtualIPOf("db", "240.0.0.1"))
	// The first answer to the blocking query may come long after the first bulk read, and
	// brings about a second.
	before := eventuallyKnown(t, watcher, "the second bulk read", func(v catalog.Snapshot) bool { return v.Counts.Reads == 2 })
	test.Eventually(t, func() error {
		if fake.times("/v1/health/service/api") < 2 {
			return errors.New("not yet")
		}
		return nil
	}, "changes of api to be waited for")

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

// A node that has nothing to ask of the catalog does not ask it.
func TestCatalogIsNotAskedWithoutUpstreams(t *testing.T) {
	fake := newFakeConsul(t)
	fake.catalog.set("web")
	fake.answers(registered(exampleAlloc))
	watcher := fake.follow(t)
	eventuallyKnown(t, watcher, "the proxy", inSync)
	watcher.Wake()
	eventuallyKnown(t, watcher, "another read", func(v catalog.Snapshot) bool { return v.Counts.Reads > 1 })
	fake.mu.Lock()
	defer fake.mu.Unlock()
	for path := range fake.asked {
		if path != "/v1/agent/services" && path != "/v1/agent/self" && path != "/v1/catalog/node-services/node" {
			t.Errorf("asked for %s, want what the node itself is alone", path)
		}
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
		l.Virtual[registration.Service{Name: fmt.Sprint(i)}] = &catalog.Query[[]netip.Addr]{Seen: catalog.Seen{Presence: catalog.Absent}, Next: later}
	}
	l.Virtual[registration.Service{Name: "api"}] = &catalog.Query[[]netip.Addr]{Seen: catalog.Seen{Presence: catalog.Present}, Next: later}
	l.Virtual[registration.Service{Name: "never asked"}] = &catalog.Query[[]netip.Addr]{Seen: catalog.Seen{Presence: catalog.Absent}}
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
