// SPDX-License-Identifier: MPL-2.0

package bpfmap

import (
	"fmt"
)

// Verdict is what a program decided about one socket. The names are those of
// enum verdict in bpf/maps.h, in lower case.
type Verdict uint32

// The verdicts: what lets a connection go on, in the order of the rules, what
// concerns a listener, what refuses a connection.
const (
	Redirected              = Verdict(BpfVerdictVERDICT_REDIRECTED)
	Proxy                   = Verdict(BpfVerdictVERDICT_PROXY)
	UIDExcluded             = Verdict(BpfVerdictVERDICT_UID_EXCLUDED)
	Local                   = Verdict(BpfVerdictVERDICT_LOCAL)
	ToUpstream              = Verdict(BpfVerdictVERDICT_UPSTREAM)
	PortExcluded            = Verdict(BpfVerdictVERDICT_PORT_EXCLUDED)
	CIDRExcluded            = Verdict(BpfVerdictVERDICT_CIDR_EXCLUDED)
	Direct                  = Verdict(BpfVerdictVERDICT_DIRECT)
	ToDNS                   = Verdict(BpfVerdictVERDICT_DNS)
	UDP                     = Verdict(BpfVerdictVERDICT_UDP)
	Inbound                 = Verdict(BpfVerdictVERDICT_INBOUND)
	InboundExcluded         = Verdict(BpfVerdictVERDICT_INBOUND_EXCLUDED)
	GuardAudited            = Verdict(BpfVerdictVERDICT_GUARD_AUDIT)
	GuardEphemeral          = Verdict(BpfVerdictVERDICT_GUARD_EPHEMERAL)
	Forwarded               = Verdict(BpfVerdictVERDICT_FORWARDED)
	EgressAudited           = Verdict(BpfVerdictVERDICT_EGRESS_AUDIT)
	EgressSocketAudited     = Verdict(BpfVerdictVERDICT_EGRESS_SOCKET_AUDIT)
	Listener                = Verdict(BpfVerdictVERDICT_LISTENER)
	RefusedListenerIdentity = Verdict(BpfVerdictVERDICT_REFUSED_LISTENER_IDENTITY)
	RefusedListenerAddress  = Verdict(BpfVerdictVERDICT_REFUSED_LISTENER_ADDRESS)
	RefusedListenerTable    = Verdict(BpfVerdictVERDICT_REFUSED_LISTENER_TABLE)
	ListenerGone            = Verdict(BpfVerdictVERDICT_LISTENER_GONE)
	RefusedEncoded          = Verdict(BpfVerdictVERDICT_REFUSED_ENCODED)
	RefusedFamily           = Verdict(BpfVerdictVERDICT_REFUSED_FAMILY)
	RefusedDevice           = Verdict(BpfVerdictVERDICT_REFUSED_DEVICE)
	RefusedOption           = Verdict(BpfVerdictVERDICT_REFUSED_OPTION)
	RefusedBroadcast        = Verdict(BpfVerdictVERDICT_REFUSED_BROADCAST)
	RefusedSource           = Verdict(BpfVerdictVERDICT_REFUSED_SOURCE)
	RefusedBudget           = Verdict(BpfVerdictVERDICT_REFUSED_BUDGET)
	RefusedShare            = Verdict(BpfVerdictVERDICT_REFUSED_SHARE)
	RefusedTable            = Verdict(BpfVerdictVERDICT_REFUSED_TABLE)
	RefusedNoProxy          = Verdict(BpfVerdictVERDICT_REFUSED_NO_PROXY)
	RefusedInboundNoProxy   = Verdict(BpfVerdictVERDICT_REFUSED_INBOUND_NO_PROXY)
	RefusedInboundUnknown   = Verdict(BpfVerdictVERDICT_REFUSED_INBOUND_UNKNOWN)
	RefusedGuard            = Verdict(BpfVerdictVERDICT_REFUSED_GUARD)
	RefusedForwarded        = Verdict(BpfVerdictVERDICT_REFUSED_FORWARDED)
	RefusedEgress           = Verdict(BpfVerdictVERDICT_REFUSED_EGRESS)
	RefusedEgressSocket     = Verdict(BpfVerdictVERDICT_REFUSED_EGRESS_SOCKET)
	verdictMax              = Verdict(BpfVerdictVERDICT_MAX)
	verdictFirstRefused     = Verdict(BpfVerdictVERDICT_FIRST_REFUSED)
)

type verdictText struct{ name, meaning string }

