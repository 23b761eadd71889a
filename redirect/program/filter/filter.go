// SPDX-License-Identifier: MPL-2.0

// Package filter keeps the rules of nftables in a namespace that ask a program about what
// leaves it by another way than a socket.
package filter

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"github.com/vishvananda/netlink/nl"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/host/dump"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// What is forwarded through a namespace has no socket in it, and for broadcast,
// multicast and UDP-Lite the kernel asks no sk_lookup. What the kernel itself sends,
// a tunnel or an answer, meets no hook of a socket either. So each namespace gets a
// table of nftables with three chains at most, whose rules ask the programs of
// bpf/filter.c. A rule goes with its namespace; a pinned link of netfilter
// (Linux 6.4) would keep the namespace alive.

// FilterTable is the table's name, of family inet.
const FilterTable = "weir_filter"

// chainPrograms are the programs of bpf/filter.c by what asks them, a chain or a
// rule of one, loaded once for the node and pinned under these names.
type chainPrograms map[string]*ebpf.Program

func (f chainPrograms) Close() {
	for _, prog := range f {
		prog.Close()
	}
}

func FilterNames() map[string]string {
	return map[string]string{"forward": "weir_forward", "input": "weir_input", "output": "weir_output", "forged": "weir_forged"}
}

// LoadFilterPrograms loads the programs over the tables and pins them in dir,
// which must not have any.
func LoadFilterPrograms(tables, dir string) (chainPrograms, error) {
	spec, err := bpfmap.LoadFilter()
	if err != nil {
		return nil, fmt.Errorf("read filter programs: %w", err)
	}
	return PinFilterPrograms(spec, tables, dir)
}

func PinFilterPrograms(spec *ebpf.CollectionSpec, tables, dir string) (chainPrograms, error) {
	pins, err := bpfmap.PinnedMaps(spec, tables)
	defer bpfmap.CloseMaps(pins)
	if err != nil {
		return nil, err
	}
	collection, err := program.NewCollection(spec, pins)
	if err != nil {
		return nil, err
	}
	defer collection.Close()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("create pin directory: %w", err)
	}
	programs := make(chainPrograms)
	for chain, name := range FilterNames() {
		programs[chain] = collection.DetachProgram(name)
		if err := programs[chain].Pin(filepath.Join(dir, name)); err != nil {
			programs.Close()
			return nil, fmt.Errorf("pin %s: %w", name, err)
		}
	}
	return programs, nil
}

// openChainPrograms opens the node's programs. fs.ErrNotExist says that a pin
// is gone.
func openChainPrograms(p store.Paths) (chainPrograms, error) {
	programs := make(chainPrograms)
	for chain, name := range FilterNames() {
		prog, err := program.OpenProgram(filepath.Join(p.Filters(), name))
		if err != nil {
			programs.Close()
			return nil, fmt.Errorf("open %s: %w", name, err)
		}
		programs[chain] = prog
	}
	return programs, nil
}

const (
	closingAtOnce  = 8  // connections, each closed by a thread that would stay
	closingWaiting = 64 // ... that wait for it at most, each with its descriptor
)

// Setter gives workloads their filter, on several processors at a time. All that may
// set one at once share a Setter, so that only one of them replaces the programs.
type Setter struct {
	renewing sync.Mutex
	closing  chan struct{} // holds one for each connection that is being closed
	waiting  chan struct{} // ... or waits for it
}

// NewSetter opens nothing.
func NewSetter() *Setter {
	return &Setter{closing: make(chan struct{}, closingAtOnce), waiting: make(chan struct{}, closingAtOnce+closingWaiting)}
}

// openOrRenew opens the node's programs, or replaces them where the pin of one is gone.
func (s *Setter) openOrRenew(p store.Paths) (chainPrograms, error) {
	s.renewing.Lock()
	defer s.renewing.Unlock()
	programs, err := openChainPrograms(p)
	if errors.Is(err, fs.ErrNotExist) {
		return RenewFilterPrograms(p)
	}
	return programs, err
}

