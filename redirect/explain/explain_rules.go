// SPDX-License-Identifier: MPL-2.0

package explain

import (
	"fmt"
	"net/netip"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
)

// Snapshot is what the programs read of a workload's rows for one connection.
type Snapshot struct {
	Config      *bpfmap.BpfConfig // nil: the rows are lost
	proxies     map[uint32]bpfmap.BpfProxy
	Address     *bpfmap.BpfAddress // of the destination
	ownRemote   bool               // whoever connects from outside shows an own address
	uidExcluded bool
	portOut     bool
	portIn      bool
	cidr        bool
	service     *uint32 // what an inbound port means beside the first proxy
	listeners   map[bpfmap.BpfListenerKey]bool
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

func (s *Snapshot) has(flag bpfmap.BpfConfigFlag) bool { return s.Config.Flags&flag != 0 }

// listens reports whether a registered listener of the role is on the port.
func (s *Snapshot) listens(role bpfmap.BpfListenerRole, port uint16) bool {
	return s.listeners[bpfmap.BpfListenerKey{Role: role, Port: port}]
}

// outboundProxy is the proxy that a redirected connection goes to, and its port.
func (s *Snapshot) outboundProxy() (proxy bpfmap.BpfProxy, port uint16) {
	if s.Address != nil && s.Address.Kind == bpfmap.BpfAddressKindADDRESS_PROXY {
		return s.proxies[uint32(s.Address.Seat)], s.Address.Port
	}
	return s.proxies[uint32(s.Config.Seat)], s.Config.OutboundPort
}

// ArrivalPort is where sk_lookup looks for the listener of a redirected connection.
func (s *Snapshot) ArrivalPort() uint16 {
	_, port := s.outboundProxy()
	if !s.has(bpfmap.BpfConfigFlagCONFIG_PROXIES) || port == 0 {
		return s.Config.OutboundPort
	}
	return port
}

// finding is what one rule says of a connection.
type finding struct {
	detail  string
	matches bool
	decides bool
	verdict bpfmap.Verdict
}

func passes(detail string, args ...any) finding { return finding{detail: fmt.Sprintf(detail, args...)} }

func notes(detail string, args ...any) finding {
	return finding{detail: fmt.Sprintf(detail, args...), matches: true}
}

func decides(verdict bpfmap.Verdict, detail string, args ...any) finding {
	return finding{detail: fmt.Sprintf(detail, args...), matches: true, decides: true, verdict: verdict}
}

// rule is one test that the programs make.
type rule struct {
	name string
	ask  func(s *Snapshot, c Connection) finding
}

// Evaluate asks the rules in order until one decides.
func Evaluate(s *Snapshot, c Connection) (steps []Step, verdict bpfmap.Verdict) {
	rules := outboundRules()
	if c.Inbound() {
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
	return steps, bpfmap.Direct // no list ends without a rule that decides
}

func askRows(s *Snapshot, _ Connection) finding {
	if s.Config == nil {
		return decides(bpfmap.RefusedTable, "the rows of the workload are lost")
	}
	return passes("the rows of the workload are in force")
}

// outboundRules are those of decide() in bpf/rules.h, for a socket that is bound to nothing,
// and then those that a redirected connection meets on lo, in bpf/lookup.c.
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

func askEncoded(_ *Snapshot, c Connection) finding {
	if _, encoded := workload.DecodeIndex(c.Destination.Addr()); encoded {
		return decides(bpfmap.RefusedEncoded, "%s is in the range that carries destinations to the proxy", c.Destination.Addr())
	}
	return passes("%s is not in the range that carries destinations to the proxy", c.Destination.Addr())
}

func askDNS(s *Snapshot, c Connection) finding {
	server := bpfmap.DecodeAddr(s.Config.DnsAddr)
	to := netip.AddrPortFrom(server, s.Config.DnsPort)
	switch {
	case !s.has(bpfmap.BpfConfigFlagCONFIG_DNS):
		return passes("DNS is not sent to Consul")
	case c.Destination.Port() != workload.DefaultDNSPort:
		return passes("port %d is not DNS", c.Destination.Port())
	case !s.has(bpfmap.BpfConfigFlagCONFIG_DNS_ANY) && server != c.Destination.Addr():
		return passes("%s is not the resolver %s", c.Destination.Addr(), server)
	case !server.Is4() && c.IPv4Socket():
		return decides(bpfmap.RefusedFamily, "an IPv4 socket cannot be sent to the resolver %s", to)
	}
	return decides(bpfmap.ToDNS, "DNS is sent to Consul's resolver %s", to)
}

func askProxy(s *Snapshot, c Connection) finding {
	if c.UID != s.Config.ProxyUid {
		return passes("the UID is not the proxy's, which is %d", s.Config.ProxyUid)
	}
	proxyIDs := []uint32{uint32(s.Config.Seat)}
	if s.has(bpfmap.BpfConfigFlagCONFIG_PROXIES) {
		proxyIDs = nil
		for proxyID := range uint32(workload.MaxProxies) {
			if s.Config.Seats>>proxyID&1 != 0 {
				proxyIDs = append(proxyIDs, proxyID)
			}
		}
	}
	for _, proxyID := range proxyIDs {
		proxy := s.proxies[proxyID]
		if proxy.Cgroup == 0 {
			return decides(bpfmap.Proxy, "UID %d is the proxy's, and its cgroup is not known yet: the UID alone decides", c.UID)
		}
		if c.Proxy || proxy.Cgroup == c.Cgroup {
			return decides(bpfmap.Proxy, "UID %d and cgroup %d are the proxy's", c.UID, proxy.Cgroup)
		}
	}
	return passes("UID %d is the proxy's, the cgroup is not: a task that runs under the same UID", c.UID)
}

func askUID(s *Snapshot, c Connection) finding {
	switch {
	case !s.has(bpfmap.BpfConfigFlagCONFIG_UIDS):
		return passes("no UID is excluded")
	case s.uidExcluded:
		return decides(bpfmap.UIDExcluded, "UID %d is excluded", c.UID)
	case c.UID == NoUID:
		return passes("no UID was named, so none that is excluded")
	}
	return passes("UID %d is not excluded", c.UID)
}

func askLoopback(_ *Snapshot, c Connection) finding {
	if isLocal(c.Destination.Addr()) {
		return decides(bpfmap.Local, "%s stays in the namespace", c.Destination.Addr())
	}
	return passes("%s is not a loopback address", c.Destination.Addr())
}

func askOwn(s *Snapshot, c Connection) finding {
	if s.Address != nil && s.Address.Kind == bpfmap.BpfAddressKindADDRESS_OWN {
		return decides(bpfmap.Local, "%s is the allocation's own address", c.Destination.Addr())
	}
	return passes("%s is not an address of the allocation", c.Destination.Addr())
}

func askUpstream(s *Snapshot, c Connection) finding {
	switch {
	case s.Address == nil:
	case s.Address.Kind == bpfmap.BpfAddressKindADDRESS_PROXY:
		return notes("%s belongs to a proxy beside the first, which listens on port %d", c.Destination.Addr(), s.Address.Port)
	case s.Address.Kind == bpfmap.BpfAddressKindADDRESS_UPSTREAM:
		listener := bpfmap.DecodeAddrPort(s.Address.Listener, s.Address.Port)
		if !listener.Addr().Is4() && c.IPv4Socket() {
			return decides(bpfmap.RefusedFamily, "an IPv4 socket cannot be sent to the upstream's listener %s", listener)
		}
		return decides(bpfmap.ToUpstream, "%s is a virtual IP of an upstream: sent to its listener %s", c.Destination.Addr(), listener)
	}
	return passes("%s is no virtual IP of an explicit upstream", c.Destination.Addr())
}

func askPort(s *Snapshot, c Connection) finding {
	if s.portOut {
		return decides(bpfmap.PortExcluded, "outbound port %d is excluded", c.Destination.Port())
	}
	return passes("outbound port %d is not excluded", c.Destination.Port())
}

func askCIDR(s *Snapshot, c Connection) finding {
	if s.cidr {
		return decides(bpfmap.CIDRExcluded, "%s is in an excluded CIDR", c.Destination.Addr())
	}
	return passes("%s is in no excluded CIDR", c.Destination.Addr())
}

func askMode(s *Snapshot, _ Connection) finding {
	if !s.has(bpfmap.BpfConfigFlagCONFIG_TRANSPARENT) {
		switch {
		case s.has(bpfmap.BpfConfigFlagCONFIG_EGRESS_ENFORCE):
			return decides(bpfmap.RefusedEgress, "the allocation is not in transparent mode, and the egress guard refuses what passes the proxy")
		case s.has(bpfmap.BpfConfigFlagCONFIG_EGRESS_AUDIT):
			return decides(bpfmap.EgressAudited, "the allocation is not in transparent mode, and the egress guard counts what passes the proxy")
		}
		return decides(bpfmap.Direct, "the allocation is not in transparent mode: only explicit upstreams are the proxy's")
	}
	return passes("the allocation is in transparent mode: what no rule exempts is redirected")
}

func askBroadcast(s *Snapshot, c Connection) finding {
	if isMulticast(c.Destination.Addr()) || s.Address != nil && s.Address.Kind == bpfmap.BpfAddressKindADDRESS_BROADCAST {
		return decides(bpfmap.RefusedBroadcast, "TCP has no multicast and no broadcast, and %s is one", c.Destination.Addr())
	}
	return passes("%s is neither multicast nor broadcast", c.Destination.Addr())
}

// encoded is the family in which the destination is carried to the proxy: encode() in
// bpf/rules.h, for a socket that is bound to nothing and takes both families where it is IPv6.
func (s *Snapshot) encoded(c Connection) (use4, use6 bool) {
	const both = bpfmap.BpfProxyFlagPROXY_LISTENS4 | bpfmap.BpfProxyFlagPROXY_LISTENS6
	proxy, port := s.outboundProxy()
	use4, use6 = true, !c.IPv4Socket() && s.has(bpfmap.BpfConfigFlagCONFIG_IPV6)
	switch proxy.Flags & both {
	case both:
		four, six := s.listens(bpfmap.BpfListenerRoleLISTENER_OUTBOUND4, port), s.listens(bpfmap.BpfListenerRoleLISTENER_OUTBOUND6, port)
		switch {
		case six && use6 && !c.Destination.Addr().Is4():
			use4 = false
		case use6 && six:
			use4 = four
		default:
			use6 = false
		}
		if !use6 && c.IPv4Socket() && six && !four {
			use4 = false
		}
	case bpfmap.BpfProxyFlagPROXY_LISTENS6:
		use4 = false
	default:
		use6 = false
	}
	return use4, use6
}

func askFamily(s *Snapshot, c Connection) finding {
	switch use4, use6 := s.encoded(c); {
	case use4:
		return passes("the proxy takes it by IPv4")
	case use6:
		return passes("the proxy takes it by IPv6")
	}
	return decides(bpfmap.RefusedFamily, "the socket and the proxy's outbound listener have no address family in common")
}

func askBudget(s *Snapshot, c Connection) finding {
	rows := s.origin
	switch {
	case rows.known:
		return passes("%s is held already, as one of %d destinations", c.Destination.Addr(), rows.held)
	case !rows.counted:
		return decides(bpfmap.RefusedTable, "the count of the workload's destinations is lost")
	case rows.held >= s.Config.Budget:
		return decides(bpfmap.RefusedBudget, "the workload holds %d destinations, of %d that it may", rows.held, s.Config.Budget)
	case rows.held >= bpfmap.OriginShare && rows.heldByAll >= rows.highWater:
		return decides(bpfmap.RefusedShare, "the node's table is nearly full (%d destinations), and the workload holds %d, more than its share of %d",
			rows.heldByAll, rows.held, bpfmap.OriginShare)
	}
	return passes("the workload holds %d destinations, of %d that it may", rows.held, s.Config.Budget)
}

func askListener(s *Snapshot, c Connection) finding {
	role, port := bpfmap.BpfListenerRole(bpfmap.BpfListenerRoleLISTENER_OUTBOUND4), s.ArrivalPort()
	if use4, _ := s.encoded(c); !use4 {
		role = bpfmap.BpfListenerRoleLISTENER_OUTBOUND6
	}
	if !s.listens(role, port) {
		return decides(bpfmap.RefusedNoProxy, "the proxy does not listen on its outbound port %d", port)
	}
	return decides(bpfmap.Redirected, "the proxy listens on its outbound port %d: it gets the connection", port)
}

// isLocal is addr_is_local of bpf/addr.h.
func isLocal(addr netip.Addr) bool { return addr.IsLoopback() || addr.IsUnspecified() }

// isMulticast is addr_is_multicast there.
func isMulticast(addr netip.Addr) bool {
	return addr.IsMulticast() || addr == netip.AddrFrom4([4]byte{255, 255, 255, 255})
}
