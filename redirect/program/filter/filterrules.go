// SPDX-License-Identifier: MPL-2.0

package filter

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// filterHook is where a chain of the table is asked. That of output comes last: a rule
// of the namespace may send a packet elsewhere before.
type filterHook struct {
	hook     *nftables.ChainHook
	priority *nftables.ChainPriority
}

func filterHooks() map[string]filterHook {
	return map[string]filterHook{
		"forward": {nftables.ChainHookForward, nftables.ChainPriorityRaw},
		"input":   {nftables.ChainHookInput, nftables.ChainPriorityRaw},
		"output":  {nftables.ChainHookOutput, nftables.ChainPriorityLast},
	}
}

func guards(g workload.Guard) bool { return g == workload.GuardAudit || g == workload.GuardEnforce }

// filters reports whether the workload's namespace should have a table.
func filters(w workload.Workload) bool {
	return w.Mode == workload.ModeTransparent || guards(w.Guard) || guards(w.Egress)
}

// filterKind is all of a workload that has a table on which the rules depend.
type filterKind struct {
	guarded bool
	egress  workload.Guard
}

func kindOf(w workload.Workload) filterKind {
	kind := filterKind{guarded: guards(w.Guard), egress: w.Egress}
	if !guards(w.Egress) {
		kind.egress = workload.GuardOff
	}
	return kind
}

// filterRule is a rule of the table. Its comment tells it, and the program that
// it asks.
type filterRule struct {
	comment string
	exprs   []expr.Any
}

// rules are those of the chains that the workload should have.
func (f chainPrograms) rules(w workload.Workload) (map[string][]filterRule, error) {
	if !filters(w) {
		return nil, nil
	}
	forward, err := f.forward(w)
	if err != nil {
		return nil, err
	}
	rules := map[string][]filterRule{"forward": forward}
	if guards(w.Egress) {
		if rules["output"], err = f.output(); err != nil {
			return nil, err
		}
		if rules["input"], err = f.forged(); err != nil {
			return nil, err
		}
	}
	if guards(w.Guard) {
		input, err := f.input()
		if err != nil {
			return nil, err
		}
		rules["input"] = append(rules["input"], input...)
	}
	return rules, nil
}

// asking returns the match that asks a program, and what its rules are called.
func (f chainPrograms) asking(name, does string) (asks expr.Any, comment string, err error) {
	info, err := f[name].Info()
	if err != nil {
		return nil, "", fmt.Errorf("read filter program: %w", err)
	}
	id, _ := info.ID()
	return asksProgram(f[name]), fmt.Sprintf("program %d %s", id, does), nil
}

// forward refuses what is forwarded. Under the egress guard nobody is told: the answer
// would quote the packet, and go to the source that it names.
func (f chainPrograms) forward(w workload.Workload) ([]filterRule, error) {
	if w.Egress == workload.GuardEnforce {
		prog, comment, err := f.asking("forward", "drops")
		return []filterRule{{comment, []expr.Any{prog, drop()}}}, err
	}
	prog, comment, err := f.asking("forward", "refuses")
	return []filterRule{
		{comment + " TCP", append(isTCP(expr.CmpOpEq), prog, &expr.Reject{Type: unix.NFT_REJECT_TCP_RST})},
		{comment, append(isTCP(expr.CmpOpNeq), prog,
			&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED})},
	}, err
}

// input judges what sk_lookup is not asked for.
func (f chainPrograms) input() ([]filterRule, error) {
	prog, comment, err := f.asking("input", "refuses")
	lo := binary.NativeEndian.AppendUint32(nil, 1)
	return []filterRule{
		{"TCP is for sk_lookup", append(isTCP(expr.CmpOpEq), accept())},
		{"what comes by lo is from inside", append(is(expr.MetaKeyIIF, expr.CmpOpEq, lo), accept())},
		{comment, []expr.Any{prog, drop()}},
	}, err
}

// output judges what leaves. Of TCP the beginning is enough: whoever has a connection
// has it by a hook, and other packets are none but the kernel's.
func (f chainPrograms) output() ([]filterRule, error) {
	prog, comment, err := f.asking("output", "refuses")
	return []filterRule{
		{"TCP of a connection", append(slices.Concat(isTCP(expr.CmpOpEq), begins(expr.CmpOpNeq)), accept())},
		{comment + " TCP", append(isTCP(expr.CmpOpEq), prog, &expr.Reject{Type: unix.NFT_REJECT_TCP_RST})},
		{comment, append(isTCP(expr.CmpOpNeq), prog, drop())},
	}, err
}

// forged judges what begins something and would be answered by another device than the
// one by which it came: what a task with a device of its own, or a namespace inside, puts
// in under the address of somebody outside.
func (f chainPrograms) forged() (rules []filterRule, err error) {
	prog, comment, err := f.asking("forged", "refuses")
	if err != nil {
		return nil, err
	}
	lo := binary.NativeEndian.AppendUint32(nil, 1)
	unanswered := []expr.Any{
		&expr.Fib{Register: 1, ResultOIF: true, FlagSADDR: true, FlagIIF: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: make([]byte, 4)},
		prog, drop(),
	}
	icmp6 := []byte{unix.IPPROTO_ICMPV6}
	for _, begin := range []struct {
		what  string
		exprs []expr.Any
	}{
		{"TCP", append(isTCP(expr.CmpOpEq), begins(expr.CmpOpEq)...)},
		{"ICMPv6", append(is(expr.MetaKeyL4PROTO, expr.CmpOpEq, icmp6),
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Len: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{128}})}, // others are of neighbours
		{"others", append(isTCP(expr.CmpOpNeq), is(expr.MetaKeyL4PROTO, expr.CmpOpNeq, icmp6)...)},
	} {
		rules = append(rules, filterRule{
			comment + " forged " + begin.what,
			slices.Concat(is(expr.MetaKeyIIF, expr.CmpOpNeq, lo), begin.exprs, unanswered),
		})
	}
	return rules, nil
}

// asksProgram is the match "bpf" of xtables (xt_bpf), by a descriptor of the program: it
// is the one way for a rule to ask a program with tables.
func asksProgram(prog *ebpf.Program) expr.Any {
	const (
		modeFD   = 2               // XT_BPF_MODE_FD_ELF
		infoSize = 2 + 2 + 4 + 512 // struct xt_bpf_info_v1 up to its pointer, which is the kernel's
	)
	info := make(xt.Unknown, infoSize+8)
	binary.NativeEndian.PutUint16(info, modeFD)
	binary.NativeEndian.PutUint32(info[4:], uint32(prog.FD()))
	return &expr.Match{Name: "bpf", Rev: 1, Info: &info}
}

func is(key expr.MetaKey, op expr.CmpOp, value []byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: value}}
}

func isTCP(op expr.CmpOp) []expr.Any {
	return is(expr.MetaKeyL4PROTO, op, []byte{unix.IPPROTO_TCP})
}

// begins compares the flags of a packet of TCP with those of one that begins a connection.
func begins(op expr.CmpOp) []expr.Any {
	const flags, syn, ack = 13, 0x02, 0x10
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: flags, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{syn | ack}, Xor: []byte{0}},
		&expr.Cmp{Op: op, Register: 1, Data: []byte{syn}},
	}
}

func accept() expr.Any { return &expr.Verdict{Kind: expr.VerdictAccept} }

func drop() expr.Any { return &expr.Verdict{Kind: expr.VerdictDrop} }
