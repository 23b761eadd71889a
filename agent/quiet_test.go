// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// An allocation that comes and goes is no warning, whichever of its parts goes
// first and whatever the agent was about to do with it by then.
func TestEndOfAnAllocationIsNoWarning(t *testing.T) {
	for _, c := range []struct {
		what        string
		transparent bool
	}{{"transparent proxy", true}, {"plain connect", false}} {
		t.Run(c.what, func(t *testing.T) {
			n := newNode(t)
			var log bytes.Buffer
			a := n.newStepwise()
			a.log = slog.New(slog.NewTextHandler(&log, nil))
			var ns *test.NetNS
			var id string
			var key workload.AttachmentID
			round := 0
			start := func() {
				t.Helper()
				round++
				id = numbered(round)
				key = workload.AttachmentID{ContainerID: id, IfName: "eth0"}
				if c.transparent {
					ns, _ = n.transparent(id)
				} else {
					ns = test.NewNetNS(t)
					n.cached(id, ns.Path, "")
				}
				n.fake.answers(registered(id))
				for range 3 {
					a.asks(t.Context())
				}
				if w := a.Status().Workloads; len(w) != 1 || w[0].State != api.StateManaged || !w[0].InSync {
					t.Fatalf("the agent shows %+v; it wrote: %s", w, &log)
				}
			}
			// Each is what the agent does to a workload that it still takes for one.
			for _, meets := range []struct {
				what string
				do   func(s desired.Allocation)
			}{
				{"a pass", func(desired.Allocation) { a.pass(true) }},
				{"a look", func(desired.Allocation) { a.checkSome(); a.lookSome(time.Now()) }},
				{"a change", func(s desired.Allocation) {
					meshConfig := s.Record.MeshConfig
					meshConfig.InboundPort++
					a.applyAll([]*move{{s: s, m: a.allocations[key], wanted: desired.Plan{MeshConfig: &meshConfig}, changes: true}})
				}},
				{"a removal", func(s desired.Allocation) {
					s.Cached, s.Live = false, false
					a.forget([]desired.Allocation{s}, time.Now())
				}},
				{"an addition", func(s desired.Allocation) {
					a.add(s, a.allocations[key], redirect.Attachment{Request: s.Record.Request}, "test")
				}},
			} {
				for _, goes := range []string{"record", "namespace", "record and namespace"} {
					start()
					known, err := n.Records()
					if err != nil || len(known) != 1 {
						t.Fatalf("on record: %+v, %v", known, err)
					}
					cached, _, err := a.cache.Read()
					if err != nil {
						t.Fatal(err)
					}
					s := desired.Allocation{Attachment: cached[key], Record: &known[0], Cached: true}
					if strings.Contains(goes, "record") {
						if err := n.Remove(key); err != nil {
							t.Fatal(err)
						}
					}
					if strings.Contains(goes, "namespace") {
						ns.End()
					}
					meets.do(s)
					if err := os.Remove(filepath.Join(n.config.CNI.CacheDir, "results", "nomad-"+id+"-eth0")); err != nil {
						t.Fatal(err)
					}
					n.fake.answers(registered())
					meets.do(s)
					if !strings.Contains(goes, "namespace") {
						ns.End()
					}
					test.Eventually(t, func() error {
						a.prune()
						a.asks(t.Context())
						if left := a.Status().Workloads; len(left) > 0 {
							return fmt.Errorf("the agent shows %+v", left)
						}
						return nil
					}, "the allocation to be forgotten")
					if told := log.String(); strings.Contains(told, "level=WARN") || strings.Contains(told, "level=ERROR") {
						t.Errorf("the %s is gone when %s meets it: the agent wrote:\n%s", goes, meets.what, told)
					}
					if failures := a.Status().Counts.Failures; failures > 0 {
						t.Errorf("the %s is gone when %s meets it: %d failures are counted", goes, meets.what, failures)
						a.count(func(c *api.Counts) { c.Failures = 0 })
					}
					log.Reset()
				}
			}
		})
	}
}
