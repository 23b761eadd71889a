// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"fmt"
	"net/http"
	"net/netip"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/workload"
)

// serveBehind answers a api.BehindQuery.
func (a *Agent) serveBehind(w http.ResponseWriter, r *http.Request) {
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
	if a.consul == nil {
		off := api.Unknown{What: "consul", Why: "the agent does not ask Consul", Remedy: "consul { enabled = true } in its configuration"}
		a.writeJSON(w, http.StatusOK, api.Behind{Schema: 1, VirtualIPs: []netip.Addr{}, Unknown: []api.Unknown{off}})
		return
	}
	a.mu.Lock()
	workloads := a.status.Workloads // replaced by a pass, never written again
	a.mu.Unlock()
	a.writeJSON(w, http.StatusOK, a.consul.Client.Behind(r.Context(), a.consulNow(), workloads, query))
}
