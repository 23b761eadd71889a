// SPDX-License-Identifier: MPL-2.0

// Package forward accepts what an allocation sends and gets where the node drops what
// it forwards.
package forward

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/cni/network/nft"
	"golang.org/x/sys/unix"
)

// States of a connection that belongs to one that was let in: as bits of
// nftables' ct state, and of the match conntrack of iptables, which knows
// DNAT for one.
const (
	ctEstablished, ctRelated           = 1 << 1, 1 << 2
	xtEstablished, xtRelated, xtStatus = 1 << 1, 1 << 2, 1 << 7
)

// EnsureForward lets the bridge's traffic through every chain that would else
// drop it: a forward chain with policy drop, as Docker leaves it, or one that
// ends in drop or reject for all. What an allocation sends passes; what comes
// to it passes if it answers, or came by a host port.
func EnsureForward(r *attachment.Record, conn *nftables.Conn) (repairs []string, err error) {
	if !r.Gateway {
		return nil, nil
	}
	if err := refuseLegacyDrop(r); err != nil {
		return nil, err
	}
	chains, err := nft.ListChains(conn)
	if err != nil {
		return nil, err
	}
	for _, chain := range chains {
		if !concerns(r, chain) {
			continue
		}
		did, err := accept(r, conn, chain, chains)
		repairs = append(repairs, did...)
		if err != nil {
			return repairs, err
		}
	}
	return repairs, nil
}

// concerns reports a chain that sees what the network forwards.
func concerns(r *attachment.Record, chain *nftables.Chain) bool {
	if chain.Hooknum == nil || *chain.Hooknum != *nftables.ChainHookForward {
		return false
	}
	switch chain.Table.Family {
	case nftables.TableFamilyINet:
		return true
	case nftables.TableFamilyIPv4:
		return r.HasFamily(netlink.FAMILY_V4)
	case nftables.TableFamilyIPv6:
		return r.HasFamily(netlink.FAMILY_V6)
	default:
		return false
	}
}

func accept(r *attachment.Record, conn *nftables.Conn, chain *nftables.Chain, all []*nftables.Chain) (repairs []string, err error) {
	rules, err := nft.RulesOf(conn, chain.Table, chain)
	if err != nil {
		return nil, err
	}
	drops := chain.Policy != nil && *chain.Policy == nftables.ChainPolicyDrop
	if !drops && (len(rules) == 0 || !endsAll(rules[len(rules)-1])) {
		return nil, nil
	}
	place := placeOfAccept(chain, rules, all)
	if place != chain {
		if rules, err = nft.RulesOf(conn, place.Table, place); err != nil {
			return nil, err
		}
	}
	wanted := accepts(r.Bridge, isIptables(chain))
	wanted = slices.DeleteFunc(wanted, func(w nft.Rule) bool { return nft.HasRule(rules, w.Comment) })
	for _, w := range wanted {
		added := &nftables.Rule{Table: place.Table, Chain: place, Exprs: w.Exprs, UserData: nft.Comment(w.Comment)}
		switch {
		case place == chain:
			conn.InsertRule(added) // before what drops
		case len(rules) > 0 && isReturn(rules[len(rules)-1]):
			added.Position = rules[len(rules)-1].Handle // after the operator's own rules
			conn.InsertRule(added)
		default:
			conn.AddRule(added)
		}
		repairs = append(repairs, "rule "+w.Comment+" in "+nft.ChainName(place))
	}
	if len(wanted) == 0 {
		return nil, nil
	}
	if err := conn.Flush(); err != nil {
		if errors.Is(err, unix.EPERM) && namesDevice(place.Table, all, r.Bridge) {
			return nil, nil
		}
		return nil, fmt.Errorf("let bridge %s through %s, which drops: %w: %w", r.Bridge, nft.ChainName(place), attachment.ErrForward, err)
	}
	return repairs, nil
}

// placeOfAccept is the chain that a rule before those of the chain belongs to: Docker keeps
// one for what is not its own, and never empties it.
func placeOfAccept(chain *nftables.Chain, rules []*nftables.Rule, all []*nftables.Chain) *nftables.Chain {
	if !isIptables(chain) || !jumpsTo(rules, "DOCKER-USER") {
		return chain
	}
	i := slices.IndexFunc(all, func(c *nftables.Chain) bool {
		return c.Name == "DOCKER-USER" && c.Table.Name == chain.Table.Name && c.Table.Family == chain.Table.Family
	})
	if i < 0 {
		return chain
	}
	return all[i]
}

