// SPDX-License-Identifier: MPL-2.0

package inspect

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/explain"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// Explain decides what the programs would make of a connection now, rule by rule, from the
// rows in the kernel. It takes no lock and changes nothing.
func (d *Reader) Explain(key workload.AttachmentID, c explain.Connection) (explain.Explanation, error) {
	r, err := d.paths.ReadRecord(key)
	if err != nil {
		return explain.Explanation{}, fmt.Errorf("explain %s: %w", key, err)
	}
	tables, err := bpfmap.OpenTablesToRead(d.paths.Maps())
	if err != nil {
		return explain.Explanation{}, err
	}
	defer tables.Close()
	inForce, err := d.InForce(r.NetNS)
	if err != nil {
		return explain.Explanation{}, fmt.Errorf("explain %s: %w", key, err)
	}
	if !inForce {
		return explain.Explanation{}, fmt.Errorf("explain %s: its programs are not in force, so its connections pass or are refused unseen: run 'weir load', then its CNI CHECK or restart the allocation", key)
	}
	c = c.Unmapped()
	rows, err := explain.ReadSnapshot(tables, r.Cookie, c)
	if err != nil {
		return explain.Explanation{}, fmt.Errorf("explain %s: %w", key, err)
	}
	steps, verdict := explain.Evaluate(rows, c)
	e := explain.Explanation{Verdict: verdict, Steps: steps, Service: explain.ServiceBehind(r, c)}
	for i := range e.Steps {
		e.Steps[i].Source = explain.SourceOf(r, &e.Steps[i], c)
	}
	if verdict == bpfmap.RefusedNoProxy {
		if e.Held, err = tables.GateHolds(r.Cookie, rows.ArrivalPort(), false); err != nil {
			return e, fmt.Errorf("explain %s: %w", key, err)
		}
	}
	if err := lookBehind(&e, r, rows, c); err != nil || !e.Local || e.Listens || verdict.Refused() {
		return e, err
	}
	port := c.Destination.Port()
	if e.SentTo.IsValid() {
		port = e.SentTo.Port()
	}
	if e.Held, err = tables.GateHolds(r.Cookie, port, true); err != nil {
		return e, fmt.Errorf("explain %s: %w", key, err)
	}
	return e, nil
}

