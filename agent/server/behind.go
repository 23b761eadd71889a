// SPDX-License-Identifier: MPL-2.0

package server

import (
	"fmt"
	"net/http"
	"net/netip"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog/behind"
	"github.com/weirmesh/weir/agent/catalog/virtual"
	"github.com/weirmesh/weir/redirect/workload"
)

// serveBehind answers a api.BehindQuery.
func (s *Server) serveBehind(w http.ResponseWriter, r *http.Request) {
	values := r.URL.Query()
	query := api.BehindQuery{
		Key:     workload.AttachmentID{ContainerID: values.Get("container_id"), IfName: values.Get("interface")},
		Service: values.Get("service"),
	}
	for name, into := range map[string]*netip.AddrPort{"to": &query.To, "sent_to": &query.SentTo} {
		text := values.Get(name)
		if text == "" {
			continue
		}
		var err error
		if *into, err = netip.ParseAddrPort(text); err != nil {
			http.Error(w, fmt.Sprintf("parameter %s: %v", name, err), http.StatusBadRequest)
			return
		}
	}
	if s.Catalog == nil {
		off := api.Unknown{What: "consul", Why: "the agent does not ask Consul", Remedy: "consul { enabled = true } in its configuration"}
		s.writeJSON(w, http.StatusOK, api.Behind{Schema: 1, VirtualIPs: []netip.Addr{}, Unknown: []api.Unknown{off}})
		return
	}
	if query.Service == "" {
		query.Service = virtual.ServiceAt(r.Context(), s.Catalog, query.To.Addr())
	}
	s.writeJSON(w, http.StatusOK, behind.Ask(r.Context(), s.Catalog, s.Source.Consul(), s.Source.Workloads(), query))
}
