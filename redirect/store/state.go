// SPDX-License-Identifier: MPL-2.0

package store

import (
	"encoding/json"

	"github.com/weirmesh/weir/redirect/workload"
)

// State is how a record stands to the kernel's rows.
type State uint8

// The states of a record.
//
//	            Begin              Finish
//	New         New                Complete
//	Incomplete  Incomplete         Complete
//	Complete    Incomplete         Complete
//
// LoseRows leads from each to New. On disk there are two: a process that died left nothing
// that is New.
const (
	Incomplete State = iota // a change has begun: which rows there are, nobody knows
	New                     // made by this call: nobody can have left rows of it
	Complete                // the rows are those of Applied and no others
)

func (s State) String() string {
	switch s {
	case New:
		return "new"
	case Complete:
		return "complete"
	}
	return "incomplete"
}

// MarshalJSON writes the form of the key "complete", which older versions read.
func (s State) MarshalJSON() ([]byte, error) { return json.Marshal(s == Complete) }

// UnmarshalJSON reads it.
func (s *State) UnmarshalJSON(text []byte) error {
	var complete bool
	if err := json.Unmarshal(text, &complete); err != nil {
		return err
	}
	*s = Incomplete
	if complete {
		*s = Complete
	}
	return nil
}

// Begin comes before the first change to the kernel; the caller writes the record then.
func (r *Record) Begin() {
	if r.State == Complete {
		r.State = Incomplete
	}
}

// Finish comes after the last change: the rows are those of the workload.
func (r *Record) Finish(applied workload.Workload) { r.State, r.Applied = Complete, applied }

// LoseRows says that the kernel has no row of the record, as after a loss of all maps.
func (r *Record) LoseRows() { r.State = New }
