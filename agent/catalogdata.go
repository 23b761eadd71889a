// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"net/netip"
	"slices"

	"github.com/weirmesh/weir/redirect/health"
)

// catalogData are what proxies have in common, looked up for them. What was not
// answered yet is not there, and is no reason to take anything back.
type catalogData struct {
	VirtualIPs   map[service][]netip.Addr
	GatewayPorts map[gateway][]uint16
	CheckPorts   map[string][]uint16        // by service ID; nil: not answered yet
	NoNames      health.Problem             // why nobody tells which virtual IPs may have changed
	NoChecks     health.Problem             // why there is no answer, or none newer
	Unanswered   map[service]health.Problem // ... too
	Intentions   []intention                // asked where transparent proxies share an allocation; nil: not answered yet
	NoIntentions health.Problem             // why there is no answer, or none newer
}

// listeners are the ports on which the proxy is for others: that of the mesh, or
// a gateway's.
func listenersOf(p proxy, known catalogData) []uint16 {
	if !p.isGateway() {
		return []uint16{p.Inbound}
	}
	return slices.Concat(p.Open, known.GatewayPorts[p.entry()])
}
