// SPDX-License-Identifier: MPL-2.0

package bpfmap

import "github.com/cilium/ebpf"

// HeldByAll is how many origin addresses each workload holds, and their sum.
func (m *Tables) HeldByAll() (held map[uint64]uint32, total uint32, err error) {
	held = make(map[uint64]uint32) // both counts may have gone round
	err = Walk(m, "budgets", func(cookie uint64, row BpfBudget) error { held[cookie] += row.Used; return nil })
	if err != nil {
		return nil, 0, err
	}
	err = Walk(m, "releases", func(cookie uint64, released uint32) error {
		if _, found := held[cookie]; found {
			held[cookie] -= released
		}
		return nil
	})
	for _, count := range held {
		total += count
	}
	return held, total, err
}

// HeldByNode is the sum as the programs see it. They look at it, and not at each
// workload's, before they give another index to one that holds many.
func (m *Tables) HeldByNode() (uint32, error) {
	var given, freed uint32
	if _, err := m.Get("index_totals", uint32(indexesGiven), &given); err != nil {
		return 0, err
	}
	if _, err := m.Get("index_totals", uint32(IndexesFreed), &freed); err != nil {
		return 0, err
	}
	return given - freed, nil
}

func (m *Tables) freeForNode(count uint32) error {
	var freed uint32
	if _, err := m.Get("index_totals", uint32(IndexesFreed), &freed); err != nil {
		return err
	}
	return m.Put("index_totals", uint32(IndexesFreed), freed+count, ebpf.UpdateAny)
}

// TotalIsOff reports by how much the node's sum is not that of its workloads.
func (m *Tables) TotalIsOff() (by uint32, off bool, err error) {
	const racing = 64 // programs may have counted for one and not yet for the other
	_, total, err := m.HeldByAll()
	if err != nil {
		return 0, false, err
	}
	node, err := m.HeldByNode()
	by = node - total
	return by, by+racing > 2*racing, err
}

// CorrectTotal makes the node's sum that of its workloads where the two have
// come apart: a process died between two writes, or rows were lost. The caller
// holds the lock.
func (m *Tables) CorrectTotal() error {
	by, off, err := m.TotalIsOff()
	if err != nil || !off {
		return err
	}
	return m.freeForNode(by)
}

// IsPendingFree reports whether no connect can pick the index any more.
func (m *Tables) IsPendingFree(key BpfIndexKey, addr BpfAddr) (bool, error) {
	var row BpfOrigin
	found, err := m.Get("origins", BpfOriginKey{Cookie: key.Cookie, Addr: addr}, &row)
	return err == nil && (!found || row.Index != key.Index), err
}

// Held is how many origin addresses a workload holds.
func (m *Tables) Held(cookie uint64) (uint32, error) {
	var budget BpfBudget
	var released uint32
	if _, err := m.Get("budgets", cookie, &budget); err != nil {
		return 0, err
	}
	if _, err := m.Get("releases", cookie, &released); err != nil {
		return 0, err
	}
	return budget.Used - released, nil
}

// FreeIndexes counts indexes as given back, for the workload and for the node.
func (m *Tables) FreeIndexes(cookie uint64, freed int) error {
	var released uint32
	if _, err := m.Get("releases", cookie, &released); err != nil {
		return err
	}
	if err := m.Put("releases", cookie, released+uint32(freed), ebpf.UpdateAny); err != nil {
		return err
	}
	return m.freeForNode(uint32(freed))
}
