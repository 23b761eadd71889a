// SPDX-License-Identifier: MPL-2.0

package told

import "maps"

// Unseen counts why the node's state could not be looked at or written, by the
// reason that inspect.CouldNotLook gives.
type Unseen struct {
	Records map[string]int // of the last reading of records
	Node    string         // of the last look at the data path; empty: nothing
}

// Reasons are all of them, with how many objects each concerns.
func (u Unseen) Reasons() map[string]int {
	all := maps.Clone(u.Records)
	if all == nil {
		all = make(map[string]int)
	}
	if u.Node != "" {
		all[u.Node]++
	}
	return all
}
