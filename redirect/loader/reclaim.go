// SPDX-License-Identifier: MPL-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/program/filter"
	"github.com/weirmesh/weir/redirect/store"
)

// reclaim pins again what this instance has attached and no pin leads to: its
// tables with all rows, its links at the root, and its lookup programs. A second
// set beside one that runs would refuse every connection that the first redirects.
func (d *Loader) reclaim(root *os.File) (repairs []program.Repair, err error) {
	if !d.lacksPins() {
		return nil, nil
	}
	sets, err := program.SetsAt(root)
	if err != nil {
		return nil, err
	}
	control, err := program.PinnedID(filepath.Join(d.Paths().Maps(), "control"))
	if err != nil {
		return nil, err
	}
	var own *program.Set
	for _, s := range sets {
		if control != 0 && s.Tables["control"] == control {
			own = s
		}
	}
	if control == 0 {
		if list := d.OwnSets(sets); len(list) > 0 {
			own = list[0]
		}
	}
	if own == nil || own.Ends() {
		return nil, nil
	}
	if control == 0 && d.ends(root, own) {
		return nil, nil
	}
	repairs, err = d.pinTables(own)
	if errors.Is(err, errEnding) {
		return nil, nil
	}
	if err != nil {
		return repairs, err
	}
	links, err := d.pinLinks(own)
	repairs = append(repairs, links...)
	if err != nil {
		return repairs, err
	}
	calls, err := program.PinCalls(d.Paths())
	repairs = append(repairs, calls...)
	if err != nil {
		return repairs, err
	}
	filters, err := filter.PinFilters(d.Paths(), own)
	return append(repairs, filters...), err
}

// ends waits a moment where some of the set's programs run no more, and reports
// whether the others ended too: the kernel ends them one by one, and rules of
// nftables in namespaces hold the tables meanwhile.
func (d *Loader) ends(root *os.File, own *program.Set) bool {
	for deadline := time.Now().Add(500 * time.Millisecond); len(own.Programs) < len(program.ProgramNames()); time.Sleep(5 * time.Millisecond) {
		sets, err := program.SetsAt(root)
		if err != nil || time.Now().After(deadline) {
			return false
		}
		if !slices.ContainsFunc(sets, func(s *program.Set) bool { return s.Tables["control"] == own.Tables["control"] }) {
			return true
		}
	}
	return false
}

// OpenOrReclaim is OpenTables for who must not take a node without pins for one
// without programs.
func (d *Loader) OpenOrReclaim() (*bpfmap.Tables, error) {
	pinned, err := bpfmap.OpenTables(d.Paths().Maps())
	if !errors.Is(err, bpfmap.ErrNotLoaded) {
		return pinned, err
	}
	root, rootErr := d.Paths().OpenCgroupRoot()
	if rootErr != nil {
		return nil, err // nothing can be attached to it
	}
	defer root.Close()
	if repairs, failed := d.reclaim(root); failed != nil || len(repairs) == 0 {
		return nil, errors.Join(err, failed)
	}
	return bpfmap.OpenTables(d.Paths().Maps())
}

// lacksPins reports whether a pin of the node is not where it belongs.
func (d *Loader) lacksPins() bool {
	return len(missing(d.Paths().Maps(), bpfmap.MapNames())) > 0 || len(missing(d.Paths().Links(), program.ProgramNames())) > 0
}

// missing are the names that a directory does not have. One that cannot be read is not
// known to lack any.
func missing(dir string, names []string) []string {
	entries, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return names
	}
	if err != nil {
		return nil
	}
	defer entries.Close()
	list, err := entries.Readdirnames(-1)
	if err != nil {
		return nil
	}
	there := make(map[string]bool, len(list))
	for _, name := range list {
		there[name] = true
	}
	return slices.DeleteFunc(names, func(name string) bool { return there[name] })
}

// halfRestored reports whether pins are missing that only workloads need: those of the
// filter's programs, or the lookup program of one on record.
func (d *Loader) halfRestored() bool {
	records, _ := d.Paths().ReadRecords() // what cannot be read is told elsewhere
	lookups := make([]string, 0, len(records))
	for _, r := range records {
		lookups = append(lookups, filepath.Base(d.Paths().Lookup(r.Cookie)))
	}
	return len(missing(d.Paths().Lookups(), lookups)) > 0 ||
		len(records) > 0 && len(missing(d.Paths().Filters(), slices.Collect(maps.Values(filter.FilterNames())))) > 0
}

// errEnding: the programs ended while they were looked at.
var errEnding = errors.New("on its way out")

