// SPDX-License-Identifier: MPL-2.0

package bpfmap

import "github.com/cilium/ebpf"

// IsCondemned reports whether no connect can pick the index any more.
func (m *Tables) IsCondemned(key BpfIndexKey, addr BpfAddr) (bool, error) {
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
