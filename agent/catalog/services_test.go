// SPDX-License-Identifier: MPL-2.0

package catalog

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/test"
	realconsul "github.com/weirmesh/weir/test/consul"
)

type object = map[string]any

// watching watches the services of the Consul at the address until the test ends.
func watching(t *testing.T, address, token string, services ...string) *serviceWatches {
	t.Helper()
	config := *configfile.DefaultConfig().Consul
	config.Address, config.Token = address, token
	client, err := NewClient(config, DefaultTimeouts())
	if err != nil {
		t.Fatal(err)
	}
	n := newServiceWatches(client)
	var wanted []registration.Service
	for _, name := range services {
		wanted = append(wanted, registration.Service{Name: name})
	}
	n.Want(wanted)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { n.Follow(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	return n
}

// eventuallySeen waits until it is seen of the service.
func (n *serviceWatches) eventuallySeen(t *testing.T, name string, want Seen) {
	t.Helper()
	test.Eventually(t, func() error {
		if got := n.Of(registration.Service{Name: name}); got != want {
			return fmt.Errorf("%+v, %q", got, n.unknown().What)
		}
		return nil
	}, fmt.Sprintf("%s to be seen as %+v", name, want))
}

// counted stands before a Consul and counts the questions about a service.
func counted(t *testing.T, address string) (front string, asked func() int) {
	t.Helper()
	var count atomic.Int64
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: address})
	proxy.ErrorHandler = func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) } // who asked has gone
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		count.Add(1)
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	return server.URL, func() int { return int(count.Load()) }
}

// on is a registration on another node.
func on(node, service string) object {
	return object{"Node": node, "Address": "10.9.9.9", "Service": object{"ID": service, "Service": service, "Port": 80}}
}

// A service of the node's own is followed as it goes and comes back; whatever
// other services do, nobody is asked for it.
func TestServiceIsWatchedAlone(t *testing.T) {
	t.Parallel()
	consul := realconsul.Start(t, false)
	consul.Put("/v1/catalog/register", on("far", "api"))
	front, asked := counted(t, consul.Address)
	n := watching(t, front, "", "api", "db")
	n.eventuallySeen(t, "api", Seen{Presence: Present})
	n.eventuallySeen(t, "db", Seen{Presence: Absent})

	for i := range 200 {
		consul.Put("/v1/catalog/register", on("far", fmt.Sprintf("other-%d", i)))
	}
	consul.Put("/v1/catalog/deregister", object{"Node": "far", "ServiceID": "api"})
	n.eventuallySeen(t, "api", Seen{Presence: Absent})
	// Each was asked plainly, and then to wait for; what a stream says of its own index
	// may cost one more. One went, which is asked for plainly.
	if most := 2*3 + 2; asked() > most {
		t.Errorf("%d questions while 200 other services came, want at most %d", asked(), most)
	}
	consul.Put("/v1/catalog/register", on("far", "api"))
	n.eventuallySeen(t, "api", Seen{Presence: Present})

	// In one step of Consul's all instances are others.
	consul.Put("/v1/txn", []object{
		{"Service": object{"Verb": "delete", "Node": "far", "Service": object{"ID": "api", "Service": "api"}}},
		{"Service": object{"Verb": "set", "Node": "far", "Service": object{"ID": "api-2", "Service": "api"}}},
	})
	n.eventuallySeen(t, "api", Seen{Presence: Present, Replaced: 1})
}

// With the documented policy the token sees no instance on another node: what is
// hidden is there, and is followed by Consul's index alone.
func TestServiceIsWatchedUnseen(t *testing.T) {
	t.Parallel()
	consul := realconsul.Start(t, true)
	consul.Put("/v1/acl/policy", object{"Name": "weir", "Rules": realconsul.DocumentedPolicy(t)})
	var token struct{ SecretID string }
	consul.Post("/v1/acl/token", object{"Policies": []object{{"Name": "weir"}}}, &token)
	consul.Put("/v1/catalog/register", on("far", "api"))
	n := watching(t, consul.Address, token.SecretID, "api")
	n.eventuallySeen(t, "api", Seen{Presence: Present})
	test.Eventually(t, func() error {
		n.mu.Lock()
		defer n.mu.Unlock()
		if s := n.services[registration.Service{Name: "api"}]; !s.unseen || s.index == 0 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	}, "it to be waited for by the index alone")
	consul.Put("/v1/catalog/deregister", object{"Node": "far", "ServiceID": "api"})
	n.eventuallySeen(t, "api", Seen{Presence: Absent, Replaced: 1})
	consul.Put("/v1/catalog/register", on("far", "api"))
	n.eventuallySeen(t, "api", Seen{Presence: Present, Replaced: 1})
}