// RenewFilterPrograms replaces the node's programs by this binary's. Namespaces
// whose rules ask the former ones get the new by Setter.Set.
func RenewFilterPrograms(p store.Paths) (chainPrograms, error) {
	if err := program.RemoveTree(p.Filters()); err != nil {
		return nil, err
	}
	return LoadFilterPrograms(p.Maps(), p.Filters())
}

// PinFilters pins the programs again that read the set's tables. Rules of
// namespaces ask them, or a pin that cannot be seen leads to them.
func PinFilters(p store.Paths, s *program.Set) (repairs []program.Repair, err error) {
	for id, err := ebpf.ProgramGetNextID(0); err == nil; id, err = ebpf.ProgramGetNextID(id) {
		found, err := program.DescribeProgram(id)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it ended
		}
		if err != nil {
			return repairs, err
		}
		if !slices.Contains(slices.Collect(maps.Values(FilterNames())), found.Name) || !slices.ContainsFunc(found.Maps, s.Reads) {
			continue
		}
		prog, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue
		}
		pinned, err := program.PinAgain(filepath.Join(p.Filters(), found.Name), prog)
		prog.Close()
		if err != nil {
			return repairs, err
		}
		if pinned {
			repairs = append(repairs, program.Repair{Kind: program.PinPutBack, Object: found.Name})
		}
	}
	return repairs, nil
}

// Set makes the namespace's table what the workload should have, in one step, and
// reports whether it was not. A namespace that should have none keeps none.
func (s *Setter) Set(p store.Paths, ns *host.Namespace, w workload.Workload) (changed bool, err error) {
	if !filters(w) {
		return s.Remove(ns)
	}
	programs, err := s.openOrRenew(p)
	if err != nil {
		return false, err
	}
	defer programs.Close()
	rules, err := programs.rules(w)
	if err != nil {
		return false, err
	}
	err = s.withNFTables(ns, func(conn *nftables.Conn) error {
		there, err := hasFilter(rules)
		if err != nil || there {
			return err
		}
		changed = true
		return replaceFilter(conn, rules)
	})
	if err != nil {
		return false, fmt.Errorf("set filter of forwarded packets: the kernel needs nf_tables with nft_compat, nft_reject_inet, nft_fib_inet and xt_bpf: %w", err)
	}
	return changed, nil
}

// FilterReader tells of many workloads whether they have their filter. It opens the
// programs once, and several goroutines may ask it.
type FilterReader struct {
	programs chainPrograms // nil: there are none
	rules    map[filterKind]map[string][]filterRule
}

// NewFilterReader opens the programs. Where there are none, no workload has its filter.
func NewFilterReader(p store.Paths) (*FilterReader, error) {
	programs, err := openChainPrograms(p)
	if errors.Is(err, fs.ErrNotExist) {
		return new(FilterReader), nil
	}
	if err != nil {
		return nil, err
	}
	f := &FilterReader{programs: programs, rules: make(map[filterKind]map[string][]filterRule)}
	for _, egress := range []workload.Guard{workload.GuardOff, workload.GuardAudit, workload.GuardEnforce} {
		for _, guard := range []workload.Guard{workload.GuardOff, workload.GuardAudit} {
			w := workload.Workload{Mode: workload.ModeTransparent, Guard: guard, Egress: egress}
			if f.rules[kindOf(w)], err = programs.rules(w); err != nil {
				programs.Close()
				return nil, err
			}
		}
	}
	return f, nil
}

func (f *FilterReader) Close() { f.programs.Close() }

// Filtered reports whether the namespace's table is what the workload should have.
func (f *FilterReader) Filtered(ns *host.Namespace, w workload.Workload) (there bool, err error) {
	if !filters(w) || f.programs == nil {
		return !filters(w), nil
	}
	err = ns.Do(func() error {
		there, err = hasFilter(f.rules[kindOf(w)])
		return err
	})
	return there, err
}

