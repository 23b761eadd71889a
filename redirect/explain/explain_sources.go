// SPDX-License-Identifier: MPL-2.0

package explain

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// The sources of a value, in a Step.
const (
	SourceJob     = "job"     // the request at ADD: the job's, with what the node's configuration adds to it
	SourceConsul  = "consul"  // the proxy's registration, by way of the agent
	SourceAgent   = "agent"   // the operator's policy, or the service's metadata in Consul
	SourceDefault = "default" // nobody named it
	SourceNode    = "node"    // read from the namespace or learned from its sockets
)

// SourceOf says where the value comes from that a rule looked at. It adds to the step what the
// rows do not say.
func SourceOf(r *store.Record, step *Step, c Connection) string {
	matches := step.Result == ResultMatch
	switch step.Rule {
	case RuleDNS:
		return sourceIf(r.Request.DNS != workload.DNS{}, SourceJob)
	case RuleProxy:
		return SourceJob
	case RuleUID:
		return sourceIf(matches, SourceJob)
	case RulePort:
		fromJob := c.Inbound() && slices.Contains(r.Request.ExcludeInboundPorts, c.Destination.Port()) ||
			!c.Inbound() && slices.Contains(r.Request.ExcludeOutboundPorts, c.Destination.Port())
		return sourceIf(matches, Either(fromJob, SourceJob, SourceConsul))
	case RuleCIDR:
		if cidr, found := excludedCIDR(r, c.Destination.Addr()); matches && found {
			step.Detail = fmt.Sprintf("%s is in the excluded CIDR %s", c.Destination.Addr(), cidr)
		}
		return sourceIf(matches, SourceJob)
	case RuleMode:
		return Either(r.Request.Mode == "", SourceDefault, SourceJob)
	case RuleOwn, RuleInside:
		return sourceIf(matches, SourceNode)
	case RuleUpstream, RuleService:
		return sourceIf(matches, SourceConsul)
	case RuleGuard:
		if guard := r.Desired().Guard; guard == "" || guard == workload.GuardOff {
			return SourceDefault
		}
		return Either(workload.MaxGuard(r.Request.Guard, workload.GuardOff) == r.Desired().Guard, SourceJob, SourceAgent)
	case RuleBudget:
		return Either(r.Desired().Budget == workload.DefaultBudget, SourceDefault, SourceJob)
	case RuleInbound:
		return Either(r.MeshConfig.InboundPort != 0, SourceConsul, SourceJob)
	case RuleFamily, RuleListener:
		return SourceNode
	}
	return ""
}

func Either(first bool, a, b string) string {
	if first {
		return a
	}
	return b
}

func sourceIf(there bool, source string) string { return Either(there, source, "") }

// excludedCIDR is the longest excluded prefix that has the address.
func excludedCIDR(r *store.Record, addr netip.Addr) (longest netip.Prefix, found bool) {
	for _, cidr := range r.Desired().ExcludeOutboundCIDRs {
		there := cidr.Contains(addr)
		if cidr.Addr().Is4In6() && addr.Is4() {
			there = cidr.Contains(netip.AddrFrom16(addr.As16()))
		}
		if there && (!found || cidr.Bits() > longest.Bits()) {
			longest, found = cidr, true
		}
	}
	return longest, found
}

// ServiceBehind names the service that a connection is meant for, as far as Consul told.
func ServiceBehind(r *store.Record, c Connection) string {
	if c.Inbound() {
		for _, p := range r.MeshConfig.Proxies {
			if slices.Contains(p.ServicePorts, c.Destination.Port()) || p.InboundPort == c.Destination.Port() {
				return p.Service
			}
		}
		return r.MeshConfig.Service
	}
	for _, upstream := range r.MeshConfig.Upstreams {
		if upstream.Listener == c.Destination || slices.Contains(upstream.Addresses, c.Destination.Addr()) {
			return upstream.Name
		}
	}
	return ""
}