// What happened while Consul did not answer is not missed: by its index it tells
// whether an instance is left of those before.
func TestServicesAreSeenAfterAGap(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	index, oldest, changed := 5, 3, make(chan struct{}) // index 0: there is no leader
	set := func(newIndex, newOldest int) {
		mu.Lock()
		defer mu.Unlock()
		index, oldest = newIndex, newOldest
		close(changed)
		changed = make(chan struct{})
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked, _ := strconv.Atoi(r.URL.Query().Get("index"))
		for {
			mu.Lock()
			now, came, next := index, oldest, changed
			mu.Unlock()
			switch {
			case now == 0:
				http.Error(w, "no cluster leader", http.StatusInternalServerError)
				return
			case now != asked:
				w.Header().Set("X-Consul-Index", strconv.Itoa(now))
				fmt.Fprintf(w, `[{"Service":{"CreateIndex":%d}},{"Service":{"CreateIndex":%d}}]`, now, came)
				return
			}
			select {
			case <-next:
			case <-r.Context().Done():
				return
			}
		}
	}))
	defer server.Close()
	n := watching(t, server.URL, "", "api", "db")
	n.eventuallySeen(t, "api", Seen{Presence: Present})
	for _, step := range []struct {
		index, oldest int
		want          Seen
	}{
		{9, 3, Seen{Presence: Present}},
		{12, 10, Seen{Presence: Present, Replaced: 1}},
		{4, 4, Seen{Presence: Present, Replaced: 1, Missed: 1}}, // Consul began anew
	} {
		set(0, 0)
		n.eventuallySeen(t, "api", Seen{Replaced: n.Of(registration.Service{Name: "api"}).Replaced})
		if why := n.unknown().What; !strings.Contains(why, "no cluster leader") {
			t.Errorf("why = %q, want Consul's own word", why)
		}
		set(step.index, step.oldest)
		n.eventuallySeen(t, "api", step.want)
		n.eventuallySeen(t, "db", step.want)
		if why := n.unknown(); why != (health.Problem{}) {
			t.Errorf("index %d: why = %q, want nothing", step.index, why.What)
		}
	}
}

// More services than are watched at a time take turns, also those that come when
// all watches wait already, and what happens between is not missed.
func TestWatchesTakeTurns(t *testing.T) {
	var mu sync.Mutex
	waiting, most := 0, 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Consul-Index", "7")
		if r.URL.Query().Get("index") != "" {
			mu.Lock()
			waiting++
			most = max(most, waiting)
			mu.Unlock()
			turn, err := time.ParseDuration(r.URL.Query().Get("wait"))
			if err != nil {
				t.Error(err)
			}
			timer := time.NewTimer(turn)
			defer timer.Stop()
			select {
			case <-r.Context().Done():
			case <-timer.C:
			}
			mu.Lock()
			waiting--
			mu.Unlock()
		}
		fmt.Fprint(w, "[]")
	}))
	defer server.Close()
	var names []string
	var all []registration.Service
	for i := range 2*Watches + 1 {
		names = append(names, fmt.Sprintf("service-%d", i))
		all = append(all, registration.Service{Name: names[i]})
	}
	n := watching(t, server.URL, "", names[:Watches]...)
	test.Eventually(t, func() error {
		mu.Lock()
		defer mu.Unlock()
		if waiting < Watches {
			return fmt.Errorf("%d wait", waiting)
		}
		return nil
	}, "every watch to wait")
	n.Want(all)
	for _, name := range names {
		n.eventuallySeen(t, name, Seen{Presence: Absent})
	}
	n.Want(append(all[:1:1], registration.Service{Name: "api", Peer: "other"}))
	if got := n.Of(all[1]); got != (Seen{}) {
		t.Errorf("one that nobody wants any more is seen: %+v", got)
	}
	if got := len(n.services); got != 1 {
		t.Errorf("%d are watched, want the one of this cluster", got)
	}
	mu.Lock()
	defer mu.Unlock()
	if most > Watches+1 { // the server learns later than the client that one has ended
		t.Errorf("%d watches at a time, want at most %d", most, Watches)
	}
}

