// SPDX-License-Identifier: MPL-2.0

package redirect

import "github.com/cilium/ebpf"

// isCondemned reports whether no connect can pick the index any more.
func (t *tables) isCondemned(key bpfIndexKey, addr bpfAddr) (bool, error) {
	var row bpfOrigin
	found, err := t.get("origins", bpfOriginKey{Cookie: key.Cookie, Addr: addr}, &row)
	return err == nil && (!found || row.Index != key.Index), err
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

// freeIndexes counts indexes as given back, for the workload and for the node.
func (t *tables) freeIndexes(cookie uint64, freed int) error {
	var released uint32
	if _, err := t.get("releases", cookie, &released); err != nil {
		return err
	}
	if err := t.put("releases", cookie, released+uint32(freed), ebpf.UpdateAny); err != nil {
		return err
	}
	return t.freeForNode(uint32(freed))
}