// pinTables pins all of the set's tables or, where one is gone already, none.
func (d *Loader) pinTables(s *program.Set) (repairs []program.Repair, err error) {
	tables := make(map[string]*ebpf.Map)
	defer bpfmap.CloseMaps(tables)
	for name, id := range s.Tables {
		table, err := ebpf.NewMapFromID(id)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, errEnding
		}
		if err != nil {
			return nil, fmt.Errorf("pin map %s again: %w", name, err)
		}
		tables[name] = table
	}
	for name, table := range tables {
		pinned, err := program.PinAgain(filepath.Join(d.Paths().Maps(), name), table)
		if err != nil {
			return repairs, err
		}
		if pinned {
			repairs = append(repairs, program.Repair{Kind: program.PinPutBack, Object: "map " + name})
		}
	}
	sortRepairs(repairs)
	return repairs, nil
}

// pinLinks pins the set's links. A link whose last pin was just removed may be on
// its way out: it is not there to be pinned then, and is attached anew later.
func (d *Loader) pinLinks(s *program.Set) (repairs []program.Repair, err error) {
	atRoot := make(map[ebpf.ProgramID]string)
	for name, ids := range s.Programs {
		atRoot[ids[0]] = name
	}
	cookies, err := d.cookiesByInode()
	if err != nil {
		return nil, err
	}
	err = program.EachLink(func(l link.Link, info *link.Info) error {
		path, what := "", ""
		if name := atRoot[info.Program]; name != "" && info.Cgroup() != nil {
			path, what = d.Paths().Link(name), name
		} else if ns := info.NetNs(); ns != nil && ns.NetnsInode != 0 {
			cookie, err := s.CookieOf(info.Program, cookies[uint64(ns.NetnsInode)])
			if err != nil || cookie == 0 {
				return err
			}
			path, what = d.Paths().Lookup(cookie), fmt.Sprintf("the lookup program of the namespace with cookie %d", cookie)
		}
		if path == "" {
			return nil
		}
		pinned, err := program.PinAgain(path, l)
		if pinned {
			repairs = append(repairs, program.Repair{Kind: program.PinPutBack, Object: what})
		}
		return err
	})
	sortRepairs(repairs)
	return repairs, err
}

// cookiesByInode are the cookies of the namespaces on record.
func (d *Loader) cookiesByInode() (map[uint64]uint64, error) {
	records, err := d.Paths().ReadRecords()
	if err != nil && !errors.Is(err, store.ErrUnreadable) {
		return nil, err
	}
	cookies := make(map[uint64]uint64)
	for _, r := range records {
		if ns, err := inspect.OpenNamespaceOf(r); err == nil {
			cookies[ns.Inode] = ns.Cookie
			ns.Close()
		}
	}
	return cookies, nil
}

// confirm looks at what a change of the node has come to: each program runs once
// at its hook, with the tables that are pinned. What else this instance has
// attached is detached: it would refuse what these programs redirect. One that
// ends takes a moment, so it is waited for.
func (d *Loader) confirm(root *os.File) (repairs []program.Repair, err error) {
	control, err := program.PinnedID(filepath.Join(d.Paths().Maps(), "control"))
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		wrong, stale, err := d.outcome(root, control)
		if err != nil || len(wrong) == 0 {
			return repairs, err
		}
		detached, err := program.DetachPrograms(stale)
		if err != nil {
			return repairs, err
		}
		repairs = append(repairs, detached...)
		if time.Now().After(deadline) {
			return repairs, fmt.Errorf("look at the repaired data path: %s: %w", strings.Join(wrong, "; "), program.ErrOtherInstance)
		}
	}
}

// outcome says what is wrong at the root, and which programs of this instance are
// too many there and in namespaces.
func (d *Loader) outcome(root *os.File, control ebpf.MapID) (wrong []string, stale []*program.Set, err error) {
	sets, err := program.SetsAt(root)
	if err != nil {
		return nil, nil, err
	}
	own := new(program.Set)
	for _, s := range sets {
		if s.Tables["control"] == control {
			own = s
		}
	}
	for _, s := range d.OwnSets(sets) {
		if s == own {
			continue
		}
		stale = append(stale, s)
		for name, ids := range s.Programs {
			wrong = append(wrong, fmt.Sprintf("%s hangs at the root beside this instance's, as program %v", name, ids))
		}
	}
	for _, name := range program.ProgramNames() {
		if ids := own.Programs[name]; len(ids) != 1 {
			wrong = append(wrong, fmt.Sprintf("%s runs %d times at its hook, not once", name, len(ids)))
		}
	}
	slices.Sort(wrong)
	return wrong, stale, nil
}

// sortRepairs puts them in the order of what they say.
func sortRepairs(list []program.Repair) {
	slices.SortFunc(list, func(a, b program.Repair) int { return strings.Compare(a.String(), b.String()) })
}
