// SPDX-License-Identifier: MPL-2.0

package catalog

import (
	"net/netip"
	"slices"

	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/health"
)

// Data are what proxies have in common, looked up for them. What was not
// answered yet is not there, and is no reason to take anything back.
type Data struct {
	VirtualIPs   map[registration.Service][]netip.Addr
	GatewayPorts map[registration.Gateway][]uint16
	CheckPorts   map[string][]uint16                     // by service ID; nil: not answered yet
	NoNames      health.Problem                          // why nobody tells which virtual IPs may have changed
	NoChecks     health.Problem                          // why there is no answer, or none newer
	Unanswered   map[registration.Service]health.Problem // ... too
	Intentions   []registration.Intention                // asked where transparent proxies share an allocation; nil: not answered yet
	NoIntentions health.Problem                          // why there is no answer, or none newer
}

// ListenersOf are the ports on which the proxy is for others: that of the mesh, or
// a gateway's.
func ListenersOf(p registration.Proxy, known Data) []uint16 {
	if !p.IsGateway() {
		return []uint16{p.Inbound}
	}
	return slices.Concat(p.Open, known.GatewayPorts[p.Entry()])
}
