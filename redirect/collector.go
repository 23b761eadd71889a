// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/store"
)

// Defaults of a Collector.
const (
	DefaultRest  = time.Minute
	DefaultGrace = 10 * time.Second
)

// Collector gives back the indexes of origins that a workload no longer uses,
// so that one that dials ever new destinations never runs dry. An index must
// not mean two origins while any socket carries it, so it goes in two steps:
//
//  1. An origin that rested, and whose index no socket of the namespace
//     carries, loses its forward row: no connect can pick the index any more.
//  2. After a grace period, in which a connect that had picked it before has
//     got as far as a socket, the index is free if there is still no socket,
//     TIME_WAIT and SYN_RECV included. Sockets are exact: the index is their
//     address.
//
// New indexes are given out in ascending order round the range of 8 million,
// so the one that rested longest is used first.
//
// What is between the two steps can be read off the tables (an index whose
// origin has another one, or none), so an IndexReclaimer that dies leaves nothing
// behind but a new grace period. Nothing is read under the node's lock, and rows
// go in slices, so that an ADD does not wait; what is remembered is bounded. One
// IndexReclaimer per node; not safe for concurrent use.
type IndexReclaimer struct {
	IdleAfter time.Duration // how long an origin must not have been dialled
	FreeAfter time.Duration // between the two steps; not below what a connect may take

	datapath    *Datapath
	pendingFree map[bpfmap.BpfIndexKey]time.Time // indexes between the two steps, and since when
	searched    map[uint64]time.Time             // when a workload's indexes were searched for more of them
}

// searchAgain is how long after a search there may be indexes again without an origin:
// one gets another index when the network that leads to it changes.
const searchAgain = 10 * time.Minute

// maxPending is how many indexes may be between the two steps: some 10 MiB.
const maxPending = 1 << 17

// NewIndexReclaimer returns a collector with the default times.
func (d *Datapath) NewIndexReclaimer() *IndexReclaimer {
	return &IndexReclaimer{
		IdleAfter: DefaultRest, FreeAfter: DefaultGrace, datapath: d,
		pendingFree: make(map[bpfmap.BpfIndexKey]time.Time), searched: make(map[uint64]time.Time),
	}
}

// Run makes one pass over the node and returns how many indexes it gave back.
// It touches only workloads that hold more than half of their budget and, where
// the node's table itself is more than half full, those that hold more than
// every workload may.
func (c *IndexReclaimer) Run() (freed int, err error) {
	freed, err = c.run()
	if err != nil {
		return freed, fmt.Errorf("collect origins: %w", err)
	}
	return freed, nil
}

func (c *IndexReclaimer) run() (freed int, err error) {
	tables, err := bpfmap.OpenTables(c.datapath.Paths().Maps())
	if err != nil {
		return 0, err
	}
	defer tables.Close()
	excess, err := c.excess(tables)
	if err != nil || len(excess) == 0 && len(c.pendingFree) == 0 {
		return 0, err
	}
	records, err := c.datapath.Paths().ReadRecords()
	if err != nil && !errors.Is(err, store.ErrUnreadable) {
		return 0, err
	}
	if err := c.search(tables, excess); err != nil {
		return 0, err
	}
	pending := make(map[uint64][]bpfmap.BpfIndexKey)
	for key := range c.pendingFree {
		pending[key.Cookie] = append(pending[key.Cookie], key)
		excess[key.Cookie]--
	}
	quota := make(map[uint64]int)
	for cookie, count := range excess {
		// At least one each, if there is room at all: the others' turn comes.
		if most := min(count, max((maxPending-len(c.pendingFree))/len(excess), 1)); most > 0 {
			quota[cookie] = most
		}
	}
	rested, err := c.rested(tables, quota)
	if err != nil {
		return 0, err
	}
	var problems []error
	for _, r := range records {
		n, err := c.collect(tables, r, pending[r.Cookie], rested[r.Cookie], quota[r.Cookie])
		freed += n
		if err != nil && !errors.Is(err, host.ErrNetNSGone) {
			problems = append(problems, fmt.Errorf("workload %s: %w", r.Key, err))
		}
		delete(pending, r.Cookie)
	}
	for _, keys := range pending { // of workloads that are gone
		for _, key := range keys {
			delete(c.pendingFree, key)
		}
	}
	return freed, errors.Join(problems...)
}

