// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"net/http"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/flow"
)

// serveGuard answers with a GuardList.
func (a *Agent) serveGuard(w http.ResponseWriter, _ *http.Request) {
	if a.flows == nil {
		http.Error(w, api.ErrFlowsOff.Error(), http.StatusNotImplemented)
		return
	}
	known, err := a.datapath.Records()
	if err != nil && known == nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	a.writeJSON(w, http.StatusOK, a.flows.ListGuards(known))
}

// trafficSince is Traffic; without what is not recorded, where that is so.
func (a *Agent) trafficSince(since time.Time) api.Traffic {
	if a.flows == nil {
		return api.Traffic{Schema: 1, Since: since, Until: time.Now(), Edges: []api.CountedEdge{}, Problem: api.ErrFlowsOff.Error()}
	}
	return a.flows.Traffic(since)
}

// serveTraffic answers with Traffic since the moment that is asked for.
func (a *Agent) serveTraffic(w http.ResponseWriter, r *http.Request) {
	since, err := api.ParseMoment(r.URL.Query().Get("since"), time.Now())
	if err != nil {
		http.Error(w, "parameter since: "+err.Error(), http.StatusBadRequest)
		return
	}
	traffic := a.trafficSince(since)
	if traffic.Agent, err = flow.OwnProcess(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	a.writeJSON(w, http.StatusOK, traffic)
}
