// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"bufio"
	"net/http"
	"time"

	"github.com/weirmesh/weir/redirect/bpfmap"
)

// serveFlows answers with a JSON object a line, one a flow.
func (f *flows) serveFlows(w http.ResponseWriter, r *http.Request) {
	query, err := parseFlowQuery(r.URL.Query(), time.Now())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	f.stream(w, r, query, func(record *flowRecord) any {
		if !IsConnection(record.verdict) {
			return nil
		}
		flow := record.flow(f.node)
		if record.verdict != bpfmap.EventsLost && !query.matches(&flow) {
			return nil
		}
		return flow
	})
}

// serveEvents answers with what the kernel tells from now on, as it tells it.
func (f *flows) serveEvents(w http.ResponseWriter, r *http.Request) {
	f.stream(w, r, FlowQuery{Follow: true}, func(record *flowRecord) any {
		if record.verdict == bpfmap.Held {
			return nil // no program said so
		}
		return record.event()
	})
}

// stream writes what a reader wants of the records, a line each, and what it lost.
func (f *flows) stream(w http.ResponseWriter, r *http.Request, query FlowQuery, line func(*flowRecord) any) {
	if f == nil {
		http.Error(w, ErrFlowsOff.Error(), http.StatusNotImplemented)
		return
	}
	// The server's bounds are for requests that come to an end.
	control := http.NewResponseController(w)
	if err := control.SetReadDeadline(time.Time{}); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	if text := f.trouble(); text != "" {
		w.Header().Set(flowProblem, text)
	}
	out := &flowWriter{to: bufio.NewWriterSize(w, 64<<10), control: control, node: f.node}
	if err := f.copy(r.Context(), out, query, line); err != nil {
		f.log.Debug("answer not delivered", "error", err)
	}
}