func hasFilter(wanted map[string][]filterRule) (bool, error) {
	present, err := presentComments()
	if err != nil {
		return false, fmt.Errorf("list rules: %w", err)
	}
	for chain := range filterHooks() {
		same := func(want filterRule, is string) bool { return is == want.comment }
		if !slices.EqualFunc(wanted[chain], present[chain], same) {
			return false, nil
		}
	}
	return true, nil
}

// presentComments are those of the table's rules in the calling thread's namespace, by
// chain.
func presentComments() (map[string][]string, error) {
	rules, err := dump.Nftables(unix.NFT_MSG_GETRULE, uint8(nftables.TableFamilyINet), nl.NewRtAttr(unix.NFTA_RULE_TABLE, nl.ZeroTerminated(FilterTable)))
	if err != nil {
		return nil, err
	}
	found := make(map[string][]string)
	for _, attributes := range rules {
		var chain, comment string
		for _, attribute := range attributes {
			switch attribute.Attr.Type {
			case unix.NFTA_RULE_CHAIN:
				chain = unix.ByteSliceToString(attribute.Value)
			case unix.NFTA_RULE_USERDATA:
				comment, _ = userdata.GetString(attribute.Value, userdata.TypeComment)
			}
		}
		found[chain] = append(found[chain], comment)
	}
	return found, nil
}

// replaceFilter makes the table anew in one step. A new namespace has none to
// delete, and does not wait for the kernel to free it.
func replaceFilter(conn *nftables.Conn, rules map[string][]filterRule) error {
	table := &nftables.Table{Name: FilterTable, Family: nftables.TableFamilyINet}
	if _, err := conn.ListTableOfFamily(FilterTable, nftables.TableFamilyINet); err == nil {
		conn.DelTable(table)
	} else if !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("find table: %w", err)
	}
	conn.AddTable(table)
	hooks := filterHooks()
	for name, list := range rules {
		chain := conn.AddChain(&nftables.Chain{
			Name: name, Table: table, Type: nftables.ChainTypeFilter, Hooknum: hooks[name].hook, Priority: hooks[name].priority,
		})
		for _, r := range list {
			conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: r.exprs,
				UserData: userdata.AppendString(nil, userdata.TypeComment, r.comment)})
		}
	}
	return conn.Flush()
}

// Remove removes the namespace's table and reports whether there was one.
// A kernel without nf_tables has none.
func (s *Setter) Remove(ns *host.Namespace) (removed bool, err error) {
	err = s.withNFTables(ns, func(conn *nftables.Conn) error {
		// A transaction that finds nothing to delete makes the kernel wait for all
		// packets under way, some 15 ms, and most namespaces have no table.
		if _, err := conn.ListTableOfFamily(FilterTable, nftables.TableFamilyINet); err != nil {
			return err
		}
		conn.DelTable(&nftables.Table{Name: FilterTable, Family: nftables.TableFamilyINet})
		return conn.Flush()
	})
	for _, none := range []error{unix.ENOENT, unix.EPROTONOSUPPORT, unix.EINVAL, unix.EOPNOTSUPP} {
		if errors.Is(err, none) {
			return false, nil
		}
	}
	if err != nil {
		return false, fmt.Errorf("remove filter of forwarded packets: %w", err)
	}
	return true, nil
}

// withNFTables hands action a connection to the namespace's nftables.
func (s *Setter) withNFTables(ns *host.Namespace, action func(*nftables.Conn) error) error {
	return ns.Do(func() error {
		conn, err := nftables.New(nftables.AsLasting())
		if err != nil {
			return fmt.Errorf("open nftables: %w", err)
		}
		defer s.closeBehind(conn)
		return action(conn)
	})
}

// closeBehind closes the connection while the caller goes on. The kernel closes no socket
// of netfilter in a namespace before it has freed what was deleted there, which is after
// all packets under way, some 15 ms (nft_rcv_nl_event). What was asked for is in force
// by then, and a socket that cannot be closed goes with the process.
func (s *Setter) closeBehind(conn *nftables.Conn) {
	s.waiting <- struct{}{}
	go func() {
		s.closing <- struct{}{}
		_ = conn.CloseLasting()
		<-s.closing
		<-s.waiting
	}()
}