// An answer that is longer than is read, and one that hides instances, are no
// reason to believe that there are none.
func TestWatchServiceKnowsWhatItDoesNotSee(t *testing.T) {
	long := `[{"Service":{"CreateIndex":3,"Meta":{"a":"` + strings.Repeat("x", answerLimit) + `"}}}]`
	for name, answer := range map[string]struct {
		header, value, body, token string
		want                       instances
	}{
		"one":         {body: `[{"Service":{"CreateIndex":3}}]`, want: instances{index: 7, count: 1, oldest: 3}},
		"none":        {body: "[]", token: "a", want: instances{index: 7}},
		"hidden":      {header: "X-Consul-Results-Filtered-By-ACLs", value: "true", body: "[]", token: "a", want: instances{index: 7, unseen: true}},
		"from nobody": {header: "X-Consul-Default-Acl-Policy", value: "deny", body: "[]", want: instances{index: 7, unseen: true}},
		"too long":    {body: long, want: instances{index: 7, unseen: true}},
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Consul-Index", "7")
			if answer.header != "" {
				w.Header().Set(answer.header, answer.value)
			}
			fmt.Fprint(w, answer.body)
		}))
		config := *configfile.DefaultConfig().Consul
		config.Address, config.Token = server.URL, answer.token
		client, err := NewClient(config, DefaultTimeouts())
		if err != nil {
			t.Fatal(err)
		}
		got, err := client.watchService(t.Context(), question{of: registration.Service{Name: "api"}})
		if err != nil || got != answer.want {
			t.Errorf("%s: %+v, %v, want %+v", name, got, err, answer.want)
		}
		server.Close()
	}
}

// What was answered before is asked again at once where a service came, went or
// was replaced, soon where that may have been missed, and else by the clock.
func TestSignsBringQuestionsForward(t *testing.T) {
	present, absent := Seen{Presence: Present}, Seen{Presence: Absent}
	for name, step := range map[string]struct {
		before, now Seen
		answered    bool
		within      time.Duration
	}{
		"nothing":              {present, present, true, LookupInterval},
		"it went":              {present, absent, true, 0},
		"it came":              {absent, present, true, 0},
		"it was replaced":      {present, Seen{Presence: Present, Replaced: 1}, true, 0},
		"missed":               {present, Seen{Presence: Present, Missed: 1}, true, LookupInterval / 10},
		"unknown":              {present, Seen{}, true, LookupInterval},
		"known, answered":      {Seen{}, present, true, LookupInterval},
		"known, not answered":  {Seen{}, present, false, 0},
		"known to have none":   {Seen{}, absent, true, 0},
		"missed, then unknown": {present, Seen{Missed: 1}, true, LookupInterval / 10},
	} {
		client, err := NewClient(*configfile.DefaultConfig().Consul, DefaultTimeouts())
		if err != nil {
			t.Fatal(err)
		}
		l := NewQueries(client)
		now := time.Unix(1000, 0)
		l.Now = func() time.Time { return now }
		of := registration.Service{Name: "api"}
		q := &Query[[]netip.Addr]{Seen: step.before, Next: now.Add(LookupInterval)}
		if step.answered {
			q.answer = []netip.Addr{netip.MustParseAddr("240.0.0.1")}
		}
		l.Virtual[of] = q
		l.Services.services[of] = &watchedService{Seen: step.now}
		l.OnCatalogChange()
		switch soon := step.within; {
		case soon == 0 && !q.Next.IsZero(), soon > 0 && (q.Next.After(now.Add(soon)) || q.Next.IsZero()),
			soon == LookupInterval && !q.Next.Equal(now.Add(soon)):
			t.Errorf("%s: asked again at %s, want within %s", name, q.Next, soon)
		}
	}
}
