// SPDX-License-Identifier: MPL-2.0

package redirect

import "github.com/cilium/ebpf"

// heldByAll is how many origin addresses each workload holds, and their sum.
func (t *tables) heldByAll() (held map[uint64]uint32, total uint32, err error) {
	held = make(map[uint64]uint32) // both counts may have gone round
	err = walk(t, "budgets", func(cookie uint64, row bpfBudget) error { held[cookie] += row.Used; return nil })
	if err != nil {
		return nil, 0, err
	}
	err = walk(t, "releases", func(cookie uint64, released uint32) error {
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

// heldByNode is the sum as the programs see it. They look at it, and not at each
// workload's, before they give another index to one that holds many.
func (t *tables) heldByNode() (uint32, error) {
	var given, freed uint32
	if _, err := t.get("index_totals", uint32(indexesGiven), &given); err != nil {
		return 0, err
	}
	if _, err := t.get("index_totals", uint32(indexesFreed), &freed); err != nil {
		return 0, err
	}
	return given - freed, nil
}

func (t *tables) freeForNode(count uint32) error {
	var freed uint32
	if _, err := t.get("index_totals", uint32(indexesFreed), &freed); err != nil {
		return err
	}
	return t.put("index_totals", uint32(indexesFreed), freed+count, ebpf.UpdateAny)
}

// totalIsOff reports by how much the node's sum is not that of its workloads.
func (t *tables) totalIsOff() (by uint32, off bool, err error) {
	const racing = 64 // programs may have counted for one and not yet for the other
	_, total, err := t.heldByAll()
	if err != nil {
		return 0, false, err
	}
	node, err := t.heldByNode()
	by = node - total
	return by, by+racing > 2*racing, err
}

// correctTotal makes the node's sum that of its workloads where the two have
// come apart: a process died between two writes, or rows were lost. The caller
// holds the lock.
func (t *tables) correctTotal() error {
	by, off, err := t.totalIsOff()
	if err != nil || !off {
		return err
	}
	return t.freeForNode(by)
}
