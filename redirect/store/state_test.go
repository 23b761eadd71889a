// SPDX-License-Identifier: MPL-2.0

package store

import (
	"encoding/json"
	"testing"

	"github.com/weirmesh/weir/redirect/workload"
)

func TestRecordState(t *testing.T) {
	transitions := map[string]func(*Record){
		"begin":     (*Record).Begin,
		"finish":    func(r *Record) { r.Finish(workload.Workload{InboundPort: 7}) },
		"lose rows": (*Record).LoseRows,
	}
	for _, c := range []struct {
		from State
		by   string
		want State
	}{
		{New, "begin", New}, {New, "finish", Complete}, {New, "lose rows", New},
		{Incomplete, "begin", Incomplete}, {Incomplete, "finish", Complete}, {Incomplete, "lose rows", New},
		{Complete, "begin", Incomplete}, {Complete, "finish", Complete}, {Complete, "lose rows", New},
	} {
		t.Run(c.from.String()+" "+c.by, func(t *testing.T) {
			r := &Record{State: c.from}
			transitions[c.by](r)
			if r.State != c.want {
				t.Errorf("state is %s, want %s", r.State, c.want)
			}
			if finished := r.Applied.InboundPort == 7; finished != (c.by == "finish") {
				t.Errorf("applied workload: %+v", r.Applied)
			}
		})
	}
}

// The key is the one that older versions read and write.
func TestRecordStateOnDisk(t *testing.T) {
	for _, c := range []struct {
		state State
		text  string
		back  State
	}{
		{New, "false", Incomplete}, {Incomplete, "false", Incomplete}, {Complete, "true", Complete},
	} {
		var keys map[string]json.RawMessage
		text, err := json.Marshal(&Record{State: c.state})
		if err == nil {
			err = json.Unmarshal(text, &keys)
		}
		if err != nil || string(keys["complete"]) != c.text {
			t.Errorf("%s is written as %s, %v; want %s", c.state, keys["complete"], err, c.text)
		}
		r := &Record{State: New}
		if err := json.Unmarshal(text, r); err != nil || r.State != c.back {
			t.Errorf("%s comes back as %s, %v; want %s", c.state, r.State, err, c.back)
		}
	}
	r := &Record{State: Complete}
	if err := json.Unmarshal([]byte(`{"complete": 1}`), r); err == nil {
		t.Error("a state that is no boolean was read")
	}
}
