// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"cmp"
	"slices"

	"github.com/weirmesh/weir/redirect/workload"
)

// intention is one that allows a service, named by itself, to dial another.
type intention struct{ Source, Destination service }

// serviceOf is a service as an intention names it, where the free edition has a
// namespace "default".
func serviceOf(name, namespace, partition string) service {
	const standard = "default"
	if namespace == standard {
		namespace = ""
	}
	if partition == standard {
		partition = ""
	}
	return service{Name: name, Namespace: namespace, Partition: partition}
}

// names reports whether the source is the proxy's service.
func (i intention) names(p proxy) bool {
	of := p.service()
	return i.Source == serviceOf(of.Name, of.Namespace, of.Partition)
}

// inOrder sorts the proxies of an allocation by the names of their services:
// the order in which they own what several claim.
func inOrder(proxies []proxy) []proxy {
	proxies = slices.Clone(proxies)
	slices.SortStableFunc(proxies, func(a, b proxy) int {
		return cmp.Or(cmp.Compare(a.service().Name, b.service().Name), cmp.Compare(a.ID, b.ID))
	})
	return proxies
}

// service is that whose sidecar the proxy is, or the gateway itself.
func (p proxy) service() service {
	of := p.Self
	of.Name = cmp.Or(p.Service, p.ServiceID, of.Name)
	return of
}

// transparent are the sidecars that take what no rule exempts.
func transparent(proxies []proxy) []proxy {
	return slices.DeleteFunc(inOrder(proxies), func(p proxy) bool { return !p.Transparent })
}

// outbound is where Consul puts the listener.
func (p proxy) outbound() uint16 { return cmp.Or(p.Outbound, workload.DefaultOutboundPort) }
