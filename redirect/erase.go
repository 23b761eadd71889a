// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
)

// sliceRows is how many rows one process changes in bulk before it lets another
// have the lock: some milliseconds' worth.
const sliceRows = 1024

// deleteWorkload removes all that the tables hold of a workload. With applied nil, what
// the rows were made from is not known and the tables are walked. Origins that it
// takes a walk to find it leaves to eraseDead, and with them the row that counts
// them.
func (m *tables) deleteWorkload(cookie uint64, applied *Workload) error {
	generation, err := m.generation(cookie)
	if err != nil {
		return err
	}
	if err := m.delete("workloads", cookie); err != nil {
		return err
	}
	if applied != nil && generation != 0 {
		err = m.deleteRows(encodeRows(*applied, cookie, generation, true), cookie, generation)
	} else {
		err = m.deleteStale(cookie, nil)
	}
	if err != nil {
		return err
	}
	if err := m.deleteListeners(cookie, applied); err != nil {
		return err
	}
	if applied != nil && generation != 0 { // else deleteStale has
		if err := m.deleteProxies(cookie, applied.takenProxyIDs()); err != nil {
			return err
		}
	}
	for slot := range uint32(flowSlots) {
		if err := m.delete("flows", bpfFlowKey{Cookie: cookie, Slot: slot}); err != nil {
			return err
		}
	}
	if err := m.delete("verdicts", cookie); err != nil {
		return err
	}
	return m.deleteOrigins(cookie, applied)
}

// deleteOrigins removes the origins of a workload that had few: its indexes were
// given out from the first one on, so they can be counted through.
func (m *tables) deleteOrigins(cookie uint64, applied *Workload) error {
	var budget bpfBudget
	found, err := m.get("budgets", cookie, &budget)
	if err != nil || !found {
		return err
	}
	if budget.Next == 0 { // it has none, as after an ADD that failed
		return m.eraseBudget(cookie)
	}
	if applied == nil || applied.Sliced || budget.Next > 4*sliceRows {
		return nil
	}
	var held []bpfIndexKey
	var origins []bpfOriginKey
	for index := uint32(indexFirst); index < indexFirst+budget.Next; index++ {
		key := bpfIndexKey{Cookie: cookie, Index: index}
		var addr bpfAddr
		found, err := m.get("indexes", key, &addr)
		if err != nil {
			return err
		}
		if found {
			held, origins = append(held, key), append(origins, bpfOriginKey{Cookie: cookie, Addr: addr})
		}
	}
	if err := m.dropOrigins(cookie, origins, held); err != nil {
		return err
	}
	return m.eraseBudget(cookie)
}

// dropOrigins removes origins with their indexes.
func (m *tables) dropOrigins(cookie uint64, origins []bpfOriginKey, indexes []bpfIndexKey) error {
	if len(indexes) == 0 {
		return nil
	}
	return errors.Join(dropMany(m, "origins", origins), dropMany(m, "indexes", indexes), m.freeIndexes(cookie, len(indexes)))
}

// eraseBudget removes the rows that count a workload's indexes. What they still
// count is not there any more.
func (m *tables) eraseBudget(cookie uint64) error {
	held, err := m.held(cookie)
	if err == nil && held > 0 {
		err = m.freeForNode(held)
	}
	if err != nil {
		return err
	}
	return errors.Join(m.delete("budgets", cookie), m.delete("releases", cookie))
}
