// SPDX-License-Identifier: MPL-2.0

// Package nft has what the plugin's rules in nftables are made of, and its own table.
package nft

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
	"github.com/weirmesh/weir/cni/network/attachment"
	"golang.org/x/sys/unix"
)

// Table is the plugin's own table of nftables, of family inet.
const Table = "weir"

// CtStatusDNAT marks a connection whose destination was translated (IPS_DST_NAT).
const CtStatusDNAT = 1 << 5

// Rule is a rule as the plugin wants it. Its comment names it: a rule with that
// comment is that rule.
type Rule struct {
	Comment string
	Exprs   []expr.Any
}

func OwnTable() *nftables.Table {
	return &nftables.Table{Name: Table, Family: nftables.TableFamilyINet}
}

// EnsureIn adds the rules that are not in the chain, and the chain with them.
func EnsureIn(conn *nftables.Conn, chain *nftables.Chain, wanted []Rule) (repaired []string, err error) {
	present, err := RulesOf(conn, chain.Table, chain)
	if err != nil {
		return nil, err
	}
	wanted = slices.DeleteFunc(wanted, func(w Rule) bool { return HasRule(present, w.Comment) })
	if len(wanted) == 0 {
		return nil, nil
	}
	conn.AddTable(chain.Table)
	conn.AddChain(chain)
	for _, w := range wanted {
		conn.AddRule(&nftables.Rule{Table: chain.Table, Chain: chain, Exprs: w.Exprs, UserData: Comment(w.Comment)})
		repaired = append(repaired, "rule "+w.Comment)
	}
	if err := conn.Flush(); err != nil {
		return nil, fmt.Errorf("add rules to %s: %w", ChainName(chain), Taken(err))
	}
	return repaired, nil
}

// Taken says of an error of the kernel's that a chain or a map is another's: of
// another type, on another hook, or with an owner.
func Taken(err error) error {
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM) {
		return fmt.Errorf("the chain is %w: %w", attachment.ErrTaken, err)
	}
	return err
}

// IsFor reports a rule that the plugin made for the bridge.
func IsFor(rule *nftables.Rule, bridge string) bool {
	text, ok := userdata.GetString(rule.UserData, userdata.TypeComment)
	return ok && strings.HasPrefix(text, "weir: ") && strings.HasSuffix(strings.TrimRight(text, "\x00"), " "+bridge)
}

func ListChains(conn *nftables.Conn) ([]*nftables.Chain, error) {
	chains, err := conn.ListChains()
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil // a kernel without nf_tables has none
	}
	if err != nil {
		return nil, fmt.Errorf("list chains of nftables: %w", err)
	}
	return slices.DeleteFunc(chains, func(chain *nftables.Chain) bool { return chain.Table == nil }), nil
}

// RulesOf returns nothing where there is no such chain.
func RulesOf(conn *nftables.Conn, table *nftables.Table, chain *nftables.Chain) ([]*nftables.Rule, error) {
	rules, err := conn.GetRules(table, chain)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list rules of %s: %w", ChainName(chain), err)
	}
	return rules, nil
}

func HasRule(rules []*nftables.Rule, want string) bool {
	return slices.ContainsFunc(rules, func(rule *nftables.Rule) bool {
		text, ok := userdata.GetString(rule.UserData, userdata.TypeComment)
		return ok && strings.TrimRight(text, "\x00") == want
	})
}

func Comment(text string) []byte {
	return userdata.AppendString(nil, userdata.TypeComment, text)
}

func ChainName(chain *nftables.Chain) string {
	families := map[nftables.TableFamily]string{
		nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6", nftables.TableFamilyINet: "inet",
	}
	return fmt.Sprintf("%s %s %s", families[chain.Table.Family], chain.Table.Name, chain.Name)
}

// field is an address in the header of a packet.
type field int

const (
	Source field = iota
	Destination
)

func Family(subnet *net.IPNet) []expr.Any {
	proto := byte(unix.NFPROTO_IPV4)
	if subnet.IP.To4() == nil {
		proto = unix.NFPROTO_IPV6
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
	}
}

func Address(subnet *net.IPNet, f field, op expr.CmpOp) []expr.Any {
	ip, offset := subnet.IP.To4(), uint32(12)
	if ip == nil {
		ip, offset = subnet.IP.To16(), 8
	}
	length := uint32(len(ip))
	if f == Destination {
		offset += length
	}
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: length, Mask: subnet.Mask, Xor: make([]byte, length)},
		&expr.Cmp{Op: op, Register: 1, Data: ip},
	}
}

// Device matches a device by its whole name, as iptables writes it: with the
// byte that ends it and nothing after.
func Device(key expr.MetaKey, name string, op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: append([]byte(name), 0)},
	}
}

// Conntrack matches a connection that has one of the bits.
func Conntrack(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

// WithNftables runs action with one connection to nftables, which is closed while the caller
// goes on: the kernel closes none before it has freed what was deleted, which is after all
// packets under way, some 15 ms (nft_rcv_nl_event). It goes with the process in any case.
func WithNftables(action func(*nftables.Conn) error) error {
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	defer func() { go func() { _ = conn.CloseLasting() }() }()
	return action(conn)
}
