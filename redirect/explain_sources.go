// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"net/netip"
	"slices"
)

// The sources of a value, in a Step.
const (
	SourceJob     = "job"     // the request at ADD: the job's, with what the node's configuration adds to it
	SourceConsul  = "consul"  // the proxy's registration, by way of the agent
	SourceAgent   = "agent"   // the operator's policy, or the service's metadata in Consul
	SourceDefault = "default" // nobody named it
	SourceNode    = "node"    // read from the namespace or learned from its sockets
)

// source says where the value comes from that a rule looked at. It adds to the step what the
// rows do not say.
func sourceOf(r *record, step *Step, c Connection) string {
	matches := step.Result == ResultMatch
	switch step.Rule {
	case RuleDNS:
		return sourceIf(r.Request.DNS != DNS{}, SourceJob)
	case RuleProxy:
		return SourceJob
	case RuleUID:
		return sourceIf(matches, SourceJob)
	case RulePort:
		fromJob := c.inbound() && slices.Contains(r.Request.ExcludeInboundPorts, c.Destination.Port()) ||
			!c.inbound() && slices.Contains(r.Request.ExcludeOutboundPorts, c.Destination.Port())
		return sourceIf(matches, either(fromJob, SourceJob, SourceConsul))
	case RuleCIDR:
		if cidr, found := excludedCIDR(r, c.Destination.Addr()); matches && found {
			step.Detail = fmt.Sprintf("%s is in the excluded CIDR %s", c.Destination.Addr(), cidr)
		}
		return sourceIf(matches, SourceJob)
	case RuleMode:
		return either(r.Request.Mode == "", SourceDefault, SourceJob)
	case RuleOwn, RuleInside:
		return sourceIf(matches, SourceNode)
	case RuleUpstream, RuleService:
		return sourceIf(matches, SourceConsul)
	case RuleGuard:
		if guard := r.desired().Guard; guard == "" || guard == GuardOff {
			return SourceDefault
		}
		return either(MaxGuard(r.Request.Guard, GuardOff) == r.desired().Guard, SourceJob, SourceAgent)
	case RuleBudget:
		return either(r.desired().Budget == DefaultBudget, SourceDefault, SourceJob)
	case RuleInbound:
		return either(r.MeshConfig.InboundPort != 0, SourceConsul, SourceJob)
	case RuleFamily, RuleListener:
		return SourceNode
	}
	return ""
}

func either(first bool, a, b string) string {
	if first {
		return a
	}
	return b
}

func sourceIf(there bool, source string) string { return either(there, source, "") }

// excludedCIDR is the longest excluded prefix that has the address.
func excludedCIDR(r *record, addr netip.Addr) (longest netip.Prefix, found bool) {
	for _, cidr := range r.desired().ExcludeOutboundCIDRs {
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

// serviceBehind names the service that a connection is meant for, as far as Consul told.
func serviceBehind(r *record, c Connection) string {
	if c.inbound() {
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