// Settings is all that decides about a workload's connections: where each value comes from, and
// whether its proxies listen. It takes no lock.
func (d *Reader) Settings(key workload.AttachmentID) (list []explain.Setting, silent bool, err error) {
	r, err := d.paths.ReadRecord(key)
	if err != nil {
		return nil, false, fmt.Errorf("explain %s: %w", key, err)
	}
	tables, err := bpfmap.OpenTablesToRead(d.paths.Maps())
	if err != nil {
		return nil, false, err
	}
	defer tables.Close()
	w := r.Desired()
	served, err := tables.Served(r.Cookie, w)
	if err != nil {
		return nil, false, fmt.Errorf("explain %s: %w", key, err)
	}
	add := func(name, value, source string) {
		if value != "" {
			list = append(list, explain.Setting{Name: name, Value: value, Source: source})
		}
	}
	add("mode", string(w.Mode), explain.Either(r.Request.Mode == "", explain.SourceDefault, explain.SourceJob))
	add("proxy UID", fmt.Sprint(w.ProxyUID), explain.SourceJob)
	for _, port := range w.MeshPorts() {
		four, six := bpfmap.ListenerRoles(port)
		listens := served[bpfmap.ListenerKey(r.Cookie, four, port.Port, 0)] || served[bpfmap.ListenerKey(r.Cookie, six, port.Port, 0)]
		name, source := "inbound port", explain.PortSource(r, port.Port, r.Request.InboundPort)
		if port.Outbound {
			name, source = "outbound port", explain.PortSource(r, port.Port, r.Request.OutboundPort)
			if w.Mode != workload.ModeTransparent {
				continue // nothing is sent there
			}
		}
		silent = silent || !listens
		add(name, fmt.Sprintf("%d, the proxy %s", port.Port, explain.Either(listens, "listens", "does not listen")), source)
	}
	if w.InboundPort == 0 {
		add("inbound port", "not known yet", explain.SourceConsul)
	}
	add("own addresses", explain.Join(w.Addresses), explain.SourceNode)
	add("DNS sent to", explain.DNSText(w.DNS), explain.SourceJob)
	guard := explain.Step{Rule: explain.RuleGuard}
	add("guard", explain.Either(w.Guard == "", string(workload.GuardOff), string(w.Guard)), explain.SourceOf(r, &guard, explain.Connection{}))
	add("open inbound ports", explain.Join(w.ExcludeInboundPorts), explain.Either(len(r.Request.ExcludeInboundPorts) == len(w.ExcludeInboundPorts), explain.SourceJob,
		explain.Either(len(r.Request.ExcludeInboundPorts) == 0, explain.SourceConsul, explain.SourceJob+", "+explain.SourceConsul)))
	add("ports of the proxy alone", explain.Join(r.MeshConfig.ExposedPorts), explain.SourceConsul)
	add("excluded outbound ports", explain.Join(w.ExcludeOutboundPorts), explain.SourceJob)
	add("excluded CIDRs", explain.Join(w.ExcludeOutboundCIDRs), explain.SourceJob)
	add("excluded UIDs", explain.Join(w.ExcludeUIDs), explain.SourceJob)
	for _, upstream := range w.Upstreams {
		add("upstream "+upstream.Name, strings.TrimSpace(fmt.Sprintf("%s %s", upstream.Listener, explain.Join(upstream.Addresses))), explain.SourceConsul)
	}
	held, err := tables.Held(r.Cookie)
	add("destinations", fmt.Sprintf("%d of %d", held, w.Budget), explain.Either(w.Budget == workload.DefaultBudget, explain.SourceDefault, explain.SourceJob))
	return list, silent, err
}

// lookBehind finds where a connection that stays in the namespace ends.
func lookBehind(e *explain.Explanation, r *store.Record, rows *explain.Snapshot, c explain.Connection) error {
	loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	switch e.Verdict {
	case bpfmap.Redirected, bpfmap.RefusedNoProxy:
		e.SentTo = netip.AddrPortFrom(loopback, rows.ArrivalPort())
		e.Local, e.Listens = true, e.Verdict == bpfmap.Redirected
		return nil
	case bpfmap.Inbound, bpfmap.RefusedInboundNoProxy:
		e.SentTo = netip.AddrPortFrom(c.Destination.Addr(), rows.InboundPort())
		e.Local, e.Listens = true, e.Verdict == bpfmap.Inbound
		return nil
	case bpfmap.ToUpstream:
		e.SentTo = bpfmap.DecodeAddrPort(rows.Address.Listener, rows.Address.Port)
	case bpfmap.ToDNS:
		e.SentTo = bpfmap.DecodeAddrPort(rows.Config.DnsAddr, rows.Config.DnsPort)
		if !e.SentTo.Addr().IsLoopback() {
			return nil
		}
	case bpfmap.Local, bpfmap.InboundExcluded, bpfmap.GuardAudited:
	default:
		return nil
	}
	to := c.Destination
	if e.SentTo.IsValid() {
		to = e.SentTo
	}
	ns, err := OpenNamespaceOf(r)
	if err != nil {
		return err
	}
	defer ns.Close()
	sockets, err := ns.Listening()
	e.Local = err == nil
	for _, s := range sockets {
		addr := s.Addr.Unmap()
		family := addr.Is4() == to.Addr().Is4() || addr.Is6() && addr.IsUnspecified() && !s.V6Only
		e.Listens = e.Listens || s.Port == to.Port() && family && (addr == to.Addr() || addr.IsUnspecified())
	}
	return err
}
