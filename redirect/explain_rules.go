// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"net/netip"
)

// snapshot is what the programs read of a workload's rows for one connection.
type snapshot struct {
	config      *bpfConfig // nil: the rows are lost
	proxies     map[uint32]bpfProxy
	address     *bpfAddress // of the destination
	ownRemote   bool        // whoever connects from outside shows an own address
	uidExcluded bool
	portOut     bool
	portIn      bool
	cidr        bool
	service     *uint32 // what an inbound port means beside the first proxy
	listeners   map[bpfListenerKey]bool
	origin      originRows
}

// originRows are what decides whether a destination gets an index.
type originRows struct {
	known     bool // it has one already, in the slice of its network
	counted   bool // the row of the workload's budget is there
	held      uint32
	heldByAll uint32
	highWater uint32
}

func (s *snapshot) has(flag bpfConfigFlag) bool { return s.config.Flags&flag != 0 }

// listens reports whether a registered listener of the role is on the port.
func (s *snapshot) listens(role bpfListenerRole, port uint16) bool {
	return s.listeners[bpfListenerKey{Role: role, Port: port}]
}

// outboundProxy is the proxy that a redirected connection goes to, and its port.
func (s *snapshot) outboundProxy() (proxy bpfProxy, port uint16) {
	if s.address != nil && s.address.Kind == bpfAddressKindADDRESS_PROXY {
		return s.proxies[uint32(s.address.Seat)], s.address.Port
	}
	return s.proxies[uint32(s.config.Seat)], s.config.OutboundPort
}

// arrivalPort is where sk_lookup looks for the listener of a redirected connection.
func (s *snapshot) arrivalPort() uint16 {
	_, port := s.outboundProxy()
	if !s.has(bpfConfigFlagCONFIG_PROXIES) || port == 0 {
		return s.config.OutboundPort
	}
	return port
}

// finding is what one rule says of a connection.
type finding struct {
	detail  string
	matches bool
	decides bool
	verdict Verdict
}

func passes(detail string, args ...any) finding { return finding{detail: fmt.Sprintf(detail, args...)} }

func notes(detail string, args ...any) finding {
	return finding{detail: fmt.Sprintf(detail, args...), matches: true}
}

func decides(verdict Verdict, detail string, args ...any) finding {
	return finding{detail: fmt.Sprintf(detail, args...), matches: true, decides: true, verdict: verdict}
}

// rule is one test that the programs make.
type rule struct {
	name string
	ask  func(s *snapshot, c Connection) finding
}

// evaluate asks the rules in order until one decides.
func evaluate(s *snapshot, c Connection) (steps []Step, verdict Verdict) {
	rules := outboundRules()
	if c.inbound() {
		rules = inboundRules()
	}
	for _, rule := range rules {
		found := rule.ask(s, c)
		step := Step{Rule: rule.name, Result: ResultNoMatch, Detail: found.detail}
		if found.matches {
			step.Result = ResultMatch
		}
		steps = append(steps, step)
		if found.decides {
			return steps, found.verdict
		}
	}
	return steps, Direct // no list ends without a rule that decides
}

func askRows(s *snapshot, _ Connection) finding {
	if s.config == nil {
		return decides(RefusedTable, "the rows of the workload are lost")
	}
	return passes("the rows of the workload are in force")
}

// outboundRules are those of decide() in ../bpf/rules.h, for a socket that is bound to nothing,
// and then those that a redirected connection meets on lo, in ../bpf/lookup.c.
func outboundRules() []rule {
	return []rule{
		{RuleRows, askRows},
		{RuleEncoded, askEncoded},
		{RuleDNS, askDNS},
		{RuleProxy, askProxy},
		{RuleUID, askUID},
		{RuleLoopback, askLoopback},
		{RuleOwn, askOwn},
		{RuleUpstream, askUpstream},
		{RulePort, askPort},
		{RuleCIDR, askCIDR},
		{RuleMode, askMode},
		{RuleBroadcast, askBroadcast},
		{RuleFamily, askFamily},
		{RuleBudget, askBudget},
		{RuleListener, askListener},
	}
}

