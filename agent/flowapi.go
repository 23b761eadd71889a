// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"net/http"
	"time"
)

// serveGuard answers with a GuardList.
func (a *Agent) serveGuard(w http.ResponseWriter, _ *http.Request) {
	if a.flows == nil {
		http.Error(w, ErrFlowsOff.Error(), http.StatusNotImplemented)
		return
	}
	known, err := a.datapath.Records()
	if err != nil && known == nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	a.writeJSON(w, http.StatusOK, a.flows.listGuards(known))
}

// trafficSince is Traffic; without what is not recorded, where that is so.
func (a *Agent) trafficSince(since time.Time) Traffic {
	if a.flows == nil {
		return Traffic{Schema: 1, Since: since, Until: time.Now(), Edges: []CountedEdge{}, Problem: ErrFlowsOff.Error()}
	}
	return a.flows.traffic(since)
}

// serveTraffic answers with Traffic since the moment that is asked for.
func (a *Agent) serveTraffic(w http.ResponseWriter, r *http.Request) {
	since, err := ParseMoment(r.URL.Query().Get("since"), time.Now())
	if err != nil {
		http.Error(w, "parameter since: "+err.Error(), http.StatusBadRequest)
		return
	}
	traffic := a.trafficSince(since)
	if traffic.Agent, err = ownProcess(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	a.writeJSON(w, http.StatusOK, traffic)
}