// namesDevice reports a rule of the table that tells the device from others. Where
// the table has an owner, as firewalld's has, nobody else may write to it: what the
// operator told the owner of the bridge is taken for enough.
func namesDevice(table *nftables.Table, all []*nftables.Chain, name string) bool {
	conn, err := nftables.New() // another one: the answer to a refused batch may not be read to its end
	if err != nil {
		return false
	}
	return slices.ContainsFunc(all, func(chain *nftables.Chain) bool {
		if chain.Table.Name != table.Name || chain.Table.Family != table.Family {
			return false
		}
		rules, err := nft.RulesOf(conn, chain.Table, chain)
		return err == nil && slices.ContainsFunc(rules, func(rule *nftables.Rule) bool {
			return slices.ContainsFunc(rule.Exprs, func(e expr.Any) bool {
				compared, ok := e.(*expr.Cmp)
				return ok && bytes.Equal(bytes.TrimRight(compared.Data, "\x00"), []byte(name))
			})
		})
	})
}

// accepts are the rules, in the form that iptables-nft lists or in that of nft.
func accepts(bridge string, iptables bool) []nft.Rule {
	out := nft.Device(expr.MetaKeyIIFNAME, bridge, expr.CmpOpEq)
	in := nft.Device(expr.MetaKeyOIFNAME, bridge, expr.CmpOpEq)
	verdict := []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictAccept}}
	list := []nft.Rule{{Comment: "weir: out of " + bridge, Exprs: slices.Concat(out, verdict)}}
	if iptables {
		info := &xt.ConntrackMtinfo3{ConntrackMtinfo2: xt.ConntrackMtinfo2{
			ConntrackMtinfoBase: xt.ConntrackMtinfoBase{MatchFlags: uint16(xt.ConntrackState | xt.ConntrackStateAlias)},
			StateMask:           xtEstablished | xtRelated | xtStatus,
		}}
		known := []expr.Any{&expr.Match{Name: "conntrack", Rev: 3, Info: info}}
		return append(list, nft.Rule{Comment: "weir: into " + bridge, Exprs: slices.Concat(in, known, verdict)})
	}
	return append(list,
		nft.Rule{Comment: "weir: answers into " + bridge, Exprs: slices.Concat(in, nft.Conntrack(expr.CtKeySTATE, ctEstablished|ctRelated), verdict)},
		nft.Rule{Comment: "weir: host ports into " + bridge, Exprs: slices.Concat(in, nft.Conntrack(expr.CtKeySTATUS, nft.CtStatusDNAT), verdict)})
}

// isIptables reports a chain that iptables-nft manages.
func isIptables(chain *nftables.Chain) bool {
	return chain.Table.Name == "filter" && chain.Name == "FORWARD" && chain.Table.Family != nftables.TableFamilyINet
}

// MayHoldAccept reports a chain in which accept puts rules.
func MayHoldAccept(chain *nftables.Chain) bool {
	return chain.Name == "DOCKER-USER" || chain.Hooknum != nil && *chain.Hooknum == *nftables.ChainHookForward
}

// endsAll reports a rule that matches everything and lets nothing through.
func endsAll(rule *nftables.Rule) bool {
	ends := false
	for _, e := range rule.Exprs {
		switch e := e.(type) {
		case *expr.Counter, *expr.Log:
		case *expr.Verdict:
			ends = e.Kind == expr.VerdictDrop
		case *expr.Reject:
			ends = true
		case *expr.Target:
			ends = e.Name == "REJECT" || e.Name == "DROP"
		default:
			return false
		}
	}
	return ends
}

func isReturn(rule *nftables.Rule) bool {
	for _, e := range rule.Exprs {
		switch e := e.(type) {
		case *expr.Counter:
		case *expr.Verdict:
			return e.Kind == expr.VerdictReturn
		default:
			return false
		}
	}
	return false
}

func jumpsTo(rules []*nftables.Rule, chain string) bool {
	return slices.ContainsFunc(rules, func(rule *nftables.Rule) bool {
		return slices.ContainsFunc(rule.Exprs, func(e expr.Any) bool {
			verdict, ok := e.(*expr.Verdict)
			return ok && verdict.Kind == expr.VerdictJump && verdict.Chain == chain
		})
	})
}

// ProbeForward reports a drop that Add would refuse, without a change.
func ProbeForward(config attachment.Config) error {
	r := &attachment.Record{Config: config}
	if !r.Gateway {
		return nil
	}
	return refuseLegacyDrop(r)
}

// refuseLegacyDrop finds a FORWARD chain of the older iptables that drops. Its
// rules cannot be changed one at a time, so this is left to the operator.
func refuseLegacyDrop(r *attachment.Record) error {
	for _, legacy := range []legacyTables{legacy4(), legacy6()} {
		drops, err := legacy.dropsForward(r.Bridge)
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOPROTOOPT) {
			continue
		}
		if err != nil {
			return err
		}
		if drops {
			return fmt.Errorf("the FORWARD chain of %s-legacy has policy DROP and no rule for bridge %s: %w", legacy.command, r.Bridge, attachment.ErrForward)
		}
	}
	return nil
}
