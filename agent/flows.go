// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
)

// flowProblem is the header of an answer that says why nothing is recorded at
// present, though it is to be.
const flowProblem = "Weir-Problem"

// flows records the node's connections: the one reader of the kernel's ring, for
// any number of readers of its own.
type flows struct {
	ring     *flowRing
	noting   sync.Mutex
	names    flowNames // under noting
	guard    *guardTable
	egress   *egressTable
	facts    atomic.Pointer[flowFacts] // of the newest pass
	datapath *redirect.Datapath
	node     string
	log      *slog.Logger
	pin      string        // of the kernel's ring
	done     chan struct{} // closed when nothing is recorded any more
	readers  atomic.Int32  // that wait for what is to come

	mu      sync.Mutex
	problem string // why nothing is recorded at present; empty: it is
}

// newFlows makes what Agent.Run runs; nil where flows are not to be recorded.
func newFlows(a *Agent) (*flows, error) {
	if !a.config.Flows.Enabled {
		return nil, nil //nolint:nilnil // nothing is an answer
	}
	node, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("read host name: %w", err)
	}
	f := &flows{
		ring: newFlowRing(a.config.Flows.bytes(), a.config.Flows.length()), guard: newGuardTable(time.Now()), egress: newEgressTable(), datapath: a.datapath, node: node, log: a.log,
		pin: filepath.Join(a.datapath.Paths().PinDir, "maps", "events"), done: make(chan struct{}),
		names: flowNames{known: a.datapath.Records, cgroupPath: host.CgroupPath, containers: a.containers},
	}
	f.names.learn(&flowFacts{})
	return f, nil
}

// learn gives flows the names that a pass found.
func (f *flows) learn(known []redirect.Record, consul snapshot) {
	if f != nil {
		f.facts.Store(&flowFacts{known: known, consul: consul})
		f.guard.keep(known, time.Now())
		f.egress.keep(known, time.Now())
	}
}

// run records until ctx ends. What cannot be read now is tried again.
func (f *flows) run(ctx context.Context) {
	defer close(f.done)
	for {
		err := f.read(ctx)
		if ctx.Err() != nil {
			return
		}
		f.tell(err)
		if _, alive := pause(ctx, time.Second, nil); !alive {
			return
		}
	}
}

// read records until the kernel's ring is another one, as after an upgrade or
// where somebody removed the pins.
func (f *flows) read(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var watch sync.WaitGroup
	defer watch.Wait()
	defer cancel()
	inode := inodeOf(f.pin)
	watch.Go(func() {
		for {
			if _, alive := pause(ctx, tick, nil); !alive {
				return
			}
			f.ring.tidy(time.Now())
			if inodeOf(f.pin) != inode {
				cancel()
				return
			}
			f.tell(nil) // it goes well
		}
	})
	err := f.datapath.Events(ctx, func(event redirect.Event) error {
		f.note(event)
		return nil
	})
	if errors.Is(err, redirect.ErrBusy) {
		return fmt.Errorf("%w: a 'weir events' that began without the agent; end it", err)
	}
	return err
}

// note records what the kernel tells, or what a start gate is seen to hold.
func (f *flows) note(event redirect.Event) {
	f.noting.Lock()
	defer f.noting.Unlock()
	if facts := f.facts.Load(); facts != nil && facts != f.names.facts {
		f.facts.CompareAndSwap(facts, nil)
		f.names.learn(facts)
	}
	record := f.names.record(event)
	f.ring.append(record)
	f.guard.note(&record)
	f.egress.note(&record)
}

// tell notes and logs why nothing is recorded, once.
func (f *flows) tell(err error) {
	f.mu.Lock()
	before := f.problem
	f.problem = errorText(err)
	f.mu.Unlock()
	switch {
	case err != nil && before != err.Error():
		f.log.Warn("flows are not recorded at present", "why", err)
	case err == nil && before != "":
		f.log.Info("flows are recorded again")
	}
}

