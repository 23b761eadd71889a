// SPDX-License-Identifier: MPL-2.0

package registration

import (
	"cmp"
	"slices"

	"github.com/weirmesh/weir/redirect/workload"
)

// Intention is one that allows a service, named by itself, to dial another.
type Intention struct{ Source, Destination Service }

// ServiceOf is a service as an intention names it, where the free edition has a
// namespace "default".
func ServiceOf(name, namespace, partition string) Service {
	const standard = "default"
	if namespace == standard {
		namespace = ""
	}
	if partition == standard {
		partition = ""
	}
	return Service{Name: name, Namespace: namespace, Partition: partition}
}

// Names reports whether the source is the proxy's service.
func (i Intention) Names(p Proxy) bool {
	of := p.OwnService()
	return i.Source == ServiceOf(of.Name, of.Namespace, of.Partition)
}

// InOrder sorts the proxies of an allocation by the names of their services:
// the order in which they own what several claim.
func InOrder(proxies []Proxy) []Proxy {
	proxies = slices.Clone(proxies)
	slices.SortStableFunc(proxies, func(a, b Proxy) int {
		return cmp.Or(cmp.Compare(a.OwnService().Name, b.OwnService().Name), cmp.Compare(a.ID, b.ID))
	})
	return proxies
}

// OwnService is that whose sidecar the proxy is, or the gateway itself.
func (p Proxy) OwnService() Service {
	of := p.Self
	of.Name = cmp.Or(p.Service, p.ServiceID, of.Name)
	return of
}

// Transparent are the sidecars that take what no rule exempts.
func Transparent(proxies []Proxy) []Proxy {
	return slices.DeleteFunc(InOrder(proxies), func(p Proxy) bool { return !p.Transparent })
}

// OutboundPort is where Consul puts the listener.
func (p Proxy) OutboundPort() uint16 { return cmp.Or(p.Outbound, workload.DefaultOutboundPort) }
