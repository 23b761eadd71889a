// SPDX-License-Identifier: MPL-2.0

package bpfmap

import (
	"errors"

	"github.com/weirmesh/weir/redirect/workload"
)

// SliceRows is how many rows one process changes in bulk before it lets another
// have the lock: some milliseconds' worth.
const SliceRows = 1024

// DeleteWorkload removes all that the tables hold of a workload. With applied nil, what
// the rows were made from is not known and the tables are walked. Origins that it
// takes a walk to find it leaves to eraseDead, and with them the row that counts
// them.
func (m *Tables) DeleteWorkload(cookie uint64, applied *workload.Workload) error {
	generation, err := m.Generation(cookie)
	if err != nil {
		return err
	}
	if err := m.Delete("workloads", cookie); err != nil {
		return err
	}
	if applied != nil && generation != 0 {
		err = m.DeleteRows(EncodeRows(*applied, cookie, generation, true), cookie, generation)
	} else {
		err = m.DeleteStale(cookie, nil)
	}
	if err != nil {
		return err
	}
	if err := m.deleteListeners(cookie, applied); err != nil {
		return err
	}
	if applied != nil && generation != 0 { // else DeleteStale has
		if err := m.DeleteProxies(cookie, applied.TakenProxyIDs()); err != nil {
			return err
		}
	}
	for slot := range uint32(2 * FlowSlots) { // those that began outside come second
		if err := m.Delete("flows", BpfFlowKey{Cookie: cookie, Slot: slot}); err != nil {
			return err
		}
	}
	if err := m.Delete("verdicts", cookie); err != nil {
		return err
	}
	return m.deleteOrigins(cookie, applied)
}

// deleteOrigins removes the origins of a workload that had few: its indexes were
// given out from the first one on, so they can be counted through.
func (m *Tables) deleteOrigins(cookie uint64, applied *workload.Workload) error {
	var budget BpfBudget
	found, err := m.Get("budgets", cookie, &budget)
	if err != nil || !found {
		return err
	}
	if budget.Next == 0 { // it has none, as after an ADD that failed
		return m.EraseBudget(cookie)
	}
	if applied == nil || applied.Sliced || budget.Next > 4*SliceRows {
		return nil
	}
	var held []BpfIndexKey
	var origins []BpfOriginKey
	for index := uint32(IndexFirst); index < IndexFirst+budget.Next; index++ {
		key := BpfIndexKey{Cookie: cookie, Index: index}
		var addr BpfAddr
		found, err := m.Get("indexes", key, &addr)
		if err != nil {
			return err
		}
		if found {
			held, origins = append(held, key), append(origins, BpfOriginKey{Cookie: cookie, Addr: addr})
		}
	}
	if err := m.DropOrigins(cookie, origins, held); err != nil {
		return err
	}
	return m.EraseBudget(cookie)
}

// DropOrigins removes origins with their indexes.
func (m *Tables) DropOrigins(cookie uint64, origins []BpfOriginKey, indexes []BpfIndexKey) error {
	if len(indexes) == 0 {
		return nil
	}
	return errors.Join(DropMany(m, "origins", origins), DropMany(m, "indexes", indexes), m.FreeIndexes(cookie, len(indexes)))
}

// HasBudget reports whether the row is there that counts a workload's indexes: the last one
// to go.
func (m *Tables) HasBudget(cookie uint64) (bool, error) {
	var budget BpfBudget
	return m.Get("budgets", cookie, &budget)
}

// EraseBudget removes the rows that count a workload's indexes. What they still
// count is not there any more.
func (m *Tables) EraseBudget(cookie uint64) error {
	held, err := m.Held(cookie)
	if err == nil && held > 0 {
		err = m.freeForNode(held)
	}
	if err != nil {
		return err
	}
	return errors.Join(m.Delete("releases", cookie), m.Delete("budgets", cookie))
}
