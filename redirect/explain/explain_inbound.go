// SPDX-License-Identifier: MPL-2.0

package explain

import "github.com/weirmesh/weir/redirect/bpfmap"

// inboundRules are those of decide() in bpf/lookup.c, for a TCP connection from outside.
func inboundRules() []rule {
	return []rule{
		{RuleEncoded, askEncoded},
		{RuleRows, askRows},
		{RuleMode, askInboundMode},
		{RuleInside, askInside},
		{RulePort, askInboundPort},
		{RuleService, askService},
		{RuleGuard, askGuard},
		{RuleInbound, askInboundKnown},
		{RuleListener, askInboundListener},
	}
}

func askInboundMode(s *Snapshot, _ Connection) finding {
	switch {
	case s.has(bpfmap.BpfConfigFlagCONFIG_TRANSPARENT):
		return passes("the allocation is in transparent mode: what no rule exempts goes to the proxy")
	case s.has(bpfmap.BpfConfigFlagCONFIG_AUDIT):
		return passes("the allocation is not in transparent mode, and the guard counts what passes the proxy")
	case s.has(bpfmap.BpfConfigFlagCONFIG_ENFORCE):
		return passes("the allocation is not in transparent mode, and the guard refuses what passes the proxy")
	}
	return decides(bpfmap.Direct, "the allocation is not in transparent mode, and its guard is off")
}

func askInside(s *Snapshot, c Connection) finding {
	from := c.From.Addr()
	if from == c.Destination.Addr() || isLocal(from) || s.ownRemote {
		return decides(bpfmap.Local, "%s is an address of the namespace itself", from)
	}
	return passes("%s is outside of the namespace", from)
}

func askInboundPort(s *Snapshot, c Connection) finding {
	if s.portIn {
		return decides(bpfmap.InboundExcluded, "inbound port %d is open: whatever listens there gets the connection", c.Destination.Port())
	}
	return passes("inbound port %d is not open", c.Destination.Port())
}

// InboundPort is that of the proxy which owns the port that is dialled.
func (s *Snapshot) InboundPort() uint16 {
	if s.service != nil && s.has(bpfmap.BpfConfigFlagCONFIG_PROXIES|bpfmap.BpfConfigFlagCONFIG_LISTENERS) {
		return uint16(*s.service)
	}
	return s.Config.InboundPort
}

// proxyListensThere reports whether the port is open to a listener of the proxy alone.
func (s *Snapshot) proxyListensThere() bool {
	return s.service != nil && s.has(bpfmap.BpfConfigFlagCONFIG_PROXIES|bpfmap.BpfConfigFlagCONFIG_LISTENERS) && *s.service&bpfmap.ProxyListensHere != 0
}

func askService(s *Snapshot, c Connection) finding {
	port := c.Destination.Port()
	switch {
	case s.proxyListensThere():
		return notes("port %d is for a listener of the proxy itself, and for nobody else", port)
	case s.InboundPort() != s.Config.InboundPort:
		return notes("port %d belongs to the proxy with inbound port %d", port, s.InboundPort())
	}
	return passes("port %d belongs to the first proxy", port)
}

func askGuard(s *Snapshot, c Connection) finding {
	switch {
	case s.has(bpfmap.BpfConfigFlagCONFIG_TRANSPARENT) || s.proxyListensThere():
		return passes("the guard has no say: the connection is the proxy's")
	case c.Destination.Port() == s.InboundPort():
		return decides(bpfmap.Direct, "port %d is the proxy's inbound port", c.Destination.Port())
	}
	return s.guardRefusal("port %d is neither the proxy's nor open", c.Destination.Port())
}

func (s *Snapshot) guardRefusal(detail string, args ...any) finding {
	if s.has(bpfmap.BpfConfigFlagCONFIG_ENFORCE) {
		return decides(bpfmap.RefusedGuard, detail+": the guard refuses it", args...)
	}
	return decides(bpfmap.GuardAudited, detail+": the guard counts it", args...)
}

func askInboundKnown(s *Snapshot, _ Connection) finding {
	if s.InboundPort() == 0 {
		return decides(bpfmap.RefusedInboundUnknown, "the proxy's inbound port is not known yet")
	}
	return passes("the proxy's inbound port is %d", s.InboundPort())
}

func askInboundListener(s *Snapshot, c Connection) finding {
	role, port := bpfmap.BpfListenerRole(bpfmap.BpfListenerRoleLISTENER_INBOUND4), s.InboundPort()
	if !c.Destination.Addr().Is4() {
		role = bpfmap.BpfListenerRoleLISTENER_INBOUND6
	}
	listens, transparent := s.listens(role, port), s.has(bpfmap.BpfConfigFlagCONFIG_TRANSPARENT)
	switch {
	case listens && transparent:
		return decides(bpfmap.Inbound, "the proxy listens on port %d: it gets the connection", port)
	case listens:
		return decides(bpfmap.InboundExcluded, "the proxy listens on port %d: it gets the connection", port)
	case transparent:
		return decides(bpfmap.RefusedInboundNoProxy, "the proxy does not listen on port %d", port)
	}
	return s.guardRefusal("the proxy does not listen on port %d", port)
}
