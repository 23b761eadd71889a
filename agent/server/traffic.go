// SPDX-License-Identifier: MPL-2.0

package server

import (
	"net/http"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/flow"
)

// serveGuard answers with a GuardList.
func (s *Server) serveGuard(w http.ResponseWriter, _ *http.Request) {
	if s.Flows == nil {
		http.Error(w, api.ErrFlowsOff.Error(), http.StatusNotImplemented)
		return
	}
	known, err := s.Datapath.Records()
	if err != nil && known == nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	s.writeJSON(w, http.StatusOK, s.Flows.ListGuards(known))
}

// trafficSince is Traffic; without what is not recorded, where that is so.
func (s *Server) trafficSince(since time.Time) api.Traffic {
	if s.Flows == nil {
		return api.Traffic{Schema: 1, Since: since, Until: time.Now(), Edges: []api.CountedEdge{}, Problem: api.ErrFlowsOff.Error()}
	}
	return s.Flows.Traffic(since)
}

// serveTraffic answers with Traffic since the moment that is asked for.
func (s *Server) serveTraffic(w http.ResponseWriter, r *http.Request) {
	since, err := api.ParseMoment(r.URL.Query().Get("since"), time.Now())
	if err != nil {
		http.Error(w, "parameter since: "+err.Error(), http.StatusBadRequest)
		return
	}
	traffic := s.trafficSince(since)
	if traffic.Agent, err = flow.OwnProcess(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	s.writeJSON(w, http.StatusOK, traffic)
}