// serveFlows answers with a JSON object a line, one a flow.
func (a *Agent) serveFlows(w http.ResponseWriter, r *http.Request) {
	query, err := parseFlowQuery(r.URL.Query(), time.Now())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	f := a.flows
	a.stream(w, r, query, func(record *flowRecord) any {
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
func (a *Agent) serveEvents(w http.ResponseWriter, r *http.Request) {
	a.stream(w, r, FlowQuery{Follow: true}, func(record *flowRecord) any {
		if record.verdict == bpfmap.Held {
			return nil // no program said so
		}
		return record.event()
	})
}

// stream writes what a reader wants of the records, a line each, and what it lost.
func (a *Agent) stream(w http.ResponseWriter, r *http.Request, query FlowQuery, line func(*flowRecord) any) {
	f := a.flows
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
	f.mu.Lock()
	if f.problem != "" {
		w.Header().Set(flowProblem, f.problem)
	}
	f.mu.Unlock()
	out := &flowWriter{to: bufio.NewWriterSize(w, 64<<10), control: control, node: f.node}
	if err := f.copy(r.Context(), out, query, line); err != nil {
		a.log.Debug("answer not delivered", "error", err)
	}
}

// flowWriter writes to one reader.
type flowWriter struct {
	to      *bufio.Writer
	control *http.ResponseController
	node    string
}

func (o *flowWriter) line(value any) error {
	text, err := json.Marshal(value)
	if err != nil {
		return err
	}
	_, err = o.to.Write(append(text, '\n'))
	return err
}

// extend gives a reader another minute to take what is written.
func (o *flowWriter) extend() error { return o.control.SetWriteDeadline(time.Now().Add(time.Minute)) }

func (o *flowWriter) flush() error { return errors.Join(o.to.Flush(), o.control.Flush()) }

func (o *flowWriter) lost(count uint64, cause LossCause) error {
	if count == 0 {
		return nil
	}
	return o.line(Flow{Schema: 1, Time: time.Now(), Node: o.node, Verdict: bpfmap.EventsLost.String(), Lost: count, Cause: cause})
}

// begin is the number of the first record for a reader, after it was told how
// many it asks for are not there any more.
func (f *flows) begin(out *flowWriter, query FlowQuery, line func(*flowRecord) any) (uint64, error) {
	if query.Follow && query.Last == 0 && query.Since.IsZero() {
		return f.ring.end(), nil
	}
	number, dropped := f.ring.since(query.Since)
	if query.Last > 0 {
		number = f.ring.last(query.Last, number, func(r *flowRecord) bool {
			return !query.ended(r.at) && r.verdict != bpfmap.EventsLost && line(r) != nil
		})
		return number, nil
	}
	return number, out.lost(dropped, LostByMemory)
}

// ended reports whether a moment is after those that the reader wants.
func (q *FlowQuery) ended(at int64) bool { return !q.Until.IsZero() && at > q.Until.UnixNano() }

func (f *flows) copy(ctx context.Context, out *flowWriter, query FlowQuery, line func(*flowRecord) any) error {
	if query.Follow && !query.Until.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, query.Until)
		defer cancel()
	}
	if err := out.extend(); err != nil {
		return err
	}
	number, err := f.begin(out, query, line)
	if err == nil {
		err = out.flush() // the head of the answer: the reader is there
	}
	for err == nil {
		records, missed, changed := f.ring.read(number)
		if changed != nil {
			number += missed
			if err := errors.Join(out.lost(missed, LostByReader), out.flush()); err != nil || !query.Follow {
				return err
			}
			if !f.wait(ctx, changed) {
				return nil
			}
			continue
		}
		number += missed + uint64(len(records))
		err = errors.Join(out.extend(), out.lost(missed, LostByReader))
		for i := range records {
			r := &records[i]
			if err != nil || query.ended(r.at) || r.at < query.sinceNano() {
				continue
			}
			if value := line(r); value != nil {
				err = out.line(value)
			}
		}
		if ctx.Err() != nil {
			return errors.Join(err, out.flush())
		}
	}
	return err
}

// wait returns once there is more; false: there will be nothing more.
func (f *flows) wait(ctx context.Context, changed <-chan struct{}) bool {
	f.readers.Add(1)
	defer f.readers.Add(-1)
	select {
	case <-changed:
		return true
	case <-ctx.Done():
	case <-f.done:
	}
	return false
}

func (q *FlowQuery) sinceNano() int64 {
	if q.Since.IsZero() {
		return 0
	}
	return q.Since.UnixNano()
}
