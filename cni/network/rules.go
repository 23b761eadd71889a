// SPDX-License-Identifier: MPL-2.0

package network

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// Table is the plugin's own table of nftables, of family inet.
const Table = "weir"

// ctStatusDNAT marks a connection whose destination was translated (IPS_DST_NAT).
const ctStatusDNAT = 1 << 5

// rule is a rule as the plugin wants it. Its comment names it: a rule with that
// comment is that rule.
type rule struct {
	comment string
	exprs   []expr.Any
}

// ensureRules makes the rules that the bridge needs and that are not there. One
// set serves all attachments of a bridge; see removeRules.
func (r *record) ensureRules() (repaired []string, err error) {
	err = withNftables(func(conn *nftables.Conn) error {
		repaired, err = r.ensureRulesBy(conn)
		return err
	})
	return repaired, err
}

func (r *record) ensureRulesBy(conn *nftables.Conn) (repaired []string, err error) {
	steps := []func(*nftables.Conn) ([]string, error){r.ensureMasquerade, r.ensureForward}
	if r.Mapper == mapperWeir {
		steps = append(steps, r.ensureLoopback, ensurePortMaps)
	}
	for _, step := range steps {
		more, err := step(conn)
		repaired = append(repaired, more...)
		if err != nil {
			return repaired, err
		}
	}
	return repaired, nil
}

func ownTable() *nftables.Table {
	return &nftables.Table{Name: Table, Family: nftables.TableFamilyINet}
}

func ownChain(table *nftables.Table) *nftables.Chain {
	return &nftables.Chain{
		Name: "postrouting", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
	}
}

// ensureMasquerade hides the allocations' addresses behind the node's. What
// comes back over the bridge by a host port is masqueraded too: its answer
// would else go straight to a neighbour that asked somebody else.
func (r *record) ensureMasquerade(conn *nftables.Conn) (repaired []string, err error) {
	var wanted []rule
	for _, subnet := range r.subnets() {
		if r.Masquerade {
			wanted = append(wanted, masquerade(r.Bridge, subnet))
		}
		if r.Hairpin || r.Mapper == mapperWeir {
			wanted = append(wanted, hairpin(r.Bridge, subnet))
		}
	}
	if r.Mapper == mapperWeir {
		masquerade, _ := r.loopbackRules()
		wanted = append(wanted, masquerade...)
	}
	return ensureIn(conn, ownChain(ownTable()), wanted)
}

// ensureLoopback lets the node's own connections by loopback reach the bridge,
// and nobody else's come back that way.
func (r *record) ensureLoopback(conn *nftables.Conn) (repaired []string, err error) {
	_, stop := r.loopbackRules()
	if repaired, err = ensureIn(conn, stopChain(ownTable()), stop); err != nil {
		return repaired, err
	}
	changed, err := sysctl("1", "ipv4", "conf", r.Bridge, "route_localnet")
	if changed {
		repaired = append(repaired, "route_localnet of "+r.Bridge)
	}
	return repaired, err
}

// ensureIn adds the rules that are not in the chain, and the chain with them.
func ensureIn(conn *nftables.Conn, chain *nftables.Chain, wanted []rule) (repaired []string, err error) {
	present, err := rulesOf(conn, chain.Table, chain)
	if err != nil {
		return nil, err
	}
	wanted = slices.DeleteFunc(wanted, func(w rule) bool { return hasRule(present, w.comment) })
	if len(wanted) == 0 {
		return nil, nil
	}
	conn.AddTable(chain.Table)
	conn.AddChain(chain)
	for _, w := range wanted {
		conn.AddRule(&nftables.Rule{Table: chain.Table, Chain: chain, Exprs: w.exprs, UserData: comment(w.comment)})
		repaired = append(repaired, "rule "+w.comment)
	}
	if err := conn.Flush(); err != nil {
		return nil, fmt.Errorf("add rules to %s: %w", chainName(chain), taken(err))
	}
	return repaired, nil
}

// masquerade is: saddr in the subnet, not out of the bridge, no multicast.
func masquerade(bridge string, subnet *net.IPNet) rule {
	multicast := &net.IPNet{IP: net.IPv4(224, 0, 0, 0).To4(), Mask: net.CIDRMask(4, 32)}
	if subnet.IP.To4() == nil {
		multicast = &net.IPNet{IP: net.ParseIP("ff00::"), Mask: net.CIDRMask(8, 128)}
	}
	exprs := append(family(subnet), address(subnet, source, expr.CmpOpEq)...)
	exprs = append(exprs, device(expr.MetaKeyOIFNAME, bridge, expr.CmpOpNeq)...)
	exprs = append(exprs, address(multicast, destination, expr.CmpOpNeq)...)
	return rule{fmt.Sprintf("weir: masquerade %s from %s", subnet, bridge), append(exprs, &expr.Counter{}, &expr.Masq{})}
}

// hairpin is: saddr in the subnet, back out of the bridge, destination translated.
func hairpin(bridge string, subnet *net.IPNet) rule {
	exprs := append(family(subnet), address(subnet, source, expr.CmpOpEq)...)
	exprs = append(exprs, device(expr.MetaKeyOIFNAME, bridge, expr.CmpOpEq)...)
	exprs = append(exprs, conntrack(expr.CtKeySTATUS, ctStatusDNAT)...)
	return rule{fmt.Sprintf("weir: hairpin %s on %s", subnet, bridge), append(exprs, &expr.Counter{}, &expr.Masq{})}
}

