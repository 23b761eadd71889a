// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

// TestStartGate: tasks that dial in their first moment and end at the first error die
// without the start gate and all succeed with it, although no Envoy listens when they
// start: by a virtual IP through the proxy's outbound listener, with exec and with
// Docker; and with the gate by a virtual IP that leads to an explicit upstream, and by
// the local port of an upstream in a plain job. WEIR_STARTS is how many of each driver
// start, five of each at a time.
func TestStartGate(t *testing.T) {
	count, often := 3, false
	if text := os.Getenv("WEIR_STARTS"); text != "" {
		number, err := strconv.Atoi(text)
		if err != nil || number < 1 {
			t.Fatalf("WEIR_STARTS is %q: want a number", text)
		}
		count, often = number, true
	}
	n := nomad.Start(t, nomad.Options{}) // has no gate, as all these tests' nodes
	speaksHTTP(n, "gate-api", "gate-implicit", "gate-explicit", "gate-plain", "gate-docker")
	server := n.Run("testdata/jobs/gate-api.nomad.hcl")
	api := server.Alloc("api")

	t.Run("Without", func(t *testing.T) {
		wasRefused := func(s start) bool { return s.outcome.Errno == syscall.ECONNREFUSED }
		for group, list := range starts(t, n, count, 0, wasRefused) {
			refused, failed := 0, 0
			for _, s := range list {
				if s.outcome.OK() {
					wantMesh(t, s.outcome, api, "gate-"+group)
					continue
				}
				failed++
				if wasRefused(s) {
					refused++
				}
			}
			t.Logf("%s: %d of %d starts failed", group, failed, len(list))
			if refused == 0 {
				t.Errorf("group %s: none of %d starts was refused without a gate, which shows nothing: %+v", group, len(list), list)
			}
		}
	})
	n.Write("/etc/weir.d/weir.hcl", "log_level = \"debug\"\ngate {\n  timeout = \"1m\"\n}\n", 0o600)
	n.Agent.Restart(t)
	t.Run("With", func(t *testing.T) {
		upstreams := 2
		if often {
			upstreams = 0
		}
		all := starts(t, n, count, upstreams, start.early)
		for group, list := range all {
			for _, s := range list {
				wantMesh(t, s.outcome, api, "gate-"+group)
			}
			waits := waited(list)
			if len(waits) == 0 {
				t.Errorf("group %s: the proxies listened before the tasks dialled, which shows nothing: %+v", group, list)
				continue
			}
			median, longest := waits[len(waits)/2], waits[len(waits)-1]
			t.Logf("%s: all of %d starts succeeded; %d dialled before Envoy listened, and were answered %s (median) and %s (at most) after it did",
				group, len(list), len(waits), median.Round(10*time.Millisecond), longest.Round(10*time.Millisecond))
			if often && median >= 1500*time.Millisecond {
				t.Errorf("group %s: half of the requests took %s and more after Envoy listened", group, median)
			}
		}
		if want := map[bool]int{false: 4, true: 2}[often]; len(all) != want {
			t.Errorf("%d groups started, want %d", len(all), want)
		}
	})
	t.Run("Never", func(t *testing.T) { proxyNeverListens(t, n.For(t)) })
	if !t.Failed() {
		server.Stop()
		n.ExpectNothingLeft()
	}
}

// start is what came of a task's first request.
type start struct {
	outcome wire.Outcome
	listens time.Time // when its Envoy began to, zero where it did not yet
}

// early reports whether the task dialled before its Envoy listened.
func (s start) early() bool { return s.outcome.At.Before(s.listens) }

// starts runs as many tasks of each driver, and of each kind of upstream, which dial in
// their first moment, and returns what came of it by group. Nomad starts a task and its
// Envoy in no order: where a group has none that shows what is looked for, some more start.
func starts(t *testing.T, n *nomad.Node, count, upstreams int, shows func(start) bool) map[string][]start {
	t.Helper()
	const together, most = 5, 4
	all := make(map[string][]start)
	lacking := func() bool {
		for _, list := range all {
			if !slices.ContainsFunc(list, shows) {
				return true
			}
		}
		return false
	}
	for wave := 0; wave*together < count || lacking() && wave < most; wave++ {
		left := max(count-wave*together, 0)
		size := min(cmp.Or(left, count), together)
		t.Run(fmt.Sprint(wave), func(t *testing.T) { // its end purges the job
			id := fmt.Sprintf("gate-first-%d", time.Now().UnixNano())
			job := n.For(t).Submit("testdata/jobs/gate-first.nomad.hcl", "id", id, "count", fmt.Sprint(size), "upstreams", fmt.Sprint(upstreams))
			test.EventuallyIn(t, 2*time.Minute, func() error {
				ended := make(map[string][]start)
				for _, a := range job.Allocs() {
					if s, err := firstRequest(a); err == nil {
						ended[a.Group] = append(ended[a.Group], s)
					}
				}
				want := map[string]int{"implicit": size, "docker": size, "explicit": upstreams, "plain": upstreams}
				for group, number := range want {
					if len(ended[group]) != number {
						return fmt.Errorf("group %s: %d of %d have ended", group, len(ended[group]), number)
					}
				}
				for group, list := range ended {
					all[group] = append(all[group], list...)
				}
				return nil
			}, "the first requests to end")
		})
	}
	return all
}