// excess returns how many origins each workload should give up. It reads the
// tables alone: a node full of calm workloads costs a few system calls.
func (c *IndexReclaimer) excess(tables *bpfmap.Tables) (map[uint64]int, error) {
	table, err := tables.Table("origins")
	if err != nil {
		return nil, err
	}
	limit := int(table.MaxEntries())
	held, total, err := tables.HeldByAll()
	if err != nil {
		return nil, err
	}
	_, off, err := tables.TotalIsOff()
	if err == nil && off {
		err = c.datapath.Locked(tables.CorrectTotal)
	}
	if err != nil {
		return nil, err
	}
	excess := make(map[uint64]int)
	for cookie, count := range held {
		if count == 0 {
			continue
		}
		over, err := overBudget(tables, cookie, int(count))
		if err != nil {
			return nil, err
		}
		if int(total) > limit/2 {
			over = max(over, int(count)-bpfmap.OriginShare)
		}
		if over > 0 {
			excess[cookie] = over
		}
	}
	for cookie := range c.searched {
		if _, still := held[cookie]; !still {
			delete(c.searched, cookie)
		}
	}
	return excess, nil
}

// overBudget is by how many origins a workload has more than half of its budget; 0 for
// one without rows.
func overBudget(tables *bpfmap.Tables, cookie uint64, count int) (int, error) {
	generation, err := tables.Generation(cookie)
	if err != nil {
		return 0, err
	}
	var config bpfmap.BpfConfig
	found, err := tables.Get("configs", bpfmap.BpfConfigKey{Cookie: cookie, Generation: generation}, &config)
	if err != nil || !found {
		return 0, err
	}
	return count - int(config.Budget)/2, nil
}

// search finds, for each workload now and then, indexes that are between the two
// steps and not remembered, such as those of a former collector: their origin has
// another index, or none.
func (c *IndexReclaimer) search(tables *bpfmap.Tables, excess map[uint64]int) error {
	wanted := make(map[uint64]bool)
	now := time.Now()
	for cookie := range excess {
		if now.Sub(c.searched[cookie]) > searchAgain {
			wanted[cookie] = true
		}
	}
	if len(wanted) == 0 {
		return nil
	}
	err := bpfmap.Walk(tables, "indexes", func(key bpfmap.BpfIndexKey, addr bpfmap.BpfAddr) error {
		if !wanted[key.Cookie] || len(c.pendingFree) >= maxPending {
			return nil
		}
		pending, err := tables.IsPendingFree(key, addr)
		if _, known := c.pendingFree[key]; pending && !known {
			c.pendingFree[key] = now
		}
		return err
	})
	if err == nil && len(c.pendingFree) < maxPending {
		for cookie := range wanted {
			c.searched[cookie] = now
		}
	}
	return err
}

// restedOrigin is an origin that was not dialled for a while.
type restedOrigin struct {
	addr   bpfmap.BpfAddr
	index  uint32
	usedNs uint64
}

// rested returns origins that each workload may give up, longest rested first:
// up to twice its quota, since sockets may carry some of them.
func (c *IndexReclaimer) rested(tables *bpfmap.Tables, quota map[uint64]int) (map[uint64][]restedOrigin, error) {
	rested := make(map[uint64][]restedOrigin)
	if len(quota) == 0 {
		return rested, nil
	}
	oldest := func(list []restedOrigin, most int) []restedOrigin {
		slices.SortFunc(list, func(a, b restedOrigin) int { return cmp.Compare(a.usedNs, b.usedNs) })
		return list[:min(len(list), most)]
	}
	before := bpfmap.MonotonicNow() - min(uint64(c.IdleAfter), bpfmap.MonotonicNow())
	err := bpfmap.Walk(tables, "origins", func(key bpfmap.BpfOriginKey, row bpfmap.BpfOrigin) error {
		most := quota[key.Cookie]
		if most == 0 || row.UsedNs > before {
			return nil
		}
		list := append(rested[key.Cookie], restedOrigin{addr: key.Addr, index: row.Index, usedNs: row.UsedNs})
		if len(list) >= 4*most+16 { // memory is bounded, whatever a workload dials
			list = oldest(list, 2*most)
		}
		rested[key.Cookie] = list
		return nil
	})
	for cookie, list := range rested {
		rested[cookie] = oldest(list, 2*quota[cookie])
	}
	return rested, err
}

