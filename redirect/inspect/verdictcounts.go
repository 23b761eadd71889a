// SPDX-License-Identifier: MPL-2.0

package inspect

import (
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
)

// WorkloadVerdicts are the counters of one workload since it was added.
type WorkloadVerdicts struct {
	Key   workload.AttachmentID `json:"key"`
	ID    string                `json:"id"`
	Job   string                `json:"job"`
	Group string                `json:"group"`
	workload.NomadNames
	Cookie uint64            `json:"cookie,string"`
	Counts map[string]uint64 `json:"counts"` // by Verdict.String(); verdicts never reached are left out

	EventsLost uint64 `json:"events_lost"` // that a reader of events did not get
}

// Verdicts returns the counters of every workload on record, beside an error
// where one cannot be read.
func (d *Reader) Verdicts() (list []WorkloadVerdicts, err error) {
	tables, err := bpfmap.OpenTablesToRead(d.paths.Maps())
	if err != nil {
		return nil, err
	}
	defer tables.Close()
	records, unreadable := d.paths.ReadRecords()
	for _, r := range records {
		counts, lost, err := tables.Verdicts(r.Cookie)
		if err != nil {
			return nil, err
		}
		list = append(list, WorkloadVerdicts{Key: r.Key, ID: r.Request.Job.AllocID, Job: r.Request.Job.ID,
			Group: r.Request.Job.Group, NomadNames: r.Request.Job.Names(r.Key), Cookie: r.Cookie, Counts: counts, EventsLost: lost})
	}
	return list, unreadable
}

// VerdictCounts returns the counters of the workloads with these cookies, by
// Verdict.String(); verdicts never reached are left out. A map read each, without
// the lock.
func (d *Reader) VerdictCounts(cookies []uint64) (map[uint64]map[string]uint64, error) {
	tables, err := bpfmap.OpenTablesToRead(d.paths.Maps())
	if err != nil {
		return nil, err
	}
	defer tables.Close()
	found := make(map[uint64]map[string]uint64, len(cookies))
	for _, cookie := range cookies {
		if found[cookie], _, err = tables.Verdicts(cookie); err != nil {
			return nil, err
		}
	}
	return found, nil
}
