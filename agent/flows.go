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
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
)

// lookInterval is how often the recorder looks whether the kernel's ring is still the one
// that it reads.
const lookInterval = 2 * time.Second

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

// newFlows makes what records; nil where flows are not to be recorded. containers are
// Docker's, as they are known now.
func newFlows(config FlowsConfig, datapath *redirect.Datapath, containers func() containers, log *slog.Logger) (*flows, error) {
	if !config.Enabled {
		return nil, nil //nolint:nilnil // nothing is an answer
	}
	node, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("read host name: %w", err)
	}
	f := &flows{
		ring: newFlowRing(config.bytes(), config.length()), guard: newGuardTable(time.Now()), egress: newEgressTable(), datapath: datapath, node: node, log: log,
		pin: filepath.Join(datapath.Paths().PinDir, "maps", "events"), done: make(chan struct{}),
		names: flowNames{known: datapath.Records, cgroupPath: host.CgroupPath, containers: containers},
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
	inode := host.Inode(f.pin)
	watch.Go(func() {
		for {
			if _, alive := pause(ctx, lookInterval, nil); !alive {
				return
			}
			f.ring.tidy(time.Now())
			if host.Inode(f.pin) != inode {
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
	f.problem = ""
	if err != nil {
		f.problem = err.Error()
	}
	f.mu.Unlock()
	switch {
	case err != nil && before != err.Error():
		f.log.Warn("flows are not recorded at present", "why", err)
	case err == nil && before != "":
		f.log.Info("flows are recorded again")
	}
}

// trouble is why nothing is recorded at present; "" where it is.
func (f *flows) trouble() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.problem
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

// lastOf are the last connections of an allocation, the newest first.
func (f *flows) lastOf(allocID string, count int) (list []Flow) {
	ours := func(r *flowRecord) bool {
		return r.verdict != bpfmap.EventsLost && IsConnection(r.verdict) && (r.workload.allocID == allocID || r.peer != nil && r.peer.allocID == allocID)
	}
	first, _ := f.ring.since(time.Time{})
	number := f.ring.last(count, first, ours)
	for {
		records, missed, changed := f.ring.read(number)
		if changed != nil {
			break
		}
		number += missed + uint64(len(records))
		for i := range records {
			if ours(&records[i]) {
				list = append(list, records[i].flow(f.node))
			}
		}
	}
	slices.Reverse(list)
	return list[:min(count, len(list))]
}