// collect makes both steps for one workload: it frees pending indexes, and
// makes up to quota of those of rested origins pending.
func (c *IndexReclaimer) collect(tables *bpfmap.Tables, r *store.Record, pending []bpfmap.BpfIndexKey, rested []restedOrigin, quota int) (freed int, err error) {
	if len(pending)+len(rested) == 0 {
		return 0, nil
	}
	ns, err := inspect.OpenNamespaceOf(r)
	if err != nil {
		return 0, err
	}
	defer ns.Close()
	now := time.Now() // before the look at the sockets
	inUse, err := ns.EncodedInUse()
	if err != nil {
		return 0, err
	}
	pending = slices.DeleteFunc(pending, func(key bpfmap.BpfIndexKey) bool {
		return inUse[key.Index] || now.Sub(c.pendingFree[key]) < c.FreeAfter
	})
	rested = slices.DeleteFunc(rested, func(origin restedOrigin) bool { return inUse[origin.index] })
	rested = rested[:min(len(rested), quota)]
	err = c.datapath.inSlices(func() (more bool, err error) {
		slice := pending[:min(len(pending), bpfmap.SliceRows)]
		pending = pending[len(slice):]
		n, err := c.free(tables, r.Cookie, slice)
		freed += n
		return len(pending) > 0, err
	})
	if err != nil {
		return freed, err
	}
	return freed, c.datapath.inSlices(func() (more bool, err error) {
		slice := rested[:min(len(rested), bpfmap.SliceRows)]
		rested = rested[len(slice):]
		return len(rested) > 0, c.markPendingFree(tables, r.Cookie, slice)
	})
}

// free gives pending indexes back. Each is looked at again: the workload may
// have been removed and added again since, and the index be another origin's.
func (c *IndexReclaimer) free(tables *bpfmap.Tables, cookie uint64, pending []bpfmap.BpfIndexKey) (freed int, err error) {
	var free []bpfmap.BpfIndexKey
	for _, key := range pending {
		var addr bpfmap.BpfAddr
		found, err := tables.Get("indexes", key, &addr)
		if err == nil && found {
			found, err = tables.IsPendingFree(key, addr)
		}
		if err != nil {
			return 0, err
		}
		if found {
			free = append(free, key)
		}
		delete(c.pendingFree, key)
	}
	if len(free) == 0 {
		return 0, nil
	}
	if err := bpfmap.DropMany(tables, "indexes", free); err != nil {
		return 0, err
	}
	return len(free), tables.FreeIndexes(cookie, len(free))
}

// markPendingFree takes the forward rows of origins that are as they were seen.
func (c *IndexReclaimer) markPendingFree(tables *bpfmap.Tables, cookie uint64, rested []restedOrigin) error {
	var stale []bpfmap.BpfOriginKey
	now := time.Now()
	for _, origin := range rested {
		key := bpfmap.BpfOriginKey{Cookie: cookie, Addr: origin.addr}
		var row bpfmap.BpfOrigin
		found, err := tables.Get("origins", key, &row)
		if err != nil {
			return err
		}
		if !found || row.Index != origin.index || row.UsedNs != origin.usedNs {
			continue
		}
		stale = append(stale, key)
		c.pendingFree[bpfmap.BpfIndexKey{Cookie: cookie, Index: origin.index}] = now
	}
	return bpfmap.DropMany(tables, "origins", stale)
}
