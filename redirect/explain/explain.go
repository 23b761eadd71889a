// SPDX-License-Identifier: MPL-2.0

// Package explain decides, from the rows in the kernel, what the programs would make
// of a connection, rule by rule.
package explain

import (
	"errors"
	"math"
	"net/netip"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
)

// NoUID is that of a task whose UID no rule names.
const NoUID = math.MaxUint32

// Connection is a TCP connection to explain. Its socket is bound to no address and no device
// and has no options; one that is may be refused where this one is not.
type Connection struct {
	Destination netip.AddrPort
	From        netip.AddrPort // who connects from outside; not valid: a task of the allocation connects
	UID         uint32         // of the task; NoUID: one that no rule names
	Cgroup      uint64         // of the task; 0: not the proxy's
	Proxy       bool           // it is a proxy, whatever its cgroup
	IPv6Socket  bool           // an IPv4 address is dialled through an IPv6 socket, as ::ffff:a.b.c.d
}

func (c Connection) Inbound() bool { return c.From.IsValid() }

func (c Connection) IPv4Socket() bool { return c.Destination.Addr().Is4() && !c.IPv6Socket }

// The rules in a Step. Names and results are promises.
const (
	RuleRows      = "rows"
	RuleEncoded   = "encoded_range"
	RuleDNS       = "dns"
	RuleProxy     = "proxy"
	RuleUID       = "excluded_uid"
	RuleLoopback  = "loopback"
	RuleOwn       = "own_address"
	RuleUpstream  = "upstream"
	RulePort      = "excluded_port"
	RuleCIDR      = "excluded_cidr"
	RuleMode      = "mode"
	RuleBroadcast = "broadcast"
	RuleFamily    = "family"
	RuleBudget    = "budget"
	RuleListener  = "listener"
	RuleInside    = "inside"
	RuleService   = "service_port"
	RuleGuard     = "guard"
	RuleInbound   = "inbound_port"

	ResultMatch   = "match"
	ResultNoMatch = "no_match"
)

// Step is one rule that a connection meets. The last one decides.
type Step struct {
	Rule   string `json:"rule"`
	Result string `json:"result"`
	Detail string `json:"detail"`
	Source string `json:"source"` // of the value that the rule looks at; empty: no value of a configuration
}

// Explanation is what the programs make of a connection.
type Explanation struct {
	Verdict bpfmap.Verdict
	Steps   []Step
	Service string         // behind the destination, where it is known
	SentTo  netip.AddrPort // the listener in the namespace that the connection is sent to; not valid: it goes where it was dialled
	Listens bool           // something listens there, or on the own address that was dialled
	Local   bool           // Listens says something: the connection stays in the namespace
	Held    bool           // it is not refused yet: the gate lets it wait for the proxy
}

func (c Connection) Unmapped() Connection {
	if c.Destination.Addr().Is4In6() {
		c.IPv6Socket = true
	}
	c.Destination = netip.AddrPortFrom(c.Destination.Addr().Unmap().WithZone(""), c.Destination.Port())
	if c.From.IsValid() {
		c.From = netip.AddrPortFrom(c.From.Addr().Unmap().WithZone(""), c.From.Port())
	}
	return c
}

// ReadSnapshot reads the rows that decide about a connection, all of one generation.
func ReadSnapshot(m *bpfmap.Tables, cookie uint64, c Connection) (*Snapshot, error) {
	const tries = 4 // GENERATION_TRIES
	for range tries {
		before, err := m.Generation(cookie)
		if err != nil {
			return nil, err
		}
		if before == 0 {
			return nil, errors.New("the kernel has no row of its namespace: its connections pass Weir by; run its CNI CHECK or restart the allocation")
		}
		rows, err := snapshotOf(m, cookie, before, c)
		if err != nil {
			return nil, err
		}
		after, err := m.Generation(cookie)
		if err != nil || before == after {
			return rows, err
		}
	}
	return nil, errors.New("its rows change faster than they can be read: try again")
}

