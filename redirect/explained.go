// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"net/netip"
	"strings"
)

// Explain decides what the programs would make of a connection now, rule by rule, from the
// rows in the kernel. It takes no lock and changes nothing.
func (d *Datapath) Explain(key AttachmentID, c Connection) (Explanation, error) {
	r, err := d.paths.readRecord(key)
	if err != nil {
		return Explanation{}, fmt.Errorf("explain %s: %w", key, err)
	}
	tables, err := openTablesToRead(d.paths.maps())
	if err != nil {
		return Explanation{}, err
	}
	defer tables.Close()
	inForce, err := d.InForce(r.NetNS)
	if err != nil {
		return Explanation{}, fmt.Errorf("explain %s: %w", key, err)
	}
	if !inForce {
		return Explanation{}, fmt.Errorf("explain %s: its programs are not in force, so its connections pass or are refused unseen: run 'weir load', then its CNI CHECK or restart the allocation", key)
	}
	c = c.unmapped()
	rows, err := readSnapshot(tables, r.Cookie, c)
	if err != nil {
		return Explanation{}, fmt.Errorf("explain %s: %w", key, err)
	}
	steps, verdict := evaluate(rows, c)
	e := Explanation{Verdict: verdict, Steps: steps, Service: serviceBehind(r, c)}
	for i := range e.Steps {
		e.Steps[i].Source = sourceOf(r, &e.Steps[i], c)
	}
	return e, lookBehind(&e, r, rows, c)
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
		four, six := listenerRoles(port)
		listens := served[listenerKey(r.Cookie, four, port.port, 0)] || served[listenerKey(r.Cookie, six, port.port, 0)]
		name, source := "inbound port", portSource(r, port.port, r.Request.InboundPort)
		if port.outbound {
			name, source = "outbound port", portSource(r, port.port, r.Request.OutboundPort)
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
	add("guard", either(w.Guard == "", string(GuardOff), string(w.Guard)), sourceOf(r, &guard, Connection{}))
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

// lookBehind finds where a connection that stays in the namespace ends.
func lookBehind(e *Explanation, r *record, rows *snapshot, c Connection) error {
	loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	switch e.Verdict {
	case Redirected, RefusedNoProxy:
		e.SentTo = netip.AddrPortFrom(loopback, rows.arrivalPort())
		e.Local, e.Listens = true, e.Verdict == Redirected
		return nil
	case Inbound, RefusedInboundNoProxy:
		e.SentTo = netip.AddrPortFrom(c.Destination.Addr(), rows.inboundPort())
		e.Local, e.Listens = true, e.Verdict == Inbound
		return nil
	case ToUpstream:
		e.SentTo = decodeAddrPort(rows.address.Listener, rows.address.Port)
	case ToDNS:
		e.SentTo = decodeAddrPort(rows.config.DnsAddr, rows.config.DnsPort)
		if !e.SentTo.Addr().IsLoopback() {
			return nil
		}
	case Local, InboundExcluded, GuardAudited:
	default:
		return nil
	}
	to := c.Destination
	if e.SentTo.IsValid() {
		to = e.SentTo
	}
	ns, err := openNamespaceOf(r)
	if err != nil {
		return err
	}
	defer ns.Close()
	sockets, err := ns.listening()
	e.Local = err == nil
	for _, s := range sockets {
		addr := s.addr.Unmap()
		family := addr.Is4() == to.Addr().Is4() || addr.Is6() && addr.IsUnspecified() && !s.v6only
		e.Listens = e.Listens || s.port == to.Port() && family && (addr == to.Addr() || addr.IsUnspecified())
	}
	return err
}
