// SPDX-License-Identifier: MPL-2.0

package flow

import (
	"bufio"
	"net/http"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/bpfmap"
)

// ServeFlows answers with a JSON object a line, one a flow.
func (f *Recorder) ServeFlows(w http.ResponseWriter, r *http.Request) {
	query, err := api.ParseFlowQuery(r.URL.Query(), time.Now())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	f.stream(w, r, query, func(record *Record) any {
		if !record.Verdict.IsConnection() {
			return nil
		}
		flow := f.flow(record)
		if record.Verdict != bpfmap.EventsLost && !query.Matches(&flow) {
			return nil
		}
		return flow
	})
}

// ServeEvents answers with what the kernel tells from now on, as it tells it.
func (f *Recorder) ServeEvents(w http.ResponseWriter, r *http.Request) {
	f.stream(w, r, api.FlowQuery{Follow: true}, func(record *Record) any {
		if record.Verdict == bpfmap.Held {
			return nil // no program said so
		}
		return record.event()
	})
}

// stream writes what a reader wants of the records, a line each, and what it lost.
func (f *Recorder) stream(w http.ResponseWriter, r *http.Request, query api.FlowQuery, line func(*Record) any) {
	if f == nil {
		http.Error(w, api.ErrFlowsOff.Error(), http.StatusNotImplemented)
		return
	}
	// The server's bounds are for requests that come to an end.
	control := http.NewResponseController(w)
	if err := control.SetReadDeadline(time.Time{}); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	if text := f.Trouble(); text != "" {
		w.Header().Set(api.FlowProblem, text)
	}
	out := &flowWriter{to: bufio.NewWriterSize(w, 64<<10), control: control, node: f.Node}
	if err := f.copy(r.Context(), out, query, line); err != nil {
		f.log.Debug("answer not delivered", "error", err)
	}
}
