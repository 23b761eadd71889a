// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cilium/ebpf"
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
// origin has another one, or none), so a Collector that dies leaves nothing
// behind but a new grace period. One Collector per node; not safe for
// concurrent use.
type Collector struct {
	Rest  time.Duration // how long an origin must not have been dialled
	Grace time.Duration // between the two steps; not below what a connect may take

	datapath  *Datapath
	condemned map[bpfIndexKey]time.Time
}

// NewCollector returns a collector with the default times.
func (d *Datapath) NewCollector() *Collector {
	return &Collector{Rest: DefaultRest, Grace: DefaultGrace, datapath: d, condemned: make(map[bpfIndexKey]time.Time)}
}

// Run makes one pass over the node and returns how many indexes it gave back.
// It touches only workloads that hold more than half of their budget, unless
// the node's table itself is more than half full.
func (c *Collector) Run() (freed int, err error) {
	err = c.datapath.locked(func() error {
		freed, err = c.run()
		return err
	})
	if err != nil {
		return freed, fmt.Errorf("collect origins: %w", err)
	}
	return freed, nil
}

// held is how many origin addresses a workload holds.
func (t *tables) held(cookie uint64) (uint32, error) {
	var budget bpfBudget
	var released uint32
	if _, err := t.get("budgets", cookie, &budget); err != nil {
		return 0, err
	}
	if _, err := t.get("releases", cookie, &released); err != nil {
		return 0, err
	}
	return budget.Used - released, nil
}

func (c *Collector) run() (freed int, err error) {
	tables, err := openTables(c.datapath.paths.maps())
	if err != nil {
		return 0, err
	}
	defer tables.Close()
	excess, err := pressed(tables)
	if err != nil || len(excess) == 0 && len(c.condemned) == 0 {
		return 0, err
	}
	records, err := c.datapath.paths.readRecords()
	if err != nil && !errors.Is(err, ErrUnreadable) {
		return 0, err
	}
	held, err := readHeld(tables)
	if err != nil {
		return 0, err
	}
	var problems []error
	seen := make(map[bpfIndexKey]time.Time)
	for _, r := range records {
		n, err := c.collect(tables, r, held[r.Cookie], excess[r.Cookie], seen)
		freed += n
		if err != nil && !errors.Is(err, ErrNetNSGone) {
			problems = append(problems, fmt.Errorf("workload %s: %w", r.Key, err))
		}
	}
	c.condemned = seen
	return freed, errors.Join(problems...)
}

// pressed returns how many origins each workload should give up. It reads the
// tables alone: a node full of calm workloads costs a few system calls.
func pressed(tables *tables) (map[uint64]int, error) {
	table, err := tables.table("origins")
	if err != nil {
		return nil, err
	}
	limit := int(table.MaxEntries())
	held := make(map[uint64]uint32) // both counts may have gone round
	if err := walk(tables, "budgets", func(cookie uint64, row bpfBudget) { held[cookie] += row.Used }); err != nil {
		return nil, err
	}
	if err := walk(tables, "releases", func(cookie uint64, released uint32) { held[cookie] -= released }); err != nil {
		return nil, err
	}
	excess := make(map[uint64]int)
	total := 0
	for cookie, count := range held {
		if total += int(count); count == 0 {
			continue
		}
		generation, err := tables.generation(cookie)
		if err != nil {
			return nil, err
		}
		var config bpfConfig
		found, err := tables.get("configs", bpfConfigKey{Cookie: cookie, Generation: generation}, &config)
		if err != nil {
			return nil, err
		}
		if over := int(count) - int(config.Budget)/2; found && over > 0 {
			excess[cookie] = over
		}
	}
	if total > limit/2 {
		for cookie := range held {
			excess[cookie] = limit
		}
	}
	return excess, nil
}

// heldOrigin is one index of a workload. Condemned says that its forward row
// is gone or has another index.
type heldOrigin struct {
	index     uint32
	addr      bpfAddr
	usedNs    uint64
	condemned bool
}

// readHeld reads the tables of all workloads once, in large batches.
func readHeld(tables *tables) (map[uint64][]heldOrigin, error) {
	forward := make(map[bpfOriginKey]bpfOrigin)
	err := walk(tables, "origins", func(key bpfOriginKey, row bpfOrigin) { forward[key] = row })
	if err != nil {
		return nil, err
	}
	held := make(map[uint64][]heldOrigin)
	err = walk(tables, "indexes", func(key bpfIndexKey, addr bpfAddr) {
		row, found := forward[bpfOriginKey{Cookie: key.Cookie, Addr: addr}]
		held[key.Cookie] = append(held[key.Cookie], heldOrigin{
			index: key.Index, addr: addr, usedNs: row.UsedNs, condemned: !found || row.Index != key.Index,
		})
	})
	return held, err
}

// walk visits every row of a hash table in batches (Linux 5.6).
func walk[K, V any](tables *tables, name string, visit func(K, V)) error {
	table, err := tables.table(name)
	if err != nil {
		return err
	}
	const batch = 4096
	keys, values := make([]K, batch), make([]V, batch)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := table.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			visit(keys[i], values[i])
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("walk map %s: %w", name, err)
		}
	}
}

// collect makes both steps for one workload.
func (c *Collector) collect(tables *tables, r *record, held []heldOrigin, excess int, seen map[bpfIndexKey]time.Time) (freed int, err error) {
	if len(held) == 0 {
		return 0, nil
	}
	ns, err := r.open()
	if err != nil {
		return 0, err
	}
	defer ns.Close()
	inUse, err := ns.encodedInUse()
	if err != nil {
		return 0, err
	}
	now := time.Now()
	for _, origin := range held {
		key := bpfIndexKey{Cookie: r.Cookie, Index: origin.index}
		if !origin.condemned {
			continue
		}
		since, known := c.condemned[key]
		if !known {
			since = now
		}
		if inUse[origin.index] || now.Sub(since) < c.Grace {
			seen[key] = since
			continue
		}
		if err := tables.drop("indexes", key); err != nil {
			return freed, err
		}
		freed++
	}
	if freed > 0 {
		if err := tables.release(r.Cookie, freed); err != nil {
			return freed, err
		}
	}
	return freed, c.condemn(tables, r.Cookie, held, inUse, excess-freed, seen)
}

// condemn takes the forward rows of up to excess origins, longest rested first.
func (c *Collector) condemn(tables *tables, cookie uint64, held []heldOrigin, inUse map[uint32]bool, excess int, seen map[bpfIndexKey]time.Time) error {
	slices.SortFunc(held, func(a, b heldOrigin) int { return cmp.Compare(a.usedNs, b.usedNs) })
	before := monotonicNow() - min(uint64(c.Rest), monotonicNow())
	for _, origin := range held {
		if excess <= 0 || origin.usedNs > before {
			break
		}
		if origin.condemned || inUse[origin.index] {
			continue
		}
		if err := tables.drop("origins", bpfOriginKey{Cookie: cookie, Addr: origin.addr}); err != nil {
			return err
		}
		seen[bpfIndexKey{Cookie: cookie, Index: origin.index}] = time.Now()
		excess--
	}
	return nil
}

// release counts indexes as given back.
func (t *tables) release(cookie uint64, freed int) error {
	var released uint32
	if _, err := t.get("releases", cookie, &released); err != nil {
		return err
	}
	return t.put("releases", cookie, released+uint32(freed), ebpf.UpdateAny)
}