func askEncoded(_ *snapshot, c Connection) finding {
	if _, encoded := decodeIndex(c.Destination.Addr()); encoded {
		return decides(RefusedEncoded, "%s is in the range that carries destinations to the proxy", c.Destination.Addr())
	}
	return passes("%s is not in the range that carries destinations to the proxy", c.Destination.Addr())
}

func askDNS(s *snapshot, c Connection) finding {
	server := decodeAddr(s.config.DnsAddr)
	to := netip.AddrPortFrom(server, s.config.DnsPort)
	switch {
	case !s.has(bpfConfigFlagCONFIG_DNS):
		return passes("DNS is not sent to Consul")
	case c.Destination.Port() != DefaultDNSPort:
		return passes("port %d is not DNS", c.Destination.Port())
	case !s.has(bpfConfigFlagCONFIG_DNS_ANY) && server != c.Destination.Addr():
		return passes("%s is not the resolver %s", c.Destination.Addr(), server)
	case !server.Is4() && c.ipv4Socket():
		return decides(RefusedFamily, "an IPv4 socket cannot be sent to the resolver %s", to)
	}
	return decides(ToDNS, "DNS is sent to Consul's resolver %s", to)
}

func askProxy(s *snapshot, c Connection) finding {
	if c.UID != s.config.ProxyUid {
		return passes("the UID is not the proxy's, which is %d", s.config.ProxyUid)
	}
	proxyIDs := []uint32{uint32(s.config.Seat)}
	if s.has(bpfConfigFlagCONFIG_PROXIES) {
		proxyIDs = nil
		for proxyID := range uint32(MaxProxies) {
			if s.config.Seats>>proxyID&1 != 0 {
				proxyIDs = append(proxyIDs, proxyID)
			}
		}
	}
	for _, proxyID := range proxyIDs {
		proxy := s.proxies[proxyID]
		if proxy.Cgroup == 0 {
			return decides(Proxy, "UID %d is the proxy's, and its cgroup is not known yet: the UID alone decides", c.UID)
		}
		if c.Proxy || proxy.Cgroup == c.Cgroup {
			return decides(Proxy, "UID %d and cgroup %d are the proxy's", c.UID, proxy.Cgroup)
		}
	}
	return passes("UID %d is the proxy's, the cgroup is not: a task that runs under the same UID", c.UID)
}

func askUID(s *snapshot, c Connection) finding {
	switch {
	case !s.has(bpfConfigFlagCONFIG_UIDS):
		return passes("no UID is excluded")
	case s.uidExcluded:
		return decides(UIDExcluded, "UID %d is excluded", c.UID)
	case c.UID == NoUID:
		return passes("no UID was named, so none that is excluded")
	}
	return passes("UID %d is not excluded", c.UID)
}

func askLoopback(_ *snapshot, c Connection) finding {
	if isLocal(c.Destination.Addr()) {
		return decides(Local, "%s stays in the namespace", c.Destination.Addr())
	}
	return passes("%s is not a loopback address", c.Destination.Addr())
}

func askOwn(s *snapshot, c Connection) finding {
	if s.address != nil && s.address.Kind == bpfAddressKindADDRESS_OWN {
		return decides(Local, "%s is the allocation's own address", c.Destination.Addr())
	}
	return passes("%s is not an address of the allocation", c.Destination.Addr())
}

func askUpstream(s *snapshot, c Connection) finding {
	switch {
	case s.address == nil:
	case s.address.Kind == bpfAddressKindADDRESS_PROXY:
		return notes("%s belongs to a proxy beside the first, which listens on port %d", c.Destination.Addr(), s.address.Port)
	case s.address.Kind == bpfAddressKindADDRESS_UPSTREAM:
		listener := decodeAddrPort(s.address.Listener, s.address.Port)
		if !listener.Addr().Is4() && c.ipv4Socket() {
			return decides(RefusedFamily, "an IPv4 socket cannot be sent to the upstream's listener %s", listener)
		}
		return decides(ToUpstream, "%s is a virtual IP of an upstream: sent to its listener %s", c.Destination.Addr(), listener)
	}
	return passes("%s is no virtual IP of an explicit upstream", c.Destination.Addr())
}

func askPort(s *snapshot, c Connection) finding {
	if s.portOut {
		return decides(PortExcluded, "outbound port %d is excluded", c.Destination.Port())
	}
	return passes("outbound port %d is not excluded", c.Destination.Port())
}

