// SPDX-License-Identifier: MPL-2.0

// Package flow records the node's connections with their names, in a bounded ring,
// and counts what came in or left past a proxy.
package flow

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

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/wait"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/monitor"
)

// lookInterval is how often the recorder looks whether the kernel's ring is still the one
// that it reads.
const lookInterval = 2 * time.Second

// Recorder records the node's connections: the one reader of the kernel's ring, for
// any number of readers of its own.
type Recorder struct {
	Ring     *flowRing
	noting   sync.Mutex
	names    flowNames // under noting
	services *virtualServices
	guard    *guardTable
	egress   *egressTable
	facts    atomic.Pointer[flowFacts] // of the newest pass
	datapath *redirect.Datapath
	Node     string
	log      *slog.Logger
	pin      string        // of the kernel's ring
	Done     chan struct{} // closed when nothing is recorded any more
	Readers  atomic.Int32  // that wait for what is to come

	mu      sync.Mutex
	problem string // why nothing is recorded at present; empty: it is
}

// New makes what records; nil where flows are not to be recorded. containers are
// Docker's, as they are known now.
func New(config configfile.FlowsConfig, datapath *redirect.Datapath, containers func() discover.Containers, log *slog.Logger) (*Recorder, error) {
	if !config.Enabled {
		return nil, nil //nolint:nilnil // nothing is an answer
	}
	node, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("read host name: %w", err)
	}
	f := &Recorder{
		Ring: NewRing(config.Bytes(), config.Length()), guard: NewGuardTable(time.Now()), egress: NewEgressTable(), services: NewVirtualServices(),
		datapath: datapath, Node: node, log: log,
		pin: filepath.Join(datapath.Paths().PinDir, "maps", "events"), Done: make(chan struct{}),
		names: flowNames{known: datapath.Records, cgroupPath: host.CgroupPath, containers: containers},
	}
	f.names.services, f.egress.services = f.services, f.services
	f.names.learn(&flowFacts{})
	return f, nil
}

// Learn gives flows the names that a pass found.
func (f *Recorder) Learn(known []inspect.Record, consul catalog.Snapshot) {
	if f != nil {
		f.facts.Store(&flowFacts{known: known, consul: consul})
		f.guard.Keep(known, time.Now())
		f.egress.Keep(known, time.Now())
	}
}

// Run records until ctx ends. What cannot be read now is tried again. consul, where it is
// asked, names the services of the mesh.
func (f *Recorder) Run(ctx context.Context, consul *catalog.Watcher) {
	defer close(f.Done)
	if consul != nil {
		var naming sync.WaitGroup
		defer naming.Wait()
		naming.Go(func() { f.nameServices(ctx, consul.Client) })
	}
	for {
		err := f.read(ctx)
		if ctx.Err() != nil {
			return
		}
		f.tell(err)
		if _, alive := wait.Pause(ctx, time.Second, nil); !alive {
			return
		}
	}
}

// read records until the kernel's ring is another one, as after an upgrade or
// where somebody removed the pins.
func (f *Recorder) read(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var watch sync.WaitGroup
	defer watch.Wait()
	defer cancel()
	inode := host.Inode(f.pin)
	watch.Go(func() {
		for {
			if _, alive := wait.Pause(ctx, lookInterval, nil); !alive {
				return
			}
			f.Ring.Tidy(time.Now())
			if host.Inode(f.pin) != inode {
				cancel()
				return
			}
			f.tell(nil) // it goes well
		}
	})
	err := f.datapath.Events(ctx, func(event monitor.Event) error {
		f.Note(event)
		return nil
	})
	if errors.Is(err, monitor.ErrBusy) {
		return fmt.Errorf("%w: a 'weir events' that began without the agent; end it", err)
	}
	return err
}

// Note records what the kernel tells, or what a start gate is seen to hold.
func (f *Recorder) Note(event monitor.Event) {
	f.noting.Lock()
	defer f.noting.Unlock()
	if facts := f.facts.Load(); facts != nil && facts != f.names.facts {
		f.facts.CompareAndSwap(facts, nil)
		f.names.learn(facts)
	}
	record := f.names.record(event)
	f.Ring.Append(record)
	f.guard.Note(&record)
	f.egress.Note(&record)
}

// tell notes and logs why nothing is recorded, once.
func (f *Recorder) tell(err error) {
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

// Trouble is why nothing is recorded at present; "" where it is.
func (f *Recorder) Trouble() string {
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

func (o *flowWriter) lost(count uint64, cause api.LossCause) error {
	if count == 0 {
		return nil
	}
	return o.line(api.Flow{Schema: 1, Time: time.Now(), Node: o.node, Verdict: bpfmap.EventsLost.String(), Lost: count, Cause: cause})
}

// begin is the number of the first record for a reader, after it was told how
// many it asks for are not there any more.
func (f *Recorder) begin(out *flowWriter, query api.FlowQuery, line func(*Record) any) (uint64, error) {
	if query.Follow && query.Last == 0 && query.Since.IsZero() {
		return f.Ring.end(), nil
	}
	number, dropped := f.Ring.Since(query.Since)
	if query.Last > 0 {
		number = f.Ring.Last(query.Last, number, func(r *Record) bool {
			return !query.Ended(r.At) && r.Verdict != bpfmap.EventsLost && line(r) != nil
		})
		return number, nil
	}
	return number, out.lost(dropped, api.LostByMemory)
}

func (f *Recorder) copy(ctx context.Context, out *flowWriter, query api.FlowQuery, line func(*Record) any) error {
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
		records, missed, changed := f.Ring.Read(number)
		if changed != nil {
			number += missed
			if err := errors.Join(out.lost(missed, api.LostByReader), out.flush()); err != nil || !query.Follow {
				return err
			}
			if !f.wait(ctx, changed) {
				return nil
			}
			continue
		}
		number += missed + uint64(len(records))
		if err = errors.Join(out.extend(), out.lost(missed, api.LostByReader)); err == nil {
			err = out.lines(records, query, line)
		}
		if ctx.Err() != nil {
			return errors.Join(err, out.flush())
		}
	}
	return err
}

// lines writes those of the records that are asked for.
func (o *flowWriter) lines(records []Record, query api.FlowQuery, line func(*Record) any) error {
	for i := range records {
		r := &records[i]
		if query.Ended(r.At) || r.At < query.SinceNano() {
			continue
		}
		value := line(r)
		if value == nil {
			continue
		}
		if err := o.line(value); err != nil {
			return err
		}
	}
	return nil
}

// wait returns once there is more; false: there will be nothing more.
func (f *Recorder) wait(ctx context.Context, changed <-chan struct{}) bool {
	f.Readers.Add(1)
	defer f.Readers.Add(-1)
	select {
	case <-changed:
		return true
	case <-ctx.Done():
	case <-f.Done:
	}
	return false
}

// LastOf are the last connections of an allocation, the newest first.
func (f *Recorder) LastOf(allocID string, count int) (list []api.Flow) {
	ours := func(r *Record) bool {
		return r.Verdict != bpfmap.EventsLost && r.Verdict.IsConnection() && (r.Workload.AllocID == allocID || r.peer != nil && r.peer.AllocID == allocID)
	}
	first, _ := f.Ring.Since(time.Time{})
	number := f.Ring.Last(count, first, ours)
	for {
		records, missed, changed := f.Ring.Read(number)
		if changed != nil {
			break
		}
		number += missed + uint64(len(records))
		for i := range records {
			if ours(&records[i]) {
				list = append(list, f.flow(&records[i]))
			}
		}
	}
	slices.Reverse(list)
	return list[:min(count, len(list))]
}
