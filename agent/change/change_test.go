// SPDX-License-Identifier: MPL-2.0

package change

import (
	"fmt"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/workload"
)

var began = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

func at(seconds int) time.Time { return began.Add(time.Duration(seconds) * time.Second) }

func web(problems ...health.Problem) api.WorkloadView {
	w := api.WorkloadView{ID: "b412", Job: "web", Group: "g", State: api.StateManaged, Since: began}
	for _, p := range problems {
		w.Problems = append(w.Problems, p.Of("allocation b412 (web/g)", "b412"))
	}
	return w
}

// texts are the changes, without what is the same in all.
func texts(l *Log) (list []string) {
	for _, c := range l.List(began).Changes {
		list = append(list, strings.TrimSpace(fmt.Sprintf("%s %s %s: %s", c.Time.Format("05"), c.AllocID, c.Kind, c.What)))
	}
	return list
}

func TestProblemsBeginAndEnd(t *testing.T) {
	l := NewLog(began)
	mute := health.NewProblem(health.ProblemProxyNotListening, "", "it does not listen")
	consul := health.NewProblem(health.ProblemConsulUnreachable, "", "Consul does not answer: 1")
	settling := web(mute)
	settling.Since = at(0)
	l.Problems(nil, []api.WorkloadView{settling}, at(5), true) // on its way: no problem yet
	settling.Since = at(-20)
	l.Problems([]health.Problem{consul}, []api.WorkloadView{settling}, at(10), true)
	consul.What = "Consul does not answer: 2" // the same problem
	settling.Since = at(11)                   // ... and one that was told goes on
	l.Problems([]health.Problem{consul}, []api.WorkloadView{settling}, at(12), true)
	l.Problems(nil, []api.WorkloadView{settling}, at(14), false) // by an agent that has not looked yet
	l.Problems(nil, []api.WorkloadView{web()}, at(40), true)
	want := []string{
		"10  problem: Consul does not answer: 1 [consul-unreachable]",
		"10 b412 problem: it does not listen [proxy-not-listening]",
		"40  solved: after 30s: Consul does not answer: 1 [consul-unreachable]",
		"40 b412 solved: after 30s: it does not listen [proxy-not-listening]",
	}
	if diff := cmp.Diff(want, texts(l)); diff != "" {
		t.Errorf("changes (-want +got):\n%s", diff)
	}
	if c := l.List(began).Changes[1]; c.Job != "web" || c.TaskGroup != "g" || c.Severity != "error" || c.Code != "proxy-not-listening" {
		t.Errorf("the change of an allocation is %+v", c)
	}
}

func TestStates(t *testing.T) {
	l := NewLog(began)
	none, there, registered, foreign := api.WorkloadView{}, web(), web(), web()
	there.Mode, there.Guard = workload.ModeDirect, workload.GuardAudit
	registered.Mode, registered.Guard = there.Mode, there.Guard
	registered.Proxies = []api.ProxyView{{ID: "web-sidecar-proxy"}}
	foreign.State = api.StateConsul
	for i, step := range []struct{ before, now api.WorkloadView }{{none, there}, {there, there}, {there, registered}, {registered, there}, {none, foreign}} {
		l.State(step.before, step.now, at(i))
	}
	want := []string{
		"00 b412 added: under Weir, mode direct, guard audit",
		"02 b412 config: its proxy is registered in Consul",
		"03 b412 config: Consul has no registration of its proxy any more: the last configuration stays",
		"04 b412 state: Consul's own rules redirect it, and Weir leaves it alone",
	}
	if diff := cmp.Diff(want, texts(l)); diff != "" {
		t.Errorf("changes (-want +got):\n%s", diff)
	}
}

func TestDifference(t *testing.T) {
	before := workload.MeshConfig{
		InboundPort: 20001, Guard: workload.GuardAudit, ExcludeInboundPorts: []uint16{8081}, Service: "web",
		Upstreams: []workload.Upstream{
			{Name: "api", Listener: netip.MustParseAddrPort("127.0.0.1:9191")}, {Name: "old", Listener: netip.MustParseAddrPort("127.0.0.1:9292")},
		},
	}
	after := before
	after.InboundPort, after.OutboundPort, after.Guard, after.Forward = 20002, 15001, workload.GuardEnforce, true
	after.ExcludeInboundPorts, after.ExposedPorts = nil, []uint16{21501, 21500}
	after.Upstreams = []workload.Upstream{
		{Name: "api", Listener: netip.MustParseAddrPort("127.0.0.1:9191"), Addresses: []netip.Addr{netip.MustParseAddr("240.0.0.1")}},
		{Name: "db", Listener: netip.MustParseAddrPort("127.0.0.1:9393")},
	}
	after.Proxies = []workload.Sidecar{{Service: "admin", InboundPort: 20003}}
	want := "inbound port 20001 -> 20002; outbound port 15001; guard audit -> enforce; forwarding allowed; open ports 8081 -> none; exposed ports 21500,21501; " +
		"proxy of admin at inbound port 20003, outbound port - added; upstream api 127.0.0.1:9191 -> 127.0.0.1:9191 for 240.0.0.1; upstream db at 127.0.0.1:9393 added; upstream old removed"
	if diff := cmp.Diff(want, Difference(before, after)); diff != "" {
		t.Errorf("difference (-want +got):\n%s", diff)
	}
	if text := Difference(after, after); text != "" {
		t.Errorf("nothing differs: %q", text)
	}
}

// One allocation that changes without end takes nobody's place, and all of them together
// no more room than there is.
func TestLogIsBounded(t *testing.T) {
	l := NewLog(began)
	l.Note(api.Change{Time: at(0), AllocID: "quiet"})
	for i := range most + 100 {
		l.Note(api.Change{Time: at(i), AllocID: "flapping", What: strings.Repeat("é", longest)})
	}
	list := l.List(began)
	if len(list.Changes) != 1+mostOfOne || list.Changes[0].AllocID != "quiet" || list.Omitted != most+100-mostOfOne {
		t.Errorf("%d changes, the first of %q, %d omitted", len(list.Changes), list.Changes[0].AllocID, list.Omitted)
	}
	if size := len(list.Changes[1].What); size > longest+len("…") {
		t.Errorf("a text of %d bytes is kept", size)
	}
	for i := range most {
		l.Note(api.Change{Time: at(i), AllocID: fmt.Sprint(i)})
	}
	if list = l.List(began); len(list.Changes) != most {
		t.Errorf("%d changes are kept, want %d", len(list.Changes), most)
	}
}

func TestListSince(t *testing.T) {
	l := NewLog(began)
	l.Note(api.Change{Time: at(1), What: "old"})
	l.Note(api.Change{Time: at(9), What: "new"})
	if list := l.List(at(5)); len(list.Changes) != 1 || list.Changes[0].What != "new" || !list.Since.Equal(at(5)) || !list.Began.Equal(began) {
		t.Errorf("since later: %+v", list)
	}
	if list := l.List(at(-3600)); len(list.Changes) != 2 || !list.Since.Equal(began) {
		t.Errorf("since before the agent: %+v", list)
	}
	answer := httptest.NewRecorder()
	l.Serve(answer, httptest.NewRequest("GET", "/v1/changes?since=yesterday", nil))
	if answer.Code != 400 || !strings.Contains(answer.Body.String(), "yesterday") {
		t.Errorf("a moment that is none: %d, %s", answer.Code, answer.Body)
	}
}