func askCIDR(s *snapshot, c Connection) finding {
	if s.cidr {
		return decides(CIDRExcluded, "%s is in an excluded CIDR", c.Destination.Addr())
	}
	return passes("%s is in no excluded CIDR", c.Destination.Addr())
}

func askMode(s *snapshot, _ Connection) finding {
	if !s.has(bpfConfigFlagCONFIG_TRANSPARENT) {
		return decides(Direct, "the allocation is not in transparent mode: only explicit upstreams are the proxy's")
	}
	return passes("the allocation is in transparent mode: what no rule exempts is redirected")
}

func askBroadcast(s *snapshot, c Connection) finding {
	if isMulticast(c.Destination.Addr()) || s.address != nil && s.address.Kind == bpfAddressKindADDRESS_BROADCAST {
		return decides(RefusedBroadcast, "TCP has no multicast and no broadcast, and %s is one", c.Destination.Addr())
	}
	return passes("%s is neither multicast nor broadcast", c.Destination.Addr())
}

// encoded is the family in which the destination is carried to the proxy: encode() in
// ../bpf/rules.h, for a socket that is bound to nothing and takes both families where it is IPv6.
func (s *snapshot) encoded(c Connection) (use4, use6 bool) {
	const both = bpfProxyFlagPROXY_LISTENS4 | bpfProxyFlagPROXY_LISTENS6
	proxy, port := s.outboundProxy()
	use4, use6 = true, !c.ipv4Socket() && s.has(bpfConfigFlagCONFIG_IPV6)
	switch proxy.Flags & both {
	case both:
		four, six := s.listens(bpfListenerRoleLISTENER_OUTBOUND4, port), s.listens(bpfListenerRoleLISTENER_OUTBOUND6, port)
		switch {
		case six && use6 && !c.Destination.Addr().Is4():
			use4 = false
		case use6 && six:
			use4 = four
		default:
			use6 = false
		}
		if !use6 && c.ipv4Socket() && six && !four {
			use4 = false
		}
	case bpfProxyFlagPROXY_LISTENS6:
		use4 = false
	default:
		use6 = false
	}
	return use4, use6
}

func askFamily(s *snapshot, c Connection) finding {
	switch use4, use6 := s.encoded(c); {
	case use4:
		return passes("the proxy takes it by IPv4")
	case use6:
		return passes("the proxy takes it by IPv6")
	}
	return decides(RefusedFamily, "the socket and the proxy's outbound listener have no address family in common")
}

func askBudget(s *snapshot, c Connection) finding {
	rows := s.origin
	switch {
	case rows.known:
		return passes("%s is held already, as one of %d destinations", c.Destination.Addr(), rows.held)
	case !rows.counted:
		return decides(RefusedTable, "the count of the workload's destinations is lost")
	case rows.held >= s.config.Budget:
		return decides(RefusedBudget, "the workload holds %d destinations, of %d that it may", rows.held, s.config.Budget)
	case rows.held >= originShare && rows.heldByAll >= rows.highWater:
		return decides(RefusedShare, "the node's table is nearly full (%d destinations), and the workload holds %d, more than its share of %d",
			rows.heldByAll, rows.held, originShare)
	}
	return passes("the workload holds %d destinations, of %d that it may", rows.held, s.config.Budget)
}

func askListener(s *snapshot, c Connection) finding {
	role, port := bpfListenerRole(bpfListenerRoleLISTENER_OUTBOUND4), s.arrivalPort()
	if use4, _ := s.encoded(c); !use4 {
		role = bpfListenerRoleLISTENER_OUTBOUND6
	}
	if !s.listens(role, port) {
		return decides(RefusedNoProxy, "the proxy does not listen on its outbound port %d", port)
	}
	return decides(Redirected, "the proxy listens on its outbound port %d: it gets the connection", port)
}

// isLocal is addr_is_local of ../bpf/addr.h.
func isLocal(addr netip.Addr) bool { return addr.IsLoopback() || addr.IsUnspecified() }

// isMulticast is addr_is_multicast there.
func isMulticast(addr netip.Addr) bool {
	return addr.IsMulticast() || addr == netip.AddrFrom4([4]byte{255, 255, 255, 255})
}
