// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"strings"
)

// Setting is one value that decides about a workload's connections.
type Setting struct {
	Name   string `json:"name"`
	Value  string `json:"value"`
	Source string `json:"source"`
}

// Settings is all that decides about a workload's connections: where each value comes from, and
// whether its proxies listen. It takes no lock.
func (d *Datapath) Settings(key AttachmentID) (list []Setting, silent bool, err error) {
	r, err := d.paths.readRecord(key)
	if err != nil {
		return nil, false, fmt.Errorf("explain %s: %w", key, err)
	}
	tables, err := openTablesToRead(d.paths.maps())
	if err != nil {
		return nil, false, err
	}
	defer tables.Close()
	w := r.desired()
	served, err := tables.served(r.Cookie, w)
	if err != nil {
		return nil, false, fmt.Errorf("explain %s: %w", key, err)
	}
	add := func(name, value, source string) {
		if value != "" {
			list = append(list, Setting{Name: name, Value: value, Source: source})
		}
	}
	add("mode", string(w.Mode), either(r.Request.Mode == "", SourceDefault, SourceJob))
	add("proxy UID", fmt.Sprint(w.ProxyUID), SourceJob)
	for _, port := range w.meshPorts() {
		four, six := port.roles()
		listens := served[listenerKey(r.Cookie, four, port.port, 0)] || served[listenerKey(r.Cookie, six, port.port, 0)]
		name, source := "inbound port", r.portSource(port.port, r.Request.InboundPort)
		if port.outbound {
			name, source = "outbound port", r.portSource(port.port, r.Request.OutboundPort)
			if w.Mode != ModeTransparent {
				continue // nothing is sent there
			}
		}
		silent = silent || !listens
		add(name, fmt.Sprintf("%d, the proxy %s", port.port, either(listens, "listens", "does not listen")), source)
	}
	if w.InboundPort == 0 {
		add("inbound port", "not known yet", SourceConsul)
	}
	add("own addresses", join(w.Addresses), SourceNode)
	add("DNS sent to", dnsText(w.DNS), SourceJob)
	guard := Step{Rule: RuleGuard}
	add("guard", either(w.Guard == "", string(GuardOff), string(w.Guard)), r.source(&guard, Connection{}))
	add("open inbound ports", join(w.ExcludeInboundPorts), either(len(r.Request.ExcludeInboundPorts) == len(w.ExcludeInboundPorts), SourceJob,
		either(len(r.Request.ExcludeInboundPorts) == 0, SourceConsul, SourceJob+", "+SourceConsul)))
	add("ports of the proxy alone", join(r.MeshConfig.ExposedPorts), SourceConsul)
	add("excluded outbound ports", join(w.ExcludeOutboundPorts), SourceJob)
	add("excluded CIDRs", join(w.ExcludeOutboundCIDRs), SourceJob)
	add("excluded UIDs", join(w.ExcludeUIDs), SourceJob)
	for _, upstream := range w.Upstreams {
		add("upstream "+upstream.Name, strings.TrimSpace(fmt.Sprintf("%s %s", upstream.Listener, join(upstream.Addresses))), SourceConsul)
	}
	held, err := tables.held(r.Cookie)
	add("destinations", fmt.Sprintf("%d of %d", held, w.Budget), either(w.Budget == DefaultBudget, SourceDefault, SourceJob))
	return list, silent, err
}

func (r *record) portSource(port, requested uint16) string {
	switch {
	case port != requested:
		return SourceConsul
	case port == DefaultOutboundPort:
		return SourceDefault
	}
	return SourceJob
}

func dnsText(dns DNS) string {
	switch {
	case dns == DNS{}:
		return ""
	case dns.Port == 0:
		return dns.Address.String()
	case !dns.Address.IsValid():
		return fmt.Sprintf("127.0.0.1:%d", dns.Port)
	}
	return fmt.Sprintf("%s:%d", dns.Address, dns.Port)
}

func join[T any](list []T) string { return strings.Trim(fmt.Sprint(list), "[]") }