// firstRequest is an error until the request has ended, and where it succeeded until
// Envoy's log says since when it listens.
func firstRequest(a *nomad.Alloc) (s start, err error) {
	text, err := os.ReadFile(a.File("alloc/logs/" + a.Group + ".stdout.0"))
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(text, &s.outcome); err != nil {
		if a.ClientStatus == "failed" { // Docker's log of a task that ends at once may be lost
			return start{outcome: wire.Outcome{Error: "its task failed: " + a.Events()}}, nil
		}
		return s, err
	}
	text, err = os.ReadFile(a.File("alloc/logs/connect-proxy-gate-" + a.Group + ".stderr.0"))
	if found := listensLine.FindSubmatch(text); found != nil {
		s.listens, err = time.Parse("2006-01-02 15:04:05.000", string(found[1]))
	} else if s.outcome.OK() && err == nil {
		err = errors.New("Envoy's log does not say when it began to listen")
	}
	if !s.outcome.OK() {
		err = nil // Envoy may not even have started
	}
	return s, err
}

// listensLine is what Envoy writes just before its workers take connections.
var listensLine = regexp.MustCompile(`\[([-0-9]+ [:0-9]+\.[0-9]{3})\].*all dependencies initialized. starting workers`)

// waited is how long after Envoy listened those were answered that dialled before, the
// shortest first.
func waited(list []start) (waits []time.Duration) {
	for _, s := range list {
		if s.early() {
			waits = append(waits, s.outcome.At.Add(s.outcome.Took).Sub(s.listens))
		}
	}
	slices.Sort(waits)
	return waits
}

// proxyNeverListens: what waits for a proxy that does not come is told, is refused when
// the job's gate ends, and is told then too.
func proxyNeverListens(t *testing.T, n *nomad.Node) {
	before := gateCounts(t, n)
	job := n.Submit("testdata/jobs/gate-silent.nomad.hcl")
	test.EventuallyIn(t, time.Minute, func() error {
		if list := job.Allocs(); len(list) != 2 {
			return fmt.Errorf("%d allocations", len(list))
		}
		return nil
	}, "two allocations")
	for _, driver := range []string{"exec", "docker"} {
		a := job.Alloc(driver)
		// Held, by name, in each of the places where somebody looks.
		test.EventuallyIn(t, time.Minute, func() error {
			status, err := n.Try("weir", "status")
			if err != nil {
				return err
			}
			if waits := "agent: gate-silent/" + driver + "/" + a.ID[:8] + " waits for its proxy since "; !strings.Contains(status, waits) {
				return fmt.Errorf("weir status lacks %q:\n%s", waits, status)
			}
			var explained struct {
				Verdict string
				Held    bool
			}
			if err := n.Weir(&explained, "explain", "-json", a.ID, nomad.NeighbourAddress+":80"); err != nil {
				return err
			}
			if !explained.Held || explained.Verdict != bpfmap.RefusedNoProxy.String() {
				return fmt.Errorf("explain says %+v", explained)
			}
			return nil
		}, "status and explain to tell that "+driver+" waits")
	}
	for _, driver := range []string{"exec", "docker"} {
		a := job.Alloc(driver)
		var s start
		test.EventuallyIn(t, time.Minute, func() (err error) {
			s, err = firstRequest(a)
			return err
		}, "the request of "+driver+" to be refused")
		if s.outcome.Errno != syscall.ECONNREFUSED || s.outcome.Took < time.Second {
			t.Errorf("%s: %s, want it to wait and to be refused", driver, s.outcome)
		}
		flows := n.Command("weir", "flows", "-json", "-alloc", a.ID)
		for _, verdict := range []string{bpfmap.Held.String(), bpfmap.RefusedNoProxy.String()} {
			if !strings.Contains(flows, `"verdict":"`+verdict+`"`) {
				t.Errorf("weir flows of %s lacks %s:\n%s", driver, verdict, flows)
			}
		}
	}
	after := gateCounts(t, n)
	if after.HeldTimeout != before.HeldTimeout+2 {
		t.Errorf("counts were %+v, then %+v, want two more that timed out", before, after)
	}
}

func gateCounts(t *testing.T, n *nomad.Node) api.Counts {
	t.Helper()
	var told struct{ Agent struct{ Counts api.Counts } }
	if err := n.Weir(&told, "status", "-json"); err != nil {
		t.Fatal(err)
	}
	return told.Agent.Counts
}