func snapshotOf(m *bpfmap.Tables, cookie, generation uint64, c Connection) (*Snapshot, error) {
	s := &Snapshot{proxies: make(map[uint32]bpfmap.BpfProxy), listeners: make(map[bpfmap.BpfListenerKey]bool)}
	var config bpfmap.BpfConfig
	found, err := m.Get("configs", bpfmap.BpfConfigKey{Cookie: cookie, Generation: generation}, &config)
	if err != nil || !found {
		return s, err
	}
	s.Config = &config
	addr, port := c.Destination.Addr(), c.Destination.Port()
	if c.Inbound() {
		own, err := addressRow(m, cookie, generation, c.From.Addr())
		if err != nil {
			return nil, err
		}
		s.ownRemote = own != nil && own.Kind == bpfmap.BpfAddressKindADDRESS_OWN
	}
	var problems [8]error
	s.Address, problems[0] = addressRow(m, cookie, generation, addr)
	s.portOut, problems[1] = portRow(m, cookie, generation, bpfmap.BpfExclusionKindEXCLUSION_PORT_OUT, port)
	s.portIn, problems[2] = portRow(m, cookie, generation, bpfmap.BpfExclusionKindEXCLUSION_PORT_IN, port)
	exclusion := bpfmap.BpfExclusionKey{Cookie: cookie, Generation: generation, Kind: bpfmap.BpfExclusionKindEXCLUSION_UID, Value: c.UID}
	var value uint32
	s.uidExcluded, problems[3] = m.Get("exclusions", exclusion, &value)
	exclusion.Kind, exclusion.Value = bpfmap.BpfExclusionKindEXCLUSION_SERVICE, uint32(port)
	if found, problems[4] = m.Get("exclusions", exclusion, &value); found {
		s.service = &value
	}
	var family uint32
	whole := netip.PrefixFrom(addr, addr.BitLen())
	found, problems[5] = m.Get("cidrs", bpfmap.EncodeCIDR(whole, cookie, generation), &family)
	s.cidr = found && family == bpfmap.CidrFamily(whole)
	s.origin, problems[6] = readOriginRows(m, cookie, generation, s, addr)
	problems[7] = bpfmap.EachProxyID(cookie, math.MaxUint8, func(key bpfmap.BpfProxyKey) error {
		var proxy bpfmap.BpfProxy
		_, err := m.Get("proxies", key, &proxy)
		s.proxies[key.Seat] = proxy
		return err
	})
	if err := errors.Join(problems[:]...); err != nil {
		return nil, err
	}
	return s, readListeners(m, cookie, s)
}

func addressRow(m *bpfmap.Tables, cookie, generation uint64, addr netip.Addr) (*bpfmap.BpfAddress, error) {
	var row bpfmap.BpfAddress
	found, err := m.Get("addresses", bpfmap.BpfAddressKey{Cookie: cookie, Generation: generation, Addr: bpfmap.EncodeAddr(addr)}, &row)
	if !found {
		return nil, err
	}
	return &row, nil
}

func portRow(m *bpfmap.Tables, cookie, generation uint64, kind bpfmap.BpfExclusionKind, port uint16) (bool, error) {
	var row bpfmap.BpfPorts
	key := bpfmap.BpfExclusionKey{Cookie: cookie, Generation: generation, Kind: kind, Value: uint32(port) / bpfmap.PortsPerRow}
	_, err := m.Get("ports", key, &row)
	return row.Bits[port%bpfmap.PortsPerRow/64]>>(port%64)&1 != 0, err
}

// originRows reads what origin_intern in bpf/origin.h does.
func readOriginRows(m *bpfmap.Tables, cookie, generation uint64, s *Snapshot, addr netip.Addr) (rows originRows, err error) {
	origins, err := m.Table("origins")
	if err != nil {
		return rows, err
	}
	rows.highWater = bpfmap.HighWater(origins.MaxEntries())
	var budget bpfmap.BpfBudget
	if rows.counted, err = m.Get("budgets", cookie, &budget); err != nil {
		return rows, err
	}
	if rows.held, err = m.Held(cookie); err != nil {
		return rows, err
	}
	if rows.heldByAll, err = m.HeldByNode(); err != nil {
		return rows, err
	}
	var origin bpfmap.BpfOrigin
	found, err := m.Get("origins", bpfmap.BpfOriginKey{Cookie: cookie, Addr: bpfmap.EncodeAddr(addr)}, &origin)
	if err != nil || !found {
		return rows, err
	}
	var reverse bpfmap.BpfAddr
	found, err = m.Get("indexes", bpfmap.BpfIndexKey{Cookie: cookie, Index: origin.Index}, &reverse)
	rows.known = found && reverse == bpfmap.EncodeAddr(addr)
	if err != nil || !s.has(bpfmap.BpfConfigFlagCONFIG_SOURCES) {
		return rows, err
	}
	var slice uint32
	if _, err := m.Get("sources", bpfmap.EncodeCIDR(netip.PrefixFrom(addr, addr.BitLen()), cookie, generation), &slice); err != nil {
		return rows, err
	}
	rows.known = rows.known && origin.Index>>workload.SliceShift == slice
	return rows, nil
}

// readListeners reads which of the listeners that the rules may ask for are registered.
func readListeners(m *bpfmap.Tables, cookie uint64, s *Snapshot) error {
	_, outbound := s.outboundProxy()
	for _, key := range []bpfmap.BpfListenerKey{
		{Role: bpfmap.BpfListenerRoleLISTENER_OUTBOUND4, Port: outbound}, {Role: bpfmap.BpfListenerRoleLISTENER_OUTBOUND6, Port: outbound},
		{Role: bpfmap.BpfListenerRoleLISTENER_OUTBOUND4, Port: s.ArrivalPort()}, {Role: bpfmap.BpfListenerRoleLISTENER_OUTBOUND6, Port: s.ArrivalPort()},
		{Role: bpfmap.BpfListenerRoleLISTENER_INBOUND4, Port: s.InboundPort()}, {Role: bpfmap.BpfListenerRoleLISTENER_INBOUND6, Port: s.InboundPort()},
	} {
		if _, known := s.listeners[key]; known {
			continue
		}
		sockets, err := m.Registered(cookie, key.Role, key.Port)
		if err != nil {
			return err
		}
		s.listeners[key] = len(sockets) > 0
	}
	return nil
}
