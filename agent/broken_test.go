// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/bounded"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/health"

	gocmp "github.com/google/go-cmp/cmp"
)

// breakage is an answer that is none, and what the agent says of it.
type breakage struct {
	name   string
	answer http.HandlerFunc
	want   string
}

// breakages are all that Consul, or what stands before it, may answer instead of
// the truth. good is the beginning of a right answer.
func breakages(good, halfway string) []breakage {
	return []breakage{
		{"garbage", say(200, "<html>proxy login</html>"), "invalid character"},
		{"half an answer", say(200, good[:len(good)-1]), halfway},
		{"nothing", say(200, "null"), "empty"},
		{"another form", say(200, "[1,2]"), "cannot unmarshal"},
		{"429", say(429, "Your IP is issuing too many concurrent connections"), "429"},
		{"500", say(500, strings.Repeat("no cluster leader ", 1000)), "500"},
		{"403", say(403, "ACL not found"), "403"},
		{"hang", untilGone, "context deadline exceeded"},
		{"trickle", trickle, "context deadline exceeded"},
		{"flood", flood, ""}, // the end of time or of patience, whichever comes first
		{"closed connection", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "EOF"},
	}
}

// Whatever Consul does, it is bounded and told, the last good state stays, and
// when it is well again that is noticed.
func TestWatcherOutlivesABrokenConsul(t *testing.T) {
	for _, c := range breakages(oneProxy, "unexpected end of JSON input") {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			fake := newFakeConsul(t)
			fake.answers(say(200, oneProxy))
			watcher := fake.follow(t)
			good := eventuallyKnown(t, watcher, "the first answer", inSync)

			fake.answers(c.answer)
			watcher.Wake()
			bad := eventuallyKnown(t, watcher, "the failure to be told", func(v catalog.Snapshot) bool { return !v.InSync })
			if !strings.Contains(bad.Error.What, c.want) || len(bad.Error.What) > 400 {
				t.Errorf("error = %q, want a short one that has %q", bad.Error, c.want)
			}
			if diff := gocmp.Diff(good.Proxies, bad.Proxies, sameAddrs()); diff != "" {
				t.Errorf("the last known state changed (-before +after):\n%s", diff)
			}
			if !bad.Since.After(good.Since) {
				t.Error("the view does not say since when it is out of sync")
			}

			fake.answers(say(200, oneProxy))
			eventuallyKnown(t, watcher, "Consul to be followed again", inSync)
			fake.mu.Lock()
			defer fake.mu.Unlock()
			// The server learns later than the client that one has ended.
			if fake.most > catalog.Connections+1 {
				t.Errorf("%d connections at a time, want at most %d", fake.most, catalog.Connections)
			}
		})
	}
}

