// SPDX-License-Identifier: MPL-2.0

package change

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/weirmesh/weir/redirect/workload"
)

// Difference says in words what another mesh configuration changes; it is empty where
// nothing does that an operator would know.
func Difference(before, after workload.MeshConfig) string {
	var parts []string
	part := func(what, was, is string) {
		switch was {
		case is:
		case "":
			parts = append(parts, what+" "+is)
		default:
			parts = append(parts, fmt.Sprintf("%s %s -> %s", what, was, cmp.Or(is, "none")))
		}
	}
	part("inbound port", port(before.InboundPort), port(after.InboundPort))
	part("outbound port", port(before.OutboundPort), port(after.OutboundPort))
	part("guard", string(before.Guard), string(after.Guard))
	part("egress guard", string(before.Egress), string(after.Egress))
	part("forwarding", allowed(before.Forward), allowed(after.Forward))
	part("open ports", ports(before.ExcludeInboundPorts), ports(after.ExcludeInboundPorts))
	part("exposed ports", ports(before.ExposedPorts), ports(after.ExposedPorts))
	part("service", before.Service, after.Service)
	was, is := listeners(before), listeners(after)
	for _, name := range slices.Sorted(maps.Keys(merged(was, is))) {
		switch {
		case was[name] == "":
			parts = append(parts, fmt.Sprintf("%s at %s added", name, is[name]))
		case is[name] == "":
			parts = append(parts, name+" removed")
		case was[name] != is[name]:
			parts = append(parts, fmt.Sprintf("%s %s -> %s", name, was[name], is[name]))
		}
	}
	return strings.Join(parts, "; ")
}

// listeners are where upstreams and further proxies listen, by what they are.
func listeners(c workload.MeshConfig) map[string]string {
	at := make(map[string]string)
	for _, u := range c.Upstreams {
		text := u.Listener.String()
		for _, addr := range u.Addresses {
			text += " for " + addr.String()
		}
		at["upstream "+u.Name] = text
	}
	for _, p := range c.Proxies {
		text := fmt.Sprintf("inbound port %s, outbound port %s", cmp.Or(port(p.InboundPort), "-"), cmp.Or(port(p.OutboundPort), "-"))
		if open := ports(p.ExposedPorts); open != "" {
			text += ", exposed ports " + open
		}
		at["proxy of "+p.Service] = text
	}
	return at
}

func merged(a, b map[string]string) map[string]string {
	all := maps.Clone(a)
	maps.Copy(all, b)
	return all
}

func port(number uint16) string {
	if number == 0 {
		return ""
	}
	return fmt.Sprint(number)
}

func ports(list []uint16) string {
	sorted := slices.Sorted(slices.Values(list))
	return strings.Trim(strings.ReplaceAll(fmt.Sprint(sorted), " ", ","), "[]")
}

func allowed(is bool) string {
	if is {
		return "allowed"
	}
	return ""
}
