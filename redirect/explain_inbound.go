// SPDX-License-Identifier: MPL-2.0

package redirect

// inboundRules are those of decide() in ../bpf/lookup.c, for a TCP connection from outside.
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

func askInboundMode(s *snapshot, _ Connection) finding {
	switch {
	case s.has(bpfConfigFlagCONFIG_TRANSPARENT):
		return passes("the allocation is in transparent mode: what no rule exempts goes to the proxy")
	case s.has(bpfConfigFlagCONFIG_AUDIT):
		return passes("the allocation is not in transparent mode, and the guard counts what passes the proxy")
	case s.has(bpfConfigFlagCONFIG_ENFORCE):
		return passes("the allocation is not in transparent mode, and the guard refuses what passes the proxy")
	}
	return decides(Direct, "the allocation is not in transparent mode, and its guard is off")
}

func askInside(s *snapshot, c Connection) finding {
	from := c.From.Addr()
	if from == c.Destination.Addr() || isLocal(from) || s.ownRemote {
		return decides(Local, "%s is an address of the namespace itself", from)
	}
	return passes("%s is outside of the namespace", from)
}

func askInboundPort(s *snapshot, c Connection) finding {
	if s.portIn {
		return decides(InboundExcluded, "inbound port %d is open: whatever listens there gets the connection", c.Destination.Port())
	}
	return passes("inbound port %d is not open", c.Destination.Port())
}

// inboundPort is that of the proxy which owns the port that is dialled.
func (s *snapshot) inboundPort() uint16 {
	if s.service != nil && s.has(bpfConfigFlagCONFIG_PROXIES|bpfConfigFlagCONFIG_LISTENERS) {
		return uint16(*s.service)
	}
	return s.config.InboundPort
}

// proxyListensThere reports whether the port is open to a listener of the proxy alone.
func (s *snapshot) proxyListensThere() bool {
	return s.service != nil && s.has(bpfConfigFlagCONFIG_PROXIES|bpfConfigFlagCONFIG_LISTENERS) && *s.service&proxyListensHere != 0
}

func askService(s *snapshot, c Connection) finding {
	port := c.Destination.Port()
	switch {
	case s.proxyListensThere():
		return notes("port %d is for a listener of the proxy itself, and for nobody else", port)
	case s.inboundPort() != s.config.InboundPort:
		return notes("port %d belongs to the proxy with inbound port %d", port, s.inboundPort())
	}
	return passes("port %d belongs to the first proxy", port)
}

func askGuard(s *snapshot, c Connection) finding {
	switch {
	case s.has(bpfConfigFlagCONFIG_TRANSPARENT) || s.proxyListensThere():
		return passes("the guard has no say: the connection is the proxy's")
	case c.Destination.Port() == s.inboundPort():
		return decides(Direct, "port %d is the proxy's inbound port", c.Destination.Port())
	}
	return s.guardRefusal("port %d is neither the proxy's nor open", c.Destination.Port())
}

func (s *snapshot) guardRefusal(detail string, args ...any) finding {
	if s.has(bpfConfigFlagCONFIG_ENFORCE) {
		return decides(RefusedGuard, detail+": the guard refuses it", args...)
	}
	return decides(GuardAudited, detail+": the guard counts it", args...)
}

func askInboundKnown(s *snapshot, _ Connection) finding {
	if s.inboundPort() == 0 {
		return decides(RefusedInboundUnknown, "the proxy's inbound port is not known yet")
	}
	return passes("the proxy's inbound port is %d", s.inboundPort())
}

func askInboundListener(s *snapshot, c Connection) finding {
	role, port := bpfListenerRole(bpfListenerRoleLISTENER_INBOUND4), s.inboundPort()
	if !c.Destination.Addr().Is4() {
		role = bpfListenerRoleLISTENER_INBOUND6
	}
	listens, transparent := s.listens(role, port), s.has(bpfConfigFlagCONFIG_TRANSPARENT)
	switch {
	case listens && transparent:
		return decides(Inbound, "the proxy listens on port %d: it gets the connection", port)
	case listens:
		return decides(InboundExcluded, "the proxy listens on port %d: it gets the connection", port)
	case transparent:
		return decides(RefusedInboundNoProxy, "the proxy does not listen on port %d", port)
	}
	return s.guardRefusal("the proxy does not listen on port %d", port)
}
