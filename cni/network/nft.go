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

func ownTable() *nftables.Table {
	return &nftables.Table{Name: Table, Family: nftables.TableFamilyINet}
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

// taken says of an error of the kernel's that a chain or a map is another's: of
// another type, on another hook, or with an owner.
func taken(err error) error {
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM) {
		return fmt.Errorf("the chain is %w: %w", ErrTaken, err)
	}
	return err
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

// withNftables runs action with one connection to nftables.
func withNftables(action func(*nftables.Conn) error) (err error) {
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	defer func() { err = errors.Join(err, conn.CloseLasting()) }()
	return action(conn)
}