// A trigger that is dead is told, and Consul read at the pace without one: else
// a change would take more than a minute without anybody knowing.
func TestWatcherTellsThatNothingTriggersIt(t *testing.T) {
	list := breakages("{ }", "unexpected EOF")
	for i := range list { // its body is nobody's concern but that it ends
		if name := list[i].name; name == "nothing" || name == "another form" {
			list[i].want = "no index"
		}
	}
	for _, question := range []struct {
		name   string
		broken []breakage
		field  func(*fakeConsul) *http.HandlerFunc
	}{
		{"changes", list, func(f *fakeConsul) *http.HandlerFunc { return &f.changes }},
		{"self", []breakage{
			{"403", say(403, "Permission denied"), "403"}, {"500", say(500, "No known Consul servers"), "500"},
			{"nameless", say(200, "{}"), "the answer has none"}, {"hang", untilGone, "deadline exceeded"},
		}, func(f *fakeConsul) *http.HandlerFunc { return &f.self }},
	} {
		for _, c := range question.broken {
			t.Run(question.name+", "+c.name, func(t *testing.T) {
				t.Parallel()
				fake := newFakeConsul(t)
				fake.set(&fake.instances, oneInstance)
				fake.answers(say(200, oneProxy))
				field := question.field(fake)
				works := *field
				fake.set(field, c.answer)
				watcher := fake.follow(t)
				bad := eventuallyKnown(t, watcher, "the dead trigger to be told", func(v catalog.Snapshot) bool { return inSync(v) && v.Watch.What != "" })
				if !strings.Contains(bad.Watch.What, c.want) || len(bad.Watch.What) > 400 || bad.Watch.Remedy == "" {
					t.Errorf("why = %q, want a short one that has %q", bad.Watch, c.want)
				}
				if watcher.PollInterval(0).Watch {
					t.Error("Consul is read as seldom as with a trigger")
				}
				told := fmt.Sprint(bad.ProblemsOf("127.0.0.1:8500"))
				if !strings.Contains(told, bad.Watch.What) || !strings.Contains(told, "watch = false") {
					t.Errorf("problems = %s, want it told with what to do", told)
				}

				fake.set(field, works)
				again := eventuallyKnown(t, watcher, "the trigger to be back", func(v catalog.Snapshot) bool { return v.Watch.What == "" && v.Bind.What == "" && inSync(v) })
				if list := again.ProblemsOf(""); !watcher.PollInterval(0).Watch || len(list) > 0 {
					t.Errorf("with the trigger back, tempo is %+v, problems %q", watcher.PollInterval(0), list)
				}
			})
		}
	}
}

// What the trigger did not tell before it died is read at once.
func TestWatcherReadsWhenItsTriggerDies(t *testing.T) {
	fake := newFakeConsul(t)
	dies := make(chan struct{})
	fake.set(&fake.changes, func(w http.ResponseWriter, r *http.Request) {
		if index := r.URL.Query().Get("index"); index == "" || index == "0" {
			nothingChanges(w, r)
			return
		}
		<-dies
		say(500, "no cluster leader")(w, r)
	})
	fake.answers(say(200, oneProxy))
	watcher := fake.follow(t)
	good := eventuallyKnown(t, watcher, "the trigger", func(v catalog.Snapshot) bool { return inSync(v) && v.Counts.Reads > 1 })
	if good.Watch.What != "" || !watcher.PollInterval(0).Watch {
		t.Errorf("the trigger passes for dead: %q", good.Watch)
	}
	fake.set(&fake.changes, say(500, "no cluster leader"))
	close(dies)
	eventuallyKnown(t, watcher, "the dead trigger to be told and its part done", func(v catalog.Snapshot) bool {
		return v.Watch.What != "" && v.Counts.Reads > good.Counts.Reads
	})
}

// Of the virtual IPs' own trigger the same is told.
func TestWatcherTellsThatServicesComeAndGoUnseen(t *testing.T) {
	fake := newFakeConsul(t)
	fake.set(&fake.instances, oneInstance)
	fake.set(&fake.chain, say(200, `{"Chain": {"AutoVirtualIPs": ["240.0.0.1"]}}`))
	fake.answers(say(200, oneProxy))
	watcher := fake.follow(t)
	good := eventuallyKnown(t, watcher, "the virtual IP", func(v catalog.Snapshot) bool { return inSync(v) && len(v.Facts.VirtualIPs) == 1 })
	if list := good.ProblemsOf(""); len(list) > 0 {
		t.Errorf("problems = %q, want none", list)
	}
	broken := newFakeConsul(t)
	broken.set(&broken.instances, say(500, "No known Consul servers"))
	broken.answers(say(200, oneProxy))
	watcher = broken.follow(t)
	bad := eventuallyKnown(t, watcher, "the failure to be told", func(v catalog.Snapshot) bool { return inSync(v) && v.Facts.NoNames.What != "" })
	if told := fmt.Sprint(bad.ProblemsOf("")); !strings.Contains(told, "virtual IP") || !strings.Contains(told, "No known Consul servers") {
		t.Errorf("problems = %s, want what it means and why", told)
	}
	broken.set(&broken.instances, oneInstance)
	eventuallyKnown(t, watcher, "the instances to be known", func(v catalog.Snapshot) bool { return inSync(v) && len(v.ProblemsOf("")) == 0 })
}