func (v Verdict) text() verdictText {
	texts := [verdictMax]verdictText{
		Redirected:              {"redirected", "sent to the proxy's outbound listener"},
		Proxy:                   {"proxy", "the proxy's own connection, left alone"},
		UIDExcluded:             {"uid_excluded", "left alone: its UID is excluded"},
		Local:                   {"local", "left alone: loopback or the workload's own address"},
		ToUpstream:              {"upstream", "sent to the listener of the upstream whose virtual IP was dialled"},
		PortExcluded:            {"port_excluded", "left alone: its port is excluded"},
		CIDRExcluded:            {"cidr_excluded", "left alone: its address is in an excluded CIDR"},
		Direct:                  {"direct", "left alone: the workload is not in transparent mode"},
		ToDNS:                   {"dns", "sent to Consul's resolver"},
		UDP:                     {"udp", "left alone: UDP that is not DNS to Consul"},
		Inbound:                 {"inbound", "from outside, sent to the proxy's inbound listener; a late packet of a connection that is gone counts too"},
		InboundExcluded:         {"inbound_excluded", "from outside, left alone: its port is excluded"},
		GuardAudited:            {"guard_audit", "from outside, let in: the guard would refuse it in mode enforce"},
		GuardEphemeral:          {"guard_ephemeral", "from outside, let in: a datagram to an ephemeral port may be a reply"},
		Forwarded:               {"forwarded", "let through: forwarded through the namespace, past the proxy; of TCP each connection, of all else each packet"},
		EgressAudited:           {"egress_audit", "let out past the proxy: the egress guard would refuse it in mode enforce"},
		EgressSocketAudited:     {"egress_socket_audit", "let be made: a socket of a protocol that passes the proxy, which the egress guard would refuse in mode enforce"},
		Listener:                {"listener", "a listener of the proxy was registered"},
		RefusedListenerIdentity: {"refused_listener_identity", "not registered: a socket on the proxy's port is not the proxy's"},
		RefusedListenerAddress:  {"refused_listener_address", "not registered: a socket on the proxy's port has another address"},
		RefusedListenerTable:    {"refused_listener_table", "not registered: no slot is free, or the socket is MPTCP"},
		ListenerGone:            {"listener_gone", "no connection: a packet for the proxy's outbound listener, which had just closed: a late one, or of a dial that was redirected a moment before"},
		RefusedEncoded:          {"refused_encoded", "refused: the range that carries origins is not for tasks"},
		RefusedFamily:           {"refused_family", "refused: socket and proxy have no address family in common"},
		RefusedDevice:           {"refused_device", "refused: a socket bound to a device cannot reach the proxy"},
		RefusedOption:           {"refused_option", "refused: a socket option would send the packets another way (a source route, IPV6_RTHDR)"},
		RefusedBroadcast:        {"refused_broadcast", "refused: TCP has no multicast and no broadcast"},
		RefusedSource:           {"refused_source", "refused: the socket is bound to an address that the workload does not have"},
		RefusedBudget:           {"refused_budget", "refused: the workload holds as many destinations as it may"},
		RefusedShare:            {"refused_share", "refused: the node's table of destinations is nearly full, and the workload holds more than its share"},
		RefusedTable:            {"refused_table", "refused: the node's tables are full, or rows are lost"},
		RefusedNoProxy:          {"refused_no_proxy", "refused: the proxy has no outbound listener"},
		RefusedInboundNoProxy:   {"refused_inbound_no_proxy", "from outside, refused: the proxy has no inbound listener"},
		RefusedInboundUnknown:   {"refused_inbound_unknown", "from outside, refused: the proxy's inbound port is not known yet"},
		RefusedGuard:            {"refused_guard", "from outside, refused by the guard: not the proxy's port nor an allowed one"},
		RefusedForwarded:        {"refused_forwarded", "refused: a packet to be forwarded through the namespace, past the proxy"},
		RefusedEgress:           {"refused_egress", "refused by the egress guard: it would leave past the proxy, by no exclusion and as no answer"},
		RefusedEgressSocket:     {"refused_egress_socket", "refused by the egress guard: a socket of a protocol that passes the proxy (raw, ICMP, SCTP, packet)"},
	}
	if v == EventsLost {
		return verdictText{"lost", "no connection: events that the reader does not get"}
	}
	if v == Held {
		return verdictText{"held", "waits for the proxy to listen for the first time: the start gate has it"}
	}
	if v >= verdictMax {
		return verdictText{fmt.Sprintf("verdict_%d", uint32(v)), "unknown to this version"}
	}
	return texts[v]
}

// String is the verdict's name as commands and metrics show it.
func (v Verdict) String() string { return v.text().name }

// Describe says in a sentence what the verdict did.
func (v Verdict) Describe() string { return v.text().meaning }

// Refused reports whether the verdict ended the connection, as the programs do
// with one that they do not know.
func (v Verdict) Refused() bool {
	return v >= verdictFirstRefused && v != EventsLost && v != Held
}

// IsConnection reports whether the verdict is the outcome of a connection, not what
// became of a listener of the proxy.
func (v Verdict) IsConnection() bool { return v < Listener || v >= verdictFirstRefused }

// AllVerdicts lists the verdicts in their order.
func AllVerdicts() []Verdict {
	all := make([]Verdict, verdictMax)
	for i := range all {
		all[i] = Verdict(i)
	}
	return all
}

// EventsLost is the verdict of an Event that is no connection: it tells how many
// events of a workload the reader does not get.
const EventsLost = ^Verdict(0)

// Held is the verdict of an Event about a connection that is seen to wait in a start
// gate. No program decides it, so it has no counter; see redirect.Gate.
const Held = EventsLost - 1

func (m *Tables) Verdicts(cookie uint64) (counts map[string]uint64, eventsLost uint64, err error) {
	var row BpfVerdictCounts
	if _, err := m.Get("verdicts", cookie, &row); err != nil {
		return nil, 0, err
	}
	counts = make(map[string]uint64)
	for i, count := range row.Count {
		if count > 0 {
			counts[Verdict(i).String()] = count
		}
	}
	return counts, row.EventsLost, nil
}