// taken says of an error of the kernel's that a chain or a map is another's: of
// another type, on another hook, or with an owner.
func taken(err error) error {
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM) {
		return fmt.Errorf("the chain is %w: %w", ErrTaken, err)
	}
	return err
}

// removeRules removes every rule for the bridge, and the plugin's table when
// it serves no other bridge. Rules that are gone already are not missed.
func removeRules(bridge string) error {
	return withNftables(func(conn *nftables.Conn) error {
		chains, err := listChains(conn)
		if err != nil {
			return err
		}
		var problems []error
		own, others := false, false // whether the table is there, and serves another bridge
		for _, chain := range chains {
			isOwn := chain.Table.Name == Table && chain.Table.Family == nftables.TableFamilyINet
			if !isOwn && !mayHoldAccept(chain) {
				continue
			}
			kept, err := removeRulesOf(conn, chain, bridge)
			problems = append(problems, err)
			// What is kept is another bridge's, or somebody else's; what could not be
			// read may be.
			own, others = own || isOwn, others || isOwn && (err != nil || kept > 0 && !servesAllBridges(chain))
		}
		if own && !others {
			problems = append(problems, removeTable(conn))
		}
		return errors.Join(problems...)
	})
}

// removeTable removes the plugin's table, which may be gone already.
func removeTable(conn *nftables.Conn) error {
	conn.DelTable(ownTable())
	if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove table %s: %w", Table, err)
	}
	return nil
}

// removeRulesOf removes the rules for the bridge from one chain, and counts the others.
func removeRulesOf(conn *nftables.Conn, chain *nftables.Chain, bridge string) (kept int, err error) {
	rules, err := rulesOf(conn, chain.Table, chain)
	if err != nil {
		return 0, err
	}
	var problems []error
	for _, rule := range rules {
		if isFor(rule, bridge) {
			problems = append(problems, conn.DelRule(rule))
		} else {
			kept++
		}
	}
	if kept == len(rules) {
		return kept, nil
	}
	if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		problems = append(problems, fmt.Errorf("remove rules for %s from %s: %w", bridge, chainName(chain), err))
	}
	return kept, errors.Join(problems...)
}

// isFor reports a rule that the plugin made for the bridge.
func isFor(rule *nftables.Rule, bridge string) bool {
	text, ok := userdata.GetString(rule.UserData, userdata.TypeComment)
	return ok && strings.HasPrefix(text, "weir: ") && strings.HasSuffix(strings.TrimRight(text, "\x00"), " "+bridge)
}

func listChains(conn *nftables.Conn) ([]*nftables.Chain, error) {
	chains, err := conn.ListChains()
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil // a kernel without nf_tables has none
	}
	if err != nil {
		return nil, fmt.Errorf("list chains of nftables: %w", err)
	}
	return slices.DeleteFunc(chains, func(chain *nftables.Chain) bool { return chain.Table == nil }), nil
}

// rulesOf returns nothing where there is no such chain.
func rulesOf(conn *nftables.Conn, table *nftables.Table, chain *nftables.Chain) ([]*nftables.Rule, error) {
	rules, err := conn.GetRules(table, chain)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list rules of %s: %w", chainName(chain), err)
	}
	return rules, nil
}

func hasRule(rules []*nftables.Rule, want string) bool {
	return slices.ContainsFunc(rules, func(rule *nftables.Rule) bool {
		text, ok := userdata.GetString(rule.UserData, userdata.TypeComment)
		return ok && strings.TrimRight(text, "\x00") == want
	})
}

func comment(text string) []byte {
	return userdata.AppendString(nil, userdata.TypeComment, text)
}

func chainName(chain *nftables.Chain) string {
	families := map[nftables.TableFamily]string{
		nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6", nftables.TableFamilyINet: "inet",
	}
	return fmt.Sprintf("%s %s %s", families[chain.Table.Family], chain.Table.Name, chain.Name)
}

// field is an address in the header of a packet.
type field int

const (
	source field = iota
	destination
)

func family(subnet *net.IPNet) []expr.Any {
	proto := byte(unix.NFPROTO_IPV4)
	if subnet.IP.To4() == nil {
		proto = unix.NFPROTO_IPV6
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
	}
}

func address(subnet *net.IPNet, f field, op expr.CmpOp) []expr.Any {
	ip, offset := subnet.IP.To4(), uint32(12)
	if ip == nil {
		ip, offset = subnet.IP.To16(), 8
	}
	length := uint32(len(ip))
	if f == destination {
		offset += length
	}
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: length, Mask: subnet.Mask, Xor: make([]byte, length)},
		&expr.Cmp{Op: op, Register: 1, Data: ip},
	}
}

// device matches a device by its whole name, as iptables writes it: with the
// byte that ends it and nothing after.
func device(key expr.MetaKey, name string, op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: append([]byte(name), 0)},
	}
}

// conntrack matches a connection that has one of the bits.
func conntrack(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}