// Where no trigger is wanted, a token that may not read the agent still costs
// something: which of its addresses the listeners have.
func TestWatcherTellsWhatItAssumes(t *testing.T) {
	fake := newFakeConsul(t)
	fake.set(&fake.self, say(403, "Permission denied"))
	watcher := fake.follow(t, unwatched)
	got := eventuallyKnown(t, watcher, "an answer", func(v catalog.Snapshot) bool { return v.InSync })
	if told := fmt.Sprint(got.ProblemsOf("")); !strings.Contains(told, "IPv4 is assumed") || !strings.Contains(told, `agent "NODE"`) || got.Watch.What != "" {
		t.Errorf("problems = %s, want that IPv4 is assumed and the rule that is missing", told)
	}
	fake.set(&fake.self, say(200, `{"Config":{"NodeName":"node"}}`))
	watcher.Wake()
	eventuallyKnown(t, watcher, "the answer", func(v catalog.Snapshot) bool { return v.Bind.What == "" })
}

// registeredAs is that of a proxy of the allocation with a number.
func registeredAs(i int, name, more string) string {
	return fmt.Sprintf(`"_nomad-task-%s-group-g-%s-80-sidecar-proxy": {"Service": %q, %s}`, numbered(i), name, name, more)
}

// Each question beside the bulk read is told when it has no answer, to those
// whom it concerns; what others have been answered stays, and so does the view.
func TestWatcherTellsEachQuestionWithoutAnAnswer(t *testing.T) {
	sidecar := func(i int, name, proxy string) string {
		return registeredAs(i, name, fmt.Sprintf(`"Kind": "connect-proxy", "Port": %d, "Proxy": {%s}`, 20000+i, proxy))
	}
	upstream := func(i int, name, to string) string {
		return sidecar(i, name, fmt.Sprintf(`"Upstreams": [{"DestinationName": %q, "LocalBindPort": 9191}]`, to))
	}
	ingress := func(i int, name string) string {
		return registeredAs(i, name, `"Kind": "ingress-gateway", "Port": 8443`)
	}
	checks := func(i int, name string) string {
		return sidecar(i, name, fmt.Sprintf(`"DestinationServiceID": %q, "Expose": {"Checks": true}`, name))
	}
	transparent := func(name string) string {
		return sidecar(1, name, fmt.Sprintf(`"DestinationServiceName": %q, "Mode": "transparent"`, name))
	}
	node := func(registrations ...string) string { return "{" + strings.Join(registrations, ", ") + "}" }
	for _, question := range []struct {
		name          string
		field         func(*fakeConsul) *http.HandlerFunc
		good, before  string // answers: the right one, and that before the second was there where it differs
		first, second string // registrations; the second asks what the first does not
		nothing       bool   // "null" is an answer
		kept          func(catalog.Data) bool
		why           func(catalog.Data) health.Problem
		answered      func(catalog.Data) bool
	}{
		{
			name: "virtual IPs", field: func(f *fakeConsul) *http.HandlerFunc { return &f.chain },
			good: `{"Chain": {"AutoVirtualIPs": ["240.0.0.1"]}}`, first: node(upstream(1, "web", "api")), second: node(upstream(1, "web", "api"), upstream(2, "app", "db")),
			kept:     func(f catalog.Data) bool { return len(f.VirtualIPs[registration.Service{Name: "api"}]) == 1 },
			why:      func(f catalog.Data) health.Problem { return f.Unanswered[registration.Service{Name: "db"}] },
			answered: func(f catalog.Data) bool { return len(f.VirtualIPs[registration.Service{Name: "db"}]) == 1 },
		},
		{
			name: "listeners of a gateway", field: func(f *fakeConsul) *http.HandlerFunc { return &f.entry },
			good: `{"Kind": "ingress-gateway", "Listeners": [{"Port": 9090}]}`, first: node(ingress(1, "front")), second: node(ingress(1, "front"), ingress(2, "side")),
			kept: func(f catalog.Data) bool {
				return len(f.GatewayPorts[registration.Gateway{Service: registration.Service{Name: "front"}, Kind: registration.KindIngress}]) == 1
			},
			why: func(f catalog.Data) health.Problem { return f.Unanswered[registration.Service{Name: "side"}] },
			answered: func(f catalog.Data) bool {
				return len(f.GatewayPorts[registration.Gateway{Service: registration.Service{Name: "side"}, Kind: registration.KindIngress}]) == 1
			},
		},
		{
			name: "exposed checks", field: func(f *fakeConsul) *http.HandlerFunc { return &f.checks },
			good:   `{"a": {"ServiceID": "web", "ExposedPort": 21500}, "b": {"ServiceID": "app", "ExposedPort": 21501}}`,
			before: `{"a": {"ServiceID": "web", "ExposedPort": 21500}}`,
			first:  node(checks(1, "web")), second: node(checks(1, "web"), checks(2, "app")),
			kept:     func(f catalog.Data) bool { return len(f.CheckPorts["web"]) == 1 },
			why:      func(f catalog.Data) health.Problem { return f.NoChecks },
			answered: func(f catalog.Data) bool { return len(f.CheckPorts["app"]) == 1 },
		},
		{
			name: "intentions", field: func(f *fakeConsul) *http.HandlerFunc { return &f.intentions }, nothing: true,
			good:  `[{"SourceName": "web", "DestinationName": "api", "Action": "allow"}]`,
			first: node(transparent("web")), second: node(transparent("web"), transparent("app")),
			kept:     func(catalog.Data) bool { return true },
			why:      func(f catalog.Data) health.Problem { return f.NoIntentions },
			answered: func(f catalog.Data) bool { return len(f.Intentions) == 1 },
		},
	} {
		asked := func(v catalog.Snapshot) bool {
			return v.InSync && len(v.Proxies[numbered(2)])+len(v.Proxies[numbered(1)]) == 2
		}
		for _, c := range append(breakages(question.good, "unexpected EOF"), breakage{"slow", slow(question.good), ""}) {
			if c.name == "another form" && question.nothing {
				c.answer = say(200, "{}")
			} else if c.name == "nothing" && question.nothing {
				continue
			}
			t.Run(question.name+", "+c.name, func(t *testing.T) {
				t.Parallel()
				fake := newFakeConsul(t)
				field := question.field(fake)
				fake.set(field, say(200, cmp.Or(question.before, question.good)))
				fake.answers(say(200, question.first))
				watcher := fake.followInHaste(t)
				eventuallyKnown(t, watcher, "the first answer", func(v catalog.Snapshot) bool { return v.InSync && question.kept(v.Facts) })

				fake.set(field, c.answer)
				fake.answers(say(200, question.second))
				watcher.Wake()
				if c.name == "slow" {
					eventuallyKnown(t, watcher, "a slow answer", func(v catalog.Snapshot) bool {
						return asked(v) && question.answered(v.Facts) && question.why(v.Facts).What == ""
					})
					return
				}
				bad := eventuallyKnown(t, watcher, "the failure to be told", func(v catalog.Snapshot) bool { return asked(v) && question.why(v.Facts).What != "" })
				if why := question.why(bad.Facts); !strings.Contains(why.What, c.want) || len(why.What) > 400 || why.Remedy == "" {
					t.Errorf("why = %q, want a short one that has %q, and what to do", why, c.want)
				}
				if !question.kept(bad.Facts) || question.answered(bad.Facts) {
					t.Errorf("facts = %+v, want what was answered before, and no more", bad.Facts)
				}

				fake.set(field, say(200, question.good))
				eventuallyKnown(t, watcher, "an answer", func(v catalog.Snapshot) bool {
					watcher.Wake() // or it comes later
					return asked(v) && question.kept(v.Facts) && question.answered(v.Facts) && question.why(v.Facts).What == ""
				})
				fake.mu.Lock()
				defer fake.mu.Unlock()
				if fake.most > catalog.Connections+1 { // the server learns later than the client that one has ended
					t.Errorf("%d connections at a time, want at most %d", fake.most, catalog.Connections)
				}
			})
		}
	}
}

// What could not be asked, because an answer before was none, is told as well.
func TestLookupsTellWhatTheyDidNotAsk(t *testing.T) {
	fake := newFakeConsul(t)
	fake.set(&fake.chain, say(500, "no cluster leader"))
	proxies, _, err := registration.ParseServices([]byte("{"+checked(numbered(1), "web")+", "+oneProxy[1:]), registration.Loopback4())
	if err != nil {
		t.Fatal(err)
	}
	lookups := catalog.NewQueries(fake.consul(t, 5*time.Second))
	known, moved := lookups.Refresh(t.Context(), catalog.ByAllocation(proxies))
	if asked := fake.times("/v1/agent/checks"); asked > 0 || !moved || !strings.Contains(known.NoChecks.What, "no cluster leader") {
		t.Errorf("checks were asked for %d times and are %q, want none and why", asked, known.NoChecks)
	}
	known, moved = lookups.Refresh(t.Context(), catalog.ByAllocation(proxies)) // the first question rests
	if asked := fake.times("/v1/agent/checks"); asked != 1 || !moved || known.NoChecks.What != "" {
		t.Errorf("checks were asked for %d times and are %q, want an answer", asked, known.NoChecks)
	}
}

// A slow answer that comes in time is an answer like any other.
func TestWatcherWaitsForASlowConsul(t *testing.T) {
	fake := newFakeConsul(t)
	fake.answers(slow(oneProxy))
	fake.set(&fake.self, slow(`{"Config":{"NodeName":"node"}}`))
	eventuallyKnown(t, fake.follow(t), "the slow answers", func(v catalog.Snapshot) bool {
		return inSync(v) && v.Watch.What == "" && v.Bind.What == "" && v.Counts.Failures == 0
	})
}

// slow answers rightly, late but in time.
func slow(body string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		late := time.NewTimer(60 * time.Millisecond)
		defer late.Stop()
		select {
		case <-r.Context().Done():
		case <-late.C:
			fmt.Fprint(w, body)
		}
	}
}

// Whatever is sent, an answer costs no more memory than leaves the agent of a
// full node, 40 MiB large, within the 64 MiB that it may have.
func TestAnAnswerIsBoundedInMemory(t *testing.T) {
	fake := newFakeConsul(t)
	consul := fake.consul(t, time.Minute)
	for name, ask := range map[string]func() error{
		"services":   func() error { _, err := consul.Services(t.Context()); return err },
		"self":       func() error { _, err := consul.Self(t.Context()); return err },
		"changes":    func() error { _, err := consul.Changed(t.Context(), "node", 0); return err },
		"checks":     func() error { _, err := consul.Checks(t.Context()); return err },
		"intentions": func() error { _, err := consul.Intentions(t.Context()); return err },
		"chain":      func() error { _, err := consul.VirtualIPs(t.Context(), registration.Service{Name: "api"}); return err },
		"entry": func() error {
			_, err := consul.GatewayPorts(t.Context(), registration.Gateway{Service: registration.Service{Name: "front"}, Kind: registration.KindIngress})
			return err
		},
	} {
		for _, question := range []*http.HandlerFunc{&fake.services, &fake.self, &fake.changes, &fake.checks, &fake.intentions, &fake.chain, &fake.entry} {
			fake.set(question, flood)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		err := ask()
		runtime.ReadMemStats(&after)
		const most = 24 << 20
		if grown := after.TotalAlloc - before.TotalAlloc; grown > most {
			t.Errorf("%s: an endless answer took %d MiB, want at most %d", name, grown>>20, most>>20)
		}
		if !errors.Is(err, bounded.ErrTooLong) {
			t.Errorf("%s: an endless answer is %v, want %v", name, err, bounded.ErrTooLong)
		}
	}
}
